"""Channel pruning: how much goes, that training goes on with what is left, files, kills and recipes."""

import importlib
import io
import re
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import Adam
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning import CLASSES, STEPS, Coupled, count, coupled, cut, fit, learner, plain, prune
from rich.console import Console
from torch import Tensor, nn

from callbacks.checkpoint import KeepBest, random_state
from callbacks.dependency import find_groups
from callbacks.ema import EMA
from callbacks.masks import KeepZeros
from callbacks.precision import Precision
from callbacks.prune import PruneChannels
from callbacks.ramp import Cubic, Linear, OneShot, Rounds
from callbacks.selection import shortest
from callbacks.sparsify import Sparsify
from callbacks.widths import widths
from micronet import Fit, MicronetError, Recipe, RunOptions, adamw, load, run, sgd
from micronet.bundle import Bundle, save
from micronet.counting import WORD
from micronet.data import digits, loaders
from micronet.edits import swap_activation
from micronet.folder import read_rows
from micronet.model_source import open_model
from micronet.models import resnet20, separable_net, wide_resnet

SIZE = (3, 8, 8)


@pytest.fixture(autouse=True)
def _drawn_alike():
    torch.manual_seed(0)


def ledger(model):
    return open_model(model, input_size=SIZE, masks={}).ledger()


COUNTS = {
    "params": count,
    "macs": lambda model: sum(line.macs for line in ledger(model).lines),
    "storage": lambda model: sum(array.numel for array in ledger(model).arrays) * 32 / WORD,
}


def check_aim(make, name, share, scope, as_count):
    counted, begin = COUNTS[name], COUNTS[name](make())
    limit = int(begin * (1 - share)) if as_count else begin * (1 - share)
    choice = {name: limit if as_count else share, "scope": scope}
    assert counted(cut(make(), **choice)) <= limit < counted(cut(make(), put_back=1, **choice))


@settings(max_examples=8, deadline=None)
@given(st.floats(0.02, 0.8), st.sampled_from(["local", "global", "isomorphic"]), st.booleans())
def test_the_number_of_parameters_is_met_to_one_channel(share, scope, as_count):
    check_aim(coupled, "params", share, scope, as_count)


def thin():
    """More biases than weights, once BatchNorm is folded: arithmetic on weights guesses its storage wrong."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 60, 1, bias=False), nn.BatchNorm2d(60), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(60, 60, 1, groups=60, bias=False), nn.BatchNorm2d(60), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(60, 2))


@pytest.mark.parametrize(
    ("make", "name", "scope", "as_count"),
    [(coupled, "macs", "local", True), (coupled, "storage", "global", False), (thin, "storage", "local", False)],
)
def test_macs_and_storage_are_met_to_one_channel(make, name, scope, as_count):
    check_aim(make, name, 0.4, scope, as_count)


def test_the_committed_network_comes_to_the_sources_parameters(real):
    bundle = load("tests/data/resnet20_cifar10.pth")
    learn = learner(bundle.model, size=32)
    cb = PruneChannels(params=198_309)
    fit(learn, 0, cb)
    left = count(bundle.model)
    # A channel of the widest group is in 7 layers of 64 channels: no other has more parameters.
    assert 198_309 - 5_000 < left <= 198_309
    assert cb.summary.startswith(f"channels 448 -> 38{cb.summary[18]}, params 272,474 -> {left:,}, MACs 40,813,184 -> ")


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.75])
def test_local_takes_the_same_share_of_every_group(ratio):
    model = plain(16)
    cut(model, ratio=ratio)
    assert (model[0].out_channels, model[3].out_channels) == (16 - round(16 * ratio), 32 - round(32 * ratio))


def scaled(by):
    """Two layers whose filters differ in size; the second one's matter less where they are compared as they are."""
    model = plain(16)
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(1, 2, 16))
        model[4].weight.copy_(torch.linspace(0.01, 0.02, 32) * by)
    return model


