"""What folds into the convolution or linear layer before it, found by data flow, never by order of registration.

A BatchNorm in eval mode is one factor and one summand for each channel. Where it is the only reader of a convolution's
or a linear layer's output, its factors go into the weights and its summands into the bias. So does any other constant
factor or summand for each channel, such as a residual branch's scale. Views between the two do not matter as long as
the channels can be followed through them, and nothing else reads what is between.

`find_folds` says so of a graph, and needs no torch: the ledger counts by it, `fold.py` does it to a network.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from callbacks.graph import Node, Shape, Value
from callbacks.op_formulas import VIEWS

LAYERS = ("conv2d", "conv_transpose2d", "linear")


@dataclass
class Fold:
    """What one layer takes in.

    Args:
        channels: Outputs of the layer: elements of a bias.
        bias: Whether the deployed layer has a bias because of what was folded.
        keys: What was folded, for telling apart two uses of one weight.
        weight_keys: The part of it that changes the weights.
    """

    channels: int
    bias: bool = False
    keys: tuple[Any, ...] = ()
    weight_keys: tuple[Any, ...] = field(default=())


def _axis_through(node: Node, axis: int) -> int | None:
    """Follow the channel axis through a view; None where it does not stay one axis."""
    before, after = node.inputs[0].shape, node.out.shape
    if node.op == "identity":
        return axis
    if node.op == "permute":
        return node.attrs["perm"].index(axis)
    left, right = math.prod(before[:axis]), math.prod(before[axis + 1 :])
    for place in (axis, *range(len(after))):
        if place < len(after) and math.prod(after[:place]) == left and before[axis] % after[place] == 0:
            # The axis itself, or split with its outer part first: a channel there is several here.
            whole = after[place] == before[axis] and math.prod(after[place + 1 :]) == right
            split = math.prod(after[place + 1 :]) == right * before[axis] // after[place]
            if whole or (split and after[place] > 1):
                return place
    return None


def _per_channel(constant: Value | None, shape: Shape, axis: int) -> bool:
    """Whether a constant has one number for each channel, or one for all; a literal number has no value."""
    if constant is None:
        return True
    padded = (1,) * (len(shape) - len(constant.shape)) + constant.shape
    return len(padded) == len(shape) and all(size == 1 or place == axis for place, size in enumerate(padded))


def _constant(node: Node) -> tuple[bool, Value | None]:
    """Whether the other operand of a sum or product is constant, and which value it is: None for a literal number."""
    others = [value for value in node.inputs if value is not None and value is not node.data]
    if not others:
        return "scalar" in node.attrs, None
    return len(others) == 1 and others[0].fixed, others[0]


def _folds(node: Node, axis: int, layer: Node) -> bool:
    """Whether an operation on a layer's output goes into the layer."""
    shape = node.data.shape
    bias = layer.inputs[2] if len(layer.inputs) > 2 else None
    if bias is not None and not bias.fixed:
        return False  # a factor would have to multiply it, and a summand has no place beside it
    if node.op == "batch_norm":
        return axis == 1 and all(v is None or v.fixed for v in node.inputs[1:])
    if node.op in ("add", "mul") or (node.op in ("sub", "div") and node.inputs[0] is node.data):
        constant, value = _constant(node)
        return constant and node.out.shape == shape and _per_channel(value, shape, axis)
    return False


def _key(node: Node) -> tuple[Any, ...]:
    read = (id(v.original()) for v in node.inputs if v is not None and v is not node.data)
    return (node.op, node.attrs.get("scalar"), *read)


def find_folds(nodes: list[Node], outputs: tuple[Value, ...]) -> tuple[dict[int, Fold], dict[int, str]]:
    """Find what folds.

    Args:
        nodes: What depends on the image, in the order in which it runs.
        outputs: What the network gives.

    Returns:
        What each layer takes in, by the layer node's `id`; the name of the layer that takes a node in, by the node's.
    """
    uses: dict[int, int] = {}
    for value in [*outputs, *(v for node in nodes for v in node.inputs)]:
        if value is not None:
            uses[id(value)] = uses.get(id(value), 0) + 1
    sources: dict[int, tuple[Node, int]] = {}  # the layer that a value comes from, and its channel axis
    folds: dict[int, Fold] = {}
    into: dict[int, str] = {}
    for node in nodes:
        if node.op in LAYERS and node.inputs[1].fixed:
            axis = node.attrs.get("channel_axis", len(node.out.shape) - 1 if node.op == "linear" else 1)
            if axis is not None:
                sources[id(node.out)] = (node, axis)
            continue
        layer, axis = sources.get(id(node.data), (None, None))
        if layer is None or uses[id(node.data)] != 1:
            continue
        if node.op in VIEWS:
            through = _axis_through(node, axis)
            if through is not None:
                sources[id(node.out)] = (layer, through)
        elif _folds(node, axis, layer):
            fold = folds.setdefault(id(layer), Fold(layer.out.shape[sources[id(layer.out)][1]]))
            fold.keys += _key(node)
            if node.op not in ("add", "sub"):
                fold.weight_keys += _key(node)
            fold.bias = fold.bias or node.op in ("batch_norm", "add", "sub")
            into[id(node)] = layer.name
            sources[id(node.out)] = (layer, axis)
    return folds, into
