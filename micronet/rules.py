"""Whose rules turn a ledger into a score: each as data, with its source and its oddities.

A set of rules says which widths, which lines and which arrays count, and what scores 1. `RULES` holds them by name.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from callbacks.ledger import WEIGHTED, Array, Ledger, Line
from callbacks.seed import CIFAR100_OPS, CIFAR100_PARAMS, SEED_ADD_WEIGHT, SEED_MULT_WEIGHT, seed_cost

# What MobileNetV2-1.4 has at 32 bits; WideResNet-28-10's are the seed's, too.
IMAGENET_PARAMS, IMAGENET_OPS = 6.9e6, 1.17e9
WORD = 32


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The accuracy below which a model has no score: a count of images, so that no rounding decides.

    Args:
        data: The data set whose test split is meant.
        correct: Images that must be right.
        images: Of how many.
    """

    data: str
    correct: int
    images: int


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
class Tally:
    """A ledger as one set of rules counts it.

    Args:
        lines: Its lines, with the multiplications, additions and operations that the rules count.
        params: Numbers that count as parameters.
        storage: 32-bit words that they take.
        score_params: The parameters' part of the score.
        score_ops: The operations' part.
        notes: What the rules decided here, in sentences.
    """

    lines: tuple[Line, ...]
    params: int
    storage: float
    score_params: float
    score_ops: float
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How one source counts.

    Args:
        name: What the source is called here.
        params_norm: Parameters, in 32-bit words, that score 1.
        ops_norm: Operations that score 1.
        count: Counts a ledger by these rules, under assumptions.
        source: Where the rules were published.
        gate: The accuracy that qualifies.
        freebie: Whether a model that quantises nothing counts its numbers and multiplications at 16 bits.
        max_pool: Whether the comparisons of max pooling count as multiplications.
        free_batch_norm: Whether a BatchNorm that cannot be folded costs nothing.
        int_acc_bits: Width of the accumulators of integer sums, where the user states it; 32 without.
        adder_tree: Whether integer products are summed by a tree whose levels grow by one bit.
        ps: Share of weights removed with their structure, for rules that ask.
        pu: Share of the weights that is zero, for rules that ask; None reads it from the model.
        qw: Width of weights, for rules that ask; None reads it from the model.
        qa: Width of activations, likewise.
    """

    name: str
    params_norm: float
    ops_norm: float
    count: Callable[[Ledger, "Rules", Assume], Tally]
    source: str
    gate: Gate
    freebie: bool = True
    max_pool: bool = False
    free_batch_norm: bool = False
    int_acc_bits: int | None = None
    adder_tree: bool = False
    ps: float = 0.0
    pu: float | None = None
    qw: int | None = None
    qa: int | None = None

    def options(self) -> dict[str, Any]:
        """What was chosen within these rules, as plain values."""
        asked = ("ps", "pu", "qw", "qa") if self.count is _imt else ()
        names = asked or ("freebie", "max_pool", "free_batch_norm", "int_acc_bits", "adder_tree")
        return {} if self.count in (_seed, _imt_profile) else {name: getattr(self, name) for name in names}


def stored_bits(array: Array, bits: int, assume: Assume) -> tuple[float, float]:
    """What an array takes in a file, and the share of it that is kept.

    A tensor is sparse where a mask declares it so; where nothing can declare it, where mask and values are smaller than
    all values. A mask takes one bit for each element.

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
    if array.role != "weight" or array.nonzero is None or array.masked is False or array.nonzero == array.numel:
        return array.numel * bits, 1.0
    sparse = array.nonzero * bits + array.numel
    if array.masked or sparse < array.numel * bits:
        return sparse, array.nonzero / array.numel
    return array.numel * bits, 1.0


def _exact(value: float) -> float:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _tree_bits(line: Line, width: int) -> float:
    """Bits of all additions of one output, summed by a tree: first at the products' width, a bit more each level."""
    terms, bits = line.taps, float(width)
    total = 0.0
    while terms > 1:
        total += terms // 2 * min(bits, WORD)
        terms, bits = terms - terms // 2, bits + 1
    return total


