"""Low-rank factors of a layer: thinner layers one after another, in the place of one.

What: `svd` makes two layers of a linear layer or 1 x 1 convolution; `spatial_svd` a k x 1 and a 1 x k convolution of a
k x k one; `tucker2` a 1 x 1, a k x k core and a 1 x 1. At full rank they compute what the layer computed.
When: on a trained network, followed by a short training; where layers are wide. `micronet.edits.low_rank` does it.
Cost: a decomposition of each layer's weights, in float64: about a second for a small network, a minute for a wide one.
Interactions: masks of a factored layer are gone: factor first, sparsify afterwards. Channels can be pruned before and
after. A BatchNorm behind the layer stays behind the last factor and folds into it.
Source: spatial SVD: Jaderberg et al. 2014, https://arxiv.org/abs/1405.3866, scheme 2. Tucker-2: Kim et al. 2016,
https://arxiv.org/abs/1511.06530. Ranks of a whole network: Zhang et al. 2015, https://arxiv.org/abs/1505.06798, 3.3.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from callbacks.modules import computes_plainly

Method = Literal["svd", "spatial_svd", "tucker2"]
Ranks = tuple[int, ...]

METHODS = ("svd", "spatial_svd", "tucker2")
# Of tucker2's alternating improvement. Trained ResNet-20, half of all ranks: 29.84 % of the energy is lost without any,
# 28.81 % after one, 28.73 % after two, 28.71 % after thirty.
SWEEPS = 2


def unfoldings(weight: Tensor, method: Method) -> tuple[Tensor, ...]:
    """The matrices whose ranks a method lowers.

    Args:
        weight: **shape** `(K, C)` of a linear layer, `(K, C, kh, kw)` of a convolution.
        method: svd: one, `(K, C)`. spatial_svd: one, `(C kh, K kw)`. tucker2: two, input channels by all else and
            output channels by all else.
    """
    if method == "svd":
        return (weight.flatten(1),)
    if method == "spatial_svd":
        c, kh = weight.shape[1:3]
        return (weight.permute(1, 2, 0, 3).reshape(c * kh, -1),)
    return weight.transpose(0, 1).flatten(1), weight.flatten(1)


def full_ranks(weight: Tensor, method: Method) -> Ranks:
    """The ranks at which nothing is lost, one for each of a method's unfoldings."""
    return tuple(min(matrix.shape) for matrix in unfoldings(weight, method))


def energies(weight: Tensor, method: Method) -> tuple[list[float], ...]:
    """Squared singular values of each of a method's unfoldings, the largest first."""
    found = []
    for matrix in unfoldings(weight.detach().double().cpu(), method):
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        found.append(torch.linalg.eigvalsh(wide @ wide.T).flip(0).clamp_min(0).tolist())
    return tuple(found)


def split_weight(weight: Tensor, method: Method, ranks: Ranks) -> tuple[Tensor, ...]:
    """The weights of the factors, in the order in which they run.

    Args:
        weight: **shape** `(K, C)` or `(K, C, kh, kw)`.
        method: see `unfoldings`.
        ranks: `(r,)`, or for tucker2 `(r_in, r_out)`; each from 1 to full.

    Returns:
        svd: `(r, C, ...)`, `(K, r, ...)`. spatial_svd: `(r, C, kh, 1)`, `(K, r, 1, kw)`. tucker2: `(r_in, C, 1, 1)`,
        `(r_out, r_in, kh, kw)`, `(K, r_out, 1, 1)`. In float64, on the CPU. svd and spatial_svd are the best ones of
        their rank (Eckart and Young 1936); tucker2 starts from the truncated singular vectors of both unfoldings, and
        improves them in turn (De Lathauwer et al. 2000, HOOI).
    """
    whole = weight.detach().double().cpu()
    if method == "tucker2":
        return _tucker(whole, *ranks)
    (matrix,), (rank,) = unfoldings(whole, method), ranks
    left, right = _product(matrix, rank)
    if method == "svd":
        tail = weight.shape[2:]
        return right.reshape(rank, -1, *tail), left.reshape(-1, rank, *tail)
    k, c, kh, kw = weight.shape
    return left.T.reshape(rank, c, kh, 1), right.reshape(rank, k, kw).transpose(0, 1).unsqueeze(2)


def _product(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two factors of a matrix, the best of their rank."""
    if matrix.shape[0] > matrix.shape[1]:
        right, left = _product(matrix.T, rank)
        return left.T, right.T
    left = _leading(matrix, rank)
    right = left.T @ matrix
    # Half of the scale to each factor: weight decay and rounding treat them alike. A row of nothing keeps its scale.
    root = right.norm(dim=1).sqrt()
    root = torch.where(root > 0, root, 1.0)
    return left * root, right / root[:, None]


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal columns that span a matrix's first left singular vectors."""
    return torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)[:, :rank]


