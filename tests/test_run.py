"""A run folder: resumed bit for bit after SIGKILL, refused where it is another run's, whole at any moment."""

import importlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.optimizer import Adam
from rich.console import Console

import micronet.models as networks
from callbacks.op_counter import OpCounter
from callbacks.resize import ProgressiveResizing
from callbacks.schedule import Cosine, MultiStep, OneCycle
from micronet import Fit, MicronetError, Recipe, RunOptions, adam, adamw, load, muon, run, sgd
from micronet.data import Augment, digits
from micronet.folder import read_rows, set_aside

SMALL = partial(networks.separable_net, width_multiplier=0.25)
ROOT = Path(__file__).parent.parent


def recipe(*stages: Fit, model=SMALL) -> Recipe:
    return Recipe(data=partial(digits, batch_size=32, augment=Augment(crop=2)), model=model, stages=stages)


def weights(path: Path) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in load(path).model.state_dict().values()])


class Unbuildable(torch.nn.Module):
    """A network that fails in its own way."""

    def __init__(self, num_classes: int) -> None:
        raise RuntimeError("no such thing")


class Constant(torch.nn.Module):
    """Answers the same whatever it is shown and taught."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.scale, self.classes = torch.nn.Parameter(torch.ones(1)), num_classes

    def forward(self, x):
        return 0 * self.scale.expand(len(x), self.classes)


class StopAt(Callback):
    """Stands in for a crash: raises in the middle of an epoch."""

    order = 11

    def __init__(self, epoch: int, batch: int) -> None:
        super().__init__()
        self.place = (epoch, batch)

    def after_pred(self) -> None:
        if (self.learn.epoch, self.learn.iter) == self.place:
            raise KeyboardInterrupt


GROWING = partial(ProgressiveResizing, ((0.4, 16), (0.7, 24)))
WAYS = {
    "one-cycle, mixup, average": {"schedule": OneCycle(), "ema": 0.9, "cbs": (partial(MixUp, 0.4),)},
    "cosine, adamw, cutmix, clipping": {"schedule": Cosine(warmup=0.2), "opt": adamw(), "lr": 1e-3, "cbs": (CutMix,)}
    | {"grad_clip": 1.0, "wd_bn_bias": False},
    "steps, adam, last": {"schedule": MultiStep(), "opt": adam(), "lr": 1e-3, "keep": "last", "label_smoothing": 0.1},
    "early stopping": {"schedule": MultiStep(milestones=(0.25, 0.5)), "early_stop": 2, "bf16": False},
    "fastai's own Adam": {"schedule": OneCycle(), "opt": Adam, "lr": 1e-3},
    "Muon, growing images": {"schedule": OneCycle(), "opt": muon(), "lr": 0.02, "ema": 0.9, "cbs": (GROWING,)},
    "score column": {"schedule": OneCycle(), "cbs": (OpCounter,), "lr": 0.02},
}


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupted_fit_goes_on_to_the_same_bits(way, tmp_path, monkeypatch):
    arguments = {"epochs": 4, "lr": 0.05, "opt": sgd()} | WAYS[way]
    options = RunOptions(limit=96, seed=3)
    run(recipe(Fit("train", **arguments)), tmp_path / "whole", options)
    module = importlib.import_module("micronet.run")  # "import micronet.run as module" gives the function
    plain = module.run_fit

    def interrupted(*args, cbs=(), **kwargs):
        return plain(*args, cbs=(*cbs, StopAt(2, 1)), **kwargs)

    monkeypatch.setattr(module, "run_fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(Fit("train", **arguments)), tmp_path / "parts", options)
    monkeypatch.setattr(module, "run_fit", plain)
    assert (tmp_path / "parts" / "1-train" / "checkpoint.pth").exists()
    torch.rand(7)  # what another process would have drawn
    console = Console(record=True, file=io.StringIO(), width=200)
    run(recipe(Fit("train", **arguments)), tmp_path / "parts", options, console=console)
    assert "going on after epoch 2 of 4 of stage train\n" in console.export_text()
    assert torch.equal(weights(tmp_path / "whole" / "model.pth"), weights(tmp_path / "parts" / "model.pth"))
    rows = [read_rows(tmp_path / name)[0] for name in ("whole", "parts")]
    for row in rows:
        row.pop("seconds")
        row.pop("file_bytes")
    assert rows[0] == rows[1]
    histories = [(tmp_path / name / "1-train" / "history.csv").read_text().splitlines() for name in ("whole", "parts")]
    assert [line.rpartition(",")[0] for line in histories[0]] == [line.rpartition(",")[0] for line in histories[1]]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("quickstart", ["-s", "epochs=5", "--limit", "600"]),
        pytest.param(
            "wrn_cifar100", ["-s", "epochs=3", "-s", "batch_size=64", "--limit", "256"], marks=pytest.mark.slow
        ),
    ],
)
def test_sigkill_in_the_middle_of_a_real_run(name, options, tmp_path, archive):
    """The command itself, killed once between two checkpoints, against one that was left alone."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if "cifar" in name:
        environment["MICRONET_DATA"] = str(archive("cifar100").parent)
    command = [sys.executable, "-W", "ignore", "-m", "micronet", "fit", str(ROOT / "recipes" / f"{name}.py")]
    command += [*options, "-o"]
    process = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment, stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed" / "1-train" / "checkpoint.pth"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert checkpoint.exists()
    assert not (tmp_path / "killed" / "model.pth").exists()
    for name in ("killed", "whole"):
        done = subprocess.run(
            [*command, str(tmp_path / name)], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert torch.equal(weights(tmp_path / "killed" / "model.pth"), weights(tmp_path / "whole" / "model.pth"))


@pytest.mark.parametrize("cbs", [(), (partial(MixUp, 0.4),)], ids=["plain", "mixup"])
def test_a_fit_that_stopped_early_is_finished_by_the_next_command(cbs, tmp_path, monkeypatch):
    """Nothing improves at so small a learning rate; the process dies between the last epoch and the stage's files."""
    stage = Fit("train", epochs=9, lr=1e-12, schedule=MultiStep(), early_stop=2, bf16=False, cbs=cbs)
    options = RunOptions(limit=64)
    run(recipe(stage), tmp_path / "whole", options)
    row = read_rows(tmp_path / "whole")[0]
    assert 3 <= row["epochs"] < 9
    module = importlib.import_module("micronet.run")

    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "_measure", die)
        with pytest.raises(KeyboardInterrupt):
            run(recipe(stage), tmp_path / "parts", options)
    run(recipe(stage), tmp_path / "parts", options)
    assert read_rows(tmp_path / "parts")[0]["epochs"] == row["epochs"]
    assert torch.equal(weights(tmp_path / "whole" / "model.pth"), weights(tmp_path / "parts" / "model.pth"))


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_before_any_file_is_written_whole_loses_nothing(step, tmp_path, monkeypatch):
    """Every file comes into its place by one renaming: die before each of them in turn, then go on."""
    stages = (Fit("first", epochs=2, lr=0.05, ema=0.9), Fit("second", epochs=1, lr=0.01))
    options = RunOptions(limit=32)
    run(recipe(*stages), tmp_path / "whole", options, source=ROOT / "recipes" / "quickstart.py")
    rename = Path.replace

    class Killed(BaseException):
        pass

    for fatal in itertools.count(0, step):
        folder = tmp_path / f"killed at {fatal}"
        written = itertools.count()

        def kill(self, target, fatal=fatal, written=written):
            if next(written) == fatal:
                raise Killed
            return rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", kill)
            try:
                run(recipe(*stages), folder, options, source=ROOT / "recipes" / "quickstart.py")
                break
            except Killed:
                pass
        run(recipe(*stages), folder, options, source=ROOT / "recipes" / "quickstart.py")
        assert torch.equal(weights(tmp_path / "whole" / "model.pth"), weights(folder / "model.pth")), folder
        files = [sorted(str(f.relative_to(root)) for f in root.rglob("*")) for root in (tmp_path / "whole", folder)]
        assert files[0] == files[1]
    assert fatal >= 18  # run.json, recipe.py, and for each stage checkpoints, model twice, history, two plots, row; ...


