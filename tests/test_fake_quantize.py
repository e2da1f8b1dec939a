"""Layers that compute with quantised weights and inputs: codes, gradients, folding, what the ledger makes of them."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from callbacks.fake_quantize import (
    QuantConv2d,
    QuantLinear,
    act_range,
    along,
    bits_of,
    fake_quantize,
    quantise_layer,
    quantised_layers,
    weight_range,
)
from callbacks.ledger import build
from callbacks.onnx_export import deployed
from callbacks.op_trace import trace
from callbacks.step_sizes import best_steps
from micronet.counting import Assume, count_official
from micronet.rules import RULES

BITS = range(2, 9)


def quantised(layer, weight_bits=4, act_bits=4, signed=False, act_scale=0.1):
    """A layer with the step sizes that a training begins with."""
    quantise_layer(layer, weight_bits, act_bits, signed)
    with torch.no_grad():
        layer.weight_scale.copy_(best_steps(layer.weight.flatten(1), *weight_range(weight_bits)))
        layer.act_scale.fill_(act_scale)
    return layer


def network(weight_bits=4, act_bits=4, seed=0):
    """Two convolutions, the first with a BatchNorm whose factors have both signs and a zero, and a linear layer."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    net = nn.Sequential(*net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([1.0, -0.5, 0.0, 2.0, -1.0, 1e-3, 0.7, -3.0]))
        net[1].bias.uniform_(-1, 1)
        net[1].running_mean.uniform_(-1, 1)
        net[1].running_var.uniform_(0.5, 2)
    for place in (0, 3, 7):
        # Step sizes of their own: exporters make one tensor of equal ones.
        quantised(net[place], weight_bits, act_bits, signed=place == 0, act_scale=0.1 + place / 100)
    return net.eval()


def test_ranges_are_the_published_ones():
    # Symmetric weights leave out the lowest code; inputs: Esser et al. 2020, section 2.
    assert [weight_range(bits) for bits in (2, 4, 8)] == [(-1, 1), (-7, 7), (-127, 127)]
    assert [act_range(bits, False) for bits in (2, 4, 8)] == [(0, 3), (0, 15), (0, 255)]
    assert [act_range(bits, True) for bits in (2, 4, 8)] == [(-2, 1), (-8, 7), (-128, 127)]


def test_rounding_is_to_whole_steps_in_range_halves_to_even():
    x = torch.tensor([-1.0, -0.5, -0.25, 0.0, 0.25, 0.75, 1.25, 1.74, 9.0])
    assert fake_quantize(x, torch.tensor(0.5), 0, 3, 9).tolist() == [0, 0, 0, 0, 0, 1.0, 1.0, 1.5, 1.5]
    rows = fake_quantize(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([0.4, 3.0]), -7, 7, 2)
    torch.testing.assert_close(rows, torch.tensor([[0.8, 0.8], [0.0, 0.0]]))


@pytest.mark.parametrize("learning", [True, False])
def test_rounding_is_float32_in_bf16(learning):
    x = (torch.rand(64, 4) * 20).bfloat16()
    scale = torch.tensor(0.0771, requires_grad=learning)
    # In bf16 itself, x / scale would keep three digits: codes above 100 would be wrong.
    codes = torch.round(x.float() / 0.0771).clamp(0, 255)
    assert torch.equal(fake_quantize(x, scale, 0, 255, 4), (codes * torch.tensor(0.0771)).bfloat16())


