"""Factors of a layer: nothing lost at full rank, the least possible below it, and ranks that hit what is asked."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import micronet
from callbacks.low_rank import (
    Splittable,
    check_ranks,
    energies,
    factors,
    fill,
    full_ranks,
    ranks_keeping,
    ranks_saving,
    sizes,
    split_weight,
    unfoldings,
)
from callbacks.separable import separable_layers, split_by_channel

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding=.same. with even kernel:UserWarning"
)  # said once, by torch

METHODS = ("spatial_svd", "tucker2")


@st.composite
def convolutions(draw):
    """A convolution of any shape and arguments; kernel, stride, padding and dilation differ between the axes."""
    pair = lambda low, high: (draw(st.integers(low, high)), draw(st.integers(low, high)))  # noqa: E731
    kernel = draw(st.sampled_from([(3, 3), (1, 3), (3, 5), (2, 4), (5, 1)]))
    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    stride = (1, 1) if padding == "same" else pair(1, 2)
    torch.manual_seed(draw(st.integers(0, 99)))
    return nn.Conv2d(
        draw(st.integers(1, 5)), draw(st.integers(1, 6)), kernel, stride=stride, dilation=pair(1, 2),
        padding=pair(0, 2) if padding == "numbers" else padding, bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"])),
    )  # fmt: skip


def factored(layer, method, ranks):
    return fill(factors(layer, method, ranks), split_weight(layer.weight, method, ranks), layer.bias)


def relative(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@settings(max_examples=30, deadline=None)
@given(convolutions(), st.sampled_from(METHODS))
def test_a_convolution_is_itself_at_full_rank(layer, method):
    x = torch.randn(2, layer.in_channels, 9, 11)
    whole = factored(layer, method, full_ranks(layer.weight, method))
    with torch.no_grad():
        wanted = layer.double()(x.double())
        assert whole(x).shape == wanted.shape
        assert relative(whole(x), wanted) < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stride", [(2, 2), (1, 3)])
def test_stride_goes_with_its_axis(stride, method):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 5, (3, 5), stride=stride, padding=(0, 2), dilation=(2, 1)), torch.randn(2, 4, 12, 11)
    whole = factored(layer, method, full_ranks(layer.weight, method))
    torch.testing.assert_close(whole(x), layer(x), rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 2), st.integers(0, 2), st.booleans())
def test_a_matrix_is_itself_at_full_rank(c, k, stride, padding, bias):
    conv, linear = nn.Conv2d(c, k, 1, stride=stride, padding=padding, bias=bias), nn.Linear(c, k, bias=bias)
    for layer, x in ((conv, torch.randn(2, c, 5, 6)), (linear, torch.randn(2, 7, c))):
        with torch.no_grad():
            wanted = layer(x)
            assert relative(factored(layer, "svd", (min(c, k),))(x), wanted) < 1e-5


def test_trained_layers_are_themselves_at_full_rank():
    model = micronet.load("tests/data/resnet20_cifar10.pth").model
    seen = set()
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            for method in METHODS if layer.weight[0, 0].numel() > 1 else ("svd",):
                weights = [w.float() for w in split_weight(layer.weight, method, full_ranks(layer.weight, method))]
                assert relative(product(weights, method), layer.weight.detach()) < 1e-5
                seen.add(method)
    assert seen == {"svd", *METHODS}


def product(weights, method):
    """The weight that factors make together."""
    weights = [w.double() for w in weights]
    if method == "svd":
        first, second = (w.flatten(1) for w in weights)
        return (second @ first).reshape(second.shape[0], first.shape[1], *weights[0].shape[2:])
    if method == "spatial_svd":
        return torch.einsum("rch,krw->kchw", weights[0][..., 0], weights[1][:, :, 0])
    return torch.einsum("ic,oihw,ko->kchw", weights[0][..., 0, 0], weights[1], weights[2][..., 0, 0])


@settings(max_examples=20, deadline=None)
@given(convolutions(), st.data())
def test_no_more_is_lost_than_must_be(layer, data):
    layer.requires_grad_(False)
    for method in METHODS:
        full = full_ranks(layer.weight, method)
        ranks = tuple(data.draw(st.integers(1, most)) for most in full)
        lost = (product(split_weight(layer.weight, method, ranks), method) - layer.weight.double()).square().sum()
        # Of each unfolding what is beyond the rank must be lost (Eckart and Young); tucker2 loses at most their sum.
        beyond = [sum(values[rank:]) for values, rank in zip(energies(layer.weight, method), ranks, strict=True)]
        scale = 1e-9 * float(layer.weight.double().square().sum())
        assert max(beyond) - scale <= lost <= sum(beyond) + scale


def test_tucker_loses_less_than_the_first_truncation():
    torch.manual_seed(0)
    weight, ranks = torch.randn(12, 10, 3, 3), (4, 5)
    inward, outward = (
        torch.linalg.svd(matrix.double(), full_matrices=False)[0][:, :rank]
        for matrix, rank in zip(unfoldings(weight, "tucker2"), ranks, strict=True)
    )
    once = torch.einsum("kchw,ka,ci,ib,ao->obhw", weight.double(), outward, inward, inward.T, outward.T)
    best = product(split_weight(weight, "tucker2", ranks), "tucker2")
    assert (best - weight).norm() < 0.995 * (once - weight).norm()


def test_ranks_of_tucker_are_inputs_then_outputs():
    first, core, last = split_weight(torch.randn(8, 6, 3, 3), "tucker2", (2, 5))
    assert (first.shape, core.shape, last.shape) == ((2, 6, 1, 1), (5, 2, 3, 3), (8, 5, 1, 1))
    low = torch.einsum("kr,rchw->kchw", torch.randn(8, 1), torch.randn(1, 6, 3, 3))  # outputs are all alike
    wanted = split_weight(low, "tucker2", (6, 1))
    assert relative(product(wanted, "tucker2"), low) < 1e-6
    assert relative(product(split_weight(low, "tucker2", (1, 8)), "tucker2"), low) > 0.1


@settings(max_examples=30, deadline=None)
@given(convolutions(), st.data())
def test_sizes_are_those_of_the_layers_made(layer, data):
    for method in METHODS:
        ranks = tuple(data.draw(st.integers(1, most)) for most in full_ranks(layer.weight, method))
        made = factors(layer, method, ranks)
        assert sizes(layer.weight, method, ranks) == tuple(part.weight.numel() for part in made)
        assert [part.bias is not None for part in made] == [*[False] * (len(made) - 1), layer.bias is not None]
        assert {type(part) for part in made} == {nn.Conv2d}


def test_what_a_layer_is_besides_its_weights_goes_along():
    layer = nn.Conv2d(4, 4, 3, dtype=torch.bfloat16).eval().requires_grad_(False)
    for made in (factors(layer, "tucker2", (2, 2)), separable_layers(layer)):
        assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in made.parameters())
        assert not any(m.training for m in made.modules())
    state = torch.random.get_rng_state()
    factors(nn.Conv2d(4, 4, 3, device="meta"), "tucker2", (2, 2))
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing is drawn for weights that come later


@pytest.mark.parametrize(
    ("layer", "method", "ranks"),
    [
        (nn.Conv2d(4, 6, 3), "tucker2", (5, 6)),
        (nn.Conv2d(4, 6, 3), "tucker2", (4,)),
        (nn.Conv2d(4, 6, 3), "spatial_svd", (10**12,)),
        (nn.Conv2d(4, 6, 3), "spatial_svd", (0,)),
        (nn.Conv2d(4, 6, 3), "spatial_svd", (True,)),
        (nn.Conv2d(4, 6, 3), "spatial_svd", (2.0,)),
        (nn.Conv2d(4, 6, 3), "svd", (2,)),
        (nn.Conv2d(4, 4, 3, groups=2), "tucker2", (2, 2)),
        (nn.ConvTranspose2d(4, 4, 3), "tucker2", (2, 2)),
        (nn.Linear(4, 4), "tucker2", (2, 2)),
        (nn.ReLU(), "svd", (2,)),
        (nn.Linear(4, 4), "cp", (2,)),
    ],
)
def test_ranks_that_a_layer_cannot_have_are_refused(layer, method, ranks):
    with pytest.raises(ValueError, match=r"ranks must be|can't split|method must be"):
        check_ranks(layer, method, ranks)


# Ranks of several layers.
SPECTRA = st.lists(st.floats(0, 9), min_size=1, max_size=8).map(lambda values: sorted(values, reverse=True))


@st.composite
def networks(draw):
    """Layers of any spectra: of one unfolding, or of two with a core between them."""
    found = {}
    for k in range(draw(st.integers(1, 4))):
        a, b, c = (draw(st.integers(1, 9)) for _ in range(3))
        both = draw(st.booleans())
        cost = (lambda r, a=a, b=b, c=c: a * r[0] + c * r[0] * r[1] + b * r[1]) if both else lambda r, a=a: a * r[0]
        found[str(k)] = Splittable((draw(SPECTRA),) * (1 + both), draw(st.integers(1, 99)), cost)
    return found


@settings(max_examples=100, deadline=None)
@given(networks(), st.floats(0.01, 1))
def test_what_is_asked_is_saved_and_not_a_unit_more_than_needed(layers, share):
    most = sum(layer.saves((1,) * len(layer.energies)) for layer in layers.values())
    least = math.ceil(share * most)
    if not most:
        return
    ranks = ranks_saving(layers, least)
    saved = sum(layer.saves(ranks[name]) for name, layer in layers.items())
    assert saved >= least
    back = []  # what would be saved if a unit that was taken away came back
    for name, layer in layers.items():
        for axis, values in enumerate(layer.energies):
            if ranks[name][axis] < len(values):
                more = tuple(rank + (place == axis) for place, rank in enumerate(ranks[name]))
                back.append(saved - layer.saves(ranks[name]) + layer.saves(more))
    assert min(back, default=0) < least
    with pytest.raises(ValueError, match=f"save {most:,}, and {most + 1:,} is asked"):
        ranks_saving(layers, most + 1)


def test_a_unit_goes_where_it_loses_the_least_for_what_it_saves():
    flat, steep = [1.0] * 8, [100.0] + [0.01] * 7
    layers = {n: Splittable((v,), 64, lambda r: 8 * r[0]) for n, v in {"flat": flat, "steep": steep}.items()}
    assert ranks_saving(layers, 40) == {"flat": (8,), "steep": (3,)}
    dear = layers | {"flat": Splittable((flat,), 8 * 10**6, lambda r: 10**6 * r[0])}
    assert ranks_saving(dear, 40) == {"flat": (7,), "steep": (8,)}


def test_the_smallest_rank_that_keeps_a_share():
    layer = Splittable(([6.0, 3.0, 1.0, 0.0],), 99, lambda r: r[0])
    shares = {0.5: 1, 0.6: 1, 0.61: 2, 0.9: 2, 0.95: 3, 1.0: 3}  # what is nothing needs no rank
    assert {share: ranks_keeping(layer, share) for share in shares} == {s: (r,) for s, r in shares.items()}


# Depthwise and pointwise.
@settings(max_examples=20, deadline=None)
@given(convolutions())
def test_a_channel_keeps_the_first_term_of_its_decomposition(layer):
    made = fill(separable_layers(layer), split_by_channel(layer.weight), layer.bias)
    weight = layer.weight.detach().double()
    made_of = made[0].weight.double()[None, :, 0] * made[1].weight.double()
    lost = (made_of - weight).square().sum((0, 2, 3))
    beyond = torch.stack([torch.linalg.svdvals(weight[:, c].flatten(1))[1:].square().sum() for c in range(len(lost))])
    torch.testing.assert_close(lost.detach(), beyond, rtol=1e-5, atol=1e-9)
    with torch.no_grad():
        layer.weight.copy_(made_of)  # a layer that is of this form is reproduced
        again = fill(separable_layers(layer), split_by_channel(layer.weight), layer.bias)
        x = torch.randn(2, layer.in_channels, 9, 11)
        wanted = layer(x)
        torch.testing.assert_close(again(x), wanted, rtol=1e-4, atol=1e-5)
