"""Packed files that were damaged, or made to do harm: one line each, no memory blown up, no code run."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save as serialise
from test_pack import bundled, masked, quantised

from micronet import MicronetError, load
from micronet.bundle import save
from micronet.entropy import Decoder
from micronet.model_source import open_model
from micronet.models import separable_net
from micronet.pack import pack
from micronet.unpack import Packed, digest, is_packed, read

fuzzed = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SMALL = {"num_classes": 3, "width_multiplier": 0.125}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small packed files: numbers with masks, codes with masks, the latter entropy-coded."""
    folder = tmp_path_factory.mktemp("files")
    sparse, both = (masked(bundled(separable_net, **SMALL), 0.6) for _ in range(2))
    pack(sparse, folder / "sparse.safetensors")
    pack(quantised(both, 4), folder / "codes.safetensors")
    pack(both, folder / "coded.safetensors", coded=True)
    return folder


def refused(path: Path) -> str:
    """The line that a file is refused with."""
    with pytest.raises(MicronetError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def read_or_line(path: Path) -> Packed | str:
    """What a file holds, or the line that it is refused with; anything else fails the test."""
    try:
        return read(path)
    except MicronetError as error:
        return str(error)


def rewritten(source: Path, target: Path, change) -> Path:
    """A file with other content, and a digest that is right again: made on purpose."""
    with safe_open(source, framework="numpy") as file:
        content = json.loads(file.metadata()["micronet"])
        names = list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    content = change(content, tensors) or content
    text = content if isinstance(content, str) else json.dumps(content)
    target.write_bytes(serialise(tensors, {"micronet": text, "sha256": digest(text, tensors)}))
    return target


@pytest.mark.parametrize("name", ["sparse", "codes", "coded"])
def test_a_file_cut_off_anywhere_is_refused(files, name, tmp_path):
    data = (files / f"{name}.safetensors").read_bytes()
    for length in (0, 1, 8, 9, 500, len(data) // 2, len(data) - 1):
        (tmp_path / "a.safetensors").write_bytes(data[:length])
        refused(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(data + b"\0")
    refused(tmp_path / "a.safetensors")


def test_files_of_others(files, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(serialise({"model.layers.0.weight": np.zeros((4, 4), np.float16)}, {"format": "pt"}))
    assert "not one that `micronet pack` wrote (it holds model.layers.0.weight)" in refused(path)
    save(load(files / "sparse.safetensors"), path)
    assert "not a safetensors file, as `micronet pack` writes them; it looks like a zip" in refused(path)
    path.write_bytes(b"")
    assert "not a safetensors file" in refused(path)
    assert "no such file" in refused(tmp_path / "none.safetensors")
    assert "is a folder" in refused(tmp_path)
    assert not is_packed(Path(__file__))
    assert not is_packed(tmp_path / "none.pth")
    # A packed file under another name is one all the same.
    path.with_suffix(".pth").write_bytes((files / "sparse.safetensors").read_bytes())
    assert load(path.with_suffix(".pth")).classes == ("0", "1", "2")
    assert open_model(path.with_suffix(".pth")).masks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.update(version=2), "format version 2, this micronet reads 1"),
        (lambda c, t: c.update(version=True), "format version True"),
        (lambda c, t: c.update(format="other"), "not one that `micronet pack` wrote"),
        (lambda c, t: "[" * 100_000, "not JSON"),
        (lambda c, t: '{"format": "micronet packed", "version": ' + "9" * 5000 + "}", "not JSON"),
        (lambda c, t: "{", "not JSON"),
        (
            lambda c, t: c.update(factory="os:system", kwargs={"command": "touch /tmp/x"}),
            "is not a network of micronet",
        ),
        (lambda c, t: c.update(factory="micronet.pack:pack"), "is not a network of micronet"),
        (
            lambda c, t: c["kwargs"].update(weights="x") or c.update(factory="torchvision.models.resnet:resnet18"),
            "fetch",
        ),
        (lambda c, t: c.update(edits=[{"edit": "exec"}]), "does not have"),
        (lambda c, t: c.update(edits=[{"edit": "channel_affine", "layers": ["conv1"]}]), "does not fit"),
        (lambda c, t: c.update(kwargs={"num_classes": 3, "width_multiplier": 100}), "more than"),
        (lambda c, t: c.update(kwargs={"num_classes": 10**15, "width_multiplier": 1}), "more than"),
        (
            lambda c, t: (
                c.update(factory="micronet.models.wide_resnet:wide_resnet", edits=[], widths={})
                or c.update(kwargs={"num_classes": 3, "depth": 6 * 10**9 + 4})
            ),
            "more than 10,000 parameter tensors",
        ),
        (lambda c, t: c.update(unread=sorted(set(t) - set(c["sparse"]))), "surplus"),
        (lambda c, t: c.update(sparse=["none"]), "does not have"),
        (lambda c, t: c.update(sparse=[]), "not float32 of"),
        (lambda c, t: c.update(float_bits=16), "keeps"),
        (lambda c, t: c.update(float_bits=8), "fields are not"),
        (lambda c, t: c.update(codes={c["sparse"][0]: 4}), "are not"),
        (lambda c, t: c.update(codes={c["sparse"][0]: 9}), "fields are not"),
        (lambda c, t: c.update(tied={c["sparse"][0]: "none"}), "names arrays"),
        (lambda c, t: c.update(kept=["none"]), "no none"),
        (lambda c, t: c.update(coded=[c["sparse"][0]]), "what is coded is not"),
        (lambda c, t: t.update({c["sparse"][0]: t[c["sparse"][0]][:-1]}), "keeps"),
        (lambda c, t: t.update({c["sparse"][0]: t[c["sparse"][0]][:2]}), "can't hold a mask"),
        (lambda c, t: t.update({c["sparse"][0]: np.zeros(3, np.int64)}), "not a string of bits"),
        (lambda c, t: t.update(more=np.zeros(3, np.float32)), "surplus"),
        (lambda c, t: t.pop(c["sparse"][0]) is None, "missing"),
        (lambda c, t: c.update(std=[0.0, 1.0, 1.0]), "fields are not"),
        (lambda c, t: c.update(classes=3), "classes is not a list"),
    ],
)
def test_what_a_file_says_on_purpose(files, change, message, tmp_path):
    path = rewritten(files / "sparse.safetensors", tmp_path / "a.safetensors", lambda c, t: _only(change(c, t)))
    assert message in refused(path)


def _only(value):
    """What a change gives where it is a whole text: `dict.update` gives nothing."""
    return value if isinstance(value, str) else None


def test_codes_that_lie(files, tmp_path):
    path = tmp_path / "a.safetensors"
    for name, change, message in (
        ("codes", lambda c, t: c["codes"].update({next(iter(c["codes"])): 3}), "are not"),
        ("codes", lambda c, t: c.update(codes={}), "behind its mask"),
        ("codes", lambda c, t: c["codes"].update({n: 4 for n in t if n.endswith("bias")}), "not a string of bits"),
        ("coded", lambda c, t: t.pop("__coded__") is None, "what is coded is not"),
        ("coded", lambda c, t: t.update(__coded__=t["__coded__"][:-1]), "whole words"),
        ("coded", lambda c, t: c.update(coded=c["coded"] * 2), "what is coded is not"),
        ("coded", lambda c, t: c.update(coded=c["coded"][:1]), "missing"),
    ):
        rewritten(files / f"{name}.safetensors", path, lambda c, t, change=change: _only(change(c, t)))
        assert message in refused(path)


def test_a_decoder_that_makes_others_of_the_same_bytes_is_found_out(files, tmp_path, monkeypatch):
    """As another version of the package that codes could: all bytes are right, the last code is not."""
    old = rewritten(files / "coded.safetensors", tmp_path / "old.safetensors", lambda c, t: c.pop("decoded") and None)
    right, original = read(files / "coded.safetensors").bundle.model.state_dict(), Decoder.codes
    assert same_network(read(old), right)
    with monkeypatch.context() as patch:

        def others(self, count, bits):
            taken = self._decoded
            self._decoded = lambda model, given: taken(model, given) ^ 1
            try:
                return original(self, count, bits)
            finally:
                self._decoded = taken

        patch.setattr(Decoder, "codes", others)
        assert not same_network(read(old), right)
        assert "decoded to others than were written" in refused(files / "coded.safetensors")
    assert same_network(read(files / "coded.safetensors"), right)


def same_network(packed: Packed, state: dict) -> bool:
    return all(torch.equal(value, state[name]) for name, value in packed.bundle.model.state_dict().items())


def raw(tensors: dict, metadata: dict, data: bytes = b"") -> bytes:
    header = json.dumps({"__metadata__": metadata, **tensors}).encode()
    return struct.pack("<Q", len(header)) + header + data


def test_headers_that_claim_what_is_not_there(files, tmp_path):
    path = tmp_path / "a.safetensors"
    with safe_open(files / "sparse.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    for tensor in (
        {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]},
        {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]},
        {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
    ):
        path.write_bytes(raw({"conv": tensor}, metadata, bytes(8)))
        refused(path)
    for length in (0, 2**63, 2**64 - 1, 10**9):
        path.write_bytes(struct.pack("<Q", length) + b"{" + bytes(100))
        refused(path)
    path.write_bytes(struct.pack("<Q", 40_000_000) + b"{" + b" " * 40_000_000)
    assert "at most" in refused(path)


