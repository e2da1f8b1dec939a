"""Count what a network costs for one image, and show a score while it trains.

What: `count_ops` traces a copy of a module and yields one `Line` for every operation that runs: layers, functional
calls, residual adds; a module called twice gives two lines. `OpCounter` puts a score made of these lines into fastai's
training table.
When: to know parameters, multiplications and additions before, while and after a network is made smaller.
Cost: one trace, about 0.1 to 1 s, the first in a process 1 s more; while training, at the first batch and then only
when the structure has changed. No storage is copied and no arithmetic is done.
Interactions: hooks are not run, so what a forward hook does to the data is not counted (what torch's weight_norm and
prune compute by hooks is weights, not data). BatchNorm, dropout and extra heads are counted as in eval mode.
Source: the formulas of torchstat 0.0.7, compute_madd.py, written anew so that multiplications and additions come back
apart; the fastai entry to the MicroNet Challenge (2019) changed its lines 27 and 124 to that end. A comparison
(ReLU, max pooling), a division and an exponential count as one multiplication.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.learner import Learner, ValueMetric
from fastai.torch_core import get_model
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node

Shape = tuple[int, ...]

# The MicroNet Challenge's normalisers for CIFAR-100: what WideResNet-28-10 has at 32 bits.
# Source: https://micronet-challenge.github.io/scoring_and_submission.html
CIFAR100_PARAMS, CIFAR100_OPS = 36.5e6, 10.49e9
# The fastai entry halved multiplications, as the challenge's 16-bit "freebie" allows, and left additions at 32 bits.
SEED_MULT_WEIGHT, SEED_ADD_WEIGHT = 0.5, 1.0

# Operations that only move, choose or relabel numbers.
_MOVES = (
    "_to_copy _unsafe_view alias cat channel_shuffle chunk clone concat concatenate constant_pad_nd contiguous copy "
    "detach empty expand expand_as flatten flip full full_like gather hstack identity index index_select lift_fresh "
    "movedim narrow new_full new_ones new_zeros ones ones_like pad permute pixel_shuffle pixel_unshuffle ravel "
    "reflection_pad2d repeat replication_pad2d reshape reshape_as resolve_conj resolve_neg roll select slice split "
    "split_with_sizes squeeze stack swapaxes swapdims t tile to transpose type_as unbind unflatten unsafe_chunk "
    "unsafe_split unsqueeze upsample_nearest2d view view_as vstack zeros zeros_like"
)
# Higher-order operations that run their body exactly once.
_WRAPPERS = ("wrap", "wrap_with_autocast", "wrap_with_set_grad_enabled", "wrap_activation_checkpoint")
_WRAPPERS += ("tag_activation_checkpoint",)


class TraceError(ValueError):
    """A module that cannot be traced, so that its cost is unknown."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One operation, as it runs for one image.

    Args:
        name: Path of the module that runs it, such as `groups.0.conv1`; for what a block does in its own `forward`,
            the block's path and the operation (`groups.0.add`).
        op: The operation in ATen's name (`conv2d`, `linear`, `batch_norm`, `add`, `mul`, `cat`, ...), and
            `global_avg_pool` for every way to average whole maps, `relu6` for a hardtanh from 0 to 6.
        module: Class of that module: `Conv2d`.
        rule: The formula that gave `mults` and `adds`: `move` where nothing is calculated; None where no formula here
            covers the operation, so that its zeros mean "not counted".
        in_shape: **Shape** of the input, without a batch axis of 1.
        out_shape: **Shape** of the output, likewise.
        taps: Products or terms that make one output: `kh*kw*C/groups`, input features, window; 0 where it says nothing.
        weights: Weight elements of a convolution, linear or bilinear layer. A tensor that two lines read is in both.
        constants: Elements of other parameters read: biases, scale and shift of a BatchNorm.
        mults: Multiplications.
        adds: Additions.
        macs: Multiply-accumulates of convolutions and linear layers.
        tensors: Names of the parameters and buffers read, directly or through operations on them alone.
    """

    name: str
    op: str
    module: str
    rule: str | None
    in_shape: Shape
    out_shape: Shape
    taps: int = 0
    weights: int = 0
    constants: int = 0
    mults: int = 0
    adds: int = 0
    macs: int = 0
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Cost:
    """What a formula says of one call; `weight` names the argument that holds the weights, `op` renames the call."""

    rule: str | None
    mults: int = 0
    adds: int = 0
    taps: int = 0
    macs: int = 0
    weight: str | None = None
    op: str | None = None


@dataclass(frozen=True)
class _Call:
    """One call in the graph: its arguments by name, and which nodes depend on parameters and buffers alone."""

    op: str
    args: dict[str, Any]
    out: Shape
    fixed: Mapping[Node, tuple[str, ...]]

    @property
    def n(self) -> int:
        return math.prod(self.out)

    def shape(self, arg: str) -> Shape:
        return _shape(self.args[arg])


def _conv(call: _Call) -> _Cost:
    if call.args.get("transposed"):  # torch.convolution, which is both
        return _conv_transpose(call)
    taps = math.prod(call.shape("weight")[1:])
    adds = taps - 1 + (call.args["bias"] is not None)
    return _Cost("conv", taps * call.n, adds * call.n, taps, taps * call.n, "weight")


def _conv_transpose(call: _Call) -> _Cost:
    # torchstat's formula goes by *input* positions. So its multiplications are those of every weight at every input
    # position, but its additions are not the ones that run: the bias belongs to output positions.
    c_in, c_out, *kernel = call.shape("weight")
    groups = call.args["groups"]
    taps, n = math.prod(kernel) * (c_in // groups), math.prod(call.shape("input")) // c_in * c_out * groups
    adds = taps - 1 + (call.args["bias"] is not None)
    return _Cost("conv_transpose", taps * n, adds * n, taps, taps * n, "weight")


def _linear(call: _Call, features: str = "weight", weight: str = "weight") -> _Cost:
    # The bias is left out, as in torchstat.
    taps = call.shape(features)[-1]
    return _Cost("linear", taps * call.n, (taps - 1) * call.n, taps, taps * call.n, weight)


def _matmul(call: _Call) -> _Cost:
    """A linear layer where exactly one factor is weights; the product of two activations has no formula here."""
    factors = [name for name, value in call.args.items() if isinstance(value, Node)][-2:]
    weight = [name for name in factors if call.args[name] in call.fixed]
    return _linear(call, factors[0], weight[0]) if len(weight) == 1 else _Cost(None)


def _bilinear(call: _Call) -> _Cost:
    # torchstat: in1*in2 + in2 products for one output; the bias is left out.
    _, in1, in2 = call.shape("weight")
    taps = in1 * in2 + in2
    return _Cost("bilinear", taps * call.n, (taps - 1) * call.n, taps, weight="weight")


def _batch_norm(call: _Call) -> _Cost:
    # Subtract the mean, divide by the deviation, multiply by the scale, add the shift.
    return _Cost("batch_norm", 2 * call.n, 2 * call.n)


def _relu(call: _Call) -> _Cost:
    if call.op == "hardtanh":
        six = (call.args["min_val"], call.args["max_val"]) == (0, 6)
        return _Cost("relu", call.n, op="relu6") if six else _Cost(None)
    return _Cost("relu", call.n)


def _softmax(call: _Call) -> _Cost:
    # torchstat: an exponential and a division per element, one sum over all of them, however many rows there are.
    return _Cost("softmax", 2 * call.n, call.n - 1)


def _window(call: _Call) -> Shape:
    axes = int(call.op.split("pool")[1][0])  # max_pool2d_with_indices
    kernel = tuple(call.args["kernel_size"])
    return kernel * axes if len(kernel) == 1 else kernel


def _max_pool(call: _Call) -> _Cost:
    taps = math.prod(_window(call))
    return _Cost("max_pool", (taps - 1) * call.n, taps=taps)


def _average(call: _Call, window: Shape, whole: bool) -> _Cost:
    taps = math.prod(window)
    return _Cost("avg_pool", call.n, (taps - 1) * call.n, taps, op="global_avg_pool" if whole else None)


def _avg_pool(call: _Call) -> _Cost:
    window = _window(call)
    axes = len(window)
    return _average(call, window, call.shape("self")[-axes:] == window and math.prod(call.out[-axes:]) == 1)


def _adaptive_avg_pool(call: _Call) -> _Cost:
    axes = len(call.args["output_size"])
    sizes = list(zip(call.shape("self")[-axes:], call.out[-axes:], strict=True))
    if any(size % pooled for size, pooled in sizes):
        return _Cost(None)  # windows of several sizes
    return _average(call, tuple(size // pooled for size, pooled in sizes), all(pooled == 1 for _, pooled in sizes))


def _mean(call: _Call) -> _Cost:
    """A global average pool where it averages the two axes of every map, or the one they were flattened to."""
    shape, source = call.shape("self"), call.args["self"]
    axes = {axis % len(shape) for axis in call.args.get("dim") or ()}
    before = _shape(source.args[0]) if source.target in _FLATTENS else ()
    flattened = len(shape) == 3 and axes == {2} and len(before) == 4 and before[:2] == shape[:2]
    if flattened or (len(shape) == 4 and axes in ({2, 3}, {1, 2})):
        return _average(call, tuple(shape[axis] for axis in axes), True)
    return _Cost(None)


def _dropout(call: _Call) -> _Cost:
    return _Cost(None if call.args["train"] else "move")


_FLATTENS = (torch.ops.aten.flatten.using_ints, torch.ops.aten.view.default, torch.ops.aten.reshape.default)
_FORMULAS: dict[str, Callable[[_Call], _Cost]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "_convolution"), _conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv_transpose),
    **dict.fromkeys(("mm", "addmm", "matmul", "bmm", "baddbmm", "mv", "addmv"), _matmul),
    **dict.fromkeys(("relu", "relu6", "hardtanh"), _relu),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), _max_pool),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices"), _max_pool),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _avg_pool),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), _adaptive_avg_pool),
    **dict.fromkeys(("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"), _dropout),
    **dict.fromkeys(_MOVES.split(), lambda call: _Cost("move")),
    **{"linear": _linear, "bilinear": _bilinear, "batch_norm": _batch_norm, "softmax": _softmax, "mean": _mean},
}


def _shape(node: Node) -> Shape:
    return tuple(_tensor(node).shape)


def _tensor(node: Node) -> Tensor | None:
    """The tensor a node gives, or the first of several."""
    value = node.meta.get("val")
    return next((v for v in value if isinstance(v, Tensor)), None) if isinstance(value, tuple | list) else value


def _image(shape: Shape) -> Shape:
    return shape[1:] if shape[:1] == (1,) else shape


class _Reader:
    """Reads the graph of an exported program, in the order in which it runs."""

    def __init__(self, program: torch.export.ExportedProgram, modules: dict[str, nn.Module]):
        self.lines: list[Line] = []
        self.modules = modules
        inputs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if spec.target}
        known = {node: inputs[node.name] for node in program.graph.nodes if node.name in inputs}
        self.fixed = {node: (spec.target,) for node, spec in known.items()}
        self.parameters = {node for node, spec in known.items() if spec.kind is InputKind.PARAMETER}
        self.read(program.graph_module)

    def read(self, graph: GraphModule) -> None:
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                self.fixed[node] = ()
            elif node.op == "call_function":
                if isinstance(node.target, torch._ops.HigherOrderOperator):
                    self.read_body(graph, node)
                elif isinstance(node.target, torch._ops.OpOverload) and isinstance(_tensor(node), Tensor):
                    self.lines.append(self.line(node))
                if all(i in self.fixed for i in node.all_input_nodes):
                    self.fixed[node] = self.names(node)

    def read_body(self, graph: GraphModule, node: Node) -> None:
        """Read what runs inside `torch.autocast`, `torch.no_grad` or a checkpoint."""
        if node.target.name() not in _WRAPPERS:
            raise TraceError(f"no rule for the higher-order operation {node.target.name()}: what runs is not known")
        nodes = [arg for arg in node.args if isinstance(arg, Node)]
        body = getattr(graph, nodes[0].target)
        for inner, outer in zip(body.graph.find_nodes(op="placeholder"), nodes[1:], strict=True):
            if outer in self.fixed:
                self.fixed[inner] = self.fixed[outer]
            if outer in self.parameters:
                self.parameters.add(inner)
        self.read(body)

    def names(self, node: Node) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for i in node.all_input_nodes for name in self.fixed.get(i, ())))

    def line(self, node: Node) -> Line:
        op = node.target._schema.name.removeprefix("aten::").replace("::", ".")
        op = op.rstrip("_")  # relu_ is relu in place
        call = _Call(op, _arguments(node), _shape(node), self.fixed)
        cost = _FORMULAS.get(op, lambda call: _Cost(None))(call)
        weight = call.args[cost.weight] if cost.weight else None
        name, module = self.owner(node, cost.op or op)
        images = [i for i in node.all_input_nodes if i not in self.fixed and isinstance(_tensor(i), Tensor)]
        return Line(
            name=name,
            op=cost.op or op,
            module=module,
            rule=cost.rule,
            in_shape=_image(_shape(images[0])) if images else (),
            out_shape=_image(call.out),
            taps=cost.taps,
            weights=math.prod(_shape(weight)) if weight else 0,
            constants=sum(_tensor(i).numel() for i in node.all_input_nodes if i in self.parameters and i is not weight),
            mults=cost.mults,
            adds=cost.adds,
            macs=cost.macs,
            tensors=self.names(node),
        )

    def owner(self, node: Node, op: str) -> tuple[str, str]:
        """The name of a line and the class of the module that runs it."""
        path, kind = next(reversed((node.meta.get("nn_module_stack") or {"": ("", "")}).values()))
        path = path.split("@")[0]  # conv@1 is the second call of conv
        leaf = path in self.modules and not any(True for _ in self.modules[path].children())
        kind = kind if isinstance(kind, str) else kind.__qualname__
        return path if path and leaf else f"{path}.{op}".lstrip("."), kind.rsplit(".", 1)[-1]


def _arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call by their names in ATen's schema, defaults filled in."""
    declared = node.target._schema.arguments
    given = dict(zip((a.name for a in declared), node.args, strict=False)) | node.kwargs
    return {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in declared}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _copied(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Copy a module in eval mode, its tensors changed instead of copied, its hooks left out."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for key, value in vars(module).items():
            if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
            for old in _tensors(value):
                if id(old) not in memo:
                    new = change(old.detach())
                    memo[id(old)] = nn.Parameter(new, False) if isinstance(old, nn.Parameter) else new
    return copy.deepcopy(model, memo).eval()


def _on_meta(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device="meta")


def _on_cpu(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor.to("cpu", copy=True)


def _export(model: nn.Module, input_size: Shape) -> tuple[Line, ...]:
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    image = torch.empty((1, *input_size), dtype=first.dtype, device=first.device)
    with torch.no_grad():  # so that a model's own no_grad blocks do not become sub-graphs
        program = torch.export.export(model, (image,), strict=False)
    return tuple(_Reader(program, dict(model.named_modules(remove_duplicate=False))).lines)


def count_ops(model: nn.Module, input_size: Sequence[int] = (3, 32, 32)) -> tuple[Line, ...]:
    """Count every operation that a network runs for one image.

    The model is left as it was, and its batch size, mode, device and dtype make no difference.

    Args:
        model: Any module that takes one batch of images.
        input_size: **Shape** of one image, `(C, H, W)`.

    Raises:
        TraceError: The model cannot be traced, by `torch.export` on the meta device or the CPU.
    """
    size = tuple(input_size)
    if not size or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"input_size must be positive whole numbers (C, H, W), got {input_size!r}")
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):
        raise TraceError(f"{type(model).__name__} has parameters without a shape yet: run it once first")
    try:
        return _export(_copied(model, _on_meta), size)
    except TraceError:
        raise
    except Exception:  # it reads values while it runs, or wants its own dtype: real tensors have both
        try:
            return _export(_copied(model, _on_cpu), size)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TraceError(f"cannot trace {type(model).__name__} with an image of {size}: {reason}") from error


