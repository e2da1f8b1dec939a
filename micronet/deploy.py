"""A network as an ONNX file, kept only where it answers as the network that it was made from.

`export` makes the graph, `keep` is the gate that every ONNX file of ours passes, float or quantised: the checker of
onnx, the file read again by onnxruntime, and the same real images through both.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import micronet
from callbacks.onnx_export import ExportError, export_onnx, normalising
from callbacks.saving import whole_or_absent
from micronet.data import Data
from micronet.errors import MicronetError, first_line
from micronet.gate_images import RealImages, real_images
from micronet.machine import cpu_told
from micronet.measure import OnnxModule
from micronet.onnx_meta import Meta, parse_meta, read_meta, write_meta
from micronet.parity import Answers, Parity, compare, require

if TYPE_CHECKING:
    from onnx import ModelProto

    from micronet.model_source import ModelSource

TOLERANCE = 1e-4  # relative error of a float file's logits: float32 rounds to 1e-7, and 100 layers add up
ALIKE = 0.1  # of a quantised file's logits, image by image or many at once: a rounding can tip a code


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A file that passed the gate.

    Args:
        path: the file.
        bytes: its size.
        parity: how it compared with its source.
        meta: what it says of itself.
        uncounted: why it has no score; empty where it has one.
    """

    path: Path
    bytes: int
    parity: Parity
    meta: Meta
    uncounted: str = ""


def export(
    source: "ModelSource",
    path: str | Path,
    data: Data,
    *,
    normalise: bool = False,
    number: int = 1000,
    floor: float = 1,
) -> Kept:
    """Write a network as an ONNX file, float32, for any number of images at a time.

    Args:
        source: the network with its weights, in eval mode, on the CPU.
        path: the file; one that is there is replaced once the new one has passed.
        data: images to compare on, normalised as the network is to see them (`measure.images_for`).
        normalise: whether the graph itself normalises, so that it takes RGB in [0, 1].
        number: how many images to compare on.
        floor: least share of the images on which both have to name the same class, in [0, 1].

    Raises:
        MicronetError: it can't be exported; the file does not answer as the network does.
    """
    path = Path(path)
    images = real_images(data, number)
    try:
        proto = export_onnx(source.module, data.input_size)
        if normalise:
            normalising(proto, images.mean, images.std)
    except (ExportError, ValueError) as error:  # TraceError is one, too
        raise MicronetError(f"{source.name}: {first_line(error)}") from error
    check_zeros(proto, source.masks or {}, source.name)
    meta = described(source, data, normalise=normalise)
    return keep(proto, path, source=source.module, images=images, meta=meta, floor=floor, tolerance=TOLERANCE)


def described(
    source: "ModelSource", data: Data, *, normalise: bool = False, made: Mapping[str, Any] | None = None
) -> Meta:
    """What an ONNX file says of itself, but for score and gate.

    Args:
        source: the network that it is made from.
        data: its image sets, normalised as it is to see them.
        normalise: whether the graph itself normalises.
        made: how the file was made, where there is a choice; it goes with the provenance.
    """
    return Meta(
        classes=source.classes or data.classes,
        input_size=data.input_size,
        mean=data.mean,
        std=data.std,
        normalised=normalise,
        provenance=provenance(source) | dict(made or {}),
    )


def provenance(source: "ModelSource") -> dict[str, Any]:
    """Where a network came from, as an exported file says it: without the machine that it was trained on.

    Args:
        source: the network.
    """
    import onnx

    known = {name: value for name, value in source.provenance.items() if name != "hardware"}
    with_versions = {"micronet": micronet.__version__, "torch": torch.__version__, "onnx": onnx.__version__}
    return known | {"exported_with": with_versions}


def check_zeros(proto: "ModelProto", masks: Mapping[str, Tensor], name: str) -> None:
    """Refuse a graph in which a weight is not zero that its mask says is.

    Args:
        proto: the graph; a weight that the exporter turned round or calculated anew has no name there and is not seen.
        masks: mask of each masked parameter, by its name.
        name: of the network, for the message.

    Raises:
        MicronetError: a zero was lost.
    """
    from onnx import numpy_helper

    for tensor in proto.graph.initializer:
        mask = masks.get(tensor.name)
        if mask is None or tuple(tensor.dims) != tuple(mask.shape):
            continue
        if numpy_helper.to_array(tensor)[~mask.cpu().numpy()].any():
            raise MicronetError(f"{name}: {tensor.name} lost zeros on the way to ONNX; nothing was written")