def _tucker(weight: Tensor, r_in: int, r_out: int) -> tuple[Tensor, Tensor, Tensor]:
    inward, outward = (_leading(m, r) for m, r in zip(unfoldings(weight, "tucker2"), (r_in, r_out), strict=True))
    for _ in range(SWEEPS if r_in < weight.shape[1] and r_out < weight.shape[0] else 0):
        seen = torch.einsum("kchw,ci->kihw", weight, inward)
        outward = _leading(seen.flatten(1), r_out)
        seen = torch.einsum("kchw,ko->cohw", weight, outward)
        inward = _leading(seen.flatten(1), r_in)
    core = torch.einsum("kchw,ko,ci->oihw", weight, outward, inward)
    return inward.T[..., None, None], core, outward[..., None, None]


def check_ranks(layer: nn.Module, method: Method, ranks: Sequence[int]) -> Ranks:
    """Refuse ranks that a layer can't have.

    Args:
        layer: a linear layer or convolution.
        method: see `unfoldings`.
        ranks: one number, or for tucker2 two, `(r_in, r_out)`.

    Raises:
        ValueError: the layer is of another kind, or a rank is not a whole number from 1 to full.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    fits = layer.groups == 1 if isinstance(layer, nn.Conv2d) else method == "svd"
    if not (computes_plainly(layer) and fits):
        raise ValueError(f"{method} can't split {layer}")
    if method == "svd" and math.prod(layer.weight.shape[2:]) > 1:
        raise ValueError(f"svd can't split {layer}: its kernel is not 1 x 1")
    full = full_ranks(layer.weight, method)
    whole = all(type(rank) is int for rank in ranks) and len(ranks) == len(full)
    if not whole or not all(1 <= rank <= most for rank, most in zip(ranks, full, strict=True)):
        wanted = " and ".join(map(str, full))
        raise ValueError(f"ranks must be whole numbers from 1 to {wanted}, got {ranks!r}")
    return tuple(ranks)


def factors(layer: nn.Module, method: Method, ranks: Ranks) -> nn.Sequential:
    """Make the layers that take a layer's place, their weights not set.

    Stride, padding and dilation go with the axis that they belong to; the bias is the last factor's. Padding before or
    after the other axis' factor is the same: a factor without a bias makes zeros of zeros, and reflected columns of
    reflected ones.

    Args:
        layer: a linear layer or convolution, of which only shapes and arguments are read.
        method: see `unfoldings`.
        ranks: see `split_weight`.

    Raises:
        ValueError: as `check_ranks`.
    """
    ranks = check_ranks(layer, method, ranks)
    own = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    last = own | {"bias": layer.bias is not None}
    if isinstance(layer, nn.Linear):
        (r,) = ranks
        first = skip_init(nn.Linear, layer.in_features, r, bias=False, **own)
        made = nn.Sequential(first, skip_init(nn.Linear, r, layer.out_features, **last))
    else:
        made = nn.Sequential(*_convolutions(layer, method, ranks, own | {"bias": False}, last))
    for parameter in made.parameters():
        parameter.requires_grad_(layer.weight.requires_grad)
    return made.train(layer.training)


def _convolutions(layer: nn.Conv2d, method: Method, ranks: Ranks, inner: dict, last: dict) -> list[nn.Module]:
    c, k, whole = layer.in_channels, layer.out_channels, layer.kernel_size
    mode = {"padding_mode": layer.padding_mode}

    def along(*axes: int) -> dict:
        """The layer's arguments along some axes; along the others a kernel of 1 that changes nothing."""

        def pick(values: Sequence[int], neutral: int) -> tuple[int, int]:
            return tuple(values[axis] if axis in axes else neutral for axis in (0, 1))

        padding = layer.padding if isinstance(layer.padding, str) else pick(layer.padding, 0)
        stride, dilation = pick(layer.stride, 1), pick(layer.dilation, 1)
        return {"kernel_size": pick(whole, 1), "stride": stride, "padding": padding, "dilation": dilation} | mode

    if method == "svd":
        first = skip_init(nn.Conv2d, c, ranks[0], **along(0, 1), **inner)
        return [first, skip_init(nn.Conv2d, ranks[0], k, 1, **last)]
    if method == "spatial_svd":
        first = skip_init(nn.Conv2d, c, ranks[0], **along(0), **inner)
        return [first, skip_init(nn.Conv2d, ranks[0], k, **along(1), **last)]
    first = skip_init(nn.Conv2d, c, ranks[0], 1, **inner)
    core = skip_init(nn.Conv2d, *ranks, **along(0, 1), **inner)
    return [first, core, skip_init(nn.Conv2d, ranks[1], k, 1, **last)]


