"""What a recipe will cost, told before it is trained; and what it asks for and will not get."""

import json
import random
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from rich.console import Console
from test_expected import Declares

import micronet.models as networks
from callbacks.ema import EMA
from callbacks.expected import requantised
from callbacks.op_counter import OpCounter
from callbacks.quant_aware import QuantAware
from callbacks.quantize import QuantizeInt8
from callbacks.ramp import OneShot
from callbacks.resize import ProgressiveResizing
from callbacks.schedule import Constant, MultiStep, Step
from callbacks.sparsify import Sparsify
from micronet import RULES, Assume, Fit, MicronetError, Recipe, RunOptions, load, run, score, sgd
from micronet.data import Augment, ImageSet, digits
from micronet.model_source import open_model
from micronet.plan import Plan, plan
from micronet.plan_checks import check_data
from micronet.plan_report import duration, effect, plan_lines, plan_table
from micronet.score import tally

ROOT = Path(__file__).parent.parent
QUICKSTART = str(ROOT / "recipes" / "quickstart.py")
SIZE = (3, 32, 32)
SMALL = partial(networks.separable_net, width_multiplier=0.25)
KEPT = SMALL(num_classes=10)


class OtherLoss(Callback):
    """Replaces the loss by one that does not say y_int."""

    def after_create(self) -> None:
        self.learn.loss_func = torch.nn.functional.cross_entropy


class Fails(Callback):
    """Raises in the first step."""

    def before_batch(self) -> None:
        raise RuntimeError("no such thing")


def five(num_classes: int) -> torch.nn.Module:
    """A network that does not care how many classes there are."""
    return SMALL(num_classes=5)


def same(num_classes: int) -> torch.nn.Module:
    """The same network at every call: who trains it is found out."""
    return KEPT


def recipe(*stages: Fit, model=SMALL, **data) -> Recipe:
    return Recipe(data=partial(digits, **({"batch_size": 32} | data)), model=model, stages=stages)


def planned(*stages: Fit, model=SMALL, limit: int | None = 96, timed: bool = False, **data) -> Plan:
    return plan(recipe(*stages, model=model, **data), limit=limit, timed=timed)


def method(name: str, **expected) -> Fit:
    return Fit(name, epochs=0, cbs=(partial(Declares, **expected),))


@pytest.mark.parametrize("name", RULES)
def test_a_row_says_what_score_says(name):
    rules = RULES[name]
    (row,) = plan(recipe(Fit("train", epochs=3)), rules=rules, timed=False).stages
    counted = score(SMALL(num_classes=10), input_size=SIZE, rules=rules)
    assert (
        row.to_json().items()
        >= {
            "stage": "train",
            "epochs": 3,
            "batch_size": 32,
            "params": counted.ledger.params,
            "storage": counted.storage,
            "macs": counted.macs,
            "ops": counted.ops,
            "score": counted.score,
            "seconds": None,
        }.items()
    )


def test_a_row_says_what_the_runs_row_will_say(tmp_path):
    run(recipe(Fit("train", epochs=0)), tmp_path / "run", RunOptions(limit=96))
    then = json.loads((tmp_path / "run" / "1-train" / "row.json").read_text())
    (row,) = planned(Fit("train", epochs=0)).stages
    for name in ("params", "macs", "ops", "score"):
        assert row.to_json()[name] == then[name]
    assert row.file_bytes == pytest.approx(then["file_bytes"], rel=0.03)  # the run's has its rows in it, too


def test_the_time_is_that_of_real_steps(monkeypatch):
    monkeypatch.setattr("micronet.plan_time.SECONDS", 1e9)  # or a slow machine takes fewer
    result = planned(Fit("train", epochs=4, ema=0.9, cbs=(partial(MixUp, 0.4),)), Fit("none", epochs=0), timed=True)
    timing = result.stages[0].timing
    assert timing.steps == 3
    assert timing.step_seconds > 0
    assert timing.valid_seconds > 0
    assert timing.measured == 9  # four epochs of three steps, three of them to warm up
    assert timing.epoch_seconds == 3 * timing.step_seconds + timing.valid_seconds
    assert result.stages[1].seconds == 0
    assert result.seconds == result.stages[0].seconds == pytest.approx(4 * timing.epoch_seconds)
    assert not [finding for finding in result.findings if finding.stage == "train"]