def keep(
    proto: "ModelProto",
    path: Path,
    *,
    source: Answers,
    images: RealImages,
    meta: Meta,
    floor: float,
    tolerance: float | None,
    most_lost: float | None = None,
    options: tuple[str, str] = ("--floor", "--floor"),
) -> Kept:
    """Write a model beside its place, read it again, compare it with its source, and keep it only where it agrees.

    Args:
        proto: the model; its description is put in here.
        path: the file; its name ends in `.onnx`.
        source: the network that it was made from, taking normalised images, in eval mode, on the CPU.
        images: what to compare on.
        meta: the description, but for score and gate.
        floor: least share of the images on which both have to name the same class, in [0, 1].
        tolerance: largest relative error of an image's logits; None for any, of a quantised model.
        most_lost: most percentage points of top-1 that it may lose; None for any.
        options: what sets `floor` and `most_lost`, for messages.

    Raises:
        MicronetError: it is not sound, does not run, or does not answer as its source does: no file is kept.
        OSError: the file can't be written.
    """
    with whole_or_absent(path) as beside:
        try:
            _require_classes(proto, meta)
            _write(proto, beside)
            _check(beside)
            file, pixels = _answers(beside, images, meta), images.pixels
            parity = _compared(lambda part: source(images.normalise(images.scaled(part))), file, pixels, images.labels)
            require(parity, images.told, floor=floor, tolerance=tolerance, most_lost=most_lost, options=options)
            _require_alone(file, pixels[:2], ALIKE if tolerance is None else tolerance)
            score, uncounted = _score(beside)
            meta = replace(meta, score=score, gate=_told(parity, images))
            write_meta(proto, meta)
            _write(proto, beside)
            _require_written(proto, beside, meta)
        except MicronetError as error:
            # Those of the readers name the place beside.
            told = str(error).removeprefix(f"{beside}: ").replace(str(beside), str(path))
            raise MicronetError(f"{path}: {told.removeprefix(f'{path}: ')}; no file was kept") from error
        size = beside.stat().st_size
    return Kept(path=path, bytes=size, parity=parity, meta=meta, uncounted=uncounted)


def _write(proto: "ModelProto", path: Path) -> None:
    path.write_bytes(proto.SerializeToString())


def _check(path: Path) -> None:
    import onnx

    from micronet.onnx_file import open_onnx

    open_onnx(path)  # which refuses functions that the checker would follow for ever
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise MicronetError(f"not sound, says onnx's checker: {first_line(error)[:200]}") from error


def _answers(path: Path, images: RealImages, meta: Meta) -> Answers:
    """A file's logits of pixels, which are scaled here, and normalised where the graph doesn't."""
    session = OnnxModule(path).eval()

    def answers(pixels: Tensor) -> Tensor:
        scaled = images.scaled(pixels)
        return session(scaled if meta.normalised else images.normalise(scaled))

    return answers


def _compared(reference: Answers, candidate: Answers, pixels: Tensor, labels: Tensor | None = None) -> Parity:
    try:
        return compare(reference, candidate, pixels, labels)
    except (ValueError, AttributeError) as error:  # a tuple of outputs has no `double`
        raise MicronetError(f"its answers can't be compared: {first_line(error)}") from error


def _require_alone(file: Answers, pixels: Tensor, alike: float) -> None:
    """Refuse a file that answers an image alone otherwise than among others."""
    apart = _compared(file, lambda part: torch.cat([file(one[None]) for one in part]), pixels)
    if not apart.relative_error <= alike:
        raise MicronetError(
            f"it answers an image alone otherwise than among others (relative error {apart.relative_error:.2g})"
        )


def _require_classes(proto: "ModelProto", meta: Meta) -> None:
    if not proto.graph.output:
        return  # the checker has words for that
    sizes = [size.dim_value for size in proto.graph.output[0].type.tensor_type.shape.dim]
    logits = sizes[-1] if sizes else 0
    if logits != len(meta.classes):
        raise MicronetError(f"gives {logits} logits, and there are {len(meta.classes)} classes")


def _score(path: Path) -> tuple[dict[str, Any], str]:
    """Totals by the official rules of the file itself; and why there are none where an operation has no rule."""
    from micronet.score import score

    try:
        told = score(path).to_json()
    except MicronetError as error:
        return {}, str(error).removeprefix(f"{path}: ")
    return {"rules": told["rules"], "options": told["options"], **told["totals"]}, ""


def _told(parity: Parity, images: RealImages) -> dict[str, Any]:
    """How it compared, and where: what int8 answers depends on the processor's sums (`callbacks/processor.py`)."""
    import onnxruntime

    return {
        "images": images.told,
        "number": parity.images,
        "same_class": parity.agreeing,
        "relative_error": parity.relative_error,
        "right": parity.after,
        "right_of_source": parity.before,
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        **cpu_told(),
    }


def _require_written(proto: "ModelProto", path: Path, meta: Meta) -> None:
    """Refuse a file that does not hold what was compared, or whose description reads otherwise."""
    if path.read_bytes() != proto.SerializeToString() or read_meta(path) != parse_meta(meta.props(), str(path)):
        raise MicronetError("read again, it is not what was written")
    OnnxModule(path)
