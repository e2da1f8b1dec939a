"""Whole commands on files that are wrong: one clear line, exit status 1, and the disk as it was."""

import os
import re
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_graphs import node, ones
from PIL import Image
from test_pack import bundled

from micronet.bundle import save
from micronet.models import separable_net
from micronet.onnx_meta import Meta, write_meta
from micronet.pack import pack

ABOUT = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "normalised": False}
PROVENANCE = {"resolved": {"recipe": {"data": {"call": "micronet.data.sources:digits", "valid": 0.2}}}}


def graph(version: int = 1, op: str = "Conv") -> bytes:
    """A classifier of 10 classes, 3 x 32 x 32."""
    from test_fuzz import model_of

    arrays = {"w": ones(4, 3, 3, 3), "fc": np.random.default_rng(0).random((10, 4), np.float32)}
    nodes = [
        node(op, "x w", "c"),
        node("GlobalAveragePool", "c", "p"),
        node("Flatten", "p", "f"),
        node("Gemm", "f fc", transB=1),
    ]
    model = model_of(nodes, shape=("N", 3, 32, 32), gives=("N", 10), **arrays)
    write_meta(model, Meta(classes=tuple("0123456789"), input_size=(3, 32, 32), **ABOUT))
    for entry in model.metadata_props:
        if entry.key == "micronet.version":
            entry.value = str(version)
    return model.SerializeToString()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """What is spoilt: a model file, a packed one, an ONNX file."""
    folder = tmp_path_factory.mktemp("good")
    bundle = bundled(separable_net, num_classes=10, width_multiplier=0.125)
    bundle.provenance = PROVENANCE
    save(bundle, folder / "model.pth")
    pack(bundle, folder / "model.safetensors")
    (folder / "model.onnx").write_bytes(graph())
    return folder


def future(path: Path) -> None:
    """A model file of a version to come."""
    torch.save(torch.load(path, weights_only=True) | {"version": 99}, path)


def packed_future(path: Path) -> None:
    from mutations import headed

    path.write_bytes(headed(path.read_bytes(), lambda header, tensors: header.update(version=99)))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def renamed(path: Path, other: str) -> None:
    path.write_bytes((path.parent / other).read_bytes())


def filled(path: Path, content: bytes) -> None:
    path.write_bytes(content)