def test_a_set_of_few_steps_is_measured_over_several_epochs(monkeypatch):
    monkeypatch.setattr("micronet.plan_time.SECONDS", 1e9)
    timing = planned(Fit("train", epochs=1, early_stop=1), batch_size=500, timed=True).stages[0].timing
    assert (timing.steps, timing.measured) == (1, 3)


def test_slow_steps_are_few(monkeypatch):
    monkeypatch.setattr("micronet.plan_time.SECONDS", 0.0)  # all are slow
    timing = planned(Fit("train", epochs=1), batch_size=8, timed=True).stages[0].timing
    assert (timing.steps, timing.measured) == (12, 1)
    assert timing.valid_seconds > 0


class Slow(Callback):
    """Moves a clock by a second for each row of pixels, and writes down the rows and how far the fit is."""

    order = 6
    now, rows, shares = 0.0, (), ()

    def before_batch(self) -> None:
        rows = self.learn.xb[0].shape[-2]
        Slow.now += rows
        if self.learn.training:
            Slow.rows += (rows,)
            Slow.shares += (self.learn.pct_train,)


@pytest.mark.parametrize(("epochs", "each"), [(1, 6), (10, 10), (30, 23)])
def test_each_part_of_growing_images_is_timed_and_weighed(epochs, each, monkeypatch):
    monkeypatch.setattr("micronet.plan_time.SECONDS", 1e9)
    monkeypatch.setattr("micronet.plan_time.time", SimpleNamespace(perf_counter=lambda: Slow.now))
    Slow.now, Slow.rows, Slow.shares = 0.0, (), ()
    growing = (partial(ProgressiveResizing, ((0.3, 20), (0.6, 26))), Slow)
    (row,) = planned(Fit("train", epochs=epochs, cbs=growing), timed=True).stages
    assert Slow.rows == (20,) * each + (26,) * each + (32,) * each
    assert row.timing.step_seconds == pytest.approx(0.3 * 20 + 0.3 * 26 + 0.4 * 32)
    assert (row.timing.measured, row.timing.parts) == (3 * (each - 3), 3)
    # Rates and schedules go by the steps: one epoch is lengthened to six.
    assert Slow.shares == pytest.approx([place / (3 * max(epochs, 6)) for place in range(3 * each)])


def test_slow_steps_of_each_part_are_few(monkeypatch):
    monkeypatch.setattr("micronet.plan_time.SECONDS", 0.0)
    growing = (partial(ProgressiveResizing, ((0.3, 20), (0.6, 26))),)
    result = planned(Fit("train", epochs=9, cbs=growing), timed=True)
    assert result.stages[0].timing.measured == 3
    assert "median of 3 in 3 parts, by their shares" in plan_lines(result, "it")[0][1]


def test_a_busy_machine_is_said(monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (1e3, 0.0, 0.0))
    assert "all times are too long" in planned(Fit("train", epochs=1), timed=True).notes[0]
    assert planned(Fit("train", epochs=1)).notes == ()
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    assert planned(Fit("train", epochs=1), timed=True).notes == ()


def test_nothing_is_kept(tmp_path, monkeypatch):
    before = {name: value.clone() for name, value in KEPT.state_dict().items()}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    result = planned(Fit("train", epochs=2, ema=0.9, cbs=(OpCounter,)), model=same, timed=True)
    assert result.stages[0].timing is not None
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]
    assert all(torch.equal(value, before[name]) for name, value in KEPT.state_dict().items())
    assert KEPT.training
    assert all(parameter.grad is None for parameter in KEPT.parameters())


REFUSED = {
    "two mixers": (Fit("a", epochs=1, cbs=(MixUp, CutMix)), {}, "MixUp and CutMix in one fit"),
    "a loss of its own": (Fit("a", epochs=1, cbs=(OtherLoss, MixUp)), {}, "with the loss cross_entropy"),
    "nothing to mix with": (Fit("a", epochs=1, batch_size=1, cbs=(MixUp,)), {}, "nothing to mix it with"),
    "too few logits": (Fit("a", epochs=1), {"model": five}, "answers with 5 numbers, digits has 10 classes"),
    "no such optimizer": (Fit("a", epochs=1, opt=sgd(momentum=0)), {}, "Nesterov momentum requires a momentum"),
    "no such callback": (Fit("a", epochs=1, cbs=(partial(EMA, 2.0),)), {}, "decay must be a fraction"),
    "a large crop": (Fit("a", epochs=1), {"augment": Augment(crop=40)}, "crop must be smaller than the image"),
}
REFUSED_IN_STEPS = {
    "a callback that fails": (Fit("a", epochs=1, cbs=(Fails,)), {}, "no such thing"),
    "a loss that explodes": (Fit("a", epochs=1, lr=1e30, schedule=Constant()), {}, "no longer finite"),
}


