"""The cost ledger: a line for every operation of a network's deployed form, an array for everything that it must store.

`build` takes a `Graph` and brings it to the form that is deployed: what depends on constants alone is computed once and
its result stored; a BatchNorm, or a constant factor or summand for each channel, folds into the convolution or linear
layer before it where nothing else reads that layer, through views, too. Every total is then a sum over lines or arrays.
Nothing here knows whose rules count (`micronet/score.py`), nor where the graph came from.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from callbacks.fold_flow import Fold, find_folds
from callbacks.graph import Graph, Node, Shape, Value
from callbacks.liveness import fold_constants, lifetimes, needed
from callbacks.op_formulas import FORMULAS, VIEWS, Cost

# Layers whose second input is weights, and the index of their bias.
WEIGHTED = {"conv2d": 2, "conv_transpose2d": 2, "linear": 2, "bilinear": 3}


class UnknownOperation(ValueError):
    """A network runs an operation that no formula covers, so that its cost is unknown."""


@dataclass(frozen=True, kw_only=True)
class Array:
    """Something that a file of the deployed network holds.

    Args:
        name: Of the parameter, buffer or initializer; of several, joined by `+`, where it is computed from them.
        role: `weight`, `bias`, `scale`, `shift`, `zero_point` or `constant`.
        shape: **Shape**.
        bits: Width of one element.
        nonzero: Count of non-zero elements; None where it is not known or does not matter.
        masked: Whether a mask declares its zeros; None where the format has no masks to declare.
    """

    name: str
    role: str
    shape: Shape
    bits: int
    nonzero: int | None = None
    masked: bool | None = None

    @property
    def numel(self) -> int:
        """Count of elements, zeros too."""
        return Value(shape=self.shape).numel

    def stored(self, bits: int) -> tuple[float, float]:
        """What it takes in a file, and the share of it that is kept.

        A tensor is sparse where a mask declares it so; where nothing can declare it, where mask and values are smaller
        than all values. A mask takes one bit for each element.

        Args:
            bits: Width of one value.

        Returns:
            Bits; share of the elements that are kept, 1 for a dense array.
        """
        if self.role != "weight" or self.nonzero is None or self.masked is False or self.nonzero == self.numel:
            return self.numel * bits, 1.0
        sparse = self.nonzero * bits + self.numel
        if self.masked or sparse < self.numel * bits:
            return sparse, self.nonzero / self.numel
        return self.numel * bits, 1.0


@dataclass(frozen=True, kw_only=True)
class Line:
    """One operation, as it runs for one image.

    Args:
        name: Path of the module that runs it, such as `groups.0.conv1`; for what a block does in its own `forward`,
            the block's path and the operation (`groups.0.add`).
        op: The operation: `conv2d`, `linear`, `batch_norm`, `add`, `global_avg_pool`, ...
        module: Class of that module: `Conv2d`; the operator's type in ONNX.
        in_shape: **Shape** of the input, without a batch axis of 1.
        out_shape: **Shape** of the output, likewise.
        taps: Products or terms that make one output: `kh*kw*C/groups`, input features, window; 0 where it says nothing.
        weights: Weight elements of a convolution, linear or bilinear layer. A tensor that two lines read is in both.
        nonzero: How many of them are not zero; None where nobody knows.
        constants: Elements of the other arrays that it reads: bias, scale, shift.
        mults: Multiplications, every weight taken for dense.
        adds: Additions, likewise.
        macs: Multiply-accumulates, likewise.
        comparisons: Comparisons of max pooling, which rules may count as multiplications.
        weight_bits: Width of its weights, 0 without any.
        act_bits: Width of what it reads and computes with.
        acc_bits: Width of the accumulator that its sums are kept in.
        own_bias: Whether the layer has a bias as it was written, before anything was folded into it.
        bias: Whether the deployed layer has one.
        arrays: Names of the arrays that it reads.
        weight_array: The one of them that holds its weights; None where they are not stored.
        folded: The line that it was folded into, so that it costs nothing; None where it runs.
        live_bytes: Bytes of all activations that are alive while it runs, the image's too.
        ops: Operations, as rules weight them; 0 in a ledger, which knows no rules.
    """

    name: str
    op: str
    module: str
    in_shape: Shape
    out_shape: Shape
    taps: int = 0
    weights: int = 0
    nonzero: int | None = None
    constants: int = 0
    mults: int = 0
    adds: int = 0
    macs: int = 0
    comparisons: int = 0
    weight_bits: int = 0
    act_bits: int = 32
    acc_bits: int = 32
    own_bias: bool = False
    bias: bool = False
    arrays: tuple[str, ...] = ()
    weight_array: str | None = None
    folded: str | None = None
    live_bytes: int = 0
    ops: float = 0.0

    @property
    def outputs(self) -> int:
        """Count of output elements."""
        return Value(shape=self.out_shape).numel


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What a network costs.

    Args:
        lines: What runs and what was folded, in order. What only moves numbers has no line.
        arrays: What is stored, each once.
        params: Count of all parameters as they were trained, BatchNorm's too; None where there is no telling (ONNX).
        peak_bytes: The most bytes of activations alive at any time, the image's among them.
        input_size: **Shape** of the image, or of each input where there are several.
        uncounted: Operations that no formula covers, as `name (operation)`; empty unless they were allowed.
    """

    lines: tuple[Line, ...]
    arrays: tuple[Array, ...]
    params: int | None
    peak_bytes: int = 0
    input_size: tuple[Any, ...] = ()
    uncounted: tuple[str, ...] = ()


