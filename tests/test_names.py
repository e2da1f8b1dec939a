"""Names of record: what earlier versions wrote is understood, and what is written now names no file of the code."""

import importlib
import json
from pathlib import Path

import pytest

from micronet.bundle import load, save
from micronet.data import cifar10, digits
from micronet.errors import MicronetError
from micronet.factories import find_factory
from micronet.models import resnet20
from micronet.names import FACES, RENAMED, current, name_of
from micronet.provenance import cut_otherwise, data_call
from micronet.recipe import describe, load_recipe

TESTS = Path(__file__).parent
RECORDS = json.loads((TESTS / "data" / "records.json").read_text())


def calls(record):
    """Each `module:name` of ours in a description."""
    if isinstance(record, dict):
        return [name for value in record.values() for name in calls(value)]
    if isinstance(record, list):
        return [name for value in record for name in calls(value)]
    ours = isinstance(record, str) and ":" in record and record.startswith(("micronet", "callbacks"))
    return [record] if ours else []


def offered(name):
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("command", RECORDS)
def test_a_record_of_the_version_before_is_the_recipe_of_today(command, monkeypatch):
    monkeypatch.chdir(TESTS.parent)  # recipes name the committed network from there
    file, *settings = command.split()
    now = describe(load_recipe(f"recipes/{file}", dict(setting.split("=") for setting in settings)))
    then = RECORDS[command]
    assert then != now
    assert current(then) == now


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_leads_to_a_thing_that_is_recorded_by_its_new_name(old):
    assert name_of(offered(RENAMED[old])) == RENAMED[old]


def test_what_is_recorded_names_faces_not_files():
    named = {name for record in RECORDS.values() for name in calls(current(record))}
    assert {name.partition(":")[0] for name in named} <= set(FACES)
    assert len(named) > 15


@pytest.mark.parametrize("face", FACES)
def test_every_face_offers_what_it_lists_and_no_name_stands_for_two_things(face):
    module = importlib.import_module(face)
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = module.nothing_of_the_kind


def test_things_of_other_packages_and_of_files_keep_their_own_names():
    assert name_of(Path) == f"{Path.__module__}:Path"
    assert name_of(calls) == f"{__name__}:calls"


def test_the_guard_against_validating_on_training_images_understands_old_files():
    then = data_call(load(TESTS / "data" / "resnet20_cifar10.pth").provenance)
    assert then["call"] == "micronet.data:cifar10"
    for valid, otherwise in ((0.02, False), (0.1, True)):
        now = {"call": name_of(cifar10), "valid": valid}
        assert cut_otherwise(then, now) == otherwise
    assert not cut_otherwise(then, {"call": name_of(digits), "valid": 0.1})


def test_a_file_of_the_version_before_builds_its_network_and_is_saved_by_the_new_name(tmp_path):
    assert find_factory("micronet.models.resnet:resnet20", {}) is resnet20
    for wrong in ("micronet.models.densenet:resnet20", "micronet.models.resnet:he_init", "micronet.data:digits"):
        with pytest.raises(MicronetError, match="is not a network of"):
            find_factory(wrong, {})
    old = load(TESTS / "data" / "resnet20_cifar10.pth")
    save(old, tmp_path / "model.pth")
    assert load(tmp_path / "model.pth").factory == "micronet.models:resnet20"
