"""Accuracy against parameters while channels go round after round: a point a round, a line for each run.

    rounds = partial(PruneChannels, 0.6, schedule=Rounds(start=0.1, end=0.8, rounds=6))  # 10 % of the channels a round

A fit with `PruneChannels` has a column `params` in its `history.csv`; the last epoch before the next channels go tells
what a round left after its recovery. Two recipes that differ in the rate give two lines.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from micronet.errors import MicronetError
from micronet.report import new_figure, save_figure


@dataclass(frozen=True)
class Round:
    """What a round of pruning left, after the epochs that followed it.

    Args:
        params: parameters of the network.
        top1: share of the validation images answered rightly, in [0, 1].
        epoch: the last one before more went, from 1.
        error: standard error of `top1`, of as many images drawn at random.
    """

    params: int
    top1: float
    epoch: int
    error: float


def rounds_of(rows: Sequence[Mapping[str, Any]], images: int) -> list[Round]:
    """The rounds in a fit's history.

    Args:
        rows: one for each epoch, in order, with `params` and `top1`, as numbers or text.
        images: how many images `top1` is a share of.

    Returns:
        The rounds in their order; the first is the whole network where epochs came before its first round.
    """
    # Counted here: the files of older versions number epochs from 0.
    found = [(int(row["params"]), float(row["top1"]), epoch) for epoch, row in enumerate(rows, 1)]
    last = [one for one, then in zip(found, [*found[1:], None], strict=True) if then is None or then[0] != one[0]]
    return [Round(params, top1, epoch, (top1 * (1 - top1) / images) ** 0.5) for params, top1, epoch in last]


def read_rounds(stage: str | Path) -> list[Round]:
    """Read the rounds of a finished stage.

    Args:
        stage: its folder in a run, such as `runs/prune_resnet20/2-pruned`.

    Raises:
        MicronetError: not the folder of a stage that pruned channels.
    """
    stage = Path(stage)
    try:
        rows = list(csv.DictReader((stage / "history.csv").read_text().splitlines()))
        return rounds_of(rows, json.loads((stage / "row.json").read_text())["valid"]["images"])
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = Path(error.filename).name
        raise MicronetError(f"{stage}: not the folder of a finished stage ({missing} is not there)") from error
    except (KeyError, ValueError, TypeError) as error:
        raise MicronetError(f"{stage}: its history.csv has no rounds: no channels were pruned in it") from error


def plot_rounds(lines: Mapping[str, Sequence[Round]], path: str | Path, title: str = "") -> None:
    """Draw accuracy against parameters, a line for each stage, a point for each of its rounds.

    Args:
        lines: the rounds of each stage, by what its line is to be called, such as "10 % a round".
        path: the PNG.
        title: named above the plot.

    Raises:
        MicronetError: there is no stage.
    """
    if not lines:
        raise MicronetError("there is no stage to draw")
    figure, ax = new_figure()
    for (name, rounds), marker in zip(lines.items(), "os^Dvx*" * len(lines), strict=False):
        params, right = [one.params for one in rounds], [100 * one.top1 for one in rounds]
        errors = [100 * one.error for one in rounds]
        ax.errorbar(params, right, yerr=errors, marker=marker, markersize=4, capsize=2, lw=1.2, label=name)
    ax.set(xlabel="parameters", ylabel="right on validation, %", title=title)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.tick_params(axis="x", labelsize=8)
    ax.legend(title="bars: standard error", frameon=False, fontsize=8, title_fontsize=8)
    ax.grid(alpha=0.3)
    save_figure(figure, path)
