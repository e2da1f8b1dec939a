"""Which BatchNorm modules of a network can be taken away, found by data flow (`fold.py`), and why the others stay.

More stands in the way of a module than of the ledger's counting: a layer that runs twice, or shares its weights, can't
take in what follows one of its uses; a BatchNorm that runs twice goes only if both uses of it fold.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from callbacks.fold import NORMS, with_activation
from callbacks.fold_flow import LAYERS, find_folds
from callbacks.graph import Graph, Node, Value
from callbacks.liveness import fold_constants, needed
from callbacks.modules import plain_weight


@dataclass(frozen=True)
class FoldPlan:
    """Which normalisations of a network fold, and which stay.

    Args:
        layers: for each convolution or linear layer, by name, the names of the modules that it takes in, in order.
        stays: why, for each normalisation with statistics of its own that stays, by name.
    """

    layers: dict[str, tuple[str, ...]]
    stays: dict[str, str]


def plan_folds(model: nn.Module, graph: Graph) -> FoldPlan:
    """Find which normalisations can be taken away.

    Args:
        model: a network.
        graph: its trace.
    """
    return _Planner(model, graph).plan()


class _Planner:
    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.nodes = needed(fold_constants(graph), graph.outputs)
        _, self.into = find_folds(self.nodes, graph.outputs)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.own = dict(named)
        self.computed = {id(value) for node in graph.nodes for value in node.outputs}
        self.uses: dict[int, int] = {}
        for value in [*graph.outputs, *(value for node in graph.nodes for value in node.inputs)]:
            self.uses[id(value)] = self.uses.get(id(value), 0) + 1

    def plan(self) -> FoldPlan:
        norms = {id(node): self.norm(node) for node in self.nodes if node.op == "batch_norm"}
        chains = {node.name: self.chain(node) for node in self.nodes if self.takes(node)}
        while True:
            folded = {id(node) for chain in chains.values() for node in chain}
            # A module that runs twice, and folds only once, stays: so does what comes behind it.
            held = [norm for key, norm in norms.items() if key not in folded]
            stops = {key for key, norm in norms.items() if any(norm is other for other in held)}
            left = {name: _until(chain, stops) for name, chain in chains.items()}
            if left == chains:
                break
            chains = left
        layers = {name: tuple(map(self.path, chain)) for name, chain in chains.items() if chain}
        stays = {self.path(n): self.reason(n) for n in self.nodes if id(n) in norms and id(n) not in folded}
        return FoldPlan(layers, stays)

    def path(self, node: Node) -> str:
        """The module that runs an operation: one with parts of its own, as timm's BatchNormAct2d, is not a leaf."""
        whole = node.name.removesuffix(f".{node.op}")
        return node.name if node.name in self.modules or whole not in self.modules else whole

    def norm(self, node: Node) -> nn.Module | None:
        """The module that a batch_norm is, where it can be taken away."""
        module = self.modules.get(self.path(node))
        known = node.op == "batch_norm" and (type(module) in NORMS or with_activation(module))
        return module if known and self.same(node.inputs[3], module.running_mean) else None

    def same(self, value: Value | None, tensor: Tensor | None) -> bool:
        """Whether a value is a tensor of the network's, as it is."""
        if value is None or tensor is None:
            return value is tensor is None
        return id(value) not in self.computed and self.own.get(value.names[0]) is tensor

    def takes(self, node: Node) -> bool:
        """Whether an operation is a layer whose weights nothing else reads."""
        layer = self.modules.get(node.name)
        if node.op not in LAYERS or not isinstance(layer, _ConvNd | nn.Linear) or not plain_weight(layer):
            return False
        weight, bias = (*node.inputs[1:], None)[:2]
        alone = all(self.uses[id(value)] == 1 for value in (weight, bias) if value is not None)
        return alone and self.same(weight, layer.weight) and self.same(bias, layer.bias)

    def chain(self, layer: Node) -> tuple[Node, ...]:
        """What folds into a layer and is a module, up to the first that is not."""
        into = [node for node in self.nodes if self.into.get(id(node)) == layer.name]
        return _until(into, {id(node) for node in into if self.norm(node) is None})

    def reason(self, node: Node) -> str:
        layer = self.into.get(id(node))
        if self.norm(node) is None:
            return "it is no module of a known kind"
        if layer is None:
            return "no layer comes directly before it whose output only it reads"
        called = [other for other in self.nodes if other.name == layer]
        if not any(map(self.takes, called)):
            return f"the weights of {layer} are used elsewhere, too, or are not its own"
        return f"what lies between it and {layer}, or another use of it, stays"


def _until(nodes: Sequence[Node], stops: set[int]) -> tuple[Node, ...]:
    """The nodes before the first one whose `id` is among some."""
    end = next((index for index, node in enumerate(nodes) if id(node) in stops), len(nodes))
    return tuple(nodes[:end])