@pytest.mark.parametrize("way", [*REFUSED, *REFUSED_IN_STEPS])
def test_what_a_plan_says_is_refused_a_run_refuses(way, tmp_path):
    fit, arguments, says = (REFUSED | REFUSED_IN_STEPS)[way]
    result = planned(fit, **arguments, timed=way in REFUSED_IN_STEPS)
    assert result.refused
    (finding,) = [finding for finding in result.findings if finding.refused]
    assert says in finding.text
    assert "\n" not in str(finding)
    with pytest.raises(Exception):  # noqa: B017, PT011  whatever it is
        run(recipe(fit, **arguments), tmp_path / "run", RunOptions(limit=96))


def test_what_is_refused_is_said_once():
    fit, arguments, _ = REFUSED["two mixers"]
    result = planned(fit, Fit("b", epochs=1), **arguments, timed=True)
    assert [finding.stage for finding in result.findings if finding.refused] == ["a"]
    assert result.stages[0].timing is None
    assert result.stages[1].timing is not None
    assert result.seconds is None


def test_what_has_no_effect_is_said_and_not_refused():
    idle = {
        "batch_size 97 is larger than the train split: each step takes all 96": {"epochs": 1, "batch_size": 97},
        "0 epochs, no edit and no callback: it changes nothing": {"epochs": 0, "ema": 0.9},
        "0 epochs: MixUp acts on steps, and has none": {"epochs": 0, "cbs": (MixUp,)},
        "a milestone at 1 is the end": {"epochs": 2, "schedule": MultiStep(milestones=(0.5, 1.0))},
        "no step is left for the smaller": {"epochs": 2, "schedule": Step(every=1.0)},
        "the optimizer's own, 0.5, has no effect": {"epochs": 2, "opt": sgd(momentum=0.5)},
        "early_stop=2 can't end a fit of 3 epochs": {"epochs": 3, "early_stop": 2},
        "two callbacks EMA": {"epochs": 1, "ema": 0.9, "cbs": (EMA,)},
        "compile costs about a minute": {"epochs": 1, "compile": True},
    }
    result = planned(*(Fit(f"s{place}", **arguments) for place, arguments in enumerate(idle.values())))
    assert [finding.stage for finding in result.findings] == [f"s{place}" for place in range(len(idle))]
    for says, finding in zip(idle, result.findings, strict=True):
        assert says in finding.text
    assert not result.refused


def test_a_choice_by_the_test_images_is_said():
    result = planned(Fit("best", epochs=1), Fit("last", epochs=1, keep="last"), valid="test")
    assert [str(finding).partition(" (")[0] for finding in result.findings] == [
        "best: note: the test images choose the epoch"
    ]


def test_int8_that_the_test_images_would_judge_is_refused():
    (finding,) = planned(Fit("int8", epochs=0, cbs=(QuantizeInt8,)), valid="test").findings
    assert str(finding).startswith("int8: refused: QuantizeInt8 ranks and judges on validation images")
    assert not planned(Fit("int8", epochs=0, cbs=(QuantizeInt8,))).findings


class Watch(Callback):
    """Looks on before a fit."""

    def before_fit(self) -> None: ...


def test_what_has_an_effect_is_not_spoken_of():
    fine = [
        Fit("train", epochs=4, ema=0.9, early_stop=2, batch_size=96, cbs=(MixUp, OpCounter)),
        Fit("last", epochs=1, keep="last", schedule=MultiStep(milestones=(0.5,))),
        method("declares", sparsity=0.5),
        Fit("acts", epochs=0, cbs=(Watch,)),  # may do something in before_fit: nobody knows
    ]
    assert planned(*fine).findings == ()


def test_bf16_without_instructions_for_it(monkeypatch):
    monkeypatch.setattr("micronet.plan_checks.bf16_speeds_up", lambda device: False)
    assert "no fast instructions" in planned(Fit("a", epochs=1, bf16=True)).findings[0].text
    assert planned(Fit("a", epochs=1, bf16=None)).findings == ()


def test_an_empty_split_is_refused():
    data = digits()
    none = ImageSet(data.valid.images[:0], data.valid.labels[:0])
    assert [finding.refused for finding in check_data(replace(data, valid=none), 10)] == [True]
    assert [finding.refused for finding in check_data(replace(data, train=none), 10)] == [True]
    assert [finding.refused for finding in check_data(data, 11)] == [False]