def test_global_has_one_threshold_and_leaves_every_group_some():
    model = scaled(1)
    cut(model, ratio=0.5, scope="global", importance="bn_scale")
    assert (model[0].out_channels, model[3].out_channels) == (16, 8)  # half of 48, all of them from the second layer
    model = scaled(1)
    cut(model, ratio=0.65, scope="global", importance="bn_scale")
    # 31 of 48: the second keeps a tenth of its 32, rounded up, and the first has to give the other three
    assert (model[0].out_channels, model[3].out_channels) == (13, 4)
    model = scaled(1)
    cut(model, ratio=0.5, scope="global", importance="bn_scale", max_ratio=0.6)
    assert (model[0].out_channels, model[3].out_channels) == (11, 13)


def test_filters_of_every_size_can_be_compared():
    """The second layer's filters are a hundred times smaller, all of them alike: none is worth less for that."""
    model = plain(16)
    with torch.no_grad():
        model[3].weight.mul_(0.01)
    cut(model, ratio=0.5, scope="global")
    assert model[0].out_channels < 16
    assert model[3].out_channels > 4


def test_isomorphic_compares_only_what_is_built_alike():
    groups, _ = find_groups(resnet20(num_classes=CLASSES), (3, 32, 32))
    kinds = {group.name: group.kind for group in groups}
    inner = [name for name in kinds if name.endswith("conv1") and "." in name]
    assert len({kinds[name] for name in inner}) == 1
    assert kinds["conv1"] not in {kinds[name] for name in inner}
    model = nn.Sequential(*scaled(1), nn.Unflatten(1, (CLASSES, 1, 1)), nn.Conv2d(CLASSES, 8, 1), nn.Flatten())
    model.append(nn.Linear(8, CLASSES))
    groups, _ = find_groups(model, SIZE)
    assert len({group.kind for group in groups if isinstance(model[int(group.name)], nn.Conv2d)}) == 3
    whole_model = resnet20(num_classes=CLASSES)
    cut(whole_model, ratio=0.5, scope="isomorphic", size=32)
    found = widths(whole_model)
    inner_left = [found[name]["out_channels"] for name in inner]
    assert sum(inner_left) == sum(16 * 2 ** (int(name[5]) - 1) for name in inner) // 2
    assert found["conv1"]["out_channels"] == 8


def test_ratios_by_layer_name_the_groups_by_any_layer_that_makes_them():
    model = coupled()
    cut(model, ratio={"two.0": 0.5, "hidden": 0.25})
    found, before = widths(model), widths(coupled())
    assert found["stem.0"]["out_channels"] == found["depthwise.0"]["groups"] == 4
    assert found["hidden"]["out_features"] == 12
    assert found["one.0"]["out_channels"] == before["one.0"]["out_channels"]
    with pytest.raises(ValueError, match=r"stem\.0 and two\.0 make the same channels"):
        cut(coupled(), ratio={"stem.0": 0.5, "two.0": 0.25})
    with pytest.raises(ValueError, match=r"no layer 'two\.9' whose channels can be removed; near it: two\."):
        cut(coupled(), ratio={"two.9": 0.5})


@pytest.mark.parametrize(("round_to", "left"), [(1, (45, 27)), (8, (48, 24)), (16, (48, 32))])
def test_widths_are_rounded(round_to, left):
    model = nn.Sequential(nn.Conv2d(3, 60, 1), nn.ReLU(), nn.Conv2d(60, 36, 1), nn.Flatten(), nn.Linear(36 * 64, 5))
    cut(model, ratio=0.25, round_to=round_to)
    assert (model[0].out_channels, model[2].out_channels) == left


def test_grouped_convolutions_keep_their_groups_alike():
    model = coupled()
    cut(model, ratio=0.5)
    conv = model.grouped[0]
    assert (conv.in_channels, conv.out_channels, conv.groups) == (6, 9, 3)
    assert conv.weight.shape == (9, 2, 3, 3)
    depthwise = model.depthwise[0]
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == 4


