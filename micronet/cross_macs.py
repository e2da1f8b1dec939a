"""Why other counters find other numbers of multiply-accumulates, or of multiplications and additions, than we do.

Each reason's number is what our formulas say of the operations concerned, or what the other counter itself books under
a name.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from torch import nn

from callbacks.graph import Node
from callbacks.ledger import WEIGHTED, Ledger, Line
from callbacks.liveness import fold_constants, needed
from callbacks.op_formulas import FORMULAS, Cost
from callbacks.seed import torchstat_cost
from micronet.model_source import ModelSource
from micronet.other_counters import Fvcore, Paths, Told

# The path of a module that it concerns, the reason, and what it adds to the other counter's number.
Amount = tuple[str, str, int]

CONSTANT = "layers fed by constants alone: computed once here, and stored"
UNUSED = "results that nothing reads: not run here"
NO_FORMULA = "bilinear layers and products with a vector: no formula there"
BROADCAST = "matrix products whose first factor is used many times: counted once"
EINSUM = "einsum: numpy's estimate, printed with four digits"
CONV_BIAS = "biases of convolutions: one each"
BATCH = "layers that get a batch made of one image: counted for one item of it"
# Layers that torchstat has formulas for, and the operations that these are for.
_TORCHSTAT: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("conv2d",),
    nn.ConvTranspose2d: ("conv_transpose2d",),
    nn.Linear: ("linear",),
    nn.Bilinear: ("bilinear",),
    nn.BatchNorm2d: ("batch_norm",),
    nn.MaxPool2d: ("max_pool",),
    nn.AvgPool2d: ("avg_pool", "global_avg_pool"),
    nn.ReLU: ("relu",),
    nn.ReLU6: ("relu6",),
    nn.Softmax: ("softmax",),
}
_PRODUCTS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.Bilinear)
# How its formulas for multiplications and additions differ from ours.
_MADD = {
    "conv2d": "convolutions: no bias that folding gives them",
    "conv_transpose2d": "transposed convolutions: sums by input positions, no bias that folding gives them",
    "linear": "linear layers: no biases",
    "bilinear": "bilinear layers: no biases",
    "batch_norm": "BatchNorm: 4 an element; here nothing where it folds, else 2",
    "relu6": "ReLU6: one comparison, not two",
    "softmax": "softmax: one sum for all elements, not one a row",
    "max_pool": "max pooling: its comparisons",
}
# What fvcore counts as multiply-accumulates; all else that it counts goes by another name.
_FVCORE = ("conv", "linear", "addmm", "mm", "bmm", "matmul", "einsum")
# Operations that fvcore may meet under a name that it has no formula for.
_FVCORE_MISSES = {"attention": "scaled_dot_product_attention", "bilinear": "bilinear", "conv2d": "_convolution_mode"}


class Network:
    """Our side: the ledger, and every operation before folding, each with the module that runs it.

    Args:
        source: The network.
        ledger: What we count.
        paths: Its modules.
    """

    def __init__(self, source: ModelSource, ledger: Ledger, paths: Paths):
        graph = source.graph()
        self.ledger, self.paths, self.nodes = ledger, paths, graph.nodes
        self.used = {id(node) for node in needed(graph.nodes, graph.outputs)}
        on_image = fold_constants(graph)
        self.live = [node for node in on_image if id(node) in self.used]
        live = {id(node) for node in on_image}
        self.constant = {id(node) for node in self.nodes} - live
        # Of operations on constants, only products matter here; without a rule are these two.
        unruled = [
            n for n in self.nodes if n.op not in FORMULAS and (id(n) in live or n.op in ("addmm", "einsum_of_many"))
        ]
        self.unruled = {self.owner(node): f"operations without a rule here: {node.op}" for node in unruled}

    def owner(self, entry: Node | Line) -> str:
        """The path of the module that runs an operation."""
        return self.paths.owner(entry.name, entry.op, entry.module)

    def macs(self) -> Counter[str]:
        """Our multiply-accumulates, by the module that runs them."""
        return _sum((self.owner(line), line.macs) for line in self.ledger.lines)

    def operations(self) -> Counter[str]:
        """Our multiplications and additions, by the module that runs them."""
        return _sum((self.owner(line), line.mults + line.adds) for line in self.ledger.lines)

    def products(self) -> Iterator[tuple[str, Node, int]]:
        """Every operation with multiply-accumulates before folding, with its module's path and their count."""
        for node in self.nodes:
            if macs := _cost(node).macs:
                yield self.owner(node), node, macs