def test_sparsity_and_bits_are_counted_as_score_counts_them():
    result = planned(
        Fit("train", epochs=0, cbs=(Watch,)),
        method("sparsify", sparsity=0.5),
        method("quantise", weight_bits=8, act_bits=8),
    )
    assert result.findings == ()
    module = SMALL(num_classes=10)
    assumed = [Assume(), Assume(sparsity=0.5), Assume(sparsity=0.5, bits=8)]
    for row, assume in zip(result.stages, assumed, strict=True):
        counted = score(module, input_size=SIZE, assume=assume)
        assert (row.score.storage, row.score.ops, row.score.score) == (counted.storage, counted.ops, counted.score)
        assert not row.expected.estimated
    # A mask takes a bit a weight in the file; a code is not packed there.
    weights = [array.numel for array in result.stages[0].score.ledger.arrays if array.role == "weight"]
    more = result.stages[1].file_bytes - result.stages[0].file_bytes
    assert sum(weights) / 8 <= more < sum(weights) / 8 + 400 * len(weights)  # names, padding to 64 bytes
    assert result.stages[1].file_bytes > result.stages[0].file_bytes
    assert result.stages[2].file_bytes == result.stages[1].file_bytes
    assert [effect(row.expected) for row in result.stages] == ["-", "sparsity 0.5", "sparsity 0.5, 8 bits"]


def test_weights_and_activations_of_other_widths():
    ledger = open_model(SMALL(num_classes=10), input_size=SIZE).ledger()
    (row,) = planned(method("quantise", weight_bits=4, act_bits=8)).stages
    eight = tally("", requantised(ledger, 8, 8), RULES["official"])
    assert eight.storage == tally("", ledger, RULES["official"], Assume(bits=8)).storage
    assert row.score.ops == eight.ops  # the wider input decides
    weights = sum(array.numel for array in ledger.arrays if array.role == "weight")
    assert row.score.storage == eight.storage - weights * 4 / 32
    assert effect(row.expected) == "4-bit weights, 8-bit activations"


def test_a_file_of_few_channels_and_many_zeros_still_takes_bytes():
    pruned, sparse = planned(method("prune", ratio=0.95, estimate=True), method("sparsify", sparsity=0.6)).stages
    assert 0 < pruned.file_bytes < sparse.file_bytes


def test_an_estimate_is_marked():
    result = planned(
        Fit("train", epochs=0, cbs=(Watch,)),
        method("prune", ratio=0.5, estimate=True),
        method("again", ratio=0.5),
    )
    first, second, third = result.stages
    assert (first.expected.estimated, second.expected.estimated, third.expected.estimated) == (False, True, True)
    assert third.expected.ratio == 0.75
    assert third.params < second.params < 0.4 * first.params
    assert third.score.macs < second.score.macs < 0.5 * first.score.macs  # depthwise ones only halve
    assert third.file_bytes < second.file_bytes < first.file_bytes
    assert effect(second.expected) == "ratio 0.5 (estimate)"
    assert any(note.startswith("estimate:") for note in result.notes)
    console = Console(width=160)
    with console.capture() as shown:
        console.print(plan_table(result))
    assert f"~{second.params:,}" in shown.get()


def test_a_contradiction_is_refused_by_name_and_the_rest_goes_on():
    result = planned(
        method("int8", weight_bits=8, act_bits=8), method("prune", ratio=0.5), method("wrong", sparsity=2.0)
    )
    assert [(finding.stage, finding.refused) for finding in result.findings] == [("prune", True), ("wrong", True)]
    assert "channels are removed (ratio 0.5) after quantising to 8 bits: prune first" in result.findings[0].text
    first, *others = [row.expected for row in result.stages]
    assert others == [first, first]


LSQ = {"first_last_bits": None, "images": 32, "norm_images": 32}
QUANTISED = Fit("quantised", epochs=1, lr=0.01, cbs=(partial(QuantAware, 4, 4, **LSQ),))
SPARSE = Fit("sparse", epochs=1, lr=0.01, cbs=(partial(Sparsify, 0.5, OneShot(), scope="local"),))
WIDER = Fit("wider", epochs=1, lr=0.01, cbs=(partial(QuantAware, 6, 8, **LSQ),))


