"""A torch network as a graph of every operation that it runs for one image.

`trace` reads a copy of a module with `torch.export`: layers, functional calls, residual adds; a module called twice is
there twice. `count_ops` gives the graph's lines, each with its cost: `ledger.py` makes them, by `op_formulas.py`.

One trace takes about 0.1 to 1 s, the first in a process 1 s more. No storage is copied and no arithmetic is done.
Hooks are not run, so what a forward hook does to the data is not counted (what torch's weight_norm and prune compute by
hooks is weights, not data). BatchNorm, dropout and extra heads are counted as in eval mode.
"""

import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from callbacks.aten import LITERAL, READERS
from callbacks.aten_call import Call, tensor_of
from callbacks.copies import copied, on_cpu, on_meta
from callbacks.errors import first_line
from callbacks.graph import Graph, Node, Shape, Value
from callbacks.ledger import Line, build
from callbacks.own_tensors import Tensors, bits_of

# Higher-order operations that run their body exactly once.
_WRAPPERS = ("wrap", "wrap_with_autocast", "wrap_with_set_grad_enabled", "wrap_activation_checkpoint")
_WRAPPERS += ("tag_activation_checkpoint",)
_FAKE_QUANTIZE = "micronet.fake_quantize.default"  # of `fake_quantize.py`


class TraceError(ValueError):
    """A module that cannot be traced, so that its cost is unknown."""


