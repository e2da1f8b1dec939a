"""Where each channel of a network goes, read off Torch-Pruning's dependency graph.

Torch-Pruning gives the graph: which layer's channels become which places of which other layers, through adds,
concatenations, splits and flattening. The walk along it is ours: it keeps sets, so that it ends on every network, and
refuses a place that does not exist. Torch-Pruning's own walk never ends where a mapping makes ever more places of a
channel, as in networks that shuffle channels or gate them by a convolution along the channels.
"""

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

LOOKUPS = 2_000_000  # of channel counts while the graph is built: DenseNet-121 needs a twentieth


class Spot(NamedTuple):
    """A place along an axis of a layer: channel `place` of its outputs (`"out"`) or inputs (`"in"`)."""

    layer: str
    axis: str
    place: int


class _Index(NamedTuple):
    """A place, and the channel of the first layer that it comes from: the form that the graph's mappings take."""

    idx: int
    root_idx: int


@dataclass
class Flow:
    """Where the output channels of one layer go.

    Args:
        units: for each channel, everything that goes with it.
        reason: why none of them can be removed; empty where they can.
        output: whether some of them are what the network gives.
    """

    units: list[list[Spot]] = field(default_factory=list)
    reason: str = ""
    output: bool = False


def trace_channels(shadow: nn.Module, input_size: Sequence[int]) -> tuple[list[str], dict[str, Flow]]:
    """Follow the output channels of every convolution and linear layer.

    Args:
        shadow: a copy of the network, on the CPU, to which anything may happen; its mode decides which layers run.
        input_size: **shape** of one image, `(C, H, W)`.

    Returns:
        The names of the layers in the order in which they first run; a flow for each layer that makes channels which no
        flow before has, by its name, in the same order.

    Raises:
        ValueError: the network does not run on such an image, or Torch-Pruning fails on it.
    """
    walk = _Walk(shadow, input_size)
    flows: dict[str, Flow] = {}
    seen: set[Spot] = set()
    for name in walk.order:
        module = walk.modules[name]
        if isinstance(module, _ConvNd | nn.Linear) and module in walk.nodes:
            width = module.out_channels if isinstance(module, _ConvNd) else module.out_features
            if any(Spot(name, "out", place) not in seen for place in range(width)):
                flows[name] = walk.flow(name, width)
                seen |= {spot for unit in flows[name].units for spot in unit}
    return walk.order, flows


class _Walk:
    """The dependency graph of a network, and the walks along it."""

    def __init__(self, shadow: nn.Module, input_size: Sequence[int]) -> None:
        self.modules = dict(shadow.named_modules())
        self.names = {module: name for name, module in self.modules.items()}
        self.order: list[str] = []
        ends: list[Any] = []
        try:
            self.graph = self.build(shadow, input_size, ends)
        except Exception as error:  # a graph that is not made for a network fails in any way
            why = (str(error).strip() or "no reason given").splitlines()[0][:160]
            raise ValueError(
                f"the channels of {type(shadow).__name__} can't be followed ({type(error).__name__}: {why})"
            ) from error
        self.nodes = self.graph.module2node
        self.widest = max(max(p.shape[:2]) for p in shadow.parameters() if p.dim())
        self.ends = {id(node) for node in self.nodes.values() if any(node.grad_fn is end for end in ends)}

    def build(self, shadow: nn.Module, input_size: Sequence[int], ends: list[Any]) -> Any:
        """Build the graph from a run of the network on two images of noise."""
        import torch_pruning as tp  # here: it takes 2 s to import

        class Graph(tp.DependencyGraph):
            """Gives up on networks on which it would ask itself the same thing for hours."""

            lookups = 0

            def get_out_channels(self, module_or_node: Any) -> Any:
                self.count()
                return super().get_out_channels(module_or_node)

            def get_in_channels(self, module_or_node: Any) -> Any:
                self.count()
                return super().get_in_channels(module_or_node)

            def count(self) -> None:
                self.lookups += 1
                if self.lookups > LOOKUPS:
                    raise RecursionError("its branches are nested too deep")

        def remember(out: Any) -> Any:
            ends.extend(tensor.grad_fn for tensor in tp.utils.flatten_as_list(out) if isinstance(tensor, Tensor))
            return out

        training = shadow.training
        for parameter in shadow.parameters():
            parameter.requires_grad_(True)  # the graph is autograd's: what learns nothing would not be in it
        images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
        own = [module for module in self.modules.values() if any(True for _ in module.parameters(recurse=False))]
        hooks = [module.register_forward_hook(self.note) for module in own]
        with warnings.catch_warnings(), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            graph = Graph().build_dependency(
                shadow,
                images,
                forward_fn=lambda model, x: model.train(training)(x),
                output_transform=remember,
                verbose=False,
            )
        for hook in hooks:
            hook.remove()
        shadow.train(training)
        return graph

    def note(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Take down that a layer runs."""
        if self.names[module] not in self.order:
            self.order.append(self.names[module])

    def flow(self, root: str, width: int) -> Flow:
        """Follow all output channels of a layer to where they go, and to what is tied to them there."""
        module, found = self.modules[root], Flow([[] for _ in range(width)])
        start = self.graph.get_pruner_of_module(module).prune_out_channels
        begin = {_Index(place, place) for place in range(width)}
        seen: dict[tuple[int, Any], set[_Index]] = defaultdict(set, {(id(self.nodes[module]), start): set(begin)})
        waiting = [(self.nodes[module], start, begin)]
        while waiting:
            node, handler, places = waiting.pop()
            reason = self.enter(found, node, handler, places)
            if reason:
                return Flow(found.units, reason, found.output)
            for dep in node.dependencies:
                if dep.is_triggered_by(handler):
                    moved = self.mapped(dep, places)
                    if moved is None:
                        return Flow(found.units, "they are tied together in a way that is not followed", found.output)
                    new = moved - seen[id(dep.target), dep.handler]
                    if new:
                        seen[id(dep.target), dep.handler] |= new
                        waiting.append((dep.target, dep.handler, new))
        return found

    def enter(self, found: Flow, node: Any, handler: Any, places: set[_Index]) -> str:
        """Take down what places are reached at a node; gives why they can't be removed, or nothing."""
        module = node.module
        pruner = self.graph.get_pruner_of_module(module)
        out = handler == pruner.prune_out_channels
        found.output = found.output or (id(node) in self.ends and (out or module not in self.names))
        if isinstance(module, nn.Parameter):
            return "a parameter that belongs to no known layer has its channels"
        if any(index.root_idx is None for index in places):
            return "they are repeated in a way that is not followed"
        if module not in self.names:  # an operation
            limit = self.widest
        else:
            limit = (pruner.get_out_channels if out else pruner.get_in_channels)(module)
        if limit is not None and not all(0 <= index.idx < limit for index in places):
            return "they are rearranged in a way that is not followed"
        if module in self.names and limit is not None:  # a PReLU of one number has none
            name = self.names[module]
            for index in places:
                found.units[index.root_idx].append(Spot(name, "out" if out else "in", index.idx))
        return ""

    def mapped(self, dep: Any, places: set[_Index]) -> set[_Index] | None:
        """Where places are at the other end of a dependency; None where that would be more than there can be."""
        moved: Sequence[_Index] = sorted(places)
        for mapping in dep.index_mapping:
            if mapping is not None and moved:
                if len(mapping(moved[:1])) * len(moved) > 4 * self.widest:
                    return None
                moved = mapping(moved)
        return {_Index(index.idx, index.root_idx) for index in moved}
