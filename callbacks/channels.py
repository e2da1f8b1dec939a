"""Groups of channels that go together, and what their removal comes to for a network's tensors.

Pure functions: `dependency.py` finds the groups, `selection.py` chooses channels of them, `removal` turns a choice into
the places and widths that `widths.narrow` takes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from callbacks.widths import Widths, widths

Alive = Mapping[str, Tensor]  # for each group, by its name: bool (n,), which of its channels are still there


@dataclass(frozen=True)
class Axis:
    """The dimension of a layer's tensors along which its output or input channels lie.

    Args:
        size: places along it.
        dims: for each tensor, by its name in the layer, the dimension.
        tied: channels whose numbers are the same modulo this go together, so that a grouped layer's groups stay alike;
            0 where each can go alone.
    """

    size: int
    dims: Mapping[str, int]
    tied: int = 0


@dataclass(frozen=True, eq=False)
class Member:
    """A layer's part in a group.

    Args:
        layer: its name.
        axis: `"out"` where it makes the channels (a normalisation: where it changes each by itself), `"in"` where it
            reads them.
        places: int64 (n, m): for each of the group's channels its places along that axis.
        size: places along that axis in all.
    """

    layer: str
    axis: str
    places: Tensor
    size: int


@dataclass(frozen=True, eq=False)
class Group:
    """Channels of which any can be removed, each with all that belongs to it.

    Args:
        name: of the first layer that makes them.
        channels: how many there are.
        size: what one of them takes in the first layer's width: more than 1 where that is a grouped convolution.
        members: all layers that have to do with them, in the order in which they run.
        kind: equal for groups that are built alike, whatever their widths.
    """

    name: str
    channels: int
    size: int
    members: tuple[Member, ...]
    kind: tuple[Any, ...]

    @property
    def makers(self) -> list[str]:
        """The layers that make the channels, by name: convolutions, linear layers and normalisations."""
        return [member.layer for member in self.members if member.axis == "out"]


def axes(module: nn.Module) -> dict[str, Axis]:
    """The axes of a layer along which channels can be taken away; none for a layer of another kind."""
    if isinstance(module, _ConvNd):
        out, into, groups = module.out_channels, module.in_channels, module.groups
        if groups == out == into and groups > 1:
            return {"out": Axis(out, {"weight": 0, "bias": 0})}
        if module.transposed:
            return {} if groups > 1 else {"out": Axis(out, {"weight": 1, "bias": 0}), "in": Axis(into, {"weight": 0})}
        tied = out // groups if groups > 1 else 0
        return {"out": Axis(out, {"weight": 0, "bias": 0}, tied), "in": Axis(into // groups, {"weight": 1})}
    if isinstance(module, nn.Linear):
        out = Axis(module.out_features, {"weight": 0, "bias": 0})
        return {"out": out, "in": Axis(module.in_features, {"weight": 1})}
    if isinstance(module, nn.PReLU):
        return {"out": Axis(module.num_parameters, {"weight": 0})} if module.num_parameters > 1 else {}
    each = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), 0)
    if isinstance(module, nn.GroupNorm):
        return {"out": Axis(module.num_channels, each, module.num_channels // module.num_groups)}
    return {"out": Axis(module.num_features, each)} if isinstance(module, _NormBase) else {}


def whole(groups: Sequence[Group]) -> dict[str, Tensor]:
    """Every channel of every group is there."""
    return {group.name: torch.ones(group.channels, dtype=torch.bool) for group in groups}


@dataclass(frozen=True)
class Removal:
    """What some channels' removal comes to.

    Args:
        kept: for each tensor that changes, the places of what stays, as `widths.narrow` takes them.
        table: the new widths of the layers that change.
        left: for each axis of a layer that changes, which of its places stay, int64.
    """

    kept: dict[str, Tensor]
    table: Widths
    left: dict[tuple[str, str], Tensor]


def there(groups: Sequence[Group], alive: Alive) -> dict[tuple[str, str], Tensor]:
    """For each axis that a group has places on, which of the places of the whole network are still there: bool."""
    masks: dict[tuple[str, str], Tensor] = {}
    for group in groups:
        for member in group.members:
            mask = masks.setdefault((member.layer, member.axis), torch.ones(member.size, dtype=torch.bool))
            mask[member.places[~alive[group.name]].flatten()] = False
    return masks


def removal(model: nn.Module, groups: Sequence[Group], before: Alive, after: Alive) -> Removal:
    """Say what is to be taken away from a network's tensors so that some channels are gone.

    Args:
        model: the network, from which all that `before` says is gone is gone already; it stays as it is.
        groups: as `find_groups` gave them for the whole network.
        before: which channels it has.
        after: which of them stay.
    """
    modules, table = dict(model.named_modules()), widths(model)
    then, now = there(groups, before), there(groups, after)
    left = {key: now[key][then[key]].nonzero().flatten() for key in now if not torch.equal(now[key], then[key])}
    kept: dict[str, Tensor] = {}
    for layer in dict.fromkeys(layer for layer, _ in left):
        module, prefix = modules[layer], f"{layer}." if layer else ""
        tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        for axis, described in axes(module).items():
            if (layer, axis) not in left:
                continue
            for key in described.dims.keys() & tensors.keys():
                value = tensors[key]
                places = kept.get(prefix + key, torch.arange(value.numel()).reshape(value.shape))
                kept[prefix + key] = places.index_select(described.dims[key], left[layer, axis])
        places_left = {axis: len(left[layer, axis]) for axis in axes(module) if (layer, axis) in left}
        table[layer] = _narrower(module, table[layer], places_left)
    return Removal(kept, {layer: table[layer] for layer, _ in left}, left)


def _narrower(module: nn.Module, wide: Mapping[str, int], places: Mapping[str, int]) -> dict[str, int]:
    """The widths of a layer that has so many places along its axes."""
    if isinstance(module, _ConvNd) and "in" not in axes(module):  # depthwise
        return dict.fromkeys(wide, places["out"])
    if isinstance(module, _ConvNd | nn.Linear):
        out, into = ("out_channels", "in_channels") if isinstance(module, _ConvNd) else ("out_features", "in_features")
        number = wide.get("groups", 1)
        return dict(wide) | {out: places.get("out", wide[out]), into: places.get("in", wide[into] // number) * number}
    name = next(iter(wide))
    return dict(wide) | {name: places["out"]}
