"""ONNX files that are broken, or keep their data elsewhere: one clear line, or what lies in their own folder."""

import contextlib

import numpy as np
import pytest
from onnx import TensorProto
from onnx_graphs import FLATTENED, F, node, ones, random, save

from micronet import MicronetError
from micronet.onnx_cost import read_onnx


@pytest.fixture
def read(tmp_path):
    """Write a graph and read it."""

    def made(*nodes, size=None, **arguments):
        return read_onnx(save(tmp_path / "made.onnx", nodes, **arguments), size)

    return made


def test_a_file_that_is_not_onnx_or_not_whole_is_one_clear_line(tmp_path):
    whole = save(tmp_path / "whole.onnx", [node("Conv", "x w")], w=ones(5, 3, 3, 3)).read_bytes()
    wrong = {"empty": b"", "text": b"a model\n" * 50, "short": whole[: len(whole) // 2], "shorter": whole[:-60]}
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)
    for name in (*wrong, "missing", "."):
        with pytest.raises(
            MicronetError, match=f"^{tmp_path}.*(not an ONNX file|No such file|Is a directory).*; "
        ) as told:
            read_onnx(tmp_path / name)
        assert "\n" not in str(told.value)


def test_a_node_that_reads_nothing_or_lacks_what_it_must_have_is_named(read):
    with pytest.raises(MicronetError, match=r"made.onnx: Relu reads 'nowhere', which nothing gives; "):
        read(node("Relu", "nowhere"))
    with pytest.raises(MicronetError, match=r"made.onnx: .*Transpose"):
        read(node("Transpose", "x", perm=[0, 9, 1, 2]))
    with pytest.raises(MicronetError, match=r"made.onnx: .*GroupNormalization .*num_groups"):
        read(node("GroupNormalization", "x s s"), opset=21, s=ones(3))


def test_no_wrong_byte_of_a_file_makes_more_than_a_clear_line(tmp_path):
    content = save(tmp_path / "m.onnx", FLATTENED, zero=np.int64(0), axis=[0], rest=[-1]).read_bytes()
    for place in range(0, len(content), 3):
        changed = bytearray(content)
        changed[place] ^= 0x55
        (tmp_path / "changed.onnx").write_bytes(changed)
        with contextlib.suppress(MicronetError):
            read_onnx(tmp_path / "changed.onnx")


@pytest.fixture
def split(tmp_path):
    """A network in a folder of its own, its weights in a second file: as it is saved, or said to lie elsewhere."""

    def made(location="weights.bin", place=None, length=5 * 3 * 9 * 4):
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        weight = TensorProto(name="w", data_type=F, dims=(5, 3, 3, 3), data_location=TensorProto.EXTERNAL)
        for key, value in (("location", location), ("offset", "8"), ("length", str(length))):
            weight.external_data.add(key=key, value=value)
        raw = random(5, 3, 3, 3)
        raw[0] = 0
        (folder / (place or location)).write_bytes(b"12345678" + raw.tobytes())
        return save(folder / "m.onnx", [node("Conv", "x w")], w=weight)

    return made


def test_weights_in_a_second_file_are_read_from_its_own_folder(split):
    (conv,) = read_onnx(split()).nodes
    assert (conv.inputs[1].shape, conv.inputs[1].nonzero()) == ((5, 3, 3, 3), 4 * 27)


def test_weights_outside_the_files_own_folder_are_not_read(split, tmp_path):
    for location, place in (("../outside.bin", None), (str(tmp_path / "outside.bin"), None), ("a/../w.bin", "w.bin")):
        with pytest.raises(MicronetError, match="'w' lies outside the file's own folder"):
            read_onnx(split(location, place))
    path = split("link.bin", "inside.bin")
    (tmp_path / "outside.bin").write_bytes(bytes(1000))
    (path.parent / "link.bin").symlink_to(tmp_path / "outside.bin")
    with pytest.raises(MicronetError, match="'w' lies outside the file's own folder"):
        read_onnx(path)


def test_a_second_file_that_is_missing_or_short_is_named(split):
    path = split("there.bin")
    (path.parent / "there.bin").unlink()
    with pytest.raises(MicronetError, match=r"m.onnx: 'there.bin', the file with the data of 'w', is missing; "):
        read_onnx(path)
    (path.parent / "there.bin").write_bytes(bytes(100))
    with pytest.raises(MicronetError, match=r"m.onnx: 'w' is cut short in 'there.bin'; "):
        read_onnx(path)


def test_an_array_that_is_shorter_than_it_says_is_named_when_it_is_read(tmp_path):
    weight = TensorProto(name="w", data_type=F, dims=(5, 3, 9, 9), raw_data=bytes(100))
    (conv,) = read_onnx(save(tmp_path / "m.onnx", [node("Conv", "x w")], shape=("N", 3, 9, 9), w=weight)).nodes
    with pytest.raises(MicronetError, match=r"m.onnx: 'w' cannot be read: .*; "):
        conv.inputs[1].nonzero()
