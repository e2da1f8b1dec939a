"""`micronet quantize`: what it keeps, what it prints, what it refuses."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import micronet.quantize as module
from callbacks.calibrate_onnx import calibrated
from callbacks.fake_quantize import quantise_layer
from callbacks.onnx_export import export_onnx
from callbacks.processor import int8_note
from callbacks.sparsify import Sparsify
from micronet import Fit, Recipe, RunOptions, load, machine, run
from micronet.bundle import save
from micronet.data import digits, plain_loader
from micronet.evaluate import evaluate
from micronet.gate_images import Floats
from micronet.measure import OnnxModule
from micronet.models import separable_net
from micronet.onnx_meta import read_meta
from micronet.score import score

NETWORK = partial(separable_net, width_multiplier=0.25)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small network trained for some seconds, then half of it zeros."""
    folder = tmp_path_factory.mktemp("run")
    sparse = Fit("sparse", epochs=1, lr=0.01, cbs=(partial(Sparsify, 0.5),))
    stages = (Fit("train", epochs=3, lr=0.1), sparse)
    run(Recipe(partial(digits, batch_size=16), NETWORK, stages), folder, RunOptions(limit=320))
    return folder / "2-sparse" / "model.pth"


@pytest.fixture(autouse=True, scope="module")
def exported_once():
    """Torch's exporter takes seconds, and most tests here write the same network."""
    made = {}

    def once(network, size):
        key = sum(float(p.detach().double().sum()) for p in network.parameters())
        if key not in made:
            made[key] = export_onnx(network, size).SerializeToString()
        return onnx.load_from_string(made[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "export_onnx", once)
        yield


@pytest.fixture(scope="module")
def small(trained, tmp_path_factory):
    """The int8 file of it, with what was printed as a dict."""
    from micronet.cli_options import split_of
    from micronet.measure import images_for
    from micronet.model_source import open_model
    from micronet.quantize import Int8, to_int8

    path = tmp_path_factory.mktemp("int8") / "small.onnx"
    source = open_model(str(trained))
    data = images_for(source, "digits", **split_of(source, trained, "digits", "valid"))
    return to_int8(source, path, data, Int8(images=100, seed=3), floor=100)


def test_the_counts_are_those_of_the_file_on_the_validation_split(small, trained):
    data = digits()
    found = evaluate(OnnxModule(small.path), plain_loader(data.valid, data))
    before = evaluate(load(trained).model, plain_loader(data.valid, data))
    assert (small.parity.after, small.parity.images) == (found.top1_count, len(data.valid))
    assert small.parity.before == before.top1_count
    assert small.parity.agreeing == small.parity.images - len(small.parity.disagreeing)
    assert small.bytes == small.path.stat().st_size
    stripped = onnx.load(small.path)
    del stripped.metadata_props[:]
    assert small.graph_bytes == stripped.ByteSize()


def test_the_file_says_what_an_exported_one_says_and_how_it_was_made(small):
    meta = read_meta(small.path)
    assert meta.classes == digits().classes
    assert meta.gate["right"] == small.parity.after
    here = machine.hardware("cpu")
    assert (meta.gate["cpu"], meta.gate["instruction_sets"]) == (here["cpu"], here["instruction_sets"])
    assert meta.gate["runtime"] == f"onnxruntime {onnxruntime.__version__}"
    assert meta.score["params"] > 0
    assert meta.provenance["int8"] == {
        "images": 100,
        "calibrate": "train",
        "seed": 3,
        "method": "minmax",
        "keep_float": [],
        "reduce_range": False,
    }
    assert {line.weight_bits for line in score(small.path).lines if line.weights} == {8}


def test_masked_zeros_are_codes_of_zero_and_it_is_said(small, trained):
    zeros = sum(int((~mask).sum()) for mask in load(trained).masks.values())
    codes = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(small.path).graph.initializer]
    assert sum(int((part == 0).sum()) for part in codes if part.dtype == np.int8) >= zeros > 1000
    assert any(f"{zeros:,} zeros of its masks are codes of 0, a byte each" in note for note in small.notes)


def test_the_command_prints_and_writes_what_was_measured(call, trained, tmp_path):
    out, told = tmp_path / "m.onnx", tmp_path / "m.json"
    arguments = ("--rank", "--keep-float", "1", "--floor", "100", "-o", out, "--json", told)
    status, printed, err = call("quantize", trained, *arguments)
    assert (status, err) == (0, "")
    found = json.loads(told.read_text())
    printed = " ".join(printed.split())
    assert f"{out}: {out.stat().st_size:,} bytes" in printed
    assert f"right on {found['parity']['after']:,}, in float32 on {found['parity']['before']:,}" in printed
    assert f"calibrated on {min(512, len(digits().train)):,} images of train (seed 0, minmax)" in printed
    assert len(found["parity"]["disagreeing"]) == found["parity"]["images"] - found["parity"]["agreeing"]
    noise = found["ranking"]["noise"]
    assert [layer["snr_db"] for layer in noise] == sorted(layer["snr_db"] for layer in noise)
    assert found["how"]["keep_float"] == [noise[0]["layer"]]
    assert f"in float: {noise[0]['layer']}" in printed
    assert list(found["ranking"]["confirmed"]) == [layer["layer"] for layer in noise[:3]]
    assert "exact McNemar" in printed


