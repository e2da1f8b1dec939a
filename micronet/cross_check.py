"""What torchstat, fvcore and torch's FlopCounterMode count, beside ours, with a reason for every difference.

A reason's number comes from what our formulas say of the operations concerned, or from what the other counter itself
books under a name. What such numbers leave over in a module is put down to operations that we have no rule for, where
it runs any, and is else shown as not explained.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rich.markup import escape
from rich.table import Table

from callbacks.ledger import Ledger
from micronet.cross_macs import Amount, Network, flop_counter, fvcore, torchstat_flops, torchstat_madd
from micronet.cross_params import of_layers, of_network
from micronet.errors import MicronetError
from micronet.model_source import ModelSource
from micronet.other_counters import Paths, ask_fvcore, real_copy, watch


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why another counter's number is not ours.

    Args:
        text: In words.
        amount: What it adds to the other's number; negative where it takes away.
    """

    text: str
    amount: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number of another counter beside ours.

    Args:
        counter: Whose.
        what: `parameters`, `MACs` or `mults + adds`.
        ours: Ours. Parameters: the numbers that the deployed form stores.
        theirs: Theirs; None where there is none.
        reasons: Why they differ.
        unexplained: What the reasons leave over, by the path of the module.
        note: Why there is no number of theirs.
    """

    counter: str
    what: str
    ours: int
    theirs: int | None = None
    reasons: tuple[Reason, ...] = ()
    unexplained: Mapping[str, int] = field(default_factory=dict)
    note: str = ""


def cross_check(source: ModelSource, ledger: Ledger) -> list[Row]:
    """Put other counters' numbers beside ours, and say why they differ.

    Copies of the network are traced, and one runs on the CPU; it is left as it was.

    Args:
        source: The network.
        ledger: What we count.

    Raises:
        MicronetError: It is an ONNX file, or can't be run.
    """
    if source.module is None:
        raise MicronetError(f"{source.name}: the cross-check needs the network as a torch module, not as an ONNX file")
    model, images = real_copy(source)
    paths = Paths(model)
    net, seen, other = Network(source, ledger, paths), watch(source), ask_fvcore(model, images, paths)
    macs, stored = net.macs(), {"": sum(array.numel for array in ledger.arrays)}
    params = [("", text, amount) for text, amount in of_network(model, ledger, net.live)]
    found = {"": sum(p.numel() for p in model.parameters())}
    hooked = [("", text, amount) for text, amount in of_layers(model, paths, seen.ran)]
    if isinstance(other, str):
        fvcore_rows = [
            Row(counter="fvcore", what=what, ours=sum(ours.values()), note=other)
            for what, ours in (("parameters", stored), ("MACs", macs))
        ]
    else:
        theirs = {path: sum(counts.values()) for path, counts in other.counts.items()}
        fvcore_rows = [
            _row("fvcore", "parameters", stored, {"": other.params}, params),
            _row("fvcore", "MACs", macs, theirs, fvcore(net, other), net.unruled, other.total),
        ]
    half, flops, madd = "FlopCounterMode / 2", seen.flops, seen.madd
    return [
        _row("torchstat", "parameters", stored, {"": seen.params}, params + hooked),
        fvcore_rows[0],
        _row("torch", "parameters", stored, found, params),
        _row("torchstat", "MACs", macs, flops.counts, torchstat_flops(net, flops), net.unruled),
        fvcore_rows[1],
        _row(half, "MACs", macs, seen.macs, flop_counter(net), net.unruled, seen.macs_total),
        _row("torchstat", "mults + adds", net.operations(), madd.counts, torchstat_madd(net, madd), net.unruled),
    ]


def _row(
    counter: str,
    what: str,
    ours: Mapping[str, int],
    theirs: Mapping[str, int],
    amounts: Iterable[Amount],
    unruled: Mapping[str, str] | None = None,
    total: int | None = None,
) -> Row:
    """Compare module by module, so that no error hides another."""
    unruled = unruled or {}
    left = Counter(theirs)
    left.subtract(ours)
    reasons: list[tuple[str, int]] = []
    for path, text, amount in amounts:
        left[path] -= amount
        reasons.append((text, amount))
    # Where we have no rule for what a module runs, that is what its count leaves over.
    reasons += [(unruled[path], amount) for path, amount in left.items() if path in unruled]
    unexplained = {path: amount for path, amount in left.items() if amount and path not in unruled}
    whole = sum(theirs.values())
    if total not in (None, whole):
        unexplained["outside all modules"] = total - whole
    return Row(
        counter=counter,
        what=what,
        ours=sum(ours.values()),
        theirs=whole if total is None else total,
        reasons=_gathered(reasons),
        unexplained=unexplained,
    )


def _gathered(reasons: Iterable[tuple[str, int]]) -> tuple[Reason, ...]:
    """One reason for each text, the weightiest first; what cancels out is none."""
    amounts: dict[str, int] = defaultdict(int)
    for text, amount in reasons:
        amounts[text] += amount
    told = [Reason(text=text, amount=amount) for text, amount in amounts.items() if amount]
    return tuple(sorted(told, key=lambda reason: -abs(reason.amount)))


def cross_check_table(source: ModelSource, ledger: Ledger) -> Table:
    """Lay out other counters' numbers beside ours, with a line for each reason why they differ.

    Args:
        source: The network.
        ledger: What we count.

    Raises:
        MicronetError: It is an ONNX file, or can't be run.
    """
    table = Table(title=f"{source.name} - other counters, for one image", title_justify="left")
    table.caption = "parameters: ours are the numbers that the deployed form stores"
    table.caption_justify = "left"
    for column in ("counter", "counts"):
        table.add_column(column, no_wrap=True)
    for column in ("theirs", "ours", "difference"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("because", overflow="fold")
    for row in cross_check(source, ledger):
        if row.theirs is None:
            table.add_row(row.counter, row.what, "-", f"{row.ours:,}", "", escape(row.note), end_section=True)
            continue
        difference = row.theirs - row.ours
        note = "" if difference or row.reasons or row.unexplained else "the same"
        table.add_row(row.counter, row.what, f"{row.theirs:,}", f"{row.ours:,}", _signed(difference), note)
        for reason in row.reasons:
            table.add_row("", "", "", "", _signed(reason.amount), reason.text)
        for path, amount in row.unexplained.items():
            table.add_row("", "", "", "", _signed(amount), f"not explained: {amount:,} (in {path or 'the whole'})")
        table.add_section()
    return table


def _signed(number: int) -> str:
    return f"{number:+,}" if number else "0"
