"""Edits of a network's structure: what they do, what they refuse, and that their logs make the same network again."""

import copy
import io
from functools import partial
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from counting import Run
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning import cut
from rich.console import Console
from torch import nn
from torch.nn.utils import prune

import micronet
import micronet.edits.factored as factored
import micronet.models as networks
from callbacks.low_rank import full_ranks
from callbacks.op_trace import count_ops, total_params
from callbacks.widths import narrow, widths
from micronet import Bundle, Fit, MicronetError, Recipe, RunOptions, load, run, save
from micronet.data import cifar10, digits
from micronet.edits import fold_bn, low_rank, replay, separable, swap_activation
from micronet.edits.gate import checked
from micronet.start import some_images

SIZE = (3, 32, 32)
SPLITS = ("spatial_svd", "tucker2")


@pytest.fixture(scope="module")
def trained():
    return load("tests/data/resnet20_cifar10.pth").model


@pytest.fixture
def small():
    torch.manual_seed(0)
    return networks.wide_resnet(**SMALL)


@pytest.fixture(scope="module")
def images(real):
    """Real ones, which chose nothing of the trained network."""
    return some_images(real(cifar10, valid=0.02), 32)


def macs(model, size=SIZE):
    return sum(line.macs for line in count_ops(model, size))


def classes(model, images):
    with torch.no_grad():
        return model(images).argmax(1)