def test_stages_follow_each_other_and_a_second_run_changes_nothing(tmp_path):
    stages = (Fit("first", epochs=1, lr=0.05), Fit("second", epochs=1, lr=0.01, batch_size=16))
    folder = tmp_path / "run"
    bundle = run(recipe(*stages), folder, RunOptions(limit=64))
    assert [row["stage"] for row in bundle.history] == ["first", "second"]
    assert "test" in bundle.history[1]
    assert "test" not in bundle.history[0]  # the test split is measured once
    for name in ("run.json", "rows.csv", "model.pth", "1-first/model.pth", "1-first/history.csv", "1-first/row.json"):
        assert (folder / name).stat().st_size > 0
    for name in ("1-first/curves.png", "2-second/lr.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob("checkpoint.pth"))
    assert not list(folder.rglob("*.tmp"))
    times = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.parent != folder}
    run(recipe(*stages), folder, RunOptions(limit=64))
    assert times == {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.parent != folder}


def test_a_row_is_measured_on_the_file_it_stands_beside(tmp_path):
    from micronet import evaluate
    from micronet.data import plain_loader

    run(recipe(Fit("train", epochs=2, lr=0.05)), tmp_path / "run")
    row = read_rows(tmp_path / "run")[0]
    data = digits(batch_size=32)
    model = load(tmp_path / "run" / "model.pth").model
    for split, images in (("valid", data.valid), ("test", data.test)):
        again = evaluate(model, plain_loader(images, data))
        assert again.row() == row[split]
    assert row["file_bytes"] == (tmp_path / "run" / "1-train" / "model.pth").stat().st_size
    assert row["params"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            lambda: (recipe(Fit("train", epochs=1, lr=0.06)), RunOptions(limit=32)),
            r"\(stages\[0\] \(train\): lr was 0.05, is now 0.06\)",
        ),
        (lambda: (recipe(Fit("train", epochs=1, lr=0.05)), RunOptions(limit=32, seed=1)), r"\(seed was 0, is now 1\)"),
        (lambda: (recipe(Fit("train", epochs=1, lr=0.05)), RunOptions(limit=33)), r"\(limit was 32, is now 33\)"),
        (
            lambda: (recipe(Fit("train", epochs=1, lr=0.05), model=networks.resnet20), RunOptions(limit=32)),
            r"\(model was separable_net, is now resnet20\)",
        ),
    ],
)
def test_another_recipes_folder_is_refused_and_left_alone(other, says, tmp_path):
    run(recipe(Fit("train", epochs=1, lr=0.05)), tmp_path / "run", RunOptions(limit=32))
    before = (tmp_path / "run" / "model.pth").read_bytes()
    with pytest.raises(MicronetError, match=says):
        run(*(lambda pair: (pair[0], tmp_path / "run", pair[1]))(other()))
    assert (tmp_path / "run" / "model.pth").read_bytes() == before


