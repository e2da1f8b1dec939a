"""Methods where networks and recipes are not what they mostly are: shared weights, other image sizes, no epochs."""

import io
from dataclasses import replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from fastai.callback.core import Callback
from pruning import CLASSES, count, fit, learner, plain
from rich.console import Console
from torch import nn
from torch.nn.utils import prune as torch_prune

from callbacks.distill import Distill
from callbacks.distill_features import AttentionTransfer, Hints
from callbacks.ema import EMA
from callbacks.expected import Expected, follow, together
from callbacks.masks import KeepZeros
from callbacks.prune import PruneChannels
from callbacks.ramp import Linear, OneShot, Rounds
from callbacks.sparsify import Sparsify
from micronet import Fit, MicronetError, Recipe, RunOptions, load, run, save
from micronet.bundle import Bundle
from micronet.data import ImageSet, digits
from micronet.edits import low_rank, swap_activation
from micronet.learner import find_lr
from micronet.models import resnet20
from micronet.plan import plan
from micronet.teachers import distill_from

LIMIT = RunOptions(limit=40)


class Shared(nn.Module):
    """A convolution that runs twice under two names, and two linear layers with one weight."""

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.alias = self.again
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.free, self.relu = nn.Conv2d(8, 8, 1), nn.ReLU()
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.relu(self.alias(self.relu(self.again(self.relu(self.stem(x))))))
        x = self.relu(self.free(x)).mean((2, 3))
        return self.fc(self.two(self.one(x)))


@pytest.fixture
def shared():
    torch.manual_seed(3)
    return Shared()


@pytest.mark.parametrize("rewind", [None, 0.0])
def test_zeros_of_shared_weights_survive_averaging_and_rewinding(shared, rewind):
    sparsify = Sparsify(0.6, schedule=Linear(start=0.0, end=0.5), rewind=rewind)
    learn = fit(learner(shared), 3, sparsify, EMA(0.9))
    parameters = dict(learn.model.named_parameters())
    assert set(sparsify.masks) <= set(parameters)
    for name, mask in sparsify.masks.items():
        assert not parameters[name][~mask].any(), name
    zeros = sum(int((parameters[name] == 0).sum()) for name in sparsify._masks)
    assert zeros == pytest.approx(0.6 * sum(mask.numel() for mask in sparsify._masks.values()), abs=1)


def test_averages_of_shared_weights_are_cut_and_layers_with_shared_weights_keep_their_channels(shared):
    before = {name: tuple(p.shape) for name, p in shared.named_parameters()}
    cb = PruneChannels(0.5, schedule=OneShot(end=0.5))
    learn = fit(learner(shared), 2, cb, EMA(0.9))
    after = {name: tuple(p.shape) for name, p in learn.model.named_parameters()}
    assert after["one.weight"] == before["one.weight"] == (8, 8)
    assert count(learn.model) < sum(torch.Size(shape).numel() for shape in before.values())
    assert "another layer's, too" in cb.summary  # what is skipped is said in the output
    assert cb.summary.count("skipped") == 1


def test_a_fit_without_epochs_prunes_beside_a_teacher_and_masks():
    torch.manual_seed(0)
    model = plain()
    mask = torch.rand(model[3].weight.shape) > 0.3
    keep = KeepZeros({"3.weight": mask})
    learn = fit(learner(model), 0, keep, Distill(plain(), 4.0, 0.5), PruneChannels(0.5))
    assert learn.model[3].weight.shape == keep.masks["3.weight"].shape != mask.shape
    fit(learn, 1, keep)
    assert not learn.model[3].weight[~keep.masks["3.weight"]].any()


def test_two_of_four_zeros_are_not_lost_to_a_later_pruning():
    sparsify = Sparsify(0.5, granularity="2:4", schedule=OneShot())
    learn = fit(learner(plain()), 1, sparsify)
    with pytest.raises(ValueError, match=r"3.weight: two of each four input channels are zero, and would not"):
        fit(learn, 1, KeepZeros(sparsify.masks), PruneChannels({"0": 0.25}))