EDITS = {
    "swap_activation": partial(swap_activation, old=nn.ReLU, new=nn.SiLU),
    "svd": partial(low_rank, method="svd", energy=0.7),
    "spatial_svd": partial(low_rank, method="spatial_svd", macs=0.4),
    "tucker2": partial(low_rank, method="tucker2", params=0.4),
    "separable": separable,
    "fold_bn": fold_bn,
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_gives_a_changed_copy_that_its_log_makes_again(name, trained, images):
    state, structure = {k: v.clone() for k, v in trained.state_dict().items()}, str(trained)
    edited = EDITS[name](trained, images=images)
    assert str(trained) == structure
    assert all(torch.equal(value, state[key]) for key, value in trained.state_dict().items())
    assert str(edited.model) != structure

    kept = int((classes(trained, images) == classes(edited.model, images)).sum())
    assert (edited.images, edited.kept) == (32, kept)
    said = "all" if kept == 32 else kept
    assert edited.summary.endswith(f"; {said} of 32 images keep their class")

    again = networks.resnet20(num_classes=10)
    replay(again, edited.log)
    assert str(again) == str(edited.model).replace("training=False", "training=True")
    again.load_state_dict(edited.model.state_dict())
    assert torch.equal(again.eval()(images), edited.model(images))


# Activations.
def test_every_place_of_an_activation_is_swapped():
    both = nn.ReLU(inplace=True)
    model = nn.Sequential(both, nn.Conv2d(3, 4, 1), both, nn.Sequential(nn.ReLU(), nn.ReLU6()))
    edited = swap_activation(model, nn.ReLU, nn.Hardswish)
    assert [type(m).__name__ for m in edited.model.modules()][1:] == [
        "Hardswish", "Conv2d", "Sequential", "Hardswish", "ReLU6"
    ]  # fmt: skip
    assert edited.model[0] is edited.model[2]
    assert (edited.model[0].inplace, edited.model[3][0].inplace) == (True, False)
    assert edited.summary == "2 of ReLU became Hardswish"


def test_activations_inside_timms_normalisations_are_swapped():
    model = timm.create_model("mobilenetv3_small_050", num_classes=10)
    edited = swap_activation(model, nn.Hardswish, nn.ReLU6, images=torch.randn(4, *SIZE))
    assert type(edited.model.bn1.act) is nn.ReLU6
    assert not any(isinstance(m, nn.Hardswish) for m in edited.model.modules())
    assert "stay" not in edited.summary


def test_functions_that_stay_are_named():
    class Own(nn.ReLU):
        pass

    model = Run(lambda s, x: F.relu(s.fc(s.own(s.act(x)).mean((2, 3)))), act=nn.ReLU(), own=Own(), fc=nn.Linear(3, 10))
    edited = swap_activation(model, nn.ReLU, nn.ReLU6, images=torch.randn(4, *SIZE))
    assert edited.summary.startswith("1 of ReLU became ReLU6; 2 stay, which are no such modules: own, relu; ")
    called = Run(lambda s, x: F.silu(s.fc(x.mean((2, 3)))), fc=nn.Linear(3, 10))
    with pytest.raises(MicronetError, match=r"has no SiLU module, only functions that can't be replaced \(silu\)"):
        swap_activation(called, nn.SiLU, nn.ReLU6, images=torch.randn(4, *SIZE))


@pytest.mark.parametrize("new", [nn.ReLU, nn.Conv2d])
def test_what_cannot_be_put_there_is_refused(new, trained):
    with pytest.raises(MicronetError, match="new must be another one of ReLU, "):
        swap_activation(trained, nn.ReLU, new)


# Ranks.
@pytest.mark.parametrize("method", SPLITS)
@pytest.mark.parametrize(("aim", "asked"), [("macs", 0.5), ("macs", 5_000_001), ("params", 0.5)])
def test_a_target_is_hit_within_a_unit_of_rank(aim, asked, method, small):
    count = macs if aim == "macs" else total_params
    edited = low_rank(small, method=method, **{aim: asked}, input_size=SIZE)
    limit = asked if asked > 1 else 0.5 * count(small)
    assert count(edited.model) <= limit
    before, after = (f"{n:,}" for n in (count(small), count(edited.model)))
    assert f"{before} -> {after} {'MACs' if aim == 'macs' else 'params'}" in edited.summary

    def with_one_more(name, axis):
        ranks = edited.log["layers"][name]
        more = [rank + (place == axis) for place, rank in enumerate(ranks)]
        other = copy.deepcopy(small)
        replay(other, edited.log | {"layers": edited.log["layers"] | {name: more}})
        return count(other)

    units = [
        (name, axis)
        for name, ranks in edited.log["layers"].items()
        for axis, full in enumerate(full_ranks(small.get_submodule(name).weight, method))
        if ranks[axis] < full
    ]
    assert any(with_one_more(*unit) > limit for unit in units)


def test_matrices_are_split_by_svd_and_what_gets_no_smaller_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 100)).eval()
    edited = low_rank(model, rank=40, images=torch.randn(4, 3, 8, 8))
    assert edited.log["layers"] == {"3": [40]}
    assert type(edited.model[0]) is nn.Conv2d
    assert edited.model[3][0].bias is None
    assert "; 1 stay: 0 (factors would not make it smaller)" in edited.summary
    assert f"-> {64 * 4 + 40 * 1124 + 100:,} params" in edited.summary


def test_a_layer_that_runs_twice_is_counted_twice():
    torch.manual_seed(0)
    model = nn.Sequential(same := nn.Conv2d(16, 16, 3, padding=1), nn.MaxPool2d(2), same).eval()
    edited = low_rank(model, method="tucker2", macs=0.5, input_size=(16, 8, 8))
    assert 0.45 < macs(edited.model, (16, 8, 8)) / macs(model, (16, 8, 8)) <= 0.5
    assert edited.model[0] is edited.model[2]


@pytest.mark.parametrize("method", SPLITS)
def test_at_full_rank_every_answer_stays(method, trained, images):
    layer = trained.layer2[0].conv1  # stride 2, 16 to 32 channels
    full = {"spatial_svd": 48, "tucker2": (16, 32)}[method]
    assert layer.weight.shape == (32, 16, 3, 3)
    edited = low_rank(trained, method=method, rank={"layer2.0.conv1": full}, images=images)
    assert edited.kept == 32
    assert total_params(edited.model) > total_params(trained)


