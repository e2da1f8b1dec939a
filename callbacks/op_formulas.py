"""What one operation costs: a formula for each that a network runs, by its name in ATen.

`FORMULAS` maps a name (`conv2d`, `batch_norm`) to a function that takes a `Call` and says its `Cost`: multiplications,
additions, taps. What is not in the table has no known cost, which is not the same as none: a formula whose rule is
`move` says that nothing is calculated. To count another operation, write its formula and enter it in the table.

A comparison (ReLU, max pooling), a division and an exponential count as one multiplication.

Source: the formulas of torchstat 0.0.7, compute_madd.py, written anew so that multiplications and additions come back
apart; the fastai entry to the MicroNet Challenge (2019) changed its lines 27 and 124 to that end.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

Shape = tuple[int, ...]

# Operations that only move, choose or relabel numbers.
_MOVES = (
    "_to_copy _unsafe_view alias cat channel_shuffle chunk clone concat concatenate constant_pad_nd contiguous copy "
    "detach empty expand expand_as flatten flip full full_like gather hstack identity index index_select lift_fresh "
    "movedim narrow new_full new_ones new_zeros ones ones_like pad permute pixel_shuffle pixel_unshuffle ravel "
    "reflection_pad2d repeat replication_pad2d reshape reshape_as resolve_conj resolve_neg roll select slice split "
    "split_with_sizes squeeze stack swapaxes swapdims t tile to transpose type_as unbind unflatten unsafe_chunk "
    "unsafe_split unsqueeze upsample_nearest2d view view_as vstack zeros zeros_like"
)


def shape_of(node: Node) -> Shape:
    """The shape of the tensor that a node gives."""
    return tuple(tensor_of(node).shape)


def tensor_of(node: Node) -> Tensor | None:
    """The tensor a node gives, or the first of several."""
    value = node.meta.get("val")
    return next((v for v in value if isinstance(v, Tensor)), None) if isinstance(value, tuple | list) else value


@dataclass(frozen=True)
class Cost:
    """What a formula says of one call; `weight` names the argument that holds the weights, `op` renames the call."""

    rule: str | None
    mults: int = 0
    adds: int = 0
    taps: int = 0
    macs: int = 0
    weight: str | None = None
    op: str | None = None


@dataclass(frozen=True)
class Call:
    """One call in the graph: its arguments by name, and which nodes depend on parameters and buffers alone."""

    op: str
    args: dict[str, Any]
    out: Shape
    fixed: Mapping[Node, tuple[str, ...]]

    @property
    def n(self) -> int:
        """Count of outputs."""
        return math.prod(self.out)

    def shape(self, arg: str) -> Shape:
        """The shape of an argument, by its name in ATen's schema."""
        return shape_of(self.args[arg])


def _conv(call: Call) -> Cost:
    if call.args.get("transposed"):  # torch.convolution, which is both
        return _conv_transpose(call)
    taps = math.prod(call.shape("weight")[1:])
    adds = taps - 1 + (call.args["bias"] is not None)
    return Cost("conv", taps * call.n, adds * call.n, taps, taps * call.n, "weight")


