"""Why other counters find another number of parameters than the deployed form stores."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from callbacks.graph import Node
from callbacks.ledger import Array, Ledger
from micronet.other_counters import Paths

# A reason, and what it adds to the other counter's number.
Reasons = Iterator[tuple[str, int]]

NORM_STAYS = "BatchNorm that stays: a factor and a summand a channel here"
NORM_FOLDED = "BatchNorm's parameters, which fold into the layers before"
FOLDED = "constant factors and summands, which fold into layers"
BIASES = "biases that folding gives to layers without one"
SOURCES = "parameters that only constants are computed from"
COMPUTED = "results of what depends on constants alone: stored, though not parameters"
TWICE = "stored twice, since different things fold into the uses of one tensor"
BUFFERS = "buffers: stored, though not parameters"
IN_CODE = "constants in the code: stored, though not parameters"
UNREAD = "parameters that nothing reads"
BLOCKS = "parameters of blocks, or of layers that are not called: its hooks do not see them"
SHARED = "parameters that several layers share: counted for each"


def of_network(model: nn.Module, ledger: Ledger, live: Sequence[Node]) -> Reasons:
    """Say why the count of all parameters is not that of the stored numbers.

    Args:
        model: The network.
        ledger: What it stores.
        live: Its operations that depend on the image.
    """
    params = dict(model.named_parameters())
    name_of = {id(p): name for name, p in params.items()}
    first = {name: name_of[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    constants = [value for node in live for value in node.inputs if value is not None and value.fixed]
    read = {first.get(name, name) for value in constants for name in value.names}
    buffers = dict(model.named_buffers(remove_duplicate=False))
    stay = [line for line in ledger.lines if line.op == "batch_norm" and line.folded is None]
    norms = {first.get(name, name): NORM_FOLDED for name in _read_by_norms(live)}
    norms |= {first.get(name, name): NORM_STAYS for name in _read_by_norms(live, {line.name for line in stay})}
    pairs = {name for line in stay for name in line.arrays}
    stored: set[str] = set()
    made_of: set[str] = set()
    for array in ledger.arrays:
        names = [first.get(name, name) for name in array.name.partition("#")[0].split("+")]
        text = NORM_STAYS if array.name in pairs else _why_stored(array, names, {**params, **buffers})
        if text is None and names[0] not in stored | buffers.keys():
            stored.add(names[0])
            continue
        if text == COMPUTED:
            made_of.update(names)
        yield text or (BUFFERS if names[0] in buffers else TWICE), -array.numel
    for name in params.keys() - stored:
        known = norms.get(name, SOURCES if name in made_of else FOLDED)
        yield known if name in read else UNREAD, params[name].numel()


def _read_by_norms(live: Sequence[Node], names: set[str] | None = None) -> Iterator[str]:
    """The parameters of BatchNorms, or of those with such names."""
    for node in live:
        if node.op == "batch_norm" and (names is None or node.name in names):
            yield from (name for value in node.inputs[1:] if value is not None for name in value.names)


def _why_stored(array: Array, names: Sequence[str], tensors: Mapping[str, Any]) -> str | None:
    """Why something is stored that is no parameter or buffer as it is; None where it is one."""
    if not any(name in tensors for name in names):
        return BIASES if array.role == "bias" else IN_CODE
    if len(names) > 1 or tensors[names[0]].numel() != array.numel:
        return COMPUTED
    return None


def of_layers(model: nn.Module, paths: Paths, ran: set[str]) -> Reasons:
    """Say why the parameters that torchstat's way finds are not all.

    Args:
        model: The network.
        paths: Its modules.
        ran: The layers that are called.
    """
    seen: dict[int, int] = {}
    for path in ran:
        for param in paths.modules[path].parameters():
            seen[id(param)] = seen.get(id(param), 0) + 1
    for param in model.parameters():
        times = seen.get(id(param), 0)
        yield SHARED if times else BLOCKS, (times - 1) * param.numel()
