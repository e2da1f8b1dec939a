"""A recipe that begins with a file, and edits before a fit: structure, masks and history go along."""

import io
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import micronet.models as networks
from micronet import Fit, MicronetError, Recipe, RunOptions, load, run, save
from micronet.data import digits
from micronet.edits import replay, swap_activation
from micronet.folder import read_rows
from micronet.recipe import describe

LIMIT = RunOptions(limit=40)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The file of a network trained for an epoch, half of one layer masked."""
    folder = tmp_path_factory.mktemp("made")
    bundle = run(Recipe(partial(digits, batch_size=32), networks.resnet20, (Fit("train", epochs=1),)), folder, LIMIT)
    mask = torch.arange(16 * 16 * 9).reshape(16, 16, 3, 3) % 2 == 0
    with torch.no_grad():
        bundle.model.layer1[0].conv1.weight.masked_fill_(~mask, 0)
    save(replace(bundle, masks={"layer1.0.conv1.weight": mask}), folder / "start.pth")
    return folder / "start.pth"


def going_on(start: Path, *stages: Fit, data=digits) -> Recipe:
    return Recipe(data=partial(data, batch_size=32), model=start, stages=stages)


def test_a_run_goes_on_with_a_files_network_masks_and_history(made, tmp_path):
    stages = (Fit("base", epochs=0), Fit("more", epochs=1, lr=0.05, wd=0.1, ema=0.9))
    last = run(going_on(made, *stages), tmp_path / "r", LIMIT)
    begun = load(made)
    base = load(tmp_path / "r" / "1-base" / "model.pth")
    assert all(torch.equal(v, base.model.state_dict()[k]) for k, v in begun.model.state_dict().items())
    weight, mask = last.model.layer1[0].conv1.weight, last.masks["layer1.0.conv1.weight"]
    assert torch.equal(mask, begun.masks["layer1.0.conv1.weight"])
    assert not weight[~mask].any()
    assert not torch.equal(weight, begun.model.layer1[0].conv1.weight)
    assert [row["stage"] for row in last.history] == ["train", "base", "more"]
    assert "file_bytes" in last.history[1]
    rows = read_rows(tmp_path / "r")
    assert rows[1]["storage"] < rows[1]["params"]  # half a layer is a bit for each weight


def test_an_edit_is_replayed_from_the_log(made, tmp_path):
    out = io.StringIO()
    swap = partial(swap_activation, old=nn.ReLU, new=nn.ReLU6)
    stages = (Fit("six", epochs=1, edit=(swap,)), Fit("more", epochs=1))
    last = run(going_on(made, *stages), tmp_path / "r", LIMIT, console=Console(file=out, width=200))
    assert [entry["edit"] for entry in last.edits] == ["swap_activation"]
    again = load(tmp_path / "r" / "model.pth")
    kinds = {type(module) for module in again.model.modules()}
    assert nn.ReLU6 in kinds
    assert nn.ReLU not in kinds
    assert "swap_activation: 19 of ReLU became ReLU6" in out.getvalue()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.model(x), last.model(x))


def test_an_edit_that_finds_nothing_to_change_ends_the_run_before_it_writes(made, tmp_path):
    swap = partial(swap_activation, old=nn.SiLU, new=nn.ReLU6)
    with pytest.raises(MicronetError, match="swap_activation: the network has no SiLU module"):
        run(going_on(made, Fit("six", epochs=1, edit=(swap,))), tmp_path / "r", LIMIT)
    assert not list((tmp_path / "r").glob("1-*"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"classes": tuple("jihgfedcba")}, r"its classes \(j, i, h, g, ... 10 in all\) are not those of digits"),
        ({"mean": (0.1, 0.2, 0.3)}, "normalises images with mean"),
    ],
)
def test_a_network_of_other_classes_or_inputs_is_refused(change, says, made, tmp_path):
    save(replace(load(made), **change), tmp_path / "other.pth")
    with pytest.raises(MicronetError, match=says):
        run(going_on(tmp_path / "other.pth", Fit("more", epochs=1)), tmp_path / "r", LIMIT)


def test_a_file_to_begin_with_is_known_by_what_it_holds(made, tmp_path):
    (tmp_path / "moved.pth").write_bytes(made.read_bytes())
    one, same = (describe(going_on(path, Fit("more", epochs=1)))["model"] for path in (made, tmp_path / "moved.pth"))
    assert one["sha256"] == same["sha256"]
    save(replace(load(made), masks={}), tmp_path / "moved.pth")
    assert describe(tmp_path / "moved.pth")["sha256"] != one["sha256"]
    assert "/" not in one["file"]


@pytest.mark.parametrize(
    "entry",
    [
        {"edit": "os.system", "layers": {}},
        {"layers": {}},
        {"edit": "swap_activation", "layers": {"nowhere": "ReLU6"}},
        {"edit": "swap_activation", "layers": {"relu": "Module"}},
        {"edit": "swap_activation", "layers": 3},
        {"edit": ["swap_activation"], "layers": {}},
    ],
)
def test_a_log_that_does_not_fit_is_refused(entry, made, tmp_path):
    with pytest.raises(MicronetError):
        replay(networks.resnet20(num_classes=10), entry)
    content = torch.load(made, weights_only=True)
    torch.save({**content, "edits": [entry]}, tmp_path / "bad.pth")
    with pytest.raises(MicronetError, match=r"bad\.pth: "):
        load(tmp_path / "bad.pth")


def test_a_network_whose_answers_no_file_holds_is_not_kept(tmp_path):
    recipe = Recipe(partial(digits, batch_size=32), Hooked, (Fit("train", epochs=0),))
    with pytest.raises(MicronetError, match="answers otherwise than the one that was trained"):
        run(recipe, tmp_path / "r", LIMIT)
    assert not (tmp_path / "r" / "1-train" / "model.pth").exists()


class Hooked(nn.Module):
    """Answers by a number that is no part of its state."""

    built = 0

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        type(self).built += 1
        self.factor, self.fc = type(self).built, nn.Linear(3, num_classes)

    def forward(self, x):
        return self.factor * self.fc(x.mean((2, 3)))


def test_masks_take_a_bit_each_in_the_file(made, tmp_path):
    content = torch.load(made, weights_only=True)
    bits = content["masks"]["layer1.0.conv1.weight"]
    assert bits.dtype is torch.uint8
    assert bits.shape == (16 * 16 * 9 // 8,)
    for wrong in (bits[:-1], bits.bool(), bits.repeat(2)):
        torch.save({**content, "masks": {"layer1.0.conv1.weight": wrong}}, tmp_path / "wrong.pth")
        with pytest.raises(MicronetError, match=r"the mask of layer1.0.conv1.weight is not"):
            load(tmp_path / "wrong.pth")
