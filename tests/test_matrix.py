"""Every torchvision classifier, a network of each of timm's families: every operation has a rule, MACs as fvcore's."""

import copy
import logging
from collections import Counter

import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from torchvision import models

from micronet.errors import MicronetError
from micronet.model_source import open_model

# Small ones of different kinds, for every run of the tests.
CROSS_SECTION = (
    "timm:mobilenetv3_small_050",
    "timm:vit_tiny_patch16_224",
    "timm:convnext_atto",
    "timm:repvgg_a0",
    "timm:edgenext_xx_small",
    "timm:levit_128s",
    "timm:resnet10t",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:swin_v2_t",
)
# Families with an operation that has no rule, and that operation.
WITHOUT_RULE = {"sequencer": "lstm"}
# Products that fvcore counts and we fold: their factors are constants, such as a position encoding that runs through
# layers of its own. The share of ours is what is left of theirs.
FED_BY_CONSTANTS = ("edgenext", "xcit", "convit", "swinv2", "swin_v2")

# Convolutions with padding="same", which fvcore does not see.
SAME_PADDING = ("convmixer",)

# What small networks are called, the smallest first.
SMALL = ("atto", "femto", "pico", "xx_small", "xxtiny", "nano", "xtiny", "mini", "_050", "tiny", "x_small", "_b0", "_s")


def families():
    """One network of each family: one that is called small, with the shortest name."""
    found = {}
    for name in timm.list_models():
        found.setdefault(timm.models._registry._model_to_module[name], []).append(name)

    def rank(name):
        size = next((place for place, word in enumerate(SMALL) if word in name), len(SMALL))
        return "test_" in name, size, len(name), name

    return [f"timm:{min(names, key=rank)}" for _, names in sorted(found.items())]


def theirs(source):
    """Multiply-accumulates that fvcore counts, by operator, on real tensors."""
    net = copy.deepcopy(source.module).to_empty(device="cpu")
    for tensor in [*net.parameters(), *net.buffers()]:
        tensor.detach().fill_(0.01 if tensor.is_floating_point() else 0)
    with torch.no_grad():
        count = FlopCountAnalysis(net, torch.zeros(1, *source.input_size))
        return count.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_operator()


def check(name, monkeypatch):
    """Hold one network's products against fvcore's."""
    monkeypatch.setattr(logging.getLogger("fvcore.nn.jit_analysis"), "disabled", True)
    source = open_model(name)
    family = next((family for family in WITHOUT_RULE if family in name), None)
    if family:
        with pytest.raises(MicronetError, match=WITHOUT_RULE[family]):
            source.ledger()
        return
    ours = Counter()
    for line in source.ledger().lines:
        ours[line.op] += line.macs
    fvcore = theirs(source)
    products = sum(fvcore.get(op, 0) for op in ("linear", "addmm", "matmul", "bmm", "baddbmm", "einsum"))
    # What fvcore calls a product of matrices is a linear layer of ours where one factor is constant; it does not see
    # torch's fused attention.
    mine = ours["linear"] + ours["matmul"] + ours["einsum"]
    if any(family in name for family in SAME_PADDING):
        assert ours["conv2d"] > fvcore["conv"]
        return
    assert ours["conv2d"] + ours["conv_transpose2d"] <= fvcore.get("conv", 0)
    if any(family in name for family in FED_BY_CONSTANTS):
        assert 0 < ours["conv2d"] + mine < fvcore.get("conv", 0) + products
    else:
        assert ours["conv2d"] + ours["conv_transpose2d"] == fvcore.get("conv", 0)
        assert mine == products


@pytest.mark.parametrize("name", CROSS_SECTION)
def test_products_are_fvcores(name, monkeypatch):
    check(name, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*families(), *(f"torchvision:{name}" for name in models.list_models(module=models))])
def test_products_of_every_family_are_fvcores(name, monkeypatch):
    check(name, monkeypatch)


def test_there_are_enough_of_them():
    assert len(families()) >= 80
    assert len(models.list_models(module=models)) >= 80
