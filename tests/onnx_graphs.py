"""ONNX graphs made by hand, for the tests of their reader."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

F = TensorProto.FLOAT
MS = "com.microsoft"


def node(op, inputs, output="y", **attrs):
    return helper.make_node(op, inputs.split(), output.split(), **attrs)


def save(path, nodes, shape=("N", 3, 8, 8), opset=18, inputs=None, kind=F, functions=(), **arrays):
    """Write a graph from `x` to `y`; `arrays` are its constants."""
    given = inputs or {"x": shape}
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info(name, kind, size) for name, size in given.items()],
        [helper.make_tensor_value_info("y", F, None)],
        [a if isinstance(a, TensorProto) else numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MS, 1), helper.make_opsetid("own", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10), path)
    return path


def ones(*shape):
    return np.ones(shape, np.float32)


def random(*shape):
    return np.random.default_rng(0).uniform(0.1, 1, shape).astype(np.float32)


def live(graph):
    """What runs on the image."""
    return [n for n in graph.nodes if not all(value.fixed for value in n.inputs if value is not None)]


def ops(graph):
    return [n.op for n in live(graph)]


# A batch flattened by the arithmetic on shapes that exporters write.
FLATTENED = (
    node("Shape", "x", "s"),
    node("Gather", "s zero", "n", axis=0),
    node("Unsqueeze", "n axis", "n1"),
    node("Concat", "n1 rest", "to", axis=0),
    node("Reshape", "x to"),
)
