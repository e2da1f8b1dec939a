"""What one operation costs: a formula for each that a network runs, by its name in `graph.py`'s vocabulary.

`FORMULAS` maps a name to a function that takes a `Node` and says its `Cost` for one image. What is not in the table has
no known cost, which is not the same as none. To count another operation, write its formula and enter it in the table.

The rules of the MicroNet Challenge know multiplications and additions. Whatever is neither (a comparison, a division,
an exponential, a root) counts as one multiplication, as the challenge's own counter does for ReLU, sigmoid and average
pooling; a subtraction counts as one addition. What it does not name is put together from these, as the comments say.
Moving numbers costs nothing.

Source: https://github.com/google-research/google-research/tree/master/micronet_challenge (counting.py, 2019).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from callbacks.graph import Node

# Views and copies that keep every number: attrs say which axis goes where, so that channels can be followed.
VIEWS = ("identity", "reshape", "permute")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a formula says of one operation on one image.

    Args:
        mults: Multiplications.
        adds: Additions.
        taps: Products or terms that make one output: `kh*kw*C/groups`, input features, window; 0 where it says nothing.
        macs: Multiply-accumulates: the products that are summed, of convolutions, linear layers and matrix products.
        comparisons: Comparisons that the rules may or may not count as multiplications: those of max pooling.
    """

    mults: int = 0
    adds: int = 0
    taps: int = 0
    macs: int = 0
    comparisons: int = 0


def _has(node: Node, index: int) -> bool:
    return len(node.inputs) > index and node.inputs[index] is not None


def _products(node: Node, products: int, taps: int, bias: int = 2) -> Cost:
    # A sum of k products takes k - 1 additions, the bias (the input of that index) one more.
    return Cost(mults=products, adds=products - node.n + _has(node, bias) * node.n, taps=taps, macs=products)


def _conv(node: Node) -> Cost:
    taps = math.prod(node.inputs[1].shape[1:])
    return _products(node, taps * node.n, taps)


