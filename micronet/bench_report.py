"""What `micronet bench` found, as people read it: tables, sentences, a picture."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from micronet.bench_cost import Cost
from micronet.bench_results import NARROW, Bench, Phase, Timed
from micronet.bench_words import factor
from micronet.report import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

WIDE = 8  # largest over smallest, above which an axis is logarithmic
NODES = (
    "nodes: as onnxruntime runs them, under its own names: fused (a convolution with the ReLU and the sum after it) or "
    "put in (Reorder, Transpose: images laid out otherwise in memory); layer: the one whose weights a node holds"
)
SHOWN = 15  # nodes of each model that are listed; the JSON has all


def milliseconds(seconds: float) -> str:
    """A time to three digits."""
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def _speed_up(phase: Phase | None) -> str:
    ratio = phase.ratio if phase else None
    return f"{factor(ratio.value)} ({factor(ratio.low)}-{factor(ratio.high)})" if ratio else "-"


def zeros(cost: Cost) -> str:
    """What share of a model's weights is zero, and why, where its file tells."""
    if cost.unknown:
        return "-"
    narrow = cost.weight_bits <= NARROW
    if cost.masked is None:
        shares = {" of codes" if narrow else "": cost.zeros}
    else:
        shares = {" masked": cost.masked, " rounded" if narrow else " not masked": cost.zeros - cost.masked}
    told = [f"{100 * share:.0f} %{why}" for why, share in shares.items() if share >= 0.005]
    return ", ".join(told) or "0 %"


