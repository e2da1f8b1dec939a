"""Masks: zeros that stay through training, averaging, checkpoints, and those of torch's own pruning."""

from dataclasses import replace

import pytest
import torch
from learners import make_learner
from torch import nn
from torch.nn.utils import prune

from callbacks.ema import EMA
from callbacks.masks import KeepZeros, apply_masks
from callbacks.protocol import all_masks, all_settled
from callbacks.torch_masks import take_masks
from micronet import Bundle, save, score
from micronet.model_source import open_model
from micronet.models import resnet20

STATS = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


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


def pruned_resnet():
    """ResNet-20 masked by torch, its product tensors made by a forward pass that recorded gradients."""
    torch.manual_seed(0)
    net = resnet20(num_classes=10)
    for layer in (net.conv1, net.layer2[0].conv1):
        prune.l1_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(net.layer2[0].conv1, "weight", 0.5)  # twice: torch then keeps a container of methods
    net(torch.randn(2, 3, 8, 8))
    return net


@pytest.mark.parametrize("way", ["module", "state dict", "pickle"])
def test_what_torch_masked_is_scored_as_masks(way, tmp_path):
    net = pruned_resnet()
    keys, hooks = list(net.state_dict()), len(net.conv1._forward_pre_hooks)
    before = [value.clone() for value in net.state_dict().values()]
    if way == "module":
        source = open_model(net)
    elif way == "state dict":
        torch.save(net.state_dict(), tmp_path / "net.pth")
        source = open_model(tmp_path / "net.pth", arch="micronet:resnet20,num_classes=10")
    else:
        for module in net.modules():  # torch can't copy or pickle what has a gradient's history
            vars(module).pop("weight", None)
        torch.save(net, tmp_path / "net.pth")
        source = open_model(tmp_path / "net.pth", trust=True, input_size=(3, 32, 32))
    assert list(net.state_dict()) == keys
    assert len(net.conv1._forward_pre_hooks) == hooks
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before, strict=True))
    plain = pruned_resnet()
    masks = take_masks(plain)
    assert source.masks.keys() == masks.keys()
    assert all(torch.equal(source.masks[name], mask) for name, mask in masks.items())
    state = source.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    assert [line.nonzero for line in source.ledger().lines] == [
        line.nonzero for line in open_model(plain, masks=masks).ledger().lines
    ]
    bundle = Bundle(
        plain, "micronet.models.resnet:resnet20", {"num_classes": 10}, tuple("0123456789"), (3, 32, 32), *STATS
    )
    save(replace(bundle, masks=masks), tmp_path / "model.pth")
    assert score(tmp_path / "model.pth").storage == score(source.module, masks=source.masks).storage


def test_masks_of_a_network_that_has_some_already_come_together():
    net, given = pruned_resnet(), {"fc.weight": torch.rand(10, 64) > 0.5}
    assert set(open_model(net, masks=given).masks) == {"conv1.weight", "layer2.0.conv1.weight", "fc.weight"}
    untouched = resnet20(num_classes=10)
    assert open_model(untouched).module is untouched
    assert open_model(untouched).masks is None
