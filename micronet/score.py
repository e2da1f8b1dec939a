"""Whose rules turn the lines of `callbacks/op_trace.py` into a score, and the score with all that it sums up."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

from torch import nn

from callbacks.op_trace import (
    CIFAR100_OPS,
    CIFAR100_PARAMS,
    SEED_ADD_WEIGHT,
    SEED_MULT_WEIGHT,
    Line,
    count_ops,
    seed_cost,
    total_params,
)
from micronet.errors import MicronetError


@dataclass(frozen=True)
class Rules:
    """How one source counts.

    The score is `params / params_norm + (mult_weight * mults + add_weight * adds) / ops_norm`.

    Args:
        name: What the source is called here.
        params_norm: Parameters that score 1.
        ops_norm: Operations that score 1.
        mult_weight: Operations that one multiplication counts as.
        add_weight: Operations that one addition counts as.
        cost: The multiplications and additions that a line counts as; `(0, 0)` where it is not counted.
        source: Where the rules were published.
    """

    name: str
    params_norm: float
    ops_norm: float
    mult_weight: float
    add_weight: float
    cost: Callable[[Line], tuple[int, int]]
    source: str


seed = Rules(
    name="seed",
    params_norm=CIFAR100_PARAMS,
    ops_norm=CIFAR100_OPS,
    mult_weight=SEED_MULT_WEIGHT,
    add_weight=SEED_ADD_WEIGHT,
    cost=seed_cost,
    source="the fastai entry to the MicroNet Challenge 2019, write-up of 2019-10-08",
)
"""As the fastai entry counted, which printed 0.46343 for its WideResNet-22-6 (0.46343931, cut and not rounded).

Parameters are all parameters, BatchNorm's too, at full width. Convolutions, linear layers and global average pools
count and nothing else: no BatchNorm, ReLU, residual add. Oddities: multiplications are halved for 16 bits while the
parameters are not, a linear layer's bias is not added, and a global average pool adds once more per channel than it
has to. Layers that are fed by parameters alone count, as they run. What the write-up's second version counted for ReLU
is left out.
"""


@dataclass(frozen=True)
class Score:
    """What a network costs for one image by one set of rules; every total is a sum over `lines`.

    Args:
        model: Path of the model, or the name of its class.
        input_size: **Shape** of the image, `(C, H, W)`.
        rules: Who counted.
        params: Count of all parameters.
        lines: What runs, in order, with the mults and adds that the rules count: zero where they do not count a line.
    """

    model: str
    input_size: tuple[int, ...]
    rules: Rules
    params: int
    lines: tuple[Line, ...]

    @property
    def mults(self) -> int:
        """Multiplications."""
        return sum(line.mults for line in self.lines)

    @property
    def adds(self) -> int:
        """Additions."""
        return sum(line.adds for line in self.lines)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the convolutions and linear layers."""
        return sum(line.macs for line in self.lines)

    @property
    def ops(self) -> float:
        """Operations: multiplications and additions, weighted by the rules."""
        return self.ops_of(self.lines)

    @property
    def score_params(self) -> float:
        """The parameters' part of the score."""
        return self.params / self.rules.params_norm

    @property
    def score_ops(self) -> float:
        """The operations' part of the score."""
        return self.ops / self.rules.ops_norm

    @property
    def score(self) -> float:
        """The score: the less the better."""
        return self.score_params + self.score_ops

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
                "ops": self.ops_of(lines),
            }
            for op, lines in kinds.items()
        }

    @property
    def uncounted(self) -> tuple[str, ...]:
        """The kinds of operation that no formula covers: right only under rules that do not count them."""
        return tuple(dict.fromkeys(line.op for line in self.lines if line.rule is None))

    def ops_of(self, lines: Sequence[Line]) -> float:
        """Weight the multiplications and additions of some lines by the rules."""
        mults, adds = sum(line.mults for line in lines), sum(line.adds for line in lines)
        return self.rules.mult_weight * mults + self.rules.add_weight * adds

    def to_json(self) -> dict[str, Any]:
        """Give plain lists, dicts, strings and numbers, in the form that stays the same from version to version."""
        totals = ("params", "mults", "adds", "macs", "ops", "score_params", "score_ops", "score")
        return {
            "model": self.model,
            "input": list(self.input_size),
            "rules": self.rules.name,
            "options": {},
            "totals": {name: getattr(self, name) for name in totals},
            "lines": [
                {key: list(value) if isinstance(value, tuple) else value for key, value in vars(line).items()}
                for line in self.lines
            ],
        }


def _counted(line: Line, rules: Rules) -> Line:
    mults, adds = rules.cost(line)
    return dataclasses.replace(line, mults=mults, adds=adds)


def score(
    model: nn.Module | str | PathLike[str], *, input_size: Sequence[int] | None = None, rules: Rules = seed
) -> Score:
    """Score a network for one image.

    Args:
        model: A module, which is left as it was, or the path of a `model.pth`.
        input_size: **Shape** of the image, `(C, H, W)`; None takes the file's own, and `(3, 32, 32)` for a module.
        rules: Who counts.

    Raises:
        MicronetError: The file cannot be read, or the network cannot be traced with such an image.
    """
    if isinstance(model, nn.Module):
        name, size = type(model).__name__, input_size or (3, 32, 32)
    else:
        from micronet.bundle import load

        name = fspath(model)
        bundle = load(model)
        model, size = bundle.model, input_size or bundle.input_size
    try:
        lines = count_ops(model, size)
    except ValueError as error:  # TraceError, or an input size that is none
        raise MicronetError(f"{name}: {error}") from error
    return Score(
        model=name,
        input_size=tuple(size),
        rules=rules,
        params=total_params(model),
        lines=tuple(_counted(line, rules) for line in lines),
    )