class _Reader:
    """Reads the graph of an exported program, in the order in which it runs."""

    def __init__(self, program: torch.export.ExportedProgram, modules: dict[str, nn.Module], tensors: Tensors):
        self.nodes: list[Node] = []
        self.tensors = tensors
        self.made: dict[tuple[Any, ...], Value] = {}
        self.values: dict[fx.Node, Value] = {}
        self.storages: dict[int, Value] = {}
        self.scales: dict[int, Value] = {}  # the step sizes of constants that are codes, by their `id`
        self.modules = modules
        specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        inputs = []
        for node in program.graph.find_nodes(op="placeholder"):
            spec = specs.get(node.name)
            if spec is not None and spec.target is not None:
                self.values[node] = tensors.value(spec.target, tensor_of(node))
            else:
                inputs.append(self.give(node))
        self.read(program.graph_module)
        self.inputs = tuple(inputs)
        (output,) = program.graph.find_nodes(op="output")
        self.outputs = tuple(self.values[node] for node in output.all_input_nodes if node in self.values)

    def give(self, node: fx.Node) -> Value:
        """Enter the value that a node gives; one that shares memory with an earlier one says so."""
        tensor = tensor_of(node)
        if not isinstance(tensor, Tensor):
            tensor = torch.empty(())
        value = Value(shape=tuple(tensor.shape), bits=bits_of(tensor))
        memory = tensor.untyped_storage()._cdata
        value.storage = self.storages.get(memory)
        self.storages.setdefault(memory, value)
        self.values[node] = value
        return value

    def read(self, graph: fx.GraphModule) -> None:
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                tensor = getattr(graph, node.target, None) if "." not in node.target else None
                tensor = self.tensors.attribute(node.target) if tensor is None else tensor
                if isinstance(tensor, Tensor):
                    self.values[node] = self.tensors.value(node.target, tensor)
            elif node.op == "call_function":
                if isinstance(node.target, torch._ops.HigherOrderOperator):
                    self.read_body(graph, node)
                elif str(node.target) == _FAKE_QUANTIZE:
                    self.quantise(node)
                elif isinstance(node.target, torch._ops.OpOverload) and isinstance(tensor_of(node), Tensor):
                    self.nodes.append(self.node(node))
                elif node.target is operator.getitem and node.args[0] in self.values:
                    self.take(node)

    def take(self, node: fx.Node) -> None:
        """One of several results: a part of the first one's memory, or memory of its own."""
        source = self.values[node.args[0]]
        key = ("getitem", id(source), node.args[1])
        if not node.args[1]:
            self.values[node] = source
        elif source.fixed and key in self.made:
            self.values[node] = self.made[key]
        else:
            value = self.made[key] = self.give(node)
            value.fixed, value.literal, value.names = source.fixed, source.literal, source.names
            self.nodes[-1].outputs += (value,)

    def read_body(self, graph: fx.GraphModule, node: fx.Node) -> None:
        """Read what runs inside `torch.autocast`, `torch.no_grad` or a checkpoint."""
        if node.target.name() not in _WRAPPERS:
            raise TraceError(f"no rule for the higher-order operation {node.target.name()}: what runs is not known")
        nodes = [arg for arg in node.args if isinstance(arg, fx.Node)]
        body = getattr(graph, nodes[0].target)
        for inner, outer in zip(body.graph.find_nodes(op="placeholder"), nodes[1:], strict=True):
            self.values[inner] = self.values[outer]
        self.read(body)
        (output,) = body.graph.find_nodes(op="output")
        self.values[node] = self.values[output.all_input_nodes[0]]

    def quantise(self, node: fx.Node) -> None:
        """Numbers rounded to codes, on which their reader computes; constants are rounded beforehand, and stored so."""
        call = Call.of(node)
        x, scale = (self.values[given] for given in call.nodes("x", "scale"))
        low, high = call.args["low"], call.args["high"]
        if x.fixed:
            key = ("codes", id(x), id(scale), low, high)
            if key not in self.made:
                self.made[key] = self.tensors.codes(x, scale, low, high)
            codes = self.values[node] = self.made[key]
            self.scales[id(codes)] = scale
            return
        codes = self.give(node)
        codes.bits = (high - low).bit_length()
        path, kind = self.owner(node, "quantize")
        name = path if path.endswith("quantize") else f"{path}.quantize"  # the layer itself has a line of its name
        attrs = {"zero_point": False, "extra": (scale,)}
        self.nodes.append(Node(op="quantize", inputs=(x,), outputs=(codes,), attrs=attrs, name=name, module=kind))

    def node(self, node: fx.Node) -> Node:
        call = Call.of(node)
        op, read, attrs = READERS[call.op](call) if call.op in READERS else (call.op, call.all_nodes(), {})
        inputs = tuple(self.values.get(n) if n is not None else None for n in read)
        op, inputs, attrs = _with_weights(op, inputs, attrs, len(call.out))
        scales = tuple(self.scales[id(v)] for v in inputs if id(v) in self.scales)
        attrs = attrs | ({"extra": scales} if scales else {})
        given = [v for v in inputs if v is not None]
        if not given and node.all_input_nodes and op != LITERAL:  # or it would pass for a constant
            raise TraceError(f"what {node.target} reads is not known")
        fixed = all(v.fixed for v in given)
        key = (str(node.target), *_called(node.args, self.values), *_called(node.kwargs, self.values))
        if fixed and given and key in self.made:  # the same constant again
            out = self.values[node] = self.made[key]
        else:
            out = self.give(node)
            self.made[key] = out
        out.fixed, out.literal = fixed, all(v.literal for v in given)
        # In place matters where something else reads that memory.
        if call.in_place and not fixed and given[0].fixed:
            self.write(out.memory())
        path, kind = self.owner(node, op)
        return Node(op=op, inputs=inputs, outputs=(out,), attrs=attrs, name=path, module=kind, in_place=call.in_place)

    def write(self, memory: Value) -> None:
        """What is put into a constant's memory makes it depend on the image, by every name it goes by."""
        memory.written = True
        for value in self.values.values():
            if value.memory() is memory:
                value.fixed = value.literal = False

    def owner(self, node: fx.Node, op: str) -> tuple[str, str]:
        """The name of a line and the class of the module that runs it."""
        path, kind = next(reversed((node.meta.get("nn_module_stack") or {"": ("", "")}).values()))
        path = path.split("@")[0]  # conv@1 is the second call of conv
        leaf = path in self.modules and not any(True for _ in self.modules[path].children())
        kind = kind if isinstance(kind, str) else kind.__qualname__
        return path if path and leaf else f"{path}.{op}".lstrip("."), kind.rsplit(".", 1)[-1]