def test_a_loss_beyond_the_floor_keeps_no_file(call, trained, tmp_path, monkeypatch):
    def spoilt(calibration, kept, reduce_range):
        for name in calibration.ranges:
            calibration.ranges[name] = (0.0, 1e-3)
        return real(calibration, kept, reduce_range=reduce_range)

    real = module.quantize
    monkeypatch.setattr(module, "quantize", spoilt)
    (tmp_path / "old.onnx").write_text("the old file")
    status, _, err = call("quantize", trained, "-o", tmp_path / "old.onnx")
    assert status == 1
    assert "points, at most 1 are allowed (--floor); no file was kept" in err
    assert err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["old.onnx"]
    assert (tmp_path / "old.onnx").read_text() == "the old file"


@pytest.mark.parametrize("compute", [False, True])
def test_16_bits(call, trained, tmp_path, compute):
    out = tmp_path / "m.onnx"
    more = ("--compute", "float16") if compute else ()
    status, printed, err = call("quantize", trained, "--to", "float16", *more, "-o", out)
    assert (status, err) == (0, "")
    data = digits()
    found = evaluate(OnnxModule(out), plain_loader(data.valid, data))
    assert f"right on {found.top1_count:,}" in printed
    assert read_meta(out).provenance["float16"] == {"compute": "float16" if compute else "float32"}
    assert ("float16 kernels for this CPU" in printed or "in float16 here" in printed) == compute


def test_8_bit_storage(call, trained, tmp_path):
    out = tmp_path / "m.pth"
    status, printed, err = call("quantize", trained, "--to", "minmax8", "-o", out, "--json", tmp_path / "m.json")
    assert (status, err) == (0, "")
    told, data = json.loads((tmp_path / "m.json").read_text()), digits()
    coded = load(out)
    assert told["parity"]["after"] == evaluate(coded.model, plain_loader(data.valid, data)).top1_count
    name, lost = told["worst"]
    before, after = (bundle.model.state_dict()[name].double() for bundle in (load(trained), coded))
    assert lost == pytest.approx(float((after - before).norm() / before.norm()))
    assert f"the tensor that lost most: {name}" in printed
    assert coded.masks.keys() == load(trained).masks.keys()
    assert out.stat().st_size < trained.stat().st_size / 2
    save(load(trained), tmp_path / "f.pth")
    assert (told["graph_bytes"], told["float_bytes"]) == (out.stat().st_size, (tmp_path / "f.pth").stat().st_size)
    ratio = f"{told['float_bytes'] / told['graph_bytes']:.2f} times smaller"
    assert f"such a file: {told['graph_bytes']:,} bytes, {told['float_bytes']:,} in float32: {ratio}" in printed


def test_8_bit_storage_that_loses_too_much_keeps_no_file(call, trained, tmp_path):
    bundle = load(trained)
    conv = next(layer for layer in bundle.model.modules() if isinstance(layer, nn.Conv2d))
    norm = next(layer for layer in bundle.model.modules() if isinstance(layer, nn.BatchNorm2d))
    with torch.no_grad():  # one filter so large that all others get the same codes; BatchNorm makes it as it was
        for values, factor in ((conv.weight, 1e4), (norm.running_mean, 1e4), (norm.running_var, 1e8)):
            values[0] *= factor
    save(bundle, tmp_path / "spoilt.pth")
    right = [
        evaluate(load(file).model, plain_loader(digits().valid, digits()))
        for file in (trained, tmp_path / "spoilt.pth")
    ]
    assert abs(right[0].top1_count - right[1].top1_count) <= 1
    for more, said in (
        ((), "points, at most 1 are allowed (--floor); no file was kept"),
        (("--floor", "20", "--agreement", "0.95"), "no file was kept"),
    ):
        status, _, err = call("quantize", tmp_path / "spoilt.pth", "--to", "minmax8", *more)
        assert (status, err.count("\n"), said in err) == (1, 1, True)
        assert [file.name for file in tmp_path.iterdir()] == ["spoilt.pth"]


