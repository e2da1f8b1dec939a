"""How much noise the quantisation of each layer brings, and whether leaving one in float mends an accuracy.

`rank_layers` quantises one layer at a time, in an otherwise float graph: its weights, its input, and what comes out of
it and of the ReLU behind it. The signal-to-noise ratio is of the logits. It says where noise comes from, not what it
does: `confirm` compares, image by image, the int8 graph that keeps a layer in float with the one that does not.
Cost: as many passes over `images_to_rank` images as there are layers, and the opening of as many graphs.
Source: the exact test of McNemar 1947, two-sided.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb, inf, log10
from typing import Any

import numpy as np

from callbacks.onnx_run import logits
from callbacks.quantize_onnx import Calibration, quantize

_BEHIND = ("Relu", "Clip")


@dataclass(frozen=True)
class LayerNoise:
    """What the quantisation of one layer alone leaves of the logits.

    Args:
        name: of the layer.
        snr: signal-to-noise ratio of the logits, dB; infinite where nothing changed.
    """

    name: str
    snr: float


@dataclass(frozen=True)
class Paired:
    """Two models on the same images.

    Args:
        images: how many.
        before: images that the first answers rightly.
        after: images that the second answers rightly.
        lost: images that only the first answers rightly.
        won: images that only the second answers rightly.
        agreeing: images of which both say the same class, right or wrong.
    """

    images: int
    before: int
    after: int
    lost: int
    won: int
    agreeing: int

    @property
    def drop(self) -> float:
        """What the second one loses of the first one's accuracy, percentage points."""
        return 100 * (self.before - self.after) / self.images

    @property
    def p(self) -> float:
        """How likely so uneven a share of `lost` and `won`, or a more uneven one, is if neither model is better."""
        number, least = self.lost + self.won, min(self.lost, self.won)
        return min(1.0, 2 * sum(comb(number, k) for k in range(least + 1)) / 2**number)


def snr(wanted: np.ndarray, found: np.ndarray) -> float:
    """The signal-to-noise ratio in dB: `10 log10(sum wanted^2 / sum (found - wanted)^2)`.

    Args:
        wanted: logits of the float model.
        found: logits of the other one, of the same **shape**.
    """
    wanted = wanted.astype(np.float64)
    signal, noise = (wanted**2).sum(), ((found - wanted) ** 2).sum()
    return 10 * log10(signal / noise) if noise and signal else inf


def paired(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> Paired:
    """Count what two models answer rightly, together and alone.

    Args:
        before: logits of the first model, **shape** `(N, classes)`.
        after: logits of the second one.
        labels: the right classes, `(N,)`.
    """
    first, second = before.argmax(1) == labels, after.argmax(1) == labels
    same = before.argmax(1) == after.argmax(1)
    return Paired(len(labels), *(int(n.sum()) for n in (first, second, first & ~second, second & ~first, same)))


def images_to_rank(layers: int) -> int:
    """How many images tell the layers of a network apart: 128, fewer where many layers run them all, at least 32.

    Args:
        layers: how many there are.
    """
    return min(128, max(32, 4096 // layers))


def rank_layers(
    calibration: Calibration, images: np.ndarray, watch: Callable[[int], None] = lambda done: None
) -> list[LayerNoise]:
    """The layers in the order of the noise that each brings, the worst first.

    Args:
        calibration: the float graph and its ranges.
        images: **shape** `(N, C, H, W)`, float32, normalised; each layer runs all of them.
        watch: called with the number of layers done.
    """
    wanted, found = logits(calibration.proto, images), []
    for done, (name, node) in enumerate(calibration.layers.items(), 1):
        found.append(LayerNoise(name, snr(wanted, logits(alone(calibration, node), images))))
        watch(done)
    return sorted(found, key=lambda layer: layer.snr)


def confirm(
    calibration: Calibration,
    names: Sequence[str],
    images: np.ndarray,
    labels: np.ndarray,
    watch: Callable[[int], None] = lambda done: None,
) -> dict[str, Paired]:
    """For each of some layers, the int8 graph with all layers against the one that leaves this layer in float.

    Args:
        calibration: the float graph and its ranges.
        names: of the layers.
        images: validation images, **shape** `(N, C, H, W)`, float32, normalised.
        labels: their classes, `(N,)`.
        watch: called with the number of graphs that have run.
    """
    whole = logits(quantize(calibration), images)
    watch(1)
    found = {}
    for name in names:
        found[name] = paired(whole, logits(quantize(calibration, (name,)), images), labels)
        watch(1 + len(found))
    return found


def alone(calibration: Calibration, name: str) -> Any:
    """The float graph with one layer quantised, computed in float: rounded weights, and rounding before and behind it.

    Args:
        calibration: the float graph and its ranges.
        name: of the layer's node.
    """
    import onnx
    from onnx import numpy_helper

    proto = onnx.ModelProto()
    proto.CopyFrom(calibration.proto)
    graph = proto.graph
    layer = next(node for node in graph.node if node.name == name)
    weight = next(tensor for tensor in graph.initializer if tensor.name == layer.input[1])
    own = f"{layer.input[1]}.rounded"
    graph.initializer.append(numpy_helper.from_array(rounded(numpy_helper.to_array(weight), _axis(layer)), own))
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


def rounded(weight: np.ndarray, axis: int) -> np.ndarray:
    """Weights as their codes stand for them: from -127 to 127 along each output, halves to the even code.

    Args:
        weight: float32.
        axis: of the outputs.
    """
    others = tuple(place for place in range(weight.ndim) if place != axis)
    scale = (np.abs(weight).max(others, keepdims=True).astype(np.float64) / 127).astype(np.float32)
    scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)
    return np.clip(np.rint(weight / scale), -127, 127) * scale


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