def _called(arguments: Any, values: Mapping[fx.Node, Value]) -> Iterator[Any]:
    """What a call was made with, so that two calls can be compared."""
    if isinstance(arguments, Mapping):
        for name, value in arguments.items():
            yield name
            yield from _called(value, values)
    elif isinstance(arguments, tuple | list):
        yield len(arguments)
        for value in arguments:
            yield from _called(value, values)
    else:
        yield id(values.get(arguments)) if isinstance(arguments, fx.Node) else str(arguments)


def _with_weights(
    op: str, inputs: tuple[Value | None, ...], attrs: dict[str, Any], axes: int
) -> tuple[str, tuple[Value | None, ...], dict[str, Any]]:
    """A matrix product is a linear layer where exactly one factor is constant."""
    if op in ("matmul", "einsum", "addmm") and inputs[0].fixed != inputs[1].fixed:
        a, b, *rest = inputs
        axis = None if op == "einsum" else axes - 2 if a.fixed else axes - 1
        return "linear", (b, a, *rest) if a.fixed else (a, b, *rest), attrs | {"channel_axis": axis}
    return op, inputs, attrs


def _export(model: nn.Module, input_sizes: Sequence[Shape], tensors: Tensors, params: int) -> Graph:
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    images = tuple(torch.empty((1, *size), dtype=first.dtype, device=first.device) for size in input_sizes)
    with warnings.catch_warnings(), torch.no_grad():  # so that a model's own no_grad blocks do not become sub-graphs
        warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)  # what torch's pruning hooks assign
        program = torch.export.export(model, images, strict=False)
    read = _Reader(program, dict(model.named_modules(remove_duplicate=False)), tensors)
    return Graph(nodes=read.nodes, inputs=read.inputs, outputs=read.outputs, params=params)


def _sizes(input_size: Any) -> tuple[Shape, ...]:
    sizes: tuple[Shape, ...] = ()
    if isinstance(input_size, Sequence):
        several = bool(input_size) and all(isinstance(size, Sequence) for size in input_size)
        sizes = tuple(tuple(size) for size in (input_size if several else [input_size]))
    if not sizes or not all(size and all(isinstance(n, int) and n > 0 for n in size) for size in sizes):
        raise ValueError(f"input_size must be positive whole numbers (C, H, W), got {input_size!r}")
    return sizes


def trace(
    model: nn.Module,
    input_size: Sequence[int] | Sequence[Sequence[int]] = (3, 32, 32),
    *,
    masks: Mapping[str, Tensor] | None = None,
) -> Graph:
    """Read a network as a graph, for one image.

    The model is left as it was, and its batch size, mode, device and dtype make no difference.

    Args:
        model: Any module that takes one batch of images, or several inputs.
        input_size: **Shape** of one image, `(C, H, W)`; one for each input where there are several.
        masks: For each masked parameter its mask; None where nothing declares which zeros are meant.

    Raises:
        TraceError: The model cannot be traced, by `torch.export` on the meta device or the CPU.
    """
    sizes = _sizes(input_size)
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):
        raise TraceError(f"{type(model).__name__} has parameters without a shape yet: run it once first")
    tensors, params = Tensors(model, masks), total_params(model)
    try:
        return _export(copied(model, on_meta), sizes, tensors, params)
    except TraceError:
        raise
    except Exception:  # it reads values while it runs, or wants its own dtype: real tensors have both
        try:
            return _export(copied(model, on_cpu), sizes, tensors, params)
        except Exception as error:  # a network's own code can fail in any way
            images = " and ".join(map(str, sizes))
            raise TraceError(
                f"cannot trace {type(model).__name__} with an image of {images}: {first_line(error)}"
            ) from error


def count_ops(model: nn.Module, input_size: Sequence[int] = (3, 32, 32)) -> tuple[Line, ...]:
    """Count what a network runs for one image, operations without a rule at nothing.

    Args:
        model: Any module that takes one batch of images.
        input_size: **Shape** of one image, `(C, H, W)`.

    Raises:
        TraceError: The model cannot be traced.
    """
    return build(trace(model, input_size), allow_unknown=True).lines


def total_params(model: nn.Module) -> int:
    """Count all parameters, BatchNorm's too, shared ones once."""
    return sum(p.numel() for p in model.parameters())
