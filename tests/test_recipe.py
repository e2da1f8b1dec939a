"""Recipes: values, their description, the options that the command line gives them - and every recipe file, run."""

import re
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
from fastai.callback.mixup import MixUp

from callbacks.schedule import Cosine, OneCycle
from micronet import Fit, MicronetError, Recipe, RunOptions, adamw, load, load_recipe, run, sgd
from micronet.data import cifar10, digits
from micronet.models import resnet20
from micronet.recipe import describe, parse_option

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.py"))


def a_recipe(**changes) -> Recipe:
    fit = {"name": "train", "epochs": 3, "lr": 0.1, "opt": sgd(), "cbs": (partial(MixUp, 0.4),)} | changes
    return Recipe(data=partial(digits, batch_size=64), model=resnet20, stages=(Fit(**fit),))


def test_equal_values_describe_alike_whatever_their_objects():
    assert describe(a_recipe()) == describe(a_recipe())


@pytest.mark.parametrize(
    "changes",
    [{"epochs": 4}, {"lr": 0.2}, {"opt": adamw()}, {"opt": sgd(momentum=0.8)}, {"schedule": Cosine()}]
    + [{"schedule": OneCycle(div=10)}, {"cbs": (partial(MixUp, 0.2),)}, {"cbs": ()}, {"keep": "last"}, {"ema": 0.9}],
)
def test_any_other_value_describes_otherwise(changes):
    assert describe(a_recipe()) != describe(a_recipe(**changes))


def test_a_lambda_has_no_description():
    with pytest.raises(MicronetError, match="partial"):
        describe(a_recipe(cbs=(lambda: MixUp(0.4),)))


@pytest.mark.parametrize(
    ("argument", "value"),
    [("name", "a b"), ("epochs", -1), ("lr", 0), ("wd", -1), ("batch_size", 0), ("label_smoothing", 1)]
    + [("grad_clip", 0), ("ema", 1.0), ("early_stop", 0), ("keep", "first"), ("cbs", (MixUp(0.4),))],
)
def test_bad_arguments_of_a_fit_are_named(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be"):
        a_recipe(**{argument: value})


def test_two_stages_of_one_name_are_refused():
    fit = Fit("train", epochs=1)
    with pytest.raises(ValueError, match="different names"):
        Recipe(data=digits, model=resnet20, stages=(fit, fit))


def options(
    *,
    n: int = 1,
    f: float = 0.5,
    b: bool = True,
    w: Literal["x", "y"] = "x",
    o: int | None = None,
    t: str | None = None,
    v: Literal["x"] | None = None,
    p: Path = Path("a.pth"),
    smoke=False,
):
    """Stand-in for a recipe's signature."""


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("n", "30", 30),
        ("t", "none", None),
        ("p", "runs/b/model.pth", Path("runs/b/model.pth")),
        ("t", "some", "some"),
        ("v", "x", "x"),
        ("v", "none", None),
        ("f", "1e-3", 1e-3),
        ("b", "false", False),
        ("b", "1", True),
        ("w", "y", "y"),
        ("o", "none", None),
    ]
    + [("o", "7", 7)],
)
def test_options_become_what_the_annotation_says(name, text, value):
    assert parse_option(options, name, text) == value


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [("n", "1.5", "a whole number"), ("f", "x", "a number"), ("b", "maybe", "true or false"), ("w", "z", "one of x, y")]
    + [
        ("m", "1", "no option 'm'; it has n, f, b, w, o, t, v, p"),
        ("smoke", "true", "no option"),
        ("o", "q", "whole number or none"),
        ("p", "", "a file"),
    ],
)
def test_wrong_options_say_what_is_allowed(name, text, says):
    with pytest.raises(MicronetError, match=says):
        parse_option(options, name, text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = (", ":1: SyntaxError"),
        ("import micronet\n\n1 / 0\n", ":3: ZeroDivisionError"),
        ("x = 1\n", "defines no function recipe"),
        ("def recipe(*, epochs=1):\n    return 1\n", "must take the keyword argument smoke"),
        ("def recipe(*, smoke=False):\n    return 1\n", "must return a micronet.Recipe, got int"),
        (
            "def recipe(*, smoke=False):\n    raise ValueError('lr must be above 0')\n",
            ":2: ValueError: lr must be above 0",
        ),
        ("def recipe(*, smoke=False):\n    return 1 / 0\n", ":2: ZeroDivisionError"),
    ],
)
def test_a_wrong_recipe_file_is_one_line(text, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path("r.py")  # relative, as users name it
    file.write_text(text)
    with pytest.raises(MicronetError, match=says) as caught:
        load_recipe(file)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_names_those_that_are_there(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(MicronetError, match=r"no such recipe file; there are .*quickstart\.py"):
        load_recipe("recipes/quickstrat.py")


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_headers_say_result_cost_run_and_source(file):
    text = file.read_text()
    for part in ("Result:", "Cost:", "Run:", "Source:"):
        assert part in text.split('"""')[1], f"{file.name} lacks {part}"
    result = text.partition("Result:")[2].partition("Cost:")[0]
    assert re.search(r"\d[\d,]* of [\d,]+ test images", " ".join(result.split())), f"{file.name} counts no test images"
    assert len(text.splitlines()) <= 80


def test_the_readmes_recipe_is_the_file():
    assert (ROOT / "recipes" / "resnet20_cifar10.py").read_text().strip() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_file_runs_all_its_stages(file, tmp_path, real):
    recipe = load_recipe(file, smoke=True)
    real(recipe.data.func, **recipe.data.keywords)
    full = load_recipe(file)
    assert [stage.name for stage in recipe.stages] == [stage.name for stage in full.stages]
    bundle = run(recipe, tmp_path / "run", RunOptions(smoke=True), source=file)
    # A file to begin with has rows of its own.
    assert [row["stage"] for row in bundle.history][-len(recipe.stages) :] == [stage.name for stage in recipe.stages]
    assert load(tmp_path / "run" / "model.pth").history == bundle.history


def test_cifar_is_named_in_the_recipes_by_function():
    assert describe(partial(cifar10, batch_size=3)) == {"call": "micronet.data:cifar10", "batch_size": 3}
