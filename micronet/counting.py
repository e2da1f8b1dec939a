"""How a ledger is counted by whoever's rules: widths, sparsity, what counts and what does not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from callbacks.ledger import Array, Ledger, Line
from callbacks.seed import SEED_ADD_WEIGHT, SEED_MULT_WEIGHT, seed_cost

if TYPE_CHECKING:
    from micronet.rules import Rules

WORD = 32


@dataclass(frozen=True, kw_only=True)
class Assume:
    """What a model would cost if it were different: no measurement, and marked as an assumption wherever it is shown.

    Args:
        bits: Width of all weights, constants and activations, 1 to 32.
        acc: Width of all accumulators, 1 to 32.
        sparsity: Share of every convolution's and linear layer's weights that is zero, in [0, 1).
    """

    bits: int | None = None
    acc: int | None = None
    sparsity: float | None = None

    def __post_init__(self) -> None:
        for name in ("bits", "acc"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= WORD:
                raise ValueError(f"{name} must be a width from 1 to {WORD}, got {value!r}")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be a fraction in [0, 1), got {self.sparsity!r}")

    def __bool__(self) -> bool:
        return (self.bits, self.acc, self.sparsity) != (None, None, None)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How an array is stored by some rules.

    Args:
        bits: Width of one value.
        density: Share of the elements that are kept, 1 for a dense array.
        words: 32-bit words that it takes, its mask included.
    """

    bits: int
    density: float
    words: float


@dataclass(frozen=True, kw_only=True)
class Tally:
    """A ledger as one set of rules counts it.

    Args:
        lines: Its lines, with the multiplications, additions and operations that the rules count.
        params: Numbers that count as parameters.
        storage: 32-bit words that they take.
        score_params: The parameters' part of the score.
        score_ops: The operations' part.
        notes: What the rules decided here, in sentences.
        stored: How each array is stored, by its name; empty where the rules count parameters and not arrays.
    """

    lines: tuple[Line, ...]
    params: int
    storage: float
    score_params: float
    score_ops: float
    notes: tuple[str, ...]
    stored: Mapping[str, Stored] = field(default_factory=dict)


def stored_bits(array: Array, bits: int, assume: Assume) -> tuple[float, float]:
    """What an array takes in a file, and the share of it that is kept: as `Array.stored`, or as it is assumed.

    Args:
        array: The array.
        bits: Width of one value.
        assume: An assumed sparsity holds for weights.

    Returns:
        Bits; share of the elements that are kept, 1 for a dense array.
    """
    if array.role == "weight" and assume.sparsity is not None:
        density = 1 - assume.sparsity
        return array.numel * bits * density + (array.numel if assume.sparsity > 0 else 0), density
    return array.stored(bits)


def _exact(value: float) -> float:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _tree_bits(terms: float, width: int) -> float:
    """Bits of all additions of one sum, made by a tree: first at the products' width, a bit more each level.

    Args:
        terms: How many are summed; between two whole numbers, as it is on average in a sparse layer, between the two.
        width: Bits of one term.
    """
    whole = int(terms)
    if terms > whole:
        share = terms - whole
        return (1 - share) * _tree_bits(whole, width) + share * _tree_bits(whole + 1, width)
    total, bits = 0.0, width
    while whole > 1:
        total += whole // 2 * min(bits, WORD)
        whole, bits = whole - whole // 2, bits + 1
    return total


def _is_quantised(ledger: Ledger) -> bool:
    narrow = any(array.role == "weight" and array.bits < 16 for array in ledger.arrays)
    return narrow or any(line.op in ("quantize", "dequantize") for line in ledger.lines)