def test_an_answer_that_changes_at_full_rank_is_refused(trained, images, monkeypatch):
    right = factored.split_weight
    monkeypatch.setattr(factored, "split_weight", lambda *a: tuple(1.001 * part for part in right(*a)))
    with pytest.raises(MicronetError, match=r"should not change what the network answers, and did .*relative error"):
        low_rank(trained, method="spatial_svd", rank={"conv1": 9}, images=images)
    low_rank(trained, method="spatial_svd", rank={"conv1": 8}, images=images)  # this may


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "give one of rank, energy, params, macs, got none"),
        ({"rank": 3, "energy": 0.5}, "got rank and energy"),
        ({"rank": 3, "method": "cp"}, "method must be one of svd, spatial_svd, tucker2"),
        ({"rank": 0}, "rank must be a whole number from 1"),
        ({"rank": True}, "rank must be a whole number from 1"),
        ({"rank": (3, 3), "method": "spatial_svd"}, "rank must be a whole number"),
        ({"energy": 1.5}, r"energy must be a fraction in \(0, 1\]"),
        (
            {"macs": 1.0, "input_size": SIZE},
            r"macs must be the share to remove, a fraction in \(0, 1\), or what may be left",
        ),
        ({"macs": 0.5}, "a target in MACs traces the network: give images, or input_size"),
        ({"params": 300_000}, "300,000 params may be left, and the network has 272,474"),
        ({"params": 0.99, "method": "tucker2"}, "2,724 of 272,474 params may be left, and more are: at rank 1"),
        ({"rank": {"fc": 3}, "layers": ["fc"]}, "leave layers out"),
        ({"rank": {"fc": 99}}, "low_rank: fc: ranks must be whole numbers from 1 to 10, got"),
        ({"rank": {"conv1": 3}}, "low_rank svd does not work on conv1: a k x k kernel"),
        ({"rank": 3, "layers": "fc"}, "layers must be a list of names"),
        ({"rank": 3, "layers": ["head"]}, "the network has no layer 'head'"),
        ({"rank": 30}, "nothing is split; "),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments, says, trained):
    with pytest.raises(MicronetError, match=says):
        low_rank(trained, **arguments)


# Layers that no edit can replace.
class Subclass(nn.Conv2d):
    """A convolution whose forward may be its own."""


def unsuited():
    tied, masked = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    other = nn.Conv2d(8, 8, 3, padding=1)
    other.weight = tied.weight
    prune.random_unstructured(masked, "weight", 0.5)
    return nn.Sequential(Subclass(8, 8, 3, padding=1), tied, other, masked, nn.Conv2d(8, 8, 3))


@pytest.mark.parametrize(
    "edit", [partial(low_rank, method="tucker2", rank=2), separable], ids=["low_rank", "separable"]
)
def test_layers_that_are_more_than_their_weights_stay_and_are_named(edit):
    model = unsuited()
    prune.remove(model[3], "weight")
    with torch.no_grad():
        edited = edit(model)
    assert isinstance(edited.model[4], nn.Sequential)
    assert "Subclass, whose forward may be its own" in edited.summary
    assert "1, 2 (its weights are another layer's, too)" in edited.summary
    for name in "01":
        with pytest.raises(MicronetError, match=f"does not work on {name}: it"):
            edit(model, **({"layers": [name]}))


def test_weights_that_are_calculated_stay():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    prune.random_unstructured(model[0], "weight", 0.5)
    with pytest.raises(MicronetError, match="0: its weights are calculated from others"):
        separable(model, layers=["0"])


def test_a_forward_that_reads_a_layers_weights_is_refused():
    model = Run(lambda s, x: F.conv2d(x, s.conv.weight).mean((2, 3)), conv=nn.Conv2d(3, 8, 3))
    with pytest.raises(MicronetError, match=r"low_rank: .*has no attribute 'weight'"):
        low_rank(model, method="tucker2", rank={"conv": (3, 4)}, images=torch.randn(2, 3, 8, 8))