@pytest.mark.parametrize("rows", [True, False])
def test_gradients_are_those_of_the_paper_with_a_range_up_to_half_a_step_beyond_the_last_code(rows):
    torch.manual_seed(0)
    x = torch.randn(4, 6).requires_grad_()
    scale = (torch.rand(4) * 0.2 + 0.1 if rows else torch.tensor(0.15)).requires_grad_()
    low, high, upstream = -3, 3, torch.randn(4, 6)
    fake_quantize(x, scale, low, high, 6).backward(upstream)
    steps, inner, numbers, sizes = torch.zeros(4), torch.zeros(4, 6), x.detach(), scale.detach().expand(4)
    for i in range(4):
        for j in range(6):
            v = float(numbers[i, j] / sizes[i])
            inside = low - 0.5 <= v <= high + 0.5  # the paper: low < v < high
            inner[i, j] = float(inside)
            slope = round(v) - v if inside else (low if v < 0 else high)  # eq. 3
            steps[i] += float(upstream[i, j]) * slope
    steps = (steps if rows else steps.sum()) / (6 * high) ** 0.5  # section 2.2
    assert 0 < inner.sum() < 24
    torch.testing.assert_close(x.grad, upstream * inner)
    torch.testing.assert_close(scale.grad, steps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learning", [True, False])
def test_training_and_running_round_alike(learning):
    layer = quantised(nn.Conv2d(3, 8, 3), signed=True)
    x = torch.randn(5, 3, 9, 9)
    with torch.no_grad():
        plain = layer(x)
    layer.train(learning)
    assert torch.equal(layer(x), plain)


@given(st.integers(0, 2**31), st.sampled_from(BITS), st.floats(1e-6, 1e4), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_frozen_weights_are_codes_times_scale_and_stay_so(seed, bits, size, width):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(width, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, width, generator=generator) * size)
    quantised(layer, bits)
    codes = layer.codes()
    assert codes.dtype is torch.int8
    assert int(codes.abs().max()) <= weight_range(bits)[1]
    layer.freeze()
    product = codes.float() * layer.weight_scale.detach()[:, None]
    # The bits, not the values: -0.0 equals 0.0.
    assert torch.equal(layer.weight.detach().view(torch.int32), product.view(torch.int32))
    assert torch.equal(layer.codes(), codes)
    before = copy.deepcopy(layer.state_dict())
    layer.freeze()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    used = fake_quantize(layer.weight.detach(), layer.weight_scale.detach(), *weight_range(bits), width)
    assert torch.equal(used.view(torch.int32), product.view(torch.int32))


@given(st.integers(0, 2**31), st.sampled_from(BITS), st.floats(1e-6, 1e6))
@settings(max_examples=60, deadline=None)
def test_a_negative_factor_flips_signs_and_nothing_else(seed, bits, size):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Conv2d(2, 4, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    quantised(layer, bits)
    layer.freeze()
    codes, scale = layer.codes(), layer.weight_scale.detach().clone()
    factor = torch.tensor([1.0, -1.0, -0.3, 0.0], dtype=torch.float64) * size
    layer.rescale(factor)
    assert torch.equal(layer.codes(), codes * torch.tensor([1, -1, -1, 0], dtype=torch.int8)[:, None, None, None])
    assert torch.equal(layer.weight_scale[:3], (scale.double() * factor.abs()).float()[:3])
    assert torch.equal(layer.weight.detach(), layer.codes().float() * along(layer.weight_scale.detach(), layer.weight))


def test_the_deployed_form_is_folded_and_answers_alike():
    net = network()
    # The only input that is rounded is the image: both see the same, and what follows differs by float32's rounding.
    layer, norm = net[0], net[1]
    images = torch.randn(16, 3, 10, 10)
    plain = deployed(net, (3, 10, 10))
    assert type(plain[1]) is nn.Identity
    assert type(plain[0]) is QuantConv2d
    assert torch.equal(plain[0].codes(), layer.codes() * norm.weight.sign().to(torch.int8)[:, None, None, None])
    with torch.no_grad():
        torch.testing.assert_close(plain[0](images), norm(layer(images)), rtol=1e-5, atol=1e-5)
    assert bits_of(plain) == bits_of(net)
    assert (deployed(net, (3, 10, 10))[0].weight[2] == 0).all()  # the factor of channel 2 is 0


def test_a_layer_stays_the_same_object_with_its_parameters_and_hooks():
    layer, seen = nn.Linear(3, 2), []
    weight = layer.weight
    layer.register_forward_hook(lambda *_: seen.append(1))
    quantise_layer(layer, 4, 8, act_signed=True)
    assert type(layer) is QuantLinear
    assert layer.weight is weight
    assert list(layer.state_dict()) == ["weight", "bias", "weight_scale", "act_scale"]
    layer(torch.ones(1, 3))
    assert seen
    assert "weight_bits=4, act_bits=8 signed" in repr(layer)
    with torch.no_grad():
        layer.weight_scale.fill_(0.3)
    quantise_layer(layer, 5, 8, act_signed=True)  # another width: the step sizes stay
    assert layer.weight_scale.tolist() == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize(
    ("layer", "bits", "says"),
    [
        (nn.Linear(2, 2), (1, 4), "weight_bits must be a whole number from 2 to 8, got 1"),
        (nn.Linear(2, 2), (4, 9), "act_bits must be a whole number from 2 to 8, got 9"),
        (nn.Linear(2, 2), (4.0, 4), "got 4.0"),
        (nn.ConvTranspose2d(2, 2, 3), (4, 4), "a ConvTranspose2d can't be quantised"),
    ],
)
def test_what_cannot_be_quantised_is_named(layer, bits, says):
    with pytest.raises(ValueError, match=says):
        quantise_layer(layer, *bits, act_signed=False)
    assert not quantised_layers(layer)


def test_the_ledger_reads_widths_codes_and_scales():
    net = network(weight_bits=3, act_bits=5)
    ledger = build(trace(net, (3, 10, 10), masks={}))
    arrays = {array.name: array for array in ledger.arrays}
    for place in ("0", "3", "7"):
        codes = net.get_submodule(place).codes()
        weight, scale = arrays[f"{place}.weight"], arrays[f"{place}.weight_scale"]
        assert (weight.role, weight.bits, weight.shape) == ("weight", 3, tuple(codes.shape))
        assert weight.nonzero == int(codes.count_nonzero())
        assert (scale.role, scale.bits, scale.shape) == ("scale", 32, (len(codes),))
        assert (arrays[f"{place}.act_scale"].role, arrays[f"{place}.act_scale"].shape) == ("scale", ())
        assert (arrays[f"{place}.bias"].bits, arrays[f"{place}.bias"].role) == (32, "bias")
    assert len(arrays) == 12  # the BatchNorm is folded
    lines = {line.name: line for line in ledger.lines}
    assert [(lines[n].weight_bits, lines[n].act_bits, lines[n].acc_bits) for n in ("0", "3", "7")] == [(3, 5, 32)] * 3
    assert (lines["3.quantize"].op, lines["3.quantize"].act_bits, lines["3.quantize"].mults) == ("quantize", 32, 8 * 64)
    assert lines["1"].folded == "0"


def test_a_masked_weights_kept_count_is_the_masks():
    layer = quantised(nn.Conv2d(3, 8, 3))
    mask = torch.rand(layer.weight.shape) > 0.6
    with torch.no_grad():
        layer.weight.masked_fill_(~mask, 0)
    assert not layer.codes()[~mask].any()
    ledger = build(trace(nn.Sequential(layer), (3, 8, 8), masks={"0.weight": mask}))
    (weight,) = (array for array in ledger.arrays if array.role == "weight")
    assert (weight.nonzero, weight.masked, weight.bits) == (int(mask.sum()), True, 4)


def test_official_rules_refuse_16_free_bits():
    ledger = build(trace(network(), (3, 10, 10), masks={}))
    tally = count_official(ledger, RULES["official"], Assume())
    assert "no 16-bit freebie: a part of the model is quantised" in tally.notes
    weights = 3 * 8 * 9 + 8 * 8 * 9 + 8 * 5
    outputs = 8 + 8 + 5
    # 4 bits a weight; a scale and a bias of 32 for each output; a scale for each input
    assert tally.storage == pytest.approx(weights * 4 / 32 + 2 * outputs + 3)
    assert np.isclose(tally.lines[1].ops, tally.lines[1].mults * 4 / 32 + tally.lines[1].adds)
