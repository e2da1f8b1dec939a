"""Which channels go together: sums, gates, groups, stacks and heads; what can't be followed is left alone."""

import warnings
from functools import partial

import pytest
import torch
from pruning import CLASSES, count, coupled, cut, prune
from torch import nn

from callbacks.channels import removal, whole
from callbacks.dependency import find_groups
from callbacks.fake_quantize import quantise_layer
from callbacks.prune_plan import Choice, Plan
from callbacks.widths import narrow, widths
from micronet.edits import fold_bn, low_rank, separable
from micronet.models import resnet20

SIZE = (3, 8, 8)


def half_of_every_group(model):
    groups, _ = find_groups(model, SIZE)
    generator = torch.Generator().manual_seed(3)
    return groups, {g.name: torch.randperm(g.channels, generator=generator) >= g.channels // 2 for g in groups}


def silence(model, groups, after):
    """Set to zero all that makes the channels that are to go, as training with decay would."""
    tensors = dict(model.named_parameters())
    for group in groups:
        for member in group.members:
            layer = model.get_submodule(member.layer)
            if member.axis == "out":
                for key in ("weight", "bias"):
                    if (value := tensors.get(f"{member.layer}.{key}")) is not None:
                        places = member.places[~after[group.name]].flatten()
                        if getattr(layer, "groups", 1) == 1 or value.dim() == 1 or value.shape[0] == member.size:
                            value.data[places] = 0


@pytest.mark.parametrize("make", [coupled, partial(resnet20, num_classes=CLASSES)], ids=["coupled", "resnet20"])
def test_channels_that_are_zero_are_the_ones_that_go_and_no_answer_changes(make):
    model = make().eval()
    groups, after = half_of_every_group(model)
    silence(model, groups, after)
    x = torch.randn(16, *SIZE)
    with torch.no_grad():
        before = model(x)
    parameters = count(model)
    prune(model, ratio=0.5)
    assert count(model) < 0.5 * parameters
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), before, rtol=0, atol=1e-5)


def test_every_coupling_is_followed():
    groups, skipped = find_groups(coupled(), SIZE)
    assert skipped == []
    found = {group.name: (group.channels, group.size, set(group.makers)) for group in groups}
    assert found == {
        "stem.0": (8, 1, {"stem.0", "stem.1", "two.0", "two.1", "depthwise.0", "depthwise.1"}),
        "one.0": (10, 1, {"one.0", "one.1"}),
        "pointwise.0": (4, 3, {"pointwise.0", "pointwise.1", "pointwise.2", "excite"}),  # the same place in each group
        "squeeze": (4, 1, {"squeeze"}),
        "grouped.0": (6, 3, {"grouped.0", "grouped.1", "mix.0"}),
        "branch": (6, 1, {"branch", "mix.0"}),
        "mix.2": (10, 1, {"mix.2"}),
        "hidden": (16, 1, {"hidden"}),
    }
    reads = {g.name: [tuple(m.places.shape) for m in g.members if m.axis == "in"] for g in groups}
    assert reads["mix.2"] == [(10, 4)]  # 2 x 2 flattened pixels of each channel


class Shuffled(nn.Module):
    """Mixes channels between groups, as ShuffleNet does; the first layer's can't be followed."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, CLASSES)

    def forward(self, x):
        x = self.first(x)
        n, c, h, w = x.shape
        x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(torch.relu(self.second(x)).mean((2, 3)))


class Tied(nn.Module):
    """Three layers whose channels depend on what no layer has: a buffer, a parameter, the image."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)
        self.d, self.fc = nn.Conv2d(3, 6, 1), nn.Linear(6, CLASSES)
        self.register_buffer("scale", torch.rand(8, 1, 1))
        self.gain = nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x):
        y = self.c(self.gain * self.b(self.scale * self.a(x)))
        return self.fc(self.d(x + y).relu().mean((2, 3)))