def test_dense_inputs_go_with_the_channels_that_feed_them():
    model = coupled()
    with torch.no_grad():
        model.hidden.weight[:, 4 * 3 : 4 * 4] = 0  # what the fourth channel's pixels are worth to the dense layer
        model.hidden.weight[:, 4 * 8 : 4 * 9] = 0
        kept = model.mix[2].weight[[0, 1, 2, 4, 5, 6, 7, 9]].clone()
    cut(model, ratio=0.2, feeding=("hidden",))
    assert torch.equal(model.mix[2].weight, kept)
    assert model.hidden.in_features == 32
    assert model.hidden.out_features == 16
    unchanged = widths(coupled())
    assert {k: v for k, v in widths(model).items() if v != unchanged[k]}.keys() == {"mix.2", "hidden"}


def test_only_named_layers_lose_channels():
    model, before = coupled(), widths(coupled())
    cut(model, params=0.02, layers=("one.0", "branch"))
    changed = {name for name, width in widths(model).items() if width != before[name]}
    assert changed <= {"one.0", "one.1", "two.0", "branch", "mix.0", "mix.2"}
    with pytest.raises(ValueError, match="layers: there is no layer 'fc' whose channels can be removed"):
        cut(coupled(), ratio=0.5, layers=("fc",))


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"ratio": 0.01}, r"nothing would be pruned: ratio=0\.01 is less than half a channel"),
        (
            {"ratio": 0.05, "round_to": 8},
            r"nothing would be pruned.*round_to=8.*the widest, grouped\.0, has 18 channels",
        ),
        ({"params": 0.9999}, r"params=0\.9999 can't be reached: [\d,]+ parameters are left of 4,"),
        ({"macs": 3}, "macs=3 can't be reached"),
        ({"params": 10**6}, r"nothing to prune: the network has 4,\d+ parameters, and 1,000,000 may be left"),
        ({"ratio": 0.8, "scope": "global", "round_to": 8}, r"ratio=0\.8 can't be reached"),
        ({}, "exactly one of ratio, params, macs and storage must be given, got none"),
        ({"ratio": 0.5, "macs": 0.5}, "exactly one of"),
        ({"ratio": 0.0}, "ratio must be a fraction above 0"),
        ({"ratio": 0.95}, r"at most max_ratio=0\.9"),
        ({"params": 1.5}, "params must be the share to remove"),
        ({"params": True}, "params must be the share to remove"),
        ({"ratio": 0.5, "importance": "l3"}, "importance must be one of 'l1', 'l2'"),
        ({"ratio": 0.5, "scope": "everywhere"}, "scope must be one of"),
        ({"ratio": 0.5, "round_to": 0}, "round_to must be a whole number from 1"),
        ({"ratio": 0.5, "seed": 1}, "seed must be None with importance 'l1'"),
        ({"ratio": 0.5, "penalty": 0.1}, "penalty must be None with importance 'l1'"),
        ({"ratio": 0.5, "importance": "bn_scale", "penalty": -1}, "penalty must be a number from 0"),
        ({"ratio": 0.5, "schedule": 0.5}, "schedule must be a ramp"),
        ({"ratio": 0.5, "layers": "fc"}, "layers must be a tuple of names"),
        ({"ratio": {"fc": 0.5}, "scope": "global"}, "ratio by layer"),
        ({"ratio": 0.5, "feeding": ("fc",), "importance": "random"}, "feeding judges by weights"),
        ({"ratio": 0.5, "layers": ("one.0",), "feeding": ("hidden",)}, "layers and feeding have no channels in common"),
    ],
)
def test_what_makes_no_sense_or_removes_nothing_is_refused_before_anything_changes(choice, says):
    model = coupled()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        prune(model, **choice)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(-5, 55), st.integers(0, 20))
def test_the_fewest_chunks_are_found_however_bad_the_guess(drops, target, wrong):
    left = [sum(drops) - sum(drops[:n]) for n in range(len(drops) + 1)]
    found = shortest(len(drops), lambda n: left[n], lambda n: wrong - n, target)
    assert found == next((n for n, value in enumerate(left) if value <= target), None)


