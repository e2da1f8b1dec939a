"""What every edit passes before its result is given: its log, replayed, makes the same network; and what it changed.

An edit that should not change the function is refused where it did: relative error of the logits, and top-1, on real
images. Of any other it is told how many images keep their class.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from callbacks.graph import Graph
from callbacks.methods import by_reason, chosen
from callbacks.modules import computes_plainly, plain_weight
from callbacks.op_trace import TraceError
from callbacks.op_trace import trace as trace_graph
from micronet.errors import MicronetError, first_line

TOLERANCE = 1e-4  # of an edit that should change nothing: float32 rounds to 1e-7, and 100 layers add up
MOST = 2  # names that a summary gives for each reason
FEW = 8  # images that show whether two networks of the same weights are one
BATCH = 64  # images that are run at a time


@dataclass(frozen=True)
class Edited:
    """What an edit gives.

    Args:
        model: the changed copy.
        log: plain values; `"edit"` names the function, the rest is what `replay` needs.
        summary: what was done, in one line.
        images: how many images it was checked on.
        kept: how many of them keep their class.
    """

    model: nn.Module
    log: dict[str, Any]
    summary: str
    images: int = 0
    kept: int = 0


Step = Callable[[nn.Module, dict[str, Any]], None]


def checked(
    model: nn.Module,
    changed: nn.Module,
    log: dict[str, Any],
    step: Step,
    summary: str,
    images: Tensor | None,
    *,
    same: bool,
) -> Edited:
    """Check an edit, and say what it did.

    Args:
        model: the network before it.
        changed: the network after it.
        log: its entry.
        step: repeats the entry on a network, in place.
        summary: what was done.
        images: `(N, C, H, W)`, normalised; None to check only that the replayed structure has the same weights.
        same: whether the edit should not have changed the function.

    Raises:
        MicronetError: a check fails.
    """
    replayed = copy.deepcopy(model)
    step(replayed, log)
    try:
        replayed.load_state_dict(changed.state_dict())
    except RuntimeError as error:
        raise MicronetError(f"{log['edit']}: its log gives another network: {first_line(error)}") from error
    if images is None:
        return Edited(changed, log, summary)
    if not torch.equal(*(_logits(network, images[:FEW], log["edit"]) for network in (replayed, changed))):
        raise MicronetError(f"{log['edit']}: replayed from its log, the network answers otherwise")
    before, after = (_logits(network, images, log["edit"]) for network in (model, changed))
    kept = int((before.argmax(1) == after.argmax(1)).sum())
    if same:
        _require_same(before, after, kept, log["edit"])
    answer = "all" if kept == len(images) else f"{kept:,}"
    return Edited(changed, log, f"{summary}; {answer} of {len(images):,} images keep their class", len(images), kept)


def _require_same(before: Tensor, after: Tensor, kept: int, edit: str) -> None:
    error = float(((after - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-30)).max())
    if not error <= TOLERANCE or kept < len(before):
        raise MicronetError(
            f"{edit} should not change what the network answers, and did (on {len(before):,} images: relative error "
            f"{error:.2g}, at most {TOLERANCE:g} is allowed; {kept:,} keep their class): nothing was kept"
        )


def _logits(model: nn.Module, images: Tensor, edit: str) -> Tensor:
    model = copy.deepcopy(model).eval()  # not the network's own mode
    device = next((p.device for p in model.parameters()), images.device)
    try:
        with torch.no_grad():
            return torch.cat([model(batch.to(device)) for batch in images.split(BATCH)]).double()
    except Exception as error:  # a network that another part of its program reads can fail in any way once changed
        raise MicronetError(f"{edit}: the network does not run on the images: {first_line(error)}") from error


def trace(model: nn.Module, size: Sequence[int], edit: str) -> Graph:
    """Read a network as a graph.

    Raises:
        MicronetError: it can't be traced.
    """
    try:
        return trace_graph(model, size)
    except TraceError as error:
        raise MicronetError(f"{edit}: {error}") from error


def size_of(images: Tensor | None, input_size: Sequence[int] | None, edit: str) -> tuple[int, ...]:
    """The **shape** of one image, `(C, H, W)`.

    Raises:
        MicronetError: neither is given.
    """
    if images is None and input_size is None:
        raise MicronetError(f"{edit} traces the network: give images, or input_size=(C, H, W)")
    return tuple(images.shape[1:] if input_size is None else input_size)


def layers_for(
    method: str, model: nn.Module, layers: Iterable[str] | None, leave: Callable[[nn.Module], str] = lambda layer: ""
) -> tuple[dict[str, nn.Module], list[str]]:
    """The layers that an edit takes, by `callbacks/methods.py`'s table, and a line on each one that it skips.

    Args:
        method: its name in the table.
        model: the network.
        layers: the user's choice; None for all that the method applies to.
        leave: why a layer that the table allows is to be left alone, unless it is named; empty where it is not.

    Raises:
        MicronetError: a layer does not exist, or is named and can't be taken; there is none to take.
    """
    if isinstance(layers, str):
        raise MicronetError(f"{method}: layers must be a list of names, got the text {layers!r}")
    try:
        found, skipped = chosen(method, model, layers)
    except ValueError as error:
        raise MicronetError(str(error)) from error
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for name, layer in list(found.items()):
        reason = _unsuited(layer, uses) if name else "a part can be replaced, not the whole"
        if reason and layers is not None:
            raise MicronetError(f"{method} does not work on {name or 'the network'}: {reason}")
        reason = reason or ("" if layers is not None else leave(layer))
        if reason:
            skipped.append(f"{name}: {reason}")
            del found[name]
    if not found:
        raise MicronetError(f"{method}: there is no layer that it applies to ({by_reason(skipped, MOST)})")
    return found, skipped


def _unsuited(layer: nn.Module, uses: dict[int, int]) -> str:
    """Why a layer can't be replaced by others; empty where it can."""
    if not computes_plainly(layer):
        return f"it is a {type(layer).__name__}, whose forward may be its own"
    if not plain_weight(layer):
        return "its weights are calculated from others"
    return "its weights are another layer's, too" if uses[id(layer.weight)] > 1 else ""


def staying(skipped: Sequence[str]) -> str:
    """What an edit's summary says of what it left; empty where it left nothing."""
    return f"; {len(skipped)} stay: {by_reason(skipped, MOST)}" if skipped else ""
