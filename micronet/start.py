"""The network that a recipe's first stage begins with: built anew, or read from a file."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from callbacks.distill import alike
from callbacks.torch_masks import take_masks
from micronet import bundle as bundles
from micronet.bundle import Bundle
from micronet.data import Data, plain_loader
from micronet.errors import MicronetError, first_line
from micronet.factories import describe_factory, innermost
from micronet.provenance import cut_otherwise, data_call
from micronet.recipe import Recipe, describe


def begin(recipe: Recipe, data: Data) -> Bundle:
    """Build a recipe's network, or read it from the file that the recipe names.

    Args:
        recipe: its `model` is a factory, called with the number of classes, or the path of a `model.pth`.
        data: the image sets.

    Raises:
        MicronetError: the factory can't be stored; no such file; a network of other classes or other normalisation.
    """
    if isinstance(recipe.model, Path):
        bundle = bundles.load(recipe.model)
        check_suits(bundle, data, str(recipe.model))
        _check_split(recipe, bundle)
        return _at_size(bundle, data, str(recipe.model))
    factory, kwargs = describe_factory(recipe.model)
    model = recipe.model(num_classes=data.num_classes)
    masks = take_masks(model)  # of torch.nn.utils.prune, in a network of the user's
    return Bundle(
        model=model,
        factory=factory,
        kwargs=kwargs | {"num_classes": data.num_classes},
        classes=data.classes,
        input_size=data.input_size,
        mean=data.mean,
        std=data.std,
        masks=masks,
    )


def _check_split(recipe: Recipe, bundle: Bundle) -> None:
    """Refuse to validate on images that the network was trained on."""
    then, now = data_call(bundle.provenance), data_call({"resolved": {"recipe": {"data": describe(recipe.data)}}})
    if cut_otherwise(then, now):
        cuts = [", ".join(f"{k}={call[k]}" for k in ("valid", "split_seed") if k in call) for call in (then, now)]
        raise MicronetError(
            f"{recipe.model}: was trained with another cut of valid from train ({cuts[0] or 'the usual one'}) than "
            f"this recipe's ({cuts[1] or 'the usual one'}): it would be validated on images that it was trained on"
        )


def _at_size(bundle: Bundle, data: Data, name: str) -> Bundle:
    """A network for the data's images, which may be larger or smaller than those that it was trained on."""
    if bundle.input_size == data.input_size:
        return bundle
    wanted = "x".join(map(str, data.input_size))
    try:
        with torch.no_grad():
            bundle.model(torch.zeros(1, *data.input_size))
    except RuntimeError as error:
        known = "x".join(map(str, bundle.input_size))
        raise MicronetError(
            f"{name}: was made for images of {known} (channels, height, width) and can't take {data.name}'s {wanted}: "
            f"{first_line(error)[:120]}"
        ) from error
    return replace(bundle, input_size=data.input_size)


def load_stage(recipe: Recipe, path: Path) -> Bundle:
    """Read what a stage of the recipe left; its own factory is trusted."""
    return bundles.load(path, factory=own_factory(recipe))


def own_factory(recipe: Recipe) -> Any:
    """The function that builds a recipe's network; None where it begins with a file."""
    return None if isinstance(recipe.model, Path) else innermost(recipe.model)


def check_suits(bundle: Bundle, data: Data, name: str) -> None:
    """Refuse a network whose answers or inputs mean something else than the data's.

    Args:
        bundle: the network.
        data: the image sets.
        name: of the network, for the message.

    Raises:
        MicronetError: classes in another order or of other names, another normalisation.
    """
    if bundle.classes != data.classes:
        raise MicronetError(
            f"{name}: its classes ({_some(bundle.classes)}) are not those of {data.name} ({_some(data.classes)}), "
            "in this order"
        )
    if not alike(bundle.mean, data.mean) or not alike(bundle.std, data.std):
        raise MicronetError(
            f"{name}: normalises images with mean {bundle.mean}, std {bundle.std}, {data.name} with mean {data.mean}, "
            f"std {data.std}"
        )


def _some(names: tuple[str, ...]) -> str:
    more = f", ... {len(names)} in all" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def some_images(data: Data, number: int = 256) -> Tensor:
    """The first images of the validation split, as the network sees them: `(N, C, H, W)`, on the CPU."""
    parts, left = [], number
    for batch, _ in plain_loader(data.valid, data):
        parts.append(batch[:left])
        left -= len(parts[-1])
        if not left:
            break
    return torch.cat(parts)


def check_masks_fit(bundle: Bundle, edit: Mapping[str, Any]) -> None:
    """Refuse an edit after which a mask's parameter is gone or has another shape: its zeros would be lost.

    Args:
        bundle: after the edit.
        edit: its log entry.

    Raises:
        MicronetError: the edit loses zeros.
    """
    state = bundle.model.state_dict()
    lost = [name for name, mask in bundle.masks.items() if name not in state or state[name].shape != mask.shape]
    if lost:
        raise MicronetError(
            f"{edit['edit']} would lose the zeros of {lost[0]}: change the structure first, make it sparse afterwards"
        )