def test_other_classes_keep_no_file_however_seldom_the_network_is_right(call, trained, tmp_path, monkeypatch):
    """One that names the least likely class is right on next to none, and can't lose much: of no class is it right."""
    bundle, out = load(trained), tmp_path / "m.onnx"
    with torch.no_grad():
        bundle.model.fc.weight.neg_()
        bundle.model.fc.bias.neg_()
    save(bundle, tmp_path / "m.pth")

    def rolled(calibration, kept, reduce_range):
        proto = onnx.ModelProto()
        proto.CopyFrom(calibration.proto)
        for tensor in proto.graph.initializer:
            if tensor.name.startswith("fc."):
                array = np.roll(onnx.numpy_helper.to_array(tensor), 3, 0)
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        return proto

    monkeypatch.setattr(module, "quantize", rolled)
    status, _, err = call("quantize", tmp_path / "m.pth", "-o", out, "--floor", "20")
    assert (status, err.count("\n")) == (1, 1)
    assert "at least 80 % must agree (--agreement); no file was kept" in err
    assert not out.exists()
    arguments = ("-o", out, "--floor", "20", "--agreement", "0", "--json", tmp_path / "m.json")
    status, printed, _ = call("quantize", tmp_path / "m.pth", *arguments)
    named = json.loads((tmp_path / "m.json").read_text())["parity"]["disagreeing"]
    assert status == 0
    shown = ", ".join(map(str, named[:5]))
    assert f"another class: {len(named):,} (images {shown}, ..., counted from 0)" in printed


class Largest(TorchDispatchMode):
    """Notes the most images that torch holds as floats at a time."""

    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.is_floating_point() and found.shape[1:] == (3, 32, 32):
            self.seen = max(self.seen, len(found))
        return found


@pytest.mark.parametrize(
    "arguments",
    [("float16",), ("minmax8",), ("int8", "--rank", "--images", "1000", "--method", "entropy", "--floor", "100")],
    ids=lambda arguments: arguments[0],
)
def test_the_images_are_scaled_some_at_a_time(call, trained, tmp_path, arguments):
    """50,000 images of 224 pixels take 30 GB as float32."""
    assert min(len(digits().valid), len(digits().train)) > 128
    out = tmp_path / f"m.{'pth' if arguments[0] == 'minmax8' else 'onnx'}"
    with Largest() as largest:
        assert call("quantize", trained, "--to", *arguments, "-o", out)[0] == 0
    assert 0 < largest.seen <= 128


def test_a_ranking_holds_as_few_images_as_tell_layers_apart(trained, monkeypatch):
    """However many are to confirm it: here all validation images are, of which a batch is made at a time."""
    held = []
    real = Floats.__getitem__
    monkeypatch.setattr(Floats, "__getitem__", lambda self, part: held.append(part) or real(self, part))
    calibration = calibrated(module.export_onnx(load(trained).model, (3, 32, 32)), np.zeros((1, 3, 32, 32), np.float32))
    found = module._ranked(calibration, digits(), False)
    assert {test.images for test in found.confirmed.values()} == {len(digits().valid)} != {found.images}
    assert found.images == min(128, 4096 // len(calibration.layers))
    assert max(part.stop - part.start for part in held) <= 64


SHORT = "processor\t: 0\nmodel name\t: An old one\nflags\t\t: fpu avx2 avx512f\n"


@pytest.mark.parametrize("reduced", [False, True])
def test_a_processor_of_short_sums_is_said_and_stands_in_the_file(call, trained, tmp_path, reduced, monkeypatch):
    (tmp_path / "cpuinfo").write_text(SHORT)
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    out, more = tmp_path / "m.onnx", ("--reduce-range",) if reduced else ()
    status, printed, err = call("quantize", trained, "--floor", "100", "-o", out, *more)
    assert (status, err) == (0, "")
    printed = " ".join(printed.split())
    assert printed.count("this CPU has no dot products of 8-bit numbers (AVX512-VNNI, AVX-VNNI, AMX): ") == 1
    assert ("16-bit sums saturate" in printed, "--reduce-range avoids that" in printed) == (not reduced, not reduced)
    assert ("; weights of 7 bits" in printed, "16-bit sums hold weights of 7 bits" in printed) == (reduced, reduced)
    meta = read_meta(out)
    assert (meta.gate["cpu"], meta.gate["instruction_sets"]) == ("An old one", ["avx2", "avx512f"])
    assert meta.provenance["int8"]["reduce_range"] == reduced
    codes = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(out).graph.initializer]
    assert max(int(np.abs(part.astype(int)).max()) for part in codes if part.dtype == np.int8) == (
        64 if reduced else 127
    )


