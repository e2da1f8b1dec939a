"""How much noise the quantisation of each layer brings, and whether leaving one in float mends an accuracy.

`rank_layers` quantises one layer at a time, in an otherwise float graph: its weights, its input, and what comes out of
it and of the ReLU behind it. The signal-to-noise ratio is of the logits. It says where noise comes from, not what it
does: `confirm` compares, image by image, the int8 graph that keeps a layer in float with the one that does not.
`ranking` does both, with no more images in memory at a time than `images_to_rank`.
Cost: as many passes over `images_to_rank` images as there are layers, and the opening of as many graphs.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import inf, isfinite, log10
from typing import Any

import numpy as np

from callbacks.onnx_run import logits
from callbacks.paired import Batches, Paired, Watch, answers, paired
from callbacks.quantize_onnx import MOST_CODE, REDUCED_CODE, Calibration, quantize

CONFIRMED = 3  # layers, and on how many images at most
CONFIRM_IMAGES = 2000
_BEHIND = ("Relu", "Clip")

Bar = Callable[[str, int], AbstractContextManager[Watch]]
"""What is done, and of how many; it is told how many are done."""


@dataclass(frozen=True)
class LayerNoise:
    """What the quantisation of one layer alone leaves of the logits.

    Args:
        name: of the layer.
        snr: signal-to-noise ratio of the logits, dB; infinite where nothing changed.
    """

    name: str
    snr: float


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The layers by the noise that each brings.

    Args:
        noise: the worst first.
        images: validation images that they were ranked on.
        confirmed: what leaving the worst ones in float does, each alone, on some validation images.
        seconds: how long that took.
    """

    noise: tuple[LayerNoise, ...]
    images: int
    confirmed: dict[str, Paired]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts, texts and numbers; JSON knows no infinity."""
        return {
            "images": self.images,
            "noise": [
                {"layer": layer.name, "snr_db": layer.snr if isfinite(layer.snr) else None} for layer in self.noise
            ],
            "confirmed": {name: vars(found) | {"p": found.p} for name, found in self.confirmed.items()},
            "seconds": self.seconds,
        }


def snr(wanted: np.ndarray, found: np.ndarray) -> float:
    """The signal-to-noise ratio in dB: `10 log10(sum wanted^2 / sum (found - wanted)^2)`.

    Args:
        wanted: logits of the float model.
        found: logits of the other one, of the same **shape**.
    """
    wanted = wanted.astype(np.float64)
    signal, noise = (wanted**2).sum(), ((found - wanted) ** 2).sum()
    return 10 * log10(signal / noise) if noise and signal else inf


def images_to_rank(layers: int) -> int:
    """How many images tell the layers of a network apart: 128, fewer where many layers run them all, at least 32.

    Args:
        layers: how many there are.
    """
    return min(128, max(32, 4096 // layers))


@contextmanager
def _unwatched(what: str, total: int) -> Iterator[Watch]:
    yield lambda done: None


def ranking(
    calibration: Calibration,
    draw: Callable[[int], Batches],
    *,
    reduce_range: bool = False,
    bar: Bar = _unwatched,
) -> Ranking:
    """Rank the layers, and test what leaving each of the worst in float does.

    Args:
        calibration: the float graph and its ranges.
        draw: gives so many validation images, batch by batch; all where there are not more.
        reduce_range: whether weights get 7 bits, as `quantize` has it.
        bar: shows what is done.
    """
    began, layers = time.monotonic(), calibration.layers
    images = np.concatenate([part for part, _ in draw(images_to_rank(len(layers)))])
    with bar("ranking the layers", len(layers)) as watch:
        noise = rank_layers(calibration, images, watch, reduce_range=reduce_range)
    worst = [layer.name for layer in noise[:CONFIRMED]] if len(noise) > 1 else []
    with bar("leaving the worst in float", CONFIRM_IMAGES) as watch:
        found = confirm(calibration, worst, draw(CONFIRM_IMAGES), watch, reduce_range=reduce_range)
    return Ranking(noise=tuple(noise), images=len(images), confirmed=found, seconds=time.monotonic() - began)


def rank_layers(
    calibration: Calibration,
    images: np.ndarray,
    watch: Watch = lambda done: None,
    *,
    reduce_range: bool = False,
) -> list[LayerNoise]:
    """The layers in the order of the noise that each brings, the worst first.

    Args:
        calibration: the float graph and its ranges.
        images: **shape** `(N, C, H, W)`, float32, normalised; each layer runs all of them.
        watch: called with the number of layers done.
        reduce_range: whether weights get 7 bits, as `quantize` has it.
    """
    wanted, found = logits(calibration.proto, images), []
    for done, (name, node) in enumerate(calibration.layers.items(), 1):
        rounded = alone(calibration, node, REDUCED_CODE if reduce_range else MOST_CODE)
        found.append(LayerNoise(name, snr(wanted, logits(rounded, images))))
        watch(done)
    return sorted(found, key=lambda layer: layer.snr)


def confirm(
    calibration: Calibration,
    names: Sequence[str],
    batches: Batches,
    watch: Watch = lambda done: None,
    *,
    reduce_range: bool = False,
) -> dict[str, Paired]:
    """For each of some layers, the int8 graph with all layers against the one that leaves this layer in float.

    Args:
        calibration: the float graph and its ranges.
        names: of the layers.
        batches: validation images and their classes.
        watch: called with the number of images that have run.
        reduce_range: whether weights get 7 bits, as `quantize` has it.
    """
    if not names:
        return {}
    kept = [(), *((name,) for name in names)]
    graphs = [quantize(calibration, left, reduce_range=reduce_range) for left in kept]
    (whole, *found), labels = answers(graphs, batches, watch)
    return {name: paired(whole, given, labels) for name, given in zip(names, found, strict=True)}


def alone(calibration: Calibration, name: str, most: int = MOST_CODE) -> Any:
    """The float graph with one layer quantised, computed in float: rounded weights, and rounding before and behind it.

    Args:
        calibration: the float graph and its ranges.
        name: of the layer's node.
        most: largest code of a weight.
    """
    import onnx
    from onnx import numpy_helper

    proto = onnx.ModelProto()
    proto.CopyFrom(calibration.proto)
    graph = proto.graph
    layer = next(node for node in graph.node if node.name == name)
    weight = next(tensor for tensor in graph.initializer if tensor.name == layer.input[1])
    own = f"{layer.input[1]}.rounded"
    codes = rounded(numpy_helper.to_array(weight), _axis(layer), most)
    graph.initializer.append(numpy_helper.from_array(codes, own))
    layer.input[1] = own
    _round_tensor(graph, layer.input[0], calibration, [layer])
    readers = [node for node in graph.node if layer.output[0] in node.input]
    behind = readers[0] if len(readers) == 1 and readers[0].op_type in _BEHIND else layer
    out = behind.output[0]
    if layer.op_type not in ("Gemm", "MatMul") and out not in [value.name for value in graph.output]:
        _round_tensor(graph, out, calibration, [node for node in graph.node if out in node.input])
    return proto


def _axis(layer: Any) -> int:
    """The axis of a layer's weights that its outputs are along."""
    turned = any(attribute.name == "transB" and attribute.i for attribute in layer.attribute)
    return 0 if layer.op_type == "Conv" or turned else 1


