"""Changes of a network's structure, each logged as plain values, so that a file can do it again without the weights.

A function here takes a network and gives an `Edited`: a changed copy, the log entry, and a line on what was done. The
network given stays as it is. `replay` repeats an entry on a network of the same structure, whose weights come later
from a file. A recipe names edits in `Fit(edit=...)`; they run before the fit, on images of the validation split.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from micronet.errors import MicronetError


@dataclass(frozen=True)
class Edited:
    """What an edit gives.

    Args:
        model: the changed copy.
        log: plain values; `"edit"` names the function, the rest is what `replay` needs.
        summary: what was done, in one line.
    """

    model: nn.Module
    log: dict[str, Any]
    summary: str


ACTIVATIONS: dict[str, type[nn.Module]] = {
    cls.__name__: cls for cls in (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.LeakyReLU)
}


def replay(model: nn.Module, entry: dict[str, Any]) -> None:
    """Repeat an edit, in place.

    Args:
        model: a network of the structure that the edited one had; its weights are not looked at.
        entry: a log entry, as `Edited.log` has it; from a file, it may be anything plain.

    Raises:
        MicronetError: no such edit, or not one that fits this network.
    """
    steps: dict[str, Callable[[nn.Module, Any], None]] = {"swap_activation": _swap}
    name = entry.get("edit")
    if not isinstance(name, str) or name not in steps:
        raise MicronetError(f"its log names an edit {name!r} that this micronet does not have")
    try:
        steps[name](model, entry["layers"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MicronetError(f"its log's {name} does not fit its network ({error})") from error


def swap_activation(
    model: nn.Module, old: type[nn.Module], new: type[nn.Module], *, images: Tensor | None = None
) -> Edited:
    """Put another activation in the place of every module of a kind.

    Args:
        model: the network; it stays as it is.
        old: the class to replace, such as `nn.ReLU`; subclasses stay.
        new: the class to put there, one of `ACTIVATIONS`.
        images: `(N, C, H, W)`, normalised: how many of them keep their class is told.

    Raises:
        MicronetError: there is no such module, or `new` is not in the list.
    """
    if new not in ACTIVATIONS.values():
        raise MicronetError(f"swap_activation: new must be one of {', '.join(ACTIVATIONS)}, got {new.__name__}")
    layers = {name: new.__name__ for name, module in model.named_modules() if type(module) is old}
    if not layers:
        raise MicronetError(f"swap_activation: the network has no {old.__name__} module")
    changed = copy.deepcopy(model)
    _swap(changed, layers)
    log = {"edit": "swap_activation", "layers": layers}
    return Edited(changed, log, f"{len(layers)} of {old.__name__} became {new.__name__}")


def _swap(model: nn.Module, layers: dict[str, str]) -> None:
    for name, kind in layers.items():
        model.get_submodule(name)  # there must be one
        model.set_submodule(name, ACTIVATIONS[kind](**({} if kind == "GELU" else {"inplace": False})))
