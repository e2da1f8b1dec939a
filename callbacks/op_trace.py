"""Every operation that a network runs for one image, one line for each, and the fastai entry's score made of them.

`count_ops` traces a copy of a module with `torch.export` and yields one `Line` for every operation that runs: layers,
functional calls, residual adds; a module called twice gives two lines. What each costs is in `op_formulas.py`.
`seed_cost` and `seed_score` say which lines the fastai entry to the MicroNet Challenge (2019) counted, and how.

One trace takes about 0.1 to 1 s, the first in a process 1 s more. No storage is copied and no arithmetic is done.
Hooks are not run, so what a forward hook does to the data is not counted (what torch's weight_norm and prune compute by
hooks is weights, not data). BatchNorm, dropout and extra heads are counted as in eval mode.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node

from callbacks.op_formulas import FORMULAS, Call, Cost, Shape, shape_of, tensor_of

# The MicroNet Challenge's normalisers for CIFAR-100: what WideResNet-28-10 has at 32 bits.
# Source: https://micronet-challenge.github.io/scoring_and_submission.html
CIFAR100_PARAMS, CIFAR100_OPS = 36.5e6, 10.49e9
# The fastai entry halved multiplications, as the challenge's 16-bit "freebie" allows, and left additions at 32 bits.
SEED_MULT_WEIGHT, SEED_ADD_WEIGHT = 0.5, 1.0

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
                elif isinstance(node.target, torch._ops.OpOverload) and isinstance(tensor_of(node), Tensor):
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
        call = Call(op, _arguments(node), shape_of(node), self.fixed)
        cost = FORMULAS.get(op, lambda call: Cost(None))(call)
        weight = call.args[cost.weight] if cost.weight else None
        name, module = self.owner(node, cost.op or op)
        images = [i for i in node.all_input_nodes if i not in self.fixed and isinstance(tensor_of(i), Tensor)]
        return Line(
            name=name,
            op=cost.op or op,
            module=module,
            rule=cost.rule,
            in_shape=_image(shape_of(images[0])) if images else (),
            out_shape=_image(call.out),
            taps=cost.taps,
            weights=math.prod(shape_of(weight)) if weight else 0,
            constants=sum(
                tensor_of(i).numel() for i in node.all_input_nodes if i in self.parameters and i is not weight
            ),
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
    """Copy a module in eval mode, tensors changed instead of copied, hooks and what wraps a forward left out."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for key, value in vars(module).items():
            if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
            for old in _tensors(value):
                if id(old) not in memo:
                    new = change(old.detach())
                    memo[id(old)] = nn.Parameter(new, False) if isinstance(old, nn.Parameter) else new
    copied = copy.deepcopy(model, memo).eval()
    # A callback may have put another function around a module's forward for the time of a fit, as precision.py does.
    # What it does is the fit's and not the network's. torch.export refuses an object there; a function is not copied:
    # it would run the module itself, not the copy. `__wrapped__` is what functools.wraps sets.
    for m in copied.modules():
        if hasattr(vars(m).get("forward"), "__wrapped__"):
            del m.forward  # the class's method shows again
    return copied


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