@torch.no_grad()
def fill(made: nn.Sequential, weights: Sequence[Tensor], bias: Tensor | None) -> nn.Sequential:
    """Give layers their weights, and the last one the bias."""
    for part, weight in zip(made, weights, strict=True):
        part.weight.copy_(weight)
    if bias is not None:
        made[-1].bias.copy_(bias)
    return made


def sizes(weight: Tensor, method: Method, ranks: Ranks) -> tuple[int, ...]:
    """Weights of each factor, in the order in which they run."""
    k, c, *kernel = weight.shape
    if method == "svd":
        return c * ranks[0], k * ranks[0]
    if method == "spatial_svd":
        return c * kernel[0] * ranks[0], k * kernel[1] * ranks[0]
    return c * ranks[0], math.prod(kernel) * ranks[0] * ranks[1], k * ranks[1]


@dataclass(frozen=True)
class Splittable:
    """One layer of a network whose ranks are to be chosen.

    Args:
        energies: squared singular values of each of its unfoldings, the largest first.
        whole: what the layer costs as it is, in weights or multiply-accumulates.
        cost: what its factors cost at some ranks, in the same unit.
    """

    energies: tuple[list[float], ...]
    whole: int
    cost: Callable[[Ranks], int]

    def saves(self, ranks: Ranks) -> int:
        """What factoring saves; 0 where the factors would cost as much as the layer, which then stays."""
        return max(0, self.whole - self.cost(ranks))


def ranks_keeping(layer: Splittable, share: float) -> Ranks:
    """The smallest ranks that keep a share of the squared singular values.

    Args:
        layer: its energies.
        share: to keep in each unfolding, in (0, 1].
    """
    found = []
    for values in layer.energies:
        sums = list(accumulate(values))
        wanted = share * sums[-1] - 1e-12 * sums[-1]  # sums are rounded: all of it must be within reach
        found.append(next(rank for rank, kept in enumerate(sums, 1) if kept >= wanted))
    return tuple(found)


def ranks_saving(layers: Mapping[str, Splittable], least: int) -> dict[str, Ranks]:
    """Choose the ranks of several layers together, so that they save a given amount.

    From full rank, one unit of rank at a time is taken away where it loses the least for what it saves: the loss is the
    fall of the logarithm of the energy that the layer keeps. (Their sum is the product of all layers' kept shares,
    which Zhang et al. 2015 maximise by the same greedy rule.)

    Args:
        layers: by name.
        least: what all of them together must save, in the unit of their costs.

    Returns:
        The ranks of every layer; one of which has a unit less than what would miss the aim.

    Raises:
        ValueError: even rank 1 everywhere saves less.
    """
    ranks = {name: tuple(map(len, layer.energies)) for name, layer in layers.items()}
    kept = {name: [list(accumulate(values)) for values in layer.energies] for name, layer in layers.items()}

    def best(name: str) -> tuple[float, Ranks] | None:
        """The next unit of a layer: what it loses for each unit of cost, and the ranks without it."""
        options, now = [], ranks[name]
        for axis, rank in enumerate(now):
            less = tuple(r - (place == axis) for place, r in enumerate(now))
            gain = layers[name].cost(now) - layers[name].cost(less) if rank > 1 else 0
            if gain > 0:
                sums = kept[name][axis]
                share = sums[rank - 2] / sums[rank - 1] if sums[rank - 1] > 0 else 1.0
                options.append((-math.log(share) / gain if share > 0 else math.inf, less))
        return min(options, default=None)

    saved = {name: layer.saves(ranks[name]) for name, layer in layers.items()}
    nexts = {name: step for name in layers if (step := best(name)) is not None}
    total = sum(saved.values())
    while total < least:
        if not nexts:
            raise ValueError(f"at rank 1 everywhere the layers save {total:,}, and {least:,} is asked")
        name = min(nexts, key=lambda name: nexts[name][0])
        ranks[name] = nexts[name][1]
        total += layers[name].saves(ranks[name]) - saved[name]
        saved[name] = layers[name].saves(ranks[name])
        step = best(name)
        if step is None:
            del nexts[name]
        else:
            nexts[name] = step
    return ranks
