"""A network in fewer bits, as a file that is kept only where it answers about as well as before.

`to_int8` and `to_float16` write ONNX files, through the gate of `deploy.keep`, beside the float graph that they were
made from; `to_minmax8` writes a `model.pth`. Each is measured on the whole validation split, on the file itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from callbacks.calibrate_onnx import calibrated, passes
from callbacks.half import HalfError, computed_half, computes_half, stored_half
from callbacks.layer_noise import Ranking, ranking
from callbacks.onnx_export import export_onnx
from callbacks.onnx_run import open_session
from callbacks.paired import Batches
from callbacks.quantize import chosen_images
from callbacks.quantize_onnx import Calibration, quantize, require_layers
from callbacks.saving import whole_or_absent
from micronet.bundle import Bundle, load, save
from micronet.data import Data
from micronet.data.store import progress
from micronet.deploy import check_zeros, described, keep
from micronet.errors import MicronetError, first_line
from micronet.gate_images import Floats, RealImages, validation
from micronet.machine import int8_told
from micronet.parity import Answers, compare, least_agreement, require
from micronet.quantised_file import Quantised

if TYPE_CHECKING:
    from micronet.model_source import ModelSource

OPTIONS = ("--agreement", "--floor")  # of the command, which messages name


@dataclass(frozen=True, kw_only=True)
class Int8:
    """How an int8 file is made.

    Args:
        images: how many images to calibrate on.
        calibrate: where they are drawn from: `train` or `valid`.
        seed: of the draw.
        method: how ranges are found: `minmax`, `entropy` or `percentile`.
        keep_float: names of layers that stay in float, or a number: of those that bring the most noise.
        rank: whether the layers are ranked where that is not needed.
        reduce_range: whether weights get 7 bits: for processors whose sums are short (`callbacks/processor.py`).
    """

    images: int = 512
    calibrate: str = "train"
    seed: int = 0
    method: str = "minmax"
    keep_float: int | Sequence[str] = ()
    rank: bool = False
    reduce_range: bool = False

    @property
    def ranks(self) -> bool:
        """Whether the layers are ranked."""
        return self.rank or (isinstance(self.keep_float, int) and self.keep_float > 0)


def float_graph(source: "ModelSource", keep_float: int | Sequence[str] = ()) -> Any:
    """The float ONNX graph of a network that is to be quantised, an `onnx.ModelProto`; no image is needed for it.

    Args:
        source: the network with its weights, in eval mode, on the CPU.
        keep_float: names of layers that are to stay in float; a number says nothing here.

    Raises:
        MicronetError: it can't be exported; there is no layer of such a name.
    """
    try:
        proto = export_onnx(source.module, source.input_size)
        require_layers(proto, () if isinstance(keep_float, int) else keep_float)
    except ValueError as error:  # ExportError, TraceError and QuantizeError
        raise MicronetError(f"{source.name}: {first_line(error)}") from error
    return proto


def to_int8(
    source: "ModelSource",
    path: Path,
    data: Data,
    how: Int8,
    *,
    floor: float,
    agreement: float | None = None,
    graph: Any = None,
) -> Quantised:
    """Write a network as an int8 ONNX file.

    Args:
        source: the network with its weights, in eval mode, on the CPU.
        path: the file; its name ends in `.onnx`.
        data: its image sets, normalised as it is to see them; the test images are not looked at.
        how: calibration, and layers that stay in float.
        floor: most percentage points of top-1 that it may lose on the validation images.
        agreement: least share of them that keep their class, in [0, 1]; None for `least_agreement(floor)`.
        graph: its `float_graph`, where that has been made; it stays as it is.

    Raises:
        MicronetError: it can't be exported or quantised, or loses more: no file is kept.
    """
    proto = float_graph(source, how.keep_float) if graph is None else graph
    try:
        calibration = _calibrated(proto, data, how)
        ranked = _ranked(calibration, data, how.reduce_range) if how.ranks else None
        kept = how.keep_float
        if isinstance(kept, int):
            kept = [layer.name for layer in ranked.noise[:kept]] if ranked else []
        made = quantize(calibration, kept, reduce_range=how.reduce_range)
    except ValueError as error:
        raise MicronetError(f"{source.name}: {first_line(error)}") from error
    check_zeros(calibration.proto, source.masks or {}, source.name)
    told = {"images": calibration.images, "calibrate": how.calibrate, "seed": how.seed, "method": calibration.method}
    told |= {"keep_float": list(kept), "reduce_range": how.reduce_range}
    found = _keep(source, made, proto, path, data, "int8", told, floor, agreement)
    processor = int8_told("--reduce-range", reduced=how.reduce_range)
    notes = [*_sparse_notes(source), f"in float: {', '.join(kept)}" if kept else "", processor]
    return replace(found, ranking=ranked, notes=tuple(filter(None, notes)))


def to_float16(
    source: "ModelSource", path: Path, data: Data, *, compute: bool, floor: float, agreement: float | None = None
) -> Quantised:
    """Write a network as an ONNX file whose weights are stored in 16 bits.

    Args:
        source: the network with its weights, in eval mode, on the CPU.
        path: the file; its name ends in `.onnx`.
        data: its image sets, normalised as it is to see them.
        compute: whether the file says to compute in float16, too.
        floor: most percentage points of top-1 that it may lose on the validation images.
        agreement: least share of them that keep their class, in [0, 1]; None for `least_agreement(floor)`.

    Raises:
        MicronetError: it can't be exported, a weight is beyond float16, or it loses more: no file is kept.
    """
    proto = float_graph(source)
    try:
        made = computed_half(proto) if compute else stored_half(proto)
    except HalfError as error:
        raise MicronetError(f"{source.name}: {error}") from error
    notes = ("computed in float32: a runtime makes float32 of the weights when it loads the file",)
    if compute:
        here = computes_half(made)
        notes = (
            "onnxruntime computes it in float16 here"
            if here
            else "onnxruntime has no float16 kernels for this CPU: here it computes in float32, no faster than without "
            "--compute",
        )
    how = {"compute": "float16" if compute else "float32"}
    found = _keep(source, made, proto, path, data, "float16", how, floor, agreement)
    return replace(found, notes=notes)


def to_minmax8(
    bundle: Bundle,
    path: Path,
    data: Data,
    *,
    factory: Any = None,
    name: str,
    floor: float,
    agreement: float | None = None,
) -> Quantised:
    """Write a bundle whose weights are stored in 8 bits, as `minmax8` has it.

    Args:
        bundle: the network, in eval mode, on the CPU.
        path: the file.
        data: its image sets, normalised as it is to see them.
        factory: the function that `bundle.factory` names, where that is not on the allow-list.
        name: of the network, for messages.
        floor: most percentage points of top-1 that it may lose on the validation images.
        agreement: least share of them that keep their class, in [0, 1]; None for `least_agreement(floor)`.

    Raises:
        MicronetError: a weight is no finite number, or it loses more: no file is kept.
    """
    images = validation(data)
    with whole_or_absent(path) as beside:
        save(bundle, beside, factory=factory)
        float_size = beside.stat().st_size
        save(bundle, beside, dtype=torch.uint8, factory=factory)
        coded = load(beside, factory=factory)
        seen = (_of_pixels(form, images) for form in (bundle.model.eval(), coded.model))
        parity = compare(*seen, images.pixels, images.labels)
        least = least_agreement(floor) if agreement is None else agreement
        try:
            require(parity, images.told, floor=least, most_lost=floor, options=OPTIONS)
        except MicronetError as error:
            raise MicronetError(f"{name}: at 8 bits {error}; no file was kept") from error
        size = beside.stat().st_size
    floats = {key: value for key, value in bundle.model.state_dict().items() if value.is_floating_point()}
    numbers = sum(value.numel() for value in floats.values())
    return Quantised(
        path=path,
        to="minmax8",
        bytes=size,
        graph_bytes=size,
        float_bytes=float_size,
        images=images.told,
        parity=parity,
        how={"params": sum(p.numel() for p in bundle.model.parameters()), "numbers": numbers},
        worst=_worst(floats, coded.model.state_dict()),
        notes=("storage alone: read again it is a float32 network, no smaller in memory and no faster",),
    )


def _of_pixels(form: Answers, images: RealImages) -> Answers:
    return lambda pixels: form(images.normalise(images.scaled(pixels)))


def _calibrated(proto: Any, data: Data, how: Int8) -> Calibration:
    part = getattr(data, how.calibrate)
    places = chosen_images(len(part), how.images, how.seed)
    with progress(f"calibrating on {len(places):,} images", len(places) * passes(how.method)) as watch:
        return calibrated(proto, Floats(part.images[places], data), how.method, watch)


def _ranked(calibration: Calibration, data: Data, reduce_range: bool) -> Ranking:
    images = validation(data)

    def draw(number: int) -> Batches:
        places = chosen_images(len(images.labels), number, 0)
        return Floats(images.pixels[places], data).batches(images.labels[places])

    return ranking(calibration, draw, reduce_range=reduce_range, bar=progress)


def _keep(
    source: "ModelSource",
    made: Any,
    proto: Any,
    path: Path,
    data: Data,
    to: str,
    how: dict[str, Any],
    floor: float,
    agreement: float | None,
) -> Quantised:
    """Pass a graph through the gate, beside the float one."""
    images, size = validation(data), made.ByteSize()
    meta = described(source, data, made={to: how})
    kept = keep(
        made,
        path,
        source=_answers(proto),
        images=images,
        meta=meta,
        floor=least_agreement(floor) if agreement is None else agreement,
        tolerance=None,
        most_lost=floor,
        options=OPTIONS,
    )
    return Quantised(
        path=path,
        to=to,
        bytes=kept.bytes,
        graph_bytes=size,
        float_bytes=proto.ByteSize(),
        images=images.told,
        parity=kept.parity,
        how=how,
    )


def _answers(proto: Any) -> Answers:
    run = open_session(proto)
    return lambda images: torch.from_numpy(run(images.numpy())[0])


def _worst(before: dict[str, Tensor], after: dict[str, Tensor]) -> tuple[str, float]:
    """The tensor that lost most, and |error| / |tensor|."""
    lost = {}
    for name, value in before.items():
        error = (after[name].double() - value.double()).norm()
        lost[name] = float(error / value.double().norm()) if error else 0.0
    name = max(lost, key=lost.__getitem__)
    return name, lost[name]


def _sparse_notes(source: "ModelSource") -> tuple[str, ...]:
    zeros = source.masked_zeros
    if not zeros:
        return ()
    return (
        f"{zeros:,} zeros of its masks are codes of 0, a byte each: int8 makes a sparse network no smaller than "
        "a dense one, and no faster",
    )