class Normed(nn.Module):
    """A layer of a kind that can't be made narrower."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.fc = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.fc(torch.relu(self.b(self.norm(self.a(x.mean((2, 3)))))))


@pytest.mark.parametrize(
    ("make", "left", "says"),
    [
        (Shuffled, {"second"}, ["first: "]),
        (Tied, {"d"}, ["a: its channels reach further", "b: a parameter", "c: its channels reach further"]),
        (Normed, {"b"}, ["a: norm is a LayerNorm, which can't be made narrower"]),
    ],
)
def test_what_cannot_be_followed_is_left_alone_and_named(make, left, says):
    model = make()
    groups, skipped = find_groups(model, SIZE)
    assert {group.name for group in groups} == left
    assert len(skipped) == len(says)
    for reason in says:
        assert any(line.startswith(reason) for line in skipped), skipped
    cb = prune(model, ratio=0.5)
    told = cb.summary.partition("; skipped ")[2]
    assert all(reason.partition(": ")[2] in told for reason in says)
    assert model(torch.randn(2, *SIZE)).shape == (2, CLASSES)


def test_channels_go_before_bits():
    model = resnet20(num_classes=10)
    quantise_layer(model.get_submodule("conv1"), 4, 4, True)
    with pytest.raises(ValueError, match="its layers are quantised: channels go first"):
        find_groups(model, (3, 32, 32))


def test_a_network_that_torch_pruning_fails_on_or_never_leaves_is_refused_in_time():
    torchvision = pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match="the channels of ShuffleNetV2 can't be followed"):
        find_groups(torchvision.models.shufflenet_v2_x0_5(weights=None), (3, 32, 32))
    with pytest.raises(ValueError, match="does not work on 1: its heads tie channels together"):
        find_groups(nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2)), (8, 8))


class Gated(nn.Module):
    """A convolution along the channels: Torch-Pruning maps each of them onto ever more places."""

    def __init__(self):
        super().__init__()
        self.a, self.gate, self.b = nn.Conv2d(3, 32, 1), nn.Conv1d(1, 1, 3, padding=1), nn.Conv2d(32, 6, 1)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = self.a(x)
        gate = self.gate(x.mean((2, 3)).view(len(x), 1, -1)).view(len(x), -1, 1, 1)
        return self.fc(self.b(x * gate.expand_as(x)).relu().mean((2, 3)))


def test_channels_gated_by_their_neighbours_are_left_alone():
    groups, skipped = find_groups(Gated(), SIZE)
    assert [group.name for group in groups] == ["b"]
    assert skipped[0].startswith("a: they are tied together")


class Heads(nn.Module):
    """Two answers, of which one is given in training only; each through something else than a linear layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.head, self.aux = nn.Conv2d(8, CLASSES, 1), nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.a(x).relu()
        answer = self.head(self.b(x).relu()).relu().mean((2, 3))
        return (answer, self.aux(x.mean((2, 3)))) if self.training else answer


def test_no_head_loses_an_answer_and_one_of_training_alone_is_cut_along():
    model = Heads()
    groups, _ = find_groups(model, SIZE)
    assert {group.name for group in groups} == {"a", "b"}
    prune(model, ratio=0.5)
    answer, aux = model.train()(torch.randn(2, *SIZE))
    assert answer.shape == aux.shape == (2, CLASSES)
    assert model.aux.in_features == 4


def test_frozen_layers_are_pruned_like_any_other():
    model, free = coupled(), coupled()
    for p in model.parameters():
        p.requires_grad_(False)
    find_groups(model, SIZE)
    assert not any(p.requires_grad for p in model.parameters())
    for m in (model, free):
        groups, after = half_of_every_group(m)
        gone = removal(m, groups, whole(groups), after)
        narrow(m, gone.kept, gone.table)
    assert widths(model) == widths(free)
    assert count(model) < count(coupled()) / 2


def test_the_network_is_left_alone_until_something_is_removed(capfd):
    model = coupled().train()
    model.stem.register_forward_hook(lambda *_: pytest.fail("the network itself was run"))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Plan(model, SIZE, Choice(macs=0.3))
    assert model.training
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "edit",
    [partial(low_rank, method="spatial_svd", energy=0.8), partial(low_rank, method="tucker2", energy=0.8)]
    + [separable, fold_bn],
    ids=["spatial_svd", "tucker2", "separable", "fold_bn"],
)
def test_edited_networks_are_pruned_by_what_flows_through_them(edit):
    images = torch.randn(8, *SIZE)
    model = edit(resnet20(num_classes=CLASSES), images=images).model
    groups, skipped = find_groups(model, SIZE)
    assert skipped == []
    whole_network = resnet20(num_classes=CLASSES)
    convs, were = (sum(isinstance(m, nn.Conv2d) for m in net.modules()) for net in (model, whole_network))
    # Between two factors is a group of channels of its own; a depthwise convolution makes none.
    assert len(groups) == len(find_groups(whole_network, SIZE)[0]) + (0 if edit is separable else convs - were)
    before = count(model)
    cut(model, params=0.5)
    assert count(model) <= before / 2
    assert model.eval()(images).shape == (8, CLASSES)
