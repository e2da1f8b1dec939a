"""Folding a network's BatchNorm modules into the layers before them, in float64.

`fold_flow.py` finds what folds, by data flow; `fold_plan.py` says which modules can be taken away, each with the layer
that takes its factors in; `fold_norms` does it. Counter, edits and quantisation share them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from callbacks.fake_quantize import Quantised
from callbacks.modules import replace_module

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS += (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)  # with statistics of their own, the same


def with_activation(module: Any) -> bool:
    """Whether a module is one of timm's that run a normalisation, `drop` and `act`: known by name, timm is optional."""
    return isinstance(module, _NormBase) and type(module).__name__ in ("BatchNormAct2d", "SyncBatchNormAct")


@torch.no_grad()
def fold_norms(model: nn.Module, layers: Mapping[str, Sequence[str]]) -> None:
    """Take normalisations into the layers before them, in place.

    Args:
        model: the network.
        layers: as `fold_plan.plan_folds` finds them.
    """
    for name, norms in layers.items():
        layer = model.get_submodule(name)
        scale, shift = scale_and_shift([model.get_submodule(norm) for norm in norms])
        rows = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        # Behind a view, a channel can be several outputs in a row.
        scale, shift = (value.repeat_interleave(rows // len(value)) for value in (scale, shift))
        if isinstance(layer, Quantised):
            layer.rescale(scale)
        else:
            # Adding 0 makes 0.0 of -0.0: a masked weight times a negative factor stays the zero that it was.
            layer.weight.copy_(layer.weight.double() * _along_outputs(layer, scale) + 0.0)
        if layer.bias is not None:
            shift = layer.bias.double() * scale + shift
        _give_bias(layer)
        layer.bias.copy_(shift)
    drop_norms(model, layers)


def drop_norms(model: nn.Module, layers: Mapping[str, Sequence[str]]) -> None:
    """Change the structure as `fold_norms` does, in place; weights stay as they are.

    Args:
        model: the network.
        layers: as `fold_plan.plan_folds` finds them.

    Raises:
        ValueError: a layer is no convolution or linear layer, or a normalisation is none.
        AttributeError: the network has no module of that name.
    """
    for name, norms in layers.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, _ConvNd | nn.Linear):
            raise ValueError(f"{name} is no convolution or linear layer")
        _give_bias(layer)
        for path in norms:
            norm = model.get_submodule(path)
            if type(norm) in NORMS:
                replace_module(model, norm, nn.Identity())
            elif with_activation(norm):
                rest = nn.Sequential()
                rest.drop, rest.act = norm.drop, norm.act
                replace_module(model, norm, rest.train(norm.training))
            elif not isinstance(norm, nn.Identity | nn.Sequential):  # what another layer took in, too
                raise ValueError(f"{path} is no BatchNorm")


def scale_and_shift(norms: Sequence[nn.Module]) -> tuple[Tensor, Tensor]:
    """The factor and the summand of each channel that normalisations in a row make together, in float64."""
    scale, shift = 1.0, 0.0
    for norm in norms:
        factor = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            factor = factor * norm.weight.double()
        summand = -norm.running_mean.double() * factor + (0.0 if norm.bias is None else norm.bias.double())
        scale, shift = scale * factor, shift * factor + summand
    return scale, shift


def _along_outputs(layer: nn.Module, scale: Tensor) -> Tensor:
    """Factors of a layer's outputs, in a shape that its weight can be multiplied with."""
    axes = layer.weight.dim()
    if not getattr(layer, "transposed", False):
        return scale.reshape(-1, *[1] * (axes - 1))
    # (in, out / groups, ...): the inputs of a group have its outputs.
    by_group = scale.reshape(layer.groups, 1, -1).expand(-1, layer.in_channels // layer.groups, -1)
    return by_group.reshape(*layer.weight.shape[:2], *[1] * (axes - 2))


def _give_bias(layer: nn.Module) -> None:
    if layer.bias is None:
        rows = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        zeros = torch.zeros(rows, dtype=layer.weight.dtype, device=layer.weight.device)
        layer.bias = nn.Parameter(zeros, requires_grad=layer.weight.requires_grad)