# In a fit


class At(Callback):
    """Does something after each batch, before or after PruneChannels (35)."""

    run_valid = False

    def __init__(self, order, action):
        super().__init__()
        self.order, self.action = order, action

    def after_batch(self):
        self.action(self.learn)


def kept_of(old, new):
    """The places in an old tensor of the numbers of a new one; None where numbers occur twice."""
    numbers = {value: place for place, value in enumerate(old.flatten().tolist())}
    return None if len(numbers) < old.numel() else torch.tensor([numbers[v] for v in new.flatten().tolist()])


def states(learn):
    """What the optimizer keeps for each parameter, by the parameter's name."""
    inner = getattr(learn.opt, "opt", learn.opt).state
    return {name: dict(inner[p]) for name, p in learn.model.named_parameters() if p in inner}


OPTIMIZERS = {"sgd": sgd(), "adamw": adamw(), "fastai's Adam": Adam}


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_momentum_goes_with_its_weight_and_everything_trains_on(opt):
    learn, seen = learner(opt_func=OPTIMIZERS[opt]), {}

    def look(name):
        def action(learn):
            if learn.iter == 1 and learn.epoch == 0:
                weights = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
                kept = {
                    n: {k: v.clone() for k, v in s.items() if isinstance(v, Tensor)} for n, s in states(learn).items()
                }
                seen[name] = weights, kept

        return At({"before": 34, "after": 36}[name], action)

    cb = PruneChannels(0.5, schedule=OneShot(end=2 / STEPS))
    objects = list(learn.model.parameters())
    fit(learn, 1, look("before"), look("after"), cb)
    assert all(now is then for now, then in zip(learn.model.parameters(), objects, strict=True))
    (weights, kept), (narrow_weights, narrow_kept) = seen["before"], seen["after"]
    compared = 0
    for name, value in narrow_weights.items():
        places = kept_of(weights[name], value)
        for key, number in kept[name].items():
            if number.shape == weights[name].shape and places is not None:
                assert torch.equal(narrow_kept[name][key].flatten(), number.flatten()[places]), (name, key)
                compared += number.any()
    assert compared > 20
    assert sum(v.numel() for v in narrow_weights.values()) < 0.4 * sum(v.numel() for v in weights.values())
    for name, p in learn.model.named_parameters():
        assert not torch.equal(p, narrow_weights[name]), f"{name} trains no more"
        assert all(v.shape == p.shape for v in states(learn)[name].values() if isinstance(v, Tensor) and v.dim())


@pytest.mark.parametrize("way", [{"bf16": True, "channels_last": True}, {"bf16": False, "channels_last": True}])
def test_it_goes_on_in_bf16_and_channels_last(way):
    learn, seen = learner(), {}

    def look(learn):
        if learn.iter == 2:
            seen.update({name: p.detach().clone() for name, p in learn.model.named_parameters()})
            seen["layout"] = learn.model.one[0].weight.is_contiguous(memory_format=torch.channels_last)

    fit(learn, 1, Precision(**way), PruneChannels(0.5, schedule=OneShot(end=3 / STEPS)), At(36, look))
    assert seen.pop("layout")
    assert all(not torch.equal(p, seen[name]) for name, p in learn.model.named_parameters())


def test_a_loss_that_somebody_holds_does_not_stop_the_training():
    """The node that adds up a parameter's gradient lives as long as any graph, and knows the old shape."""
    learn, held = learner(), []
    fit(learn, 2, PruneChannels(0.5, schedule=Linear()), At(30, lambda learn: held.append(learn.loss_grad)))
    assert len(held) == 2 * STEPS


