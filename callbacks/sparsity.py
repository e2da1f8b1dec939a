"""Which weights become zero: criteria, units, and the lowest of them to an exact count.

Pure functions that `sparsify.py` calls. A criterion gives every weight of a layer a score, lowest goes first. A
granularity says which weights go together, as a unit. `grow` takes masks of layers that are compared with each other
and gives ones with as many zeros as are wanted, to one unit: what is masked stays masked, and among equal scores the
first in the network goes first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from callbacks.methods import BLOCK

Criterion = Literal["magnitude", "random", "movement", "taylor"]
Granularity = Literal["weight", "kernel", "filter", "2:4", "block"]
Scope = Literal["global", "normalised", "local"]

TAYLOR_DECAY = 0.99  # the average looks back about a hundred steps: older gradients are of other weights


def check_word(name: str, value: str, words: object) -> None:
    """Refuse a word that is none of a `Literal`'s.

    Raises:
        ValueError: it is none of them.
    """
    if value not in get_args(words):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(words)))}, got {value!r}")


def learns(criterion: Criterion) -> bool:
    """Whether a criterion gathers its scores from gradients, step by step."""
    return criterion in ("movement", "taylor")


def first_scores(criterion: Criterion, weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """What a criterion keeps for each weight, before the first step; nothing where it looks at weights only.

    Args:
        criterion: random draws one number in [0, 1) for each weight, the others begin with zeros.
        weights: of each layer, by name; random draws in their order.
        seed: of the draws, which neither use nor move the global generators.
    """
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.rand(w.shape, generator=generator).to(w.device) for name, w in weights.items()}
    if learns(criterion):
        return {name: torch.zeros_like(w, dtype=torch.float32, requires_grad=False) for name, w in weights.items()}
    return {}


@torch.no_grad()
def gather(criterion: Criterion, kept: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Take a step's gradients into the scores, in place.

    Args:
        criterion: movement adds up `-weight * gradient`: a weight that the loss moves towards zero scores low. Taylor
            keeps a moving average of `(weight * gradient) ** 2`, about what the loss changes by without the weight.
        kept: as `first_scores` gave it.
        weights: by the same names; ones without a gradient are left out.

    Source: movement: Sanh et al. 2020, "Movement Pruning"; here what was masked does not come back. Taylor: Molchanov
        et al. 2019, "Importance Estimation for Neural Network Pruning", first order.
    """
    for name, weight in weights.items():
        if weight.grad is not None:
            product = (weight * weight.grad).float()
            if criterion == "movement":
                kept[name].sub_(product)
            else:
                kept[name].lerp_(product.square_(), 1 - TAYLOR_DECAY)


def to_units(value: Tensor, granularity: Granularity) -> Tensor:
    """Arrange what belongs to a layer's weights by units.

    Args:
        value: `(O, I, ...)`, with `I` input channels of each output; or `(O, I)` of a linear layer.
        granularity: `"weight"`; `"kernel"`: the k x k slice between two channels; `"filter"`: all that makes an output
            channel; `"2:4"`: four consecutive input channels at one place of the kernel; `"block"`: 4 output by 4 input
            channels at one place of the kernel.

    Returns:
        `(units, weights of a unit)`, the units in the order of their first weight's output and input channel.
    """
    rows, columns = value.shape[:2]
    if granularity == "weight":
        return value.reshape(-1, 1)
    if granularity == "kernel":
        return value.reshape(rows * columns, -1)
    if granularity == "filter":
        return value.reshape(rows, -1)
    if granularity == "2:4":
        return value.reshape(rows, columns // BLOCK, BLOCK, -1).movedim(2, 3).reshape(-1, BLOCK)
    split = value.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK, -1)
    return split.permute(0, 2, 4, 1, 3).reshape(-1, BLOCK * BLOCK)