def test_a_forward_that_does_not_run_what_it_registers_is_refused():
    model = Run(lambda s, x: s.kept[0](x).mean((2, 3)), conv=nn.Conv2d(3, 8, 3))
    model.kept = [model.conv]  # in a list of its own
    with pytest.raises(MicronetError, match="does not run the layers that it has"):
        low_rank(model, method="tucker2", rank={"conv": (2, 4)}, input_size=(3, 8, 8))


def test_a_network_of_one_module_has_no_part_to_replace():
    for edit in (
        partial(low_rank, rank=2),
        partial(low_rank, rank={"": 2}),
        partial(swap_activation, old=nn.Linear, new=nn.ReLU),
    ):
        with pytest.raises(MicronetError, match=r"a part can be replaced, not the whole|has no Linear module"):
            edit(nn.Linear(8, 8))


# Depthwise and pointwise.
def test_separable_leaves_the_stem_unless_it_is_named(trained, images):
    edited = separable(trained, images=images)
    assert len(edited.log["layers"]) == 18
    assert type(edited.model.conv1) is nn.Conv2d
    assert "conv1 (3 input channels would leave as many spatial kernels)" in edited.summary
    assert edited.model.layer2[0].conv1[0].stride == (2, 2)
    stem = separable(trained, layers=["conv1"], images=images)
    assert [part.groups for part in stem.model.conv1] == [3, 1]
    assert stem.kept > edited.kept


def test_a_network_in_training_stays_so(small):
    for edit in EDITS.values():
        edited = edit(small.train(), **({} if edit in (separable, EDITS["swap_activation"]) else {"input_size": SIZE}))
        assert all(module.training for module in edited.model.modules())


# Gates.
def test_a_log_that_makes_another_network_is_refused(trained, images):
    changed = copy.deepcopy(trained)
    for step, says in (
        (lambda m, log: setattr(m, "conv1", nn.Conv2d(3, 16, 5)), "its log gives another network"),
        (lambda m, log: setattr(m, "relu", nn.SiLU()), "replayed from its log, the network answers otherwise"),
    ):
        with pytest.raises(MicronetError, match=says):
            checked(trained, changed, {"edit": "x"}, step, "", images, same=False)


HOSTILE = {
    "ranks without end": {"edit": "low_rank", "method": "tucker2", "layers": {"conv1": [10**12, 10**12]}},
    "one rank too many": {"edit": "low_rank", "method": "tucker2", "layers": {"conv1": [2, 3, 4]}},
    "negative": {"edit": "low_rank", "method": "spatial_svd", "layers": {"conv1": [-1]}},
    "no numbers": {"edit": "low_rank", "method": "spatial_svd", "layers": {"conv1": ["9"]}},
    "no list": {"edit": "low_rank", "method": "spatial_svd", "layers": {"conv1": 9}},
    "nowhere": {"edit": "low_rank", "method": "svd", "layers": {"nowhere": [3]}},
    "no layer": {"edit": "low_rank", "method": "svd", "layers": {"layer1": [3]}},
    "the network": {"edit": "low_rank", "method": "svd", "layers": {"": [3]}},
    "no method": {"edit": "low_rank", "layers": {"fc": [3]}},
    "another method": {"edit": "low_rank", "method": ["svd"], "layers": {"fc": [3]}},
    "layers missing": {"edit": "separable"},
    "layers a text": {"edit": "separable", "layers": "conv1"},
    "names no text": {"edit": "separable", "layers": [3, None]},
    "a linear layer": {"edit": "separable", "layers": ["fc"]},
    "twice": {"edit": "separable", "layers": ["conv1", "conv1"]},
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_hostile_log_is_refused(case, device):
    with torch.device(device):
        model = networks.resnet20(num_classes=10)
    with pytest.raises(MicronetError, match="does not fit its network"):
        replay(model, HOSTILE[case])


def test_replaying_decomposes_nothing_and_draws_nothing(trained, monkeypatch):
    logs = [low_rank(trained, method="tucker2", rank=4).log, separable(trained, layers=["conv1"]).log]

    def never(*args, **kwargs):
        raise AssertionError("a decomposition")

    monkeypatch.setattr(torch, "linalg", SimpleNamespace(svd=never, eigh=never, eigvalsh=never))
    with torch.device("meta"):
        model = networks.resnet20(num_classes=10)
    logs[0]["layers"].pop("conv1")
    state = torch.random.get_rng_state()
    for log in logs:
        replay(model, log)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.is_meta for parameter in model.parameters())


