"""Distillation in a recipe: teachers read from files, gone on with after a kill, planned, and in no file."""

import importlib
import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.optimizer import Adam
from rich.console import Console

import micronet.models as networks
from callbacks.distill import Decouple
from callbacks.distill_features import AttentionTransfer, Hints
from callbacks.prune import PruneChannels
from callbacks.ramp import Linear
from callbacks.soft_targets import soft_target_loss
from micronet import Fit, MicronetError, Recipe, RunOptions, adamw, load, run, save
from micronet.bundle import Bundle
from micronet.data import Augment, cifar10, digits, plain_loader
from micronet.plan import plan
from micronet.recipe import describe
from micronet.teachers import distill_from

BASE = Path(__file__).parent / "data" / "resnet20_cifar10.pth"
SMALL = partial(networks.separable_net, width_multiplier=0.25)
LIMIT = RunOptions(limit=96, seed=3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The file of a teacher of digits; untrained answers teach, too."""
    data = digits()
    torch.manual_seed(0)
    bundle = Bundle(
        model=networks.resnet20(num_classes=10),
        factory="micronet.models.resnet:resnet20",
        kwargs={"num_classes": 10},
        classes=data.classes,
        input_size=data.input_size,
        mean=data.mean,
        std=data.std,
    )
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    save(bundle, path)
    return path


def recipe(*cbs, model=SMALL, **fit) -> Recipe:
    stage = Fit("distil", **({"epochs": 1, "lr": 0.05, "cbs": cbs} | fit))
    return Recipe(partial(digits, batch_size=32, augment=Augment(crop=2)), model, (stage,))


def weights(path: Path) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in load(path).model.state_dict().values()])


class StopAt(Callback):
    """Stands in for a crash: raises in the middle of an epoch."""

    order = 11

    def after_pred(self) -> None:
        if (self.learn.epoch, self.learn.iter) == (2, 1):
            raise KeyboardInterrupt


FEATURES = (AttentionTransfer({"layer2": "layer2"}), Hints({"layer3": "layer3", "layer2": "layer1"}))
LAST = {"keep": "last"}  # the best epoch may be one before the crash
WAYS = {
    "soft targets, mixup, average": ({"temperature": 20}, {"ema": 0.9}, (partial(MixUp, 0.4),)),
    "decoupled, cutmix": ({"decouple": Decouple(), "standardise": True}, {"label_smoothing": 0.1} | LAST, (CutMix,)),
    "layers, momentum": ({"features": FEATURES}, {"grad_clip": 1.0} | LAST, (partial(MixUp, 0.4),)),
    "layers, adamw, two groups": ({"features": FEATURES}, {"opt": adamw(), "lr": 1e-3, "wd_bn_bias": False} | LAST, ()),
    "layers, channels removed": ({"features": FEATURES}, LAST, (partial(PruneChannels, ratio=0.4, schedule=Linear()),)),
    "layers, fastai's own Adam": ({"features": FEATURES}, {"opt": Adam, "lr": 1e-3} | LAST, ()),
}


SLOW = ("decoupled, cutmix", "layers, momentum", "layers, channels removed")


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] * (way in SLOW)) for way in WAYS])
def test_an_interrupted_distillation_goes_on_to_the_same_bits(way, teacher, tmp_path, monkeypatch):
    arguments, fit, cbs = WAYS[way]
    made = recipe(partial(distill_from, teacher, **arguments), *cbs, epochs=4, **fit)
    run(made, tmp_path / "whole", LIMIT)
    module = importlib.import_module("micronet.run")
    plain = module.run_fit
    with monkeypatch.context() as patch:
        patch.setattr(module, "run_fit", lambda *a, cbs=(), **k: plain(*a, cbs=(*cbs, StopAt()), **k))
        with pytest.raises(KeyboardInterrupt):
            run(made, tmp_path / "parts", LIMIT)
    checkpoint = torch.load(tmp_path / "parts" / "1-distil" / "checkpoint.pth", weights_only=True)
    adapters = next(state for name, state in checkpoint["callbacks"].items() if "distill" in name)["adapters"]
    assert len(adapters) == (2 if "layers" in way else 0)
    torch.rand(7)  # what another process would have drawn
    console = Console(record=True, file=io.StringIO(), width=200)
    run(made, tmp_path / "parts", LIMIT, console=console)
    assert "going on after epoch 2 of 4" in console.export_text()
    assert torch.equal(weights(tmp_path / "whole" / "model.pth"), weights(tmp_path / "parts" / "model.pth"))


def test_a_run_says_what_taught_it_and_its_file_holds_the_student_alone(teacher, tmp_path):
    taught = partial(distill_from, (teacher, teacher), temperature=4, weight=0.9, features=FEATURES)
    bundle = run(recipe(taught), tmp_path / "r", LIMIT)
    assert list(bundle.model.state_dict()) == list(SMALL(num_classes=10).state_dict())
    assert (tmp_path / "r" / "model.pth").stat().st_size < teacher.stat().st_size / 4
    record = json.loads((tmp_path / "r" / "run.json").read_text())["resolved"]["recipe"]["stages"][0]["cbs"][0]
    assert record["call"] == "micronet:distill_from"
    assert record["args"][0][0] == describe(teacher)
    assert "sha256" in record["args"][0][0]
    assert record["temperature"] == 4


def test_a_teacher_changes_what_is_learned_and_not_the_valid_loss(teacher, tmp_path):
    """The row's loss is measured anew on the saved file, without any callback."""
    rows = {}
    for name, cbs in {"plain": (), "taught": (partial(distill_from, teacher, weight=0.9),)}.items():
        run(recipe(*cbs, bf16=False), tmp_path / name, LIMIT)
        history = (tmp_path / name / "1-distil" / "history.csv").read_text().splitlines()
        row = json.loads((tmp_path / name / "1-distil" / "row.json").read_text())
        rows[name] = dict(zip(history[0].split(","), history[1].split(","), strict=True)), row
    assert rows["plain"][0]["train_loss"] != rows["taught"][0]["train_loss"]
    for epoch, row in rows.values():
        assert float(epoch["valid_loss"]) == pytest.approx(row["valid"]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"classes": tuple("jihgfedcba")}, r"its classes are \(j, i, h, g, ... 10 in all\), the data's \(0, 1, 2, 3, "),
        ({"mean": (0.1, 0.2, 0.3)}, r"normalised with mean \(0.1, 0.2, 0.3\), the data's"),
    ],
)
def test_a_teacher_of_other_classes_or_inputs_is_refused(change, says, teacher, tmp_path):
    other = tmp_path / "other.pth"
    save(replace(load(teacher), **change), other)
    with pytest.raises(MicronetError, match=says):
        run(recipe(partial(distill_from, other)), tmp_path / "r", LIMIT)
    found = plan(recipe(partial(distill_from, other)), limit=64)
    assert [finding.refused for finding in found.findings] == [True]
    with pytest.raises(
        MicronetError, match=rf"other\.pth and .*teacher\.pth: teachers with other {next(iter(change))}"
    ):
        distill_from((other, teacher))