def test_what_differs_reads_as_the_recipe_is_written():
    from micronet.differences import differences
    from micronet.recipe import describe

    def resolved(*stages, model=SMALL, batch_size=32, **more):
        values = Recipe(data=partial(digits, batch_size=batch_size), model=model, stages=stages)
        return json.loads(json.dumps({"recipe": describe(values), "seed": 0, "limit": None} | more))

    first, second = Fit("train", epochs=24), Fit("tune", epochs=2, cbs=(partial(MixUp, 0.4),))
    assert differences(resolved(first), resolved(first)) == []
    for old, new, says in (
        (
            (first, second),
            (first, Fit("tune", epochs=2, cbs=(partial(MixUp, 0.2),))),
            "cbs[0].args[0] was 0.4, is now 0.2",
        ),
        ((first, second), (first, Fit("tune", epochs=2)), "cbs was [MixUp], is now []"),
        ((first, second), (first, Fit("fine", 2, cbs=second.cbs)), "name was 'tune', is now 'fine'"),
    ):
        assert differences(resolved(*old), resolved(*new)) == [f"stages[1] (tune): {says}"]
    assert differences(resolved(first), resolved(first, second)) == ["stages was [train], is now [train, tune]"]
    steps = Fit("train", epochs=30, ema=0.9, schedule=MultiStep())
    assert differences(resolved(first), resolved(steps, batch_size=64, limit=9)) == [
        "data.batch_size was 32, is now 64",
        "stages[0] (train): epochs was 24, is now 30",
        "stages[0] (train): schedule was OneCycle, is now MultiStep",
        "stages[0] (train): ema was None, is now 0.9",
        "limit was None, is now 9",
    ]
    wide = partial(networks.separable_net, width_multiplier=0.5)
    assert differences(resolved(first), resolved(first, model=wide)) == ["model.width_multiplier was 0.25, is now 0.5"]
    plain = resolved(first, model=networks.separable_net)
    assert differences(plain, resolved(first)) == ["model.width_multiplier was None, is now 0.25"]


