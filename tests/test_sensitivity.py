"""Sensitivity of each group of channels, ratios for a recipe, and curves of rounds."""

import io
import json
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from rich.console import Console

from callbacks.prune import PruneChannels
from callbacks.ramp import Rounds
from micronet import Fit, MicronetError, Recipe, RunOptions, load, run
from micronet.cli_sensitivity import _table
from micronet.curves import plot_rounds, read_rounds
from micronet.data import digits, plain_loader
from micronet.evaluate import evaluate
from micronet.models import separable_net
from micronet.recipe import describe
from micronet.sensitivity import Sensitivity, measure_sensitivity, plot_sensitivity, ratios_from

NETWORK = partial(separable_net, width_multiplier=0.25)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small network trained for some seconds, and pruned in two rounds."""
    folder = tmp_path_factory.mktemp("run")
    rounds = partial(PruneChannels, 0.2, schedule=Rounds(start=1 / 4, end=1 / 2, rounds=2))
    stages = (Fit("train", epochs=3, lr=0.1), Fit("rounds", epochs=4, lr=0.02, cbs=(rounds,)))
    run(Recipe(partial(digits, batch_size=16), NETWORK, stages), folder, RunOptions(limit=320))
    return folder


@pytest.fixture(scope="module")
def found(trained):
    bundle = load(trained / "1-train" / "model.pth")
    return measure_sensitivity(bundle.model, digits(), ratios=(0.25, 0.5), limit=120, name="model.pth")


def test_each_group_is_pruned_alone_and_counted_on_validation_images(trained, found):
    bundle, data = load(trained / "1-train" / "model.pth"), digits().limit(120)
    whole = evaluate(bundle.model, plain_loader(data.valid, data))
    assert (found.top1_count, found.images) == (whole.top1_count, 120)
    assert whole.top1 > 0.3  # it learnt something that pruning can cost
    for curve in (found.curves[0], found.curves[-1]):
        for point in curve.points:
            model = load(trained / "1-train" / "model.pth").model
            from pruning import count, cut

            cut(model, size=32, ratio={curve.name: point.ratio})
            again = evaluate(model, plain_loader(data.valid, data))
            assert (again.top1_count, count(model)) == (point.top1_count, point.params)
    assert [point.channels for point in found.curves[0].points] == [3, 2]
    assert found.noise == pytest.approx((whole.top1 * (1 - whole.top1) / 120) ** 0.5)


def test_the_images_that_are_looked_at_are_of_all_classes(trained, monkeypatch):
    import micronet.sensitivity as module

    seen = []
    monkeypatch.setattr(module, "_right", lambda model, loader, device: seen.append(loader.dataset) or 1)
    measure_sensitivity(load(trained / "model.pth").model, digits(), ratios=(0.5,), limit=40)
    assert seen[0].labels.bincount(minlength=10).min() >= 3
    valid = {image.numpy().tobytes() for image in digits().valid.images}
    assert all(image.numpy().tobytes() in valid for image in seen[0].images)


def test_the_network_is_left_as_it_was(trained):
    model = load(trained / "model.pth").model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    measure_sensitivity(model, digits(), ratios=(0.5,), limit=20)
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def write(path, points, top1_count=90, images=100, **more):
    curves = [
        {"name": name, "points": [{"ratio": r, "top1_count": c} for r, c in values]} for name, values in points.items()
    ]
    told = {"format": "micronet sensitivity", "version": 1, "top1_count": top1_count, "images": images}
    path.write_text(json.dumps(told | {"curves": curves} | more))
    return path


def test_ratios_are_the_largest_up_to_which_none_cost_more(tmp_path):
    points = {
        "a": [(0.1, 90), (0.3, 88), (0.5, 87)],
        "b": [(0.1, 80), (0.3, 90)],  # what comes back after a dip is chance
        "c": [(0.5, 89), (0.9, 95)],
    }
    file = write(tmp_path / "s.json", points)
    assert ratios_from(file, max_drop=0.02) == {"a": 0.3, "c": 0.9}
    assert ratios_from(file, max_drop=0.0) == {"a": 0.1}
    described = describe(partial(PruneChannels, ratio=ratios_from(file)))
    assert described["ratio"] == {"a": 0.1, "c": 0.9}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not a file of `micronet sensitivity`"),
        ("[]", "not a file of `micronet sensitivity`"),
        ('{"format": "other", "version": 1}', "not a file of `micronet sensitivity`.*format 'other'"),
        (None, "no such file; `micronet sensitivity MODEL --data NAME` makes one"),
    ],
)
def test_a_file_of_something_else_is_one_line(content, says, tmp_path):
    file = tmp_path / "s.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(MicronetError, match=says):
        ratios_from(file)
    with pytest.raises(MicronetError, match="max_drop must be a fraction"):
        ratios_from(file, max_drop=1.5)


def test_nothing_that_can_go_is_said(tmp_path):
    with pytest.raises(MicronetError, match=r"no group bears its smallest ratio within max_drop=0\.01"):
        ratios_from(write(tmp_path / "s.json", {"a": [(0.1, 50)]}))


def test_a_recipe_prunes_by_the_file(found, tmp_path):
    found.save(tmp_path / "s.json")
    ratios = ratios_from(tmp_path / "s.json", max_drop=0.5)
    assert ratios
    cut_by_file = partial(PruneChannels, ratio=ratios)
    recipe = Recipe(partial(digits, batch_size=32), NETWORK, (Fit("prune", epochs=0, cbs=(cut_by_file,)),))
    bundle = run(recipe, tmp_path / "r", RunOptions(limit=32))
    curves = {curve.name: curve for curve in found.curves}
    modules = dict(bundle.model.named_modules())
    for name, ratio in ratios.items():
        (left,) = [point.channels for point in curves[name].points if point.ratio == ratio]
        assert modules[name].out_channels == left


def test_what_is_refused(trained):
    model = load(trained / "model.pth").model
    for arguments, says in (
        ({"ratios": (0.5, 1.0)}, r"ratios must be fractions in \(0, 1\)"),
        ({"ratios": ()}, "got none"),
        ({"importance": "taylor"}, "taylor judges by gradients"),
    ):
        with pytest.raises(MicronetError, match=says):
            measure_sensitivity(model, digits(), **arguments)
    data = digits()
    with pytest.raises(MicronetError, match="its validation images are the test images"):
        measure_sensitivity(model, replace(data, valid=data.test, valid_is_test=True))


def test_the_command_writes_plot_and_file(call, trained):
    status, out, err = call("sensitivity", trained / "model.pth", "--data", "digits", "--limit", 40, "--ratios", "0.5")
    assert (status, err) == (0, "")
    told = json.loads((trained / "model-sensitivity.json").read_text())
    assert told["images"] == 40
    assert [len(curve["points"]) for curve in told["curves"]] == [1] * len(told["curves"])
    assert (trained / "model-sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert f"digits valid: {100 * told['top1_count'] / 40:.2f} % of 40 images, standard error" in out
    assert f'ratios_from("{trained / "model-sensitivity.json"}", max_drop=0.01)' in out


def test_each_column_says_which_share_is_removed(found):
    def cells(*shares):
        console = Console(record=True, file=io.StringIO(), width=200)
        console.print(_table(found, shares))
        return [re.split(r" *[│┃] *", line)[1:-1] for line in console.export_text().splitlines() if line[:1] in "┃│"]

    head, *rows = cells(0.001, 0.25, 0.5)
    assert head == ["group", "channels", "0.1 % removed", "25 % removed", "50 % removed"]
    assert len(rows) == len(found.curves)
    for curve, row in zip(found.curves, rows, strict=True):
        (half,) = [point for point in curve.points if point.channels == curve.channels - curve.channels // 2]
        # 0.1 % of so few channels are none; the column of another share does not move to its place.
        told = f"{half.channels}: {100 * half.top1_count / found.images:.1f}"
        assert (row[:3], row[4]) == ([curve.name, str(curve.channels), "none"], told)


def test_what_was_measured_is_printed_though_it_cannot_be_written(call, trained, monkeypatch):
    def full(self, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Sensitivity, "save", full)
    status, out, err = call("sensitivity", trained / "model.pth", "--data", "digits", "--limit", 10, "--ratios", "0.5")
    assert status == 1
    assert "50 % removed" in out
    assert err.endswith("No space left on device\n")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("--ratios", "0.5,x"), 2, "--ratios must be fractions with commas between"),
        (("--ratios", "1.5"), 2, "--ratios must be fractions in (0, 1)"),
        (("--importance", "taylor"), 2, "--importance must be one of l1, l2"),
        (("--data", "cifar10"), 1, "does not say which images of cifar10 it was trained on"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(call, trained, arguments, status, says):
    given = arguments if "--data" in arguments else ("--data", "digits", *arguments)
    found, _, err = call("sensitivity", trained / "model.pth", *given)
    assert found == status
    assert says in " ".join(err.replace("│", " ").split())


def test_many_groups_are_drawn_a_few_to_a_panel(found, tmp_path, monkeypatch):
    import micronet.sensitivity as module

    drawn = []
    monkeypatch.setattr(module, "save_figure", lambda figure, path: drawn.append(figure))
    plot_sensitivity(replace(found, curves=found.curves * 2), tmp_path / "s.png")
    panels = [ax for ax in drawn[0].axes if ax.get_visible()]
    assert len(panels) == -(-2 * len(found.curves) // 6)
    lines = [text.get_text() for ax in panels for text in ax.get_legend().get_texts()]
    assert lines == [f"{curve.name} ({curve.channels})" for curve in found.curves * 2]
    band = panels[0].patches[0].get_extents().transformed(panels[0].transData.inverted())
    assert band.height == pytest.approx(200 * found.noise)


def test_a_round_is_the_last_epoch_before_more_goes(trained, tmp_path, monkeypatch):
    rounds = read_rounds(trained / "2-rounds")
    rows = (trained / "2-rounds" / "history.csv").read_text().splitlines()
    assert len({one.params for one in rounds}) == len(rounds) == 3
    assert [one.epoch for one in rounds] == [1, 2, 4]
    assert rounds[-1].params == json.loads((trained / "2-rounds" / "row.json").read_text())["params"]
    column = rows[0].split(",").index("top1")
    assert [one.top1 for one in rounds] == [float(rows[one.epoch].split(",")[column]) for one in rounds]
    plot_rounds({"10 % a round": rounds, "again": rounds}, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert (trained / "2-rounds" / "rounds.png").read_bytes().startswith(b"\x89PNG")  # the run draws its own
    assert not (trained / "1-train" / "rounds.png").exists()


def test_curves_of_something_else_are_refused(trained, tmp_path):
    with pytest.raises(MicronetError, match="no channels were pruned in it"):
        read_rounds(trained / "1-train")
    with pytest.raises(MicronetError, match=r"not the folder of a finished stage \(history.csv is not there\)"):
        read_rounds(tmp_path)
    with pytest.raises(MicronetError, match="no stage to draw"):
        plot_rounds({}, tmp_path / "c.png")
