"""What is left of a network when some of its channels are gone: parameters, multiply-accumulates, stored words.

`Params` is exact by arithmetic. `Macs` and `Storage` are guessed by arithmetic and, where it matters, counted on a
narrowed copy of the network, by the ledger that every score is made of.
"""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from callbacks.channels import Alive, Group, axes, removal, there, whole
from callbacks.copies import copied, on_cpu
from callbacks.ledger import Ledger, build
from callbacks.op_trace import total_params, trace
from callbacks.widths import narrow, take

WORD = 32


def sizes(model: nn.Module, groups: Sequence[Group], alive: Alive) -> dict[str, int]:
    """How many numbers each parameter has left, by its name.

    Args:
        model: the whole network.
        groups: its groups.
        alive: which of their channels are still there.
    """
    masks = there(groups, alive)
    left = {key: int(mask.sum()) for key, mask in masks.items()}
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    modules = dict(model.named_modules())
    for layer, axis in left:
        described, prefix = axes(modules[layer])[axis], f"{layer}." if layer else ""
        for key, dim in described.dims.items():
            if prefix + key in shapes:
                shapes[prefix + key][dim] = left[layer, axis]
    return {name: prod(shape) for name, shape in shapes.items()}


def words(ledger: Ledger) -> float:
    """The arrays of the deployed form, in 32-bit words: an 8-bit code counts 1/4, a mask's bit 1/32."""
    return sum(array.stored(array.bits)[0] for array in ledger.arrays) / WORD


class Params:
    """All parameters of a network.

    Args:
        model: the whole network.
        groups: its groups.
    """

    unit = "parameters"
    exact = True  # a guess is the count

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        self.groups, self.shapes = groups, copied(model, _shape_only)
        self.begin = float(total_params(model))

    def guess(self, alive: Alive) -> float:
        """How many are left."""
        return float(sum(sizes(self.shapes, self.groups, alive).values()))


class _Counted:
    """What a ledger counts, guessed by how many weights are left.

    Args:
        model: the whole network.
        groups: its groups.
        input_size: **shape** of one image, `(C, H, W)`.
        masks: of its zeros.

    Raises:
        ValueError: the network can't be traced.
    """

    unit = ""
    exact = False

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], input_size: Sequence[int], masks: Mapping[str, Tensor]
    ) -> None:
        self.groups, self.input_size, self.shapes = groups, tuple(input_size), copied(model, _shape_only)
        all_there = whole(groups)
        self.numel = sizes(self.shapes, groups, all_there)
        ledger = self.ledger(model, masks, all_there, all_there)
        self.begin, self.shares = self.of(ledger), self.split(ledger)
        self.rest = self.begin - sum(self.shares.values())

    def guess(self, alive: Alive) -> float:
        """How much is left, by arithmetic."""
        numel = sizes(self.shapes, self.groups, alive)
        return self.rest + sum(share * numel[name] / self.numel[name] for name, share in self.shares.items())

    def count(self, model: nn.Module, masks: Mapping[str, Tensor], before: Alive, after: Alive) -> float:
        """How much is left, counted.

        Args:
            model: the network as it is now; it stays so.
            masks: of its zeros as they are now.
            before: which channels it has.
            after: which of them stay.
        """
        return self.of(self.ledger(model, masks, before, after))

    def ledger(self, model: nn.Module, masks: Mapping[str, Tensor], before: Alive, after: Alive) -> Ledger:
        """Count a copy without the channels that go."""
        copy = copied(model, on_cpu)
        gone = removal(copy, self.groups, before, after)
        narrow(copy, gone.kept, gone.table)
        cut = {name: take(m.cpu(), gone.kept[name]) if name in gone.kept else m.cpu() for name, m in masks.items()}
        return build(trace(copy, self.input_size, masks=cut), allow_unknown=True)

    def of(self, ledger: Ledger) -> float:
        """The total."""
        raise NotImplementedError

    def split(self, ledger: Ledger) -> dict[str, float]:
        """What each parameter, by its name, has to do with."""
        raise NotImplementedError


class Macs(_Counted):
    """The multiply-accumulates of a network, for one image."""

    unit = "multiply-accumulates"

    def of(self, ledger: Ledger) -> float:
        """The sum over all lines."""
        return float(sum(line.macs for line in ledger.lines))

    def split(self, ledger: Ledger) -> dict[str, float]:
        """Those of the lines that read a weight."""
        found: dict[str, float] = {}
        for line in ledger.lines:
            if line.weight_array in self.numel:
                found[line.weight_array] = found.get(line.weight_array, 0.0) + line.macs
        return found


class Storage(_Counted):
    """The words that a network's deployed form takes."""

    unit = "32-bit words"

    def of(self, ledger: Ledger) -> float:
        """The sum over all arrays."""
        return words(ledger)

    def split(self, ledger: Ledger) -> dict[str, float]:
        """Those of the arrays that are parameters."""
        arrays = {array.name: array for array in ledger.arrays if array.name in self.numel}
        return {name: array.stored(array.bits)[0] / WORD for name, array in arrays.items()}


def _shape_only(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, device="meta")
