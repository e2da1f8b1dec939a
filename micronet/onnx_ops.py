"""ONNX's operators in the ledger's vocabulary (`callbacks/op_formulas.py`): which they are, what they read and need.

`RULES` maps an operator of ONNX's own domain to a function that takes a `Call` and gives the operation, the tensors it
reads in the order that its formula states, and the attributes that the formula needs. What is not in the table keeps
its name, in lower case, and has no known cost.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from callbacks.graph import Node, Shape, Value
from micronet.onnx_shapes import Shapes

Read = tuple[str, list[str], dict[str, Any]]


@dataclass(frozen=True)
class Call:
    """One node, with what is known of its tensors.

    Args:
        node: the node.
        shapes: shapes and small constants.
        values: the values entered so far.
        makers: by a value's `id`, the operation that gave it.
    """

    node: NodeProto
    shapes: Shapes
    values: Mapping[str, Value]
    makers: Mapping[int, Node]

    @cached_property
    def attrs(self) -> dict[str, Any]:
        """The attributes that are given."""
        return {a.name: helper.get_attribute_value(a) for a in self.node.attribute}

    @property
    def out(self) -> Shape:
        """Shape of the first output."""
        return self.shapes.shape(self.node.output[0])

    def text(self, attr: str, default: str) -> str:
        """An attribute that is a word."""
        return self.attrs.get(attr, default.encode()).decode()

    def name(self, index: int) -> str:
        """Name of an input; empty where it isn't given."""
        return self.node.input[index] if index < len(self.node.input) else ""

    def names(self, *indices: int) -> list[str]:
        """Names of some inputs; of all without `indices`."""
        return [self.name(i) for i in indices] if indices else list(self.node.input)

    def shape(self, index: int) -> Shape:
        """Shape of an input."""
        return self.shapes.shape(self.name(index))

    def fixed(self, index: int) -> bool:
        """Whether an input is constant."""
        return self.values[self.name(index)].fixed

    def array(self, index: int) -> np.ndarray | None:
        """A constant input, where it is small."""
        return self.shapes.arrays.get(self.name(index))

    def axes(self) -> set[int]:
        """The axes that are reduced, given by an attribute or by an input; all where none are."""
        said = self.attrs.get("axes", self.array(1) if self.name(1) else None)
        count = len(self.shape(0))
        if said is None or not len(said):
            return set() if self.attrs.get("noop_with_empty_axes") else set(range(count))
        return {int(axis) % count for axis in said}


def _all(op: str) -> Callable[[Call], Read]:
    return lambda call: (op, call.names(), {})


def _first(op: str, *more: int) -> Callable[[Call], Read]:
    return lambda call: (op, call.names(0, *more), {})


def _conv(call: Call) -> Read:
    op = "conv2d" if call.node.op_type == "Conv" else "conv_transpose2d"
    return op, call.names(0, 1, 2), {"groups": call.attrs.get("group", 1)}


def _product(call: Call) -> Read:
    """A matrix product is a linear layer where exactly one factor is constant."""
    a, b = call.fixed(0), call.fixed(1)
    taps = call.shape(0)[-2 if call.attrs.get("transA") else -1]
    rest = [call.name(2)] if call.name(2) else []
    if a == b:
        return "addmm" if rest else "matmul", [*call.names(0, 1), *rest], {"taps": taps}
    axis = len(call.out) - (2 if a else 1)
    return "linear", [*(call.names(1, 0) if a else call.names(0, 1)), *rest], {"taps": taps, "channel_axis": axis}


def _einsum(call: Call) -> Read:
    sources, arrow, result = call.text("equation", "").replace(" ", "").partition("->")
    if len(call.node.input) != 2 or "." in sources or not arrow:
        return "einsum_of_many", call.names(), {}
    sizes = {}
    for index, letters in enumerate(sources.split(",")):
        sizes |= dict(zip(letters, call.shape(index), strict=True))
    taps = math.prod(size for letter, size in sizes.items() if letter not in result)
    a, b = call.fixed(0), call.fixed(1)
    if a == b:
        return "einsum", call.names(), {"taps": taps}
    return "linear", call.names(1, 0) if a else call.names(0, 1), {"taps": taps, "channel_axis": None}


