"""`micronet predict`: images of any size and mode as training sees them, answers with names, one line for an error."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn

from callbacks.onnx_export import export_onnx
from micronet.bundle import Bundle, load, save
from micronet.data import image_folder, plain_loader
from micronet.factories import describe_factory
from micronet.models import separable_net
from micronet.onnx_meta import Meta, write_meta
from micronet.predict import open_predictor, pixels_of

NETWORK = partial(separable_net, width_multiplier=0.25, num_classes=6)
NAMES = ("cat", "dog", "naïve \x1b[31mred", "d", "e", "f")
NORM = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One network as a bundle, as an ONNX file of ours, as one without names, and as one of another program."""
    place = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    net = NETWORK().train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    images = torch.randn(64, 3, 1, 1) + torch.randn(64, 3, 32, 32)
    with torch.no_grad():  # logits of random weights are nearly the same for all images
        net(images)
        net.fc.weight /= net.eval()(images).std(0).mean()
        net.fc.bias -= net(images).mean(0)
    factory, kwargs = describe_factory(NETWORK)
    save(Bundle(net, factory, kwargs, NAMES, input_size=(3, 32, 32), **NORM), place / "model.pth")
    proto = export_onnx(net, (3, 32, 32))
    onnx.save(proto, place / "foreign.onnx")
    for name, classes in (("model.onnx", NAMES), ("unnamed.onnx", ())):
        write_meta(proto, Meta(classes=classes, input_size=(3, 32, 32), normalised=False, **NORM))
        onnx.save(proto, place / name)
    return place


