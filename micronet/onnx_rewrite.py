"""ONNX operators that are several operations in one, written out in ONNX's plain ones.

Above all what computes on integers: `QLinearConv` is a convolution between DequantizeLinear and QuantizeLinear. So a
network reads the same in either of the two ways to write a quantised one. A DequantizeLinear without a scale stands for
codes whose scale is not stored: it is the product of others, or applied later.
"""

from collections.abc import Callable

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from micronet.onnx_shapes import STANDARD

# Operator: the plain one, where (numbers, scale, zero point) of each input begin, the bias, where the output's begin.
_QUANTISED = {
    "QGemm": ("Gemm", (0, 3), 6, 7),
    "QLinearAdd": ("Add", (0, 3), None, 6),
    "QLinearAveragePool": ("AveragePool", (0,), None, 3),
    "QLinearConv": ("Conv", (0, 3), 8, 6),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", (0,), None, 3),
    "QLinearLeakyRelu": ("LeakyRelu", (0,), None, 3),
    "QLinearMatMul": ("MatMul", (0, 3), None, 6),
    "QLinearMul": ("Mul", (0, 3), None, 6),
    "QLinearReduceMean": ("ReduceMean", (0,), None, 3),
    "QLinearSigmoid": ("Sigmoid", (0,), None, 3),
    "QLinearSoftmax": ("Softmax", (0,), None, 3),
}
_CHAINS = {
    "ReduceL1": ("Abs", "ReduceSum"),
    "ReduceLogSum": ("ReduceSum", "Log"),
    "ReduceLogSumExp": ("Exp", "ReduceSum", "Log"),
}


class Writer:
    """Writes plain nodes in a node's stead: their names, places and attributes are the node's."""

    def __init__(self, node: NodeProto) -> None:
        self.node, self.nodes = node, []

    def __call__(self, op: str, *inputs: str, out: str | None = None, **attrs: object) -> str:
        """Write one node; give the name of its output."""
        out = out or f"{self.node.output[0]}/{len(self.nodes)}"
        node = helper.make_node(op, inputs, [out], name=self.node.name, **attrs)
        node.metadata_props.extend(self.node.metadata_props)
        self.nodes.append(node)
        return out

    def constant(self, number: float, dtype: type = np.float32) -> str:
        """Write a number of the program's own."""
        return self("Constant", value=numpy_helper.from_array(np.array(number, dtype)))

    def keep(self, *left_out: str) -> None:
        """Give the last node the node's attributes."""
        self.nodes[-1].attribute.extend(a for a in self.node.attribute if a.name not in left_out)


def _quantised(node: NodeProto) -> list[NodeProto]:
    write, inputs = Writer(node), [*node.input, *[""] * 9]
    if node.op_type == "QLinearConcat":
        op, starts, bias, end = "Concat", range(2, len(node.input), 3), None, 0
    else:
        op, starts, bias, end = _QUANTISED[node.op_type]
    read = [write("DequantizeLinear", *inputs[start : start + 3]) for start in starts]
    if bias and inputs[bias]:
        read.append(write("DequantizeLinear", inputs[bias], ""))
    real = write(op, *read, out=None if inputs[end] else node.output[0])
    write.keep("channels_last", "opset")
    if inputs[end]:
        write("QuantizeLinear", real, *inputs[end : end + 2], out=node.output[0])
    return write.nodes


def _integer_product(node: NodeProto) -> list[NodeProto]:
    write, zeros = Writer(node), [*node.input[2:], "", ""]
    read = [write("DequantizeLinear", name, "", zero) for name, zero in zip(node.input[:2], zeros, strict=False)]
    write("Conv" if node.op_type == "ConvInteger" else "MatMul", *read, out=node.output[0])
    write.keep()
    return write.nodes


def _dynamic_quantise(node: NodeProto) -> list[NodeProto]:
    write, (x,), (codes, scale, zero) = Writer(node), node.input, node.output
    low = write("ReduceMin", x, keepdims=0)
    span = write("Sub", write("ReduceMax", x, keepdims=0), low)
    write("Div", span, write.constant(255), out=scale)
    whole = write("Round", write("Neg", write("Div", low, scale)))
    write("Cast", whole, out=zero, to=TensorProto.UINT8)
    write("QuantizeLinear", x, scale, zero, out=codes)
    return write.nodes


