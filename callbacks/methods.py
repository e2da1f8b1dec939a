"""Which method applies to which kind of layer: one public table, which the methods themselves ask.

`verdict(method, layer)` says whether the method **applies** to a layer; **skips** it (the layer stays as it is, and the
method's summary names it with the reason); or **refuses** the network before anything is changed, because leaving the
layer out would leave something else broken. A layer that the user names himself, where the method would skip it, is
refused, too.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

Word = Literal["applies", "skips", "refuses"]

KINDS: dict[str, str] = {
    "conv": "convolution, k x k",
    "conv1x1": "convolution, 1 x 1",
    "grouped": "grouped convolution",
    "depthwise": "depthwise convolution",
    "transposed": "transposed convolution",
    "linear": "linear layer",
    "norm": "normalisation",
    "attention": "attention with weights of its own",
}


@dataclass(frozen=True)
class Verdict:
    """What a method does to a layer.

    Args:
        word: applies, skips or refuses.
        reason: why it does not apply; empty where it does.
    """

    word: Word
    reason: str = ""

    def __bool__(self) -> bool:
        return self.word == "applies"


_YES = Verdict("applies")
_NO_WEIGHTS = Verdict("skips", "it has no weight matrix")
_SLICES = Verdict("skips", "its weights are a kernel for each channel: there are no input channels to choose from")
_ONE_BY_ONE = Verdict("skips", "its kernel is 1 x 1: there is nothing spatial to split")
_NO_KERNEL = Verdict("skips", "it has no kernel to split")
_IN_GROUPS = Verdict("skips", "its channels are split into groups already")
_TRANSPOSED = Verdict("skips", "it is transposed: its filters lie along the other axis")
_ATTENTION = Verdict("skips", "its weights are several matrices in one tensor")
_OWN = Verdict("refuses", "its heads tie channels together in a way that is not followed")
_ROWS = Verdict("skips", "its rows are features or classes: removing them is pruning")
_ONE_WEIGHT = Verdict("skips", "a kernel of it is one weight")

_WEIGHTS = {
    "conv": _YES, "conv1x1": _YES, "grouped": _YES, "depthwise": _YES, "transposed": _YES, "linear": _YES,
    "norm": _NO_WEIGHTS, "attention": _ATTENTION,
}  # fmt: skip
_CHANNELS = {**_WEIGHTS, "norm": _YES, "attention": _OWN}
_SPATIAL = {
    "conv": _YES, "conv1x1": _ONE_BY_ONE, "grouped": _IN_GROUPS, "depthwise": _IN_GROUPS, "transposed": _TRANSPOSED,
    "linear": _NO_KERNEL, "norm": _NO_WEIGHTS, "attention": _ATTENTION,
}  # fmt: skip
_OWN_STATISTICS = Verdict("skips", "its statistics are each image's own, not constants")
_UNRANKED = Verdict("skips", "filters of different groups see different inputs: their distances mean nothing")

# By the method's name and the layer's kind; what depends on a layer's shape, too, is in `verdict`.
TABLE: Mapping[str, Mapping[str, Verdict]] = {
    "sparsify weight": _WEIGHTS,
    "sparsify kernel": {**_WEIGHTS, "conv1x1": _ONE_WEIGHT, "linear": _ONE_WEIGHT},
    "sparsify filter": {**_WEIGHTS, "transposed": _TRANSPOSED, "linear": _ROWS},
    "sparsify 2:4": {**_WEIGHTS, "depthwise": _SLICES, "transposed": _TRANSPOSED},
    "sparsify block": {**_WEIGHTS, "depthwise": _SLICES, "transposed": _TRANSPOSED},
    "prune": _CHANNELS,
    "prune fpgm": {**_CHANNELS, "grouped": _UNRANKED, "depthwise": _UNRANKED},
    "low_rank svd": {**_SPATIAL, "conv": Verdict("skips", "a k x k kernel: spatial_svd or tucker2 split it"),
                     "conv1x1": _YES, "linear": _YES},
    "low_rank spatial_svd": _SPATIAL,
    "low_rank tucker2": _SPATIAL,
    "separable": _SPATIAL,
    "fold_bn": {**_WEIGHTS, "norm": _YES},
    "quantise": {**_WEIGHTS, "transposed": _TRANSPOSED},
}  # fmt: skip

# What depends on more than the kind, for the reader of the table.
NOTES: Mapping[str, str] = {
    "sparsify 2:4": "skips a layer whose input channels (of a group) are not divisible by 4",
    "sparsify block": "skips a layer whose input or output channels (of a group) are not divisible by 4",
    "prune fpgm": "judges no channels by the filters of a layer that it skips: they go as the others of their group "
    "are judged",
    "low_rank": "leaves a layer that its factors would not make smaller, unless ranks are given by name",
    "separable": "leaves a layer of at most 3 input channels, as the one that reads the image, unless it is named",
    "fold_bn": "takes a BatchNorm that directly follows a layer and alone reads it; LayerNorm and GroupNorm, whose "
    "statistics are each image's own, stay",
    "quantise": "skips a layer whose forward may be its own (a subclass), one that shares its weights, and one that no "
    "image reaches",
}

BLOCK = 4  # output by input channels of a block; also the input channels that 2:4 looks at together


def layer_kind(layer: nn.Module) -> str | None:
    """The kind of a layer, one of `KINDS`; None for a module without weights or of another kind."""
    if isinstance(layer, _ConvNd):
        if layer.transposed:
            return "transposed"
        if layer.groups > 1:
            return "depthwise" if layer.groups == layer.in_channels else "grouped"
        return "conv1x1" if math.prod(layer.kernel_size) == 1 else "conv"
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, _NormBase | nn.GroupNorm | nn.LayerNorm):
        return "norm"
    return "attention" if isinstance(layer, nn.MultiheadAttention) else None


def verdict(method: str, layer: nn.Module) -> Verdict:
    """Say what a method does to a layer.

    Args:
        method: a name in `TABLE`.
        layer: any module.

    Raises:
        ValueError: there is no such method.
    """
    if method not in TABLE:
        raise ValueError(f"method must be one of {', '.join(TABLE)}, got {method!r}")
    kind = layer_kind(layer)
    if kind is None:
        return _NO_WEIGHTS
    found = TABLE[method][kind]
    if method == "fold_bn" and kind == "norm" and getattr(layer, "running_mean", None) is None:
        return _OWN_STATISTICS
    if found and method in ("sparsify 2:4", "sparsify block"):
        rows, columns = layer.weight.shape[0] // getattr(layer, "groups", 1), layer.weight.shape[1]
        of = " of a group" if kind == "grouped" else ""
        if columns % BLOCK:
            return Verdict("skips", f"its {columns} input channels{of} are not divisible by {BLOCK}")
        if method == "sparsify block" and rows % BLOCK:
            return Verdict("skips", f"its {rows} output channels{of} are not divisible by {BLOCK}")
    return found


def chosen(method: str, model: nn.Module, named: Iterable[str] | None = None) -> tuple[dict[str, nn.Module], list[str]]:
    """The layers that a method applies to, and what it skips.

    Args:
        method: a name in `TABLE`.
        model: the network; it stays as it is.
        named: the layers that the user names; None for all.

    Returns:
        The layers by their names; a line `name: reason` for each one with a weight matrix that is skipped.

    Raises:
        ValueError: a layer is refused, a named one does not exist or would be skipped, or the method applies to none.
    """
    modules = dict(model.named_modules())
    wanted = list(modules if named is None else named)
    layers, skipped = {}, []
    for name in wanted:
        if name not in modules:
            raise ValueError(f"{method}: the network has no layer {name!r}")
        answer = verdict(method, modules[name])
        if answer:
            layers[name] = modules[name]
        elif answer.word == "refuses" or named is not None:
            raise ValueError(f"{method} does not work on {name or 'the network'}: {answer.reason}")
        elif answer is not _NO_WEIGHTS:
            skipped.append(f"{name}: {answer.reason}")
    if not layers:
        raise ValueError(f"{method}: there is no layer that it applies to ({'; '.join(skipped[:3]) or 'no weights'})")
    return layers, skipped


def by_reason(skipped: Iterable[str], most: int | None = None) -> str:
    """What a method skips, in one line: the layers that have a reason in common together.

    Args:
        skipped: lines `name: reason`, as `chosen` gives them.
        most: names to give for each reason; of further ones only their number. None for all.
    """
    reasons: dict[str, list[str]] = {}
    for line in skipped:
        name, _, reason = line.partition(": ")
        reasons.setdefault(reason, []).append(name or "the network")
    parts = []
    for reason, names in reasons.items():
        more = f" and {len(names[most:])} more" if most is not None and names[most:] else ""
        parts.append(f"{', '.join(names[:most])}{more} ({reason})")
    return "; ".join(parts)


def as_markdown() -> str:
    """The table in Markdown, reasons and notes below it: what the README shows."""
    reasons: dict[str, int] = {}

    def cell(answer: Verdict) -> str:
        return "yes" if answer else f"{answer.word} ({reasons.setdefault(answer.reason, len(reasons) + 1)})"

    rows = [["method", *KINDS.values()], ["---"] * (len(KINDS) + 1)]
    rows += [[f"`{method}`", *(cell(answers[kind]) for kind in KINDS)] for method, answers in TABLE.items()]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items())]
    return "\n".join([*lines, "", *(f"- `{method}` {note}" for method, note in NOTES.items())])
