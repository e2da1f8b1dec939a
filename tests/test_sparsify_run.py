"""Zeros through the pipeline: stages one after another, edits, files, storage; every network; a plan of it."""

import io
from functools import partial

import pytest
import torch
from rich.console import Console
from torch import nn

import micronet.models as networks
from callbacks.prune import PruneChannels
from callbacks.ramp import Cubic, Linear, OneShot
from callbacks.sparsify import Sparsify
from micronet import Fit, MicronetError, Recipe, RunOptions, load, run, score
from micronet.data import digits
from micronet.edits import separable, swap_activation
from micronet.folder import read_rows
from micronet.learner import make_learner, run_fit
from micronet.plan import plan

SMALL = partial(networks.separable_net, width_multiplier=0.25)
HARD = partial(swap_activation, old=nn.ReLU6, new=nn.Hardswish)


def recipe(*stages, model=SMALL):
    return Recipe(data=partial(digits, batch_size=32), model=model, stages=stages)


def is_masked(bundle):
    state = bundle.model.state_dict()
    assert bundle.masks
    return all(bool((state[name] == 0)[~mask].all()) for name, mask in bundle.masks.items())


def zeros(bundle):
    return sum(int((~mask).sum()) for mask in bundle.masks.values())


def test_every_later_stage_keeps_every_zero(tmp_path):
    out = io.StringIO()
    stages = (
        Fit("sparse", epochs=2, lr=0.05, cbs=(partial(Sparsify, 0.5, schedule=Cubic(end=0.5)),)),
        Fit("tune", epochs=1, lr=0.05, wd=0.1, ema=0.9),
        Fit("hard", epochs=1, lr=0.05, edit=(HARD,)),
        Fit("more", epochs=1, lr=0.05, cbs=(partial(Sparsify, 0.8, schedule=Linear()),)),
    )
    last = run(recipe(*stages), tmp_path, RunOptions(limit=96), console=Console(file=out, width=200))
    bundles = [load(tmp_path / f"{k + 1}-{stage.name}" / "model.pth") for k, stage in enumerate(stages)]
    size = sum(m.weight.numel() for m in last.model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    assert [zeros(bundle) for bundle in bundles] == [size // 2] * 3 + [int(0.8 * size + 0.5)]
    assert all(map(is_masked, bundles))
    for name, mask in bundles[0].masks.items():
        assert torch.equal(mask, bundles[2].masks[name])
        assert not (bundles[3].masks[name] & ~mask).any()
    assert not torch.equal(bundles[0].model.fc.weight, bundles[2].model.fc.weight)
    assert f"sparsify: 0.5000 of {size:,} weights in" in out.getvalue()
    # A mask is a bit for each weight; what is kept takes 16, which the challenge grants to whoever quantises nothing.
    rows = read_rows(tmp_path)
    other = rows[0]["params"] - size
    folded = rows[0]["params"] - sum(array.numel for array in score(tmp_path / "model.pth").ledger.arrays)
    for row, share in zip(rows, (0.5, 0.5, 0.5, 0.8), strict=True):
        words = (size * (1 - share) + other - folded) / 2 + size / 32
        assert row["storage"] == pytest.approx(words, rel=2e-3)


def test_no_epoch_is_enough_for_one_shot_and_an_average_keeps_it(tmp_path):
    stages = (
        Fit("sparse", epochs=0, cbs=(partial(Sparsify, 0.5, schedule=OneShot(), scope="local"),)),
        Fit("tune", epochs=1, ema=0.99, keep="last"),
    )
    last = run(recipe(*stages), tmp_path, RunOptions(limit=64))
    assert is_masked(last)
    assert zeros(last) == zeros(load(tmp_path / "1-sparse" / "model.pth"))


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (partial(Sparsify, {"head": 0.5}, scope="local"), "stage s: sparsify weight: the network has no layer 'head'"),
        (partial(Sparsify, 0.5, criterion="taylor"), "stage s: criterion 'taylor' judges by the gradients of steps"),
    ],
)
def test_what_is_refused_is_one_line(made, says, tmp_path):
    epochs = 0 if "taylor" in says else 1
    with pytest.raises(MicronetError, match=says) as caught:
        run(recipe(Fit("s", epochs=epochs, cbs=(made,))), tmp_path / "r", RunOptions(limit=64))
    assert "\n" not in str(caught.value)


