"""How much each channel matters: one number for each channel of a group, the lowest goes first.

Pure functions that `prune.py` calls. A word names what is looked at:

    l1, l2      the norm of the filter that makes the channel (Li et al. 2017, "Pruning Filters for Efficient ConvNets")
    mean_abs    the absolute value of the filter's mean: large weights of both signs cancel
    bn_scale    the absolute scale that the BatchNorm behind it gives it (Liu et al. 2017, "Network Slimming")
    fpgm        the distances from the filter to all others of its layer, summed: what lies near the geometric median
                can be replaced by the others (He et al. 2019, "Filter Pruning via Geometric Median")
    taylor      about how much the loss changes without the filter: squared products of weights and gradients, summed
                over the filter, averaged over steps (Molchanov et al. 2019, "Importance Estimation", first order)
    random      a number drawn for it

Where several layers make a channel (their outputs are added, or a depthwise convolution follows), each gives it a
number. For l1, l2, mean_abs and fpgm these are divided by their mean over the layer's channels, so that large filters
do not outvote small ones, and averaged; channels of different layers can be compared by them, too. Scales are averaged
and Taylor's numbers added as they are: both mean the same in every layer.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from callbacks.channels import Alive, Group, Member, axes, there
from callbacks.methods import verdict
from callbacks.sparsity import TAYLOR_DECAY

Importance = Literal["l1", "l2", "mean_abs", "bn_scale", "fpgm", "taylor", "random"]
Key = tuple[str, str]  # a layer's name, and its axis: `"out"` or `"in"`


def filters(layer: nn.Module, value: Tensor, axis: str) -> Tensor:
    """Arrange what belongs to a layer's weight by the places of an axis.

    Args:
        layer: a convolution, linear layer or normalisation.
        value: of its weight's **shape**.
        axis: `"out"` or `"in"`.

    Returns:
        float32 `(places, numbers of each)`.
    """
    return value.detach().float().movedim(axes(layer)[axis].dims["weight"], 0).flatten(1)


def distances(rows: Tensor) -> Tensor:
    """The Euclidean distances from each row to all others, summed: `(N, K)` gives `(N,)`."""
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


_OF_ROWS = {
    "l1": lambda rows: rows.abs().sum(1),
    "l2": lambda rows: rows.square().sum(1).sqrt(),
    "mean_abs": lambda rows: rows.mean(1).abs(),
    "fpgm": distances,
}


def ranked_by(model: nn.Module, group: Group, importance: Importance, feeding: Sequence[str] = ()) -> list[Member]:
    """The layers of a group that an importance looks at.

    Args:
        model: the network.
        group: one of its groups.
        importance: which.
        feeding: layers that read the channels, whose weights are looked at in place of the filters; empty for these.
    """
    modules, found = dict(model.named_modules()), []
    for member in group.members:
        layer = modules[member.layer]
        norm = isinstance(layer, _NormBase | nn.GroupNorm)
        weight = getattr(layer, "weight", None)
        if weight is None or isinstance(layer, nn.PReLU) or (importance == "taylor" and not weight.requires_grad):
            continue
        if importance == "bn_scale":
            looked_at = norm
        elif feeding:
            looked_at = member.axis == "in" and member.layer in feeding
        else:
            looked_at = member.axis == "out" and not norm
        if looked_at and (importance != "fpgm" or verdict("prune fpgm", layer)):
            found.append(member)
    return found


def gather(model: nn.Module, keys: Sequence[Key], sums: dict[Key, Tensor]) -> None:
    """Take a step's gradients into Taylor's averages, in place.

    Args:
        model: the network, with the gradients of a step.
        keys: of the layers that are looked at.
        sums: the averages so far, `(places,)` by key; a key that is not there begins.
    """
    modules = dict(model.named_modules())
    for key in keys:
        weight = modules[key[0]].weight
        if weight.grad is not None:
            new = filters(modules[key[0]], (weight.detach() * weight.grad).square(), key[1]).sum(1)
            sums[key] = sums[key].lerp(new, 1 - TAYLOR_DECAY) if key in sums else new


def scores(
    model: nn.Module,
    groups: Sequence[Group],
    alive: Alive,
    importance: Importance,
    *,
    feeding: Sequence[str] = (),
    sums: Mapping[Key, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Say how much each channel matters.

    Args:
        model: the network as it is now.
        groups: its groups, as they were found in the whole network; `ranked_by` names a layer of each.
        alive: which of their channels are still there.
        importance: what is looked at.
        feeding: layers that read the channels, whose weights are looked at in place of the filters.
        sums: Taylor's averages, as `gather` made them.
        seed: of what is drawn; the global generators are neither used nor moved.

    Returns:
        For each group, by its name, float32 `(channels,)` on the CPU; infinite for a channel that is gone.

    Raises:
        ValueError: the scales of all BatchNorms are alike, as in a network that has not been trained.
    """
    generator = torch.Generator().manual_seed(seed)
    modules, masks = dict(model.named_modules()), there(groups, alive)
    cache: dict[Key, Tensor] = {}

    def of_places(key: Key) -> Tensor:
        layer = modules[key[0]]
        if key not in cache:
            if importance == "taylor":
                if key not in sums:
                    raise ValueError(f"taylor: {key[0]} got no gradient in any step: its channels can't be judged")
                found = sums[key]
            elif importance == "bn_scale":
                found = layer.weight.detach().float().abs()
            else:
                found = _OF_ROWS[importance](filters(layer, layer.weight, key[1]))
            cache[key] = torch.full(masks[key].shape, torch.inf)
            cache[key][masks[key]] = found.cpu()
        return cache[key]

    result = {}
    for group in groups:
        if importance == "random":
            each = [torch.rand(group.channels, generator=generator)]
        else:
            members = ranked_by(model, group, importance, feeding)
            each = [of_places((m.layer, m.axis))[m.places].mean(1) for m in members]
        here = alive[group.name]
        if importance in _OF_ROWS:
            each = [one / mean if (mean := one[here].mean()) > 0 else one for one in each]
        together = torch.stack(each).sum(0) if importance == "taylor" else torch.stack(each).mean(0)
        result[group.name] = together.masked_fill(~here, torch.inf)
    if importance == "bn_scale" and all(_alike(result[g.name][alive[g.name]]) for g in groups):
        raise ValueError(
            "bn_scale: the scales within every group are alike, as in an untrained network: there is nothing to choose "
            "by; train first, such as with schedule=OneShot(end=0.5), or choose another importance"
        )
    return result


def _alike(values: Tensor) -> bool:
    """Whether scales differ by less than a few steps of an optimizer make them differ."""
    return bool(values.max() - values.min() <= 0.01 * values.max())
