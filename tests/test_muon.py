"""Muon: what one step does to a weight, and that a fit trains with it."""

import pytest
import torch
from fastai.callback.schedule import combined_cos  # its module gives the Learner fit_one_cycle
from fastai.optimizer import OptimWrapper
from hypothesis import given
from hypothesis import strategies as st
from learners import make_learner
from torch import nn

from micronet.muon import Muon, orthogonalised
from micronet.optim import muon


@given(st.integers(1, 4), st.integers(1, 20), st.integers(1, 40), st.integers(0, 2**31), st.floats(-6, 6))
def test_singular_values_come_near_one_and_directions_stay(count, rows, columns, seed, power):
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(count, rows, columns, generator=generator) * 10**power
    u, values, vh = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalised(matrices)
    found = u.mT @ result @ vh.mT
    kept = values / values[:, :1] > 0.05  # a direction far below the largest needs more iterations
    diagonal = found.diagonal(dim1=1, dim2=2)
    assert ((diagonal > 0.4) & (diagonal < 1.3))[kept].all()
    off = found - torch.diag_embed(diagonal)
    assert off.abs().max() < 1e-3


def test_zeros_stay_zero():
    assert not orthogonalised(torch.zeros(2, 3, 4)).any()


def one_step(weight, gradient, **settings):
    weight = nn.Parameter(weight.clone())
    weight.grad = gradient.clone()
    Muon([weight], **settings).step()
    return weight.detach()


def test_a_convolutions_step_is_relative_and_keeps_the_norm():
    torch.manual_seed(0)
    weight, gradient = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    for lr in (0.01, 0.1):
        moved = one_step(weight, gradient, lr=lr, weight_decay=0.5)
        assert moved.norm() == pytest.approx(float(weight.norm()), rel=1e-5)
        angle = torch.arccos((moved * weight).sum() / weight.norm() ** 2)
        assert angle == pytest.approx(lr, rel=0.05)  # the direction is nearly at right angles to the weight
        assert ((moved - weight) * gradient).sum() < 0
    # Neither the gradient's size nor the weight's changes the relative step.
    again = one_step(weight * 100, gradient * 1e-4, lr=0.1)
    torch.testing.assert_close(again / 100, moved, rtol=1e-3, atol=1e-4)


def test_convolutions_of_one_shape_do_not_mix():
    torch.manual_seed(0)
    weights = [torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.randn(3, 2, 1, 1)]
    gradients = [torch.randn_like(w) for w in weights]
    together = [nn.Parameter(w.clone()) for w in weights]
    for p, g in zip(together, gradients, strict=True):
        p.grad = g.clone()
    Muon(together, lr=0.1).step()
    for p, w, g in zip(together, weights, gradients, strict=True):
        torch.testing.assert_close(p.detach(), one_step(w, g, lr=0.1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 3, 8), (4, 2, 3, 3)])
def test_what_is_no_convolution_or_needs_its_size_is_trained_as_by_sgd(shape):
    torch.manual_seed(0)
    p, like = (nn.Parameter(torch.full(shape, 1e-3)) for _ in range(2))
    p.free_norm = len(shape) == 4
    optimizers = Muon([p], lr=0.1, momentum=0.5), torch.optim.SGD([like], lr=0.1, momentum=0.5, nesterov=True)
    for _ in range(3):
        p.grad, like.grad = torch.ones(shape), torch.ones(shape)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(p, like)


def test_a_weight_of_zeros_moves():
    moved = one_step(torch.zeros(4, 2, 3, 3), torch.randn(4, 2, 3, 3), lr=0.1)
    assert moved.norm() == pytest.approx(2.0, rel=1e-4)


def test_everything_else_is_trained_as_by_sgd():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    settings = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.01}
    optimizers = [Muon(ours.parameters(), **settings), torch.optim.SGD(theirs.parameters(), nesterov=True, **settings)]
    for _ in range(4):
        x = torch.randn(7, 5)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wrong", [{"lr": -1}, {"momentum": 1}, {"momentum": -0.1}, {"weight_decay": -1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Muon([nn.Parameter(torch.zeros(2))], **wrong)


def test_a_learner_sets_its_rates_and_saves_its_momentum():
    learn = make_learner()
    learn.opt_func = muon(momentum=0.7)
    with learn.no_mbar():
        learn.fit_one_cycle(2, 0.05, moms=(0.9, 0.6, 0.9))
    assert isinstance(learn.opt, OptimWrapper)
    last = 1 - 1 / len(learn.recorder.lrs)
    group = learn.opt.opt.param_groups[0]
    assert group["lr"] == pytest.approx(combined_cos(0.25, 0.05 / 25, 0.05, 0.05 / 1e5)(last))
    assert group["momentum"] == pytest.approx(combined_cos(0.25, 0.9, 0.6, 0.9)(last))
    losses = [row[0] for row in learn.recorder.values]
    assert losses[-1] < losses[0]
    state = learn.opt.state_dict()["state"]
    assert all(set(value) == {"momentum_buffer"} for value in state.values())
    assert len(state) == len(list(learn.model.parameters()))