def test_gradients_that_are_still_gathered_are_cut_along():
    learn, seen = learner(), {}

    def look(learn):
        seen[learn.iter] = [p.grad is not None and p.grad.shape == p.shape for p in learn.model.parameters()]

    fit(learn, 1, GradientAccumulation(n_acc=24), PruneChannels(0.5, schedule=OneShot(end=1 / STEPS)), At(36, look))
    assert all(seen[0])


def widths_by_step(schedule, epochs=2):
    """Parameters before the first step, after each step, and whether the aim was reached by then."""
    model, cb, seen = plain(16), PruneChannels(0.5, schedule=schedule), {}

    class Look(Callback):
        order, run_valid = 36, False

        def before_train(self):
            seen[STEPS * self.learn.epoch] = count(model), cb.settled  # what is due between two epochs is done by now

        def after_batch(self):
            seen[STEPS * self.learn.epoch + self.learn.iter + 1] = count(model), cb.settled

    whole_count = count(model)
    fit(learner(model), epochs, cb, Look())
    left, settled = zip(*(seen[k] for k in range(epochs * STEPS + 1)), strict=True)
    return whole_count, left, settled


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (OneShot(), [0]),
        (OneShot(end=0.5), [4]),
        (OneShot(end=1), [8]),
        (Rounds(start=0.125, end=0.75, rounds=2), [1, 6]),
    ]
    + [(Linear(start=0.25, end=0.75), [3, 4, 5, 6]), (Cubic(end=0.375), [1, 2, 3])],
)
def test_the_ramp_is_honoured_to_the_step(schedule, steps):
    whole_count, left, settled = widths_by_step(schedule)
    dropped = [k for k, (then, now) in enumerate(zip([whole_count, *left], left, strict=False)) if now < then]
    assert dropped == steps
    assert [k for k, done in enumerate(settled) if done] == list(range(steps[-1], 9))
    assert left[-1] == count(cut(plain(16), ratio=0.5))


def test_a_round_is_validated_when_it_has_recovered():
    learn, seen = learner(plain(16)), []

    class Look(Callback):
        def before_validate(self):
            seen.append(self.learn.model[3].out_channels)

    fit(learn, 4, PruneChannels(0.5, schedule=Rounds(start=0.25, end=1, rounds=4)), Look())
    # A quarter of the half goes after each epoch: after its validation, but for the last one's.
    assert seen == [32, 28, 24, 16]


def test_equal_rounds_take_equal_shares():
    model = plain(16)
    learn, seen = learner(model), []
    rounds = Rounds(start=0, end=0.75, rounds=4)
    fit(learn, 4, PruneChannels(0.5, schedule=rounds), At(36, lambda learn: seen.append(learn.model[3].out_channels)))
    assert list(dict.fromkeys(seen)) == [28, 24, 20, 16]


def test_the_training_table_shows_the_parameters_that_are_left():
    learn = learner(plain(16))
    fit(learn, 4, PruneChannels(0.5, schedule=Rounds(start=0.25, end=0.5, rounds=2)))
    names = learn.recorder.metric_names
    assert "params" not in [metric.name for metric in learn.metrics]
    left = [row[list(names).index("params") - 1] for row in learn.recorder.values]
    assert left == [count(plain(16)), count(cut(plain(16), ratio=0.25)), *[count(cut(plain(16), ratio=0.5))] * 2]


ROUNDS = Rounds(start=0.25, end=0.5, rounds=2)


def test_averages_are_cut_with_their_weights():
    learn, places = learner(), []

    class Follow(Callback):
        order = 39  # before EMA

        def before_fit(self):
            self.mean, self.steps = learn.model.hidden.weight.detach().clone(), 0

        def after_step(self):
            self.steps += 1
            decay = min(0.9, (1 + self.steps) / (10 + self.steps))
            self.mean = decay * self.mean + (1 - decay) * learn.model.hidden.weight.detach()

        def resized(self, kept):
            places.append(kept["hidden.weight"])
            self.mean = self.mean.flatten()[places[-1]]

    fit(learn, 4, EMA(0.9), follow := Follow(), PruneChannels(0.5, schedule=ROUNDS))
    assert len(places) == 2
    assert learn.model.hidden.weight.shape == (8, 20)
    torch.testing.assert_close(learn.model.hidden.weight.detach(), follow.mean)