@pytest.fixture(scope="module")
def answers(files):
    """What the whole files answer."""
    images, found = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), {}
    for name in ("sparse", "codes", "coded"):
        with torch.no_grad():
            found[name] = load(files / f"{name}.safetensors").model(images)
    return images, found


@fuzzed
@given(
    st.sampled_from(("sparse", "codes", "coded")),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255), st.sampled_from("xid")), min_size=1, max_size=3),
    st.booleans(),
)
def test_any_damage_is_refused_or_does_no_harm(files, answers, name, damage, front):
    data = bytearray((files / f"{name}.safetensors").read_bytes())
    end = 8 + struct.unpack("<Q", data[:8])[0] if front else len(data)
    for share, byte, kind in damage:
        place = min(int(share * end), len(data) - 1)
        if kind == "x":
            data[place] ^= byte
        else:
            data[place : place + (kind == "d")] = b"" if kind == "d" else bytes([byte])
    path = files / "damaged.bin.safetensors"
    path.write_bytes(data)
    found = read_or_line(path)
    if isinstance(found, str):
        assert "\n" not in found
    else:
        with torch.no_grad():
            assert torch.equal(found.bundle.model(answers[0]), answers[1][name])


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@fuzzed
@given(st.sampled_from(("sparse", "codes", "coded")), st.data())
def test_any_header_is_refused_or_is_a_network(files, name, data):
    def change(content, tensors):
        place, key = content, data.draw(st.sampled_from(sorted(content)))
        while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
            place = place[key]
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        place[key] = data.draw(plain)

    path = rewritten(files / f"{name}.safetensors", files / "header.safetensors", change)
    found = read_or_line(path)
    assert not isinstance(found, str) or "\n" not in found
