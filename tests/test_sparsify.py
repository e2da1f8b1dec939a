"""Sparsify in a fit: the ramp to the step, zeros that stay, scores from gradients, rewinding, going on after a kill."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import SGD, Adam
from hypothesis import given, settings
from hypothesis import strategies as st
from learners import make_learner
from rich.console import Console
from torch import nn
from torch.nn.utils import prune

import micronet.learner as pipeline
from callbacks.checkpoint import KeepBest
from callbacks.ema import EMA
from callbacks.expected import Expected
from callbacks.masks import KeepZeros, apply_masks
from callbacks.precision import Precision
from callbacks.protocol import tell
from callbacks.prune import PruneChannels
from callbacks.ramp import Cubic, Linear, OneShot, Rounds
from callbacks.sparsify import Sparsify
from callbacks.widths import narrow
from micronet import Fit, sgd
from micronet.data import digits

STEPS = 4  # of make_learner's data in an epoch


def small(num_classes=10):
    """A network with layers that every granularity applies to."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )  # fmt: skip


def learner(seed=0, opt_func=None):
    """A Learner on random images."""
    learn = make_learner(seed)
    learn.model = small(3)
    learn.opt_func = opt_func or sgd()
    return learn


def fit(learn, epochs, *cbs, lr=0.05, **kwargs):
    with learn.no_mbar():
        learn.fit(epochs, lr, cbs=[*cbs], **kwargs)
    return learn


def zeros(masks):
    return sum(int((~mask).sum()) for mask in masks.values())


def is_masked(learn, masks):
    """Whether every masked weight is zero, and no other."""
    state = learn.model.state_dict()
    still = all(
        not state[name][~mask].any() and not torch.signbit(state[name][~mask]).any() for name, mask in masks.items()
    )
    return still and all(bool((state[name][mask] != 0).all()) for name, mask in masks.items())


class Probe(Callback):
    """Calls functions at events, after all other callbacks."""

    order, run_valid = 99, False

    def __init__(self, order=99, **events):
        super().__init__()
        self.order, self.told = order, events

    def __call__(self, event_name):
        if event_name in self.told and (event_name != "after_batch" or self.learn.training):
            self.told[event_name]()


WEIGHTS = 3 * 8 * 9 + 8 * 8 * 9 + 8 * 3
RAMPS = [Cubic(), Linear(start=0.25, end=0.75), OneShot(), OneShot(end=1.0), Cubic(start=0.4, end=0.9)]
RAMPS += [Rounds(start=0.25, end=0.75, rounds=3), Rounds(start=0.0, end=1.0, rounds=5), Linear(start=0.5, end=0.5)]


@pytest.mark.parametrize("ramp", RAMPS, ids=str)
def test_the_ramp_is_followed_to_the_step(ramp):
    learn, reached = learner(), []
    cb, n = Sparsify(0.7, ramp), 3 * STEPS
    look = lambda: reached.append((zeros(cb.masks), cb.settled))  # noqa: E731
    fit(learn, 3, cb, Probe(after_batch=look, before_batch=lambda: reached or look()))
    asked = [(int(ramp(k / n) * 0.7 * WEIGHTS + 0.5), ramp(k / n) == 1) for k in range(n + 1)]
    assert reached == asked
    assert is_masked(learn, cb.masks)


def test_a_long_ramp_starts_and_ends_to_the_step_and_costs_no_more():
    learn, reached = learner(), []
    learn.dls.train.bs, epochs = 1, 13
    cb, n = Sparsify(0.7, Linear(start=0.105, end=0.905)), 13 * 32
    fit(learn, epochs, cb, Probe(after_batch=lambda: reached.append(zeros(cb.masks))))
    exact = [int(cb.schedule((k + 1) / n) * 0.7 * WEIGHTS + 0.5) for k in range(n)]
    first, last = (next(k for k in range(n) if cb.schedule((k + 1) / n) >= bound) for bound in (1e-9, 1))
    for k in (first - 1, first, last, *range(2, n, 3)):  # an update every third step
        assert reached[k] == exact[k]
    assert reached[last - 1] < reached[last]
    assert all(exact[k] - reached[k] <= exact[k] - exact[max(0, k - 3)] for k in range(n))
    assert len(set(reached)) <= 202