def test_a_plan_says_what_comes_out(tmp_path):
    fewer = partial(Sparsify, 0.8, schedule=OneShot())
    stages = (
        Fit("half", epochs=0, cbs=(partial(Sparsify, 0.5, schedule=OneShot(), scope="local"),)),
        Fit("most", epochs=0, cbs=(partial(Sparsify, 0.9, schedule=OneShot()),)),
    )
    planned = plan(recipe(*stages), limit=64, timed=False).stages
    run(recipe(*stages), tmp_path, RunOptions(limit=64))
    for stage, row in zip(planned, read_rows(tmp_path), strict=True):
        assert stage.score.storage == pytest.approx(row["storage"], rel=0.01)
    assert [stage.expected.estimated for stage in planned] == [False, True]
    refused = plan(recipe(stages[1], Fit("back", epochs=0, cbs=(fewer,))), limit=64, timed=False).findings
    assert [(finding.stage, finding.refused) for finding in refused] == [("back", True)]


TIMM = ("efficientnet_b0", "mobilenetv3_small_100", "mobilenetv3_large_100")
GRANULARITIES = ("weight", "kernel", "filter", "2:4", "block")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in (*networks.__all__, *TIMM) if name != "resnet20"]


def built(name):
    if name in networks.__all__:
        return getattr(networks, name)(num_classes=10)
    timm = pytest.importorskip("timm", reason="the timm extra is not installed")
    return timm.create_model(name, num_classes=10)


def fitted(model, epochs, *cbs):
    stage = Fit("s", epochs=epochs, lr=0.01, keep="last", ema=0.9, cbs=cbs)
    learn = make_learner(stage, model, digits(batch_size=16).limit(48))
    run_fit(learn, stage, Console(quiet=True))
    return learn


def sparse(model, granularity, epochs=1, **arguments):
    """Fit with half of the weights masked, and check that they are."""
    criterion = "taylor" if granularity == "weight" and epochs else "magnitude"
    learn = fitted(
        model, epochs, partial(Sparsify, 0.5, Linear(), granularity=granularity, criterion=criterion, **arguments)
    )
    masks, state = learn.sparsify._masks, learn.model.state_dict()
    unit = {"weight": 1, "2:4": 2, "block": 16, "kernel": 49}.get(granularity)  # at most
    unit = unit or max(mask[0].numel() for mask in masks.values())
    gone = sum(int((~mask).sum()) for mask in masks.values())
    assert abs(gone - sum(mask.numel() for mask in masks.values()) / 2) <= unit / 2
    assert all(not state[name][~mask].any() for name, mask in masks.items())
    assert all(torch.isfinite(value).all() for value in state.values())
    return learn


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["resnet20", *SLOW])
def test_every_network_takes_every_granularity(name, granularity):
    sparse(built(name), granularity)


@pytest.mark.parametrize("name", ["resnet20", *SLOW])
def test_every_network_takes_it_after_pruning_and_edits(name):
    learn = fitted(built(name), 0, partial(PruneChannels, 0.3))
    sparse(learn.model, "kernel", scope="normalised")
    if name not in ("separable_net", *TIMM):  # which are all depthwise and pointwise already
        sparse(separable(built(name)).model, "weight")


def test_a_network_with_squeezed_and_depthwise_layers():
    learn = sparse(built("tf_mobilenetv3_small_minimal_100"), "2:4", epochs=0)
    assert "conv_stem (its 3 input channels are not divisible by 4)" in learn.sparsify.summary
    assert "conv_dw" in learn.sparsify.summary


@pytest.mark.slow
def test_a_compiled_fit_keeps_zeros(tmp_path):
    made = partial(Sparsify, 0.5, criterion="movement", schedule=Linear())
    bundle = run(recipe(Fit("s", epochs=2, lr=0.01, compile=True, cbs=(made,))), tmp_path, RunOptions(limit=48))
    assert is_masked(bundle)
    assert next(iter(bundle.masks)) in SMALL(num_classes=10).state_dict()