def _conv_transpose(call: Call) -> Cost:
    # torchstat's formula goes by *input* positions. So its multiplications are those of every weight at every input
    # position, but its additions are not the ones that run: the bias belongs to output positions.
    c_in, c_out, *kernel = call.shape("weight")
    groups = call.args["groups"]
    taps, n = math.prod(kernel) * (c_in // groups), math.prod(call.shape("input")) // c_in * c_out * groups
    adds = taps - 1 + (call.args["bias"] is not None)
    return Cost("conv_transpose", taps * n, adds * n, taps, taps * n, "weight")


def _linear(call: Call, features: str = "weight", weight: str = "weight") -> Cost:
    # The bias is left out, as in torchstat.
    taps = call.shape(features)[-1]
    return Cost("linear", taps * call.n, (taps - 1) * call.n, taps, taps * call.n, weight)


def _matmul(call: Call) -> Cost:
    """A linear layer where exactly one factor is weights; the product of two activations has no formula here."""
    factors = [name for name, value in call.args.items() if isinstance(value, Node)][-2:]
    weight = [name for name in factors if call.args[name] in call.fixed]
    return _linear(call, factors[0], weight[0]) if len(weight) == 1 else Cost(None)


def _bilinear(call: Call) -> Cost:
    # torchstat: in1*in2 + in2 products for one output; the bias is left out.
    _, in1, in2 = call.shape("weight")
    taps = in1 * in2 + in2
    return Cost("bilinear", taps * call.n, (taps - 1) * call.n, taps, weight="weight")


def _batch_norm(call: Call) -> Cost:
    # Subtract the mean, divide by the deviation, multiply by the scale, add the shift.
    return Cost("batch_norm", 2 * call.n, 2 * call.n)


def _relu(call: Call) -> Cost:
    if call.op == "hardtanh":
        six = (call.args["min_val"], call.args["max_val"]) == (0, 6)
        return Cost("relu", call.n, op="relu6") if six else Cost(None)
    return Cost("relu", call.n)


def _softmax(call: Call) -> Cost:
    # torchstat: an exponential and a division per element, one sum over all of them, however many rows there are.
    return Cost("softmax", 2 * call.n, call.n - 1)


def _window(call: Call) -> Shape:
    axes = int(call.op.split("pool")[1][0])  # max_pool2d_with_indices
    kernel = tuple(call.args["kernel_size"])
    return kernel * axes if len(kernel) == 1 else kernel


def _max_pool(call: Call) -> Cost:
    taps = math.prod(_window(call))
    return Cost("max_pool", (taps - 1) * call.n, taps=taps)


def _average(call: Call, window: Shape, whole: bool) -> Cost:
    taps = math.prod(window)
    return Cost("avg_pool", call.n, (taps - 1) * call.n, taps, op="global_avg_pool" if whole else None)


def _avg_pool(call: Call) -> Cost:
    window = _window(call)
    axes = len(window)
    return _average(call, window, call.shape("self")[-axes:] == window and math.prod(call.out[-axes:]) == 1)


def _adaptive_avg_pool(call: Call) -> Cost:
    axes = len(call.args["output_size"])
    sizes = list(zip(call.shape("self")[-axes:], call.out[-axes:], strict=True))
    if any(size % pooled for size, pooled in sizes):
        return Cost(None)  # windows of several sizes
    return _average(call, tuple(size // pooled for size, pooled in sizes), all(pooled == 1 for _, pooled in sizes))


def _mean(call: Call) -> Cost:
    """A global average pool where it averages the two axes of every map, or the one they were flattened to."""
    shape, source = call.shape("self"), call.args["self"]
    axes = {axis % len(shape) for axis in call.args.get("dim") or ()}
    before = shape_of(source.args[0]) if source.target in _FLATTENS else ()
    flattened = len(shape) == 3 and axes == {2} and len(before) == 4 and before[:2] == shape[:2]
    if flattened or (len(shape) == 4 and axes in ({2, 3}, {1, 2})):
        return _average(call, tuple(shape[axis] for axis in axes), True)
    return Cost(None)


def _dropout(call: Call) -> Cost:
    return Cost(None if call.args["train"] else "move")


_FLATTENS = (torch.ops.aten.flatten.using_ints, torch.ops.aten.view.default, torch.ops.aten.reshape.default)
# By the operation's name in ATen, without the underscore of what runs in place.
FORMULAS: dict[str, Callable[[Call], Cost]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "_convolution"), _conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv_transpose),
    **dict.fromkeys(("mm", "addmm", "matmul", "bmm", "baddbmm", "mv", "addmv"), _matmul),
    **dict.fromkeys(("relu", "relu6", "hardtanh"), _relu),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), _max_pool),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices"), _max_pool),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _avg_pool),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), _adaptive_avg_pool),
    **dict.fromkeys(("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"), _dropout),
    **dict.fromkeys(_MOVES.split(), lambda call: Cost("move")),
    **{"linear": _linear, "bilinear": _bilinear, "batch_norm": _batch_norm, "softmax": _softmax, "mean": _mean},
}
