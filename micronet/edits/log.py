"""Repeating logged edits."""

from typing import Any

from torch import nn

from micronet.edits.activations import again as _swap
from micronet.edits.affine import again as _affine
from micronet.edits.depthwise import again as _separate
from micronet.edits.factored import again as _factor
from micronet.edits.folded import again as _fold
from micronet.edits.gate import Step
from micronet.edits.quantised import again as _quantise
from micronet.errors import MicronetError


def replay(model: nn.Module, entry: dict[str, Any]) -> None:
    """Repeat an edit, in place.

    Args:
        model: a network of the structure that the edited one had; its weights are not looked at.
        entry: a log entry, as `Edited.log` has it; from a file, it may be anything plain.

    Raises:
        MicronetError: no such edit, or not one that fits this network.
    """
    steps: dict[str, Step] = {
        "swap_activation": _swap,
        "low_rank": _factor,
        "separable": _separate,
        "fold_bn": _fold,
        "quantised": _quantise,
        "channel_affine": _affine,
    }
    name = entry.get("edit")
    if not isinstance(name, str) or name not in steps:
        raise MicronetError(f"its log names an edit {name!r} that this micronet does not have")
    try:
        steps[name](model, entry)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MicronetError(f"its log's {name} does not fit its network ({error})") from error