def count_official(ledger: Ledger, rules: "Rules", assume: Assume) -> Tally:
    """Count by the challenge's final rules."""
    quantised = _is_quantised(ledger)
    freebie = rules.freebie and not quantised and assume.bits is None
    notes = []
    if freebie:
        notes.append("16 bits for free: nothing is quantised, so numbers and multiplications count at 16 bits")
    elif quantised and not assume.bits:
        notes.append("no 16-bit freebie: a part of the model is quantised")

    def width(bits: int) -> int:
        return assume.bits or (min(bits, 16) if freebie else bits)

    gone = {name for li in ledger.lines if li.op == "batch_norm" and rules.free_batch_norm for name in li.arrays}
    stored = {}
    for array in ledger.arrays:
        if array.name not in gone:
            bits, density = stored_bits(array, width(array.bits), assume)
            stored[array.name] = Stored(bits=width(array.bits), density=density, words=bits / WORD)
    counted = [_official_line(line, rules, assume, width, stored) for line in ledger.lines]
    storage = _exact(sum(array.words for array in stored.values()))
    return Tally(
        lines=tuple(counted),
        params=sum(array.numel for array in ledger.arrays if array.name in stored),
        storage=storage,
        score_params=storage / rules.params_norm,
        score_ops=sum(line.ops for line in counted) / rules.ops_norm,
        notes=(*notes, *_official_notes(ledger, rules, counted)),
        stored=stored,
    )


def _official_line(
    line: Line, rules: "Rules", assume: Assume, width: Callable[[int], int], stored: Mapping[str, Stored]
) -> Line:
    density = stored[line.weight_array].density if line.weight_array else 1
    mults, adds = _official_counts(line, rules, density)
    weight, act = width(line.weight_bits or line.act_bits), width(line.act_bits)
    mult_bits = 1 if line.weights and weight == 1 else max(weight, act)
    line = replace(line, weight_bits=weight if line.weights else 0, act_bits=act)
    integers = _sums_integers(line)
    acc_bits = assume.acc or (rules.int_acc_bits if integers else None) or line.acc_bits
    add_bits = adds * acc_bits
    if rules.adder_tree and integers:
        sums = mults - line.outputs  # what is left are biases
        add_bits = _tree_bits(mults / line.outputs, weight + act) * line.outputs + (adds - sums) * WORD
    ops = mults * mult_bits / WORD + add_bits / WORD
    return replace(line, mults=mults, adds=adds, ops=ops, acc_bits=acc_bits)


def _sums_integers(line: Line) -> bool:
    """Whether a line sums products of codes, by the widths that it counts with, assumed ones among them."""
    return line.weights > 0 and line.weight_bits < 16 and line.act_bits < 16


def _official_counts(line: Line, rules: "Rules", density: float) -> tuple[float, float]:
    if line.op == "batch_norm" and rules.free_batch_norm:
        return 0, 0
    mults = line.mults
    if density != 1:
        exact = line.mults * (line.nonzero or 0)
        # Whole weights at whole positions: an integer, wherever the density is a count.
        known = line.nonzero is not None and density == line.nonzero / line.weights and exact % line.weights == 0
        mults = exact // line.weights if known else line.mults * density
    adds = line.adds - (line.mults - mults)
    return mults + (line.comparisons if rules.max_pool else 0), adds


def _official_notes(ledger: Ledger, rules: "Rules", counted: list[Line]) -> list[str]:
    notes = []
    if any(line.comparisons for line in ledger.lines):
        notes.append(f"max pooling is {'counted: k*k - 1 comparisons' if rules.max_pool else 'not counted'}")
    left = sum(line.op == "batch_norm" and not line.folded for line in ledger.lines)
    if left:
        cost = "cost nothing" if rules.free_batch_norm else "count: 1 multiplication, 1 addition, 2 numbers a channel"
        notes.append(f"{left} BatchNorm(s) that cannot be folded {cost}")
    integers = any(_sums_integers(line) for line in counted)
    if not integers and (rules.int_acc_bits or rules.adder_tree):
        notes.append("no integers are summed here: what you state of accumulators or an adder tree changes nothing")
    if integers and rules.int_acc_bits:
        width = f"{rules.int_acc_bits}-bit"
        notes.append(f"integer sums in {width} accumulators, as you state: nothing in a file proves it")
    if integers and rules.adder_tree:
        notes.append("integer sums by an adder tree, as you state")
    if any(line.adds < 0 for line in counted):
        notes.append("additions below zero where fewer than one tap is left: the published formula does that")
    return notes


