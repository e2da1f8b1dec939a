"""Masks: zeros that stay through training, averaging, checkpoints, and those of torch's own pruning."""

import pytest
import torch
from learners import make_learner
from torch import nn
from torch.nn.utils import prune

from callbacks.ema import EMA
from callbacks.masks import KeepZeros, apply_masks, take_masks
from callbacks.protocol import all_masks, all_settled


def half(model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(p.shape, generator=generator) > 0.5 for name, p in model.named_parameters() if p.dim() > 1}


def test_every_zero_stays_through_momentum_decay_and_averaging():
    learn = make_learner()
    masks = half(learn.model)
    with learn.no_mbar():
        learn.fit(2, 0.1, wd=0.1, cbs=[KeepZeros(masks), EMA(0.9)])
    state = learn.model.state_dict()
    for name, mask in masks.items():
        assert not state[name][~mask].any()
        assert not torch.signbit(state[name][~mask]).any()  # 0.0 and -0.0 are other bits
        assert (state[name][mask] != 0).all()


def test_without_the_callback_the_zeros_are_lost():
    learn = make_learner()
    masks = half(learn.model)
    apply_masks(dict(learn.model.named_parameters()), masks)
    with learn.no_mbar():
        learn.fit(1, 0.1)
    state = learn.model.state_dict()
    assert all(state[name][~mask].any() for name, mask in masks.items())


def test_masks_are_found_in_the_learner():
    learn = make_learner()
    masks = half(learn.model)
    one, other = KeepZeros(masks), KeepZeros({"0.weight": ~masks["0.weight"]})
    with learn.no_mbar():
        learn.fit(1, cbs=[one])
    learn.add_cbs([one, other])
    for cb in (one, other):
        cb.before_fit()
    together = all_masks(learn)
    assert not together["0.weight"].any()
    assert torch.equal(together["5.weight"], masks["5.weight"])
    assert all_settled(learn)


@pytest.mark.parametrize("wrong", [{"9.weight": torch.ones(1).bool()}, {"0.weight": torch.ones(4, 3, 3, 3)}])
def test_masks_of_something_else_are_refused(wrong):
    learn = make_learner()
    with learn.no_mbar(), pytest.raises(ValueError, match=r"masks: .*weight is not a parameter"):
        learn.fit(1, cbs=[KeepZeros(wrong)])


def test_torchs_own_pruning_becomes_masks():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Flatten(), nn.Linear(16, 2)))
    prune.l1_unstructured(net[0], "weight", 0.5)
    prune.random_unstructured(net[2][1], "bias", 1)
    expected = {"0.weight": net[0].weight_mask.bool(), "2.1.bias": net[2][1].bias_mask.bool()}
    x = torch.randn(1, 3, 4, 4)
    before = net(x)
    masks = take_masks(net)
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())
    assert set(net.state_dict()) == {"0.weight", "0.bias", "2.1.weight", "2.1.bias"}
    assert torch.equal(net(x), before)
    assert int((net[0].weight == 0).sum()) == 54