def test_the_best_epoch_is_one_of_the_narrow_network():
    learn, best = learner(), KeepBest("valid_loss")
    fit(learn, 4, EMA(0.9), best, PruneChannels(0.5, schedule=ROUNDS))
    assert best.best_epoch >= 2  # the last round comes after the second epoch
    assert learn.model.hidden.weight.shape == (8, 20)


def test_zeros_are_cut_with_their_weights():
    model = coupled()
    masks = {name: torch.rand_like(p) > 0.5 for name, p in model.named_parameters() if p.dim() > 1}
    learn, keep, seen = learner(model), KeepZeros(masks), {}

    class Look(Callback):
        def resized(self, kept):
            seen.update(kept)

    fit(learn, 2, keep, Look(), PruneChannels(0.5, schedule=OneShot(end=0.5)), lr=0.2)
    state = model.state_dict()
    for name, mask in masks.items():
        left = mask.flatten()[seen[name]] if name in seen else mask
        assert torch.equal(keep.masks[name], left)
        assert not state[name][~left].any()
        assert state[name][left].all()
    assert len(seen) > 10


def test_storage_knows_the_zeros():
    """Of two layers the masked one holds less: to halve the words, the other has to give more than it would."""
    found = {}
    for masked in (False, True):
        model = plain(16)
        mask = torch.zeros(32, 16, 3, 3, dtype=torch.bool)
        mask[:, :, 1, 1] = True
        cbs = [KeepZeros({"3.weight": mask})] if masked else []
        fit(learner(model), 0, *cbs, PruneChannels(storage=0.5))
        found[masked] = model[3].out_channels * model[3].in_channels
    assert found[True] < found[False]


@pytest.mark.parametrize("pipeline", [True, False], ids=["micronet's loader", "fastai's loader"])
@pytest.mark.parametrize("importance", ["l1", "taylor"])
def test_nothing_that_is_drawn_changes_for_the_fit(importance, pipeline):
    """Neither the order of the images nor a generator moves: a pruned fit sees what a plain one sees."""
    learn, seen = learner(plain(4, classes=10)), {}
    if pipeline:
        learn.dls = loaders(digits(batch_size=16).limit(64))

    class Look(Callback):
        """Right before and right after PruneChannels."""

        def __init__(self, order):
            super().__init__()
            self.order = order

        def _note(self, event):
            state = random_state()
            now = (state["torch"].tolist(), state["python"], vars(self.learn.dls.train).get("epoch"))
            assert seen.setdefault(event, now) == now

        def before_fit(self):
            self._note("fit")

        def before_train(self):
            self._note("train")

    fit(learn, 1, Look(34), PruneChannels(0.5, importance=importance), Look(36))
    assert set(seen) == {"fit", "train"}


def test_taylor_is_calibrated_under_mixup_too():
    learn = learner()
    fit(learn, 1, MixUp(0.4), PruneChannels(0.5, importance="taylor"))
    assert learn.model.hidden.out_features == 8


def test_scales_are_pushed_towards_zero_until_channels_go():
    seen = {}
    for penalty in (0.0, 0.5):
        learn, sums = learner(), []
        cb = PruneChannels(0.5, importance="bn_scale", penalty=penalty, schedule=OneShot(end=0.5))
        fit(
            learn,
            2,
            cb,
            At(34, lambda learn, sums=sums: sums.append(learn.model.one[1].weight.detach().abs().mean().item())),
        )
        seen[penalty] = sums
    assert seen[0.5][3] < seen[0.0][3] - 0.1
    assert seen[0.5][-1] > 0.5 * seen[0.5][4]  # no more pressure afterwards


