"""Scores against published and independent numbers, and the score in the training table."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from counting import Run
from fastai.callback.core import Callback, CancelFitException
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, Recorder
from torch import nn
from torchvision import models
from vectors import vectors

from callbacks import op_counter
from callbacks.op_counter import OpCounter
from callbacks.op_trace import count_ops, total_params
from callbacks.seed import seed_score
from micronet.bundle import Bundle, save
from micronet.counting import Assume
from micronet.errors import MicronetError
from micronet.factories import describe_factory
from micronet.models import preact_resnet18, resnet18, resnet20, wide_resnet
from micronet.rules import imt, imt_profile, imt_small, official, seed
from micronet.score import score, tally

NETWORKS = {
    "wrn22_6_fastai_c100": partial(wide_resnet, depth=22, width=6, num_classes=100),
    "wrn28_10_c100": partial(wide_resnet, depth=28, width=10, num_classes=100, residual_scale=1.0),
    "resnet20_c10": partial(resnet20, num_classes=10),
    "resnet18_kuangliu_c10": partial(resnet18, num_classes=10),
    "preactresnet18_weiaicunzai_c100": partial(preact_resnet18, num_classes=100, layout="weiaicunzai"),
}
# What the vectors call our operations; both kinds of pool are global ones in these networks.
TYPES = {"conv2d": "conv", "batch_norm": "bn", "global_avg_pool": "gap", "relu": "relu", "add": "add", "mul": "mul"}


SCENARIOS = {
    "fp32": ({"freebie": False}, None),
    "freebie16": ({}, None),
    "int8_acc32": ({}, Assume(bits=8)),
    "int8_acc16": ({}, Assume(bits=8, acc=16)),
    "sparse50_freebie16": ({}, Assume(sparsity=0.5)),
    "sparse90_freebie16": ({}, Assume(sparsity=0.9)),
    "sparse50_int8": ({}, Assume(bits=8, sparsity=0.5)),
}


def on_meta(name):
    with torch.device("meta"):  # the cost needs no weights, and drawing them takes longer than counting
        return NETWORKS[name]()


def test_the_fastai_entry_scores_what_it_printed():
    result = score(on_meta("wrn22_6_fastai_c100"), rules=seed)
    conv, pool, linear = (result.by_op[op] for op in ("conv2d", "global_avg_pool", "linear"))
    assert (result.params, conv["mults"], conv["adds"]) == (9693108, 1384562688, 1383342080)
    assert (conv["ops"], linear["ops"], pool["ops"], result.ops) == (2075623424, 57500, 24768, 2075705692)
    assert result.score == pytest.approx(0.4634393112239968, rel=0, abs=1e-12)
    assert f"{math.floor(result.score * 1e5) / 1e5:.5f}" == "0.46343"  # cut, not rounded, in the source
    assert set(result.by_op) == {"conv2d", "global_avg_pool", "linear"}
    assert (conv["lines"], pool["lines"], linear["lines"]) == (22, 1, 1)


def test_every_number_of_the_expected_file_comes_out():
    expected = vectors("seed_expected")["writeup_2019-10-08 (no ReLU)"]
    result = score(on_meta("wrn22_6_fastai_c100"), rules=seed)
    assert result.params == expected["params"]
    assert result.ops == expected["total_ops"]
    assert result.score == pytest.approx(expected["score"], rel=0, abs=1e-12)
    for op, name in {"conv2d": "conv", "linear": "linear", "global_avg_pool": "gap"}.items():
        for kind in ("mults", "adds", "ops"):
            assert result.by_op[op][kind] == expected[f"{name}_{kind}"]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_of_the_vectors(name):
    expected, network = vectors(name), on_meta(name)
    ledger = score(network).ledger
    held = {array.name: array for array in ledger.arrays}
    for layer in expected["layers"]:
        layer["type"] = "gap" if layer["type"] == "avgpool" else layer["type"]
    for rules, profile in ((seed, "seed"), (official, "official")):
        result = tally(name, ledger, rules)
        for kind in ("conv", "gap", "linear", "bn", "relu", "add", "mul"):
            ours = [line for line in result.lines if TYPES.get(line.op, line.op) == kind]
            theirs = [layer for layer in expected["layers"] if layer["type"] == kind]
            assert [(line.mults, line.adds) for line in ours] == [
                (layer[profile]["mults"], layer[profile]["adds"]) for layer in theirs
            ]
            assert [[*line.in_shape] for line in ours] == [layer["in"] for layer in theirs]
            assert [[*line.out_shape] for line in ours] == [layer["out"] for layer in theirs]
            assert [bool(line.folded) for line in ours] == [
                bool(layer.get("folded") or layer.get("const_folded")) for layer in theirs
            ]
            for line, layer in zip(ours, theirs, strict=True):
                assert line.weights == layer.get("weight_elems", 0)
                assert line.constants == layer["official"]["dense_elems"]
                assert line.weights + line.constants == sum(held[array].numel for array in line.arrays)
                assert line.taps == layer.get("vec", line.taps)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_total_of_the_vectors(name):
    totals, ledger = vectors(name)["totals"], score(on_meta(name)).ledger

    def count(rules, assume=None):
        return tally(name, ledger, rules, assume)

    def check(result, expected, **names):
        for key, attribute in names.items():
            assert getattr(result, attribute) == pytest.approx(expected[key], rel=1e-12, abs=1e-12), (key, expected)

    same = {key: key for key in ("mults", "adds", "ops", "score_params", "score_ops", "score")}
    result = count(seed)
    check(result, totals["seed"], **same)
    assert (result.params, result.macs) == (totals["params_all"], totals["macs_conv_linear"])
    assert sum(line.weights for line in ledger.lines) == totals["params_conv_linear_weights"]
    variants = {"official": {}, "official_maxpool": {"max_pool": True}, "official_bn_free": {"free_batch_norm": True}}
    for variant, options in variants.items():
        expected, rules = totals[variant], replace(official, **options)
        result = count(rules)
        check(result, expected, params="params", mults="mults", adds="adds")
        for kind, cost in expected["by_type"].items():
            ours = [line for line in result.lines if TYPES.get(line.op, line.op) == kind.replace("avgpool", "gap")]
            assert (sum(line.mults for line in ours), sum(line.adds for line in ours)) == (cost["mults"], cost["adds"])
        assert len(expected["scenarios"]) == len(SCENARIOS)
        for scenario, (more, assume) in SCENARIOS.items():
            result = count(replace(rules, **more), assume)
            check(result, expected["scenarios"][scenario], params_eff="storage", **same)
            assert result.storage * 32 == pytest.approx(expected["scenarios"][scenario]["storage_bits"], rel=1e-12)
    check(count(imt), totals["imt_formula_dense32"], w="params", f_macs="macs", **{"score_8.3e8": "score"})
    check(count(imt_small), totals["imt_formula_dense32"], **{"score_2.8e8": "score"})
    # The course's script saw ReLU modules only, and ours are all modules where some of the vectors' are functional.
    functional = sum(la["n_out"] for la in vectors(name)["layers"] if la["type"] == "relu" and la["functional"])
    result = count(imt_profile)
    assert result.ops - functional == totals["imt_profile_py"]["ops16"]
    assert result.storage == totals["imt_profile_py"]["params16"]


def small_net(channels=8):
    return nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 2)
    )


def test_json_is_plain_and_its_totals_are_sums_of_its_lines():
    result = score(small_net(), input_size=(3, 8, 8))
    told = result.to_json()
    assert json.loads(json.dumps(told)) == told
    assert list(told)[:6] == ["model", "input", "rules", "options", "totals", "lines"]
    assert (told["model"], told["input"], told["rules"]) == ("Sequential", [3, 8, 8], "official")
    totals = told["totals"]
    names = ["params", "storage", "mults", "adds", "macs", "ops", "score_params", "score_ops", "score"]
    assert list(totals)[:9] == names
    assert totals["mults"] == sum(line["mults"] for line in told["lines"]) == 27 * 8 * 36 + 8 * 36 + 8 + 16
    assert totals["adds"] == sum(line["adds"] for line in told["lines"]) == 27 * 8 * 36 + 35 * 8 + 16
    assert totals["params"] == sum(math.prod(array["shape"]) for array in told["arrays"]) == 27 * 8 + 8 + 16 + 2
    assert totals["storage"] == totals["params"] / 2  # 16 bits for free
    assert totals["ops"] == sum(line["ops"] for line in told["lines"]) == totals["mults"] / 2 + totals["adds"]
    assert totals["score"] == totals["storage"] / 36.5e6 + totals["ops"] / 10.49e9


def test_what_no_formula_covers_is_refused_unless_allowed():
    odd = Run(lambda self, x: torch.fft.fft(x).real)
    with pytest.raises(MicronetError, match=r"fft.*--allow-unknown"):
        score(nn.Sequential(small_net(), odd))
    assert any("fft" in name for name in score(nn.Sequential(small_net(), odd), allow_unknown=True).uncounted)
    assert score(small_net()).uncounted == ()


def test_a_file_brings_its_own_size(tmp_path):
    net, path = resnet20(num_classes=3), tmp_path / "model.pth"
    factory, kwargs = describe_factory(partial(resnet20, num_classes=3))
    save(Bundle(net, factory, kwargs, ("a", "b", "c"), input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.2,) * 3), path)
    result = score(path, rules=seed)
    assert (result.model, result.input_size, result.params) == (str(path), (3, 16, 16), total_params(net))
    assert result.lines == score(net, input_size=(3, 16, 16), rules=seed).lines
    assert score(str(path), input_size=(3, 32, 32)).macs == score(net).macs == 4 * result.macs - 3 * 64 * 3


def test_a_network_that_cannot_run_on_such_an_image_is_the_users_to_mend():
    for size, said in (((1, 8, 8), "Sequential.*1, 8, 8.*channels"), ((3, 8, -8), "input_size must be positive")):
        with pytest.raises(MicronetError, match=said):
            score(small_net(), input_size=size)


def test_scoring_a_file_does_not_import_fastai():  # which takes longer than the scoring
    code = "import micronet.bundle, micronet.score, sys; assert 'fastai' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


def learner(*cbs, metrics=()):
    torch.manual_seed(1)
    images, labels = torch.randn(8, 3, 8, 8), torch.randint(2, (8,))
    loader = DataLoader(list(zip(images, labels, strict=True)), bs=4)
    dls = DataLoaders(loader, loader, device=torch.device("cpu"))
    learn = Learner(dls, small_net(), loss_func=nn.CrossEntropyLoss(), cbs=cbs, metrics=metrics, lr=0.1)
    learn.remove_cb(learn.progress) if hasattr(learn, "progress") else None
    learn.logger = lambda row: None
    return learn


def accuracy(pred, target):
    return (pred.argmax(1) == target).float().mean()


class _Raise(Callback):
    def __init__(self, error):
        self.error = error

    def after_batch(self):
        raise self.error


def expected_score(learn, size=(3, 8, 8)):
    return seed_score(total_params(learn.model), count_ops(learn.model, size))


def test_the_training_table_has_the_score_and_the_fit_is_the_same():
    with_column, without = learner(OpCounter(), metrics=accuracy), learner(metrics=accuracy)
    for learn in (with_column, without):
        learn.fit(2)
    recorder = with_column.recorder
    assert list(recorder.metric_names) == ["epoch", "train_loss", "valid_loss", "accuracy", "score", "time"]
    assert [row[-1] for row in recorder.values] == [expected_score(with_column)] * 2
    assert [row[:-1] for row in recorder.values] == list(without.recorder.values)
    for a, b in zip(with_column.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [metric.name for metric in with_column.metrics] == ["accuracy"]
    assert with_column.validate()[-1] == expected_score(with_column)
    assert [metric.name for metric in with_column.metrics] == ["accuracy"]


@pytest.mark.parametrize("error", [None, CancelFitException(), RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("kept", [True, False])
def test_the_learner_is_as_found_whatever_ends_the_fit(error, kept):
    counter = OpCounter()
    learn = learner(*([counter] if kept else []), metrics=accuracy)
    found = list(learn.metrics)
    cbs = ([] if kept else [counter]) + ([_Raise(error)] if error else [])
    if error is None or isinstance(error, CancelFitException):
        learn.fit(1, cbs=cbs)
    else:
        with pytest.raises(type(error)):
            learn.fit(1, cbs=cbs)
        if kept:  # no event fires after such an end: the next fit undoes it
            learn.fit(1)
            assert list(learn.recorder.metric_names).count("score") == 1
    assert list(learn.metrics) == found
    learn.remove_cb(counter)
    learn.fit(1)
    assert "score" not in learn.recorder.metric_names


class _Widen(Callback):
    def before_epoch(self):
        if self.epoch == 1:
            self.learn.model = small_net(12)


def test_the_cost_is_counted_again_only_when_the_structure_changed(monkeypatch):
    counted = []
    monkeypatch.setattr(op_counter, "count_ops", lambda *args: counted.append(args) or count_ops(*args))
    counter = OpCounter()
    learn = learner(counter)
    learn.fit(3, cbs=_Widen())
    scores = [row[-1] for row in learn.recorder.values]
    assert scores[0] < scores[1] == scores[2] == expected_score(learn)
    assert [size for _, size in counted] == [(3, 8, 8)] * 2
    learn.fit(1)  # a fit starts afresh
    assert len(counted) == 3
    learn.model = small_net()
    learn.fit(1)
    assert [row[-1] for row in learn.recorder.values] == scores[:1]


def test_any_formula_and_size_can_be_shown():
    learn = learner(OpCounter(score=lambda params, lines: params + lines[0].macs, input_size=(3, 10, 10)))
    learn.fit(1)
    assert learn.recorder.values[0][-1] == total_params(learn.model) + 27 * 8 * 8 * 8


def test_a_network_that_cannot_be_traced_fails_at_the_first_batch():
    learn = learner(OpCounter())
    learn.model = nn.Sequential(small_net(), Run(lambda self, x: x if x.sum() > 0 else -x))
    batches = []
    learn.add_cb(Callback(after_batch=lambda self: batches.append(1)))
    with pytest.raises(ValueError, match="cannot trace Sequential"):
        learn.fit(1)
    assert not batches


def test_the_column_is_there_before_the_table_is_named():
    assert OpCounter.order < Recorder.order


def check_torchvision(name):
    """Hold the parameters and multiply-accumulates of a torchvision network against its published ones."""
    weights = models.get_model_weights(name).DEFAULT
    side = weights.transforms().crop_size[0]
    kwargs = {"googlenet": {"aux_logits": False, "init_weights": False}, "inception_v3": {"init_weights": False}}
    kwargs = {"image_size": side} if name.startswith("vit") else kwargs.get(name, {})
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # RegNet cannot be built on meta
        result = score(models.get_model(name, **kwargs), input_size=(3, side, side), rules=seed)
    assert result.params == weights.meta["num_params"]
    assert result.macs / 1e9 == pytest.approx(weights.meta["_ops"], abs=6e-4), name  # published with three decimals


@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small", "regnet_x_400mf"])
def test_torchvision_networks_have_their_published_cost(name):
    check_torchvision(name)


@pytest.mark.slow
def test_every_torchvision_classifier_has_its_published_cost():
    names = models.list_models(module=models)
    assert len(names) >= 80
    for name in names:
        check_torchvision(name)
