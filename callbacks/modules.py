"""Modules and tensors of a network, each once: one that it has at several places is one, and so is a shared weight."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers by name, each once: the state dict names one that is at several places several times.

    Args:
        model: a network.
    """
    return dict(model.named_parameters()) | dict(model.named_buffers())


@torch.no_grad()
def set_tensors(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give a network's parameters and buffers other values, in place.

    Args:
        model: a network.
        values: as `tensors` names them, of the same **shapes**.
    """
    own = tensors(model)
    for name, value in values.items():
        own[name].copy_(value)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put another module wherever a network has this one.

    Args:
        model: changed in place.
        old: one of its modules, below itself.
        new: what takes its place.

    Raises:
        ValueError: `old` is the network itself, or no part of it.
    """
    places = [name for name, module in model.named_modules(remove_duplicate=False) if module is old]
    if not places or "" in places:
        raise ValueError(f"a {type(old).__name__} that is the whole network, or no part of it, can't be replaced in it")
    for name in places:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new)


def computes_plainly(layer: nn.Module) -> bool:
    """Whether a layer computes what torch's `Conv2d` or `Linear` does, so that others of these can take its place."""
    # timm's differs in what it does under TorchScript alone; it is known by name, as timm is optional.
    name = f"{type(layer).__module__}.{type(layer).__qualname__}"
    return type(layer) in (nn.Conv2d, nn.Linear) or name == "timm.layers.linear.Linear"


def plain_weight(layer: nn.Module) -> bool:
    """Whether a layer's weight is a parameter of its own, not calculated from others as torch's pruning does."""
    return layer._parameters.get("weight") is not None