def _in_pairs(node: NodeProto) -> list[NodeProto]:
    """Sum, Max, Min and Mean of any number of tensors."""
    write, (total, *rest) = Writer(node), node.input
    op = {"Sum": "Add", "Mean": "Add"}.get(node.op_type, node.op_type)
    mean = node.op_type == "Mean" and bool(rest)
    for index, name in enumerate(rest):
        total = write(op, total, name, out=None if mean or index < len(rest) - 1 else node.output[0])
    if mean:
        write("Mul", total, write.constant(1 / len(node.input)), out=node.output[0])
    elif not rest:
        write("Identity", total, out=node.output[0])
    return write.nodes


def _chain(node: NodeProto) -> list[NodeProto]:
    write, value, ops = Writer(node), node.input[0], _CHAINS[node.op_type]
    for op in ops:
        more = node.input[1:] if op == "ReduceSum" else ()
        value = write(op, value, *more, out=node.output[0] if op == ops[-1] else None)
        if op == "ReduceSum":
            write.keep()
    return write.nodes


def _sum_of_squares(node: NodeProto) -> list[NodeProto]:
    write = Writer(node)
    write("ReduceSum", write("Mul", node.input[0], node.input[0]), *node.input[1:], out=node.output[0])
    write.keep()
    return write.nodes


def _local_response(node: NodeProto) -> list[NodeProto]:
    """Local response normalisation: x / (bias + alpha * mean of the squares of `size` channels) ** beta."""
    said = {"alpha": 1e-4, "beta": 0.75, "bias": 1.0}
    said |= {a.name: helper.get_attribute_value(a) for a in node.attribute}
    write, (x,), size = Writer(node), node.input, said["size"]
    # A pool goes over the last two axes, so the channels go there.
    maps = write("Transpose", write("Mul", x, x), perm=(0, 2, 1, 3))
    mean = write("AveragePool", maps, kernel_shape=(size, 1), pads=((size - 1) // 2, 0, size // 2, 0))
    mean = write("Transpose", mean, perm=(0, 2, 1, 3))
    sum_ = write("Add", write("Mul", mean, write.constant(said["alpha"])), write.constant(said["bias"]))
    write("Div", x, write("Pow", sum_, write.constant(said["beta"])), out=node.output[0])
    return write.nodes


def _renamed(node: NodeProto) -> list[NodeProto]:
    write = Writer(node)
    write(node.op_type, *node.input, out=node.output[0])
    write.keep()
    return write.nodes


# What onnxruntime took over from ONNX, or ONNX from it.
_SAME = ("Gelu", "QuantizeLinear", "DequantizeLinear")
_REWRITES: dict[str, Callable[[NodeProto], list[NodeProto]]] = {
    **dict.fromkeys((*_QUANTISED, "QLinearConcat"), _quantised),
    **dict.fromkeys(("ConvInteger", "MatMulInteger"), _integer_product),
    **dict.fromkeys(("Sum", "Mean", "Max", "Min"), _in_pairs),
    **dict.fromkeys(_CHAINS, _chain),
    "DynamicQuantizeLinear": _dynamic_quantise,
    "LRN": _local_response,
    "ReduceSumSquare": _sum_of_squares,
}


def rewrite(node: NodeProto) -> list[NodeProto]:
    """Write a node out in plain ones; itself alone where it is plain, or unknown.

    Args:
        node: the node.
    """
    plain = len(node.input) == 2 and node.op_type in ("Sum", "Max", "Min")
    turned = any(a.name == "channels_last" and a.i for a in node.attribute)  # no plain operator has channels last
    if node.domain == "com.microsoft" and node.op_type in _SAME:
        return _renamed(node)
    if node.domain not in (*STANDARD, "com.microsoft") or node.op_type not in _REWRITES or plain or turned:
        return [node]
    return _REWRITES[node.op_type](node)
