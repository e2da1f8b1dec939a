"""What a file is by its first bytes; wrong models are refused by every command in one line."""

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image
from safetensors.numpy import save

from micronet.errors import MicronetError
from micronet.file_kind import look, require_model

ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "tests" / "data" / "resnet20_cifar10.pth"


def saved(value, **how) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **how)
    return file.getvalue()


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 7)).save(file, kind)
    return file.getvalue()


def graph(**more) -> bytes:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    net = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "net", values[:1], values[1:])
    return helper.make_model(net, **more).SerializeToString()


CONTENT = {
    "a zip archive": saved({"a": torch.zeros(2)}),
    "a safetensors file": save({"a": np.zeros(2, np.float32)}),
    "a Python pickle": saved({"a": torch.zeros(2)}, _use_new_zipfile_serialization=False),
    "an ONNX file": graph(),
    "an ONNX file ": graph(producer_name="somebody"),
    "a PNG image": picture("PNG"),
    "a JPEG image": picture("JPEG"),
    "text": "# A heading, größer\n".encode() * 40,
    "text ": ("a" + "ä" * 400).encode(),  # the last letter that is looked at is cut in two
}


@pytest.mark.parametrize("kind", CONTENT)
def test_files_of_real_writers_are_told(kind, tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(CONTENT[kind])
    assert look(file).startswith(f"it looks like {kind.strip()}")


@pytest.mark.parametrize("length", [9, 1000])
def test_a_packed_file_that_is_cut_within_its_header_is_said_to_be_truncated(length, tmp_path, call):
    whole = save({"a": np.zeros(2, np.float32)}, {"micronet": "x" * 7000})
    assert int.from_bytes(whole[:8], "little") > length
    file = tmp_path / "model.safetensors"
    file.write_bytes(whole[:length])
    for command in ("score", "unpack"):
        status, out, err = call(command, file)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert f"{file}: truncated (its header alone is longer than the file)" in err


@given(st.binary(max_size=40))
def test_any_bytes_are_told_in_words_that_can_be_printed(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("bytes") / "model.bin"
    file.write_bytes(content)
    assert look(file).isprintable()
    assert "\\x" not in look(file)
    assert (look(file) == "it is empty") == (not content)


@pytest.mark.parametrize("kind", ["text", "a PNG image", "an ONNX file", "a Python pickle"])
def test_what_is_no_model_is_refused_and_models_are_not(kind, tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(CONTENT[kind])
    for onnx in (True, False):
        with pytest.raises(
            MicronetError, match=rf"model\.bin: not a model file of micronet \(.*\); it looks like {kind}"
        ):
            require_model(file, onnx=onnx)
    for good in ("a zip archive", "a safetensors file"):
        file.write_bytes(CONTENT[good])
        require_model(file, onnx=False)
    require_model("timm:resnet18")
    file.with_suffix(".onnx").write_bytes(CONTENT[kind])
    require_model(file.with_suffix(".onnx"))  # its own reader says more
    file.write_bytes(graph())
    with pytest.raises(MicronetError, match="rename it, so that its name ends in"):
        require_model(file)


# Every command that takes a model; those that write do it beside the model unless told otherwise.
COMMANDS = {
    "export": ("export", "MODEL"),
    "quantize": ("quantize", "MODEL"),
    "pack": ("pack", "MODEL"),
    "unpack": ("unpack", "MODEL"),
    "sensitivity": ("sensitivity", "MODEL", "--data", "digits"),
    "evaluate": ("evaluate", "MODEL", "--data", "digits"),
    "score": ("score", "MODEL"),
    "predict": ("predict", "MODEL", "image.png"),
    "bench": ("bench", "MODEL", "-o", "none/bench.png"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_of_a_model_in_a_folder_that_is_not_there_the_model_is_said_to_be_missing(command, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(*("none/model.pth" if part == "MODEL" else part for part in COMMANDS[command]))
    assert (status, out, err) == (1, "", "micronet: none/model.pth: no such file\n")


def test_an_output_folder_that_is_not_there_is_said_of_a_model_that_is(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, file in {"pack": "out.safetensors", "sensitivity": "out.png", "bench": "out.png"}.items():
        given = [COMMITTED if part == "MODEL" else part for part in COMMANDS[name]]
        status, _, err = call(*given, "-o", f"none/{file}")
        assert status == 1
        assert err == f"micronet: none: no such folder to write {file} to; make it first\n"


def test_an_output_that_is_a_folder_or_a_device_is_refused(call, tmp_path):
    for place, says in ((tmp_path, "is a folder"), (Path("/dev/null"), "is no ordinary file")):
        status, out, err = call("bench", COMMITTED, "--json", place)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert f"{place}: {says}" in err
    assert not Path("/dev/null").is_file()


def test_a_wrong_file_is_told_before_torch_is_imported(tmp_path):
    (tmp_path / "text.pth").write_text("no model")
    code = (
        "import sys\nfrom micronet import cli\n"
        "for command in sys.argv[1].split(';'):\n"
        "    sys.argv = ['micronet', *command.split()]\n"
        "    try:\n        cli.main()\n    except SystemExit as end:\n        assert end.code == 1\n"
        "assert 'torch' not in sys.modules\n"
    )
    looking = ("score", "evaluate", "predict", "bench", "sensitivity")
    lines = ";".join(" ".join(COMMANDS[name]).replace("MODEL", str(tmp_path / "text.pth")) for name in looking)
    done = subprocess.run([sys.executable, "-c", code, lines], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert len(said) == len(looking)
    assert all(re.search(r"text\.pth: not a model file of micronet \(.*\); it looks like text$", line) for line in said)