def test_a_fresh_networks_scales_choose_nothing():
    for scope in ("global", "local"):
        learn = learner(Coupled())
        with pytest.raises(ValueError, match=r"before_fit`:\n\tbn_scale: the scales within every group are alike"):
            fit(learn, 1, PruneChannels(0.5, importance="bn_scale", scope=scope))
    late = PruneChannels(0.5, importance="bn_scale", schedule=OneShot(end=0.9))
    fit(learner(Coupled()), 6, late, lr=0.2)
    assert late.settled


def test_two_in_one_fit_are_refused():
    with pytest.raises(ValueError, match="a fit can have one PruneChannels"):
        fit(learner(), 1, PruneChannels(0.5), PruneChannels(0.25))


def test_what_a_fit_tells():
    cb = PruneChannels(0.5)
    assert cb.summary == "nothing was pruned"
    model = plain(16)
    before = count(model)
    fit(learner(model), 0, cb)
    assert re.fullmatch(
        rf"channels 48 -> 24, params {before:,} -> {count(model):,}, MACs [\d,]+ -> [\d,]+ \(groups: 2, local, l1\)",
        cb.summary,
    )

    class Stop(Callback):
        def after_step(self):
            raise CancelFitException

    cb = PruneChannels(0.5, schedule=Linear())
    fit(learner(), 1, cb, Stop())
    assert cb.summary.endswith("; the fit ended at 0.00 of the aim")
    assert not cb.settled


@pytest.mark.parametrize(
    ("choice", "ratio"),
    [({"ratio": 0.3}, 0.3), ({"params": 0.75}, 0.5), ({"macs": 0.75}, 0.5), ({"ratio": {"a": 0.2, "b": 0.4}}, 0.3)],
)
def test_what_is_expected_is_told_before(choice, ratio):
    expected = PruneChannels(**choice).expected()
    assert expected.ratio == pytest.approx(ratio)
    assert expected.estimated


def test_a_number_of_parameters_is_expected_of_the_network_at_hand():
    learn, cb = learner(plain(16)), PruneChannels(params=count(plain(16)) // 4)
    assert cb.expected().ratio == 0
    learn.add_cb(cb)
    assert cb.expected().ratio == pytest.approx(0.5, abs=1e-3)


@pytest.mark.slow
def test_a_compiled_network_is_compiled_again():
    learn = learner(plain(16))
    learn.model.compile()
    seen = {}
    look = At(36, lambda learn: seen.setdefault(learn.model[0].out_channels, learn.model[0].weight.detach().clone()))
    fit(learn, 1, PruneChannels(0.5, schedule=OneShot(end=0.5)), look)
    assert set(seen) == {16, 8}
    assert not torch.equal(seen[8], learn.model[0].weight)


# In a file, and after a kill


NETWORKS = {
    "separable": partial(separable_net, width_multiplier=0.5),
    "resnet20": resnet20,
    "wide": partial(wide_resnet, depth=10, width=1),
    "coupled": Coupled,
}
IMPORTANCES = st.sampled_from(["l1", "l2", "mean_abs", "fpgm", "taylor", "random", "bn_scale"])


@settings(max_examples=4, deadline=None)
@given(st.sampled_from(sorted(NETWORKS)), IMPORTANCES, st.sampled_from(["local", "global"]), st.floats(0.2, 0.7))
def test_a_pruned_network_is_read_again_bit_for_bit(tmp_path_factory, name, importance, scope, ratio):
    model = NETWORKS[name](num_classes=CLASSES)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.rand_like(p))
    before = count(model)
    size = 32 if name == "separable" else 8  # the least that it takes
    fit(learner(model, size=size), 0, PruneChannels(ratio, importance=importance, scope=scope))
    assert count(model) < before
    path = tmp_path_factory.mktemp("pruned") / "model.pth"
    classes = tuple("abcde")
    bundle = Bundle(model.eval(), "tests:network", {"num_classes": CLASSES}, classes, SIZE, (0.5,) * 3, (0.5,) * 3)
    save(bundle, path, factory=NETWORKS[name])
    again = load(path, factory=NETWORKS[name]).model
    x = torch.randn(4, 3, size, size)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


