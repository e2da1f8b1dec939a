"""A float ONNX graph as one that computes on 8-bit codes, by onnxruntime's own quantiser.

`calibrated` (`calibrate_onnx.py`) makes a `Calibration`, a graph with the range of each of its tensors; `quantize`
makes the int8 graph, as often as asked, without running an image again. Weights get codes from -127 to 127 with a scale
for each output, or from -64 to 64 for processors whose sums are short (`processor.py`); a zero stays the code 0.
Tensors get codes from 0 to 255. The last layer gives its logits as float.

A BatchNorm that could not be folded stands in front of its convolution, and reads what several layers have summed up or
put side by side. That stream stays in float, from layer to layer, and so does the BatchNorm; only what goes into a
layer, and what comes out of one, is codes. `quantize.py` has the numbers that this was chosen by.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

from callbacks.onnx_export import drop_unread, stripped

Range = tuple[float, float]
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MOST_CODE, REDUCED_CODE = 127, 64  # of a weight; the latter is what onnxruntime's quantiser has for `reduce_range`
NEAR = 3  # names that a message gives
# What a stream in front of a BatchNorm can have passed: none of it calculates with weights.
_STREAM = ("Add", "Sum", "Mul", "Concat", "BatchNormalization", "Relu", "AveragePool", "MaxPool", "Identity")


class QuantizeError(ValueError):
    """A graph that can't be quantised, or a layer that it does not have."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """A float graph and what its tensors hold.

    Args:
        proto: an `onnx.ModelProto`, as `prepared` gives it.
        ranges: the least and the largest number of each float tensor that depends on the image, by name.
        method: how they were found.
        images: on how many images.
    """

    proto: Any
    ranges: Mapping[str, Range]
    method: str
    images: int

    @property
    def layers(self) -> dict[str, str]:
        """The layers that are quantised, named as in the network, with the name of each one's node."""
        return layers_of(self.proto)


def prepared(proto: Any) -> Any:
    """A copy of a graph in which every node has a name, and constant factors are taken into the layers before them.

    Args:
        proto: an `onnx.ModelProto` in float32.

    Raises:
        QuantizeError: it holds codes already, or has no layer with weights.
    """
    import onnx

    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear", "QLinearConv") for node in proto.graph.node):
        raise QuantizeError("it is quantised already")
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    for index, node in enumerate(copied.graph.node):
        node.name = f"n{index}"
    _fold_factors(copied.graph)
    if not layers_of(copied):
        raise QuantizeError("it has no convolution or linear layer to quantise")
    return copied


def _fold_factors(graph: Any) -> None:
    """Take a constant factor behind a convolution that only it reads into the weights, as the ledger does."""
    from onnx import numpy_helper

    held = {tensor.name: tensor for tensor in graph.initializer}
    readers, made = _readers(graph), {node.output[0]: node for node in graph.node}
    for node in [node for node in graph.node if node.op_type == "Mul"]:
        factor = next((name for name in node.input if name in held), None)
        layer = next((made[name] for name in node.input if name in made), None)
        if factor is None or layer is None or layer.op_type != "Conv":
            continue
        number = numpy_helper.to_array(held[factor])
        alone = number.size == 1 and len(readers[layer.output[0]]) == 1
        if not alone or any(name not in held or len(readers[name]) > 1 for name in layer.input[1:]):
            continue
        for name in layer.input[1:]:
            scaled = numpy_helper.to_array(held[name]).astype(np.float64) * float(number.reshape(()))
            held[name].CopyFrom(numpy_helper.from_array(scaled.astype(np.float32), name))
        layer.output[0] = node.output[0]
        graph.node.remove(node)
    drop_unread(graph)


def _readers(graph: Any) -> dict[str, list[Any]]:
    """The nodes that read each tensor; a result of the graph's is read by None, too."""
    found: dict[str, list[Any]] = {value.name: [None] for value in graph.output}
    for node in graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def layers_of(proto: Any) -> dict[str, str]:
    """The layers of a graph whose weights are constants: the network's own names, and those of the nodes.

    Args:
        proto: an `onnx.ModelProto` in which every node has a name.
    """
    held = {tensor.name for tensor in proto.graph.initializer}
    found: dict[str, str] = {}
    for node in proto.graph.node:
        if node.op_type in LAYERS and node.input[1] in held:
            name = node.input[1].removesuffix(".weight")
            uses = sum(key.partition("#")[0] == name for key in found)
            found[f"{name}#{uses + 1}" if uses else name] = node.name
    return found


