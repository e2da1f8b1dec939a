"""What torchstat, fvcore and torch's FlopCounterMode count, each beside the module that ran it.

All run on copies of the network, in eval mode, on one black image. Nothing of torch is changed for good: torchstat's
own `stat` and `ModelHook` would replace `__call__` on torch's classes for the whole process, so only its formulas are
used, by hooks of our own.
"""

import importlib
import io
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from callbacks.copies import copied, on_cpu, on_meta
from micronet.errors import MicronetError, first_line
from micronet.model_source import ModelSource
from micronet.named_networks import DEFAULT_SIZE


class Paths:
    """The modules of a network by their paths; one that goes by several paths is known by its first.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module):
        self.modules = dict(model.named_modules(remove_duplicate=False))
        seen: dict[int, str] = {}
        self.first = {path: seen.setdefault(id(module), path) for path, module in self.modules.items()}

    def layer(self, path: str) -> nn.Module | None:
        """The module at a path, if it has no children; those are what torchstat counts."""
        module = self.modules.get(path)
        return None if module is None or next(module.children(), None) is not None else module

    def owner(self, name: str, op: str, kind: str) -> str:
        """The path of the module that runs an operation.

        Args:
            name: Of a line or node: the layer's path, or the block's path and the operation.
            op: The operation.
            kind: Class of the module that runs it.
        """
        path = name
        if type(self.layer(name)).__qualname__.rsplit(".", 1)[-1] != kind:
            path = name.removesuffix(op).removesuffix(".")
        return self.first.get(path, path)


@dataclass
class Told:
    """What one of torchstat's two formulas says.

    Args:
        counts: By the layer's path, summed over its calls; only layers that it has a formula for.
        unknown: Layers that it has no formula for.
        refused: Layers that it has a formula for, but not for such an input.
    """

    counts: Counter[str] = field(default_factory=Counter)
    unknown: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)

    def add(self, formula: Callable[..., int], path: str, module: nn.Module, given: Any, out: Any) -> None:
        """Ask the formula for one call of a layer."""
        said = io.StringIO()
        try:
            with redirect_stdout(said):  # it prints what it does not know
                count = int(formula(module, given, out))
        except Exception:  # it asserts what shapes it takes, and takes every input for one tensor
            self.refused.add(path)
            return
        if said.getvalue():
            self.unknown.add(path)
        else:
            self.counts[path] += count


@dataclass
class Watched:
    """What came of one run under hooks.

    Args:
        flops: torchstat's "Flops", which are multiply-accumulates for convolutions and linear layers.
        madd: torchstat's "MAdd": multiplications and additions.
        params: Parameters that torchstat's way finds: those of layers that are called.
        ran: Layers that are called.
        macs: Half of what FlopCounterMode counts, by the module that runs it, its children's left out.
        macs_total: Half of what FlopCounterMode counts.
    """

    flops: Told = field(default_factory=Told)
    madd: Told = field(default_factory=Told)
    params: int = 0
    ran: set[str] = field(default_factory=set)
    macs: Counter[str] = field(default_factory=Counter)
    macs_total: int = 0


@dataclass
class Fvcore:
    """What fvcore says.

    Args:
        params: Parameters.
        total: All that it counts.
        counts: By the module that runs it, its children's left out, and by operator.
        unknown: Operators that it has no formula for, by the module that runs them.
    """

    params: int
    total: int
    counts: dict[str, Counter[str]]
    unknown: dict[str, Counter[str]]


def real_copy(source: ModelSource) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Copy a network with real tensors, zeros where it has no weights, and make the images that it takes.

    Args:
        source: The network.
    """
    return _copy(source, on_cpu)


def _copy(source: ModelSource, change: Callable[[Tensor], Tensor]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = copied(getattr(source.module, "_orig_mod", source.module), change)  # torch.compile's wrapper
    size = source.input_size or DEFAULT_SIZE
    sizes = size if isinstance(size[0], Sequence) else (size,)
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return model, tuple(torch.zeros((1, *each), dtype=first.dtype, device=first.device) for each in sizes)


@contextmanager
def _quietly() -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused call would hide what nn.Transformer's layers do
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def watch(source: ModelSource) -> Watched:
    """Run a network once under FlopCounterMode and hooks that ask torchstat's formulas.

    Args:
        source: The network.

    Raises:
        MicronetError: It can't be run.
    """
    try:
        return _watch(*_copy(source, on_meta))
    except Exception:  # it reads values while it runs
        try:
            return _watch(*real_copy(source))
        except Exception as error:  # its own code
            raise MicronetError(
                f"{source.name}: can't be run for the cross-check: {first_line(error)[:200]}"
            ) from error


def _watch(model: nn.Module, images: tuple[Tensor, ...]) -> Watched:
    # As attributes of the package, functions of the same names hide these modules.
    compute_madd = importlib.import_module("torchstat.compute_madd").compute_madd
    compute_flops = importlib.import_module("torchstat.compute_flops").compute_flops
    seen, counter, paths = Watched(), FlopCounterMode(display=False), Paths(model)
    path_of = {id(module): paths.first[path] for path, module in paths.modules.items()}
    running: list[list[int]] = []  # for each module that runs: the count when it began, its children's count

    def before(module: nn.Module, args: Any) -> None:
        running.append([counter.get_total_flops(), 0])

    def after(module: nn.Module, args: Any, out: Any) -> None:
        path = path_of[id(module)]
        began, inner = running.pop()
        own = counter.get_total_flops() - began
        seen.macs[path] += (own - inner) // 2
        if running:
            running[-1][1] += own
        if paths.layer(path) is None:
            return
        if path not in seen.ran:
            seen.ran.add(path)
            seen.params += sum(p.numel() for p in module.parameters())
        given = args[0] if len(args) == 1 else args
        seen.madd.add(compute_madd, path, module, given, out)
        seen.flops.add(compute_flops, path, module, given, out)

    for module in model.modules():
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    # The fused attention kernels of a CPU have no formula there; this one is two matrix products, which have.
    with _quietly(), sdpa_kernel(SDPBackend.MATH), counter:
        model(*images)
    seen.macs_total = counter.get_total_flops() // 2
    return seen


def ask_fvcore(model: nn.Module, images: tuple[Tensor, ...], paths: Paths) -> Fvcore | str:
    """Count a network with fvcore; without it, or where it fails, say why there is no count.

    Args:
        model: The network, with real tensors.
        images: What it takes.
        paths: Its modules.
    """
    try:
        with _quietly():
            from fvcore.nn import FlopCountAnalysis, parameter_count
    except ImportError:
        return "not installed: pip install fvcore"
    try:
        with _quietly():
            analysis = FlopCountAnalysis(model, images)
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
            counts, total = analysis.by_module_and_operator(), int(analysis.total())
            unknown = {path: analysis.unsupported_ops(path) for path in counts}
    except Exception as error:  # it traces with torch.jit, and its formulas assert what shapes they take
        return f"fails on this network: {first_line(error)[:100]}"
    return Fvcore(parameter_count(model)[""], total, _own(counts, paths), _own(unknown, paths))


def _own(counts: dict[str, Counter[str]], paths: Paths) -> dict[str, Counter[str]]:
    """Take what children run from what fvcore says of each module."""
    own: dict[str, Counter[str]] = defaultdict(Counter)
    for path, count in counts.items():
        whole = {op: int(n) for op, n in count.items()}  # some of its formulas give floats
        own[paths.first[path]].update(whole)
        if path:
            own[paths.first[path.rpartition(".")[0]]].subtract(whole)
    return own
