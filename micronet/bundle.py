"""`model.pth`: a network that loads anywhere, with what is needed to use it and to know where it came from.

The file holds tensors and plain containers only and is read with `torch.load(weights_only=True)`: loading runs no code
of the file's. It names a factory (a function that builds the network) which is called only if it is one of micronet's,
torchvision's or timm's own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from callbacks.fake_quantize import bits_of
from callbacks.saving import plain, write_atomically
from callbacks.widths import narrower, set_widths, widths
from micronet.bundle_file import FORMAT, VERSION, packed_mask, read_content, unpacked_mask
from micronet.edits import replay
from micronet.edits.quantised import entry as quantised_entry
from micronet.errors import MicronetError, first_line
from micronet.factories import find_factory
from micronet.minmax8 import encode
from micronet.names import current
from micronet.rebuild import check_shapes, fill, rebuilt


@dataclass
class Bundle:
    """A network and all that belongs to it.

    Args:
        model: the network, in eval mode after `load`.
        factory: `module:name` of the function that builds it.
        kwargs: keyword arguments for the factory: numbers, text, and lists and dicts of these.
        classes: class names in the order of the logits.
        input_size: channels, height and width of one image.
        mean: what to subtract from each channel of an image scaled to [0, 1].
        std: what to divide each channel by after that.
        history: one row of measured numbers for each stage that made the network.
        provenance: recipe, options, seed, versions, hardware, git state.
        masks: for each masked parameter, by its name in the state dict, a bool tensor of its shape: False where the
            parameter is zero and stays so. They declare which zeros are meant.
        edits: changes of structure since the factory built the network, in their order, as `micronet.edits` logs them.
            `save` adds an entry for layers that a training quantised. Widths are not among them: `save` finds which
            layers are narrower than what the factory and the edits give.
    """

    model: nn.Module
    factory: str
    kwargs: dict[str, Any]
    classes: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    history: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    edits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def bits(self) -> dict[str, tuple[int, int]]:
        """Widths of the quantised layers: by name, of the weights and of the input."""
        return bits_of(self.model)


def save(
    bundle: Bundle,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    factory: Callable[..., nn.Module] | None = None,
) -> None:
    """Write a bundle; a reader finds the old file or the new one, never half of one.

    Args:
        bundle: what to write.
        path: the file.
        dtype: type of the stored weights: `torch.float16` for half the size, `torch.uint8` for a quarter, as `minmax8`
            has it; None as they are. `load` gives float32 back: the file describes the rounded network.
        factory: the function that `bundle.factory` names, where that is not micronet's, torchvision's or timm's.

    Raises:
        MicronetError: a mask belongs to no parameter, or a parameter is not zero where its mask says so; factory and
            edits don't give a network with these weights, at any widths: what was written could not be loaded.
    """
    structure = structure_of(bundle, factory)
    _check_masks(bundle.masks, bundle.model.state_dict())
    state = {name: value.detach().cpu().contiguous() for name, value in bundle.model.state_dict().items()}
    coded = {}
    if dtype is torch.uint8:
        coded = {"minmax8": encode(state)}
        state = {name: value for name, value in state.items() if not value.is_floating_point()}
    elif dtype is not None:
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    content = {
        "format": FORMAT,
        "version": VERSION if coded else 1,
        "factory": bundle.factory,
        "kwargs": bundle.kwargs,
        "state": state,
        "classes": [str(name) for name in bundle.classes],
        "input_size": [int(n) for n in bundle.input_size],
        "mean": [float(x) for x in bundle.mean],
        "std": [float(x) for x in bundle.std],
        "history": bundle.history,
        "provenance": bundle.provenance,
        "masks": {name: packed_mask(mask) for name, mask in bundle.masks.items()},
        **structure,
        **coded,
    }
    write_atomically(plain(content), path)


def load(path: str | Path, *, factory: Callable[..., nn.Module] | None = None) -> Bundle:
    """Read a bundle; its logits are bit-equal to those of the network that was saved.

    Args:
        path: the file; one that `micronet pack` wrote is read, too.
        factory: builds the network instead of the one that the file names; called with the file's keyword arguments.

    Raises:
        MicronetError: no such file; truncated; not PyTorch's; a pickle of objects; not a bundle; of a newer version;
            its factory is not allowed; its weights don't fit.
    """
    from micronet.unpack import is_packed, read

    if is_packed(path):
        return read(path, factory=factory).bundle
    return assemble(read_content(Path(path)), path, factory)


def assemble(content: dict[str, Any], path: str | Path, factory: Callable[..., nn.Module] | None) -> Bundle:
    """Build the network of a file's content, and fill it.

    Args:
        content: the file's fields, as `check_fields` passes them.
        path: the file, for messages.
        factory: builds the network instead of the one that the file names.

    Raises:
        MicronetError: the factory is not allowed; the weights don't fit.
    """
    kwargs = content["kwargs"]
    try:
        build = factory or find_factory(content["factory"], kwargs)
        model = fill(rebuilt(build, content), kwargs, content["state"], trusted=factory is not None)
        masks = {
            name: unpacked_mask(mask, content["state"].get(name)) for name, mask in content.get("masks", {}).items()
        }
        _check_masks(masks, content["state"])
    except MicronetError as error:
        raise MicronetError(f"{path}: {error}") from error
    return Bundle(
        model=model.eval(),
        factory=current(content["factory"]),
        kwargs=kwargs,
        classes=tuple(content["classes"]),
        input_size=tuple(content["input_size"]),
        mean=tuple(content["mean"]),
        std=tuple(content["std"]),
        history=content["history"],
        provenance=content["provenance"],
        masks=masks,
        edits=content.get("edits", []),
    )


def _check_masks(masks: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        value = state.get(name)
        if value is None or mask.dtype is not torch.bool or mask.shape != value.shape:
            raise MicronetError(f"the mask of {name} is not a bool tensor of a parameter's shape")
        if bool((value[~mask] != 0).any()):
            raise MicronetError(f"{name} is not zero where its mask says so: it is not as sparse as it claims")


def structure_of(bundle: Bundle, factory: Callable[..., nn.Module] | None) -> dict[str, Any]:
    """What makes the factory's network the bundle's: the edits, and the widths of the layers that are narrower.

    Args:
        bundle: the network.
        factory: the function that `bundle.factory` names, where that is not on the allow-list.

    Raises:
        MicronetError: factory and edits don't give a network of these shapes, at any widths.
    """
    build = rebuilt(factory or find_factory(bundle.factory, bundle.kwargs), {"edits": bundle.edits})
    try:
        with torch.random.fork_rng(devices=[]):
            try:
                with torch.device("meta"):
                    whole = build(**bundle.kwargs)
            except (RuntimeError, NotImplementedError):  # some, such as torchvision's RegNet, compute while built
                whole = build(**bundle.kwargs)
        quantised = quantised_entry(bundle.model, whole)
        edits = [*bundle.edits, *([quantised] if quantised else [])]
        if quantised:
            replay(whole, quantised)
        table = narrower(bundle.model, widths(whole))
        set_widths(whole, table)
    except ValueError as error:
        raise MicronetError(f"the network can't be saved: {first_line(error)}") from error
    check_shapes({name: value.shape for name, value in whole.state_dict().items()}, bundle.model.state_dict())
    return {"edits": edits, "widths": table}