def float_nodes(graph: Any) -> set[str]:
    """Names of the nodes that stay in float: each BatchNorm, and the stream that it reads, back to the layers.

    Args:
        graph: an ONNX graph in which every node has a name.
    """
    made = {name: node for node in graph.node for name in node.output}
    found: set[str] = set()
    ahead = [node for node in graph.node if node.op_type == "BatchNormalization"]
    while ahead:
        node = ahead.pop()
        if node.name not in found and node.op_type in _STREAM:
            found.add(node.name)
            ahead += [made[name] for name in node.input if name in made]
    return found


def require_layers(proto: Any, keep_float: Sequence[str]) -> None:
    """Refuse names that are no layers' before anything is calibrated for them.

    Args:
        proto: an `onnx.ModelProto` in float32; its nodes need no names.
        keep_float: layers that are to stay in float, named as in the network.

    Raises:
        QuantizeError: there is no layer of such a name, or none is left.
    """
    layers = layers_of(proto)
    for name in keep_float:
        if name not in layers:
            near = get_close_matches(name, layers, NEAR)
            told = f"near it: {', '.join(near)}" if near else f"there are {', '.join(list(layers)[:NEAR])}"
            raise QuantizeError(f"keep_float: no layer {name!r}; {told} ({len(layers)} in all)")
    if len(set(keep_float)) == len(layers):
        raise QuantizeError("keep_float: no layer is left to quantise")


def quantize(calibration: Calibration, keep_float: Sequence[str] = (), *, reduce_range: bool = False) -> Any:
    """Make the int8 graph.

    Args:
        calibration: the float graph and its ranges.
        keep_float: layers whose weights and sums stay in float, named as in the network.
        reduce_range: whether weights get codes from -64 to 64, so that no sum of two products is beyond 16 bits.

    Returns:
        An `onnx.ModelProto` with inputs and outputs as before, stripped.

    Raises:
        QuantizeError: there is no layer of such a name, or none is left.
    """
    require_layers(calibration.proto, keep_float)
    layers = calibration.layers
    kept = {layers[name] for name in keep_float} | float_nodes(calibration.proto.graph)
    with _quiet():
        quantised = _qdq(calibration, kept, reduce_range)
    _tidy(quantised.graph)
    return stripped(quantised)


def _qdq(calibration: Calibration, kept: set[str], reduce_range: bool) -> Any:
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import TensorData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    proto = onnx.shape_inference.infer_shapes(calibration.proto)
    # Says that shapes are known: the quantiser would write and read files to find them itself.
    proto.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")
    quantizer = QDQQuantizer(
        proto,
        per_channel=True,
        reduce_range=reduce_range,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range={
            name: TensorData(lowest=np.float32(low), highest=np.float32(high))
            for name, (low, high) in calibration.ranges.items()
        },
        nodes_to_quantize=[],
        nodes_to_exclude=sorted(kept),
        op_types_to_quantize=sorted({*QDQRegistry, *QLinearOpsRegistry} - {"BatchNormalization"}),
        # The kernels of linear layers give float for the same time: 8 bits of a logit would make ties.
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()  # it puts what it makes at the end, which onnx's checker refuses
    return quantizer.model.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep onnxruntime's quantiser from writing to the root logger, and so from setting one up."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _tidy(graph: Any) -> None:
    """Take away what the file needs not say: zero points that are zero, names of nodes and of what lies between."""
    from onnx import numpy_helper

    held = {tensor.name: tensor for tensor in graph.initializer}
    # onnxruntime has a kernel for a linear layer on codes only where the zero points are written out.
    convolved = {name for node in graph.node if node.op_type == "Conv" for name in node.input}
    for node in graph.node:
        held_codes = node.op_type == "DequantizeLinear" and node.input[0] in held and len(node.input) > 2
        if held_codes and node.output[0] in convolved and not numpy_helper.to_array(held[node.input[2]]).any():
            del node.input[2]
    drop_unread(graph)
    told = {value.name for value in [*graph.input, *graph.output]} | set(held)
    short: dict[str, str] = {}
    for node in graph.node:
        node.name = ""
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name and name not in told:
                    names[place] = short.setdefault(name, f"t{len(short)}")
