"""A run folder whose files were damaged: the next command says which in one line, or goes on; nothing is lost."""

import importlib
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import damaged, damages, repacked, spoil

from callbacks.checkpoint import KEPT
from micronet import Fit, MicronetError, Recipe, RunOptions, run
from micronet.data import digits
from micronet.models import separable_net

OPTIONS = RunOptions(limit=32)
RECIPE = Recipe(
    partial(digits, batch_size=16),
    partial(separable_net, width_multiplier=0.125),
    (Fit("a", epochs=2, lr=0.05), Fit("b", epochs=1, lr=0.01)),
)
DONE, BEGUN = ("run.json", "1-a/row.json", "1-a/model.pth", "2-b/row.json"), ("run.json", "1-a/checkpoint.pth")


class Stopped(BaseException):
    """Stands in for a kill."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run that is done, and one that was killed after an epoch."""
    place = tmp_path_factory.mktemp("runs")
    run(RECIPE, place / "done", OPTIONS)
    run_module = importlib.import_module("micronet.run")  # "import micronet.run as module" gives the function

    def stop(*args, **kwargs):
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module._Run, "_measure", stop)
        with pytest.raises(Stopped):
            run(RECIPE, place / "begun", OPTIONS)
    assert set(torch.load(place / "begun" / "1-a" / "checkpoint.pth", weights_only=True)) == KEPT
    return place


def again(folders: Path, kind: str, file: str, content: bytes) -> str | None:
    """Run in a copy of a folder in which a file is other; the line that comes of it."""
    folder = folders / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folders / kind, folder)
    (folder / file).write_bytes(content)
    threads, told = torch.get_num_threads(), None
    try:
        run(RECIPE, folder, OPTIONS)
    except MicronetError as error:
        told = str(error)
    finally:
        torch.set_num_threads(threads)
    if told is not None:
        # Nothing was lost: the damaged file is there to be looked at, and so is all else.
        assert ("\n" in told, str(folder) in told, (folder / file).exists()) == (False, True, True)
        assert {f.name for f in (folders / kind).rglob("*")} <= {f.name for f in folder.rglob("*")}
    return told


@pytest.mark.parametrize(
    ("kind", "file", "content", "says"),
    [
        ("done", "run.json", b"[" * 100_000, "damaged"),
        ("done", "run.json", b"\xff\xfe", "damaged"),
        ("done", "run.json", b"3", "damaged"),
        ("done", "run.json", {"hardware": {"threads": 10**9}}, "damaged"),
        ("done", "run.json", {"hardware": {"threads": -1}}, "damaged"),
        ("done", "run.json", {"hardware": {"threads": "2"}}, "damaged"),
        ("done", "run.json", {"hardware": None}, "damaged"),
        ("done", "1-a/row.json", b"", "damaged"),
        ("done", "1-a/row.json", b"[1, 2]", "damaged"),
        ("done", "2-b/row.json", b"{" * 9, "damaged"),
        ("done", "1-a/row.json", b"[" * 100_000, "damaged"),
        ("done", "2-b/model.pth", b"", "not a model file"),
        ("done", "2-b/model.pth", 300, "truncated"),
        ("begun", "1-a/checkpoint.pth", b"", "damaged checkpoint; delete it to begin this stage anew"),
        ("begun", "1-a/checkpoint.pth", 3000, "damaged checkpoint"),
    ],
)
def test_a_damaged_file_is_named(folders, kind, file, content, says):
    whole = (folders / kind / file).read_bytes()
    if isinstance(content, dict):
        content = json.dumps(json.loads(whole) | content).encode()
    content = content if isinstance(content, bytes) else whole[:-content]
    told = again(folders, kind, file, content)
    assert told is not None
    assert says in told
    assert str(Path(file)) in told


def test_a_checkpoint_of_something_else_or_with_a_wrong_byte_is_named(folders):
    whole = (folders / "begun" / "1-a" / "checkpoint.pth").read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 1  # a weight's, most likely: torch alone would take it
    other = (folders / "done" / "1-a" / "model.pth").read_bytes()
    for content in (bytes(middle), other):
        assert "damaged checkpoint" in again(folders, "begun", "1-a/checkpoint.pth", content)


def tried(folders, data) -> None:
    kind = data.draw(st.sampled_from(("done", "begun")))
    file = data.draw(st.sampled_from(DONE if kind == "done" else BEGUN))
    content = (folders / kind / file).read_bytes()
    if not data.draw(st.booleans()):
        content = damaged(content, data.draw(damages))
    elif file.endswith(".json"):
        told = json.loads(content)
        spoil(data.draw, told)
        content = json.dumps(told).encode()
    else:
        how = data.draw(damages)
        content = repacked(content, lambda part, value: damaged(value, how) if "pkl" in part else value)
    again(folders, kind, file, content)


quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=6, derandomize=True, **quiet)
@given(data=st.data())
def test_any_damage(folders, data):
    tried(folders, data)


@pytest.mark.slow
@settings(max_examples=600, **quiet)
@given(data=st.data())
def test_any_damage_for_long(folders, data):
    tried(folders, data)