def variants(photo):
    """A photograph in every mode that files come in, and sizes at the edge."""
    turned = photo.getexif()
    turned[0x0112] = 6
    grey = np.asarray(photo.convert("L"))
    clear = photo.convert("RGBA")
    clear.putalpha(Image.fromarray(grey))
    return {
        "rgb.jpg": (photo, {}),
        "exif.jpg": (photo, {"exif": turned}),
        "grey.png": (photo.convert("L"), {}),
        "grey16.png": (Image.fromarray(grey.astype(np.uint16) * 257), {}),
        "clear.png": (clear, {}),
        "palette.png": (photo.quantize(32), {"transparency": 3}),
        "bits.png": (photo.convert("1"), {}),
        "cmyk.jpg": (photo.convert("CMYK"), {}),
        "same.png": (photo.resize((32, 32)), {}),
        "tall.png": (photo.resize((5, 700)), {}),
        "dot.png": (photo.resize((1, 1)), {}),
    }


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A photograph in all its forms, in two classes of a folder of images."""
    photo, tmp_path = Image.fromarray(load_sample_image("flower.jpg")).resize((160, 107)), tmp_path_factory.mktemp("p")
    for label in ("a", "b"):
        (tmp_path / "tree" / "train" / label).mkdir(parents=True)
        for name, (image, options) in variants(photo).items():
            image.save(tmp_path / "tree" / "train" / label / name, **options)
    return sorted((tmp_path / "tree" / "train" / "a").iterdir())


def test_the_pixels_are_those_that_training_sees(pictures, files, cache):
    data = image_folder(pictures[0].parents[2], valid=0.1)
    held = {image.numpy().tobytes() for part in (data.train, data.valid) for image in part.images.permute(0, 2, 3, 1)}
    taken = {path.name: pixels_of(path, 32) for path in pictures}
    assert all(pixels.tobytes() in held for pixels in taken.values())
    assert len({pixels.tobytes() for pixels in taken.values()}) > 7  # the modes do differ
    assert not np.array_equal(taken["exif.jpg"], taken["rgb.jpg"])
    assert np.array_equal(taken["grey16.png"], taken["grey.png"])
    predictor = open_predictor(str(files / "model.pth"))
    for batch, _ in plain_loader(data.train, replace(data, **NORM)):
        for image in batch:
            near = min(float(np.abs(predictor.prepared(path)[0] - image.numpy()).max()) for path in pictures)
            assert near < 1e-6


def test_a_bundle_and_its_onnx_file_answer_alike(pictures, files):
    bundle, graph = (open_predictor(str(files / name)) for name in ("model.pth", "model.onnx"))
    firsts = set()
    for path in pictures:
        one, other = bundle(path, 6), graph(path, 6)
        assert [answer.name for answer in one] == [answer.name for answer in other]
        assert [a.probability for a in one] == pytest.approx([a.probability for a in other], rel=1e-4, abs=1e-7)
        assert sum(answer.probability for answer in one) == pytest.approx(1)
        assert [a.probability for a in one] == sorted((a.probability for a in one), reverse=True)
        assert all(NAMES[answer.index] == answer.name for answer in one)
        firsts.add(round(one[0].probability, 3))
    assert len(firsts) > 3


def test_probabilities_are_the_softmax_of_the_logits(pictures, files):
    predictor, net = open_predictor(str(files / "model.pth")), load(files / "model.pth").model
    with torch.no_grad():
        shares = net(torch.from_numpy(predictor.prepared(pictures[0]))).double().softmax(1)[0]
    assert [a.probability for a in predictor(pictures[0], 3)] == pytest.approx(
        shares.sort(descending=True)[0][:3].tolist()
    )


def test_torch_is_not_imported_for_an_onnx_file(pictures, files):
    arguments = ["micronet", "predict", str(files / "model.onnx"), str(pictures[0]), "--json"]
    code = (
        f"import sys; sys.argv = {arguments!r}\n"
        "import micronet.cli\n"
        "try:\n    micronet.cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'torch', 'fastai', 'onnx', 'matplotlib'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert len(json.loads(run.stdout)[0]["top"]) == 5


def test_the_command(call, pictures, files):
    status, out, error = call("predict", files / "model.onnx", pictures[0], "--top", 2)
    assert (status, error) == (0, "")
    lines = out.splitlines()
    assert (lines[0], len(lines)) == (str(pictures[0]), 3)
    status, out, _ = call("predict", files / "model.onnx", *pictures, "--json")
    told = json.loads(out)
    assert [entry["image"] for entry in told] == [str(path) for path in pictures]
    share, name = lines[1].split(" %  ")
    best = told[0]["top"][0]
    assert (float(share), name) == (round(100 * best["probability"], 2), best["name"].replace("\x1b", "?"))
    shown = call("predict", files / "model.onnx", *pictures, "--top", 6)[1]
    assert "naïve ?[31mred" in shown
    assert "\x1b" not in shown
    assert len(json.loads(call("predict", files / "model.pth", pictures[0], "--json", "--top", 99)[1])[0]["top"]) == 6


def test_good_images_are_answered_and_bad_ones_named(call, pictures, files, tmp_path):
    good = pictures[-1]
    cut, text, empty, floats = (tmp_path / name for name in ("cut.jpg", "text.png", "empty.png", "floats.tif"))
    whole = (good.parent / "rgb.jpg").read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    text.write_text("no\nimage")
    empty.touch()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(floats)
    gone = tmp_path / "gone.png"
    given = [cut, text, good, empty, floats, tmp_path, gone]
    status, out, error = call("predict", files / "model.onnx", *given)
    assert status == 1
    assert [line for line in out.splitlines() if not line.startswith(" ")] == [str(good)]
    lines = error.splitlines()
    wrong = [path for path in given if path != good]
    assert len(lines) == len(wrong)
    assert all(line.startswith(f"micronet: {path}") for line, path in zip(lines, wrong, strict=True))
    for word in ("truncated", "no such file", "is a folder", "full scale", "cannot identify"):
        assert word in error
    status, out, _ = call("predict", files / "model.onnx", *given, "--json")
    assert (status, ["error" in entry for entry in json.loads(out)]) == (1, [path != good for path in given])


def test_classes_without_names_are_numbered_and_it_is_said(call, pictures, files):
    status, out, error = call("predict", files / "unnamed.onnx", pictures[0])
    assert (status, "names no classes: they are numbered from 0" in error) == (0, True)
    assert {line.split()[-1] for line in out.splitlines()[1:]} < set("012345")


def custom(place):
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 3, 32, 32]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Magic", ["x"], ["y"], domain="com.acme")], "g", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.acme", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), place)


def test_a_model_that_cannot_answer_is_one_line(call, pictures, files, tmp_path):
    custom(tmp_path / "custom.onnx")
    (tmp_path / "cut.onnx").write_bytes((files / "model.onnx").read_bytes()[:-1000])
    (tmp_path / "text.onnx").write_text("no network")
    (tmp_path / "folder.onnx").mkdir()
    proto = onnx.load(files / "model.onnx")
    write_meta(proto, Meta(classes=NAMES[:2], input_size=(3, 32, 32), normalised=False, **NORM))
    onnx.save(proto, tmp_path / "two.onnx")
    write_meta(proto, Meta(classes=NAMES, input_size=(3, 40, 40), normalised=False, **NORM))
    onnx.save(proto, tmp_path / "size.onnx")
    write_meta(proto, Meta(classes=NAMES, input_size=(3, 32, 40), normalised=False, **NORM))
    onnx.save(proto, tmp_path / "wide.onnx")
    for model, said in (
        (files / "foreign.onnx", "does not say how large its images are and how they are normalised"),
        ("timm:mobilenetv3_small_050", "does not say how large its images are"),
        (tmp_path / "custom.onnx", "it does not know the operator com.acme:Magic"),
        (tmp_path / "cut.onnx", "not an ONNX file, or one cut short; copy or export it again"),
        (tmp_path / "text.onnx", "not an ONNX file, or one cut short"),
        (tmp_path / "folder.onnx", "is a folder; name a file in it"),
        (tmp_path / "none.onnx", "no such file"),
        (tmp_path / "none.pth", "no such file"),
        (tmp_path / "two.onnx", "gives 6 logits and names 2 classes"),
        (tmp_path / "size.onnx", "onnxruntime can't run it"),
        (tmp_path / "wide.onnx", "takes 3x32x40, and predict gives square RGB images"),
        (Path(__file__), "not a model file of micronet"),
    ):
        status, out, error = call("predict", model, pictures[0])
        assert (status, out, error.count("\n")) == (1, "", 1), model
        assert said in error
    assert call("predict", files / "model.onnx")[0] == 2  # no image
    assert call("predict", files / "model.onnx", pictures[0], "--top", 0)[0] == 2