@pytest.mark.parametrize("stages", [(QUANTISED, SPARSE, WIDER), (SPARSE, QUANTISED)], ids=["bits first", "zeros first"])
def test_zeros_and_bits_in_either_order_are_planned_as_they_are_run(stages, tmp_path):
    result = planned(*stages)
    assert result.findings == ()
    run(recipe(*stages), tmp_path / "run", RunOptions(limit=96))
    for place, row in enumerate(result.stages, start=1):
        bundle, expected = load(tmp_path / "run" / f"{place}-{row.name}" / "model.pth"), row.expected
        widths = {(expected.weight_bits, expected.act_bits)} if expected.weight_bits else set()
        assert set(bundle.bits.values()) == widths
        masks = bundle.masks.values()
        zeros = sum(int((~mask).sum()) for mask in masks) / max(1, sum(mask.numel() for mask in masks))
        assert zeros == pytest.approx(expected.sparsity or 0, abs=0.01)
        assert bool(masks) == bool(expected.sparsity)


def test_the_seed_rules_know_no_sparsity():
    result = plan(recipe(method("sparsify", sparsity=0.5)), rules=RULES["seed"], limit=96, timed=False)
    assert result.stages[0].score.score == score(SMALL(num_classes=10), input_size=SIZE, rules=RULES["seed"]).score
    assert any("seed rules know no bits" in note for note in result.notes)


def test_what_cannot_be_recorded_is_said_as_run_says_it():
    with pytest.raises(MicronetError, match="can't be recorded"):
        planned(Fit("a", epochs=1, cbs=(lambda: EMA(),)))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(None, "-"), (0.0, "0 s"), (0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 0 s")]
    + [(1090, "18 min 10 s"), (3599.7, "1 h 0 min"), (452 * 200, "25 h 6 min")],
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_the_command_prints_a_table(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = call("plan", QUICKSTART, "--smoke")
    assert status == 0
    for part in ("digits; train 64, valid 64, test 64", "plan - rules: official", "72,074", "training: about"):
        assert part in out
    assert not list(tmp_path.iterdir())


def test_the_command_prints_json(call):
    status, out, _ = call("plan", QUICKSTART, "--json", "--no-time", "--rules", "seed", "-s", "epochs=3")
    assert status == 0
    content = json.loads(out)
    assert content["recipe"] == QUICKSTART
    assert content["images"] == {"train": 1295, "valid": 143, "test": 359}
    (row,) = content["stages"]
    assert (row["params"], row["epochs"], row["seconds"], content["seconds"]) == (72_074, 3, None, None)
    assert round(row["score"], 7) == 0.0020608  # as the recipe's header says


def test_help_has_an_example(call):
    status, out, _ = call("plan", "--help")
    assert status == 0
    assert "micronet plan recipes/" in " ".join(out.split())


def test_a_refused_recipe_ends_with_status_1_and_its_table(call, tmp_path):
    source = (ROOT / "recipes" / "quickstart.py").read_text().replace("opt=sgd()", "opt=sgd(momentum=0)")
    (tmp_path / "mine.py").write_text(source)
    status, out, err = call("plan", tmp_path / "mine.py", "--no-time", "--limit", "64")
    assert status == 1
    assert "train: refused: ValueError: Nesterov" in out
    assert "72,074" in out
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("plan", "nothing.py"), 1, "nothing.py: no such recipe file"),
        (("plan", QUICKSTART, "-s", "epochs=-3"), 1, "epochs must be a whole number"),
        (("plan", QUICKSTART, "--device", "tpu9"), 1, "--device tpu9: not usable here"),
        (("plan", QUICKSTART, "--rules", "mine"), 2, "--rules must be one of official"),
        (("plan", QUICKSTART, "-s", "epochs"), 2, "NAME=VALUE"),
        (("plan",), 2, "RECIPE"),
    ],
)
def test_wrong_commands(arguments, status, says, call):
    got, out, err = call(*arguments)
    assert got == status
    assert says in err
    assert "Traceback" not in out + err


def test_milestones_beyond_the_end_are_refused_by_the_recipe_itself(call, tmp_path):
    source = (ROOT / "recipes" / "quickstart.py").read_text()
    source = source.replace("OneCycle()", "MultiStep(milestones=(0.5, 40))").replace("OneCycle", "MultiStep")
    (tmp_path / "mine.py").write_text(source)
    status, _, err = call("plan", tmp_path / "mine.py")
    assert status == 1
    assert "milestones must be a number in" in err
    assert err.count("\n") == 1