@pytest.mark.parametrize(
    ("choice", "schedule", "says"),
    [
        ({"ratio": 0.5}, Rounds(start=0.0, end=0.5, rounds=4), "at most 3, or more epochs"),
        ({"ratio": 0.1}, Rounds(start=0.0, end=1.0, rounds=4), "round 1 of 4 would remove nothing"),
        ({"ratio": {"0": 0.01, "3": 0.5}}, OneShot(), "ratio=0.01 of 0 is less than half a channel"),
    ],
)
def test_a_round_or_a_layer_that_loses_nothing_is_refused(choice, schedule, says):
    learn = learner(plain())
    before = count(learn.model)
    with pytest.raises(ValueError, match=says):
        fit(learn, 4, PruneChannels(**choice, schedule=schedule))
    assert count(learn.model) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"ratio": float("nan")}, "ratio must be a fraction above 0"),
        ({"ratio": "0.5"}, "ratio must be a fraction above 0"),
        ({"ratio": {"0": float("nan"), "3": 0.5}}, "ratio must be a fraction above 0"),
        ({"ratio": {"0": 0}}, "must name a layer that loses channels"),
    ],
)
def test_ratios_that_are_none_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        PruneChannels(**arguments)


def test_a_share_of_zeros_below_half_a_weight_is_refused():
    with pytest.raises(ValueError, match="is less than half a weight: nothing would be masked"):
        fit(learner(plain()), 1, Sparsify(1e-6))
    with pytest.raises(ValueError, match="sparsity must be a fraction"):
        Sparsify("0.5")


def test_an_optimizer_whose_state_can_not_be_cut_is_refused_before_anything_changes():
    opt = partial(_wrapped, opt=torch.optim.Adafactor)
    learn = learner(plain(), opt_func=opt)
    before = count(learn.model)
    with pytest.raises(ValueError, match=r"its optimizer keeps .* which can't be cut along with them: choose one"):
        fit(learn, 2, PruneChannels(0.5, schedule=OneShot(end=0.5)))
    assert count(learn.model) == before


def _wrapped(params, lr, opt, **kwargs):
    from fastai.optimizer import OptimWrapper

    return OptimWrapper(params, opt, lr=lr)


def test_scales_that_a_step_has_hardly_moved_choose_nothing():
    cb = PruneChannels(0.5, importance="bn_scale", schedule=OneShot(end=0.01))
    with pytest.raises(ValueError, match="the scales within every group are alike"):
        fit(learner(plain()), 1, cb, lr=1e-3)


def test_taylor_names_a_layer_that_no_gradient_reaches():
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.fc = nn.Linear(8, CLASSES)

        def forward(self, x):
            x = torch.relu(self.a(x))
            y = self.b(x).detach() if self.training else self.b(x)
            return self.fc((x + torch.relu(y)).mean((2, 3)))

    with pytest.raises(ValueError, match=r"taylor: b got no gradient in any step"):
        fit(learner(Idle()), 1, PruneChannels(0.5, importance="taylor", schedule=OneShot(end=0.5)))


class Joined(nn.Module):
    """A block that joins two layers' channels, and has an inner layer as wide as both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.h = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)

    def forward(self, x):
        a = torch.relu(self.a(x))
        return torch.cat([a, self.c(torch.relu(self.h(a)))], 1)


def test_hints_do_not_guess_which_channels_a_block_lost():
    torch.manual_seed(0)
    student = nn.Sequential(Joined(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))
    hints = Distill(plain(), 4.0, 0.0, features=(Hints({"0": "3"}, weight=0.1),))
    with pytest.raises(ValueError, match="which of its 16 channels the student's layer '0' lost can't be told"):
        fit(learner(student), 2, hints, PruneChannels(0.5, schedule=OneShot(end=0.5)))


def test_a_teacher_that_can_not_take_the_images_is_one_line():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, CLASSES))
    with pytest.raises(ValueError, match=r"the teacher can't take the student's batch \(8, 3, 8, 8\): mat1 and mat2"):
        fit(learner(plain()), 1, Distill(teacher))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A file of a network for 32x32 digits, trained with the usual cut of valid from train."""
    folder = tmp_path_factory.mktemp("base")
    run(Recipe(partial(digits, batch_size=32), resnet20, (Fit("train", epochs=1),)), folder, LIMIT)
    return folder / "model.pth"