def _sum(counts: Iterable[tuple[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for path, count in counts:
        total[path] += count
    return total


def _cost(node: Node) -> Cost:
    return FORMULAS[node.op](node) if node.op in FORMULAS else Cost()


def _folded(net: Network) -> Iterator[Amount]:
    return ((path, CONSTANT, macs) for path, node, macs in net.products() if id(node) in net.constant)


def flop_counter(net: Network) -> Iterator[Amount]:
    """Why half of what FlopCounterMode counts is not our multiply-accumulates.

    Args:
        net: The network.
    """
    yield from _folded(net)
    for path, node, macs in net.products():
        if id(node) not in net.used:
            yield path, UNUSED, 0 if id(node) in net.constant else macs
            continue
        vector = node.op in ("linear", "matmul") and min(len(value.shape) for value in node.inputs[:2]) == 1
        if node.op == "bilinear" or vector:
            yield path, NO_FORMULA, -macs


def fvcore(net: Network, other: Fvcore) -> Iterator[Amount]:
    """Why what fvcore counts is not our multiply-accumulates.

    Args:
        net: The network.
        other: What fvcore says.
    """
    yield from _folded(net)
    einsums: Counter[str] = Counter()
    for path, node, macs in net.products():
        missed = _FVCORE_MISSES.get(node.op)
        if id(node) not in net.used:
            continue  # nor does its trace have it
        if missed and other.unknown[path][f"aten::{missed}"] > 0:
            yield path, f"{missed}: no formula there", -macs
        elif node.op == "einsum" or node.attrs.get("channel_axis", 0) is None:
            einsums[path] += macs
        elif "taps" in node.attrs:  # a matrix product
            # A linear layer has its weights second, whichever factor they were; they give rows where they were first.
            swapped = node.attrs.get("channel_axis") == len(node.out.shape) - 2
            first, second = reversed(node.inputs[:2]) if swapped else node.inputs[:2]
            yield path, BROADCAST, first.numel * second.shape[-1] - macs
    for path, counts in other.counts.items():
        for op, count in counts.items():
            if op == "einsum" and path not in net.unruled:
                yield path, EINSUM, count - einsums[path]
            elif op not in _FVCORE:
                yield path, f"also counts {op}", count


def _counts(told: Told, net: Network, path: str, op: str) -> bool:
    """Whether torchstat counts an operation: the one that its formula for that layer is for."""
    layer = net.paths.layer(path)
    return path in told.counts and any(op in ops for kind, ops in _TORCHSTAT.items() if isinstance(layer, kind))


def _unseen(told: Told, net: Network, path: str, op: str) -> str:
    kind = type(net.paths.modules[path]).__name__
    if path in told.unknown:
        return f"{kind}: a layer that it does not know"
    if path in told.refused:
        return f"{kind}: its formula refuses such an input"
    return f"{op} outside a layer's call: its hooks do not see it"


def torchstat_flops(net: Network, told: Told) -> Iterator[Amount]:
    """Why torchstat's "Flops" are not our multiply-accumulates.

    Args:
        net: The network.
        told: What its formula says.
    """
    for path, node, macs in net.products():
        constant = id(node) in net.constant
        if not _counts(told, net, path, node.op):
            ours = macs if id(node) in net.used and not constant else 0
            yield path, _unseen(told, net, path, node.op), -ours
            continue
        yield path, CONSTANT if constant else UNUSED, macs if constant or id(node) not in net.used else 0
        if node.op == "conv2d" and len(node.inputs) > 2 and node.inputs[2] is not None:
            yield path, CONV_BIAS, node.n
    for path, count in told.counts.items():
        if not isinstance(layer := net.paths.modules[path], _PRODUCTS):
            yield path, f"also counts {type(layer).__name__}", count


def torchstat_madd(net: Network, told: Told) -> Iterator[Amount]:
    """Why torchstat's "MAdd" is not our multiplications and additions.

    Args:
        net: The network.
        told: What its formula says.
    """
    for line in net.ledger.lines:
        path, ours = net.owner(line), line.mults + line.adds
        if _counts(told, net, path, line.op):
            yield path, _MADD.get(line.op, f"{line.op}: another formula"), sum(torchstat_cost(line)) - ours
        else:
            yield path, _unseen(told, net, path, line.op), -ours
    for node in net.nodes:
        path, batch = net.owner(node), node.out.shape[0] if node.out.shape else 1
        if _counts(told, net, path, node.op):
            whole, item = sum(torchstat_cost(_as_line(node, 1))), sum(torchstat_cost(_as_line(node, batch)))
            yield path, BATCH, item - whole
            constant = id(node) in net.constant
            yield path, CONSTANT if constant else UNUSED, whole if constant or id(node) not in net.used else 0


def _as_line(node: Node, batch: int) -> Line:
    """What torchstat's formulas read of an operation, for one item of a batch."""
    cost, bias = _cost(node), WEIGHTED.get(node.op, len(node.inputs))
    return Line(
        name=node.name,
        op=node.op,
        module=node.module,
        in_shape=node.data.shape,
        out_shape=(node.n // batch,),
        taps=cost.taps,
        macs=cost.macs // batch,
        comparisons=cost.comparisons // batch,
        own_bias=len(node.inputs) > bias and node.inputs[bias] is not None,
    )
