"""A quantised ONNX graph made ready for onnxruntime's integer kernels: what lies between its layers in 8 bits, too.

What: onnxruntime runs a layer on integers where input, weights, bias and output are all codes. A layer's input
and weights are, in a network from `quant_onnx.py`. `integer_kernels` brings biases to whole units of the products, and
puts a quantiser of 8 bits behind every layer whose output is not quantised right away, as before a residual sum, and
behind the sums; their ranges are measured on images. What a concatenation puts in front of a BatchNorm stays as it is,
so that those layers of a DenseNet are computed in float. Signed codes of inputs are moved by 128: kernels multiply
unsigned with signed ones.
When: after `export_onnx` of a quantised network, for speed on a CPU.
Cost: one run of the images. The 8 bits between layers are new roundings: compare the answers.
Interactions: none with 4-bit files (`int4`), whose convolutions are computed in float.
Source: onnxruntime's documentation, "Quantize ONNX Models", QDQ format.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from callbacks.onnx_export import drop_unread
from callbacks.onnx_run import open_session

LAYERS = ("Conv", "Gemm", "MatMul")
ACTIVATIONS = ("Relu", "Clip")  # a runtime leaves them out where the codes' range does the same
SUMS = ("Add",)
PACKED = "MatMulNBits"  # has codes of 4 bits for weights, and real numbers for all else
BATCH = 64
MOST_UNITS = 2**30  # of a bias: half of what 32 bits hold leaves as much to the sum of products


class _Graph:
    """The nodes of a graph by what they give and what they read."""

    def __init__(self, proto: Any) -> None:
        from onnx import numpy_helper

        self.proto, self.graph = proto, proto.graph
        self.arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.graph.initializer}
        for node in self.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.arrays[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        self.makers = {name: node for node in self.graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.results = {value.name for value in self.graph.output}
        self.added = 0

    def is_real(self, name: str) -> bool:
        """Whether a tensor is codes made real."""
        return name in self.makers and self.makers[name].op_type == "DequantizeLinear"

    def layers(self) -> list[Any]:
        """The layers whose inputs are codes."""
        nodes = [node for node in self.graph.node if node.op_type in LAYERS]
        return [node for node in nodes if all(map(self.is_real, node.input[:2]))]

    def enter(self, array: np.ndarray, name: str) -> str:
        """Store an array under a name of its own."""
        from onnx import numpy_helper

        while name in self.arrays or name in self.makers:
            self.added += 1
            name = f"{name.partition('#')[0]}#{self.added}"
        self.arrays[name] = array
        self.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def behind(self, node: Any) -> str:
        """What a node gives, after an activation that alone reads it."""
        (name,) = node.output
        readers = self.readers.get(name, [])
        if name not in self.results and len(readers) == 1 and readers[0].op_type in ACTIVATIONS:
            return readers[0].output[0]
        return name

    def is_told_apart(self, name: str) -> bool:
        """Whether a tensor is put beside others for a BatchNorm, which tells apart what 8 bits for all would round off.

        DenseNet-121 on digits, hardly trained: logits correlate by 0.36 with those before where these are quantised.
        """
        beside = [node.output[0] for node in self.readers.get(name, []) if node.op_type == "Concat"]
        return any(node.op_type == "BatchNormalization" for one in beside for node in self.readers.get(one, []))

    def needs(self, name: str) -> bool:
        """Whether a tensor is not made codes right away, by one reader alone."""
        readers = self.readers.get(name, [])
        alone = len(readers) == 1 and readers[0].op_type == "QuantizeLinear"
        return bool(readers) and name not in self.results and not alone


def integer_kernels(proto: Any, images: Any) -> Any:
    """Quantise what lies between a quantised graph's layers.

    Args:
        proto: an `onnx.ModelProto` as `export_onnx` gives it for a quantised network; it stays as it is.
        images: training images as the network sees them, `(N, C, H, W)` float32: a tensor or an array.

    Returns:
        Another `onnx.ModelProto`.

    Raises:
        ValueError: no layer of the graph computes on codes.
    """
    import onnx

    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    _cut_codes(_Graph(changed))
    graph = _Graph(changed)
    layers = graph.layers()
    if not layers and not any(node.op_type == PACKED for node in changed.graph.node):
        raise ValueError("no layer of the graph computes on codes: export a quantised network")
    between = _between(graph, layers)
    ranges = measure(proto, between, np.asarray(images, dtype=np.float32))
    for layer in layers:
        _whole_bias(graph, layer)
        _zero_points(graph, layer)
    _unsign(graph)
    for name in between:
        _quantise(graph, name, *ranges[name])
    _sort(changed.graph)
    return changed


def _cut_codes(graph: _Graph) -> None:
    """Let a Clip in front of a quantiser, as of ReLU6, cut the codes instead: the same, as rounding keeps the order.

    onnxruntime leaves it in float otherwise, and the layer before it, too, where codes reach further than it.
    """
    from onnx import helper

    for clip in [node for node in graph.graph.node if node.op_type == "Clip"]:
        (name,), ends = clip.output, [*clip.input[1:], "", ""][:2]
        readers = graph.readers.get(name, [])
        alone = len(readers) == 1 and readers[0].op_type == "QuantizeLinear" and name not in graph.results
        if not alone or any(end and end not in graph.arrays for end in ends):
            continue
        rounds = readers[0]
        (codes,), step = rounds.output, graph.arrays[rounds.input[1]]
        kind = graph.arrays[rounds.input[2]].dtype  # zero points are 0 here
        whole = np.iinfo(kind).min, np.iinfo(kind).max
        after = graph.readers[codes]
        cut = after[0] if len(after) == 1 and after[0].op_type == "Clip" else None
        low, high = whole if cut is None else (int(graph.arrays[end]) for end in cut.input[1:])
        low = max(low, int(np.rint(graph.arrays[ends[0]] / step))) if ends[0] else low
        high = min(high, int(np.rint(graph.arrays[ends[1]] / step))) if ends[1] else high
        rounds.input[0] = clip.input[0]
        graph.graph.node.remove(clip)
        if cut is None and (low, high) == whole:
            continue
        kept = [graph.enter(np.array(end, kind), f"{codes}/end") for end in (low, high)]
        if cut is not None:
            cut.input[1:] = kept
            continue
        for reader in after:
            reader.input[:] = [f"{codes}/cut" if given == codes else given for given in reader.input]
        graph.graph.node.append(helper.make_node("Clip", [codes, *kept], [f"{codes}/cut"]))


def _between(graph: _Graph, layers: Sequence[Any]) -> list[str]:
    """The tensors that get a quantiser: behind layers, and behind sums of what is codes by then."""
    found = [name for name in map(graph.behind, layers) if graph.needs(name) and not graph.is_told_apart(name)]
    coded = set(found)
    for node in graph.graph.node:  # in the order in which they run
        if node.op_type in SUMS and all(name in coded or graph.is_real(name) for name in node.input):
            name = graph.behind(node)
            if graph.needs(name):
                found.append(name)
                coded.add(name)
    return list(dict.fromkeys(found))


def measure(proto: Any, names: Iterable[str], images: np.ndarray) -> dict[str, tuple[float, float]]:
    """The least and the largest number of some tensors of a graph, over images; 0 is always within.

    Args:
        proto: an `onnx.ModelProto`; it stays as it is.
        names: of the tensors.
        images: `(N, C, H, W)`.
    """
    import onnx

    names, shown = list(names), onnx.ModelProto()
    shown.CopyFrom(proto)
    shown.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    run = open_session(shown, plain=True)  # kernels that the runtime would choose round otherwise
    ranges = dict.fromkeys(names, (0.0, 0.0))
    for start in range(0, len(images), BATCH):
        given = run(images[start : start + BATCH])
        for name, value in zip(names, given[len(given) - len(names) :], strict=True):
            low, high = ranges[name]
            ranges[name] = min(low, float(value.min())), max(high, float(value.max()))
    return ranges


def _whole_bias(graph: _Graph, layer: Any) -> None:
    """Bring a layer's bias to whole units of its products: input's step times weights'."""
    from onnx import helper

    if len(layer.input) < 3 or layer.input[2] not in graph.arrays:
        return
    x, weight = (graph.makers[name] for name in layer.input[:2])
    bias = graph.arrays[layer.input[2]]
    step = graph.arrays[x.input[1]]
    _coarser(graph, weight, np.abs(bias) / (MOST_UNITS * np.float64(step)))
    unit = (step * graph.arrays[weight.input[1]]).astype(np.float32)
    whole = np.rint(bias.astype(np.float64) / unit).astype(np.int32)
    codes = graph.enter(whole, f"{layer.input[2]}_codes")
    scale = graph.enter(np.broadcast_to(unit, bias.shape).copy(), f"{layer.input[2]}_scale")
    real = f"{codes}/real"
    graph.graph.node.append(helper.make_node("DequantizeLinear", [codes, scale], [real], axis=0))
    layer.input[2] = real


