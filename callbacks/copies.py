"""Copies of a network to trace or run, so that the network itself is left as it was."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def copied(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Copy a module in eval mode, tensors changed instead of copied, hooks and what wraps a forward left out."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for key, value in vars(module).items():
            if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
            for old in _tensors(value):
                if id(old) not in memo:
                    new = change(old.detach())
                    memo[id(old)] = nn.Parameter(new, False) if isinstance(old, nn.Parameter) else new
    copied = copy.deepcopy(model, memo).eval()
    unwrap(copied)
    return copied


def unwrap(model: nn.Module) -> None:
    """Take away what a callback has put around forwards for the time of a fit, as precision.py does; in place.

    What it does is the fit's and not the network's. torch.export refuses an object there; a function is not copied: it
    would run the module itself, not the copy. `__wrapped__` is what functools.wraps sets.
    """
    for m in model.modules():
        if hasattr(vars(m).get("forward"), "__wrapped__"):
            del m.forward  # the class's method shows again


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor of its shape without storage, float32 where it is of any floating-point type."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device="meta")


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy on the CPU; zeros for one without storage."""
    return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor.to("cpu", copy=True)