def _image(shape: Shape) -> Shape:
    return shape[1:] if shape[:1] == (1,) else shape


class _Store:
    """Collects arrays: a tensor that is used twice is stored once, unless different things were folded into it."""

    def __init__(self) -> None:
        self.named: dict[str, Array] = {}
        self.names: dict[Any, str] = {}  # by what makes two uses one array

    def add(self, value: Value, role: str, name: str, key: Any = ()) -> str | None:
        """Enter a constant; give its name, or None where it is part of the program."""
        root = value.original()
        if root.literal:
            return None
        key = (id(root), key)
        if key not in self.names:
            counts = root.nonzero if role == "weight" else None
            array = Array(
                name=self.unique("+".join(root.names) or name),
                role=role,
                shape=root.shape,
                bits=root.bits,
                nonzero=counts() if counts else None,
                masked=root.masked,
            )
            self.enter(key, array)
        return self.names[key]

    def add_new(self, name: str, role: str, shape: Shape, key: Any) -> str:
        """Enter what folding makes."""
        if key not in self.names:
            self.enter(key, Array(name=self.unique(name), role=role, shape=shape, bits=32))
        return self.names[key]

    def enter(self, key: Any, array: Array) -> None:
        self.names[key] = array.name
        self.named[array.name] = array

    def unique(self, name: str) -> str:
        count, chosen = 1, name
        while chosen in self.named:
            count, chosen = count + 1, f"{name}#{count + 1}"
        return chosen


def _layer_arrays(node: Node, fold: Fold | None, store: _Store) -> Iterator[str | None]:
    """The arrays of a convolution, linear or bilinear layer, with what was folded into it."""
    at = WEIGHTED[node.op]
    weight, bias = node.inputs[at - 1], node.inputs[at] if len(node.inputs) > at else None
    keys = fold.keys if fold else ()
    if weight.fixed:
        yield store.add(weight, "weight", f"{node.name}.weight", key=fold.weight_keys if fold else ())
    if bias is not None and bias.fixed:
        yield store.add(bias, "bias", f"{node.name}.bias", key=keys)
    elif fold and fold.bias:
        yield store.add_new(f"{node.name}.bias", "bias", (fold.channels,), (id(weight.original()), "bias", keys))


