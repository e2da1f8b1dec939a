"""Another activation in the place of a network's own."""

import copy
from typing import Any

from torch import Tensor, nn

from callbacks.liveness import fold_constants, needed
from callbacks.modules import replace_module
from micronet.edits.gate import Edited, checked, trace
from micronet.errors import MicronetError

ACTIVATIONS: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.Sigmoid, nn.Hardsigmoid)
}
# What a trace calls them: `callbacks/op_formulas.py`'s names.
_TRACED = {"Hardswish": ("hard_swish",), "GELU": ("gelu", "gelu_tanh"), "LeakyReLU": ("leaky_relu",)}
_TRACED |= {"Hardsigmoid": ("hard_sigmoid",)}


def swap_activation(
    model: nn.Module, old: type[nn.Module], new: type[nn.Module], *, images: Tensor | None = None
) -> Edited:
    """Put another activation in the place of every module of a kind.

    A function that a `forward` calls, such as `F.relu`, is no module and stays; with images, the summary names it.

    Args:
        model: the network; it stays as it is.
        old: the class to replace, such as `nn.ReLU`; subclasses stay.
        new: the class to put there, one of `ACTIVATIONS`; it works in place where the old module did.
        images: `(N, C, H, W)`, normalised: how many of them keep their class is told. Without any, functions that stay
            are not looked for.

    Raises:
        MicronetError: there is no such module, or `new` is not in the list, or `old` itself; or a network that can't be
            traced, where images are given.
    """
    if new not in ACTIVATIONS.values() or new is old:
        got = getattr(new, "__name__", repr(new))
        raise MicronetError(f"swap_activation: new must be another one of {', '.join(ACTIVATIONS)}, got {got}")
    if not isinstance(old, type):
        raise MicronetError(f"swap_activation: old must be a class, such as nn.ReLU, got {old!r}")
    layers = {name: new.__name__ for name, module in model.named_modules() if name and type(module) is old}
    calls = [] if images is None else _calls(model, old, tuple(images.shape[1:]))
    if not layers:
        more = f", only functions that can't be replaced ({_first(calls)}): make them modules" if calls else ""
        raise MicronetError(f"swap_activation: the network has no {old.__name__} module{more}")
    log, changed = {"edit": "swap_activation", "layers": layers}, copy.deepcopy(model)
    again(changed, log)
    stays = f"; {len(calls)} stay, which are no such modules: {_first(calls)}" if calls else ""
    summary = f"{len(layers)} of {old.__name__} became {new.__name__}{stays}"
    return checked(model, changed, log, again, summary, images, same=False)


def _calls(model: nn.Module, kind: type[nn.Module], size: tuple[int, ...]) -> list[str]:
    """Where a network calculates an activation without a module of that class."""
    graph = trace(model, size, "swap_activation")
    modules = dict(model.named_modules(remove_duplicate=False))
    ops = _TRACED.get(kind.__name__, (kind.__name__.lower(),))
    nodes = [node for node in needed(fold_constants(graph), graph.outputs) if node.op in ops]
    return [node.name for node in nodes if type(modules.get(node.name)) is not kind]


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def again(model: nn.Module, entry: dict[str, Any]) -> None:
    """Repeat an edit from its log, in place."""
    for name, kind in entry["layers"].items():
        old = model.get_submodule(name)  # there must be one
        in_place = {"inplace": True} if getattr(old, "inplace", False) and kind not in _NOT_IN_PLACE else {}
        replace_module(model, old, ACTIVATIONS[kind](**in_place).train(old.training))


_NOT_IN_PLACE = ("GELU", "Sigmoid")