def _coarser(graph: _Graph, weight: Any, least: np.ndarray) -> None:
    """Give outputs larger steps where theirs are too small for their bias: 32 bits would cut it off.

    So it is where a BatchNorm's factor is next to nothing: the weights are, too, beside such a bias, and may be 0.
    """
    codes, steps = (graph.arrays[name] for name in weight.input[:2])
    if not (least > steps).any() or steps.ndim != 1:
        return
    axis = next((a.i for a in weight.attribute if a.name == "axis"), 1)
    shape = [-1 if place == axis else 1 for place in range(codes.ndim)]
    larger = np.maximum(steps, least).astype(np.float32)
    coarse = np.rint(codes * (steps / larger).reshape(shape)).astype(codes.dtype)
    weight.input[0], weight.input[1] = graph.enter(coarse, weight.input[0]), graph.enter(larger, weight.input[1])


def _zero_points(graph: _Graph, layer: Any) -> None:
    """Give a linear layer's weights zero points of 0: without, onnxruntime makes them real whenever it runs."""
    weight = graph.makers[layer.input[1]]
    if layer.op_type == "Gemm" and len(weight.input) == 2 and weight.input[0] in graph.arrays:
        zeros = np.zeros_like(graph.arrays[weight.input[1]], dtype=np.int8)
        weight.input.append(graph.enter(zeros, f"{weight.input[0]}_zero_point"))


