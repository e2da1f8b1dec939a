"""Tables and plots of runs and measurements."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from callbacks.saving import whole_or_absent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from micronet.evaluate import Evaluation


def write_text(text: str, path: str | Path) -> None:
    """Write a small file that is whole or absent."""
    with whole_or_absent(path) as beside:
        beside.write_text(text)


def write_csv(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write rows as CSV; the columns are all keys that occur, in order of appearance.

    Args:
        rows: flat dicts.
        path: the file.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(text.getvalue(), path)


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts: `{"valid": {"top1": 0.9}}` gives `{"valid_top1": 0.9}`."""
    out: dict[str, Any] = {}
    for key, value in row.items():
        out |= flat(value, f"{prefix}{key}_") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure as PNG, whole or not at all, and close it.

    Args:
        figure: what to write.
        path: the file; its folder must exist.
    """
    import matplotlib.pyplot as plt

    try:
        with whole_or_absent(path) as beside:
            figure.savefig(beside, format="png", dpi=120)
    finally:
        plt.close(figure)


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 4.0)) -> tuple["Figure", Any]:
    """Make a figure and its axes without opening a window.

    Args:
        rows: rows of axes.
        columns: columns of axes.
        size: width and height, inches.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes if rows * columns > 1 else axes[0, 0]


def plot_curves(
    rows: Sequence[Mapping[str, Any]], path: str | Path, title: str, training: str = "training loss"
) -> None:
    """Draw losses and accuracies over the epochs of a fit.

    Args:
        rows: one dict an epoch with `epoch` (from 1), `train_loss`, `valid_loss`, `top1`, `top5`.
        path: the PNG.
        title: named above the plot.
        training: what the training loss is, for the legend; as a rule it is another one than that of validation.
    """
    figure, axes = new_figure(1, 2, (9.6, 4.2))
    left, right = axes[0]
    epochs = [row["epoch"] for row in rows]
    marker = "o" if len(rows) < 40 else None
    for name, label in (("train_loss", training), ("valid_loss", "validation cross-entropy")):
        left.plot(epochs, [row[name] for row in rows], label=label, marker=marker, markersize=3)
    left.set(xlabel="epoch", ylabel="loss", title=title)
    for name, label in (("top1", "top-1"), ("top5", "top-5")):
        right.plot(epochs, [100 * row[name] for row in rows], label=label, marker=marker, markersize=3)
    right.set(xlabel="epoch", ylabel="right on validation, %")
    for ax in (left, right):
        # Below: a training loss can take many words, which would lie over the lines.
        ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15))
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # 1, where there is one epoch
        ax.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        ax.grid(alpha=0.3)
    save_figure(figure, path)


def plot_rates(rates: Sequence[float], path: str | Path, title: str) -> None:
    """Draw the learning rate of each step.

    Args:
        rates: one number a step.
        path: the PNG.
        title: named above the plot.
    """
    figure, ax = new_figure()
    ax.plot(rates)
    ax.set(xlabel="step", ylabel="learning rate", title=title)
    ax.grid(alpha=0.3)
    save_figure(figure, path)


def plot_lr_find(rates: Sequence[float], losses: Sequence[float], suggested: float, path: str | Path) -> None:
    """Draw the loss of a mock training against its growing learning rate, and the suggestion.

    Args:
        rates: learning rate of each step.
        losses: smoothed training loss of each step.
        suggested: the learning rate to mark.
        path: the PNG.
    """
    figure, ax = new_figure()
    ax.plot(rates, losses)
    ax.axvline(suggested, color="tab:orange", linestyle="--", label=f"suggested: {suggested:.2g} (least loss)")
    ax.set(xlabel="learning rate", ylabel="training loss, smoothed", xscale="log", title="learning-rate finder")
    ax.legend(frameon=False)
    ax.grid(alpha=0.3)
    save_figure(figure, path)


def plot_confusion(evaluation: "Evaluation", classes: Sequence[str], path: str | Path, title: str) -> None:
    """Draw the confusion matrix, and the classes that are answered worst.

    Args:
        evaluation: counts.
        classes: names in label order.
        path: the PNG.
        title: named above the matrix.
    """
    count = len(classes)
    side = 6.4 if count <= 20 else 8.4
    figure, axes = new_figure(1, 2, (side + 4.2, side))
    left, right = axes[0]
    share = evaluation.confusion.double() / evaluation.confusion.sum(1, keepdim=True).clamp(min=1)
    image = left.imshow(100 * share.numpy(), cmap="magma_r", vmin=0, vmax=100, interpolation="nearest")
    # Below the matrix: beside it, its label would read as the bar chart's axis.
    figure.colorbar(image, ax=left, location="bottom", shrink=0.6, aspect=30, label="share of the label's images, %")
    ticks = range(count) if count <= 20 else range(0, count, 5)
    size = 8 if count <= 20 else 6
    left.set_xticks(ticks, [classes[i] for i in ticks], rotation=90, fontsize=size)
    left.set_yticks(ticks, [classes[i] for i in ticks], fontsize=size)
    left.set(xlabel="answer", ylabel="label", title=title)
    accuracy = evaluation.class_accuracy().nan_to_num(nan=-1.0)
    worst = [i for i in accuracy.argsort().tolist() if accuracy[i] >= 0][:15]
    right.barh([classes[i] for i in worst][::-1], [100 * accuracy[i].item() for i in worst][::-1], color="tab:blue")
    for place, i in enumerate(reversed(worst)):
        right.text(100 * accuracy[i].item() + 1, place, f"{100 * accuracy[i].item():.0f}", va="center", fontsize=8)
    right.set(xlabel="right, %", xlim=(0, 108), title="worst classes")
    save_figure(figure, path)


def stages_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out the stages of a run, a row each.

    Args:
        rows: as `row.json` has them.
    """
    table = Table(title="stages", title_justify="left")
    table.add_column("stage")
    for column in ("valid top-1", "test top-1", "params", "storage", "MACs", "score", "file", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, part in (part for row in rows for part in _parts(row)):
        test = part.get("test")
        top1 = _share(part["valid"]) + (" on the test images" if part["valid_is_test"] else "")
        table.add_row(name, top1, _share(test) if test else "-", *_costs(part))
    return table


def stage_lines(row: Mapping[str, Any]) -> Iterator[str]:
    """What a stage left, a line for its network and one for its ONNX file: `stages_table` while the run goes on."""
    for name, part in _parts(row):
        params, storage, macs, score, size, seconds = _costs(part)
        test = f"test {_share(part['test'])}, " if "test" in part else ""
        known = f"{params} params, " if params != "-" else ""
        time = f", {seconds} s" if seconds != "-" else ""
        yield (
            f"stage {name}: valid {_share(part['valid'])}, {test}{known}storage {storage}, MACs {macs}, score {score}, "
            f"file {size}{time}"
        )


def _parts(row: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A stage's network and, where it left one, its ONNX file, each with its numbers."""
    yield row["stage"], row
    if "onnx" in row:
        yield f"{row['stage']}, {row['onnx']['file']}", row["onnx"]


def _costs(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Parameters, storage, MACs, score, size of the file and seconds of training."""
    return (
        f"{row['params']:,}" if "params" in row else "-",
        f"{row['storage']:,.0f}",
        f"{row['macs'] / 1e6:,.1f} M",
        f"{row['score']:.5f}",
        f"{row['file_bytes'] / 1e6:.2f} MB",
        f"{row['seconds']:.0f}" if "seconds" in row else "-",
    )


def _share(part: Mapping[str, Any]) -> str:
    return f"{100 * part['top1']:.2f} % ({part['top1_count']:,} of {part['images']:,})"
