"""A score as people read it: tables, their footer, CSV, two models side by side. In words: `score_writeup.py`."""

import csv
import io
from collections.abc import Sequence

from rich.table import Table

from callbacks.ledger import Line
from callbacks.op_formulas import FORMULAS
from micronet.score import Score


def number(value: float) -> str:
    """A count with commas; what is no whole number to one decimal."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}".removesuffix(".0")


def dimensions(shape: Sequence[int]) -> str:
    """A shape as people write it: `3x32x32`."""
    return "x".join(map(str, shape)) or "1"


def counted_lines(score: Score) -> list[Line]:
    """The lines that cost or hold something by these rules."""
    return [line for line in score.lines if line.mults or line.adds or line.weights or line.constants]


def widths(line: Line) -> str:
    """Bits of a line's weights and activations."""
    return f"{line.weight_bits}/{line.act_bits}" if line.weights else f"{line.act_bits}"


def assumed(score: Score) -> str:
    """What was assumed, as it is given: `bits=8, acc=16`."""
    return ", ".join(f"{name}={value}" for name, value in vars(score.assume).items() if value is not None)


def assumption(score: Score) -> list[str]:
    """The sentence that says so, if anything was."""
    return [f"assumed, not measured: {assumed(score)}"] if score.assume else []


def notes(score: Score) -> list[str]:
    """What the rules decided, and what they could not count, in sentences."""
    uncounted = f"UNCOUNTED, so that the score is too low: {', '.join(score.uncounted)}"
    return [*score.tally.notes, *([uncounted] if score.uncounted else [])]


def score_table(score: Score, width: int = 200) -> Table:
    """Lay out a score layer by layer; lines that the rules do not count are left out.

    Args:
        score: what to show.
        width: characters that the terminal has; below 150 shapes, widths and memory are left to the other forms.
    """
    table = Table(title=f"{score.model} - rules: {score.rules.name}", title_justify="left")
    table.add_column("layer", overflow="fold", min_width=12)
    table.add_column("operation", overflow="fold", min_width=8)
    columns = ["weights", "mults", "adds", "ops"]
    if width >= 150:
        columns = ["in", "out", "weights", "non-zero", "constants", "mults", "adds", "ops", "bits", "alive"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for line in counted_lines(score):
        cells = {
            "in": dimensions(line.in_shape),
            "out": dimensions(line.out_shape),
            "weights": number(line.weights),
            "non-zero": number(line.nonzero) if line.nonzero not in (None, line.weights) else "",
            "constants": number(line.constants),
            "mults": number(line.mults),
            "adds": number(line.adds),
            "ops": number(line.ops),
            "bits": widths(line),
            "alive": f"{line.live_bytes / 1024:,.0f} KiB",
        }
        table.add_row(line.name, line.op, *(cells[column] for column in columns))
    return table


def totals_table(score: Score) -> Table:
    """Lay out a score's totals, and the share of each kind of operation.

    Args:
        score: what to show.
    """
    table = Table(title="totals, for one image", title_justify="left")
    table.add_column("")
    for column in ("mults", "adds", "ops"):
        table.add_column(column, justify="right", no_wrap=True)
    for op, part in score.by_op.items():
        table.add_row(f"{op} ({part['lines']})", *(number(part[name]) for name in ("mults", "adds", "ops")))
    table.add_section()
    table.add_row("all", number(score.mults), number(score.adds), number(score.ops), style="bold")
    return table


def summary(score: Score) -> str:
    """The formula with its numbers, what was decided and assumed, and whether the model qualifies: lines of text."""
    rules = score.rules
    lines = [
        *assumption(score),
        f"params  {score.params:,} numbers{_trained(score)} in {number(score.storage)} words of 32 bits"
        f" ({score.storage * 4 / 1e6:,.3f} MB)",
        f"memory  at most {score.peak_bytes / 1024:,.0f} KiB of activations alive at once, as the network runs now",
        f"score = {number(score.storage)} / {rules.params_norm:,.0f} + {number(score.ops)} / {rules.ops_norm:,.0f}",
        f"      = {score.score_params:.7f} + {score.score_ops:.7f} = {score.score:.7f}"
        + (" (an assumption)" if score.assume else ""),
        *(f"- {note}" for note in notes(score)),
        score.verdict,
    ]
    return "\n".join(lines)


def _trained(score: Score) -> str:
    """How many parameters were trained, where folding leaves another number."""
    trained = score.ledger.params
    return f" ({trained:,} as trained, before folding)" if trained not in (None, score.params) else ""


def footer(scores: Sequence[Score]) -> str:
    """What was decided, assumed, left uncounted and measured, once for all scores of a table: lines of text."""
    said = [f"- {note} ({score.rules.name})" for score in scores for note in notes(score)]
    verdicts = [f"{score.model}, {score.rules.name}: {score.verdict}" for score in scores]
    return "\n".join(dict.fromkeys([*assumption(scores[0]), *said, *verdicts]))


_CSV = ["name", "op", "module", "in_shape", "out_shape", "taps", "weights", "nonzero", "constants", "mults", "adds"]
_CSV += ["ops", "macs", "weight_bits", "act_bits", "acc_bits", "folded", "live_bytes"]
_ALSO = ["rules", "assumed", "has_rule"]


def to_csv(score: Score) -> str:
    """The ledger's lines as the rules count them, a row each, folded ones too."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_CSV, *_ALSO])
    for line in score.lines:
        values = [getattr(line, name) for name in _CSV]
        also = [score.rules.name, assumed(score), line.op in FORMULAS]
        writer.writerow([dimensions(value) if isinstance(value, tuple) else value for value in values + also])
    return text.getvalue()


def against_table(first: Score, second: Score) -> Table:
    """Put two models side by side: totals, their ratio, and each kind of operation.

    Args:
        first: one model.
        second: the other, counted by the same rules.
    """
    table = Table(title=f"rules: {first.rules.name}", title_justify="left")
    table.add_column("")
    for title in (first.model, second.model, "second / first"):
        table.add_column(title, justify="right", overflow="fold")
    names = ("params", "storage", "mults", "adds", "macs", "ops", "peak_bytes", "score_params", "score_ops", "score")
    for name in names:
        a, b = getattr(first, name), getattr(second, name)
        texts = (f"{x:.7f}" if name.startswith("score") else number(x) for x in (a, b))
        table.add_row(name, *texts, f"{b / a:.3f}" if a else "-")
    table.add_section()
    kinds = dict.fromkeys((*first.by_op, *second.by_op))
    for op in kinds:
        a, b = (score.by_op.get(op, {}).get("ops", 0) for score in (first, second))
        table.add_row(f"ops of {op}", number(a), number(b), f"{b / a:.3f}" if a else "-")
    return table


def all_rules_table(scores: Sequence[Score]) -> Table:
    """Show what several sets of rules make of one model.

    Args:
        scores: one for each set of rules.
    """
    table = Table(title=scores[0].model, title_justify="left")
    table.add_column("rules")
    for column in ("params", "storage", "ops", "score_params", "score_ops", "score"):
        table.add_column(column, justify="right", no_wrap=True)
    for score in scores:
        parts = (f"{score.score_params:.7f}", f"{score.score_ops:.7f}", f"{score.score:.7f}")
        table.add_row(score.rules.name, number(score.params), number(score.storage), number(score.ops), *parts)
    return table