def large(**kwargs):
    """Digits of 64x64 pixels."""
    data = digits(**kwargs)
    parts = {}
    for split in ("train", "valid", "test"):
        images = getattr(data, split)
        pixels = images.images.repeat_interleave(2, 2).repeat_interleave(2, 3)
        parts[split] = ImageSet(pixels.contiguous(memory_format=torch.channels_last), images.labels)
    return replace(data, **parts)


def test_a_file_begun_on_larger_images_is_counted_at_their_size(base, tmp_path):
    stages = (Fit("pruned", epochs=0, cbs=(partial(PruneChannels, macs=0.3),)),)
    bundle = run(Recipe(partial(large, batch_size=32), base, stages), tmp_path / "r", LIMIT)
    assert bundle.input_size == (3, 64, 64)
    assert load(tmp_path / "r" / "model.pth").input_size == (3, 64, 64)
    assert 0.67 * 163_250_816 < bundle.history[-1]["macs"] <= 0.7 * 163_250_816  # of ResNet-20 at 64x64


def test_a_network_of_one_size_is_not_begun_on_another(base, tmp_path):
    flat = Bundle(
        model=Flat(10), factory="tests.test_method_corners:Flat", kwargs={"num_classes": 10},
        classes=load(base).classes, input_size=(3, 32, 32), mean=digits().mean, std=digits().std,
    )  # fmt: skip
    from micronet.start import _at_size

    with pytest.raises(MicronetError, match=r"was made for images of 3x32x32 .* and can't take digits's 3x64x64"):
        _at_size(flat, large(), "flat.pth")


