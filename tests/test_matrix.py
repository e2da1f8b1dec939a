"""Every torchvision classifier, a network of each of timm's families: every operation has a rule, MACs as fvcore's."""

import re

import pytest
import timm
from torchvision import models

from micronet.cross_check import cross_check
from micronet.errors import MicronetError
from micronet.model_source import open_model

# Small ones of different kinds, for every run of the tests.
CROSS_SECTION = (
    "timm:mobilenetv3_small_050",
    "timm:vit_tiny_patch16_224",
    "timm:convnext_atto",
    "timm:repvgg_a0",
    "timm:edgenext_xx_small",
    "timm:resnet10t",
    "torchvision:shufflenet_v2_x0_5",
)
# Families with an operation that has no rule, and that operation.
WITHOUT_RULE = {"sequencer": "lstm"}
# Layers that are fed by constants alone, such as a position encoding that runs through layers of its own: we fold them.
FED_BY_CONSTANTS = ("edgenext", "xcit", "convit", "swinv2", "swin_v2", "naflexvit", "gemma4", "vit_relpos")
# Why else fvcore's figure may differ: none of these is a product of a convolution or a linear layer that it counts.
OTHER_REASONS = (
    "also counts .*",  # its figure has normalisation and pooling in it
    "scaled_dot_product_attention: no formula there",
    "einsum: numpy's estimate, printed with four digits",
    '.*padding="same".*|.*_convolution_mode.*',
    ".*unused|.*nothing reads.*",
)

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


def check(name):
    """Hold one network's products against fvcore's: every difference has a reason that is no miscount."""
    source = open_model(name)
    family = next((family for family in WITHOUT_RULE if family in name), None)
    if family:
        with pytest.raises(MicronetError, match=WITHOUT_RULE[family]):
            source.ledger()
        return
    (row,) = (r for r in cross_check(source, source.ledger()) if (r.counter, r.what) == ("fvcore", "MACs"))
    reasons = {reason.text: reason.amount for reason in row.reasons}
    fed = sum(amount for text, amount in reasons.items() if "fed by constants alone" in text)
    assert not row.unexplained, row
    assert row.theirs - row.ours == sum(reasons.values())
    assert bool(fed) == any(family in name for family in FED_BY_CONSTANTS), row
    other = [text for text in reasons if "fed by constants alone" not in text]
    assert not [text for text in other if not any(re.fullmatch(known, text) for known in OTHER_REASONS)]


@pytest.mark.parametrize("name", CROSS_SECTION)
def test_products_are_fvcores(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*families(), *(f"torchvision:{name}" for name in models.list_models(module=models))])
def test_products_of_every_family_are_fvcores(name):
    check(name)


def test_there_are_enough_of_them():
    assert len(families()) >= 80
    assert len(models.list_models(module=models)) >= 80
