"""Masks by the arithmetic alone: the asked count to one unit, whatever the shapes, scores and masks that there are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from callbacks.methods import verdict
from callbacks.sparsity import TAYLOR_DECAY, check_room, first_scores, from_units, gather, grow, sums, to_units

GRANULARITIES = ("weight", "kernel", "filter", "2:4", "block")
UNIT = {"weight": lambda s: 1, "kernel": lambda s: s[2:].numel(), "filter": lambda s: s[1:].numel()}
UNIT |= {"2:4": lambda s: 2, "block": lambda s: 16}
SHAPES = st.builds(
    lambda rows, columns, kernel: torch.Size((4 * rows, 4 * columns, *kernel)),
    st.integers(1, 4), st.integers(1, 3), st.sampled_from([(3, 3), (1, 1), (5, 1), ()]),
)  # fmt: skip
LAYERS = st.lists(SHAPES, min_size=1, max_size=4)
SCORES = {
    "drawn": lambda shape, g: torch.rand(shape, generator=g),
    "equal": lambda shape, g: torch.full(shape, 0.25),
    "few values": lambda shape, g: torch.randint(-1, 2, shape, generator=g).float(),
    "zero": lambda shape, g: torch.zeros(shape),
}


def layers_of(shapes, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    return {str(k): SCORES[kind](shape, generator) for k, shape in enumerate(shapes)}


def whole(scores):
    return {name: torch.ones_like(value).bool() for name, value in scores.items()}


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from(GRANULARITIES))
def test_units_are_what_they_say(shape, granularity):
    places = torch.arange(shape.numel()).reshape(shape)
    units = to_units(places, granularity)
    assert torch.equal(from_units(units, shape, granularity), places)
    where = torch.stack(torch.unravel_index(units, shape))  # (axes, units, weights of a unit)
    same = {"kernel": [0, 1], "filter": [0], "2:4": [0, *range(2, len(shape))], "block": [*range(2, len(shape))]}
    fixed = where[same.get(granularity, [*range(len(shape))])]
    assert (fixed == fixed[:, :, :1]).all()
    if granularity == "2:4":
        assert torch.equal(where[1], where[1, :, :1] // 4 * 4 + torch.arange(4))
    if granularity == "block":
        assert units.shape[1] == 16
        assert torch.equal(where[:2].amax(2), where[:2, :, 0] // 4 * 4 + 3)


@settings(max_examples=60, deadline=None)
@given(
    LAYERS,
    st.sampled_from(GRANULARITIES),
    st.booleans(),
    st.sampled_from(sorted(SCORES)),
    st.lists(st.floats(0, 1), min_size=1, max_size=3).map(sorted),
    st.integers(0, 99),
)
def test_as_many_zeros_as_asked_to_one_unit_and_none_comes_back(shapes, granularity, normalised, kind, parts, seed):
    scores = layers_of(shapes, kind, seed)
    masks, unit = whole(scores), max(UNIT[granularity](shape) for shape in shapes)
    size, most = sums(masks)[1], 0.5 if granularity == "2:4" else 1
    spared = 0 if granularity == "2:4" else sum(UNIT[granularity](shape) for shape in shapes)
    for part in parts:
        before, wanted = masks, part * most * size
        masks = grow(before, scores, wanted, granularity, normalised)
        zeros = sums(masks)[0]
        if wanted <= size - spared:
            assert abs(zeros - wanted) <= max(unit / 2, max(0, sums(before)[0] - wanted))
        else:  # one unit is left in each layer
            assert size - zeros == spared or zeros > wanted - unit / 2
        for name, mask in masks.items():
            assert not (mask & ~before[name]).any()
            units = to_units(mask, granularity)
            if granularity == "2:4":
                assert set(units.sum(1).tolist()) <= {2, 4}
            else:
                assert (units == units[:, :1]).all()
                assert mask.any()


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 99), st.floats(0, 0.5))
def test_two_of_each_four_consecutive_input_channels_are_the_smallest(shape, seed, part):
    scores = layers_of([shape], "drawn", seed)
    weight = scores["0"]
    mask = grow(whole(scores), scores, weight.numel() / 2, "2:4")["0"]
    for first in range(0, shape[1], 4):
        four, kept = weight[:, first : first + 4], mask[:, first : first + 4]
        assert (kept.sum(1) == 2).all()
        assert (four.masked_fill(kept, 0).amax(1) <= four.masked_fill(~kept, 2).amin(1)).all()
    some = grow(whole(scores), scores, part * weight.numel(), "2:4")["0"]
    assert not (mask & ~some).any()  # on the way, a part of the same fours


def test_what_was_masked_counts_and_stays():
    weight = torch.arange(1.0, 65).reshape(8, 8)
    there = {"a": torch.ones(8, 8).bool()}
    there["a"][7] = False  # the largest ones
    mask = grow(there, {"a": weight}, 32, "weight")["a"]
    assert not mask[7].any()
    assert int((~mask).sum()) == 32
    assert not mask.flatten()[:24].any()
    # A filter that has lost half of its weights brings only the other half.
    there["a"][7], there["a"][0, :4] = True, False
    assert sums(grow(there, {"a": weight}, 8, "filter")) == (8, 64)
    pair = grow(there, {"a": weight}, 34, "2:4")["a"]
    assert (to_units(pair, "2:4").sum(1)[1:] == 2).all()
    assert not pair[0, :4].any()


def test_the_lowest_go_and_scopes_differ_as_they_should():
    scores = {"small": torch.tensor([[0.1, 0.2, 0.3, 0.4]]), "large": torch.tensor([[10.0, 20, 30, 41]])}
    gone = {
        normalised: [(~mask).sum().item() for mask in grow(whole(scores), scores, 4, "weight", normalised).values()]
        for normalised in (False, True)
    }
    assert gone == {False: [3, 1], True: [2, 2]}  # the best weight of each layer stays


def test_units_of_unequal_size_are_compared_by_their_mean():
    scores = {"wide": torch.full((4, 100), 0.2), "narrow": torch.full((4, 10), 0.5)}
    masks = grow(whole(scores), scores, 100, "filter")
    assert masks["narrow"].all()
    assert masks["wide"].all(1).tolist().count(False) == 1


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_equal_scores_give_the_exact_count_and_always_the_same_weights(granularity):
    scores = {name: torch.ones(8, 8, 3, 3) for name in "ab"}
    first, again = (grow(whole(scores), scores, 0.25 * 2 * 576, granularity) for _ in range(2))
    assert sums(first)[0] == 288
    assert all(torch.equal(first[name], again[name]) for name in "ab")


def test_random_draws_neither_use_nor_move_the_global_generator():
    weights = {"a": torch.zeros(5, 4), "b": torch.zeros(3)}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = first_scores("random", weights, 7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    same, other = first_scores("random", weights, 7), first_scores("random", weights, 8)
    assert all(torch.equal(one[name], same[name]) for name in weights)
    assert not torch.equal(one["a"], other["a"])


def test_gradients_are_gathered_as_the_papers_say():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6))
    kept = {name: first_scores(name, {"w": weight}, 0) for name in ("movement", "taylor")}
    products = []
    for _ in range(5):
        weight.grad = torch.randn(6)
        for name, scores in kept.items():
            gather(name, scores, {"w": weight})
        products.append((weight * weight.grad).detach())
        weight.data += torch.randn(6)
    torch.testing.assert_close(kept["movement"]["w"], -torch.stack(products).sum(0))
    ages = TAYLOR_DECAY ** torch.arange(4, -1, -1.0)
    average = (1 - TAYLOR_DECAY) * (ages[:, None] * torch.stack(products) ** 2).sum(0)
    torch.testing.assert_close(kept["taylor"]["w"], average)


def test_a_weight_that_moves_towards_zero_has_the_lowest_score():
    weight = nn.Parameter(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    weight.grad = torch.tensor([1.0, -1.0, -1.0, 1.0])  # a step goes against the gradient: the first two shrink
    kept = first_scores("movement", {"w": weight}, 0)
    gather("movement", kept, {"w": weight})
    assert kept["w"].tolist() == [-1, -1, 1, 1]


def test_what_can_not_be_reached_is_refused():
    masks = {"a": torch.ones(4, 4).bool()}
    masks["a"][0, :3] = False
    check_room(masks, 3 / 16, "weight", "of a")
    check_room(masks, 0.99, "weight", "of a")
    with pytest.raises(ValueError, match=r"0\.1 is asked where 0\.1875 of a is masked already: what is masked stays"):
        check_room(masks, 0.1, "weight", "of a")
    with pytest.raises(ValueError, match="already, more than two in some fours"):
        check_room(masks, 0.5, "2:4", "of a")
    many = {str(k): torch.ones(2, 2).bool() for k in range(9)}
    with pytest.raises(ValueError, match=r"0\.8 leaves less than one filter in a layer: at most 0\.5000 of all can go"):
        check_room(many, 0.8, "filter", "of all")


def test_a_block_lies_in_one_group():
    assert verdict("sparsify block", nn.Conv2d(16, 16, 3, groups=4))
    refused = verdict("sparsify block", nn.Conv2d(32, 16, 3, groups=8))
    assert refused.reason == "its 2 output channels of a group are not divisible by 4"