def total_params(model: nn.Module) -> int:
    """Count all parameters, BatchNorm's too, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def seed_cost(line: Line) -> tuple[int, int]:
    """Count the multiplications and additions of one line as the fastai entry to the MicroNet Challenge did.

    Convolutions, linear layers and global average pools count, nothing else. A global average pool of `(C, H, W)` is
    C multiplications and H*W*C additions, one more per channel than there are.
    """
    if line.op == "global_avg_pool":
        n = math.prod(line.out_shape)
        return n, line.taps * n
    return (line.mults, line.adds) if line.rule in ("conv", "conv_transpose", "linear") else (0, 0)


def seed_score(params: int, lines: Sequence[Line]) -> float:
    """Score a network as the fastai entry did: `params / 36.5e6 + (mults / 2 + adds) / 10.49e9`.

    Args:
        params: Count of all parameters.
        lines: What `count_ops` gives.
    """
    mults, adds = (sum(counts) for counts in zip((0, 0), *map(seed_cost, lines), strict=True))
    return params / CIFAR100_PARAMS + (SEED_MULT_WEIGHT * mults + SEED_ADD_WEIGHT * adds) / CIFAR100_OPS


def _structure(model: nn.Module) -> tuple[Any, ...]:
    """What changes when layers are swapped, removed or resized."""
    modules = tuple((name, type(m), m.extra_repr()) for name, m in model.named_modules())
    return modules, tuple((name, p.shape) for name, p in model.named_parameters())


class OpCounter(Callback):
    """Show a score, counted on the network as it stands, as the column `score` of the training table.

    Args:
        score: Takes the count of parameters and the lines of `count_ops`, returns the number to show.
        input_size: **Shape** of one image, `(C, H, W)`; None takes it from each batch as it comes.
    """

    order = 45  # before Recorder (50), which reads the metrics' names in its before_fit

    def __init__(
        self,
        score: Callable[[int, Sequence[Line]], float] = seed_score,
        input_size: Sequence[int] | None = None,
    ):
        self._score, self._fixed_size = score, input_size
        self._column = ValueMetric(self._value, "score")
        self._forget()

    def _forget(self) -> None:
        self._size, self._counted, self._shown = self._fixed_size, None, None

    def __setattr__(self, name: str, value: Any) -> None:
        """Take the column away, too, when the callback is removed: an aborted fit has no other moment for it."""
        if name == "learn" and value is None and self.learn is not None:
            self._remove_column(self.learn)
        super().__setattr__(name, value)

    def _remove_column(self, learn: Learner) -> None:
        learn.metrics = [metric for metric in learn.metrics if metric is not self._column]

    def before_fit(self) -> None:
        """Add the column, after taking away what an aborted fit left."""
        self._remove_column(self.learn)
        self._forget()
        self.learn.metrics = [*self.learn.metrics, self._column]

    def before_batch(self) -> None:
        """Note the size of the images; a network that cannot be traced fails at the first batch."""
        if self._fixed_size is None:
            self._size = tuple(self.xb[0].shape[1:])
        if self._counted is None:
            self._value()

    def after_fit(self) -> None:
        """Take the column away."""
        self._remove_column(self.learn)

    def _value(self) -> float | None:
        if self._size is None:  # no batch came
            return None
        model = get_model(self.learn.model)
        structure = self._size, _structure(model)
        if structure != self._counted:
            self._shown = self._score(total_params(model), count_ops(model, self._size))
            self._counted = structure
        return self._shown
