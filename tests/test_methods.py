"""The table of methods and kinds of layers: what it says is what the methods do, and what the README shows."""

import copy
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from pruning import fit, learner
from torch import nn

from callbacks.dependency import find_groups
from callbacks.fake_quantize import Quantised
from callbacks.importance import ranked_by
from callbacks.methods import KINDS, NOTES, TABLE, Verdict, as_markdown, by_reason, chosen, layer_kind, verdict
from callbacks.prune import PruneChannels
from callbacks.quant_aware import QuantAware
from callbacks.sparsify import Sparsify
from micronet import MicronetError
from micronet.edits import fold_bn, low_rank, separable

SIZE = (3, 8, 8)
LAYERS = {
    "conv": lambda: nn.Conv2d(8, 16, 3, padding=1),
    "conv1x1": lambda: nn.Conv2d(8, 16, 1),
    "grouped": lambda: nn.Conv2d(8, 16, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "transposed": lambda: nn.ConvTranspose2d(8, 16, 3, padding=1),
    "linear": lambda: nn.Linear(8, 16),
    "norm": lambda: nn.BatchNorm2d(8),
    "attention": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
}


class Around(nn.Module):
    """A small network around a layer; BatchNorm follows every convolution."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.probe = kind, LAYERS[kind]()
        self.stem, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        wide = 16 if (hasattr(self.probe, "weight") and self.probe.weight.shape[0] == 16) or kind == "transposed" else 8
        self.norm2 = nn.BatchNorm1d(wide) if kind == "linear" else nn.BatchNorm2d(wide)
        self.hidden, self.fc = nn.Linear(wide, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        if self.kind == "norm":
            x = self.norm2(torch.relu(self.probe(x)))
        elif self.kind == "linear":
            x = self.norm2(self.probe(torch.relu(self.norm1(x)).mean((2, 3))))
        elif self.kind == "attention":
            x = torch.relu(self.norm1(x)).flatten(2).transpose(1, 2)
            x = self.probe(x, x, x, need_weights=False)[0].transpose(1, 2).unflatten(2, (8, 8))
        else:
            x = self.norm2(self.probe(torch.relu(self.norm1(x))))
        return self.fc(torch.relu(self.hidden(x.mean((2, 3)) if x.dim() == 4 else x)))


def around(kind):
    torch.manual_seed(0)
    model = Around(kind)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return model


def by_sparsify(granularity, model):
    cb = Sparsify(0.5, granularity=granularity, scope="local")
    fit(learner(model), 0, cb)
    return "probe.weight" in cb.masks, cb.summary


def by_prune(model, importance="l1"):
    before = [value.shape for value in model.probe.parameters()]
    cb = PruneChannels(ratio=0.5, importance=importance)
    fit(learner(model), 0, cb)
    return [value.shape for value in model.probe.parameters()] != before, cb.summary


def by_fpgm(model):
    """All layers of a group lose its channels; the question is whose filters judge them."""
    if layer_kind(model.probe) == "norm":  # it has none
        return by_prune(model, "fpgm")
    groups, _ = find_groups(model, SIZE)
    judges = {member.layer for group in groups for member in ranked_by(model, group, "fpgm")}
    return "probe" in judges, "the filters of probe are not looked at"


def by_edit(edit, model):
    edited = edit(model)
    return type(edited.model.get_submodule("probe")) is not type(model.probe), edited.summary


def by_fold(model):
    weight = getattr(model.probe, "weight", getattr(model.probe, "in_proj_weight", None))
    edited = fold_bn(model, images=torch.randn(4, *SIZE))
    after = edited.model.probe
    now = getattr(after, "weight", getattr(after, "in_proj_weight", None))
    return now is None or not torch.equal(
        now, weight
    ), f"{edited.summary} probe"  # a layer without BatchNorm is no news


def by_quantise(model):
    cb = QuantAware(images=8, norm_images=0)
    fit(learner(model), 0, cb)
    return isinstance(model.probe, Quantised), cb.summary


METHODS = {
    **{f"sparsify {g}": partial(by_sparsify, g) for g in ("weight", "kernel", "filter", "2:4", "block")},
    "prune": by_prune,
    "prune fpgm": by_fpgm,
    "low_rank svd": partial(by_edit, partial(low_rank, method="svd", rank=2)),
    "low_rank spatial_svd": partial(by_edit, partial(low_rank, method="spatial_svd", rank=2)),
    "low_rank tucker2": partial(by_edit, partial(low_rank, method="tucker2", rank=2)),
    "separable": partial(by_edit, partial(separable)),
    "fold_bn": by_fold,
    "quantise": by_quantise,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", TABLE)
def test_a_method_does_to_a_layer_what_the_table_says(method, kind):
    model = around(kind)
    state = copy.deepcopy(model.state_dict())
    said = TABLE[method][kind]
    assert verdict(method, model.probe) == said
    if said.word == "refuses" or (said.word == "skips" and method == "separable"):  # here, it has nothing else to take
        told = "there is no layer that it applies to" if kind == "norm" else re.escape(said.reason)
        with pytest.raises((ValueError, MicronetError), match=told):
            METHODS[method](model)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        return
    applied, summary = METHODS[method](model)
    assert applied == bool(said)
    if not said and kind != "norm":  # which has no weights that anyone would look for
        assert "probe" in summary


NAMED = {
    "sparsify": lambda method, model: fit(
        learner(model), 0, Sparsify({"probe": 0.5}, granularity=method.split()[1], scope="local")
    ),
    "low_rank": lambda method, model: low_rank(model, method=method.split()[1], rank={"probe": 2}),
    "separable": lambda method, model: separable(model, layers=["probe"]),
    "quantise": lambda method, model: fit(learner(model), 0, QuantAware(layers=["probe"])),
}
REFUSED = [
    (method, kind)
    for method, answers in TABLE.items()
    for kind, answer in answers.items()
    if method.split()[0] in NAMED and not answer
]


@pytest.mark.parametrize(("method", "kind"), REFUSED)
def test_a_layer_that_is_named_and_would_be_skipped_is_refused(method, kind):
    model = around(kind)
    with pytest.raises((ValueError, MicronetError), match="does not work on probe: "):
        NAMED[method.split()[0]](method, model)


def test_the_table_is_whole():
    assert set(TABLE) == set(METHODS)
    assert all(list(answers) == list(KINDS) for answers in TABLE.values())
    assert {kind: layer_kind(make()) for kind, make in LAYERS.items()} == {kind: kind for kind in KINDS}
    assert all(bool(answer) == (not answer.reason) for answers in TABLE.values() for answer in answers.values())
    assert {note for note in NOTES if note not in TABLE} == {"low_rank"}  # of all three of its rows
    assert layer_kind(nn.ReLU()) is None
    assert layer_kind(nn.Conv2d(1, 8, 3)) == "conv"  # one group of one channel is no depthwise convolution
    with pytest.raises(ValueError, match="method must be one of sparsify weight, "):
        verdict("sparsify", nn.ReLU())


@pytest.mark.parametrize(
    ("method", "layer", "reason"),
    [
        ("sparsify 2:4", nn.Conv2d(3, 16, 3), "its 3 input channels are not divisible by 4"),
        ("sparsify 2:4", nn.Conv2d(8, 16, 3, groups=4), "its 2 input channels of a group are not divisible by 4"),
        ("sparsify block", nn.Linear(8, 10), "its 10 output channels are not divisible by 4"),
        ("fold_bn", nn.GroupNorm(2, 8), "its statistics are each image's own"),
        ("fold_bn", nn.BatchNorm2d(8, track_running_stats=False), "its statistics are each image's own"),
    ],
)
def test_what_depends_on_more_than_the_kind(method, layer, reason):
    answer = verdict(method, layer)
    assert answer.word == "skips"
    assert answer.reason.startswith(reason)


def test_layers_are_chosen_or_named_with_a_reason():
    model = around("depthwise")
    layers, skipped = chosen("low_rank tucker2", model)
    assert list(layers) == ["stem"]
    assert [line.partition(": ")[0] for line in skipped] == ["probe", "hidden", "fc"]
    assert list(chosen("low_rank svd", model, ["fc"])[0]) == ["fc"]
    for named, says in ((["head"], "no layer 'head'"), (["probe"], "does not work on probe")):
        with pytest.raises(ValueError, match=says):
            chosen("low_rank svd", model, named)
    with pytest.raises(ValueError, match="there is no layer that it applies to"):
        chosen("separable", nn.Sequential(nn.Linear(3, 3)))


def test_skipped_layers_are_told_by_their_reason():
    lines = ["a: too thin", "b: too thin", "c.d: odd: very", "e: too thin"]
    assert by_reason(lines) == "a, b, e (too thin); c.d (odd: very)"
    assert by_reason(lines, 2) == "a, b and 1 more (too thin); c.d (odd: very)"
    assert by_reason([": too thin"]) == "the network (too thin)"


def test_the_readme_shows_the_table():
    shown = as_markdown()
    assert shown in (Path(__file__).parents[1] / "README.md").read_text(), "put as_markdown()'s text into README.md"
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(TABLE)
    assert all(row.count("|") == len(KINDS) + 2 for row in rows)
    reasons = {answer.reason for answers in TABLE.values() for answer in answers.values()} - {""}
    assert all(reason in shown for reason in reasons)
    assert not Verdict("skips", "x")
