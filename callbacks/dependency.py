"""Which channels of a network go together: groups found by data flow, checked by taking some of them away.

A channel that one layer makes and others read can only be removed from all of them at once: with its filter, its
BatchNorm, its places in every layer that reads it, and with every other channel that is added to it. Torch-Pruning
(Fang et al. 2023, "DepGraph") reads these dependencies off autograd's graph of a copy. Nothing of it touches the
network itself: what is removed is computed here as places of tensors, and taken away by `widths.narrow`.

`find_groups` proves what it found: with half of every group's channels removed, the copy must answer as a whole copy
does in which these channels' weights are zero. A group that fails is left out, and named.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from callbacks.channels import Group, Member, axes, removal, whole
from callbacks.copies import copied, on_cpu
from callbacks.dependency_graph import Flow, Spot, trace_channels
from callbacks.fake_quantize import quantised_layers
from callbacks.methods import verdict
from callbacks.modules import tensors
from callbacks.widths import narrow, shapes_at, widths


def find_groups(model: nn.Module, input_size: Sequence[int]) -> tuple[list[Group], list[str]]:
    """Find the channels that can be removed from a network.

    Args:
        model: the network; it stays as it is.
        input_size: **shape** of one image, `(C, H, W)`.

    Returns:
        The groups, in the order in which their first layers run; neither the image's channels nor the network's outputs
        are among them. And a line `name: reason` for each group that has to be left out.

    Raises:
        ValueError: the network has a layer that pruning refuses, can't be followed, or has no group.
    """
    if quantised_layers(model):
        raise ValueError("its layers are quantised: channels go first, bits after that")
    for name, module in model.named_modules():
        answer = verdict("prune", module)
        if answer.word == "refuses":
            raise ValueError(f"pruning does not work on {name or 'the network'}: {answer.reason}")
    shadow = copied(model, on_cpu).float()
    order, flows = trace_channels(shadow, input_size)
    if any(axes(module) and name not in order for name, module in shadow.named_modules()):
        order, flows = trace_channels(shadow.train(), input_size)  # further heads run in training only
        shadow.eval()
    groups, skipped = _as_groups(shadow, order, flows)
    groups, failed = _proven(shadow, groups, input_size)
    skipped += [f"{group.name}: its channels reach further than could be followed" for group in failed]
    if not groups:
        raise ValueError(f"no channel of the network can be removed ({'; '.join(skipped[:3]) or 'no layer'})")
    return groups, skipped


def _unfit(shadow: nn.Module, layers: set[str]) -> str:
    """Why channels of these layers can't be removed; empty where they can."""
    modules, table = dict(shadow.named_modules()), widths(shadow)
    owners = Counter(id(p) for module in modules.values() for p in module.parameters(recurse=False))
    for name in sorted(layers):
        if any(owners[id(p)] > 1 for p in modules[name].parameters(recurse=False)):
            return f"the weights of {name} are another layer's, too"
        if not axes(modules[name]):
            return f"{name} is a {type(modules[name]).__name__}, which can't be made narrower"
        try:
            shapes_at(shadow, {name: table[name]})
        except ValueError as error:
            return str(error)
    return ""


class _Joined:
    """Places that go together, in sets that can be joined."""

    def __init__(self) -> None:
        self.parent: dict[Spot, Spot] = {}

    def top(self, spot: Spot) -> Spot:
        """The place that stands for a set."""
        self.parent.setdefault(spot, spot)
        while self.parent[spot] != spot:
            self.parent[spot] = spot = self.parent[self.parent[spot]]
        return spot

    def join(self, one: Spot, other: Spot) -> None:
        """Make one set of two."""
        self.parent[self.top(one)] = self.top(other)

    def sets(self) -> list[list[Spot]]:
        """All sets."""
        found: dict[Spot, list[Spot]] = defaultdict(list)
        for spot in sorted(self.parent):
            found[self.top(spot)].append(spot)
        return list(found.values())