class Flat(nn.Module):
    """One linear layer of all pixels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 32 * 32, num_classes)

    def forward(self, x):
        return self.fc(x.flatten(1))


def test_a_file_is_not_validated_on_what_it_was_trained_on(base, tmp_path):
    for cut in ({"valid": 0.3}, {"split_seed": 1}):
        recipe = Recipe(partial(digits, batch_size=32, **cut), base, (Fit("more", epochs=1),))
        with pytest.raises(MicronetError, match="it would be validated on images that it was trained on"):
            run(recipe, tmp_path / "r", LIMIT)
    run(Recipe(partial(digits, valid=0.1), base, (Fit("more", epochs=0),)), tmp_path / "same", LIMIT)


def test_a_network_of_the_recipes_own_that_torch_masked_keeps_its_zeros(tmp_path):
    stages = (Fit("train", epochs=1, lr=0.05), Fit("more", epochs=1, lr=0.05))
    bundle = run(Recipe(partial(digits, batch_size=32), masked_by_torch, stages), tmp_path / "r", LIMIT)
    weight, mask = bundle.model[0].weight, bundle.masks["0.weight"]
    assert 0 < int((~mask).sum()) == int((weight == 0).sum())
    assert bundle.history[-1]["storage"] < count(bundle.model)


def masked_by_torch(num_classes: int) -> nn.Module:
    model = plain(classes=num_classes)
    torch_prune.random_unstructured(model[0], "weight", 0.5)
    return model


@pytest.mark.slow
def test_what_a_plan_expects_of_some_layers_is_theirs(base):
    def stage(name, *cbs, **kwargs):
        return Fit(name, epochs=1, cbs=cbs, **kwargs)

    some, other = ({name: 0.5} for name in ("layer1.0.conv1", "conv1"))
    sparse = partial(Sparsify, scope="local")
    allowed = [
        (stage("a", partial(sparse, some)), stage("b", partial(sparse, other))),
        (stage("a", partial(sparse, some), partial(sparse, other)),),
        (stage("a", partial(sparse, 0.6)), stage("b", partial(sparse, {"fc": 0.9}))),
    ]
    for stages in allowed:
        recipe = Recipe(partial(digits, batch_size=32), base, stages)
        assert not plan(recipe, limit=40, timed=False).findings
        run(recipe, base.parent / f"run{allowed.index(stages)}", LIMIT)
    refused = [
        (stage("a", partial(sparse, 0.6)), stage("b", partial(sparse, 0.5))),
        (stage("a", partial(sparse, 0.6)), stage("b", edit=(partial(low_rank, method="spatial_svd", macs=0.5),))),
    ]
    for stages in refused:
        recipe = Recipe(partial(digits, batch_size=32), base, stages)
        assert plan(recipe, limit=40, timed=False).refused
        with pytest.raises(MicronetError):
            run(recipe, base.parent / "refused", LIMIT)


def test_partial_shares_are_not_compared_and_exact_ones_are():
    part = Expected(sparsity=0.1, partial=True, estimate=True)
    assert together([part, Expected(sparsity=0.5)]).sparsity == 0.5
    assert follow(Expected(sparsity=0.5), part).sparsity == 0.5
    with pytest.raises(ValueError, match="is asked where an earlier fit left"):
        follow(Expected(sparsity=0.5), Expected(sparsity=0.4))


def test_the_plan_of_one_layer_is_of_one_layer(base):
    cut = partial(PruneChannels, {"layer1.0.conv1": 0.5})
    recipe = Recipe(partial(digits, batch_size=32), base, (Fit("p", epochs=0, cbs=(cut,)),))
    planned = plan(recipe, limit=40, timed=False).stages[0].params
    left = run(recipe, base.parent / "one", LIMIT).history[-1]["params"]
    assert left == 270_154
    assert planned == pytest.approx(left, rel=0.01)


def test_notes_of_stages_without_epochs_are_true(base):
    fold = partial(swap_activation, old=nn.ReLU, new=nn.ReLU6)
    stages = (
        Fit("edit", epochs=0, edit=(fold,)),
        Fit("taught", epochs=0, cbs=(partial(distill_from, base),)),
        Fit("nothing", epochs=0),
    )
    recipe = Recipe(partial(digits, batch_size=32), base, stages)
    found = {one.stage: one.text for one in plan(recipe, limit=40, timed=False).findings}
    assert found == {
        "taught": "0 epochs: Distill acts on steps, and has none",
        "nothing": "0 epochs, no edit and no callback: it changes nothing",
    }


class Seen(Callback):
    """Remembers of what modules the network is made."""

    kinds: ClassVar[set[type]] = set()

    def before_fit(self) -> None:
        Seen.kinds |= {type(module) for module in self.learn.model.modules()}


def test_a_learning_rate_is_looked_for_in_the_first_fit_with_epochs_as_it_is_edited(base):
    Seen.kinds = set()
    six = partial(swap_activation, old=nn.ReLU, new=nn.ReLU6)
    cut = partial(PruneChannels, 0.5, schedule=OneShot(end=0.2))
    stages = (Fit("base", epochs=0), Fit("pruned", epochs=2, edit=(six,), cbs=(cut, Seen)))
    find_lr(Recipe(partial(digits, batch_size=16), base, stages), steps=20, limit=160)
    assert nn.ReLU6 in Seen.kinds
    assert nn.ReLU not in Seen.kinds


def test_what_a_swap_is_given_must_be_classes():
    with pytest.raises(MicronetError, match=r"new must be another one of .*, got ReLU6\(\)"):
        swap_activation(plain(), nn.ReLU, nn.ReLU6())
    with pytest.raises(MicronetError, match="old must be a class"):
        swap_activation(plain(), nn.ReLU(), nn.ReLU6)


def test_the_output_names_what_a_fit_did(base, tmp_path):
    out = io.StringIO()
    teacher = partial(distill_from, base, features=(AttentionTransfer({"layer1": "layer1"}),))
    stages = (Fit("p", epochs=1, cbs=(partial(PruneChannels, 0.5), teacher)),)
    run(
        Recipe(partial(digits, batch_size=32), base, stages),
        tmp_path / "r",
        LIMIT,
        console=Console(file=out, width=250),
    )
    assert "prune_channels: channels" in out.getvalue()
    assert "distill: taught by" in out.getvalue()


def test_a_bundle_of_shared_weights_is_saved_as_sparse_as_it_is(shared, tmp_path):
    sparsify = Sparsify(0.5, schedule=OneShot())
    learn = fit(learner(shared), 1, sparsify, EMA(0.9))
    bundle = Bundle(
        model=learn.model, factory="x:y", kwargs={}, classes=tuple("abcde"), input_size=(3, 8, 8),
        mean=(0.0,) * 3, std=(1.0,) * 3, masks=sparsify.masks,
    )  # fmt: skip
    save(bundle, tmp_path / "m.pth", factory=Shared)
    again = load(tmp_path / "m.pth", factory=Shared)
    assert all(torch.equal(mask, again.masks[name]) for name, mask in sparsify.masks.items())