def rounded(weight: np.ndarray, axis: int, most: int = MOST_CODE) -> np.ndarray:
    """Weights as their codes stand for them: from `-most` to `most` along each output, halves to the even code.

    Args:
        weight: float32.
        axis: of the outputs.
        most: largest code.
    """
    others = tuple(place for place in range(weight.ndim) if place != axis)
    scale = (np.abs(weight).max(others, keepdims=True).astype(np.float64) / most).astype(np.float32)
    scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)
    return np.clip(np.rint(weight / scale), -most, most) * scale


def _round_tensor(graph: Any, name: str, calibration: Calibration, readers: Sequence[Any]) -> None:
    """Let some nodes read a tensor rounded to its 256 codes."""
    from onnx import helper, numpy_helper

    low, high = calibration.ranges[name]
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255 or 1.0
    zero = np.uint8(round(-low / scale))
    for part, value in (("scale", np.float32(scale)), ("zero", zero)):
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{name}.{part}"))
    codes, real = f"{name}.codes", f"{name}.real"
    maker = next((place for place, node in enumerate(graph.node) if name in node.output), -1)
    for node in readers:
        for place, given in enumerate(node.input):
            if given == name:
                node.input[place] = real
    steps = [f"{name}.scale", f"{name}.zero"]
    graph.node.insert(maker + 1, helper.make_node("DequantizeLinear", [codes, *steps], [real]))
    graph.node.insert(maker + 1, helper.make_node("QuantizeLinear", [name, *steps], [codes]))