def _conv_transpose(node: Node) -> Cost:
    # Every weight meets every input position of its channel once.
    c_in, out_per_group, *kernel = node.inputs[1].shape
    products = node.inputs[0].numel * out_per_group * math.prod(kernel)
    return _products(node, products, math.prod(kernel) * c_in // node.attrs["groups"])


def _linear(node: Node) -> Cost:
    # Matrix products, too.
    taps = node.attrs.get("taps") or node.inputs[0].shape[-1]
    return _products(node, taps * node.n, taps)


def _bilinear(node: Node) -> Cost:
    # x1' W x2: for each output in1*in2 products with the weights, and in2 with the second input.
    _, in1, in2 = node.inputs[2].shape
    return _products(node, (in1 * in2 + in2) * node.n, in1 * in2 + in2, bias=3)


def _attention(node: Node) -> Cost:
    # softmax(q k' / sqrt(d)) v: two matrix products, a scaling and a softmax over each row of the first.
    query, key, value = (v.shape for v in node.inputs[:3])
    scores = math.prod(query[:-1]) * key[-2]
    products = scores * query[-1] + math.prod(query[:-1]) * key[-2] * value[-1]
    rows = scores // key[-2]
    adds = (query[-1] - 1) * scores + (key[-2] - 1) * rows * value[-1]
    mask = scores if _has(node, 3) else 0
    return Cost(mults=products + 3 * scores, adds=adds + scores - rows + mask, taps=query[-1], macs=products)


def _normalise(node: Node, groups: int, scale: bool, shift: bool, centre: bool = True) -> Cost:
    # For each group of m: mean (m - 1 adds, 1 mult), m subtractions, m squares and their mean (m - 1 adds, 1 mult),
    # epsilon (1 add), root and reciprocal (2 mults), m products with it; then scale and shift of every element.
    n = node.n
    mults = 2 * n + 3 * groups + scale * n + centre * groups
    adds = (n - groups) + groups + shift * n + centre * ((n - groups) + n)
    return Cost(mults=mults, adds=adds)


def _layer_norm(node: Node) -> Cost:
    return _normalise(node, node.n // node.attrs["size"], _has(node, 1), _has(node, 2))


def _rms_norm(node: Node) -> Cost:
    return _normalise(node, node.n // node.attrs["size"], _has(node, 1), False, centre=False)


def _softmax(node: Node) -> Cost:
    # Exponential and division for each element, one sum for each row; its logarithm is one more.
    rows = node.n // node.attrs["size"]
    return Cost(mults=(3 if node.op == "log_softmax" else 2) * node.n, adds=node.n - rows)


def _avg_pool(node: Node) -> Cost:
    # One division for each output; taps on padding count, as the challenge counts them for convolutions.
    terms = node.attrs["terms"]
    return Cost(mults=node.n, adds=terms - node.n, taps=terms // node.n)


def _max_pool(node: Node) -> Cost:
    # k*k - 1 comparisons for each output, which the challenge's counter leaves out.
    terms = node.attrs["terms"]
    return Cost(comparisons=terms - node.n, taps=terms // node.n)


def _reduce(mult_terms: int, add_terms: int, each: int) -> Callable[[Node], Cost]:
    # Per input element, per input element less the first of each sum, per output.
    def formula(node: Node) -> Cost:
        size = node.data.numel
        return Cost(
            mults=mult_terms * size + each * node.n, adds=add_terms * (size - node.n), taps=size // max(1, node.n)
        )

    return formula


def _compare_all(node: Node) -> Cost:
    return Cost(mults=node.data.numel - node.n, taps=node.data.numel // max(1, node.n))


def _variance(node: Node) -> Cost:
    # Mean, subtraction, square, mean of squares; the root of a standard deviation.
    size, n = node.data.numel, node.n
    return Cost(mults=size + 2 * n + (node.op == "std") * n, adds=2 * (size - n) + size)


def _power(node: Node) -> Cost:
    # A whole exponent k up to 4 takes k - 1 products (a negative one a division more); any other is one function.
    exponent = node.attrs.get("exponent")
    whole = exponent is not None and float(exponent).is_integer() and 1 <= abs(exponent) <= 4
    return Cost(mults=(int(abs(exponent)) - 1 + (exponent < 0) if whole else 1) * node.n)


def _clamp(node: Node) -> Cost:
    return Cost(mults=node.attrs["bounds"] * node.n)


def _interpolate(node: Node) -> Cost:
    # Each output is a weighted sum of `taps` inputs.
    taps = node.attrs["taps"]
    return Cost(mults=taps * node.n, adds=(taps - 1) * node.n, taps=taps)


def _quantize(node: Node) -> Cost:
    # x / scale + zero_point; a symmetric one has no zero point.
    return Cost(mults=node.n, adds=node.n * bool(node.attrs["zero_point"]))


def _each(mults: int, adds: int) -> Callable[[Node], Cost]:
    return lambda node: Cost(mults=mults * node.n, adds=adds * node.n)


def _free(node: Node) -> Cost:
    return Cost()


# Multiplications and additions for each element.
_ELEMENTWISE = {
    "relu": (1, 0),  # one comparison
    "relu6": (2, 0),  # two
    "hardtanh": (2, 0),
    "leaky_relu": (2, 0),  # comparison, slope
    "prelu": (2, 0),
    "threshold": (1, 0),
    "sigmoid": (2, 1),  # exp, 1 +, 1 /
    "silu": (3, 1),  # x * sigmoid(x); the challenge's swish
    "hard_sigmoid": (3, 1),  # relu6(x + 3) / 6
    "hard_swish": (4, 1),  # x * hard_sigmoid(x)
    "tanh": (3, 2),  # (1 - e) / (1 + e) with e = exp(-2 x)
    "gelu": (4, 1),  # 0.5 * x * (1 + erf(x / sqrt(2)))
    "gelu_tanh": (9, 4),  # 0.5 * x * (1 + tanh(a * (x + b * x * x * x)))
    "softplus": (2, 1),  # log(1 + exp(x))
    "log_sigmoid": (3, 1),
    "mish": (6, 3),  # x * tanh(softplus(x))
    "softsign": (2, 1),
    "elu": (2, 1),  # comparison, exp, - 1
    "celu": (3, 1),
    "selu": (4, 1),  # two factors more
    "glu": (3, 1),  # a * sigmoid(b), for each output
    "add": (0, 1),
    "sub": (0, 1),
    "rsub": (0, 1),  # a constant less x
    "mul": (1, 0),
    "div": (1, 0),
    "addcmul": (1, 1),  # a + b * c
    "scaled_addcmul": (2, 1),
    "scaled_add": (1, 1),  # a + alpha * b
    "lerp": (1, 2),
    "maximum": (1, 0),
    "minimum": (1, 0),
    "compare": (1, 0),
    "neg": (1, 0),
    "abs": (1, 0),
    "sign": (1, 0),
    "exp": (1, 0),
    "log": (1, 0),
    "sqrt": (1, 0),
    "rsqrt": (2, 0),  # root and reciprocal
    "reciprocal": (1, 0),
    "sin": (1, 0),
    "cos": (1, 0),
    "erf": (1, 0),
    "floor": (1, 0),
    "remainder": (1, 0),
    "floor_div": (2, 0),  # a division and a rounding
    "round": (1, 0),
    "batch_norm": (1, 1),  # one that can't be folded: scale and shift
    "cumsum": (0, 1),
}

FORMULAS: dict[str, Callable[[Node], Cost]] = {
    **{op: _each(*costs) for op, costs in _ELEMENTWISE.items()},
    **dict.fromkeys((*VIEWS, "move", "logical", "where", "literal"), _free),
    **dict.fromkeys(("avg_pool", "global_avg_pool"), _avg_pool),
    **dict.fromkeys(("amax", "argmax", "prod"), _compare_all),
    **dict.fromkeys(("linear", "matmul", "addmm", "einsum"), _linear),
    **dict.fromkeys(("var", "std"), _variance),
    **dict.fromkeys(("softmax", "log_softmax"), _softmax),
    "conv2d": _conv,
    "conv_transpose2d": _conv_transpose,
    "bilinear": _bilinear,
    "attention": _attention,
    "layer_norm": _layer_norm,  # attrs: size of a group; group and instance normalisation, too
    "rms_norm": _rms_norm,
    "max_pool": _max_pool,
    "sum": _reduce(0, 1, 0),
    "mean": _reduce(0, 1, 1),
    "norm": _reduce(1, 1, 1),  # squares, their sum, the root
    "pow": _power,
    "clamp": _clamp,
    "interpolate": _interpolate,
    "quantize": _quantize,
    "dequantize": _quantize,
}