def _official(ledger: Ledger, rules: Rules, assume: Assume) -> Tally:
    lines = ledger.lines
    quantised = bool(assume.bits and assume.bits < 16) or any(
        bits < 16 for bits in (*(a.bits for a in ledger.arrays if a.role == "weight"), *(li.act_bits for li in lines))
    )
    freebie = rules.freebie and not quantised and assume.bits is None
    notes = []
    if freebie:
        notes.append("16 bits for free: nothing is quantised, so numbers and multiplications count at 16 bits")
    elif quantised and not assume.bits:
        notes.append("no 16-bit freebie: a part of the model is quantised")

    def width(bits: int) -> int:
        return assume.bits or (min(bits, 16) if freebie else bits)

    gone = {name for line in lines if line.op == "batch_norm" and rules.free_batch_norm for name in line.arrays}
    stored = {a.name: stored_bits(a, width(a.bits), assume) for a in ledger.arrays if a.name not in gone}
    counted = []
    for line in lines:
        density = stored[line.arrays[0]][1] if line.op in WEIGHTED and line.weights else 1
        mults, adds = _official_counts(line, rules, density)
        weight, act = width(line.weight_bits or line.act_bits), width(line.act_bits)
        mult_bits = 1 if line.weights and weight == 1 else max(weight, act)
        integer = line.weights > 0 and weight < 16 and act < 16
        acc_bits = assume.acc or (rules.int_acc_bits if integer and rules.int_acc_bits else line.acc_bits)
        add_cost = adds * acc_bits / WORD
        if rules.adder_tree and integer and line.taps > 1 and density == 1:
            rest = adds - (line.taps - 1) * line.outputs
            add_cost = (_tree_bits(line, weight + act) * line.outputs + rest * WORD) / WORD
        ops = mults * mult_bits / WORD + add_cost
        widths = {"weight_bits": weight if line.weights else 0, "act_bits": act, "acc_bits": acc_bits}
        counted.append(replace(line, mults=mults, adds=adds, ops=ops, **widths))
    notes += _official_notes(ledger, rules, counted)
    kept = [a for a in ledger.arrays if a.name not in gone]
    storage = _exact(sum(bits for bits, _ in stored.values()) / WORD)
    ops = sum(line.ops for line in counted)
    return Tally(
        lines=tuple(counted),
        params=sum(a.numel for a in kept),
        storage=storage,
        score_params=storage / rules.params_norm,
        score_ops=ops / rules.ops_norm,
        notes=tuple(notes),
    )


def _official_counts(line: Line, rules: Rules, density: float) -> tuple[float, float]:
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


def _official_notes(ledger: Ledger, rules: Rules, counted: list[Line]) -> list[str]:
    notes = []
    if any(line.comparisons for line in ledger.lines):
        notes.append(f"max pooling is {'counted: k*k - 1 comparisons' if rules.max_pool else 'not counted'}")
    left = sum(line.op == "batch_norm" and not line.folded for line in ledger.lines)
    if left:
        cost = "cost nothing" if rules.free_batch_norm else "count: 1 multiplication, 1 addition, 2 numbers a channel"
        notes.append(f"{left} BatchNorm(s) that cannot be folded {cost}")
    if rules.int_acc_bits:
        notes.append(
            f"integer sums in {rules.int_acc_bits}-bit accumulators, as you state: nothing in a file proves it"
        )
    if rules.adder_tree:
        notes.append("integer sums by an adder tree, as you state")
    if any(line.adds < 0 for line in counted):
        notes.append("additions below zero where fewer than one tap is left: the published formula does that")
    return notes


def _seed(ledger: Ledger, rules: Rules, assume: Assume) -> Tally:
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
        return ledger.params, ()
    count = sum(array.numel for array in ledger.arrays)
    return count, ("parameters are those of the deployed form: the file does not say what was trained",)


def _imt(ledger: Ledger, rules: Rules, assume: Assume) -> Tally:
    params, notes = _all_params(ledger)
    weights = [array for array in ledger.arrays if array.role == "weight"]
    total = sum(array.numel for array in weights)
    masked = sum(
        a.numel - a.nonzero for a in weights if a.nonzero is not None and stored_bits(a, a.bits, assume)[1] < 1
    )
    pu = rules.pu if rules.pu is not None else assume.sparsity or (masked / total if total else 0.0)
    qw = rules.qw or assume.bits or max((array.bits for array in weights), default=WORD)
    qa = rules.qa or assume.bits or max((line.act_bits for line in ledger.lines), default=WORD)
    if rules.ps + pu > 1:
        raise ValueError(f"ps + pu must be a share of the weights, at most 1, got {rules.ps} + {pu}")
    said = [f"ps={rules.ps:g}, pu={pu:g}, qw={qw}, qa={qa}, w={params:,}, f={sum(li.macs for li in ledger.lines):,}"]
    if rules.ps:
        said.append("w and f of a pruned network are already smaller: (1 - ps) counts the same pruning twice")
    lines = tuple(
        replace(line, mults=line.macs, adds=line.macs, ops=(1 - rules.ps) * max(qw, qa) / WORD * line.macs)
        for line in ledger.lines
    )
    storage = (1 - (rules.ps + pu)) * qw / WORD * params
    return Tally(
        lines=lines,
        params=params,
        storage=_exact(storage),
        score_params=storage / rules.params_norm,
        score_ops=(1 - rules.ps) * max(qw, qa) / WORD * sum(li.macs for li in ledger.lines) / rules.ops_norm,
        notes=(*notes, *said),
    )