def _norm_arrays(node: Node, store: _Store) -> Iterator[str | None]:
    """A BatchNorm that stays is deployed as one scale and one shift, whatever it was made of."""
    made_of = tuple(id(v.original()) for v in node.inputs[1:] if v is not None)
    channels = (node.data.shape[1],)
    for role in ("scale", "shift"):
        yield store.add_new(f"{node.name}.{role}", role, channels, (role, made_of or id(node)))


def _arrays(node: Node, fold: Fold | None, store: _Store) -> tuple[str, ...]:
    if node.op in WEIGHTED:
        names = [*_layer_arrays(node, fold, store)]
    elif node.op == "batch_norm":
        names = [*_norm_arrays(node, store)]
    else:
        names = [store.add(v, "constant", f"{node.name}.constant") for v in node.inputs if v is not None and v.fixed]
    for value in node.attrs.get("extra", ()):  # scales and zero points of quantised numbers
        names.append(store.add(value, value.role or "scale", f"{node.name}.scale"))
    return tuple(dict.fromkeys(name for name in names if name))


def _line(node: Node, fold: Fold | None, into: str | None, store: _Store, live_bytes: int) -> Line:
    cost = Cost() if into or node.op not in FORMULAS else FORMULAS[node.op](node)
    at = WEIGHTED.get(node.op)
    weight = node.inputs[at - 1] if at and node.inputs[at - 1].fixed else None
    own_bias = bool(at) and len(node.inputs) > at and node.inputs[at] is not None
    bias = own_bias or bool(fold and fold.bias)
    names = () if into else _arrays(node, fold, store)
    kept = store.named[names[0]] if weight is not None and names and not weight.original().literal else None
    read = [value.bits for value in node.inputs if value is not None and not value.fixed]
    return Line(
        name=node.name,
        op=node.op,
        module=node.module,
        in_shape=_image(node.data.shape),
        out_shape=_image(node.out.shape),
        taps=cost.taps,
        weights=weight.numel if weight is not None and not into else 0,
        nonzero=kept.nonzero if kept else None,
        constants=sum(store.named[name].numel for name in names if store.named[name] is not kept),
        mults=cost.mults,
        adds=cost.adds + node.n * (bias and not own_bias),
        macs=cost.macs,
        comparisons=cost.comparisons,
        weight_bits=weight.bits if weight is not None else 0,
        act_bits=max(read, default=32),
        own_bias=own_bias,
        bias=bias,
        arrays=names,
        weight_array=kept.name if kept else None,
        folded=into,
        live_bytes=live_bytes,
    )


def build(graph: Graph, *, allow_unknown: bool = False) -> Ledger:
    """Bring a network to its deployed form and list what it computes and what it stores.

    Args:
        graph: The network; its values are marked as fixed where they turn out to be.
        allow_unknown: Whether operations without a formula are listed as uncounted, not refused.

    Raises:
        UnknownOperation: There are some, and they are not allowed.
    """
    nodes = needed(fold_constants(graph), graph.outputs)
    unknown = tuple(dict.fromkeys(f"{node.name} ({node.op})" for node in nodes if node.op not in FORMULAS))
    if unknown and not allow_unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UnknownOperation(f"no rule for what {', '.join(unknown[:3])}{more} cost(s)")
    folds, into = find_folds(nodes, graph.outputs)
    store = _Store()
    # A copy of constants moved about, such as a class token put before the others, must be stored like any other.
    silent = (*VIEWS, "move", "where", "logical", "literal")
    lines, sizes = [], lifetimes(nodes, graph)
    for node, size in zip(nodes, sizes, strict=True):
        line = _line(node, folds.get(id(node)), into.get(id(node)), store, size)
        if node.op not in silent or line.arrays:
            lines.append(line)
    for value in graph.outputs:  # a result that no image changes is stored like any other constant
        if value.fixed:
            store.add(value, "constant", "output")
    return Ledger(
        lines=tuple(lines),
        arrays=tuple(store.named.values()),
        params=graph.params,
        peak_bytes=max(sizes, default=0),
        input_size=graph.input_size,
        uncounted=unknown,
    )
