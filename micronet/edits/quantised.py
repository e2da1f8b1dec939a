"""Layers that compute with quantised weights and inputs.

A training makes them (`callbacks/quant_aware.py`), no edit of a recipe's. Their step sizes are in the state dict; which
layers they are, and their widths, is an entry in the log like any edit's. `bundle.save` writes it.
"""

from typing import Any

from torch import nn

from callbacks.fake_quantize import quantise_layer, quantised_layers


def entry(model: nn.Module, rebuilt: nn.Module) -> dict[str, Any] | None:
    """What makes a network's layers quantised as another one's.

    Args:
        model: the network that is to be stored.
        rebuilt: what factory and edits give without it.

    Returns:
        An entry for the log; None where they are as they should be.
    """
    known = {name: _widths(layer) for name, layer in quantised_layers(rebuilt).items()}
    layers = {name: _widths(layer) for name, layer in quantised_layers(model).items()}
    layers = {name: widths for name, widths in layers.items() if known.get(name) != widths}
    return {"edit": "quantised", "layers": layers} if layers else None


def again(model: nn.Module, logged: dict[str, Any]) -> None:
    """Repeat it from the log, in place; the step sizes come from a file afterwards."""
    for name, widths in logged["layers"].items():
        weight_bits, act_bits, act_signed = widths
        quantise_layer(model.get_submodule(name), weight_bits, act_bits, act_signed)


def _widths(layer: Any) -> list[int | bool]:
    return [layer.weight_bits, layer.act_bits, layer.act_signed]