def _imt_profile(ledger: Ledger, rules: Rules, assume: Assume) -> Tally:
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


official = Rules(
    name="official",
    params_norm=CIFAR100_PARAMS,
    ops_norm=CIFAR100_OPS,
    count=_official,
    source="MicroNet Challenge, final rules of 2019-09-04: https://micronet-challenge.github.io/scoring_and_submission",
    gate=Gate(data="cifar100", correct=8_000, images=10_000),
)
"""The challenge's final rules, on CIFAR-100.

Storage is that of the deployed form in 32-bit words, sparse tensors as values and a one-bit mask each. Multiplications
count by their widest input, additions at 32 bits unless narrower accumulators are stated; products with binary weights
count 1/32. A model that quantises nothing may count numbers and multiplications at 16 bits. Taps on padding count.
Oddities: max pooling is free (`max_pool` counts it); the mean of a global pool costs a multiplication for each channel;
additions of a sparse layer go below zero where fewer than one tap is left; additions stay at 32 bits under the freebie.
"""

official_imagenet = replace(
    official,
    name="official-imagenet",
    params_norm=IMAGENET_PARAMS,
    ops_norm=IMAGENET_OPS,
    gate=Gate(data="imagenet", correct=37_500, images=50_000),
)
"""The challenge's final rules, on ImageNet: MobileNetV2-1.4 scores 1 + 1, and 75 % top-1 qualify."""

seed = Rules(
    name="seed",
    params_norm=CIFAR100_PARAMS,
    ops_norm=CIFAR100_OPS,
    count=_seed,
    source="the fastai entry to the MicroNet Challenge 2019, write-up of 2019-10-08",
    gate=Gate(data="cifar100", correct=8_000, images=10_000),
)
"""As the fastai entry counted, which printed 0.46343 for its WideResNet-22-6 (0.46343931, cut and not rounded).

Parameters are all parameters, BatchNorm's too, at full width. Convolutions, linear layers and global average pools
count and nothing else: no BatchNorm, ReLU, residual add. Oddities: multiplications are halved for 16 bits while the
parameters are not, a linear layer's bias is not added, and a global average pool adds once more per channel than it
has to. What the write-up's second version counted for ReLU is left out.
"""

imt = Rules(
    name="imt",
    params_norm=5.6e6,
    ops_norm=8.3e8,
    count=_imt,
    source="a course on embedded systems: (1-(ps+pu)) qw/32 w/5.6e6 + (1-ps) max(qw,qa)/32 f/8.3e8",
    gate=Gate(data="cifar10", correct=9_000, images=10_000),
)
"""A course on embedded systems, on CIFAR-10: w all parameters, f the multiply-accumulates of the network as it stands.

Oddity: w and f of a structurally pruned network are already smaller, so that a `ps` above 0 counts its pruning twice.
"""

imt_small = replace(imt, name="imt-2.8e8", ops_norm=2.8e8, source=imt.source.replace("8.3e8", "2.8e8"))
"""The same course's other denominator."""

imt_profile = replace(
    imt,
    name="imt-profile",
    count=_imt_profile,
    source="the same course's counting script: all parameters and multiplications at 16 bits",
)
"""The course's own script: half of all parameters; mults / 2 + adds of convolutions and linear layers.

Oddities: 3 for each element that a BatchNorm gives, folded or not; 1 for each that a ReLU module gives, while a
functional ReLU is not seen; no pooling, no residual add, no bias of a linear layer.
"""

RULES = {rules.name: rules for rules in (official, official_imagenet, seed, imt, imt_small, imt_profile)}