@settings(max_examples=25, deadline=None)
@given(
    st.just(0.0) | st.floats(0.1, 0.85),  # less is less than half a filter
    st.sampled_from(["weight", "kernel", "filter", "block"]),
    st.sampled_from(["global", "normalised", "local"]),
    st.sampled_from(["magnitude", "random"]),
)
def test_the_asked_share_is_reached_to_one_unit(sparsity, granularity, scope, criterion):
    learn = learner()
    cb = Sparsify(sparsity, OneShot(), scope=scope, criterion=criterion, granularity=granularity)
    unit = {"weight": 1, "kernel": 9, "filter": 72, "block": 16}[granularity]
    fit(learn, 0, cb)
    sizes = {name: learn.model.state_dict()[name].numel() for name in cb._masks}
    assert abs(zeros(cb.masks) - sparsity * sum(sizes.values())) < (unit if scope != "local" else unit * len(sizes))
    if scope == "local":
        assert all(abs(zeros({n: cb._masks[n]}) - sparsity * size) < unit for n, size in sizes.items())
    assert is_masked(learn, cb.masks)


def test_two_of_four_is_a_half_in_every_four_input_channels():
    learn = learner()
    fit(learn, 3, cb := Sparsify(0.5, Linear(), granularity="2:4"), EMA(0.9))
    weight = learn.model[3].weight.detach()
    for first in (0, 4):
        assert ((weight[:, first : first + 4] != 0).sum(1) == 2).all()
    assert ((learn.model[8].weight.view(3, 2, 4) != 0).sum(2) == 2).all()
    assert cb.summary == (
        "0.5000 of 600 weights in 2 layers are zero (2:4, global, magnitude); "
        "skipped 0 (its 3 input channels are not divisible by 4)"
    )
    assert learn.model[0].weight.all()


@pytest.mark.parametrize("opt_func", [sgd(), partial(SGD, mom=0.9), Adam], ids=["torch", "fastai", "Adam"])
def test_nothing_brings_a_masked_weight_back(opt_func):
    learn = learner(opt_func=opt_func)
    cb, kept = Sparsify(0.6, OneShot(end=0.5)), []

    def momentum():
        state = getattr(learn.opt, "opt", learn.opt).state
        values = [v for v in state[learn.model[3].weight].values() if isinstance(v, torch.Tensor) and v.dim() == 4]
        assert values
        if cb.settled and not kept:  # the very step at which they were masked
            kept.extend(value[~cb.masks["3.weight"]].abs().max().item() for value in values)

    seen = []
    check = lambda: seen.append(is_masked(learn, cb.masks))  # noqa: E731
    fit(learn, 3, cb, EMA(0.9), Probe(after_batch=momentum, before_validate=check, after_fit=check), wd=0.1)
    assert kept == [0.0] * len(kept) != []
    assert seen == [True] * 4
    fit(learn, 1, KeepZeros(cb.masks), wd=0.1)
    assert is_masked(learn, cb.masks)
    fit(learn, 1)  # a plain fit, which is where zeros are lost
    assert not is_masked(learn, cb.masks)


def test_the_average_has_the_zeros_at_the_step_that_makes_them():
    learn, cb, seen = learner(), Sparsify(0.5, OneShot(end=0.5)), []

    def look():
        if cb.settled:
            average = learn.ema._average
            seen.append(sum(int(average[name][~mask].count_nonzero()) for name, mask in cb.masks.items()))

    fit(learn, 2, EMA(0.99), cb, Probe(after_batch=look))
    assert seen == [0] * 5


def test_keep_best_waits_until_the_share_is_reached():
    learn = learner()
    best, cb = KeepBest("valid_loss"), Sparsify(0.9, OneShot(end=0.5))
    fit(learn, 4, cb, best)
    losses = [row[1] for row in learn.recorder.values]
    assert losses.index(min(losses)) == 0  # when nothing was masked yet; the ramp ends with the second epoch
    assert best.best_epoch == losses.index(min(losses[1:]))
    assert is_masked(learn, cb.masks)
    assert zeros(cb.masks) == int(0.9 * WEIGHTS + 0.5)


