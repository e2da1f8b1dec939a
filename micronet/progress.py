"""What a fit records and shows: one row an epoch, and a bar while it runs."""

import math
import time
from typing import Any

from fastai.callback.core import Callback, CancelFitException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class History(Callback):
    """Keeps one row of numbers for each epoch, through a kill too, and ends a fit whose loss is no longer finite.

    Attributes:
        rows: dicts with `epoch` (from 1), `train_loss`, `valid_loss`, the metrics, `lr` (the epoch's last), `seconds`.
        diverged: the epoch, from 0, in which the training loss stopped being finite; None where it never did.
    """

    order = 52  # right after the Recorder has the epoch's numbers

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []
        self.diverged: int | None = None
        self._began = 0.0

    def before_fit(self) -> None:
        """Forget an earlier fit."""
        self.rows, self.diverged = [], None

    def before_train(self) -> None:
        """Start the epoch's clock."""
        self._began = time.perf_counter()

    def after_train(self) -> None:
        """End the fit where the loss is infinite or not a number."""
        if not math.isfinite(float(self.learn.smooth_loss)):
            self.diverged = self.learn.epoch
            raise CancelFitException

    def after_validate(self) -> None:
        """Take down the epoch's row."""
        recorder = self.learn.recorder
        names = [name for name in recorder.metric_names if name != "time"]
        self.rows.append(dict(zip(names, (_number(value) for value in recorder.log), strict=False)))
        self.rows[-1] |= {
            "epoch": self.learn.epoch + 1,
            "lr": float(recorder.lrs[-1]),
            "seconds": time.perf_counter() - self._began,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on."""
        return {"rows": self.rows, "first": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; older ones number epochs from 0."""
        later = 1 - state.get("first", 0)
        self.rows = [row | {"epoch": row["epoch"] + later} for row in state["rows"]]


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


class Table(Callback):
    """Prints the rows of a `History` as they come, under one head, with a bar for the epoch where there is a terminal.

    Args:
        history: whose rows to print.
        console: where to print.
    """

    order = 95  # after the checkpoint: a row that is printed is safe

    def __init__(self, history: History, console: Console) -> None:
        super().__init__()
        self._rows, self._console = history, console
        self._bar: Progress | None = None
        self._task: Any = None
        self._printed = 0

    def before_fit(self) -> None:
        """Print the head, and the rows of epochs that an earlier process has done."""
        self.learn.logger = lambda _: None  # the Recorder's own table
        self._printed = 0
        names = [name for name in self.learn.recorder.metric_names if name != "time"]
        cells = [f"{_TITLES.get(name, name):>{_width(name)}}" for name in [*names, "lr", "seconds"]]
        self._console.print("  ".join(cells), style="bold")
        self._print_rows()

    def before_train(self) -> None:
        """Start the epoch's bar."""
        if self._console.is_terminal:
            columns = (TextColumn("epoch {task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            steps = len(self.learn.dls.train)
            self._task = self._bar.add_task(f"{self.learn.epoch + 1}/{self.learn.n_epoch}", total=steps)
            self._bar.start()

    def after_batch(self) -> None:
        """Move the bar on."""
        if self._bar is not None and self.learn.training:
            self._bar.advance(self._task)

    def after_epoch(self) -> None:
        """Print the epoch's row."""
        self.close()
        self._print_rows()

    def after_fit(self) -> None:
        """Leave nothing moving on the terminal."""
        self.close()

    def close(self) -> None:
        """Take the bar away; safe to call at any time."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print_rows(self) -> None:
        for row in self._rows.rows[self._printed :]:
            cells = [f"{_format(name, value):>{_width(name)}}" for name, value in row.items()]
            self._console.print("  ".join(cells), highlight=False)
        self._printed = len(self._rows.rows)


_TITLES = {"top1": "top-1", "top5": "top-5"}  # shares; printed as per cent, as everywhere that an accuracy is printed


def _width(name: str) -> int:
    return max(len(name), len("100.00 %") if name in _TITLES else 7)


def _format(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    if name in _TITLES:
        return f"{100 * value:.2f} %"
    if name == "lr":
        return f"{value:.2g}"
    return f"{value:.1f}" if name == "seconds" else f"{value:.4f}"