def _unsign(graph: _Graph) -> None:
    """Move signed codes of inputs by 128."""
    zero: str | None = None
    for node in graph.graph.node:
        if node.op_type != "QuantizeLinear" or graph.arrays[node.input[2]].dtype != np.int8:
            continue
        zero = zero or graph.enter(np.array(128, np.uint8), "zero_point")
        node.input[2] = zero
        for reader in graph.readers[node.output[0]]:
            if reader.op_type == "Clip":
                for place in (1, 2):
                    end = graph.arrays[reader.input[place]].astype(np.int16) + 128
                    reader.input[place] = graph.enter(end.astype(np.uint8), reader.input[place])
                for last in graph.readers[reader.output[0]]:
                    last.input[2] = zero
            else:
                reader.input[2] = zero


def _quantise(graph: _Graph, name: str, low: float, high: float) -> None:
    """Put a quantiser of 8 bits behind a tensor, for all its readers."""
    from onnx import helper

    scale = np.float32((high - low) / 255 or 1.0)
    scale_name = graph.enter(np.array(scale, np.float32), f"{name}_scale")
    zero = graph.enter(np.array(np.rint(-low / scale), np.uint8), f"{name}_zero_point")
    codes, real = f"{name}/codes", f"{name}/real"
    for node in graph.readers[name]:
        node.input[:] = [real if given == name else given for given in node.input]
    graph.graph.node.append(helper.make_node("QuantizeLinear", [name, scale_name, zero], [codes]))
    graph.graph.node.append(helper.make_node("DequantizeLinear", [codes, scale_name, zero], [real]))


def _sort(graph: Any) -> None:
    """Bring nodes to an order in which each comes after what it reads; drop arrays that nothing reads."""
    known = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input} | {""}
    waiting, sorted_ = list(graph.node), []
    while waiting:
        late = []
        for node in waiting:
            if known.issuperset(node.input):
                known.update(node.output)
                sorted_.append(node)
            else:
                late.append(node)
        waiting = late
    del graph.node[:]
    graph.node.extend(sorted_)
    drop_unread(graph)