def from_units(units: Tensor, shape: torch.Size, granularity: Granularity) -> Tensor:
    """Undo `to_units`.

    Args:
        units: `(units, weights of a unit)`.
        shape: of the layer's weight.
        granularity: as it was for `to_units`.
    """
    rows, columns = shape[:2]
    if granularity == "2:4":
        units = units.reshape(rows, columns // BLOCK, -1, BLOCK).movedim(3, 2)
    elif granularity == "block":
        units = units.reshape(rows // BLOCK, columns // BLOCK, -1, BLOCK, BLOCK).permute(0, 3, 1, 4, 2)
    return units.reshape(shape)


@dataclass(frozen=True)
class _Units:
    """A layer's units.

    Args:
        goes: `(units, weights of a unit)`, bool: what becomes zero where the unit is chosen, and is not yet.
        scores: `(units,)`; the lowest goes first, and one that is infinite never.
        sizes: `(units,)`, how many weights become zero.
    """

    goes: Tensor
    scores: Tensor
    sizes: Tensor


def _units(scores: Tensor, mask: Tensor, granularity: Granularity, normalised: bool) -> _Units:
    live, parts = to_units(mask, granularity), to_units(scores, granularity)
    if granularity == "2:4":
        # Of each four the two lowest go, what is masked already among them; the four are ranked by what they lose.
        order = parts.masked_fill(~live, -torch.inf).argsort(dim=1, stable=True)
        goes = torch.zeros_like(live).scatter_(1, order[:, : BLOCK // 2], True) & live
        ranks = parts.masked_fill(~goes, 0).sum(1)
    else:
        # The mean, so that units of unequal size compare; what is masked already adds nothing.
        goes, ranks = live, parts.masked_fill(~live, 0).mean(1) if live.shape[1] > 1 else parts[:, 0]
    sizes = goes.sum(1) if live.shape[1] > 1 else goes[:, 0].long()
    free = sizes > 0
    ranks = ranks.masked_fill(~free, 0)
    if normalised:
        ranks = ranks / torch.linalg.vector_norm(ranks).clamp(min=torch.finfo(ranks.dtype).tiny)
    if granularity != "2:4":
        # The best unit stays: a layer of zeros alone would let nothing through, and no gradient back.
        best = ranks.masked_fill(~free, -torch.inf).argmax()
        free[best], sizes[best] = False, 0
    return _Units(goes, ranks.masked_fill_(~free, torch.inf), sizes)


def _lowest(scores: Tensor, sizes: Tensor, wanted: float) -> Tensor:
    """Choose the units of the lowest scores whose sizes come nearest to what is wanted; the first of equal scores.

    Args:
        scores: `(units,)`.
        sizes: `(units,)`, whole numbers; 0 where the score is infinite.
        wanted: sum of the sizes, above 0.

    Returns:
        `(units,)`, bool.
    """
    size, free = int(sizes.max()), int(sizes.count_nonzero())
    if size * free == int(sizes.sum()):  # all of one size
        count = min(free, int(wanted / max(1, size) + 0.5))
        # The count-th lowest is found in an eighth of the time that sorting takes.
        border = scores.kthvalue(max(1, count)).values
        chosen = scores < border
        chosen[(scores == border).nonzero()[: count - int(chosen.sum()), 0]] = True
        return chosen
    order = scores.argsort(stable=True)
    reached = torch.cat([sizes.new_zeros(1), sizes[order].cumsum(0)]).double()
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[order[: int((reached - wanted).abs().argmin())]] = True
    return chosen


def grow(
    masks: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    zeros: float,
    granularity: Granularity,
    normalised: bool = False,
) -> dict[str, Tensor]:
    """Mask further units, until as many weights are zero as is wanted.

    Args:
        masks: of layers that are compared with each other, by name: bool, False where a weight is zero.
        scores: of each weight, by the same names, of the same **shapes**.
        zeros: how many weights of all layers together shall be masked; it is met to half a unit.
        granularity: what goes together.
        normalised: whether a layer's scores are divided by their L2 norm over the layer's units.

    Returns:
        The new masks; what was masked is masked. In each layer the best unit stays, but for 2:4.

    Source: the normalisation: Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient
        Inference".
    """
    missing = zeros - sums(masks)[0]
    if missing <= 0:
        return dict(masks)
    layers = [_units(scores[name], mask, granularity, normalised) for name, mask in masks.items()]
    chosen = _lowest(torch.cat([u.scores for u in layers]), torch.cat([u.sizes for u in layers]), missing)
    new = {}
    parts = chosen.split([len(u.scores) for u in layers])
    for (name, mask), units, picked in zip(masks.items(), layers, parts, strict=True):
        new[name] = mask & ~from_units(units.goes & picked[:, None], mask.shape, granularity)
    return new


def sums(masks: Mapping[str, Tensor]) -> tuple[int, int]:
    """How many weights masks set to zero, of how many."""
    size = sum(mask.numel() for mask in masks.values())
    return size - sum(int(mask.count_nonzero()) for mask in masks.values()), size


def too_little(masks: Mapping[str, Tensor], share: float, granularity: Granularity) -> bool:
    """Whether a share of zeros is less than half a unit, so that nothing would be masked for it.

    Args:
        masks: as they are now.
        share: of zeros, that is wanted.
        granularity: what goes together.
    """
    unit = min(to_units(mask, granularity).shape[1] for mask in masks.values())
    return 0 < share * sums(masks)[1] < unit / 2


def check_room(masks: Mapping[str, Tensor], share: float, granularity: Granularity, where: str) -> None:
    """Refuse a share of zeros that `grow` can't reach from masks, whatever the scores are.

    Args:
        masks: as they are now.
        share: of zeros, that is wanted.
        granularity: what goes together.
        where: names the weights in the message.

    Raises:
        ValueError: more is masked already; less than a unit would be left in each layer.
    """
    zeros, size = sums(masks)
    live = [to_units(mask, granularity) for mask in masks.values()]
    if granularity == "2:4":
        unit, most = BLOCK // 2, zeros + sum(int((four.sum(1) - BLOCK // 2).clamp(min=0).sum()) for four in live)
    else:  # the best unit stays; it is not yet known which that is
        unit, most = max(units.shape[1] for units in live), size - sum(int(units.sum(1).max()) for units in live)
    if zeros > share * size + unit / 2 or (granularity == "2:4" and most > share * size):
        more = ", more than two in some fours" if granularity == "2:4" else ""
        raise ValueError(
            f"sparsity {share} is asked where {zeros / size:.4f} {where} is masked already{more}: what is masked stays"
        )
    if share * size >= most + unit:
        raise ValueError(
            f"sparsity {share} leaves less than one {granularity} in a layer: at most {most / size:.4f} {where} can go"
        )
