"""`micronet export` of networks that were trained with quantised layers: codes, kernels, ledger, gate."""

import json
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from test_quant_onnx import COUNTED

import micronet.export_quantised as module
from callbacks.fake_quantize import quantised_layers
from callbacks.integer_kernels import integer_kernels
from callbacks.onnx_export import deployed, export_onnx
from callbacks.onnx_run import Kernels
from callbacks.quant_aware import QuantAware
from micronet import Fit, MicronetError, Recipe, RunOptions, load, run
from micronet.bundle import save
from micronet.cli_export import _quantised_lines
from micronet.data import digits, plain_loader
from micronet.deploy import check_zeros
from micronet.evaluate import evaluate
from micronet.measure import OnnxModule
from micronet.models import separable_net
from micronet.onnx_meta import read_meta
from micronet.parity import compare
from micronet.score import score

COMMITTED = Path(__file__).parent / "data" / "resnet20_cifar10.pth"
NETWORK = partial(separable_net, width_multiplier=0.25)
SIZE = (3, 32, 32)
NARROW = ("INT4", "INT8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small network that was trained for some seconds at 4 bits, its linear layer's weights at 4, too."""
    folder = tmp_path_factory.mktemp("run")
    quantise = partial(QuantAware, 4, 4, own={"fc": (4, 8)}, images=128, norm_images=256)
    stages = (Fit("bits", epochs=6, lr=0.1, cbs=(quantise,)),)
    run(Recipe(partial(digits, batch_size=32, valid=0.2), NETWORK, stages), folder, RunOptions(limit=640))
    return folder / "1-bits" / "model.pth"


@pytest.fixture(autouse=True, scope="module")
def exported_once():
    """Torch's exporter takes seconds, and the tests here write one network in two ways."""
    made = {}

    def once(network, size, *, int4=False):
        if int4 not in made:
            made[int4] = export_onnx(network, size, int4=int4).SerializeToString()
        return onnx.load_from_string(made[int4])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "export_onnx", once)
        yield


@pytest.fixture(scope="module")
def said(trained, tmp_path_factory):
    """What the command prints, and the files: of 8 bits, of 4, normalising."""
    from typer.testing import CliRunner

    from micronet.cli import app

    place, told = tmp_path_factory.mktemp("files"), {}
    for name, options in {"int8": (), "int4": ("--int4",), "inside": ("--normalise",)}.items():
        done = CliRunner().invoke(app, ["export", str(trained), "-o", str(place / f"{name}.onnx"), *options])
        assert done.exit_code == 0, done.output
        told[name] = done.output
    return place, told


def kinds(path):
    """Types of the tensors that are codes of weights, by name."""
    found = {}
    for tensor in onnx.load(path).graph.initializer:
        if tensor.name.endswith((".weight", ".packed")):
            found[tensor.name.removesuffix(".packed")] = TensorProto.DataType.Name(tensor.data_type)
    return found


def test_by_default_it_runs_on_integers_and_says_what_it_holds(said, trained):
    place, told = said
    layers = quantised_layers(load(trained).model)
    ledger = score(place / "int8.onnx").ledger
    widths = {line.weight_bits for line in ledger.lines if line.weights}
    assert widths == {4, 8}  # 4: the linear layer
    convs = len(layers) - 1
    assert f"{convs} of {convs} convolutions with integers" in told["int8"]
    assert "on weights of 4 bits (MatMulNBits)" in told["int8"]
    assert "narrower codes of convolutions are stored in 8 bits" in told["int8"]
    assert "--int4 stores 4 bits, and is several times slower" in told["int8"]
    words = score(place / "int8.onnx").storage, score(trained).storage
    assert f"storage by its own ledger {words[0]:,.0f} words, MODEL's {words[1]:,.0f}" in told["int8"]
    assert words[0] > 1.2 * words[1]
    sparse = sum(array.role == "weight" and array.stored(array.bits)[1] < 1 for array in ledger.arrays)
    said = f"its ledger takes {sparse} of {len(layers)} layers for sparse, where a bit for each weight and the codes"
    assert (said in told["int8"]) == (sparse > 0)
    assert "of MODEL's masks" not in told["int8"]