def test_only_the_first_differences_are_named(tmp_path):
    run(recipe(Fit("train", epochs=0)), tmp_path / "run", RunOptions(limit=32))
    other = Fit("train", epochs=0, lr=1.0, wd=0.1, ema=0.9, keep="last")
    with pytest.raises(
        MicronetError, match=r"lr was 0.1, is .*wd was .*ema was None, is now 0.9; and 2 more\): choose"
    ):
        run(recipe(other), tmp_path / "run", RunOptions(limit=32, seed=1))


@pytest.mark.parametrize("keep", ["best", "last"])
def test_what_is_printed_of_a_fit(keep, tmp_path):
    console = Console(record=True, file=io.StringIO(), width=200)
    # Nothing improves at so small a learning rate, so that an early epoch is the best one.
    run(recipe(Fit("train", epochs=6, lr=1e-12, keep=keep)), tmp_path, RunOptions(limit=64), console=console)
    text = console.export_text()
    best = read_rows(tmp_path)[0]["best_epoch"]
    assert best is None if keep == "last" else best < 6
    assert (f"kept epoch {best} of 6: best top-1 on validation\n" in text) == (keep == "best")
    lines = (tmp_path / "1-train" / "history.csv").read_text().splitlines()
    assert lines[0] == "epoch,train_loss,valid_loss,top1,top5,lr,seconds"
    accuracy = float(lines[-1].split(",")[3])
    assert 0 <= accuracy <= 1
    assert re.search(rf"\n +6 .* {100 * accuracy:.2f} %", text)
    assert re.search(r"\n +epoch .* top-1 +top-5 ", text)
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3", "4", "5", "6"]  # as in the table


@pytest.mark.parametrize(
    ("smoothing", "augment", "says"),
    [
        (0.1, Augment(crop=2), "training loss (smoothed labels, augmented images)"),
        (0.0, Augment(crop=2), "training loss (augmented images)"),
        (0.0, None, "training loss"),
    ],
)
def test_the_curves_say_what_the_training_loss_is_of(smoothing, augment, says, tmp_path, monkeypatch):
    module = importlib.import_module("micronet.stage_files")
    drawn = []
    monkeypatch.setattr(module, "plot_curves", lambda *arguments: drawn.append(arguments[-1]))
    console = Console(record=True, file=io.StringIO(), width=200)
    stage = Fit("train", epochs=1, lr=0.01, label_smoothing=smoothing)
    one = Recipe(data=partial(digits, batch_size=32, augment=augment), model=SMALL, stages=(stage,))
    run(one, tmp_path, RunOptions(limit=32), console=console)
    assert drawn == [says]
    assert " parameters; 1 epoch on " in console.export_text()


