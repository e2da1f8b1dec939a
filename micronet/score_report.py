"""A score as people read it: tables, CSV, a write-up in Markdown, an explanation in words, two models side by side."""

import csv
import io
from collections.abc import Sequence

from rich.table import Table

from callbacks.ledger import Array, Line
from callbacks.op_formulas import FORMULAS
from micronet.score import Score

Row = tuple[str, ...]


def _n(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}".removesuffix(".0")


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "1"


def _shown(score: Score) -> list[Line]:
    """The lines that cost or hold something by these rules."""
    return [line for line in score.lines if line.mults or line.adds or line.weights or line.constants]


def _widths(line: Line) -> str:
    return f"{line.weight_bits}/{line.act_bits}" if line.weights else f"{line.act_bits}"


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
    for line in _shown(score):
        cells = {
            "in": _by(line.in_shape),
            "out": _by(line.out_shape),
            "weights": _n(line.weights),
            "non-zero": _n(line.nonzero) if line.nonzero not in (None, line.weights) else "",
            "constants": _n(line.constants),
            "mults": _n(line.mults),
            "adds": _n(line.adds),
            "ops": _n(line.ops),
            "bits": _widths(line),
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
        table.add_row(f"{op} ({part['lines']})", *(_n(part[name]) for name in ("mults", "adds", "ops")))
    table.add_section()
    table.add_row("all", _n(score.mults), _n(score.adds), _n(score.ops), style="bold")
    return table


def summary(score: Score) -> str:
    """The formula with its numbers, what was decided and assumed, and whether the model qualifies: lines of text."""
    rules = score.rules
    lines = [f"assumed, not measured: {_assumed(score)}"] if score.assume else []
    lines += [
        f"params  {score.params:,} numbers{_trained(score)} in {_n(score.storage)} words of 32 bits"
        f" ({score.storage * 4 / 1e6:,.3f} MB)",
        f"memory  at most {score.peak_bytes / 1024:,.0f} KiB of activations alive at once, as the network runs now",
        f"score = {_n(score.storage)} / {rules.params_norm:,.0f} + {_n(score.ops)} / {rules.ops_norm:,.0f}",
        f"      = {score.score_params:.7f} + {score.score_ops:.7f} = {score.score:.7f}"
        + (" (an assumption)" if score.assume else ""),
    ]
    return "\n".join([*lines, *_footer(score), score.verdict])


def _trained(score: Score) -> str:
    """How many parameters were trained, where folding leaves another number."""
    trained = score.ledger.params
    return f" ({trained:,} as trained, before folding)" if trained not in (None, score.params) else ""


def footer(scores: Sequence[Score]) -> str:
    """What was decided, assumed, left uncounted and measured, once for all scores of a table: lines of text."""
    said = [f"{line} ({score.rules.name})" for score in scores for line in _footer(score)]
    if scores[0].assume:
        said.insert(0, f"assumed, not measured: {_assumed(scores[0])}")
    return "\n".join(dict.fromkeys([*said, *(f"{one.model}, {one.rules.name}: {one.verdict}" for one in scores)]))


def _footer(score: Score) -> list[str]:
    lines = [f"- {note}" for note in score.tally.notes]
    if score.uncounted:
        lines.append(f"- UNCOUNTED, so that the score is too low: {', '.join(score.uncounted)}")
    return lines


def _assumed(score: Score) -> str:
    return ", ".join(f"{name}={value}" for name, value in vars(score.assume).items() if value is not None)


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
        also = [score.rules.name, _assumed(score), line.op in FORMULAS]
        writer.writerow([_by(value) if isinstance(value, tuple) else value for value in values + also])
    return text.getvalue()


def to_markdown(score: Score) -> str:
    """A write-up ready to submit: assumptions, table of operations, table of arrays, totals."""
    rules = score.rules
    parts = [
        f"# {score.model}: MicroNet score {score.score:.7f}" + (f" ASSUMED ({_assumed(score)})" * bool(score.assume)),
        f"One image of {' and '.join(map(_by, _sizes(score)))}. Rules: {rules.name} ({rules.source}).",
        f"**{score.verdict}**",
        "## Assumptions",
        "\n".join(f"- {note}" for note in _assumptions(score)),
        "## Operations",
        _markdown(
            ("layer", "operation", "in", "out", "weights", "non-zero", "mults", "adds", "ops", "bits"),
            [
                (
                    line.name,
                    line.op,
                    _by(line.in_shape),
                    _by(line.out_shape),
                    _n(line.weights),
                    _n(_kept(line, score)),
                    _n(line.mults),
                    _n(line.adds),
                    _n(line.ops),
                    _widths(line),
                )
                for line in _shown(score)
            ],
        ),
        "## Stored arrays",
        _markdown(("array", "role", "shape", "elements", "kept", "words"), _array_rows(score)),
        "## Totals",
        _markdown(
            ("", "value"),
            [
                ("parameters", _n(score.params)),
                ("storage, 32-bit words", _n(score.storage)),
                ("multiplications", _n(score.mults)),
                ("additions", _n(score.adds)),
                ("multiply-accumulates", _n(score.macs)),
                ("operations", _n(score.ops)),
                ("peak activation memory, bytes", _n(score.peak_bytes)),
                (f"storage / {rules.params_norm:,.0f}", f"{score.score_params:.9f}"),
                (f"operations / {rules.ops_norm:,.0f}", f"{score.score_ops:.9f}"),
                ("**score**" + " (assumed)" * bool(score.assume), f"**{score.score:.9f}**"),
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _sizes(score: Score) -> tuple[tuple[int, ...], ...]:
    size = score.input_size
    return size if size and not isinstance(size[0], int) else (size,)


def _assumptions(score: Score) -> list[str]:
    notes = [*score.tally.notes]
    if score.assume:
        notes.insert(0, f"Assumed, not measured: {_assumed(score)}.")
    if score.uncounted:
        notes.append(f"Uncounted for want of a rule: {', '.join(score.uncounted)}.")
    notes.append("A BatchNorm or constant factor behind a convolution or linear layer that only it reads is folded.")
    notes.append("Operations on constants alone are computed once and cost nothing; their results are stored.")
    return notes


def _kept(line: Line, score: Score) -> float:
    """How many of a line's weights the rules count."""
    stored = score.tally.stored.get(line.weight_array) if line.weight_array else None
    if stored is None or stored.density == 1:
        return line.weights
    return round(line.weights * stored.density, 3) if score.assume.sparsity else line.nonzero


def _array_rows(score: Score) -> list[Row]:
    rows = []
    for array in score.arrays:
        if score.tally.stored and array.name not in score.tally.stored:
            continue  # free by these rules
        stored = score.tally.stored.get(array.name)
        bits, density = (stored.bits, stored.density) if stored else (array.bits, 1)
        kept = "all" if density == 1 else f"{density:.1%} and a mask"
        words = _n(round(stored.words, 3)) if stored else "-"
        rows.append((array.name, array.role, _by(array.shape), f"{array.numel:,} x {bits} bits", kept, words))
    return rows


def _markdown(head: Row, rows: Sequence[Row]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


def explain(score: Score) -> list[str]:
    """Say in words why each number is what it is: a heading, and a paragraph for each line of the ledger."""
    held = {array.name: array for array in score.arrays}
    return [f"{score.model}, counted by the {score.rules.name} rules, one image:"] + [
        _explained(line, score, held) for line in score.lines
    ]


def _explained(line: Line, score: Score, held: dict[str, Array]) -> str:
    head = f"{line.name} ({line.op}): {_by(line.in_shape)} -> {_by(line.out_shape)}. "
    if line.op not in FORMULAS:
        return head + "UNCOUNTED: no rule says what it costs."
    if not (line.mults or line.adds or line.arrays):
        into = f"Folded into {line.folded}, whose output nothing else reads: no operations, " if line.folded else ""
        return head + (f"{into}one bias a channel." if into else f"The {score.rules.name} rules do not count it.")
    said = [_why(line, score)]
    if _kept(line, score) != line.weights:
        said.append(
            f"{_n(_kept(line, score))} of {line.weights:,} weights are kept: {_n(line.mults)} products are left."
        )
    said.append(f"{_n(line.mults)} multiplications and {_n(line.adds)} additions weigh {_n(line.ops)} operations.")
    for name in line.arrays:
        stored, array = score.tally.stored.get(name), held[name]
        if stored:
            how = f"sparse, {stored.density:.1%} kept and a mask" if stored.density < 1 else "dense"
            what = f"{array.role}, {_by(array.shape)}, {stored.bits} bits, {how}"
            said.append(f"Stores {name} ({what}: {_n(round(stored.words, 3))} words).")
    return head + " ".join(said)


def _why(line: Line, score: Score) -> str:
    n = line.outputs
    if not score.tally.stored:  # rules of their own, which their docstring states
        return f"By the {score.rules.name} rules, {line.taps:,} taps for each of {n:,} outputs." if line.taps else ""
    if line.op in ("conv2d", "conv_transpose2d", "linear", "bilinear", "matmul", "einsum"):
        bias = {
            (False, False): "without a bias",
            (True, True): "and 1 for its bias",
            (False, True): "and 1 for the bias that folding gave it",
        }[line.own_bias, line.bias]
        return f"{line.taps:,} products for each of {n:,} outputs, summed by one addition less each {bias}."
    if line.op in ("global_avg_pool", "avg_pool"):
        terms = f"{line.taps:,} term{'s' * (line.taps != 1)}"
        return f"{terms} for each of {n:,} outputs: one addition less each, and one division."
    if line.op == "max_pool":
        return f"{line.comparisons:,} comparisons, which count only if asked for."
    if line.op == "batch_norm":
        return (
            "Cannot be folded (what it reads is read by others, or is no layer's output): one factor and one summand."
        )
    return f"{line.mults / n:g} multiplications and {line.adds / n:g} additions for each of {n:,} outputs."


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
        texts = (f"{x:.7f}" if name.startswith("score") else _n(x) for x in (a, b))
        table.add_row(name, *texts, f"{b / a:.3f}" if a else "-")
    table.add_section()
    kinds = dict.fromkeys((*first.by_op, *second.by_op))
    for op in kinds:
        a, b = (score.by_op.get(op, {}).get("ops", 0) for score in (first, second))
        table.add_row(f"ops of {op}", _n(a), _n(b), f"{b / a:.3f}" if a else "-")
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
        table.add_row(score.rules.name, _n(score.params), _n(score.storage), _n(score.ops), *parts)
    return table
