"""The cache of decoded images: built once, checked when opened, whole or not there."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from micronet.data import store
from micronet.data.sources import image_folder
from micronet.errors import MicronetError

REPOSITORY = Path(__file__).parents[1]


def test_a_tree_is_decoded_once_and_again_when_it_changes(cache, tmp_path, monkeypatch, digit, tree):
    root = tree(tmp_path / "tree", ["a", "b"])
    decoded = []
    real = store.decode
    monkeypatch.setattr(store, "decode", lambda entry, *rest: decoded.append(entry.name) or real(entry, *rest))
    first, again = image_folder(root), image_folder(root)
    assert len(decoded) == 10
    assert torch.equal(first.train.images, again.train.images)
    digit(55).save(root / "a" / "9.png")
    assert len(image_folder(root).train.labels) + len(image_folder(root).valid) + len(image_folder(root).test) == 11
    assert len(decoded) == 21
    image_folder(root, size=16)
    assert len(decoded) == 32
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2  # one for each size, none left over


def damage_pixels(folder):
    os.truncate(folder / "images.npy", 5_000)


def damage_length(folder):
    with open(folder / "images.npy", "ab") as file:
        file.write(b"more")


def damage_labels(folder):
    np.save(folder / "labels.npy", np.zeros(10, dtype=np.int64))


def damage_shape(folder):
    np.save(folder / "images.npy", np.zeros((10, 31, 32, 3), dtype=np.uint8))


def damage_meta(folder):
    (folder / "meta.json").write_text("{")


def damage_version(folder):
    meta = (folder / "meta.json").read_text()
    (folder / "meta.json").write_text(meta.replace('"format": 1', '"format": 0'))


def damage_by_removal(folder):
    (folder / "labels.npy").unlink()


def damage_to_nothing(folder):
    (folder / "images.npy").write_bytes(b"")


DAMAGES = [damage_pixels, damage_length, damage_labels, damage_shape, damage_meta, damage_version, damage_by_removal]


@pytest.mark.parametrize("damage", [*DAMAGES, damage_to_nothing])
def test_a_damaged_cache_is_noticed_and_built_anew(cache, tmp_path, damage, tree):
    root = tree(tmp_path / "tree", ["a", "b"])
    before = image_folder(root).train.images.clone()
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} != whole
    assert torch.equal(image_folder(root).train.images, before)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_ctrl_c_while_decoding_leaves_nothing(cache, tmp_path, monkeypatch, tree):
    root = tree(tmp_path / "tree", ["a", "b"])
    real = store.decode

    def interrupted(entry, *rest):
        if entry.name.endswith("b/2.png"):
            raise KeyboardInterrupt
        return real(entry, *rest)

    for threaded in (False, True):
        monkeypatch.setattr(store, "THREADED_BYTES", 0 if threaded else 10**9)
        monkeypatch.setattr(store, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            image_folder(root)
        assert all(path.name.endswith(".lock") for path in cache.iterdir())
    monkeypatch.setattr(store, "decode", real)
    assert len(image_folder(root).test) == 2


def test_threads_decode_the_same(cache, tmp_path, monkeypatch, tree):
    root = tree(tmp_path / "tree", ["a", "b"], each=40)
    one = image_folder(root).train.images.clone()
    shutil.rmtree(cache)
    monkeypatch.setattr(store, "THREADED_BYTES", 0)
    assert torch.equal(image_folder(root).train.images, one)


def test_two_processes_at_once_both_end_well_and_what_a_killed_one_left_is_removed(cache, tmp_path, tree):
    tree(tmp_path / "tree", ["a", "b"])
    cache.mkdir()
    code = f"""
import time
from pathlib import Path
from micronet.data import store
paths = sorted(Path({str(tmp_path / "tree")!r}).rglob("*.png"))

def find():
    print("built", flush=True)
    time.sleep(0.5)  # the other one arrives meanwhile
    return [store.Entry("train", path.parent.name, str(path), path) for path in paths], {{}}

print("ready", flush=True)
input()
print(int(store.ensure("both", "x", find, size=32).images.sum()))
"""
    (cache / f".both-v{store.FORMAT}.1.tmp").mkdir()  # of a process that was killed
    run, pipe = [sys.executable, "-W", "ignore", "-c", code], subprocess.PIPE
    both = [subprocess.Popen(run, cwd=REPOSITORY, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n", "ready\n"]
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(map(len, outputs)) == [1, 2]  # one of them built, the other waited
    assert outputs[0][-1] == outputs[1][-1]
    assert sorted(path.name for path in cache.iterdir()) == [".both-v1.lock", "both-v1"]


def test_a_cache_that_cannot_be_written_says_where_to_put_it(tmp_path, monkeypatch, tree):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MICRONET_CACHE", str(tmp_path / "file"))
    with pytest.raises(MicronetError, match=r"cannot be built .* set MICRONET_CACHE to another place"):
        image_folder(tree(tmp_path / "tree", ["a", "b"]))


def test_the_cache_lies_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("MICRONET_CACHE", "/one")
    assert store.cache_home() == Path("/one")
    monkeypatch.delenv("MICRONET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert store.cache_home() == Path("/two/micronet")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.cache_home() == Path.home() / ".cache" / "micronet"


def test_a_bar_appears_on_stderr_only_for_slow_work(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the captured stream for a terminal
    with store.progress("quick", 2) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")
    with store.progress("slow work", 2) as advance:
        time.sleep(1.1)
        advance(1)
    out, error = capsys.readouterr()
    assert out == ""
    assert "slow work" in error


def test_a_log_holds_nothing_of_a_bar(capsys, monkeypatch):
    clock = iter(range(0, 100, 10))
    monkeypatch.setattr(store, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with store.progress("slow work", 2) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")