def costs_table(bench: Bench) -> Table:
    """Lay out what each model takes on paper and in memory."""
    table = Table(title="on paper and in memory", title_justify="left")
    table.add_column("model", overflow="fold")
    for column in ("file", "params", "storage", "MACs", "zero weights", "score", "peak memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for model in bench.models:
        cost = model.cost
        table.add_row(
            escape(model.label),
            "-" if cost.file_bytes is None else f"{cost.file_bytes:,}",
            "-" if cost.params is None else f"{cost.params:,}",
            "-" if cost.storage is None else f"{cost.storage:,.0f}",
            "-" if cost.macs is None else f"{cost.macs / 1e6:,.1f} M",
            zeros(cost),
            "-" if cost.score is None else f"{cost.score:.5f}",
            f"{model.memory['peak'] / 2**20:,.0f} MiB",
        )
    return table


def times_table(bench: Bench) -> Table:
    """Lay out how fast each model is, beside what its operations predict."""
    options = bench.options
    threads = f"{options.threads} thread{'s' * (options.threads > 1)}"
    table = Table(
        title=f"times, {threads}; speed-up over the first, with its 95 % interval if rounds are independent",
        title_justify="left",
    )
    table.add_column("model", overflow="fold")
    table.add_column("runs on", overflow="fold")
    for column in (
        "ms, 1 image",
        "p95",
        "speed-up",
        "predicted",
        f"images/s, {options.batch}",
        f"speed-up, {options.batch}",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for model in bench.models:
        alone, many = model.latency, model.throughput
        table.add_row(
            escape(model.label),
            model.runtime if model.device == "cpu" else f"{model.runtime}, {model.device}",
            milliseconds(alone.spread.median),
            milliseconds(alone.spread.p95),
            _speed_up(alone),
            "-" if model.predicted is None else factor(model.predicted),
            "-" if many is None else f"{many.images_per_second:,.0f}",
            _speed_up(many),
        )
    return table


def layers_tables(bench: Bench) -> Iterator[Table]:
    """Lay out the slowest nodes of each model; below the last what a node is."""
    models = [model for model in bench.models if model.layers]
    for model in models:
        yield _layers_table(model, caption=NODES if model is models[-1] else None)


def _layers_table(model: Timed, caption: str | None) -> Table:
    total = sum(node["seconds"] for node in model.layers)
    shown = model.layers[:SHOWN]
    title = f"{escape(model.label)}: {len(shown)} slowest of {len(model.layers)} nodes, one image; "
    table = Table(
        title=f"{title}{milliseconds(total)} ms with the profiler's own time",
        title_justify="left",
        caption=caption,
        caption_justify="left",
    )
    table.add_column("layer", overflow="fold")
    table.add_column("node", overflow="fold")
    table.add_column("operation", overflow="fold")
    for column in ("gives", "ms", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for node in shown:
        shape = "x".join(map(str, node["out"][1:])) or "-"
        table.add_row(
            escape(node["layer"]) or "-",
            escape(node["name"]),
            node["op"],
            shape,
            f"{1e3 * node['seconds']:.4f}",
            f"{100 * node['share']:.1f} %",
        )
    return table


def sentences(bench: Bench) -> Iterator[str]:
    """What the tables mean, and what they were measured on, line by line."""
    first, *others = bench.models
    for model in others:
        yield f"{model.label} against {first.label}: {model.verdict}"
    for model in bench.models:
        if model.cost.unknown:
            yield f"{model.label}: no score: {model.cost.unknown}"
        for note in model.notes:
            yield f"{model.label}: {note}"
    if any(model.runtime == "torch" for model in bench.models):
        layouts = {model.latency.layout for model in bench.models if model.runtime == "torch"}
        yield (
            "torch: eager, float32, layers as the file has them (BatchNorm is not folded unless it is in the file); "
            f"images lie {' or '.join(sorted(layouts))} in memory, whichever is faster"
        )
    if any(model.cost.zeros >= 0.005 for model in bench.models):
        yield (
            "zero weights: masked ones are kept at 0 by a mask (sparsified); rounded ones are codes of few bits that "
            "came out as 0: nothing was removed; an ONNX file does not tell which are which"
        )
    yield "predicted: what the speed-up would be if time went by the operations that `micronet score` counts"
    yield "peak memory: of a fresh process, Python and runtime included, that opens the file and answers one image"
    hardware, options = bench.machine["hardware"], bench.options
    sets = ", ".join(hardware["instruction_sets"]) or "none known"
    pinned = (
        f"pinned to {', '.join(map(str, bench.cores))}"
        if bench.cores
        else "not pinned (others hold the cores, or the system can't)"
    )
    alone = first.latency
    rounds = f"{len(alone.rounds)} rounds of one image"
    if first.throughput is not None and options.batch != 1:
        rounds += f", {len(first.throughput.rounds)} of {options.batch}"
    yield (
        f"{hardware['cpu']} ({sets}), {hardware['cores']} cores, {pinned}; {rounds}, in turn, seed {options.seed}; "
        + ", ".join(f"{name} {version}" for name, version in bench.machine["versions"].items())
    )
    yield from (f"WARNING: {warning}" for warning in bench.warnings)


def plot(bench: Bench, path: str | Path) -> None:
    """Draw latency against score, with the models that no other beats in both, and speed-ups against predictions.

    Args:
        bench: what was measured.
        path: the PNG.
    """
    rows = len(bench.models)
    figure, axes = new_figure(1, 2, (11.0, max(4.2, 1.6 + 0.42 * rows)))
    left, right = axes[0]
    colours = [f"C{place % 10}" for place in range(rows)]
    _plot_choice(left, bench, colours)
    _plot_speed_ups(right, bench, colours)
    hardware, threads = bench.machine["hardware"], bench.options.threads
    cpu = f"{hardware['cpu']}, {threads} thread{'s' * (threads > 1)}"
    figure.suptitle("\n".join([cpu, *bench.warnings]), fontsize=9)
    save_figure(figure, path)


def undominated(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both numbers, by the first number.

    Args:
        points: pairs of which less is better.
    """
    found: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found


def _plot_choice(ax: "Axes", bench: Bench, colours: list[str]) -> None:
    """Latency against score: down and left is better."""
    scored = [(model, colour) for model, colour in zip(bench.models, colours, strict=True) if model.cost.score]
    points = [(1e3 * model.latency.spread.median, model.cost.score) for model, _ in scored]
    for (model, colour), (x, y) in zip(scored, points, strict=True):
        ax.plot([x, 1e3 * model.latency.spread.p95], [y, y], color=colour, lw=1)
        ax.plot([x], [y], "o", color=colour, markersize=7, label=model.label)
    front = undominated(points)
    if len(front) > 1:
        ax.plot(*zip(*front, strict=True), "--", color="0.6", lw=1, zorder=0, label="none better in both")
    for axis, values in zip((ax.xaxis, ax.yaxis), zip(*points, strict=True), strict=False):
        if max(values) > WIDE * min(values):
            ax.set(**{f"{axis.axis_name}scale": "log"})
            _label_plainly(axis)
    ax.set(xlabel="ms for one image, median; line to p95", ylabel="score")
    ax.set_title("down and left is better", fontsize=9)
    ax.grid(alpha=0.3, which="both")
    if scored:
        ax.legend(frameon=False, fontsize=8)


def _label_plainly(axis: "Axis") -> None:
    """Label a logarithmic axis with plain numbers: 1, 2, 5, 10."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")


def _plot_speed_ups(ax: "Axes", bench: Bench, colours: list[str]) -> None:
    """A bar for each model's speed-up, with its interval, and a mark where its operations predict it."""
    seen = [0.5, 2.0]
    for place, (model, colour) in enumerate(zip(bench.models, colours, strict=True)):
        ratio, told = model.latency.ratio, "the first"
        if ratio:
            ax.barh(place, ratio.value - 1, left=1, color=colour, height=0.6)
            ends = [[ratio.value - ratio.low], [ratio.high - ratio.value]]
            ax.errorbar(ratio.value, place, xerr=ends, color="black", capsize=3, lw=1)
            seen += [ratio.low, ratio.high]
            told = factor(ratio.value)
        if model.predicted is not None:
            ax.plot([model.predicted], [place], "D", markerfacecolor="white", color="black", markersize=6)
            seen.append(model.predicted)
        ax.text(0.99, place, told, transform=ax.get_yaxis_transform(), ha="right", va="center", fontsize=9)
    ax.axvline(1, color="0.4", lw=1)
    ax.set_yticks(range(len(bench.models)), [model.label for model in bench.models], fontsize=8)
    ax.set_ylim(len(bench.models) - 0.5, -0.5)
    least, most = min(seen), max(seen)
    room = (most / least) ** 0.15  # on the right, for the numbers
    ax.set(xlabel="times as fast as the first, one image", xscale="log", xlim=(least / room**0.3, most * room))
    _label_plainly(ax.xaxis)
    ax.set_title("bar: measured, 95 % interval; diamond: predicted by operations", fontsize=9)