def test_zeros_of_masks_are_explained_below_the_storage_that_counts_them(call, trained, tmp_path):
    bundle = load(trained)
    with torch.no_grad():
        for name, layer in quantised_layers(bundle.model).items():
            if name != "fc":
                bundle.masks[f"{name}.weight"] = torch.rand(layer.weight.shape) > 0.8
                layer.weight.mul_(bundle.masks[f"{name}.weight"])
    save(bundle, tmp_path / "m.pth")
    zeros = sum(int((~mask).sum()) for mask in bundle.masks.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "export_onnx", export_onnx)  # the fixture's is of another network
        status, out, err = call("export", tmp_path / "m.pth", "--floor", "0", "--images", "50")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    (at,) = (place for place, line in enumerate(lines) if line.startswith("weights: "))
    sparse = [a for a in score(tmp_path / "m.onnx").ledger.arrays if a.role == "weight" and a.stored(a.bits)[1] < 1]
    assert lines[at + 1].startswith(f"its ledger takes {len(sparse)} of {len(quantised_layers(bundle.model))} layers")
    assert lines[at + 2].startswith(f"{zeros:,} zeros of MODEL's masks are codes of 0 among these: an ONNX file of")
    assert sum(" zeros " in line for line in lines) == 1


def test_a_processor_of_short_sums_is_said(call, trained, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("flags\t: fpu avx2\n")
    monkeypatch.setattr("micronet.machine._CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for more, said in ((("--int4",), False), ((), True)):
        status, out, _ = call("export", trained, "-o", tmp_path / "m.onnx", "--floor", "0", "--images", "50", *more)
        assert (status, "onnxruntime's 16-bit sums saturate" in out) == (0, said)
    assert read_meta(tmp_path / "m.onnx").gate["instruction_sets"] == ["avx2"]


@pytest.mark.parametrize(
    ("widths", "says"),
    [
        ({4: 3, 8: 2}, "onnxruntime's 16-bit sums saturate"),
        ({4: 3, 7: 2}, "its 16-bit sums hold weights of 7 bits"),  # 2 x 255 x 63 is 32,130
    ],
)
def test_sums_are_said_to_saturate_where_some_weights_have_8_bits(widths, says, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("flags\t: fpu avx2\n")
    monkeypatch.setattr("micronet.machine._CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    stored = module.Stored(widths=widths, words=100, sparse=0)
    made = module.Exported(
        kept=None,
        int4=False,
        kernels=Kernels(convs=4, integer_convs=4, products=1, integer_products=1, packed_products=0),
        before=stored,
        after=replace(stored, widths={8: 5}),
    )
    said = [line for line in _quantised_lines(made, 0) if "CPU" in line]
    assert len(said) == 1
    assert says in said[0]


def test_int4_stores_what_the_ledger_of_the_network_says_and_tells_what_that_costs(said, trained):
    place, told = said
    held, layers = kinds(place / "int4.onnx"), quantised_layers(load(trained).model)
    for name, layer in layers.items():
        if name != "fc":
            assert held[f"{name}.weight"] == NARROW[layer.weight_bits == 8]
    assert held["fc.weight"] == "UINT8"  # two codes in a byte
    assert (place / "int4.onnx").stat().st_size < (place / "int8.onnx").stat().st_size
    file, model = (score(path).ledger for path in (place / "int4.onnx", trained))
    # Zeros aside: an ONNX file names no masks, and its ledger takes a layer for sparse where that is smaller.
    arrays = [sorted((array.role, array.numel, array.bits) for array in ledger.arrays) for ledger in (file, model)]
    assert arrays[0] == arrays[1]
    known = attrgetter(*COUNTED.replace(" nonzero", "").split())
    lines = [[known(line) for line in ledger.lines if not line.folded] for ledger in (file, model)]
    assert lines[0] == lines[1]
    assert f"0 of {len(layers) - 1} convolutions with integers" in told["int4"]
    assert "convolutions of 4-bit codes it computes in float" in told["int4"]


@pytest.mark.parametrize("name", ["int8", "int4", "inside"])
def test_the_counts_are_those_of_the_file_on_all_validation_images(said, trained, name):
    place, told = said
    data, path = digits(valid=0.2), place / f"{name}.onnx"
    scaled = data.valid.images.float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (data.mean, data.std))
    images, net = (scaled - mean) / std, load(trained).model
    found = compare(net, OnnxModule(path), images, data.valid.labels) if name != "inside" else None
    meta = read_meta(path)
    assert meta.normalised == (name == "inside")
    if found is not None:
        assert (meta.gate["number"], meta.gate["same_class"]) == (len(images), found.agreeing)
        assert f"right {found.before:,} before, {found.after:,} after" in told[name]
        if found.disagreeing:
            assert f"another class: {len(found.disagreeing)}" in told[name]
        # Of --int4 nothing is rounded that is not in the network; a code that lies on an edge may be another.
        assert found.agreeing >= (0.99 if name == "int4" else 0.9) * len(images)
        assert found.before == evaluate(net, plain_loader(data.valid, data)).top1_count
    else:
        outside = OnnxModule(place / "int8.onnx")(images)
        torch.testing.assert_close(OnnxModule(path)(scaled), outside, rtol=0, atol=float(0.05 * outside.abs().max()))
    assert meta.provenance["quantised"]["int4"] == (name == "int4")


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_zero_that_is_lost_on_the_way_is_refused(said, trained, name):
    place, _ = said
    proto, layers = onnx.load(place / f"{name}.onnx"), quantised_layers(load(trained).model)
    masks = {f"{key}.weight": layer.codes() != 0 for key, layer in layers.items()}
    check_zeros(proto, masks, "m")
    key = next(key for key, mask in masks.items() if key in kinds(place / f"{name}.onnx") and mask.any())
    masks[key] = torch.zeros_like(masks[key])
    with pytest.raises(MicronetError, match=f"{key} lost zeros"):
        check_zeros(proto, masks, "m")


def test_the_test_images_are_not_looked_at(trained, tmp_path, monkeypatch):
    """Neither is calibrated nor compared on them: they may as well not be there."""
    seen = []
    monkeypatch.setattr(module, "integer_kernels", lambda proto, images: seen.append(images) or proto)
    from micronet.model_source import open_model

    source, data = open_model(trained), digits(valid=0.2)
    module.export_quantised(source, tmp_path / "m.onnx", data, floor=0)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (data.mean, data.std))
    pixels = {image.numpy().tobytes() for image in ((seen[0] * std + mean) * 255).round().to(torch.uint8)}
    assert len(pixels) > 400
    assert pixels <= {image.numpy().tobytes() for image in data.train.images}
    assert read_meta(tmp_path / "m.onnx").gate["images"] == f"{len(data.valid):,} validation images of digits"


def test_a_file_that_loses_more_than_the_floor_is_not_kept(call, trained, tmp_path, monkeypatch):
    out = tmp_path / "m.onnx"
    out.write_bytes(b"an earlier file")
    # Ranges that were measured on nothing like the images: all is cut to a narrow range.
    monkeypatch.setattr(module, "integer_kernels", lambda proto, images: integer_kernels(proto, images * 1e-3))
    status, _, error = call("export", trained, "-o", out)
    assert (status, error.count("\n")) == (1, 1)
    assert "points, at most 1 are allowed (--floor); no file was kept" in error
    status, _, error = call("export", trained, "-o", out, "--floor", "0.9")
    assert (status, "at least 90 % must agree (--floor); no file was kept" in error) == (1, True)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert out.read_bytes() == b"an earlier file"
    assert call("export", trained, "-o", out, "--floor", "0", "--images", "50")[0] == 0
    assert read_meta(out).gate["number"] == 50


def test_other_classes_keep_no_file_however_seldom_the_network_is_right(trained, tmp_path, monkeypatch):
    """By labels that are nobody's answer nothing can be lost."""
    from micronet.model_source import open_model

    data = digits(valid=0.2)
    data = replace(data, valid=replace(data.valid, labels=torch.full_like(data.valid.labels, 10)))
    monkeypatch.setattr(module, "integer_kernels", lambda proto, images: integer_kernels(proto, images * 1e-3))
    with pytest.raises(MicronetError, match=r"at least 80 % must agree \(--floor\); no file was kept"):
        module.export_quantised(open_model(trained), tmp_path / "m.onnx", data)
    assert list(tmp_path.iterdir()) == []


def test_int4_of_a_float_network_is_refused_before_anything_is_written(call, tmp_path):
    status, _, error = call("export", COMMITTED, "--int4", "-o", tmp_path / "m.onnx")
    assert (status, error.count("\n")) == (1, 1)
    assert "--int4 is for layers that QuantAware trained, and none of its layers is quantised" in error
    assert list(tmp_path.iterdir()) == []


def test_other_commands_read_it(said, call, trained, tmp_path):
    place, _ = said
    for name in ("int8", "int4", "inside"):
        path = place / f"{name}.onnx"
        status, out, _ = call("score", path, "--json")
        assert status == 0
        assert json.loads(out)["totals"]["score"] == read_meta(path).score["score"]
    status, out, _ = call("evaluate", place / "int8.onnx", "--data", "digits", "-o", tmp_path / "c.png")
    data = digits()
    right = evaluate(OnnxModule(place / "int8.onnx"), plain_loader(data.test, data)).top1_count
    assert (status, f"{right:,} of {len(data.test):,}" in out) == (0, True)


def test_a_packed_file_is_exported_as_the_network_that_it_came_from(said, call, trained, tmp_path):
    place, _ = said
    assert call("pack", trained, "-o", tmp_path / "m.safetensors")[0] == 0
    assert call("export", tmp_path / "m.safetensors", "--int4")[0] == 0
    assert score(tmp_path / "m.onnx").storage == score(place / "int4.onnx").storage
    plain = deployed(load(tmp_path / "m.safetensors").model, SIZE)
    held = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    for name, layer in quantised_layers(plain).items():
        if name != "fc":
            assert (held[f"{name}.weight"].astype(int) == layer.codes().numpy()).all()
