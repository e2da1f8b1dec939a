"""A score in words: a write-up in Markdown, ready to submit, and an explanation of every number."""

from collections.abc import Sequence

from callbacks.ledger import Array, Line
from callbacks.op_formulas import FORMULAS
from micronet.score import Score
from micronet.score_report import assumed, assumption, counted_lines, dimensions, notes, number, widths

Row = tuple[str, ...]

# What holds by all rules, and for every network.
_ALWAYS = (
    "A BatchNorm or constant factor behind a convolution or linear layer that only it reads is folded.",
    "Operations on constants alone are computed once and cost nothing; their results are stored.",
)


def to_markdown(score: Score) -> str:
    """A write-up ready to submit: assumptions, table of operations, table of arrays, totals."""
    rules = score.rules
    parts = [
        f"# {score.model}: MicroNet score {score.score:.7f}" + (f" ASSUMED ({assumed(score)})" * bool(score.assume)),
        f"One image of {' and '.join(map(dimensions, _sizes(score)))}. Rules: {rules.name} ({rules.source}).",
        f"**{score.verdict}**",
        "## Assumptions",
        "\n".join(f"- {note}" for note in (*assumption(score), *notes(score), *_ALWAYS)),
        "## Operations",
        _markdown(
            ("layer", "operation", "in", "out", "weights", "non-zero", "mults", "adds", "ops", "bits"),
            [
                (
                    line.name,
                    line.op,
                    dimensions(line.in_shape),
                    dimensions(line.out_shape),
                    number(line.weights),
                    number(_kept(line, score)),
                    number(line.mults),
                    number(line.adds),
                    number(line.ops),
                    widths(line),
                )
                for line in counted_lines(score)
            ],
        ),
        "## Stored arrays",
        _markdown(("array", "role", "shape", "elements", "kept", "words"), _array_rows(score)),
        "## Totals",
        _markdown(
            ("", "value"),
            [
                ("parameters", number(score.params)),
                ("storage, 32-bit words", number(score.storage)),
                ("multiplications", number(score.mults)),
                ("additions", number(score.adds)),
                ("multiply-accumulates", number(score.macs)),
                ("operations", number(score.ops)),
                ("peak activation memory, bytes", number(score.peak_bytes)),
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
        words = number(round(stored.words, 3)) if stored else "-"
        rows.append((array.name, array.role, dimensions(array.shape), f"{array.numel:,} x {bits} bits", kept, words))
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
    head = f"{line.name} ({line.op}): {dimensions(line.in_shape)} -> {dimensions(line.out_shape)}. "
    if line.op not in FORMULAS:
        return head + "UNCOUNTED: no rule says what it costs."
    if not (line.mults or line.adds or line.arrays):
        into = f"Folded into {line.folded}, whose output nothing else reads: no operations, " if line.folded else ""
        return head + (f"{into}one bias a channel." if into else f"The {score.rules.name} rules do not count it.")
    said, kept, mults = [_why(line, score)], _kept(line, score), number(line.mults)
    if kept != line.weights:
        said.append(f"{number(kept)} of {line.weights:,} weights are kept: {mults} products are left.")
    said.append(f"{mults} multiplications and {number(line.adds)} additions weigh {number(line.ops)} operations.")
    for name in line.arrays:
        stored, array = score.tally.stored.get(name), held[name]
        if stored:
            how = f"sparse, {stored.density:.1%} kept and a mask" if stored.density < 1 else "dense"
            what = f"{array.role}, {dimensions(array.shape)}, {stored.bits} bits, {how}"
            said.append(f"Stores {name} ({what}: {number(round(stored.words, 3))} words).")
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
