"""A score: what a network costs by one set of rules, every total a sum over the ledger's lines and arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

from callbacks.ledger import Array, Ledger, Line
from micronet.counting import Assume, Tally
from micronet.errors import MicronetError
from micronet.rules import Rules, official

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """What was measured on the gate's data: counts, so that no rounding decides.

    Args:
        data: Data set and split: `cifar100 test`.
        correct: Images that were right.
        images: Of how many.
    """

    data: str
    correct: int
    images: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a network costs for one image by one set of rules.

    Args:
        model: Path of the model, or the name of its class.
        ledger: What it computes and stores, whoever counts.
        rules: Who counted.
        tally: The ledger as these rules count it.
        assume: What was assumed and not found.
        accuracy: What was measured, if anything.
    """

    model: str
    ledger: Ledger
    rules: Rules
    tally: Tally
    assume: Assume = field(default_factory=Assume)
    accuracy: Accuracy | None = None

    @property
    def input_size(self) -> tuple[Any, ...]:
        """**Shape** of the image, `(C, H, W)`, or of each input where there are several."""
        return self.ledger.input_size

    @property
    def lines(self) -> tuple[Line, ...]:
        """What runs, in order, with the mults, adds and ops that the rules count: zero where they count nothing."""
        return self.tally.lines

    @property
    def arrays(self) -> tuple[Array, ...]:
        """What is stored."""
        return self.ledger.arrays

    @property
    def params(self) -> int:
        """Numbers that the rules count as parameters."""
        return self.tally.params

    @property
    def storage(self) -> float:
        """32-bit words that they take."""
        return self.tally.storage

    @property
    def mults(self) -> float:
        """Multiplications."""
        return sum(line.mults for line in self.lines)

    @property
    def adds(self) -> float:
        """Additions."""
        return sum(line.adds for line in self.lines)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of convolutions, linear layers and matrix products, zeros among the weights included."""
        return sum(line.macs for line in self.lines)

    @property
    def ops(self) -> float:
        """Operations: multiplications and additions, weighted by the rules."""
        return sum(line.ops for line in self.lines)

    @property
    def score_params(self) -> float:
        """The parameters' part of the score."""
        return self.tally.score_params

    @property
    def score_ops(self) -> float:
        """The operations' part of the score."""
        return self.tally.score_ops

    @property
    def score(self) -> float:
        """The score: the less the better."""
        return self.score_params + self.score_ops

    @property
    def peak_bytes(self) -> int:
        """Most bytes of activations alive at once."""
        return self.ledger.peak_bytes

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Operations that no formula covers: the score is too low by what they cost."""
        return self.ledger.uncounted

    @property
    def by_op(self) -> dict[str, dict[str, float]]:
        """Lines, multiplications, additions and operations of each kind of operation that the rules count."""
        counted = [line for line in self.lines if line.mults or line.adds]
        kinds = {op: [line for line in counted if line.op == op] for op in dict.fromkeys(line.op for line in counted)}
        return {
            op: {
                "lines": len(lines),
                "mults": sum(line.mults for line in lines),
                "adds": sum(line.adds for line in lines),
                "ops": sum(line.ops for line in lines),
            }
            for op, lines in kinds.items()
        }

    @property
    def verdict(self) -> str:
        """Whether the rules' accuracy was reached, in one sentence with counts."""
        gate = self.rules.gate
        asked = f"{gate.correct:,} of {gate.images:,} on {gate.data}"
        if self.accuracy is None:
            classes = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}[gate.data]
            logits = next((line.out_shape[-1] for line in reversed(self.lines) if line.out_shape), classes)
            if logits != classes:
                return f"not qualified: {asked} are asked, and this network tells {logits:,} classes apart"
            known = ":" not in self.model and gate.data != "imagenet"
            return f"not qualified: accuracy unknown ({asked} are asked{f'; --data {gate.data} measures it' * known})"
        got = f"{self.accuracy.correct:,} of {self.accuracy.images:,} correct on {self.accuracy.data}"
        if self.accuracy.data != f"{gate.data} test" or self.accuracy.images != gate.images:
            return f"{got}: not qualified, the rules ask for {asked} test"
        return (
            f"{got}: {'qualifies' if self.accuracy.correct >= gate.correct else 'does not qualify'} ({asked} are asked)"
        )

    def to_json(self) -> dict[str, Any]:
        """Give plain lists, dicts, strings and numbers, in the form that stays the same from version to version."""
        totals = ("params", "storage", "mults", "adds", "macs", "ops", "score_params", "score_ops", "score")
        assumed = {name: value for name, value in vars(self.assume).items() if value is not None}
        options = self.rules.options() | {"assumed": assumed} if assumed else self.rules.options()
        return {
            "model": self.model,
            "input": list(self.input_size),
            "rules": self.rules.name,
            "options": options,
            "totals": {name: getattr(self, name) for name in totals} | {"peak_bytes": self.peak_bytes},
            "lines": [_plain(line) for line in self.lines],
            "arrays": [_plain(array) for array in self.arrays],
            "notes": list(self.tally.notes),
            "uncounted": list(self.uncounted),
            "verdict": self.verdict,
        }


def _plain(record: Line | Array) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(record).items()}


def tally(
    model: str,
    ledger: Ledger,
    rules: Rules,
    assume: Assume | None = None,
    accuracy: Accuracy | None = None,
) -> Score:
    """Count a ledger by some rules.

    Args:
        model: What to call it.
        ledger: What it computes and stores.
        rules: Who counts.
        assume: What to take for granted.
        accuracy: What was measured.

    Raises:
        MicronetError: The rules know nothing of what is assumed.
    """
    assume = assume or Assume()
    try:
        counted = rules.count(ledger, rules, assume)
    except ValueError as error:
        raise MicronetError(f"{model}: {error}") from error
    return Score(
        model=model,
        ledger=ledger,
        rules=rules,
        tally=counted,
        assume=assume,
        accuracy=accuracy,
    )


def score(
    model: "nn.Module | str | PathLike[str]",
    *,
    input_size: Sequence[int] | None = None,
    rules: Rules = official,
    assume: Assume | None = None,
    masks: Mapping[str, Any] | None = None,
    allow_unknown: bool = False,
) -> Score:
    """Score a network for one image.

    Args:
        model: A module, which is left as it was; the path of a `model.pth` or an ONNX file; `timm:NAME` or
            `torchvision:NAME` for an untrained network.
        input_size: **Shape** of the image, `(C, H, W)`; None takes the file's own, and `(3, 32, 32)` for a module.
        rules: Who counts.
        assume: What to take for granted, such as `Assume(bits=8)`.
        masks: For a module: the mask of each masked parameter. None counts a tensor as sparse where that is smaller.
        allow_unknown: Whether operations without a rule are listed as uncounted, not refused.

    Raises:
        MicronetError: The file cannot be read, the network cannot be traced with such an image, or it runs an operation
            without a rule.
    """
    from micronet.model_source import open_model

    source = open_model(model, input_size=input_size, masks=masks)
    return tally(source.name, source.ledger(allow_unknown=allow_unknown), rules, assume)