@pytest.mark.parametrize(
    ("flags", "kind", "says"),
    [
        ("avx2 avx_vnni", "x86_64", ""),
        ("asimd asimddp", "aarch64", ""),
        (
            "asimd",
            "aarch64",
            "this CPU has no dot products of 8-bit numbers (asimddp): int8 may be no faster than float",
        ),
        ("", "arm64", ""),  # as on a Mac, whose processors have them
        ("", "AMD64", "whether this CPU has dot products of 8-bit numbers (AVX512-VNNI, AVX-VNNI, AMX) is not known"),
    ],
)
def test_what_is_said_of_a_processor(flags, kind, says, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: kind)
    found = int8_note(set(flags.split()), "")
    assert found.startswith(says)
    assert bool(found) == bool(says)


def test_a_wrong_name_is_found_before_an_image_is_read(call, trained, tmp_path, monkeypatch):
    def read(*_, **__):
        raise AssertionError("images were read")

    monkeypatch.setattr("micronet.measure.images_for", read)
    status, _, err = call("quantize", trained, "--keep-float", "fc,fcc", "-o", tmp_path / "m.onnx")
    assert (status, err.count("\n")) == (1, 1)
    assert f"{trained}: keep_float: no layer 'fcc'; near it: fc (" in err


def test_weights_that_are_8_bits_already_are_not_taken_for_those_that_were_trained(call, trained, tmp_path):
    stored = tmp_path / "stored.pth"
    save(load(trained), stored, dtype=torch.uint8)
    status, _, err = call("quantize", stored, "--to", "minmax8", "-o", tmp_path / "again.pth")
    assert (status, err.count("\n")) == (1, 1)
    assert f"{stored}: its weights are stored in 8 bits already (minmax8)" in err
    assert not (tmp_path / "again.pth").exists()
    status, printed, _ = call("quantize", stored, "--to", "float16", "-o", tmp_path / "m.onnx", "--floor", "100")
    assert status == 0
    assert "stores weights rounded to 8 bits (minmax8): in float32 means these" in " ".join(printed.split())


def test_validation_images_that_are_the_test_images_measure_nothing(trained):
    from micronet import MicronetError

    with pytest.raises(MicronetError, match="its validation images are the test images"):
        module.validation(digits(valid="test"))


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("--to", "int4"), 2, "--to must be one of int8, float16, minmax8"),
        (("--calibrate", "test"), 2, "--calibrate must be train or valid, got 'test'"),
        (("--agreement", "1.5"), 2, "--agreement"),
        (("--method", "mean"), 2, "--method must be minmax, entropy or percentile"),
        (("--to", "float16", "--seed", "1"), 2, "--seed is for --to int8"),
        (("--to", "minmax8", "--rank"), 2, "--rank is for --to int8"),
        (("--to", "float16", "--reduce-range"), 2, "--reduce-range is for --to int8"),
        (("--compute", "float16"), 2, "is for --to float16"),
        (("-o", "m.pth"), 2, "the name of such a file ends in .onnx"),
        (("--to", "minmax8", "-o", "SELF"), 1, "is what is read; name another file with -o"),
        (("-o", "no/such/m.onnx"), 1, "no/such: no such folder to write m.onnx to"),
        (("--keep-float", "conv9"), 1, "keep_float: no layer 'conv9'"),
        (("--data", "nowhere"), 1, "no data set 'nowhere'"),
    ],
)
def test_what_is_wrong_is_one_line(call, trained, arguments, status, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [trained if argument == "SELF" else argument for argument in arguments]
    found, _, err = call("quantize", trained, *given)
    assert found == status
    assert says in " ".join(err.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []
    assert not [file for file in trained.parent.iterdir() if "int8" in file.name]


@pytest.mark.parametrize("to", ["int8", "float16", "minmax8"])
def test_what_was_trained_with_quantised_weights_is_refused(call, trained, tmp_path, to):
    bundle = load(trained)
    quantise_layer(bundle.model.get_submodule("fc"), 4, 4, False)
    save(bundle, tmp_path / "m.pth")
    status, _, err = call("quantize", tmp_path / "m.pth", "--to", to)
    assert (status, err.count("\n")) == (1, 1)
    assert "was trained with quantised weights (1 layers): `micronet export` writes them" in err
    assert [file.name for file in tmp_path.iterdir()] == ["m.pth"]


def test_other_files_than_a_bundle_are_one_line(call, small, trained, tmp_path):
    status, _, err = call("quantize", small.path, "--data", "digits")
    assert (status, err.count("\n")) == (1, 1)
    assert "is an ONNX file, quantised or not; give the model.pth that it came from" in err
    bundle = replace(load(trained), provenance={})
    save(bundle, tmp_path / "m.pth")
    status, _, err = call("quantize", tmp_path / "m.pth")
    assert (status, err.count("\n")) == (1, 1)
    assert "does not say which images it was trained on" in err
    assert "--data" in err