# File, how it is spoilt, what every command says of it.
SPOILT = {
    "missing .pth": ("none.pth", lambda path: None, "no such file"),
    "missing .onnx": ("none.onnx", lambda path: None, "o such file"),
    "missing packed": ("none.safetensors", lambda path: None, "no such file"),
    "folder .pth": ("dir.pth", Path.mkdir, "is a folder"),
    "folder .onnx": ("dir.onnx", Path.mkdir, "a folder|s a directory"),
    "folder packed": ("dir.safetensors", Path.mkdir, "is a folder"),
    "empty .pth": ("empty.pth", Path.touch, "not a model file"),
    "empty .onnx": ("empty.onnx", Path.touch, "not an ONNX file|onnxruntime can't run it"),
    "empty packed": ("empty.safetensors", Path.touch, "not a safetensors file"),
    "cut .pth": ("model.pth", cut, "truncated"),
    "cut .onnx": ("model.onnx", cut, "not an ONNX file, or one cut short"),
    "cut packed": ("model.safetensors", cut, "truncated or damaged"),
    ".onnx as .pth": ("onnx.pth", partial(renamed, other="model.onnx"), "not a model file of micronet"),
    ".onnx as packed": ("onnx.safetensors", partial(renamed, other="model.onnx"), "not a safetensors file"),
    ".pth as .onnx": ("pth.onnx", partial(renamed, other="model.pth"), "not an ONNX file"),
    ".pth as packed": ("pth.safetensors", partial(renamed, other="model.pth"), "it looks like a zip archive"),
    "packed as .onnx": ("packed.onnx", partial(renamed, other="model.safetensors"), "not an ONNX file"),
    "text as .pth": ("text.pth", partial(filled, content=b"a model\n"), "not a model file"),
    "text as .onnx": ("text.onnx", partial(filled, content=b"a model\n"), "not an ONNX file"),
    "future .pth": ("model.pth", future, "format version 99.*update micronet"),
    "future .onnx": ("model.onnx", partial(filled, content=graph(99)), "description of version 99.*update micronet"),
    "future packed": ("model.safetensors", packed_future, "format version 99.*update micronet"),
    "unknown operator": ("model.onnx", partial(filled, content=graph(op="Magic")), "Magic"),
}
TAKE_ONNX = ("score", "evaluate", "predict", "bench")
COMMANDS = {
    "export": lambda path, out: ("export", path, "-o", out / "out.onnx"),
    "quantize": lambda path, out: ("quantize", path, "-o", out / "out.onnx", "--json", out / "out.json"),
    "pack": lambda path, out: ("pack", path, "-o", out / "out.safetensors"),
    "unpack": lambda path, out: ("unpack", path, "-o", out / "out.pth"),
    "sensitivity": lambda path, out: ("sensitivity", path, "--data", "digits", "--json", out / "out.json"),
    "score": lambda path, out: ("score", path),
    "evaluate": lambda path, out: ("evaluate", path, "--data", "digits", "-o", out / "out.png"),
    "predict": lambda path, out: ("predict", path, out / "image.png"),
    "bench": lambda path, out: ("bench", path, "--seconds", "0.1", "-o", out / "out.png", "--json", out / "out.json"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_wrong_file_is_one_line_of_every_command(spoilt, good, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    for suffix in ("onnx", "json", "safetensors", "pth", "png"):
        (out / f"out.{suffix}").write_text("an earlier file")
    Image.new("RGB", (40, 40)).save(out / "image.png")
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    name, how, says = SPOILT[spoilt]
    path = tmp_path / name
    how(path)
    before = {file: file.is_file() and file.read_bytes() for file in tmp_path.rglob("*")}
    for command, arguments in COMMANDS.items():
        if spoilt in (".pth as .onnx", "packed as .onnx") and command in ("pack", "unpack", "sensitivity"):
            continue  # these look at the content: under another name it is a model file all the same
        status, said, error = call(*arguments(path, out))
        error = error.removeprefix("micronet: opening 1 model\n")  # of bench, which says what it does
        assert (status, said, error.count("\n")) == (1, "", 1), (command, error)
        assert error.startswith(f"micronet: {path}"), (command, error)
        taken = command in TAKE_ONNX if path.suffix == ".onnx" else command != "unpack" or path.suffix != ".pth"
        if taken:
            assert any(part.search(error) for part in map(re.compile, says.split("|"))), (command, error)
    assert {file: file.is_file() and file.read_bytes() for file in tmp_path.rglob("*")} == before


# Operators of its own, a key of ten bytes; a length of 2 ** 64 - 1, one of 2 ** 63 - 1; an end in the middle of one.
HOSTILE = {
    "length of 70 bits": b"\x08\x08\x3a" + b"\xff" * 9 + b"\x7f",
    "length of 64 bits": b"\x08\x08\x3a" + b"\xff" * 9 + b"\x01",
    "length of 63 bits": b"\x08\x08\x3a" + b"\xff" * 8 + b"\x7f",
    "length of 32 bits": b"\x08\x08\x3a" + b"\xff" * 4 + b"\x0f",
    "length beyond the end": b"\x08\x08\x3a\x05abcd",
    "key of ten bytes": b"\xff" * 9 + b"\x7f" + b"\0",
    "length cut off": b"\x08\x08\x3a\xff",
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_lengths_that_no_file_has(hostile, call, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(HOSTILE[hostile] + b"\0" * 40)
    Image.new("RGB", (9, 7)).save(tmp_path / "i.png")
    status, said, error = call("predict", path, tmp_path / "i.png")
    assert (status, said, error.count("\n")) == (1, "", 1)
    assert error.startswith(f"micronet: {path}: ")


# What is read, what would be written over it.
OVER = {
    "export": ("export", "MODEL.pth", "-o", "LINK.onnx"),
    "quantize json": ("quantize", "MODEL.pth", "-o", "new.onnx", "--json", "MODEL.pth"),
    "quantize twice": ("quantize", "MODEL.pth", "-o", "new.onnx", "--json", "new.onnx"),
    "quantize float16": ("quantize", "MODEL.pth", "--to", "minmax8", "-o", "MODEL.pth"),
    "pack": ("pack", "MODEL.safetensors"),
    "unpack": ("unpack", "MODEL.safetensors", "-o", "PACKED.pth"),
    "bench": ("bench", "MODEL.onnx", "-o", "MODEL.onnx"),
    "bench second": ("bench", "MODEL.pth", "MODEL.onnx", "--json", "./MODEL.onnx"),
    "bench twice": ("bench", "MODEL.onnx", "-o", "new", "--json", "new"),
    "bench factory": ("bench", "MODEL.onnx", "--factory", "net.py:make", "-o", "net.py"),
    "evaluate": ("evaluate", "MODEL.onnx", "--data", "digits", "-o", "MODEL.onnx"),
    "sensitivity": ("sensitivity", "MODEL.pth", "--data", "digits", "-o", "MODEL.pth"),
    "sensitivity json": ("sensitivity", "MODEL.pth", "--data", "digits", "--json", "MODEL.pth"),
    "sensitivity twice": ("sensitivity", "MODEL.pth", "--data", "digits", "--json", "x", "-o", "x"),
    "lr-find": ("lr-find", "net.py", "-o", "net.py"),
    "data show": ("data", "show", "net.py", "-o", "net.py"),
}


@pytest.mark.parametrize("over", OVER)
def test_nothing_is_written_over_what_is_read(over, good, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for suffix in ("pth", "safetensors", "onnx"):
        (tmp_path / f"MODEL.{suffix}").write_bytes((good / f"model.{suffix}").read_bytes())
    (tmp_path / "net.py").write_text("raise SystemExit('was run')")
    os.link("MODEL.pth", "LINK.onnx")
    os.symlink("MODEL.safetensors", "PACKED.pth")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    status, said, error = call(*OVER[over])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert (status, said, error.count("\n")) == (1, "", 1), error
    assert ("would be written to it" if "twice" in over else "is what is read; name another file with -") in error


@pytest.mark.parametrize("seconds", ["inf", "nan", "1e300"])
def test_a_time_that_is_none_is_refused(seconds, good, call):
    status, said, error = call("bench", good / "model.onnx", "--seconds", seconds)
    assert (status, said) == (2, "")
    assert "--seconds" in error


PICTURES = {
    "dot.png": Image.new("RGB", (1, 1), "red"),
    "line.png": Image.new("RGB", (1, 3000)),
    "grey.png": Image.new("L", (9, 7), 100),
    "alpha.png": Image.new("RGBA", (9, 7), (255, 0, 0, 90)),
    "grey-alpha.png": Image.new("LA", (9, 7)),
    "palette.gif": Image.new("P", (9, 7)),
    "cmyk.jpg": Image.new("CMYK", (9, 7)),
    "deep.png": Image.new("I;16", (9, 7), 40_000),
    "bits.tif": Image.new("1", (9, 7)),
    "lab.tif": Image.new("LAB", (9, 7)),
    "large.png": Image.new("1", (9000, 9000)),
}


def test_any_picture_is_answered_and_what_is_none_is_named(good, call, tmp_path):
    for name, picture in PICTURES.items():
        picture.save(tmp_path / name)
    frames = [Image.new("P", (9, 7), i) for i in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].convert("RGB").save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    answered = sorted(tmp_path.iterdir())
    for model in ("model.onnx", "model.safetensors"):
        status, said, error = call("predict", good / model, *answered, "--top", "1")
        assert (status, error, said.count("%")) == (0, "", len(answered)), error
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("a picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "deep.png").read_bytes()[:50])
    # What Pillow would have Ghostscript run, under any name.
    (tmp_path / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\n")
    (tmp_path / "floats.tif").write_bytes(b"")
    Image.new("F", (9, 7)).save(tmp_path / "floats.tif")
    header = bytearray((tmp_path / "deep.png").read_bytes())
    header[16:24] = b"\0\x01\0\0" * 2  # 65,536 x 65,536 pixels
    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(header)
    wrong = sorted(set(tmp_path.iterdir()) - set(answered))
    status, said, error = call("predict", good / "model.onnx", *wrong, answered[0])
    assert (status, said.count("%"), error.count("\n")) == (1, 5, len(wrong))
    for path, line in zip(wrong, error.splitlines(), strict=True):
        assert line.startswith(f"micronet: {path} cannot be read as an image"), line
    assert "exceeds limit" in error


def test_a_hostile_name_does_not_command_the_terminal(call, tmp_path):
    status, _, error = call("score", tmp_path / "a\nb\x1b[31mred.pth")
    assert (status, error.count("\n"), "\x1b" in error) == (1, 1, False)


def test_memory_that_is_not_there_is_one_line(good, call, monkeypatch):
    def none(*args, **kwargs):
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr("micronet.model_source.open_model", none)
    status, _, error = call("score", good / "model.pth")
    assert (status, error) == (1, "micronet: not enough memory (Unable to allocate 9 TiB)\n")