def _instance_norm(call: Call) -> Read:
    # Exporters write group normalisation as this one without scale and shift, which the operator doesn't know: as 1, 0.
    x, scale, shift = call.names(0, 1, 2)
    one, zero = call.array(1), call.array(2)
    if one is not None and zero is not None and (one == 1).all() and (zero == 0).all():
        scale = shift = ""
    return "layer_norm", [x, scale, shift], {"size": math.prod(call.out[2:])}


def _batch_norm(call: Call) -> Read:
    """One in training mode takes the mean and variance of the images at hand, as an instance normalisation does."""
    more = [name for name in call.node.output[1:] if name]
    if call.attrs.get("training_mode", call.shapes.opset < 14 and bool(more)):  # before 14, its outputs said so
        shape = call.shape(0)
        return "layer_norm", call.names(0, 1, 2), {"size": math.prod(shape) // shape[1]}
    return "batch_norm", call.names(0, 1, 2, 3, 4), {}


def _group_norm(call: Call) -> Read:
    return "layer_norm", call.names(0, 1, 2), {"size": math.prod(call.out[1:]) // call.attrs["num_groups"]}


def _layer_norm(call: Call) -> Read:
    op = "rms_norm" if call.node.op_type == "RMSNormalization" else "layer_norm"
    return op, call.names(0, 1, 2), {"size": math.prod(call.shape(0)[call.attrs.get("axis", -1) :])}


def _softmax(call: Call) -> Read:
    op = "softmax" if call.node.op_type == "Softmax" else "log_softmax"
    if call.shapes.opset < 13:  # of all axes from this one on, taken together
        return op, call.names(0), {"size": math.prod(call.out[call.attrs.get("axis", 1) :])}
    return op, call.names(0), {"size": call.out[call.attrs.get("axis", -1)]}


def _pool(call: Call) -> Read:
    before, after = call.shape(0)[2:], call.out[2:]
    window = before if call.node.op_type.startswith("Global") else tuple(call.attrs["kernel_shape"])
    whole = window == before and math.prod(after) == 1
    op = "max_pool" if "Max" in call.node.op_type else "global_avg_pool" if whole else "avg_pool"
    return op, call.names(0), {"terms": math.prod(window) * math.prod(call.out)}


def _mean(call: Call) -> Read:
    """A global average pool where it averages the two axes of every map, or the one they were flattened to."""
    shape, axes = call.shape(0), call.axes()
    maker = call.makers.get(id(call.values[call.name(0)]))
    before = maker.inputs[0].shape if maker is not None and maker.op == "reshape" else ()
    flattened = len(shape) == 3 and axes == {2} and len(before) == 4 and before[:2] == shape[:2]
    if flattened or (len(shape) == 4 and axes in ({2, 3}, {1, 2})):
        return "global_avg_pool", call.names(0), {"terms": math.prod(shape)}
    return ("mean" if axes else "identity"), call.names(0), {}


def _clip(call: Call) -> Read:
    ends = []
    for index, attr in ((1, "min"), (2, "max")):
        if call.name(index) or attr in call.attrs:
            known = call.array(index) if call.name(index) else np.array(call.attrs[attr])
            ends.append(float(known.flat[0]) if known is not None and known.size else None)
    return ("relu6", call.names(0), {}) if ends == [0, 6] else ("clamp", call.names(0), {"bounds": len(ends)})


def _div(call: Call) -> Read:
    """Whole numbers are divided without their remainders, so that no layer takes such a division in."""
    return "div" if call.shapes.kind(call.name(0)) in _REALS else "floor_div", call.names(), {}


def _power(call: Call) -> Read:
    exponent = call.array(1)
    if exponent is None or not exponent.size or not (exponent == exponent.flat[0]).all():
        return "pow", call.names(0, 1), {}
    return "pow", call.names(0), {"exponent": float(exponent.flat[0])}


def _resize(call: Call) -> Read:
    mode, axes = call.text("mode", "nearest"), len(call.out) - 2
    if mode == "nearest":
        return "move", call.names(0), {}
    return "interpolate", call.names(0), {"taps": (4 if mode == "cubic" else 2) ** axes}


def _cast(call: Call) -> Read:
    kinds = [call.shapes.kind(name) for name in (call.name(0), call.node.output[0])]
    return "identity" if all(kind in _REALS for kind in kinds) else "move", call.names(0), {}


def _permute(call: Call) -> Read:
    perm = call.attrs.get("perm") or range(len(call.out))[::-1]
    return "permute", call.names(0), {"perm": tuple(perm)}


def _expand(call: Call) -> Read:
    return "reshape" if math.prod(call.out) == math.prod(call.shape(0)) else "move", call.names(0), {}


def _gather(call: Call) -> Read:
    places, axis = call.array(1), call.attrs.get("axis", 0)
    if places is not None and np.array_equal(places.ravel(), np.arange(call.shape(0)[axis])):
        return "reshape", call.names(0), {}  # all of them in order, as torch's exporter writes some views
    return "move", call.names(0, 1), {}


def _gelu(call: Call) -> Read:
    return "gelu" if call.text("approximate", "none") == "none" else "gelu_tanh", call.names(0), {}


def _attention(call: Call) -> Read:
    if len(call.out) != 4:  # heads side by side in one axis
        return "attention_of_heads", call.names(), {}
    return "attention", call.names(0, 1, 2, 3), {}


_REALS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_UNARY = (
    "Abs Celu Cos Elu Erf Exp HardSigmoid HardSwish LeakyRelu Log Mish Neg Reciprocal Relu Round Selu Sigmoid Sign Sin "
    "Softplus Softsign Sqrt Tanh"
)
_NAMES = {"HardSigmoid": "hard_sigmoid", "HardSwish": "hard_swish", "LeakyRelu": "leaky_relu"}
_COMPARES = "Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual"
_LOGICAL = "And BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Not Or Xor"
_MOVES_ALL = "Concat ScatterElements ScatterND"
_MOVES_BY_INDEX = "GatherElements GatherND"
_MOVES_FIRST = "CenterCropPad Col2Im DepthToSpace Pad ReverseSequence Slice SpaceToDepth Split TopK Trilu"
_RESHAPES = "Flatten Reshape Squeeze Unsqueeze"
_POOLS = "AveragePool GlobalAveragePool GlobalMaxPool MaxPool"

RULES: dict[str, Callable[[Call], Read]] = {
    **{name: _first(_NAMES.get(name, name.lower())) for name in _UNARY.split()},
    **dict.fromkeys(_COMPARES.split(), _all("compare")),
    **dict.fromkeys(_LOGICAL.split(), _all("logical")),
    **dict.fromkeys(_MOVES_ALL.split(), _all("move")),
    **dict.fromkeys(_MOVES_BY_INDEX.split(), _first("move", 1)),
    **dict.fromkeys(_MOVES_FIRST.split(), _first("move")),
    **dict.fromkeys(_RESHAPES.split(), _first("reshape")),
    **dict.fromkeys(_POOLS.split(), _pool),
    **dict.fromkeys(("Identity", "Dropout"), _first("identity")),
    **dict.fromkeys(("Cast", "CastLike"), _cast),
    **dict.fromkeys(("Expand", "Tile"), _expand),
    **dict.fromkeys(("Conv", "ConvTranspose"), _conv),
    **dict.fromkeys(("Gemm", "MatMul"), _product),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _layer_norm),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    **dict.fromkeys(("ReduceMax", "ReduceMin"), _first("amax")),
    **dict.fromkeys(("ArgMax", "ArgMin"), _first("argmax")),
    **dict.fromkeys(("Add", "Sum"), _all("add")),
    "Attention": _attention,
    "BatchNormalization": _batch_norm,
    "Ceil": _first("floor"),
    "Clip": _clip,
    "CumSum": _first("cumsum"),
    "Div": _div,
    "Einsum": _einsum,
    "Floor": _first("floor"),
    "Gather": _gather,
    "Gelu": _gelu,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "Max": _all("maximum"),
    "Min": _all("minimum"),
    "Mod": _all("remainder"),
    "Mul": _all("mul"),
    "PRelu": _all("prelu"),
    "Pow": _power,
    "ReduceL2": _first("norm"),
    "ReduceMean": _mean,
    "ReduceProd": _first("prod"),
    "ReduceSum": _first("sum"),
    "Sub": _all("sub"),
    "Swish": _first("silu"),
    "ThresholdedRelu": _first("threshold"),
    "Transpose": _permute,
    "Where": _all("where"),
}