def count_seed(ledger: Ledger, rules: "Rules", assume: Assume) -> Tally:
    """Count as the fastai entry did."""
    if assume:
        raise ValueError("the seed rules know no bits and no sparsity: nothing to assume")
    params, notes = _all_params(ledger)
    costs = [seed_cost(line) for line in ledger.lines]
    lines = tuple(
        replace(line, mults=mults, adds=adds, ops=SEED_MULT_WEIGHT * mults + SEED_ADD_WEIGHT * adds)
        for line, (mults, adds) in zip(ledger.lines, costs, strict=True)
    )
    return Tally(
        lines=lines,
        params=params,
        storage=params,
        score_params=params / rules.params_norm,
        score_ops=sum(line.ops for line in lines) / rules.ops_norm,
        notes=notes,
    )


def _all_params(ledger: Ledger) -> tuple[int, tuple[str, ...]]:
    if ledger.params is not None:
        return ledger.params, ("params are all parameters as trained; the lines tell of the deployed form",)
    count = sum(array.numel for array in ledger.arrays)
    return count, ("parameters are those of the deployed form: the file does not say what was trained",)


def count_imt(ledger: Ledger, rules: "Rules", assume: Assume) -> Tally:
    """Count by the course's formula."""
    params, notes = _all_params(ledger)
    weights = [array for array in ledger.arrays if array.role == "weight"]
    total = sum(array.numel for array in weights)
    masked = sum(
        a.numel - a.nonzero for a in weights if a.nonzero is not None and stored_bits(a, a.bits, assume)[1] < 1
    )
    if assume.acc:
        raise ValueError("the imt rules know no accumulators: bits and sparsity are all that can be assumed")
    found = masked / total if total else 0.0
    pu = next(share for share in (rules.pu, assume.sparsity, found) if share is not None)
    qw = rules.qw or assume.bits or max((array.bits for array in weights), default=WORD)
    qa = rules.qa or assume.bits or max((line.act_bits for line in ledger.lines), default=WORD)
    if rules.ps + pu > 1:
        raise ValueError(f"ps + pu must be a share of the weights, at most 1, got {rules.ps} + {pu}")
    macs, ops_per_mac = sum(line.macs for line in ledger.lines), (1 - rules.ps) * max(qw, qa) / WORD
    said = [f"ps={rules.ps:g}, pu={pu:g}, qw={qw}, qa={qa}, w={params:,}, f={macs:,}"]
    if rules.ps:
        said.append("w and f of a pruned network are already smaller: (1 - ps) counts the same pruning twice")
    lines = tuple(replace(line, mults=line.macs, adds=line.macs, ops=ops_per_mac * line.macs) for line in ledger.lines)
    storage = (1 - (rules.ps + pu)) * qw / WORD * params
    return Tally(
        lines=lines,
        params=params,
        storage=_exact(storage),
        score_params=storage / rules.params_norm,
        score_ops=ops_per_mac * macs / rules.ops_norm,
        notes=(*notes, *said),
    )


def count_imt_profile(ledger: Ledger, rules: "Rules", assume: Assume) -> Tally:
    """Count as the course's script did."""
    if assume:
        raise ValueError("the imt-profile rules know no bits and no sparsity: nothing to assume")
    params, notes = _all_params(ledger)
    lines = []
    for line in ledger.lines:
        mults, adds = seed_cost(line) if line.op in ("conv2d", "conv_transpose2d", "linear") else (0, 0)
        if line.op == "batch_norm":
            adds = 3 * line.outputs
        elif line.op == "relu" and line.module == "ReLU":  # a hook sees modules only
            adds = line.outputs
        lines.append(replace(line, mults=mults, adds=adds, ops=mults / 2 + adds))
    return Tally(
        lines=tuple(lines),
        params=params,
        storage=params / 2,
        score_params=params / 2 / rules.params_norm,
        score_ops=sum(line.ops for line in lines) / rules.ops_norm,
        notes=notes,
    )
