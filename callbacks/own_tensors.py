"""A torch network's parameters, buffers and other tensors as the constants of its graph, with the masks they have."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from callbacks.fake_quantize import round_to_codes
from callbacks.graph import Value


def bits_of(tensor: Tensor) -> int:
    """The width that a tensor's elements count at."""
    # A network's own floating-point type is how it is stored for now, not what it is: all count as 32 bits.
    return 1 if tensor.dtype is torch.bool else 32


class Tensors:
    """A network's own tensors: a constant for each, whatever names it goes by.

    Args:
        model: The network.
        masks: For each masked parameter its mask; None where nothing declares which zeros are meant.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor] | None) -> None:
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.model, self.own = model, dict(named)
        self.aliases: dict[int, list[str]] = {}  # every name of a tensor, by its id
        for name, tensor in named:
            self.aliases.setdefault(id(tensor), []).append(name)
        self.masks = masks
        self.values: dict[int, Value] = {}

    def value(self, name: str, traced: Tensor) -> Value:
        """The constant that a name stands for; `traced` is what the trace has in its place."""
        tensor = self.own[name] if name in self.own else self.attribute(name)
        key = id(traced) if tensor is None else id(tensor)
        if key not in self.values:
            known = tensor is not None and not tensor.is_meta
            mask = self.mask(name, tensor)
            self.values[key] = Value(
                shape=tuple(traced.shape),
                bits=bits_of(traced),
                fixed=True,
                literal=tensor is None and traced.numel() == 1,  # a number that a forward makes a tensor of
                names=(name,),
                nonzero=self.count(tensor, mask) if known else None,
                masked=None if self.masks is None and mask is None else mask is not None,
            )
        return self.values[key]

    def codes(self, weight: Value, scale: Value, low: int, high: int) -> Value:
        """A constant rounded to codes, as it is stored: non-zero codes are counted, unless a mask says what is kept."""
        tensors = [self.own.get("+".join(value.names)) for value in (weight, scale)]
        known = not any(tensor is None or tensor.is_meta for tensor in tensors)
        count = None if not known else lambda: int(round_to_codes(*tensors, low, high).count_nonzero())
        return replace(weight, bits=(high - low).bit_length(), nonzero=weight.nonzero if weight.masked else count)

    def attribute(self, name: str) -> Tensor | None:
        """A tensor that is neither parameter nor buffer, such as the product that torch's pruning keeps."""
        try:
            found = operator.attrgetter(name)(self.model)
        except AttributeError:  # made by the trace
            return None
        return found if isinstance(found, Tensor) else None

    def mask(self, name: str, tensor: Tensor | None) -> Tensor | None:
        """The mask that declares a tensor's zeros, by whatever name the tensor goes."""
        for alias in (name, *self.aliases.get(id(tensor), ())):
            if self.masks is not None and alias in self.masks:
                return self.masks[alias]
            if f"{alias}_mask" in self.own:  # torch.nn.utils.prune's
                return self.own[f"{alias}_mask"]
        return None

    @staticmethod
    def count(tensor: Tensor, mask: Tensor | None) -> Callable[[], int]:
        """What is kept: what a mask keeps, zeros among it too; without a mask what is not zero."""
        return lambda: int((tensor if mask is None else mask).detach().count_nonzero())
