"""What channels are judged by, against each measure's definition; and the table of methods for them."""

import pytest
import torch
from fastai.callback.core import Callback
from pruning import CLASSES, coupled, cut, fit, learner, plain
from torch import nn

from callbacks.channels import whole
from callbacks.dependency import find_groups
from callbacks.importance import TAYLOR_DECAY, distances, gather, scores
from callbacks.methods import verdict
from callbacks.prune import PruneChannels
from callbacks.prune_plan import Choice, Plan
from callbacks.ramp import OneShot
from callbacks.widths import widths

SIZE = (3, 8, 8)


@pytest.fixture(autouse=True)
def _drawn_alike():
    torch.manual_seed(0)


def judged(model, importance, **more):
    groups = Plan(model, SIZE, Choice(ratio=0.5, importance=importance)).groups
    return scores(model, groups, whole(groups), importance, **more)


def by_hand(weight, importance):
    rows = [filters.flatten().tolist() for filters in weight.detach()]
    if importance == "fpgm":
        return [
            sum(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5 for other in rows) for one in rows
        ]
    measure = {
        "l1": lambda row: sum(map(abs, row)),
        "l2": lambda row: sum(v * v for v in row) ** 0.5,
        "mean_abs": lambda row: abs(sum(row) / len(row)),
    }[importance]
    return [measure(row) for row in rows]


def normalised(values):
    values = torch.tensor(values)
    return values / values.mean()


@pytest.mark.parametrize("importance", ["l1", "l2", "mean_abs", "fpgm"])
def test_filters_are_judged_by_the_definition(importance):
    model = coupled()
    found = judged(model, importance)
    torch.testing.assert_close(found["one.0"], normalised(by_hand(model.one[0].weight, importance)))
    # Two layers make the stem's channels, and a third filters them; FPGM can't rank a depthwise one.
    makers = [model.stem[0], model.two[0]] + ([] if importance == "fpgm" else [model.depthwise[0]])
    each = [normalised(by_hand(layer.weight, importance)) for layer in makers]
    torch.testing.assert_close(found["stem.0"], torch.stack(each).mean(0))


def test_a_dense_layers_inputs_are_judged_by_its_weights_for_them():
    model = coupled()
    groups = [group for group in find_groups(model, SIZE)[0] if group.name == "mix.2"]
    found = scores(model, groups, whole(groups), "l1", feeding=("hidden",))["mix.2"]
    each = model.hidden.weight.detach().abs().sum(0).reshape(10, 4)  # ten channels of 2 x 2 pixels
    torch.testing.assert_close(found, each.mean(1) / each.mean())


def test_scales_are_compared_as_they_are():
    model = coupled()
    found = judged(model, "bn_scale")
    torch.testing.assert_close(found["one.0"], model.one[1].weight.detach().abs())
    stems = [model.stem[1], model.two[1], model.depthwise[1]]
    torch.testing.assert_close(found["stem.0"], torch.stack([norm.weight.detach().abs() for norm in stems]).mean(0))


def test_taylor_averages_the_squared_products_over_steps():
    model = plain(4)
    sums, expected = {}, torch.zeros(4)
    for step in range(3):
        model.zero_grad()
        model(torch.randn(4, *SIZE)).square().sum().backward()
        new = (model[0].weight * model[0].weight.grad).square().sum((1, 2, 3)).detach()
        expected = new if step == 0 else TAYLOR_DECAY * expected + (1 - TAYLOR_DECAY) * new
        gather(model, [("0", "out"), ("3", "out")], sums)
    found = judged(model, "taylor", sums=sums)
    torch.testing.assert_close(found["0"], expected)


def test_taylor_in_a_fit_looks_at_every_step_before_the_channels_go():
    learn, seen = learner(plain(8)), []
    cb = PruneChannels(0.5, importance="taylor", schedule=OneShot(end=0.75))

    class Follow(Callback):
        order, run_valid = 34, False

        def before_step(self):
            weight = self.learn.model[0].weight
            seen.append((weight * weight.grad).square().sum((1, 2, 3)).detach())

        def after_batch(self):
            self.filters = self.learn.model[0].weight.detach().clone() if len(seen) <= 3 else self.filters

    fit(learn, 1, follow := Follow(), cb)
    average = seen[0]
    for new in seen[1:3]:
        average = average.lerp(new, 1 - TAYLOR_DECAY)
    assert len(seen) == 4
    best = average.argsort(descending=True)[:4].sort().values
    left = follow.filters[best]
    assert left.shape == learn.model[0].weight.shape
    # One more step was made after the channels went: nearest are the filters that were kept.
    nearest = torch.cdist(learn.model[0].weight.detach().flatten(1), follow.filters.flatten(1)).argmin(1)
    assert nearest.tolist() == best.tolist()


def test_random_is_the_same_for_a_seed_and_draws_nothing():
    drawn = torch.get_rng_state()
    first, same, other = (judged(coupled(), "random", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["one.0"], other["one.0"])
    assert not torch.equal(first["one.0"], first["mix.2"])


def test_what_is_gone_is_never_chosen():
    model = plain(4)
    groups, _ = find_groups(model, SIZE)
    alive = whole(groups) | {"0": torch.tensor([True, False, True, True])}
    with torch.no_grad():
        model[0].weight.data = model[0].weight.data[[0, 2, 3]]
    found = scores(model, groups, alive, "l1")["0"]
    assert found[1] == torch.inf
    torch.testing.assert_close(found[alive["0"]], normalised(by_hand(model[0].weight, "l1")))


def test_distances_to_the_others():
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    assert distances(rows).tolist() == [5.0, 10.0, 5.0]


def test_the_table_says_what_fpgm_leaves_out_and_the_method_does_it():
    model = coupled()
    plan = Plan(model, SIZE, Choice(ratio=0.5, importance="fpgm"))
    assert [line.partition(":")[0] for line in plan.skipped] == ["grouped.0"]
    assert "see different inputs" in plan.skipped[0]
    assert verdict("prune fpgm", model.grouped[0]).word == "skips"
    assert all(verdict("prune", module).word != "refuses" for module in model.modules())
    before = widths(coupled())["grouped.0"]["out_channels"]
    assert widths(cut(model, ratio=0.5, importance="fpgm"))["grouped.0"]["out_channels"] == before
    only = nn.Sequential(nn.Conv2d(3, 6, 1, groups=3), nn.Flatten(), nn.Linear(6 * 64, CLASSES))
    with pytest.raises(ValueError, match="fpgm can rank no channel"):
        Plan(only, SIZE, Choice(ratio=0.5, importance="fpgm"))


def test_layers_without_a_scale_or_a_gradient_are_named():
    plan = Plan(coupled(), SIZE, Choice(ratio=0.5, importance="bn_scale"))
    assert [line.partition(":")[0] for line in plan.skipped] == ["squeeze", "mix.2", "hidden"]
    assert all("no normalisation" in line for line in plan.skipped)
    model = plain(8)
    model[0].weight.requires_grad_(False)
    plan = Plan(model, SIZE, Choice(ratio=0.5, importance="taylor"))
    assert plan.skipped == ["0: its weights are frozen: they get no gradient"]