# Compositions.
def thin(model, between, kept):
    """Keep some of the channels between layers, by hand: of `between`, the first gives them and the last takes them."""
    table, places, chosen = {}, {}, torch.tensor(kept)
    for name in between:
        module, now = model.get_submodule(name), dict(widths(model)[name])
        if "num_features" in now or now["groups"] > 1:
            axis, keys = 0, list(now)
        else:
            axis = 1 if name == between[-1] else 0
            keys = ["in_channels"] if axis else ["out_channels"]
        table[name] = now | dict.fromkeys(keys, len(kept))
        for key, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.dim() > axis:  # a bias has no inputs
                index = torch.arange(value.numel()).reshape(value.shape)
                places[f"{name}.{key}"] = index.index_select(axis, chosen)
    narrow(model, places, table)


RESNET20 = {"factory": "micronet.models.resnet:resnet20", "kwargs": {"num_classes": 10}}
SMALL = {"num_classes": 10, "depth": 10, "width": 1}


def bundle_of(model, edits=(), **built):
    return Bundle(
        model=model, **(built or RESNET20), classes=tuple("abcdefghij"),
        input_size=SIZE, mean=(0.5,) * 3, std=(0.2,) * 3, edits=list(edits),
    )  # fmt: skip


COMPOSED = {
    # The edit; what lies between the two convolutions of a block afterwards; what lies inside what the edit made.
    "spatial_svd": (
        partial(low_rank, method="spatial_svd", rank=6),
        ("layer1.0.conv1.1", "layer1.0.bn1", "layer1.0.conv2.0"),
        ("layer1.0.conv1.0", "layer1.0.conv1.1"),
    ),
    "tucker2": (
        partial(low_rank, method="tucker2", rank=(5, 6)),
        ("layer1.0.conv1.2", "layer1.0.bn1", "layer1.0.conv2.0"),
        ("layer1.0.conv1.1", "layer1.0.conv1.2"),
    ),
    "separable": (
        separable,
        ("layer1.0.conv1.1", "layer1.0.bn1", "layer1.0.conv2.0", "layer1.0.conv2.1"),
        None,
    ),
    "fold_bn": (fold_bn, ("layer1.0.conv1", "layer1.0.conv2"), None),
    "swap_activation": (
        partial(swap_activation, old=nn.ReLU, new=nn.ReLU6),
        ("layer1.0.conv1", "layer1.0.bn1", "layer1.0.conv2"),
        None,
    ),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_pruned_edited_and_pruned_again_a_network_saves_and_loads(name, trained, images, tmp_path):
    edit, between, inside = COMPOSED[name]
    model = copy.deepcopy(trained)
    thin(model, ("layer1.0.conv1", "layer1.0.bn1", "layer1.0.conv2"), [0, 2, 3, 5, 7, 8, 11, 12, 13, 14])
    edited = edit(model, images=images)
    thin(edited.model, between, [0, 1, 4, 6, 8, 9])
    if inside is not None:
        thin(edited.model, inside, [0, 1, 3, 4])
    save(bundle_of(edited.model, [edited.log]), tmp_path / "model.pth")
    again = load(tmp_path / "model.pth")
    assert torch.equal(again.model(images), edited.model(images))
    assert again.edits == [edited.log]
    assert total_params(again.model) == total_params(edited.model)


IDLE = ("there is no", "has no", "no BatchNorm folds", "nothing is split", "may be left")


def in_any_order(steps, folder):
    """Prune and edit a small network; what its file gives answers alike. Gives what was done."""
    torch.manual_seed(0)
    model, edits, done, images = networks.wide_resnet(**SMALL).eval(), [], [], torch.randn(4, *SIZE)
    for step in steps:
        try:
            if step == "prune":
                cut(model, size=32, ratio=0.2)
            else:
                edited = EDITS[step](model, images=images)
                model, edits = edited.model, [*edits, edited.log]
            done.append(step)
        except (MicronetError, ValueError) as error:  # nothing is left for it to do
            if not any(words in str(error) for words in IDLE):
                raise
    built = {"factory": "micronet.models.wide_resnet:wide_resnet", "kwargs": SMALL}
    save(bundle_of(model, edits, **built), folder / "model.pth")
    assert torch.equal(load(folder / "model.pth").model(images), model(images))
    return done


def test_pruned_and_edited_several_times_a_network_saves_and_loads(tmp_path):
    steps = ["swap_activation", "spatial_svd", "prune", "separable", "fold_bn", "svd", "prune"]
    assert in_any_order(steps, tmp_path) == steps


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["prune", *EDITS]), min_size=1, max_size=6))
def test_in_any_order_a_network_saves_and_loads(tmp_path_factory, steps):
    in_any_order(steps, tmp_path_factory.mktemp("any"))


