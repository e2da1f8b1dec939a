"""Low-rank factors in the place of layers, their ranks chosen for the whole network."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from callbacks.ledger import Ledger, Line, build
from callbacks.low_rank import (
    METHODS,
    Method,
    Ranks,
    Splittable,
    check_ranks,
    energies,
    factors,
    fill,
    full_ranks,
    ranks_keeping,
    ranks_saving,
    sizes,
    split_weight,
)
from callbacks.modules import replace_module
from callbacks.op_trace import total_params
from micronet.edits.gate import Edited, checked, layers_for, size_of, staying, trace
from micronet.errors import MicronetError

Rank = int | tuple[int, int]


def low_rank(
    model: nn.Module,
    *,
    method: Method = "svd",
    rank: Rank | Mapping[str, Rank] | None = None,
    energy: float | None = None,
    params: float | None = None,
    macs: float | None = None,
    layers: Iterable[str] | None = None,
    images: Tensor | None = None,
    input_size: Sequence[int] | None = None,
) -> Edited:
    """Split layers into thinner ones that compute nearly the same.

    Exactly one of `rank`, `energy`, `params` and `macs` says how thin. For `params` and `macs` a fraction is the share
    of the network's to remove, a whole number what may be left, as with `PruneChannels`: the ranks of all layers are
    chosen together (`callbacks/low_rank.py`, `ranks_saving`), and the network ends at or below that, above it with the
    unit of rank that went last. A layer that factors would not make smaller stays.

    Args:
        model: the network; it stays as it is.
        method: `"svd"` for linear layers and 1 x 1 convolutions; for k x k convolutions `"spatial_svd"` (k x 1, then
            1 x k) or `"tucker2"` (1 x 1, k x k, 1 x 1).
        rank: of every layer, or where a layer has less the full one; for tucker2 `(r_in, r_out)`, or one number for
            both. Or ranks by a layer's name: exactly these layers, whether they get smaller or not.
        energy: share of the squared singular values that every layer keeps, in (0, 1]; with tucker2 of each of its two
            unfoldings.
        params: of the parameters: share to remove, in (0, 1), or how many may be left.
        macs: of the multiply-accumulates for one image, likewise.
        layers: names of the layers to choose from; None for all that the method applies to.
        images: `(N, C, H, W)`, normalised: how many of them keep their class is told; at full rank all must, and the
            logits stay what they were, to 1e-4. None to check only that the log repeats the structure.
        input_size: **shape** of one image, `(C, H, W)`, where there are no images; `macs` needs either.

    Raises:
        MicronetError: an argument is out of range; a layer does not exist or can't be split; the target can't be
            reached; the network answers otherwise at full rank.
    """
    aim = _aim(method, {"rank": rank, "energy": energy, "params": params, "macs": macs}, layers)
    by_name = isinstance(rank, Mapping)
    found, skipped = layers_for(f"low_rank {method}", model, list(rank) if by_name else layers)
    ledger = None
    if aim == "macs" or images is not None or input_size is not None:
        ledger = _ledger(model, size_of(images, input_size, "low_rank: a target in MACs"))
    split = _Split(model, method, found, ledger)
    ranks = split.named(rank) if by_name else split.ranks(aim, {"energy": energy, "params": params, "macs": macs}, rank)
    skipped += [f"{name}: factors would not make it smaller" for name in found if name not in ranks]
    if not ranks:
        raise MicronetError(f"low_rank {method}: nothing is split{staying(skipped)}")
    log = {"edit": "low_rank", "method": method, "layers": {name: list(r) for name, r in ranks.items()}}
    changed = copy.deepcopy(model)
    for name, chosen in ranks.items():
        layer = changed.get_submodule(name)
        weights = split_weight(layer.weight, method, chosen)
        replace_module(changed, layer, fill(factors(layer, method, chosen), weights, layer.bias))
    summary = f"{len(ranks)} of {len(ranks) + len(skipped)} layers split by {method}, {split.costs(changed, ranks)}"
    same = all(chosen == full_ranks(found[name].weight, method) for name, chosen in ranks.items())
    return checked(model, changed, log, again, summary + staying(skipped), images, same=same)


def again(model: nn.Module, entry: dict[str, Any]) -> None:
    """Repeat an edit from its log, in place."""
    for name, ranks in entry["layers"].items():
        layer = model.get_submodule(name)
        replace_module(model, layer, factors(layer, entry["method"], check_ranks(layer, entry["method"], ranks)))


def _aim(method: str, given: dict[str, Any], layers: Iterable[str] | None) -> str:
    """The one argument that says how thin, in its range."""
    if method not in METHODS:
        raise MicronetError(f"low_rank: method must be one of {', '.join(METHODS)}, got {method!r}")
    aims = [name for name, value in given.items() if value is not None]
    if len(aims) != 1:
        raise MicronetError(f"low_rank: give one of {', '.join(given)}, got {' and '.join(aims) or 'none'}")
    (aim,), value = aims, given[aims[0]]
    if aim == "rank":
        if isinstance(value, Mapping) and layers is not None:
            raise MicronetError("low_rank: ranks by name say which layers: leave layers out")
        return aim
    if aim == "energy":
        right, allowed = isinstance(value, int | float) and 0 < value <= 1, "a fraction in (0, 1]"
    else:
        right = (type(value) is int and value > 0) or (isinstance(value, float) and 0 < value < 1)
        allowed = "the share to remove, a fraction in (0, 1), or what may be left, a whole number from 1"
    if not right:
        raise MicronetError(f"low_rank: {aim} must be {allowed}, got {value!r}")
    return aim


def _ledger(model: nn.Module, size: Sequence[int]) -> Ledger:
    return build(trace(model, size, "low_rank"), allow_unknown=True)


class _Split:
    """The layers of a network that a method can split, with what they cost."""

    def __init__(self, model: nn.Module, method: Method, layers: dict[str, nn.Module], ledger: Ledger | None) -> None:
        self.model, self.method, self.layers, self.ledger = model, method, layers, ledger
        self.lines: dict[str, list[Line]] = {}
        if ledger is not None:
            modules = dict(model.named_modules(remove_duplicate=False))
            runs = [(modules.get(line.name), line) for line in ledger.lines if line.macs]
            # A layer that runs twice has two lines, perhaps of different sizes, and under any of its names.
            self.lines = {n: [line for run, line in runs if run is layer] for n, layer in layers.items()}

    def params(self, name: str, ranks: Ranks) -> int:
        return sum(sizes(self.layers[name].weight, self.method, ranks))

    def macs(self, name: str, ranks: Ranks) -> int:
        weights = sizes(self.layers[name].weight, self.method, ranks)
        places = [_places(line, self.method) for line in self.lines[name]]
        return sum(weight * place for line in places for weight, place in zip(weights, line, strict=True))

    def named(self, ranks: Mapping[str, Any]) -> dict[str, Ranks]:
        """Ranks that the user gives by name."""
        found = {}
        for name, value in ranks.items():
            layer = self.layers[name]
            both = self.method == "tucker2" and type(value) is int
            try:
                found[name] = check_ranks(layer, self.method, (value, value) if both else _several(value))
            except ValueError as error:
                raise MicronetError(f"low_rank: {name}: {error}") from error
        return found

    def ranks(self, aim: str, shares: dict[str, Any], rank: Any) -> dict[str, Ranks]:
        """The ranks that an aim gives the layers that get smaller by them."""
        cost = self.macs if aim == "macs" else self.params
        splits = {}
        for name, layer in self.layers.items():
            spectra = ([],) if aim == "rank" else energies(layer.weight, self.method)
            whole = sum(line.macs for line in self.lines[name]) if aim == "macs" else layer.weight.numel()
            splits[name] = Splittable(spectra, whole, lambda ranks, name=name: cost(name, ranks))
        if aim == "rank":
            found = {name: self._capped(name, rank) for name in splits}
        elif aim == "energy":
            found = {name: ranks_keeping(split, shares["energy"]) for name, split in splits.items()}
        else:
            whole = total_params(self.model) if aim == "params" else sum(line.macs for line in self.ledger.lines)
            left = shares[aim] if isinstance(shares[aim], int) else whole - math.ceil(shares[aim] * whole - 1e-6)
            if left >= whole:
                raise MicronetError(f"low_rank: {left:,} {aim} may be left, and the network has {whole:,}")
            try:
                found = ranks_saving(splits, whole - left)
            except ValueError as error:
                raise MicronetError(
                    f"low_rank {self.method}: {left:,} of {whole:,} {aim} may be left, and more are: {error}"
                ) from error
        return {name: ranks for name, ranks in found.items() if splits[name].saves(ranks)}

    def _capped(self, name: str, rank: Any) -> Ranks:
        full, wanted = full_ranks(self.layers[name].weight, self.method), _several(rank)
        if len(wanted) == 1 and type(rank) is int:
            wanted *= len(full)
        if len(wanted) != len(full) or not all(type(r) is int and r > 0 for r in wanted):
            pair = " or a pair (r_in, r_out)" if self.method == "tucker2" else ""
            raise MicronetError(f"low_rank: rank must be a whole number from 1{pair}, got {rank!r}")
        return tuple(map(min, wanted, full))

    def costs(self, changed: nn.Module, ranks: dict[str, Ranks]) -> str:
        """What the network cost before and costs now, counted on both."""
        text = f"{total_params(self.model):,} -> {total_params(changed):,} params"
        if self.ledger is None:
            return text
        before = sum(line.macs for line in self.ledger.lines)
        now = sum(line.macs for line in _ledger(changed, self.ledger.input_size).lines)
        gone = sum(sum(line.macs for line in self.lines[name]) - self.macs(name, r) for name, r in ranks.items())
        if now != before - gone:
            raise MicronetError(
                f"low_rank: the changed network runs {now:,} MACs where its factors make {before - gone:,}: its "
                "forward does not run the layers that it has; nothing was kept"
            )
        return f"{text}, {before:,} -> {now:,} MACs"


def _several(rank: Any) -> tuple[Any, ...]:
    return tuple(rank) if isinstance(rank, list | tuple) else (rank,)


def _places(line: Line, method: Method) -> tuple[int, ...]:
    """How many places of one image each factor's weights are applied at."""
    if method == "svd":
        out = line.macs // line.weights
        return out, out
    height, width = line.in_shape[-2:]
    out_height, out_width = line.out_shape[-2:]
    out = out_height * out_width
    # The k x 1 factor moves along the height alone; a 1 x 1 factor in front sees the whole input.
    return (out_height * width, out) if method == "spatial_svd" else (height * width, out, out)
