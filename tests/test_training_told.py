"""What a training tells of itself: epochs from 1 everywhere, what its loss is, what its accuracies are measured on."""

import importlib
import io
import re
from functools import partial

import pytest
import torch
from fastai.callback.mixup import MixUp
from rich.console import Console

import micronet.report as report
from callbacks.distill import Distill
from callbacks.ema import EMA
from callbacks.saving import write_atomically
from micronet import Fit, Recipe, RunOptions, run
from micronet.curves import rounds_of
from micronet.data import digits
from micronet.models import separable_net
from micronet.progress import History

NETWORK = partial(separable_net, width_multiplier=0.125)


def recipe(*stages: Fit) -> Recipe:
    return Recipe(partial(digits, batch_size=32), NETWORK, stages)


def taught(weight: float) -> Distill:
    torch.manual_seed(0)
    return Distill(NETWORK(num_classes=10), weight=weight)


@pytest.mark.parametrize(
    ("cbs", "says"),
    [
        ((partial(taught, 0.5),), "training loss (distillation)"),
        ((partial(taught, 0.0),), "training loss"),  # it is the task's alone
        ((partial(MixUp, 0.4), partial(taught, 1.0)), "training loss (distillation, MixUp)"),
    ],
)
def test_a_loss_that_callbacks_change_is_not_called_cross_entropy(cbs, says, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: drawn.append(figure))
    result = importlib.import_module("micronet.stage_files")
    monkeypatch.setattr(result, "plot_rates", lambda *arguments: None)
    run(recipe(Fit("train", epochs=1, lr=0.01, cbs=cbs)), tmp_path, RunOptions(limit=32))
    losses = drawn[0].axes[0]
    assert [text.get_text() for text in losses.get_legend().get_texts()] == [says, "validation cross-entropy"]
    assert losses.get_ylabel() == "loss"


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_curves_count_whole_epochs_from_1(epochs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: drawn.append(figure))
    row = {"train_loss": 1.0, "valid_loss": 1.0, "top1": 0.5, "top5": 0.9}
    report.plot_curves([row | {"epoch": epoch + 1} for epoch in range(epochs)], tmp_path / "c.png", "a fit")
    for ax in drawn[0].axes:
        low, high = ax.get_xlim()
        shown = [tick for tick in ax.get_xticks() if low <= tick <= high]
        assert shown
        assert all(tick == int(tick) and 1 <= tick <= epochs for tick in shown)
        assert list(ax.lines[0].get_xdata()) == list(range(1, epochs + 1))
        if epochs == 1:
            assert shown == [1]


def test_a_run_that_an_older_version_left_goes_on_with_epochs_from_1(tmp_path, monkeypatch):
    """Older checkpoints number epochs from 0, and do not say so."""
    module = importlib.import_module("micronet.run")  # "import micronet.run as module" gives the function

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    one, file = recipe(Fit("train", epochs=2, lr=0.01)), tmp_path / "1-train" / "checkpoint.pth"
    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "_measure", killed)
        with pytest.raises(KeyboardInterrupt):
            run(one, tmp_path, RunOptions(limit=32))
    state = torch.load(file, weights_only=True)
    (history,) = [part for part in state["callbacks"].values() if "rows" in part]
    assert [row["epoch"] for row in history["rows"]] == [1, 2]
    del history["first"]
    for row in history["rows"]:
        row["epoch"] -= 1
    write_atomically(state, file)
    console = Console(record=True, file=io.StringIO(), width=200)
    run(one, tmp_path, RunOptions(limit=32), console=console)
    lines = (tmp_path / "1-train" / "history.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", "1", "2"]
    told = console.export_text()
    assert "going on after epoch 2 of 2 of stage train" in told
    assert re.search(r"\n +epoch .*\n +1 .*\n +2 ", told)


def test_a_histories_own_state_goes_on_as_it_is():
    history = History()
    history.rows = [{"epoch": 1}, {"epoch": 2}]
    other = History()
    other.load_state_dict(history.state_dict())
    assert other.rows == history.rows


def test_rounds_of_older_and_of_new_files_are_numbered_alike():
    rows = [{"params": params, "top1": 0.5} for params in (9, 9, 5, 5, 3)]
    new = rounds_of([row | {"epoch": place + 1} for place, row in enumerate(rows)], 100)
    assert [one.epoch for one in new] == [2, 4, 5]
    assert rounds_of([row | {"epoch": place} for place, row in enumerate(rows)], 100) == new


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"bf16": False}, "validation images in float32; of"),
        ({"epochs": 0}, None),
        ({"bf16": True, "ema": 0.9}, "validation images in bf16, averaged weights; of"),
        ({"bf16": False, "cbs": (partial(EMA, 0.9),)}, "validation images in float32, averaged weights; of"),
    ],
)
def test_it_is_said_what_the_accuracy_of_an_epoch_is_measured_on(more, says, tmp_path):
    console = Console(record=True, file=io.StringIO(), width=200)
    run(recipe(Fit("train", **{"epochs": 1, "lr": 0.01} | more)), tmp_path, RunOptions(limit=32), console=console)
    told = [line for line in console.export_text().splitlines() if line.startswith("top-1 of an epoch")]
    whole = [f"top-1 of an epoch: {says} the stage: the same with its file in float32"]
    assert told == (whole if says else [])
