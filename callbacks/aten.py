"""ATen's operations in the ledger's vocabulary (`op_formulas.py`): which they are, what they read, what they need.

`READERS` maps an operation's name in ATen to a function that takes a `Call` and gives the operation, the nodes it reads
in the order that its formula states, and the attributes that the formula needs. What is not in the table keeps its name
and has no known cost.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from callbacks.aten_call import Call, shape_of
from callbacks.graph import Shape

Read = tuple[str, list[Node | None], dict[str, Any]]


def _simple(op: str) -> Callable[[Call], Read]:
    return lambda call: (op, call.all_nodes(), {})


def _named(op: str, *names: str) -> Callable[[Call], Read]:
    return lambda call: (op, call.nodes(*names), {})


def _binary(op: str) -> Callable[[Call], Read]:
    def read(call: Call) -> Read:
        names = ("self", "other")
        numbers = [call.args[n] for n in names if n in call.args and not isinstance(call.args[n], Node)]
        scaled = call.args.get("alpha", 1) not in (1, None)
        attrs = {"scalar": numbers[0]} if numbers else {}
        return "scaled_add" if scaled else op, [n for n in call.nodes(*names) if n is not None], attrs

    return read


def _conv(call: Call) -> Read:
    transposed = call.args.get("transposed") or "transpose" in call.op
    attrs = {"groups": call.args["groups"]}
    return "conv_transpose2d" if transposed else "conv2d", call.nodes("input", "weight", "bias"), attrs


def _addmm(call: Call) -> Read:
    a, b = call.nodes("mat1", "mat2") if "mat1" in call.args else call.nodes("batch1", "batch2")
    return "addmm", [a, b, call.args["self"]], {"taps": shape_of(a)[-1]}


def _matmul(call: Call) -> Read:
    names = [name for name, value in call.args.items() if isinstance(value, Node)][-2:]
    return "matmul", call.nodes(*names), {"taps": call.shape(names[0])[-1]}


def _einsum(call: Call) -> Read:
    equation, tensors = call.args["equation"].replace(" ", ""), call.args["tensors"]
    sources, _, result = equation.partition("->")
    if len(tensors) != 2 or "." in equation or not result:
        return "einsum_of_many", call.all_nodes(), {}
    sizes = {}
    for letters, tensor in zip(sources.split(","), tensors, strict=True):
        sizes |= dict(zip(letters, shape_of(tensor), strict=True))
    taps = math.prod(size for letter, size in sizes.items() if letter not in result)
    return "einsum", list(tensors), {"taps": taps}


def _clamp(call: Call) -> Read:
    low, high = (call.args.get(a, call.args.get(b)) for a, b in (("min", "min_val"), ("max", "max_val")))
    if (low, high) == (0, 6):
        return "relu6", call.nodes("self"), {}
    return "clamp", call.nodes("self"), {"bounds": (low is not None) + (high is not None)}


def _window(call: Call) -> Shape:
    axes = int(call.op.split("pool")[1][0])  # max_pool2d_with_indices
    kernel = tuple(call.args["kernel_size"])
    return kernel * axes if len(kernel) == 1 else kernel


def _pool(call: Call) -> Read:
    window, axes = _window(call), len(_window(call))
    whole = call.shape("self")[-axes:] == window and math.prod(call.out[-axes:]) == 1
    op = "max_pool" if call.op.startswith("max") else "global_avg_pool" if whole else "avg_pool"
    return op, call.nodes("self"), {"terms": math.prod(window) * math.prod(call.out)}


def _adaptive_pool(call: Call) -> Read:
    axes = len(call.args["output_size"])
    before, after = call.shape("self")[-axes:], call.out[-axes:]
    # Output i of an axis averages the inputs from floor(i * in / out) to ceil((i + 1) * in / out): windows can differ.
    terms = math.prod(call.out[:-axes])
    for size, pooled in zip(before, after, strict=True):
        terms *= sum(-(-(i + 1) * size // pooled) - i * size // pooled for i in range(pooled))
    op = "max_pool" if "max" in call.op else "global_avg_pool" if math.prod(after) == 1 else "avg_pool"
    return op, call.nodes("self"), {"terms": terms}


def _mean(call: Call) -> Read:
    """A global average pool where it averages the two axes of every map, or the one they were flattened to."""
    shape, source = call.shape("self"), call.args["self"]
    axes = {axis % len(shape) for axis in call.args.get("dim") or ()}
    before = shape_of(source.args[0]) if source.target in _FLATTENS else ()
    flattened = len(shape) == 3 and axes == {2} and len(before) == 4 and before[:2] == shape[:2]
    pool = flattened or (len(shape) == 4 and axes in ({2, 3}, {1, 2}))
    if pool:
        return "global_avg_pool", [source], {"terms": math.prod(shape)}
    return "mean", [source], {}


def _norm_layer(call: Call) -> Read:
    names = ("input", "weight", "bias")
    if call.op in ("layer_norm", "native_layer_norm", "rms_norm"):
        size = math.prod(call.args["normalized_shape"])
    elif call.op in ("group_norm", "native_group_norm"):
        groups = call.args.get("num_groups") or call.args["group"]
        size = math.prod(call.out[1:]) // groups
    elif call.args["use_input_stats"]:
        size = math.prod(call.out[2:])
    else:  # an instance normalisation with statistics of its own is a BatchNorm
        return "batch_norm", call.nodes(*names, "running_mean", "running_var"), {}
    return "rms_norm" if call.op == "rms_norm" else "layer_norm", call.nodes(*names), {"size": size}


def _batch_norm(call: Call) -> Read:
    statistics = call.nodes("running_mean", "running_var")
    if call.args["training"] or None in statistics:  # it takes the image's own
        return "layer_norm", call.nodes("input", "weight", "bias"), {"size": math.prod(call.out) // call.out[1]}
    return "batch_norm", [*call.nodes("input", "weight", "bias"), *statistics], {}


def _softmax(call: Call) -> Read:
    op = "log_softmax" if "log" in call.op else "softmax"
    return op, call.nodes("self"), {"size": call.out[call.args["dim"]]}


def _gelu(call: Call) -> Read:
    return "gelu" if call.args["approximate"] == "none" else "gelu_tanh", call.nodes("self"), {}


def _power(call: Call) -> Read:
    exponent = call.args["exponent"]
    known = {} if isinstance(exponent, Node) else {"exponent": exponent}
    return "pow", call.all_nodes(), known


def _permute(call: Call) -> Read:
    dims = range(len(call.out))
    if call.op == "permute":
        perm = tuple(d % len(dims) for d in call.args["dims"])
    elif call.op in ("movedim", "moveaxis"):
        perm = tuple(
            torch.empty(tuple(dims), device="meta").movedim(call.args["source"], call.args["destination"]).shape
        )
    else:
        perm = list(dims)
        if len(perm) > 1:
            a, b = (call.args.get(k, d) for k, d in (("dim0", 0), ("dim1", 1)))
            perm[a], perm[b] = perm[b], perm[a]
    return "permute", call.nodes("self"), {"perm": tuple(perm)}


def _expand(call: Call) -> Read:
    return "reshape" if math.prod(call.out) == math.prod(call.shape("self")) else "move", call.nodes("self"), {}


def _like(op: str) -> Callable[[Call], Read]:
    # Of a second tensor only the shape or the type matters.
    return lambda call: (op, call.all_nodes()[:1], {})


def _addcmul(call: Call) -> Read:
    # a + value * b * c
    plain = call.args["value"] == 1
    return "addcmul" if plain else "scaled_addcmul", call.nodes("self", "tensor1", "tensor2"), {}


def _dropout(call: Call) -> Read:
    return "dropout" if call.args["train"] else "identity", call.all_nodes(), {}


def _upsample(call: Call) -> Read:
    taps = {"bilinear": 4, "linear": 2, "trilinear": 8, "bicubic": 16}
    kind = next(kind for kind in ("bilinear", "trilinear", "linear", "bicubic") if kind in call.op)
    return "interpolate", call.all_nodes()[:1], {"taps": taps[kind]}


def _over(op: str) -> Callable[[Call], Read]:
    return lambda call: (op, call.nodes("self" if "self" in call.args else "input"), {})


def _extreme(call: Call) -> Read:
    if isinstance(call.args.get("other"), Node):
        return "maximum", call.nodes("self", "other"), {}
    return "amax", call.nodes("self"), {}


_FLATTENS = (torch.ops.aten.flatten.using_ints, torch.ops.aten.view.default, torch.ops.aten.reshape.default)
_RESHAPES = "_unsafe_view alias flatten ravel reshape squeeze unflatten unsqueeze view"
_IDENTITIES = "_to_copy clone contiguous detach detach_copy lift_fresh lift_fresh_copy resolve_conj resolve_neg to"
_MOVES = (
    "as_strided cat channel_shuffle chunk concat concatenate constant_pad_nd copy diag_embed diagonal "
    "expand_copy fill flip gather hstack im2col col2im index index_put index_select masked_fill masked_scatter narrow "
    "native_channel_shuffle pad pixel_shuffle pixel_unshuffle reflection_pad2d repeat repeat_interleave "
    "replication_pad2d roll rot90 scatter select slice slice_scatter sort split split_with_sizes stack take_along_dim "
    "tensor_split tile topk tril triu unbind unfold unsafe_chunk unsafe_split upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d vstack"
)
# What a program makes from nothing but sizes.
LITERAL = "literal"
_MADE = "arange empty eye full linspace meshgrid new_empty new_full new_ones new_zeros ones scalar_tensor zeros"
_MADE += " empty_like full_like ones_like zeros_like"
_COMPARES = "eq ge gt isnan le lt ne"
_UNARY = (
    "abs celu cos elu erf exp floor glu leaky_relu log mish neg prelu reciprocal relu relu6 round rsqrt selu "
    "sigmoid sign silu sin softplus sqrt tanh threshold"
)
_SAME = {name: name for name in _UNARY.split()} | {
    "ceil": "floor",
    "hardswish": "hard_swish",
    "hardsigmoid": "hard_sigmoid",
    "log2": "log",
    "expm1": "exp",
    "_prelu_kernel": "prelu",
    **{name: name for name in ("log_sigmoid", "lerp", "where", "maximum", "minimum")},
}

# By the operation's name in ATen, without the underscore of what runs in place.
READERS: dict[str, Callable[[Call], Read]] = {
    **{name: _simple(op) for name, op in _SAME.items()},
    **{name: _binary(op) for name, op in {"add": "add", "sub": "sub", "rsub": "rsub", "mul": "mul"}.items()},
    **{name: _binary(op) for name, op in {"true_divide": "div", "floor_divide": "floor_div"}.items()},
    **{name: _binary("remainder") for name in ("remainder", "fmod")},
    "div": lambda call: _binary("floor_div" if call.args.get("rounding_mode") else "div")(call),
    **dict.fromkeys(_COMPARES.split(), _simple("compare")),
    **dict.fromkeys(("logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_not"), _simple("logical")),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "_convolution"), _conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv),
    **dict.fromkeys(("mm", "matmul", "bmm", "mv"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    **dict.fromkeys(("clamp", "clip", "clamp_min", "clamp_max", "hardtanh"), _clamp),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), _pool),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices"), _pool),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _pool),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), _adaptive_pool),
    **dict.fromkeys(("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"), _adaptive_pool),
    **dict.fromkeys(("layer_norm", "group_norm", "instance_norm", "rms_norm"), _norm_layer),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax"), _softmax),
    **dict.fromkeys(("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"), _dropout),
    **dict.fromkeys(_RESHAPES.split(), _simple("reshape")),
    **dict.fromkeys(_IDENTITIES.split(), _simple("identity")),
    **dict.fromkeys(("permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis"), _permute),
    **dict.fromkeys(_MOVES.split(), _simple("move")),
    **dict.fromkeys(("upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d"), _upsample),
    **dict.fromkeys(("amax", "amin", "max", "min"), _extreme),
    **dict.fromkeys(("argmax", "argmin"), _over("argmax")),
    **dict.fromkeys(("norm", "linalg_vector_norm", "frobenius_norm"), _over("norm")),
    **{name: _over(name) for name in ("sum", "cumsum", "prod", "var", "std")},
    "linear": _named("linear", "input", "weight", "bias"),
    "bilinear": _named("bilinear", "input1", "input2", "weight", "bias"),
    "scaled_dot_product_attention": _named("attention", "query", "key", "value", "attn_mask"),
    "batch_norm": _batch_norm,
    "einsum": _einsum,
    "expand": _expand,
    "expand_as": _expand,
    "view_as": _like("reshape"),
    "reshape_as": _like("reshape"),
    "type_as": _like("identity"),
    "addcmul": _addcmul,
    **dict.fromkeys(_MADE.split(), lambda call: (LITERAL, [], {})),
    "gelu": _gelu,
    "mean": _mean,
    "pow": _power,
    "square": lambda call: ("pow", call.all_nodes(), {"exponent": 2}),
}