@pytest.mark.parametrize("criterion", ["movement", "taylor"])
def test_gradients_decide(criterion):
    learn, products, found = learner(), [], []
    cb = Sparsify(0.5, OneShot(end=0.5), criterion=criterion)
    names = ["0.weight", "3.weight", "8.weight"]

    def step():
        if not cb.settled:
            named = dict(learn.model.named_parameters())
            products.append(torch.cat([(named[n] * named[n].grad).detach().flatten() for n in names]))

    def look():
        if cb.settled and not found:
            found.append(torch.cat([cb._masks[name].flatten() for name in names]))

    fit(learn, 2, cb, Probe(before_step=step, after_batch=look))
    assert len(products) == STEPS
    ages = 0.99 ** torch.arange(STEPS - 1, -1, -1.0)
    scores = {"movement": -sum(products), "taylor": (ages[:, None] * torch.stack(products) ** 2).sum(0)}[criterion]
    assert scores[~found[0]].max() <= scores[found[0]].min()
    assert int((~found[0]).sum()) == WEIGHTS // 2
    assert is_masked(learn, cb.masks)


def test_random_zeros_follow_the_seed_and_leave_the_fit_its_own_draws():
    def run(**kwargs):
        learn = learner()
        fit(learn, 1, *([Sparsify(0.5, **kwargs)] if kwargs else []), lr=1e-9)
        return learn, (torch.rand(3).tolist(), random.random(), np.random.rand())

    (one, draws), (same, _), (other, _), (_, plain) = (
        run(criterion="random"), run(criterion="random", seed=0), run(criterion="random", seed=1), run(),
    )  # fmt: skip
    masks = [learn.model[3].weight != 0 for learn in (one, same, other)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert draws[:2] == plain[:2]


def test_shares_by_layer():
    learn, asked = learner(), {"3": 0.75, "8": 0.5}
    fit(learn, 2, cb := Sparsify(asked, scope="local"))
    assert {name: zeros({name: mask}) for name, mask in cb.masks.items()} == {"3.weight": 432, "8.weight": 12}
    assert learn.model[0].weight.all()
    fit(learn, 1, cb := Sparsify(0.5, skip=("0", "8")))
    assert cb.summary == (
        "0.5000 of 576 weights in 1 layer are zero (weight, global, magnitude); skipped 0, 8 (as asked)"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (({"3": 0.5, "nowhere": 0.5}, {"scope": "local"}), "sparsify weight: the network has no layer 'nowhere'"),
        (({"1": 0.5}, {"scope": "local"}), "sparsify weight does not work on 1: it has no weight matrix"),
        (({"0": 0.5}, {"scope": "local", "granularity": "2:4"}), "does not work on 0: its 3 input channels are not"),
        ((0.5, {"skip": ("head",)}), "skip: the network has no layer 'head'"),
        ((0.5, {"skip": ("0", "3", "8")}), "no layer is left"),
        ((0.999, {}), "0.999 leaves less than one weight in a layer"),
        ((0.2, {}), "0.2 is asked where 0.3529 of the weights is masked already"),
        ((0.5, {"scope": "local"}), "0.5 is asked where 1.0000 of 8.weight is masked already"),
    ],
)
def test_what_a_network_can_not_give_is_refused_before_anything_changes(arguments, says):
    learn = learner()
    masks = {"3.weight": torch.ones(8, 8, 3, 3).bool(), "8.weight": torch.zeros(3, 8).bool()}
    masks["3.weight"].view(-1)[:264] = False
    keep = [KeepZeros(masks)] if "masked already" in says else []
    apply_masks(dict(learn.model.named_parameters()), masks if keep else {})
    before = {name: value.clone() for name, value in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        fit(learn, 1, *keep, Sparsify(arguments[0], OneShot(), **arguments[1]))
    assert all(torch.equal(value, before[name]) for name, value in learn.model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"sparsity": 1.0}, r"sparsity must be a fraction in \[0, 1\), got 1.0"),
        ({"sparsity": {"a": -0.1}, "scope": "local"}, "sparsity must be a fraction"),
        ({"sparsity": 0.6, "granularity": "2:4"}, "sparsity must be 0.5 with 2:4, which is two of four, got 0.6"),
        ({"sparsity": {"a": 0.5}}, "scope must be 'local' with sparsity by layer, got 'global'"),
        ({"sparsity": {}, "scope": "local"}, "sparsity by layer must name a layer, got an empty dict"),
        ({"sparsity": {"a": 0.5}, "scope": "local", "skip": ("a",)}, "skip must be empty with sparsity by layer"),
        ({"scope": "layer"}, "scope must be one of 'global', 'normalised', 'local', got 'layer'"),
        ({"criterion": "l1"}, "criterion must be one of"),
        ({"granularity": "channel"}, "granularity must be one of"),
        ({"schedule": Cubic}, "schedule must be a ramp, such as Cubic"),
        ({"seed": 1}, "seed must be None with criterion 'magnitude', which draws nothing"),
        ({"criterion": "taylor", "schedule": OneShot()}, r"schedule must be 0 at first with criterion 'taylor'"),
        ({"criterion": "movement", "schedule": Rounds()}, "such as OneShot"),
        (
            {"rewind": 0.5, "schedule": OneShot(end=0.5)},
            r"rewind must be a progress from 0, before the ramp's end \(0.5\)",
        ),
        ({"rewind": 0.3, "schedule": Rounds(start=0.2)}, r"at most at the first round \(0.2\), got 0.3"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        Sparsify(**{"sparsity": 0.5} | arguments)


def test_a_fit_without_steps_reaches_everything_but_what_needs_gradients():
    learn = learner()
    fit(learn, 0, cb := Sparsify(0.5, Cubic(start=0.5, end=0.9), rewind=0.7), EMA(0.9))
    assert cb.settled
    assert zeros(cb.masks) == WEIGHTS // 2
    assert is_masked(learn, cb.masks)
    with pytest.raises(ValueError, match="criterion 'taylor' judges by the gradients of steps: epochs must be above 0"):
        fit(learn, 0, Sparsify(0.5, criterion="taylor"))


def test_a_fit_that_ends_early_says_so():
    learn = learner()

    def stop():
        if learn.epoch == 1:
            raise CancelFitException

    fit(learn, 4, cb := Sparsify(0.5, Linear()), Probe(before_epoch=stop))
    assert not cb.settled
    assert zeros(cb.masks) == WEIGHTS // 8
    assert "are zero (weight, global, magnitude); the fit ended at 0.25 of the aim" in cb.summary


def test_accumulated_gradients_end_the_ramp_with_the_fit():
    learn = learner()
    fit(learn, 3, GradientAccumulation(n_acc=40), cb := Sparsify(0.5, criterion="movement"))
    assert cb.settled
    assert zeros(cb.masks) == WEIGHTS // 2
    assert cb._looked


def test_zeros_that_are_there_count_and_stay():
    learn = learner()
    fit(learn, 2, one := Sparsify(0.3))
    fit(learn, 2, KeepZeros(one.masks), two := Sparsify(0.6, criterion="random"))
    fit(learn, 1, KeepZeros(two.masks), three := Sparsify(0.6, criterion="random", seed=5))
    assert zeros(three.masks) == zeros(two.masks) == int(0.6 * WEIGHTS + 0.5)
    for name, mask in one.masks.items():
        assert not (two.masks[name] & ~mask).any()
        assert torch.equal(three.masks[name], two.masks[name])
    assert is_masked(learn, three.masks)


class Remember(Callback):
    """Takes copies of the network's tensors, and of what was masked, at some steps."""

    order, run_valid = 98, False

    def __init__(self, cb, steps):
        super().__init__()
        self.cb, self.steps, self.states = cb, steps, {}

    def take(self, step):
        state = {name: value.clone() for name, value in self.learn.model.state_dict().items()}
        self.states[step] = state, dict(self.cb._masks)

    def before_train(self):
        if self.learn.epoch == 0:
            self.take(0)

    def after_batch(self):
        step = self.learn.epoch * STEPS + self.learn.iter + 1
        if step in self.steps:
            self.take(step)
            self.momentum = [v for s in self.learn.opt.opt.state.values() for v in s.values()]


@pytest.mark.parametrize(
    ("ramp", "rewind", "kept", "back"),
    [
        (OneShot(end=0.5), 0.25, 3, [6]),
        (Cubic(end=0.75), 0.0, 0, [9]),
        (Rounds(start=0.25, end=0.75, rounds=3), 0.25, 3, [3, 6, 9]),
    ],
    ids=["one_shot", "cubic", "rounds"],
)
def test_surviving_weights_are_rewound_to_what_they_were(ramp, rewind, kept, back):
    learn = learner()
    cb = Sparsify(0.6, ramp, rewind=rewind)
    look = Remember(cb, {kept, *back, *(step - 1 for step in back)})
    fit(learn, 3, EMA(0.99), cb, look)
    then, _ = look.states[kept]
    for step in back:
        state, masks = look.states[step]
        assert zeros(masks) == int(ramp(step / 12) * 0.6 * WEIGHTS + 0.5)
        for name, value in state.items():
            mask = masks.get(name, torch.ones_like(value).bool())
            assert not value[~mask].any()
            if (step, name) != (kept, name):
                assert torch.equal(value[mask], then[name][mask])
        if step - 1 > kept:
            assert not torch.equal(look.states[step - 1][0]["0.bias"], then["0.bias"])
    assert is_masked(learn, cb.masks)
    assert cb._start is None


def test_rewinding_forgets_momentum_and_averages():
    learn, cb, seen = learner(), Sparsify(0.6, OneShot(end=0.5), rewind=0.25), []

    def look():
        if cb.settled and not seen:
            seen.extend([dict(learn.opt.opt.state), learn.ema._steps])
            state = learn.model.state_dict()
            seen.append(all(torch.equal(value, state[name]) for name, value in learn.ema._average.items()))

    fit(learn, 2, EMA(0.99), cb, Probe(after_batch=look))
    assert seen == [{}, 0, True]


class StopAt(Callback):
    """Stands in for a crash."""

    order = 11

    def __init__(self, epoch, batch):
        super().__init__()
        self.place = (epoch, batch)

    def after_pred(self):
        if (self.learn.epoch, self.learn.iter) == self.place:
            raise KeyboardInterrupt


WAYS = {
    "magnitude": {"schedule": Cubic(start=0.1, end=0.9)},
    "random": {"criterion": "random", "schedule": Linear(), "granularity": "kernel"},
    "movement": {"criterion": "movement", "schedule": Linear(), "scope": "normalised"},
    "taylor": {"criterion": "taylor", "schedule": Cubic(start=0.3), "granularity": "block"},
    "one shot": {"schedule": OneShot()},
    "2:4": {"granularity": "2:4", "sparsity": 0.5},
    "rewound": {"schedule": Rounds(start=0.1, end=0.8, rounds=3), "rewind": 0.1, "scope": "local"},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_fit_that_was_stopped_in_the_ramp_goes_on_to_the_same_bits(way, tmp_path):
    stage = Fit("sparse", epochs=4, ema=0.9, cbs=(partial(Sparsify, **{"sparsity": 0.6} | WAYS[way]),))
    data, finals = digits(batch_size=24).limit(96), []

    def part(*cbs, checkpoint=None):
        torch.manual_seed(1)
        learn = pipeline.make_learner(stage, small(), data, seed=3)
        pipeline.run_fit(learn, stage, Console(quiet=True), checkpoint=checkpoint, cbs=cbs)
        cb = learn.sparsify
        finals.append((learn.model.state_dict(), cb.masks, cb.summary))

    part()
    with pytest.raises(KeyboardInterrupt):
        part(StopAt(2, 1), checkpoint=tmp_path / "checkpoint.pth")
    torch.rand(7)
    part(checkpoint=tmp_path / "checkpoint.pth")
    (whole, masks, told), (parts, found, said) = finals
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert masks.keys() == found.keys()
    assert all(torch.equal(mask, found[name]) for name, mask in masks.items())
    assert told == said


@pytest.mark.parametrize("criterion", ["magnitude", "random", "movement", "taylor"])
def test_channels_that_are_removed_in_the_same_fit_take_their_masks_along(criterion):
    learn = learner()
    cb = Sparsify(0.5, Linear(end=0.9), criterion=criterion, rewind=0.0)

    def cut():
        if (learn.epoch, learn.iter) == (1, 2):
            left = torch.tensor([0, 2, 3, 5, 6])
            places = {
                name: torch.arange(v.numel()).view(v.shape) for name, v in learn.model.state_dict().items() if v.dim()
            }
            kept = {name: places[name][left] for name in places if name[0] in "01"}
            kept["3.weight"] = places["3.weight"][:, left]
            table = {"0": {"in_channels": 3, "out_channels": 5, "groups": 1}, "1": {"num_features": 5}}
            table["3"] = {"in_channels": 5, "out_channels": 8, "groups": 1}
            before.update(cb._masks)
            narrow(learn.model, kept, table, learn.opt)
            tell(learn, "resized", kept)
            assert torch.equal(cb._masks["3.weight"], before["3.weight"][:, left])
            assert torch.equal(cb._masks["0.weight"], before["0.weight"][left])

    before = {}
    fit(learn, 3, EMA(0.9), cb, Probe(order=50, after_batch=cut))
    size = 3 * 5 * 9 + 5 * 8 * 9 + 8 * 3
    assert abs(zeros(cb.masks) - size / 2) <= 0.5
    assert is_masked(learn, cb.masks)
    assert learn.model[3].weight.shape == (8, 5, 3, 3)


def test_a_share_that_was_reached_is_reached_again_when_channels_go():
    learn = learner()
    cb = Sparsify(0.5, OneShot(), scope="local")
    prune_channels = PruneChannels(0.3, schedule=Rounds(start=0.4, end=1.0, rounds=2))
    fit(learn, 3, prune_channels, EMA(0.9), cb)
    assert learn.model[3].weight.shape[:2] == (6, 6)
    assert all(zeros({name: mask}) >= mask.numel() // 2 for name, mask in cb._masks.items())
    assert is_masked(learn, cb.masks)
    fit(learn, 0, PruneChannels(0.2), cb := Sparsify(0.8, OneShot()))
    assert zeros(cb.masks) == int(0.8 * sum(mask.numel() for mask in cb._masks.values()) + 0.5)
    assert is_masked(learn, cb.masks)


def test_fours_are_kept_whole_where_channels_go():
    learn, cb = learner(), Sparsify(0.5, OneShot(end=0.5), granularity="2:4")
    fit(learn, 2, cb, PruneChannels(0.5, layers=("0",), round_to=4))
    assert learn.model[3].weight.shape[:2] == (8, 4)
    assert ((learn.model[3].weight != 0).sum(1) == 2).all()
    for when, round_to in ((0.0, 1), (1.0, 4)):  # layers no longer of fours; fours that are torn
        with pytest.raises(ValueError, match="2:4 looks at channels in fours: remove channels before, by fours"):
            fit(learner(), 2, cb, PruneChannels(0.4, schedule=OneShot(end=when), round_to=round_to))


@pytest.mark.parametrize("granularity", ["weight", "2:4", "block", "kernel"])
def test_bf16_and_channels_last_change_nothing_about_the_zeros(granularity):
    learn, cb = learner(), Sparsify(0.5, criterion="taylor", granularity=granularity)
    fit(learn, 2, Precision(), EMA(0.9), cb)
    assert zeros(cb.masks) == sum(mask.numel() for mask in cb._masks.values()) / 2
    assert is_masked(learn, cb.masks)
    assert learn.model[3].weight.is_contiguous()


def test_weights_that_are_no_tensors_of_their_own_are_skipped_or_refused():
    learn = learner()
    learn.model[8] = nn.utils.parametrizations.weight_norm(learn.model[8])
    learn.model.add_module("9", nn.Linear(3, 3))
    learn.model.add_module("10", nn.Linear(3, 3))
    learn.model[10].weight = learn.model[9].weight
    fit(learn, 1, cb := Sparsify(0.5))
    assert list(cb._masks) == ["0.weight", "3.weight", "9.weight"]
    assert "skipped 8, 10 (its weight is another layer's, or made of other tensors)" in cb.summary
    prune.random_unstructured(learn.model[3], "weight", 0.5)
    with pytest.raises(ValueError, match=r"3 is masked by torch.nn.utils.prune: call torch_masks\.take_masks first"):
        fit(learn, 1, Sparsify(0.5))


def test_what_is_expected_needs_no_learner_and_is_better_with_one():
    assert Sparsify(0.5).expected() == Expected(sparsity=0.5, estimate=True)
    assert Sparsify(0.5, scope="local").expected() == Expected(sparsity=0.5)
    some = Sparsify({"3": 0.5, "8": 0.1}, scope="local").expected()
    assert some == Expected(sparsity=0.3, estimate=True, partial=True)
    learn = learner()
    for make, share in (
        (partial(Sparsify, 0.5, skip=("0",)), 0.5 * 600 / WEIGHTS),
        (partial(Sparsify, {"3": 0.25}, scope="local"), 144 / WEIGHTS),
        (partial(Sparsify, 0.5, granularity="2:4", scope="local"), 0.5 * 600 / WEIGHTS),
    ):
        learn.add_cb(cb := make())
        told = cb.expected()
        assert (told.sparsity, told.estimate, told.partial) == (share, True, True)
        assert set(told.masked) <= {"0.weight", "3.weight", "8.weight"}
        learn.remove_cb(cb)