def test_a_loss_that_does_not_fall_suggests_no_rate():
    from micronet.learner import find_lr

    with pytest.raises(MicronetError, match="the loss did not fall in 20 steps"):
        find_lr(recipe(Fit("train", epochs=1), model=Constant), steps=20, limit=64)


def test_equal_values_from_another_text_go_on(tmp_path):
    stage = Fit("train", epochs=1, lr=0.05)
    run(recipe(stage), tmp_path / "run", RunOptions(limit=32))
    run(recipe(Fit(name="train", lr=5e-2, epochs=1)), tmp_path / "run", RunOptions(limit=32))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(MicronetError, match="not empty and not a run folder"):
        run(recipe(Fit("train", epochs=1)), tmp_path, RunOptions(limit=32))
    with pytest.raises(MicronetError, match="leaves it alone"):
        set_aside(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_a_run_that_failed_on_its_first_values_does_not_hold_the_folder(tmp_path):
    with pytest.raises(MicronetError, match="batch_size"):
        run(Recipe(partial(digits, batch_size=0), SMALL, (Fit("t", epochs=0),)), tmp_path / "run", RunOptions(limit=32))
    run(Recipe(partial(digits, batch_size=8), SMALL, (Fit("t", epochs=0),)), tmp_path / "run", RunOptions(limit=32))


@pytest.mark.parametrize("text", ["{}", "{", "[1]"])
def test_a_damaged_record_is_said(text, tmp_path):
    run(recipe(Fit("train", epochs=0)), tmp_path, RunOptions(limit=32))
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(MicronetError, match=r"run\.json: damaged"):
        run(recipe(Fit("train", epochs=0)), tmp_path, RunOptions(limit=32))


def test_fresh_moves_the_earlier_run_and_deletes_nothing(tmp_path):
    for expected in ("run.1", "run.2"):
        run(recipe(Fit("train", epochs=0)), tmp_path / "run", RunOptions(limit=32))
        assert set_aside(tmp_path / "run").name == expected
    assert (tmp_path / "run.1" / "model.pth").exists()
    assert set_aside(tmp_path / "run") is None


def test_two_commands_on_one_folder(tmp_path):
    import fcntl

    folder = tmp_path / "run"
    folder.mkdir()
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(MicronetError, match="another micronet works in this folder"):
            run(recipe(Fit("train", epochs=1)), folder, RunOptions(limit=32))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (Recipe(partial(digits, batch_size=0), SMALL, (Fit("t", epochs=1),)), "data: batch_size"),
        (Recipe(partial(digits, augment=Augment(crop=40)), SMALL, (Fit("t", epochs=1),)), "stage t: crop must be"),
        (Recipe(digits, Unbuildable, (Fit("t", epochs=1),)), "stage t: no such thing"),
        (Recipe(digits, partial(SMALL, conv="round"), (Fit("t", epochs=1),)), "stage t: conv"),
        (Recipe(digits, partial(torch.nn.Linear, in_features=3), (Fit("t", epochs=1),)), "stage t: .*num_classes"),
    ],
)
def test_values_that_do_not_work_are_one_line(wrong, says, tmp_path):
    with pytest.raises(MicronetError, match=says):
        run(wrong, tmp_path / "run", RunOptions(limit=32))


def test_a_loss_that_explodes_is_said(tmp_path):
    with pytest.raises(MicronetError, match="no longer finite in epoch 1: lower the learning rate"):
        run(recipe(Fit("train", epochs=2, lr=1e18, schedule=Cosine())), tmp_path / "run", RunOptions(limit=320))
    assert not (tmp_path / "run" / "model.pth").exists()


def test_the_recorded_number_of_threads_is_used_again(tmp_path):
    stage = Fit("train", epochs=0)
    threads = torch.get_num_threads()
    run(recipe(stage), tmp_path / "run", RunOptions(limit=32))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["hardware"]["threads"] = threads + 1
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    console = Console(record=True, file=io.StringIO(), width=200)
    try:
        run(recipe(stage), tmp_path / "run", RunOptions(limit=32), console=console)
        assert torch.get_num_threads() == threads + 1
        assert f"using {threads + 1} threads, as the run began with" in console.export_text()
    finally:
        torch.set_num_threads(threads)


