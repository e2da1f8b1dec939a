"""What can be scored: modules, bundles, ONNX files, named untrained networks, plain state dicts, trusted pickles."""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from callbacks.ledger import Ledger, UnknownOperation, build
from micronet.errors import MicronetError, first_line, require_file
from micronet.named_networks import DEFAULT_SIZE, LIBRARIES, build_named

if TYPE_CHECKING:
    from torch import nn

    from callbacks.graph import Graph
    from micronet.bundle import Bundle


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that was opened, with all that is known of it.

    Args:
        name: What to call it.
        input_size: **Shape** of one image, `(C, H, W)`; one for each input where there are several.
        module: The network; None for an ONNX file.
        path: The ONNX file; None for a module.
        masks: The mask of each masked parameter; None where nothing declares which zeros are meant.
        classes: Class names in the order of the logits; empty where the file does not say.
        mean: What to subtract from each channel of an image scaled to [0, 1]; None where the file does not say.
        std: What to divide each channel by after that; None likewise.
        provenance: Recipe, options, seed, versions, git state; empty where the file does not say.
        float_bits: Width at which its numbers are stored that are no codes: 16 in a packed file of 16-bit floats.
    """

    name: str
    input_size: tuple[Any, ...] | None
    module: "nn.Module | None" = None
    path: Path | None = None
    masks: Mapping[str, Any] | None = None
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    float_bits: int = 32

    @property
    def masked_zeros(self) -> int:
        """How many of its weights masks declare to be zero."""
        return sum(int((~mask).sum()) for mask in (self.masks or {}).values())

    def graph(self) -> "Graph":
        """Read the network as a graph.

        Raises:
            MicronetError: It cannot be read with such an image.
        """
        if self.path is not None:
            from micronet.onnx_cost import read_onnx

            return read_onnx(self.path, self.input_size)
        from callbacks.op_trace import trace

        try:
            return trace(self.module, self.input_size or DEFAULT_SIZE, masks=self.masks)
        except ValueError as error:  # TraceError, or an input size that is none
            raise MicronetError(f"{self.name}: {first_line(error)}") from error

    def ledger(self, *, allow_unknown: bool = False) -> Ledger:
        """Count what it computes and stores.

        Args:
            allow_unknown: Whether operations without a rule are listed as uncounted, not refused.

        Raises:
            MicronetError: It cannot be read, or runs an operation without a rule.
        """
        try:
            found = build(self.graph(), allow_unknown=allow_unknown)
        except UnknownOperation as error:
            raise MicronetError(f"{self.name}: {error}; --allow-unknown lists them as uncounted") from error
        return found if self.float_bits == 32 else _at_width(found, self.float_bits)


def _at_width(ledger: Ledger, bits: int) -> Ledger:
    """A ledger whose numbers of 32 bits are stored at another width; what is computed with them is not narrower."""
    arrays = (replace(array, bits=bits) if array.bits == 32 else array for array in ledger.arrays)
    lines = (replace(line, weight_bits=bits) if line.weight_bits == 32 else line for line in ledger.lines)
    return replace(ledger, arrays=tuple(arrays), lines=tuple(lines))


def open_model(
    model: "nn.Module | str | PathLike[str]",
    *,
    input_size: Sequence[Any] | None = None,
    masks: Mapping[str, Any] | None = None,
    factory: Any = None,
    arch: str | None = None,
    trust: bool = False,
) -> ModelSource:
    """Open whatever a model comes as.

    Args:
        model: A module; the path of a `model.pth`, a packed file, an ONNX file, a state dict or a pickle; `timm:NAME`
            or `torchvision:NAME`.
        input_size: **Shape** of one image, `(C, H, W)`; None takes what the model says of itself.
        masks: For a module: the mask of each masked parameter.
        factory: Builds a bundle's network instead of the function that the file names.
        arch: Builds a state dict's network: `timm:NAME`, `torchvision:NAME` or `micronet:NAME`, with arguments after
            commas (`micronet:wide_resnet,depth=22,width=6,num_classes=100`).
        trust: Whether a pickle may be read, which runs whatever code it holds.

    Raises:
        MicronetError: No such model, or not of a kind that can be read this way.
    """
    size = tuple(input_size) if input_size is not None else None
    if not isinstance(model, str | PathLike):
        from callbacks.torch_masks import unmasked

        module, masks = unmasked(model, masks)
        return ModelSource(name=type(model).__name__, input_size=size or DEFAULT_SIZE, module=module, masks=masks)
    name = fspath(model)
    if name.partition(":")[0] in LIBRARIES:
        if arch or trust:
            raise MicronetError(f"{name}: is no file: --arch and --trust say how to read one")
        module, own = build_named(name)
        return ModelSource(name=name, input_size=size or own, module=module, masks={})
    if name.lower().endswith(".onnx"):
        return of_onnx(name, size)
    if arch is not None:
        module, own = build_named(arch, with_weights=True)
        return _state_dict(Path(name), module, size or own)
    from micronet.bundle import load
    from micronet.bundle_file import is_bundle
    from micronet.unpack import is_packed, read

    if is_packed(name):
        packed = read(name, factory=factory)
        return replace(of_bundle(packed.bundle, name, size), float_bits=packed.float_bits)
    if trust and not is_bundle(name):
        return _pickled(Path(name), size)
    return of_bundle(load(model, factory=factory), name, size)


def of_bundle(bundle: "Bundle", name: str, input_size: tuple[Any, ...] | None = None) -> ModelSource:
    """A bundle as a source; its masks declare which zeros are meant."""
    return ModelSource(
        name=name,
        input_size=input_size or bundle.input_size,
        module=bundle.model,
        masks=bundle.masks,
        classes=bundle.classes,
        mean=bundle.mean,
        std=bundle.std,
        provenance=bundle.provenance,
    )


def of_onnx(name: str, input_size: tuple[Any, ...] | None = None) -> ModelSource:
    """An ONNX file as a source, with what it says of itself where it is one of ours."""
    from micronet.onnx_meta import read_meta

    meta = read_meta(name)
    if meta is None:
        return ModelSource(name=name, input_size=input_size, path=Path(name))
    return ModelSource(
        name=name,
        input_size=input_size,
        path=Path(name),
        classes=meta.classes,
        mean=meta.input_mean,
        std=meta.input_std,
        provenance=meta.provenance,
    )


def _torch_load(path: Path, *, weights_only: bool) -> Any:
    import torch

    require_file(path)
    from micronet.bundle_file import copied_archive

    try:
        hostile = weights_only and zipfile.is_zipfile(path)
        return torch.load(copied_archive(path) if hostile else path, map_location="cpu", weights_only=weights_only)
    except MicronetError:
        raise
    except Exception as error:  # damaged bytes fail in any way, and so does what a pickle runs
        raise MicronetError(f"{path}: not a PyTorch file that can be read: {first_line(error)[:160]}") from error


def _state_dict(path: Path, module: "nn.Module", size: tuple[int, ...]) -> ModelSource:
    """Fill a network with a plain state dict; two libraries' wrappers prefix its names, torch's pruning has masks."""
    import torch

    from callbacks.torch_masks import take_masks_of_state

    content = _torch_load(path, weights_only=True)
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise MicronetError(f"{path}: not a state dict (a dict of tensors)")
    state = {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in content.items()}
    state, masks = take_masks_of_state(state)
    try:
        module.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, TypeError) as error:
        lines = str(error).strip().splitlines()
        raise MicronetError(
            f"{path}: its weights don't fit --arch: {' '.join(lines[1:2] or lines).strip()[:200]}"
        ) from error
    return ModelSource(name=str(path), input_size=size, module=module.eval(), masks=masks or None)


def _pickled(path: Path, size: tuple[int, ...] | None) -> ModelSource:
    """Read a whole pickled module, or a fastai Learner; the caller has said that its code may run."""
    import torch

    from callbacks.torch_masks import unmasked

    found = _torch_load(path, weights_only=False)
    module = getattr(found, "model", found)
    if not isinstance(module, torch.nn.Module):
        raise MicronetError(f"{path}: holds a {type(found).__name__}, neither a module nor a fastai Learner")
    if size is None:
        raise MicronetError(f"{path}: does not say how large its images are: give --input-size, such as 3x224x224")
    module, masks = unmasked(module.eval(), None)
    return ModelSource(name=str(path), input_size=size, module=module, masks=masks)
