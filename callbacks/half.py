"""An ONNX graph whose weights are stored in 16 bits, and one that computes in 16 bits, too.

`stored_half` keeps every operation in float32: a Cast behind each weight makes float32 of it when a runtime loads the
file, so that it is as fast as before, and as large in memory. `computed_half` puts a Cast behind the input and one in
front of the output, and has everything between in float16: for runtimes with kernels for it. onnxruntime has none on a
CPU of x86: it computes such a graph in float32, with the same error as the other, and 7 to 13 % slower than that
(ResNet-20, WRN-16-2). `computes_half` says what it does on this machine.
Source: the ONNX specification; float16 has 11 bits of mantissa, numbers up to 65504, and steps of 6e-8 near zero.
"""

from typing import Any

import numpy as np

from callbacks.onnx_export import stripped
from callbacks.onnx_run import rewritten

LARGEST = 65504.0


class HalfError(ValueError):
    """A graph whose numbers float16 can't hold."""


def stored_half(proto: Any) -> Any:
    """A copy of a graph whose float32 weights are stored in float16.

    Args:
        proto: an `onnx.ModelProto`.

    Raises:
        HalfError: a weight is beyond float16.
    """
    import onnx
    from onnx import TensorProto, helper

    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    casts = []
    for tensor in copied.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            name = tensor.name
            _halve(tensor)
            tensor.name = f"{name}.half"
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *copied.graph.node]
    del copied.graph.node[:]
    copied.graph.node.extend(nodes)
    return stripped(copied)


def computed_half(proto: Any) -> Any:
    """A copy of a graph that computes in float16; it takes and gives float32.

    Args:
        proto: an `onnx.ModelProto` with one input and one output, both float32.

    Raises:
        HalfError: a weight is beyond float16.
    """
    import onnx
    from onnx import TensorProto, helper

    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    graph = copied.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            _halve(tensor)
    (given,), (result,) = graph.input, graph.output
    inside = {given.name: f"{given.name}.half", result.name: f"{result.name}.half"}
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = inside.get(name, name)
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
            elif attribute.t.data_type == TensorProto.FLOAT:
                _halve(attribute.t)
    graph.node.insert(0, helper.make_node("Cast", [given.name], [inside[given.name]], to=TensorProto.FLOAT16))
    graph.node.append(helper.make_node("Cast", [inside[result.name]], [result.name], to=TensorProto.FLOAT))
    return stripped(copied)


def _halve(tensor: Any) -> None:
    from onnx import numpy_helper

    value = numpy_helper.to_array(tensor)
    if value.size and not float(np.abs(value).max()) <= LARGEST:
        raise HalfError(f"{tensor.name} holds a number that float16 can't: its largest is {LARGEST:g}")
    tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float16), tensor.name))


def computes_half(proto: Any) -> bool:
    """Whether onnxruntime, once it has rewritten a graph for this CPU, has layers left whose weights are in float16.

    Args:
        proto: an `onnx.ModelProto`, as `computed_half` gives it.
    """
    from onnx import TensorProto

    graph = rewritten(proto, weights_as_they_are=True)
    half = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    # A weight that is read by a Cast alone is computed with in float32.
    return any(name in half for node in graph.node if node.op_type != "Cast" for name in node.input)
