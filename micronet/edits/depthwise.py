"""Depthwise and pointwise convolutions in the place of k x k ones."""

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from callbacks.low_rank import fill
from callbacks.methods import verdict
from callbacks.modules import replace_module
from callbacks.op_trace import total_params
from callbacks.separable import separable_layers, split_by_channel
from micronet.edits.gate import Edited, checked, layers_for, staying

FEW = 3  # input channels: a layer that reads an image would be left with that many spatial kernels


def separable(model: nn.Module, *, layers: Iterable[str] | None = None, images: Tensor | None = None) -> Edited:
    """Replace k x k convolutions by a depthwise k x k one and a pointwise 1 x 1 one.

    Each starts as the best that one spatial kernel for each input channel can do: the first term of that channel's
    singular value decomposition. The network answers otherwise; a training follows.

    Args:
        model: the network; it stays as it is.
        layers: names of convolutions; None for all of more than 3 input channels that get smaller: one that reads an
            image would be left with a kernel for each colour. Named, it is replaced, too.
        images: `(N, C, H, W)`, normalised: how many of them keep their class is told. None to tell nothing.

    Raises:
        MicronetError: a layer does not exist, or is of a kind that can't be split; there is none.
    """
    found, skipped = layers_for("separable", model, layers, _leave)
    log, changed = {"edit": "separable", "layers": list(found)}, copy.deepcopy(model)
    for name in found:
        layer = changed.get_submodule(name)
        replace_module(changed, layer, fill(separable_layers(layer), split_by_channel(layer.weight), layer.bias))
    sizes = f"{total_params(model):,} -> {total_params(changed):,} params"
    summary = f"{len(found)} convolutions became depthwise and pointwise ones, {sizes}{staying(skipped)}"
    return checked(model, changed, log, again, summary, images, same=False)


def _leave(layer: nn.Module) -> str:
    if layer.in_channels <= FEW:
        return f"{layer.in_channels} input channels would leave as many spatial kernels"
    depthwise, pointwise = layer.in_channels * layer.weight[0, 0].numel(), layer.in_channels * layer.out_channels
    return "it would not get smaller" if depthwise + pointwise >= layer.weight.numel() else ""


def again(model: nn.Module, entry: dict[str, Any]) -> None:
    """Repeat an edit from its log, in place."""
    if not isinstance(entry["layers"], list | tuple):
        raise ValueError("layers must be a list of names")
    for name in entry["layers"]:
        layer = model.get_submodule(name)
        if type(layer) is not nn.Conv2d or not verdict("separable", layer):
            raise ValueError(f"{name} is no k x k convolution")
        replace_module(model, layer, separable_layers(layer))
