"""A file's network: built by its factory, edited, as narrow as it says, and filled; its shapes checked beforehand."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from callbacks.torch_masks import take_masks
from callbacks.widths import set_widths
from micronet.edits import replay
from micronet.errors import MicronetError, first_line

# Parameters that a network may have, however a file's arguments make it: they could ask for 10^9 layers.
MOST_PARAMETERS = 10_000


def rebuilt(build: Callable[..., nn.Module], content: Mapping[str, Any]) -> Callable[..., nn.Module]:
    """A factory of the network that a file describes: built, edited, as narrow as it says.

    Args:
        build: the function that the file names.
        content: the file's fields, of which `edits` and `widths` are read where there are any.
    """

    def whole(**kwargs: Any) -> nn.Module:
        model = build(**kwargs)
        take_masks(model)  # of torch.nn.utils.prune: a file holds plain weights, and the masks beside them
        for edit in content.get("edits", []):
            replay(model, edit)
        set_widths(model, content.get("widths", {}))
        return model

    return whole


def fill(build: Callable[..., nn.Module], kwargs: dict[str, Any], state: dict[str, Tensor], trusted: bool) -> nn.Module:
    """Build a network and put the weights in; the caller's random numbers are not drawn from.

    Args:
        build: as `rebuilt` gives it.
        kwargs: its keyword arguments, from a file.
        state: the weights, by their names in the state dict.
        trusted: whether its shapes need not be checked before memory is taken for them.

    Raises:
        MicronetError: it can't be built, or the weights don't fit.
    """
    try:
        if not trusted:
            check_shapes(shapes_of(build, kwargs), state)
        with torch.random.fork_rng(devices=[]):
            model = build(**kwargs)
        check_shapes({name: value.shape for name, value in model.state_dict().items()}, state)
        model.load_state_dict(state)
    except MicronetError:
        raise
    except Exception as error:  # a file's arguments can make a network's own code fail in any way
        raise MicronetError(f"its network can't be built: {first_line(error)[:160]}") from error
    return model


@contextmanager
def _bounded() -> Iterator[None]:
    """Stop a network that is being built when it has more parameters than any has."""
    count = 0

    def registered(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        nonlocal count
        count += 1
        if count > MOST_PARAMETERS:
            raise MicronetError(f"its network has more than {MOST_PARAMETERS:,} parameter tensors: none has so many")

    handle = nn.modules.module.register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


def shapes_of(build: Callable[..., nn.Module], kwargs: dict[str, Any]) -> dict[str, torch.Size] | None:
    """Shapes of a network's weights, without memory for them: a hostile file's width of 10^9 must not be allocated.

    Args:
        build: the factory.
        kwargs: its keyword arguments, from a file.

    Returns:
        By the name in the state dict; None where a network can't be built so, and has no arguments that say its size.

    Raises:
        MicronetError: it can't be built so, and has.
    """
    try:
        with torch.device("meta"), _bounded():
            return {name: value.shape for name, value in build(**kwargs).state_dict().items()}
    except (RuntimeError, NotImplementedError) as error:
        # Some networks (torchvision's RegNet) compute with their weights: without arguments, their size is known.
        if set(kwargs) <= {"num_classes", "model_name"} and kwargs.get("num_classes", 0) <= 100_000:
            return None
        raise MicronetError("its network can't be built to check its shapes, and has arguments of its own") from error


def check_shapes(wanted: Mapping[str, torch.Size] | None, state: Mapping[str, Tensor]) -> None:
    """Compare names and shapes of tensors.

    Args:
        wanted: those of the network; None where they are not known.
        state: what is to be put in.

    Raises:
        MicronetError: they differ.
    """
    if wanted is None:  # not known
        return
    missing, surplus = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    shaped = [name for name in wanted if name in state and wanted[name] != state[name].shape]
    if missing or surplus or shaped:
        raise MicronetError(
            f"its weights don't fit its network ({len(missing)} missing, {len(surplus)} surplus, "
            f"{len(shaped)} of another shape, such as {(missing + surplus + shaped)[0]})"
        )