def test_a_timm_network_goes_through_the_same_path(tmp_path):
    timm = pytest.importorskip("timm", reason="the timm extra is not installed")
    network = partial(timm.create_model, model_name="test_vit", img_size=32)
    bundle = run(recipe(Fit("train", epochs=1, lr=0.01), model=network), tmp_path, RunOptions(limit=48))
    assert bundle.factory.startswith("timm.")
    assert torch.equal(weights(tmp_path / "model.pth"), weights(tmp_path / "1-train" / "model.pth"))


def test_tensorboard_logs_into_the_stage(tmp_path):
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    run(recipe(Fit("train", epochs=1, lr=0.01)), tmp_path, RunOptions(limit=48, tensorboard=True))
    assert list((tmp_path / "1-train" / "tensorboard").glob("events.*"))


def test_weight_decay_spares_batchnorm_and_biases_where_asked():
    from micronet.learner import make_learner

    data = digits(batch_size=32).limit(64)
    for spare, expected in ((True, [5e-4]), (False, [5e-4, 0.0])):
        fit = Fit("train", epochs=1, lr=1e-9, wd=5e-4, wd_bn_bias=spare, bf16=False)
        learn = make_learner(fit, SMALL(num_classes=10), data)
        from micronet.learner import run_fit

        run_fit(learn, fit, Console(quiet=True))
        groups = learn.opt.opt.param_groups
        assert [group["weight_decay"] for group in groups] == expected
        assert sum(len(group["params"]) for group in groups) == len(list(learn.model.parameters()))
    assert all(p.dim() <= 1 for p in groups[1]["params"])


def test_one_cycle_is_fastais_and_others_follow_their_schedule():
    from micronet.learner import make_learner, run_fit

    data = digits(batch_size=32).limit(128)
    steps = len(data.train) // 32
    for schedule in (OneCycle(div=10, div_final=100, pct_start=0.5), MultiStep(milestones=(0.5,), gamma=0.1)):
        fit = Fit("train", epochs=4, lr=0.1, schedule=schedule, bf16=False)
        learn = make_learner(fit, SMALL(num_classes=10), data)
        rates = run_fit(learn, fit, Console(quiet=True)).lrs
        assert len(rates) == 4 * steps
        if isinstance(schedule, OneCycle):
            assert rates[0] == pytest.approx(0.01)
            assert max(rates) == pytest.approx(0.1, rel=0.1)
            assert rates[-1] < 0.1 * 0.2
        else:
            assert rates == pytest.approx([0.1] * 2 * steps + [0.01] * 2 * steps)


@pytest.mark.slow
def test_a_compiled_fit_leaves_a_plain_network(tmp_path):
    bundle = run(recipe(Fit("train", epochs=1, lr=0.01, compile=True)), tmp_path, RunOptions(limit=48))
    assert list(bundle.model.state_dict()) == list(SMALL(num_classes=10).state_dict())


LARGE = ("densenet121", "googlenet", "preact_resnet18", "resnet56", "resnet110")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in networks.__all__]
)
def test_every_family_fits_a_few_steps_on_digits(name, tmp_path):
    build = getattr(networks, name)
    smaller = {"wide_resnet": {"depth": 10, "width": 1}, "densenet121": {"growth": 4}}
    smaller |= {"resnet18": {"width": 16}, "resnet34": {"width": 8}, "separable_net": {"width_multiplier": 0.5}}
    network = partial(build, **smaller.get(name, {}))
    bundle = run(recipe(Fit("train", epochs=1, lr=0.01, batch_size=16), model=network), tmp_path, RunOptions(limit=48))
    assert bundle.kwargs["num_classes"] == 10
    assert 0 <= bundle.history[0]["valid"]["top1"] <= 1
    assert torch.isfinite(weights(tmp_path / "model.pth")).all()