def test_what_is_no_file_of_a_teacher_is_refused(teacher, tmp_path):
    with pytest.raises(MicronetError, match="give the teacher's file as a Path"):
        distill_from(str(teacher))
    with pytest.raises(MicronetError, match="give the teacher's file as a Path"):
        distill_from(())
    with pytest.raises(MicronetError, match=r"nowhere\.pth: no such file"):
        run(recipe(partial(distill_from, tmp_path / "nowhere.pth")), tmp_path / "r", LIMIT)
    with pytest.raises(MicronetError, match="stage distil: weight must be a fraction"):
        run(recipe(partial(distill_from, teacher, weight=2)), tmp_path / "r", LIMIT)


def test_a_plan_runs_the_distillation_and_finds_what_a_fit_would_refuse(teacher):
    made = partial(recipe, epochs=3)
    plain, taught = (plan(made(*cbs), limit=64) for cbs in ((), (partial(distill_from, teacher, features=FEATURES),)))
    assert taught.findings == plain.findings == ()
    assert taught.stages[0].file_bytes == pytest.approx(plain.stages[0].file_bytes, rel=0.02)
    assert taught.stages[0].score.score == plain.stages[0].score.score
    found = plan(made(partial(distill_from, teacher, features=(Hints({"layer9": "layer1"}),))), limit=64).findings
    assert [finding.refused for finding in found] == [True]
    assert "the student has no layer 'layer9'" in found[0].text


SHARED = {}


def shared():
    """A source that a recipe can name, of data that the test has."""
    return SHARED["data"]


def test_the_committed_network_teaches_on_real_images(real, tmp_path):
    """A hundred steps on CIFAR-10 take a student nearer to the teacher's answers on images that it did not train on."""
    data = SHARED["data"] = real(cifar10, batch_size=32, valid=0.02).limit(1024)
    images, _ = next(iter(plain_loader(data.valid, data)))
    answers = (load(BASE).model(images) / 4).log_softmax(-1)
    distances = []
    for cbs in ((), (partial(distill_from, BASE, weight=0.9),)):
        stage = Fit("distil", epochs=3, lr=0.02, keep="last", cbs=cbs)
        bundle = run(
            Recipe(shared, partial(networks.separable_net, width_multiplier=0.5), (stage,)), tmp_path / str(len(cbs))
        )
        student = (bundle.model(images) / 4).log_softmax(-1)
        distances.append(soft_target_loss(student, answers).mean().item())
    assert distances[1] < 0.9 * distances[0]