def _as_groups(shadow: nn.Module, order: Sequence[str], flows: Mapping[str, Flow]) -> tuple[list[Group], list[str]]:
    """Join what shares a place, and put what has places in the same layers into one group."""
    found, joined = {name: axes(module) for name, module in shadow.named_modules()}, _Joined()
    banned, skipped = set(), []
    for root, flow in flows.items():
        reason = flow.reason or _unfit(shadow, {spot.layer for unit in flow.units for spot in unit})
        if reason and not flow.output:
            skipped.append(f"{root}: {reason}")
        for unit in flow.units:
            spots = [s._replace(place=s.place % found[s.layer][s.axis].size) for s in unit if found[s.layer]]
            banned |= set(spots if flow.output or reason else ())
            for spot in spots:
                joined.join(spot, spots[0])
                if tied := found[spot.layer][spot.axis].tied:
                    joined.join(spot, spot._replace(place=spot.place % tied))
    alike: dict[Any, list[list[Spot]]] = defaultdict(list)
    for unit in joined.sets():
        if banned.isdisjoint(unit):
            alike[tuple(sorted(Counter((spot.layer, spot.axis) for spot in unit).items()))].append(unit)
    at = {name: place for place, name in enumerate(order)}
    groups = [_group(dict(counts), units, shadow, at) for counts, units in alike.items() if len(units) > 1]
    groups.sort(key=lambda group: (at[group.name], int(group.members[0].places.min())))
    again = Counter(group.name for group in groups)
    numbers: dict[str, int] = Counter()
    for place, group in enumerate(groups):  # parts of one layer's channels that go different ways
        numbers[group.name] += 1
        if again[group.name] > 1 and numbers[group.name] > 1:
            groups[place] = replace(group, name=f"{group.name}#{numbers[group.name]}")
    return groups, skipped


def _group(
    counts: Mapping[tuple[str, str], int], units: list[list[Spot]], shadow: nn.Module, at: Mapping[str, int]
) -> Group:
    # A layer that makes channels comes before one that reads them; a convolution before the BatchNorm behind it.
    keys = sorted(counts, key=lambda key: (key[1] != "out", at[key[0]]))
    first, modules, members = keys[0], dict(shadow.named_modules()), []
    units.sort(key=lambda unit: min(spot.place for spot in unit if (spot.layer, spot.axis) == first))
    for layer, axis in keys:
        rows = [[spot.place for spot in unit if (spot.layer, spot.axis) == (layer, axis)] for unit in units]
        members.append(Member(layer, axis, torch.tensor(rows), axes(modules[layer])[axis].size))
    kinds = [(type(modules[layer]).__name__, axis, getattr(modules[layer], "kernel_size", ())) for layer, axis in keys]
    return Group(first[0], len(units), counts[first], tuple(members), tuple(sorted(kinds)))


def _proven(shadow: nn.Module, groups: list[Group], input_size: Sequence[int]) -> tuple[list[Group], list[Group]]:
    """Split groups into those whose channels can be removed as was found, and those that depend on something else."""
    generator = torch.Generator().manual_seed(0)
    for value in [*shadow.parameters(), *shadow.buffers()]:
        # Zeros that a network begins with, such as scales of its branches, would hide what lies behind them.
        if value.dim() and value.is_floating_point() and bool((value == value.flatten()[0]).all()):
            value.data = 0.5 + torch.rand(value.shape, generator=generator)
    images = torch.randn(2, *input_size, generator=generator)
    try:
        shadow.double()(images.double())
        images = images.double()
    except RuntimeError:  # it makes float32 tensors in its forward
        shadow.float()
    if _stands(shadow, groups, images):
        return groups, []
    alone = [(group, _stands(shadow, [group], images)) for group in groups]
    sound = [group for group, stands in alone if stands]
    if not _stands(shadow, sound, images):
        raise ValueError(f"the channels of {type(shadow).__name__} depend on each other in a way that is not followed")
    return sound, [group for group, stands in alone if not stands]


def _stands(shadow: nn.Module, groups: Sequence[Group], images: Tensor) -> bool:
    """Whether a network without half of the groups' channels answers as one in which all that they have is zero."""
    generator = torch.Generator().manual_seed(0)
    after = {g.name: torch.randperm(g.channels, generator=generator) >= g.channels // 2 for g in groups}
    gone = removal(shadow, groups, whole(groups), after)
    zeroed, narrowed = copied(shadow, torch.clone), copied(shadow, torch.clone)
    own = tensors(zeroed)
    with torch.no_grad():
        for name, places in gone.kept.items():
            value = torch.zeros(own[name].numel(), dtype=own[name].dtype)
            value[places.flatten()] = own[name].flatten()[places.flatten()]
            own[name].copy_(value.reshape(own[name].shape))
        try:
            narrow(narrowed, gone.kept, gone.table)
            with _WithoutStatistics():
                answers = [_tensors(model(images)) for model in (zeroed, narrowed)]
        except Exception:  # what does not fit together fails in whatever way its forward does
            return False
    near = 1e-8 if images.dtype == torch.float64 else 1e-3  # of the largest logit; rounding is far below
    return all(
        one.shape == other.shape and bool(((one - other).abs() <= near * one.abs().max()).all())
        for one, other in zip(*answers, strict=True)
    )


class _WithoutStatistics(TorchFunctionMode):
    """GroupNorm only scales here: its statistics are of all channels of a group, zeros too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.group_norm:
            return _scaled(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _scaled(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 0
) -> Tensor:
    shape = (1, -1, *[1] * (x.dim() - 2))
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    parts = out.values() if isinstance(out, Mapping) else out
    return [tensor for part in parts for tensor in _tensors(part)]