WAYS = {
    "taylor, ramp, average": {"importance": "taylor", "schedule": Linear(start=0.1, end=0.7), "scope": "global"},
    "scales, rounds": {"importance": "bn_scale", "schedule": Rounds(start=0.2, end=0.9, rounds=3)},
}


@pytest.mark.parametrize("way", ["taylor, ramp, average", pytest.param("scales, rounds", marks=pytest.mark.slow)])
def test_a_kill_in_the_middle_of_a_schedule_changes_no_bit(way, tmp_path, monkeypatch):
    cut_down = partial(PruneChannels, 0.5, **WAYS[way])
    stage = Fit(
        "prune", epochs=4, lr=0.05, ema=0.9, opt=sgd(), cbs=(cut_down,), keep="best" if "ramp" in way else "last"
    )
    recipe = Recipe(partial(digits, batch_size=16), partial(separable_net, width_multiplier=0.25), (stage,))
    options = RunOptions(limit=48, seed=3)
    run(recipe, tmp_path / "whole", options)
    module = importlib.import_module("micronet.run")
    run_fit = module.run_fit

    def stop(learn):
        if (learn.epoch, learn.iter) == (2, 1):
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_fit", lambda *a, cbs=(), **kw: run_fit(*a, cbs=(*cbs, At(33, stop)), **kw))
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "parts", options)
    state = torch.load(tmp_path / "parts" / "1-prune" / "checkpoint.pth", weights_only=True)
    assert state["widths"]  # the kill comes after channels went, and before the last of them
    monkeypatch.setattr(module, "run_fit", run_fit)
    torch.rand(7)
    run(recipe, tmp_path / "parts", options)
    models = [load(tmp_path / name / "model.pth").model for name in ("whole", "parts")]
    assert widths(models[0]) == widths(models[1])
    assert state["widths"] != {name: table for name, table in widths(models[0]).items() if name in state["widths"]}
    states = [model.state_dict() for model in models]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    tables = [(tmp_path / name / "1-prune" / "history.csv").read_text().splitlines() for name in ("whole", "parts")]
    assert [line.rpartition(",")[0] for line in tables[0]] == [line.rpartition(",")[0] for line in tables[1]]


def test_a_recipe_sparsifies_edits_and_prunes_one_after_another(tmp_path):
    swap = partial(swap_activation, old=nn.ReLU6, new=nn.Hardswish)
    stages = (
        Fit("sparse", epochs=0, cbs=(partial(Sparsify, 0.5, OneShot(), scope="local"),)),
        Fit("pruned", epochs=1, lr=0.01, edit=(swap,), cbs=(partial(PruneChannels, params=0.5, round_to=2),)),
    )
    recipe = Recipe(partial(digits, batch_size=32), partial(separable_net, width_multiplier=0.25), stages)
    console = Console(record=True, file=io.StringIO(), width=300)
    last = run(recipe, tmp_path, RunOptions(limit=64), console=console)
    rows = read_rows(tmp_path)
    assert rows[1]["params"] <= rows[0]["params"] / 2
    state = last.model.state_dict()
    assert all(not state[name][~mask].any() and mask.shape == state[name].shape for name, mask in last.masks.items())
    assert sum(int((~mask).sum()) for mask in last.masks.values()) > 1000
    assert len(re.findall(r"channels \d+ -> \d+, params ", console.export_text())) == 1
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(load(tmp_path / "model.pth").model(x), last.model(x))


def test_a_refusal_is_one_line_of_the_recipes(tmp_path):
    stage = Fit("prune", epochs=1, cbs=(partial(PruneChannels, params=10**9),))
    recipe = Recipe(partial(digits, batch_size=32), separable_net, (stage,))
    with pytest.raises(MicronetError, match=r"stage prune: nothing to prune: the network has [\d,]+ parameters"):
        run(recipe, tmp_path, RunOptions(limit=64))
