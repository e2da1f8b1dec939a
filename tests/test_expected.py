"""What a method declares that it will change, and what follows from it for a ledger."""

import re
from dataclasses import replace

import pytest
import torch
from fastai.callback.core import Callback

import micronet.models as networks
from callbacks.ema import EMA
from callbacks.expected import Expected, declared, follow, narrowed, together
from micronet import RULES
from micronet.model_source import open_model
from micronet.score import tally

SIZE = (3, 32, 32)
NETWORKS = {
    "WRN": (networks.wide_resnet, {"depth": 10, "width": 2}),
    "ResNet-20": (networks.resnet20, {}),
    "pre-activation": (networks.preact_resnet18, {}),
    "separable": (networks.separable_net, {}),
    "GoogLeNet": (networks.googlenet, {}),
    "DenseNet": (networks.densenet121, {}),
}


class Declares(Callback):
    """A method as it looks from outside: what it does to the fit is left out."""

    def __init__(self, **expected) -> None:
        super().__init__()
        self.told = expected

    def expected(self) -> Expected:
        return Expected(**self.told)


def test_a_method_tells_its_effect_by_declaring_it():
    cb = Declares(sparsity=0.5)
    assert declared(cb) == Expected(sparsity=0.5)
    assert declared(EMA()) is None
    cb.learn = type("L", (), {"model": None})()
    other = EMA()
    other.learn = cb  # a Callback's unknown attributes are looked up in what it calls its Learner
    assert declared(other) is None


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_a_ratio_gives_what_the_narrower_network_has(ratio):
    """Every width of these networks is a multiple of one number, so that the estimate can be exact."""
    whole, narrow = (
        open_model(networks.separable_net(width_multiplier=width, num_classes=10), input_size=SIZE).ledger()
        for width in (1.0, 1 - ratio)
    )
    guessed = narrowed(whole, ratio)
    for name in ("params", "peak_bytes"):
        assert getattr(guessed, name) == pytest.approx(getattr(narrow, name), rel=0.02)
    for rules in RULES.values():
        counts = [tally("", ledger, rules) for ledger in (guessed, narrow)]
        for name in ("params", "storage", "mults", "adds", "macs", "ops"):
            assert getattr(counts[0], name) == pytest.approx(getattr(counts[1], name), rel=0.005)
    assert narrowed(whole, 0.0) is whole


@pytest.mark.parametrize("name", NETWORKS)
def test_half_the_channels_of_every_network(name):
    factory, kwargs = NETWORKS[name]
    with torch.device("meta"):
        whole = open_model(factory(num_classes=10, **kwargs), input_size=SIZE).ledger()
    half = narrowed(whole, 0.5)
    whole, half = (tally("", ledger, RULES["official"]) for ledger in (whole, half))
    # A quarter of what lies between two layers, half of what the image and the classes hold on to.
    for total in ("storage", "mults", "adds", "macs", "ops"):
        assert 0.24 < getattr(half, total) / getattr(whole, total) < 0.4
    assert [line.name for line in half.lines] == [line.name for line in whole.lines]


@pytest.mark.parametrize(
    ("before", "change", "says"),
    [
        ({"weight_bits": 8}, {"ratio": 0.25}, "removed (ratio 0.25) after quantising to 8 bits: prune first"),
        ({"sparsity": 0.8}, {"sparsity": 0.5}, "sparsity 0.5 is asked where an earlier fit left 0.8"),
        ({}, {"sparsity": 1.5}, "sparsity must be a fraction in [0, 1), got 1.5"),
        ({}, {"act_bits": 64}, "act_bits must be a width from 1 to 32, got 64"),
    ],
)
def test_contradictions(before, change, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        follow(Expected(**before), Expected(**change))


def test_methods_of_one_fit_come_together():
    both = together([Expected(sparsity=0.5), Expected(weight_bits=4, act_bits=4, estimate=True)])
    assert both == Expected(sparsity=0.5, weight_bits=4, act_bits=4, estimate=True)
    with pytest.raises(ValueError, match=r"want another sparsity: 0\.5 and 0\.6"):
        together([Expected(sparsity=0.5), Expected(sparsity=0.6)])
    # What keeps an earlier fit's zeros and widths says so, and nothing is wrong with it.
    assert follow(both, Expected(sparsity=0.5, weight_bits=4)) == both
    # A fit masks the codes of one before it, and trains on with wider ones.
    assert follow(Expected(weight_bits=4, act_bits=4), Expected(sparsity=0.5)) == replace(both, estimate=False)
    assert follow(both, Expected(weight_bits=8, act_bits=6)) == replace(both, weight_bits=8, act_bits=6)
    assert together([]) == Expected()