@pytest.fixture
def masked(trained, tmp_path):
    """The file of a network in one layer of which every second weight is masked."""
    model, mask = copy.deepcopy(trained), torch.arange(16 * 16 * 9).reshape(16, 16, 3, 3) % 2 == 0
    with torch.no_grad():
        model.layer1[0].conv1.weight.masked_fill_(~mask, 0)
    data = digits()
    bundle = bundle_of(model)
    bundle.classes, bundle.mean, bundle.std = data.classes, data.mean, data.std
    bundle.masks = {"layer1.0.conv1.weight": mask}
    save(bundle, tmp_path / "masked.pth")
    return tmp_path / "masked.pth"


@pytest.mark.parametrize(
    "edit", [separable, partial(low_rank, method="tucker2", rank=4)], ids=["separable", "low_rank"]
)
def test_zeros_are_not_lost_with_their_layer(edit, masked, tmp_path):
    recipe = Recipe(partial(digits, batch_size=32), masked, (Fit("edit", epochs=0, edit=(edit,)),))
    with pytest.raises(MicronetError, match=r"would lose the zeros of layer1\.0\.conv1\.weight"):
        run(recipe, tmp_path / "r", RunOptions(limit=40))
    assert not list((tmp_path / "r").glob("1-*"))


def test_zeros_stay_where_the_layer_does(masked, tmp_path):
    out = io.StringIO()
    edits = (fold_bn, partial(low_rank, method="tucker2", macs=0.05, layers=["layer3.1.conv1", "layer3.2.conv1"]))
    recipe = Recipe(partial(digits, batch_size=32), masked, (Fit("edit", epochs=1, edit=edits),))
    last = run(recipe, tmp_path / "r", RunOptions(limit=40), console=Console(file=out, width=400))
    mask = last.masks["layer1.0.conv1.weight"]
    assert int(mask.sum()) == mask.numel() // 2
    assert not last.model.layer1[0].conv1.weight[~mask].any()
    assert "fold_bn: 21 of 21 BatchNorms folded; all of 40 images keep their class" in out.getvalue()
    assert "low_rank: 2 of 2 layers split by tucker2, " in out.getvalue()
    assert micronet.score(tmp_path / "r" / "model.pth").ledger.params == total_params(last.model)
