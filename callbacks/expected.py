"""What a method expects to change about a network's cost, told before it runs.

What: a callback that makes a network cheaper defines `expected`, a method without arguments that gives an `Expected`:

    def expected(self) -> Expected:
        return Expected(sparsity=self.sparsity, estimate=self.scope == "global")

Whoever plans a training reads it (`declared`), adds up the stages (`together`, `follow`, which refuse contradictions),
and changes a ledger by it (`narrowed`, `requantised`), without a list of the methods that there are.
When: for what outlasts the fit: zeros, removed channels, widths. A method that only trains (`EMA`, MixUp) has none.
Cost: none; `expected` reads the arguments of `__init__` and needs no Learner.
Interactions: a ratio is always an estimate: only the pruning itself knows which layers depend on each other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from callbacks.graph import Shape
from callbacks.ledger import Array, Ledger, Line


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What will hold of a network when a fit with a method is over; what is None, or a ratio of 0, stays as it was.

    Args:
        ratio: Share of the channels that the fit removes, in [0, 1). Where a share s of the parameters or of the
            multiply-accumulates is aimed at, `1 - (1 - s) ** 0.5`, and an estimate.
        sparsity: Share of every convolution's and linear layer's weights that is zero, in [0, 1).
        weight_bits: Width of the weights, 1 to 32.
        act_bits: Width of activations and of all constants but weights, 1 to 32.
        estimate: Whether a layer may come out otherwise, as by a criterion that compares the weights of all layers.
        partial: Whether the zeros are in some layers only, so that `sparsity` says less than what others may leave.
        masked: Names of the weights that get a mask, where they are known.

    Raises:
        ValueError: An argument is out of its range.
    """

    ratio: float = 0.0
    sparsity: float | None = None
    weight_bits: int | None = None
    act_bits: int | None = None
    estimate: bool = False
    partial: bool = False
    masked: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("ratio", "sparsity"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be a fraction in [0, 1), got {value!r}")
        for name in ("weight_bits", "act_bits"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 32:
                raise ValueError(f"{name} must be a width from 1 to 32, got {value!r}")

    def __bool__(self) -> bool:
        return bool(self.ratio or self.sparsity or self.weight_bits or self.act_bits)

    @property
    def estimated(self) -> bool:
        """Whether the numbers that follow from it are an estimate, and not what will be counted."""
        return self.estimate or self.ratio > 0


def declared(cb: Any) -> Expected | None:
    """What a callback declares; None where it declares nothing.

    Args:
        cb: A callback, in a Learner or not.
    """
    # On the class: a Callback's unknown attributes are looked up in the Learner, and from there in the network.
    return cb.expected() if callable(getattr(type(cb), "expected", None)) else None


def together(changes: Sequence[Expected]) -> Expected:
    """What the methods of one fit change together.

    Args:
        changes: What each of them declares.

    Raises:
        ValueError: Two of them declare different values of one thing.
    """
    found: dict[str, Any] = {}
    partial = any(change.partial for change in changes)
    for name in ("sparsity", "weight_bits", "act_bits"):
        values = sorted({getattr(change, name) for change in changes} - {None})
        if len(values) > 1 and not (name == "sparsity" and partial):
            raise ValueError(f"two methods of one fit want another {name}: {values[0]} and {values[-1]}")
        found[name] = values[-1] if values else None
    ratio = 1 - math.prod(1 - change.ratio for change in changes)
    masked = tuple(dict.fromkeys(name for change in changes for name in change.masked))
    estimate = any(change.estimate for change in changes)
    return Expected(ratio=ratio, **found, estimate=estimate, partial=partial, masked=masked)


def follow(before: Expected, change: Expected) -> Expected:
    """What holds after a fit, given what held before it.

    Args:
        before: What all fits before it left.
        change: What this one declares.

    Raises:
        ValueError: The fit wants what the ones before it made impossible.
    """
    bits = before.weight_bits
    if bits and change.ratio:
        raise ValueError(f"channels are removed (ratio {change.ratio:g}) after quantising to {bits} bits: prune first")
    part = before.partial or change.partial  # which layers' zeros these are is not compared
    if change.sparsity is not None and change.sparsity < (before.sparsity or 0) and not part:
        raise ValueError(f"sparsity {change.sparsity:g} is asked where an earlier fit left {before.sparsity:g}")
    new = {name: getattr(change, name) for name in ("sparsity", "weight_bits", "act_bits")}
    kept = {name: getattr(before, name) if value is None else value for name, value in new.items()}
    if part and kept["sparsity"] is not None:  # at least the zeros of the one or the other
        kept["sparsity"] = max(kept["sparsity"], before.sparsity or 0)
    ratio = 1 - (1 - before.ratio) * (1 - change.ratio)
    masked = tuple(dict.fromkeys(before.masked + change.masked))
    return Expected(ratio=ratio, **kept, estimate=before.estimate or change.estimate, partial=part, masked=masked)


def requantised(ledger: Ledger, weight_bits: int | None, act_bits: int | None) -> Ledger:
    """A ledger at other widths.

    Args:
        ledger: What it costs as it is.
        weight_bits: Width of the weights; None as they are.
        act_bits: Width of activations and of all constants but weights; None as they are.
    """
    arrays = [replace(a, bits=(weight_bits if a.role == "weight" else act_bits) or a.bits) for a in ledger.arrays]
    lines = [replace(line, weight_bits=(line.weight_bits and weight_bits) or line.weight_bits) for line in ledger.lines]
    lines = [replace(line, act_bits=act_bits or line.act_bits) for line in lines]
    return replace(ledger, lines=tuple(lines), arrays=tuple(arrays))


def narrowed(ledger: Ledger, ratio: float) -> Ledger:
    """Estimate what a network costs with a share of the channels of every layer removed.

    The image keeps its channels and the last layer its outputs; all other widths shrink alike, so that most layers keep
    a share of `(1 - ratio) ** 2` of their weights.

    Args:
        ledger: What the whole network costs.
        ratio: Share of the channels that is removed, in [0, 1).
    """
    kept = {array.name for array in ledger.arrays if array.role == "weight"}
    layers = [line for line in ledger.lines if line.weights and line.arrays and line.arrays[0] in kept]
    if not ratio or not layers:
        return ledger
    cut = _Cut(ledger, 1 - ratio, {line.arrays[0]: line for line in reversed(layers)}, layers[-1])
    params = ledger.params
    if params is not None:  # what was folded away is BatchNorm's, a few numbers a channel
        gone = params - sum(array.numel for array in ledger.arrays)
        params = sum(array.numel for array in cut.arrays.values()) + round(gone * (1 - ratio))
    return replace(
        ledger,
        lines=tuple(map(cut.line, ledger.lines)),
        arrays=tuple(cut.arrays.values()),
        params=params,
        peak_bytes=cut.alive(ledger.peak_bytes),
    )


class _Cut:
    """Narrows arrays and lines."""

    def __init__(self, ledger: Ledger, keep: float, readers: dict[str, Line], head: Line) -> None:
        self.keep, self.readers, self.head, self.image = keep, readers, head, ledger.lines[0].in_shape
        self.whole = {array.name: array for array in ledger.arrays}
        self.arrays = {array.name: self.array(array, self.readers.get(array.name)) for array in ledger.arrays}

    def alive(self, live_bytes: int) -> int:
        """Bytes of activations; the image is its caller's, and stays as it is."""
        held = 4 * math.prod(self.image)
        return held + round((live_bytes - held) * self.keep)

    def width(self, channels: int) -> int:
        return max(1, round(channels * self.keep))

    def shape(self, shape: Shape) -> Shape:
        """A tensor's: `(C, H, W)`, `(C,)`, or tokens `(N, C)`."""
        if not shape or shape in (self.image, self.head.out_shape):
            return shape
        axis = 1 if len(shape) == 2 else 0
        return *shape[:axis], self.width(shape[axis]), *shape[axis + 1 :]

    def array(self, array: Array, reader: Line | None) -> Array:
        shape = list(array.shape)
        if reader is not None and len(shape) > 1:
            shape[0] = shape[0] if reader is self.head else self.width(shape[0])
            shape[1] = shape[1] if reader.in_shape == self.image else self.width(shape[1])
        elif len(shape) == 1 and array.name not in self.head.arrays:
            shape[0] = self.width(shape[0])
        # A constant of more axes, such as an embedding of places, may have channels in any of them.
        nonzero = None if array.nonzero is None else round(array.nonzero * math.prod(shape) / max(1, array.numel))
        return replace(array, shape=tuple(shape), nonzero=nonzero)

    def line(self, line: Line) -> Line:
        line = replace(line, live_bytes=self.alive(line.live_bytes))
        shapes = {"in_shape": self.shape(line.in_shape), "out_shape": self.shape(line.out_shape)}
        if not line.arrays or line.arrays[0] not in self.readers:
            share = 1.0 if line.in_shape == self.image else self.keep
            names = ("mults", "adds", "macs", "comparisons", "constants")
            return replace(line, **shapes, **{name: round(getattr(line, name) * share) for name in names})
        then, now = self.whole[line.arrays[0]], self.arrays[line.arrays[0]]
        share, outputs = now.numel / then.numel, now.shape[0] / then.shape[0]
        macs = round(line.macs * share)
        return replace(
            line,
            **shapes,
            taps=round(line.taps * share / outputs),
            weights=now.numel,
            nonzero=now.nonzero,
            constants=sum(self.arrays[name].numel for name in line.arrays[1:]),
            mults=round(line.mults * share),
            adds=macs + round((line.adds - line.macs) * outputs),  # one addition fewer than taps, one more with a bias
            macs=macs,
        )
