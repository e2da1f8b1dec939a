"""`micronet export`: the gate, the description in the file, what is kept where it fails; evaluated and scored again."""

import json
import re
import resource
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from micronet import MicronetError, deploy
from micronet.bundle import Bundle, load, save
from micronet.data import cifar10, digits
from micronet.deploy import real_images
from micronet.factories import describe_factory
from micronet.measure import OnnxModule, measure
from micronet.model_source import build_named, of_bundle, open_model
from micronet.models import separable_net
from micronet.onnx_meta import Meta, parse_meta, read_meta, without_paths
from micronet.score import score

COMMITTED = Path(__file__).parent / "data" / "resnet20_cifar10.pth"
NETWORK = partial(separable_net, width_multiplier=0.25, num_classes=10)
DATA = {"call": "micronet.data.sources:digits", "valid": 0.2}
STAGE = {"name": "train", "teacher": {"file": "/home/alice/nets/big.pth"}}
PROVENANCE = {
    "resolved": {"recipe": {"data": DATA, "stages": [STAGE]}},
    "source": "quickstart.py",
    "git": "0123456789ab",
    "hardware": {"cpu": "of the machine that it was trained on"},
    "versions": {"torch": "2.14.1"},
}


@torch.no_grad()
def seen(net, images, momentum):
    """Give a network of random weights statistics of real images, which folding has to take along."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    net.train()(images)
    return net.eval()


@torch.no_grad()
def told_apart(net, images):
    """Give it logits that differ between images: else all are of one class, whatever is wrong."""
    logits = net(images)
    net.fc.weight /= logits.std(0).mean()
    net.fc.bias -= net(images).mean(0)
    assert net(images).argmax(1).unique().numel() > 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A masked network and what is needed of it, as a bundle, and as one that says nothing of where it came from."""
    place, data = tmp_path_factory.mktemp("export"), digits(valid=0.2)
    torch.manual_seed(0)
    net, masks = NETWORK(), {}
    for name, parameter in net.named_parameters():
        if parameter.dim() > 1:
            masks[name] = torch.rand(parameter.shape) < 0.7
            parameter.data *= masks[name]
        else:  # the exporter leaves biases of zeros away
            parameter.data += 0.1 * torch.randn(parameter.shape)
    images = real_images(data, 256)
    scaled = images.normalise(images.scaled())
    told_apart(seen(net, scaled, momentum=None), scaled)
    factory, kwargs = describe_factory(NETWORK)
    shown = {"classes": data.classes, "input_size": (3, 32, 32), "mean": data.mean, "std": data.std}
    bundle = Bundle(net, factory, kwargs, **shown, masks=masks, provenance=PROVENANCE)
    save(bundle, place / "model.pth")
    save(replace(bundle, provenance={}), place / "stray.pth")
    return place


@pytest.fixture(scope="module")
def exported(folder):
    """What `export` gives: normalised outside, inside."""
    source, data = open_model(folder / "model.pth"), digits(valid=0.2)
    with pytest.MonkeyPatch.context() as patch:
        outside = deploy.export(source, folder / "outside.onnx", data)
        patch.setattr(deploy, "export_onnx", lambda model, size: bare(outside.path))  # it takes 3 s
        return outside, deploy.export(source, folder / "inside.onnx", data, normalise=True)


def bare(path):
    proto = onnx.load(path)
    del proto.metadata_props[:]
    return proto


@pytest.fixture
def graph(exported, monkeypatch):
    """The graph that the exporter, replaced for speed, gives; to be changed."""
    proto = bare(exported[0].path)
    monkeypatch.setattr(deploy, "export_onnx", lambda model, size: proto)
    return proto


def weights(path):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_the_file_answers_as_its_source(exported, folder):
    data = digits(valid=0.2)
    source = measure(open_model(folder / "model.pth"), "digits", "test")
    for kept in exported:
        assert kept.parity.images == kept.parity.agreeing == 1000
        assert kept.parity.relative_error < 1e-4
        assert kept.parity.before == kept.parity.after
        assert kept.bytes == kept.path.stat().st_size
        file = measure(open_model(kept.path), "digits", "test")  # normalised as the file says, inside or outside
        assert torch.equal(file.result.confusion, source.result.confusion)
        assert file.result.loss == pytest.approx(source.result.loss, rel=1e-4)
        assert file.data.classes == data.classes


def test_the_description(exported, folder):
    outside, inside = (read_meta(kept.path) for kept in exported)
    data = digits()
    assert outside.classes == data.classes
    assert (outside.input_size, outside.mean, outside.std) == ((3, 32, 32), data.mean, data.std)
    assert (outside.normalised, inside.normalised) == (False, True)
    assert (outside.input_mean, outside.input_std) == (data.mean, data.std)
    assert (inside.input_mean, inside.input_std) == ((0.0,) * 3, (1.0,) * 3)
    for kept, meta in zip(exported, (outside, inside), strict=True):
        cost = score(kept.path)
        assert (meta.score["rules"], meta.score["score"]) == ("official", cost.score)
        assert (meta.score["storage"], meta.score["ops"]) == (cost.storage, cost.ops)
        assert meta.gate["number"] == meta.gate["same_class"] == 1000
        assert meta.gate["images"] == "287 validation images and 713 training images of digits"
    assert outside.score["score"] == pytest.approx(score(folder / "model.pth").score)
    assert outside.provenance["git"] == "0123456789ab"
    assert outside.provenance["resolved"]["recipe"]["data"] == DATA
    assert outside.provenance["exported_with"]["torch"] == torch.__version__


def test_no_path_and_nothing_of_the_machine_is_in_the_file(exported, folder):
    for kept in exported:
        content = kept.path.read_bytes()
        for word in (
            b"/home",
            b"alice",
            str(folder).encode(),
            str(Path.cwd()).encode(),
            b"site-packages",
            b"trained on",
        ):
            assert word not in content, word
        assert not re.search(rb"(?<![\w.])/\w+/\w", content)
        assert Path.home().name.encode() not in b"".join(
            json.dumps(value).encode() for value in read_meta(kept.path).provenance.values()
        )
        assert b"big.pth" in content  # what the teacher was is told, where it lay is not
    told = without_paths({"/home/bob/x": ["C:\\Users\\eve\\data\\set", "/home/bob", "~/cats", "a:b", 3, None]})
    assert told == {"x": ["set", "", "cats", "a:b", 3, None]}


def test_what_is_no_path_stays_as_it_is():
    same = [
        *("1/2", "feature/int8", "https://arxiv.org/abs/2201.01741", "see https://a.org/b/c", "~5 % / lost", "AC/DC"),
        *("Result: 90 % / not run yet", "100 images /s", "src:tests/x", r"\d+\s"),
    ]
    assert without_paths(same) == same


def test_paths_lose_their_folders_alone_and_in_a_text():
    for path, last in {
        "/srv/my data/x": "x",
        "~bob/": "",
        "C:/Users/eve": "",
        "\\\\host\\share\\x": "x",
        "./a/b": "b",
        "../b": "b",
        "file:///home/bob/x": "x",
        "see file:///home/bob/x, too": "see x, too",
        "fit /home/bob/r.py -o=/tmp/q/z --data ~/d/e": "fit r.py -o=z --data e",
        "factory:/srv/net.py": "factory:net.py",
    }.items():
        assert without_paths(path) == last


def test_zeros_stay_zeros(exported, folder):
    masks, held = load(folder / "model.pth").masks, weights(exported[1].path)
    for name, mask in masks.items():  # each under its name
        assert (held[name][~mask.numpy()] == 0).all()
        assert held[name].any()
    lost = onnx.load(exported[1].path)
    tensor = next(tensor for tensor in lost.graph.initializer if tensor.name == "fc.weight")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones_like(held["fc.weight"]), tensor.name))
    with pytest.raises(MicronetError, match=r"fc\.weight lost zeros"):
        deploy.check_zeros(lost, masks, "model.pth")


def test_the_command(graph, call, folder, tmp_path):
    out = tmp_path / "net.onnx"
    status, said, error = call("export", folder / "model.pth", "-o", out, "--images", "300")
    assert (status, error) == (0, "")
    lines = said.splitlines()
    assert lines[0] == f"{out}: {out.stat().st_size:,} bytes"
    assert "287 validation images and 13 training images of digits: all of 300 keep their class" in lines[1]
    assert lines[2].startswith("input: RGB, each channel from 0 to 1, minus mean, divided by std; 3 x 32 x 32")
    assert "zeros are stored as numbers: an ONNX file of a sparse network is no smaller, no faster" in lines[3]
    status, said, _ = call("evaluate", out, "--data", "digits", "-o", tmp_path / "c.png")
    source = measure(open_model(folder / "model.pth"), "digits", "test").result
    assert (status, f"{source.top1_count:,} of {source.images:,}" in said) == (0, True)
    assert call("evaluate", out, "--data", "digits", "--split", "valid", "-o", tmp_path / "c.png")[0] == 0
    status, said, _ = call("score", out, "--json")
    assert json.loads(said)["totals"]["score"] == read_meta(out).score["score"]


def test_other_classes_are_refused(exported, tree, tmp_path, call):
    tree(tmp_path / "pets", ["cat", "dog"], each=5)
    status, _, error = call("evaluate", exported[1].path, "--data", tmp_path / "pets")
    assert (status, "its 10 classes (0, 1, 2, ...) are not the 2 of" in error) == (1, True)


def nudge(proto, by):
    """Change the last bias: all logits of a class."""
    tensor = [tensor for tensor in proto.graph.initializer if tensor.name.endswith("bias")][-1]
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[3] += by
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


@pytest.mark.parametrize(
    ("by", "said"),
    [(0.01, "relative error 0.0"), (100.0, "relative error"), (float("nan"), "relative error inf")],
)
def test_a_file_that_answers_otherwise_is_not_kept(graph, call, folder, tmp_path, by, said):
    out = tmp_path / "net.onnx"
    out.write_bytes(b"an earlier file")
    nudge(graph, by)
    status, _, error = call("export", folder / "model.pth", "-o", out)
    assert status == 1
    assert error.startswith(f"micronet: {out}: it does not answer as its source: {said}")
    assert "at most 0.0001 is allowed; no file was kept" in error
    assert error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    assert out.read_bytes() == b"an earlier file"


def test_a_quantised_file_passes_or_fails_by_its_floor(graph, folder, tmp_path):
    """As a quantised network is let through the gate: any error of the logits, but a share that keeps its class."""
    source = open_model(folder / "model.pth")
    images = real_images(digits(valid=0.2), 500)
    nudge(graph, 0.5)
    about = {"source": source.module, "images": images, "tolerance": None}
    meta = Meta(classes=source.classes, input_size=(3, 32, 32), mean=images.mean, std=images.std, normalised=False)
    kept = deploy.keep(graph, tmp_path / "a.onnx", **about, meta=meta, floor=0.5)
    assert 0.5 < kept.parity.agreement < 1
    file = OnnxModule(tmp_path / "a.onnx")(images.normalise(images.scaled())).argmax(1)
    with torch.no_grad():
        before = source.module(images.normalise(images.scaled())).argmax(1)
    assert kept.parity.disagreeing == tuple(torch.nonzero(file != before).flatten().tolist())
    assert read_meta(kept.path).gate["same_class"] == kept.parity.agreeing
    count = len(kept.parity.disagreeing)
    with pytest.raises(MicronetError, match=rf"^{tmp_path}/b.onnx: {count} \(images .*counted from 0\) of 287 valid"):
        deploy.keep(graph, tmp_path / "b.onnx", **about, meta=meta, floor=kept.parity.agreement + 0.001)
    assert not (tmp_path / "b.onnx").exists()


def test_a_graph_for_two_images_only_is_refused(graph, call, folder, tmp_path):
    """Its batch is said to be open, and a reshape inside has a fixed one."""
    shape = onnx.numpy_helper.from_array(np.array([-1, 2, 10]), "pairs")
    back = onnx.numpy_helper.from_array(np.array([-1, 10]), "rows")
    graph.graph.initializer.extend([shape, back])
    for node in graph.graph.node:
        node.output[:] = ["inner" if name == "logits" else name for name in node.output]
    graph.graph.node.append(onnx.helper.make_node("Reshape", ["inner", "pairs"], ["two"]))
    graph.graph.node.append(onnx.helper.make_node("ReduceMean", ["two"], ["one"], axes=[0], keepdims=0))
    graph.graph.node[-1].ClearField("attribute")
    graph.graph.node[-1].op_type = "Identity"
    graph.graph.node.append(onnx.helper.make_node("Reshape", ["one", "rows"], ["logits"]))
    status, _, error = call("export", folder / "model.pth", "-o", tmp_path / "net.onnx")
    assert (status, "onnxruntime can't run it" in error) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_an_unsound_graph_is_not_kept(graph, call, folder, tmp_path):
    graph.graph.node[0].input[0] = "nowhere"
    status, _, error = call("export", folder / "model.pth", "-o", tmp_path / "net.onnx")
    assert status == 1
    assert re.match(rf"micronet: {tmp_path}/net.onnx: not sound, says onnx's checker: .*; no file was kept\n$", error)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_and_ctrl_c_leave_nothing(graph, call, folder, tmp_path, monkeypatch):
    out = tmp_path / "net.onnx"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        status, _, error = call("export", folder / "model.pth", "-o", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (status, error) == (1, f"micronet: {out}: File too large\n")
    assert list(tmp_path.iterdir()) == []

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    for step in ("_check", "compare", "_score", "_require_written"):
        with monkeypatch.context() as patch:
            patch.setattr(deploy, step, interrupted)
            assert call("export", folder / "model.pth", "-o", out)[0] == 130
        assert list(tmp_path.iterdir()) == []


def test_a_file_that_reads_otherwise_than_it_was_written_is_not_kept(graph, call, folder, tmp_path, monkeypatch):
    """As of a disk that loses the last bytes after the comparison."""
    write, times = deploy._write, []

    def cut(proto, path):
        write(proto, path)
        times.append(path)
        if len(times) == 2:
            path.write_bytes(path.read_bytes()[:-10])

    monkeypatch.setattr(deploy, "_write", cut)
    status, _, error = call("export", folder / "model.pth", "-o", tmp_path / "net.onnx")
    assert (status, "net.onnx: " in error, "no file was kept" in error) == (1, True, True)
    assert list(tmp_path.iterdir()) == []


def test_the_test_images_are_never_looked_at():
    cut, optimistic = digits(valid=0.2), digits(valid="test")  # a recipe can have validated on the test images
    test = {image.numpy().tobytes() for image in cut.test.images}
    counts = len(cut.valid), len(cut.train)
    for data, number in ((cut, 10_000), (optimistic, 1000)):
        assert not any(image.numpy().tobytes() in test for image in real_images(data, number).pixels)
    told = real_images(cut, 10_000).told
    assert told == f"{counts[0]:,} validation images and {counts[1]:,} training images of digits"
    assert real_images(optimistic, 1000).told == "1,000 training images of digits"
    assert torch.equal(real_images(cut, 300).pixels[: counts[0]], cut.valid.images)
    few = real_images(cut, 100)
    assert few.labels.bincount(minlength=10).min() >= 8  # not the first ones, which are of one class in some sets


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("nope.pth",), 1, "nope.pth: no such file"),
        (("net.onnx",), 1, "net.onnx: is an ONNX file already; give the model.pth"),
        (("timm:resnet18",), 1, "is no network with weights"),
        ((COMMITTED, "-o", "net.pth"), 2, "an ONNX file's name ends in .onnx"),
        ((COMMITTED, "-o", "none/net.onnx"), 1, "none: no such folder to write net.onnx to; make it first"),
        ((COMMITTED, "--floor", "1.5"), 2, "--floor"),
        ((COMMITTED, "--images", "0"), 2, "--images"),
        (
            (COMMITTED, "--data", "digits", "-o", "x.onnx"),
            1,
            "its 10 classes (airplane, automobile, bird, ...) are not",
        ),
        ((COMMITTED, "--data", "cats", "-o", "x.onnx"), 1, "no data set 'cats'"),
    ],
)
def test_what_the_user_can_mend_is_one_line(call, arguments, status, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.onnx").touch()
    code, _, error = call("export", *arguments)
    assert (code, said in " ".join(error.replace("│", "").split())) == (status, True)
    assert status == 2 or error.count("\n") == 1
    assert not (tmp_path / "x.onnx").exists()


def test_images_that_are_not_there_or_not_known(call, folder, tmp_path, cache):
    out = tmp_path / "x.onnx"
    status, _, error = call("export", COMMITTED, "-o", out, "--data-dir", tmp_path)
    assert status == 1
    assert "to be compared on images of cifar10" in error
    assert "--data names others, --data-dir says where they are" in error
    status, _, error = call("export", folder / "stray.pth", "-o", out)
    assert (status, "does not say which images it was trained on" in error, "--data" in error) == (1, True, True)
    assert not out.exists()


def test_a_state_dict_gets_the_classes_of_the_images(graph, call, folder, tmp_path):
    torch.save(load(folder / "model.pth").model.state_dict(), tmp_path / "w.pth")
    arch = "micronet:separable_net,width_multiplier=0.25,num_classes=10"
    status, said, _ = call("export", tmp_path / "w.pth", "--arch", arch, "--data", "digits", "--images", "64")
    assert (status, "those of digits were written" in said) == (0, True)
    meta = read_meta(tmp_path / "w.onnx")
    assert (meta.classes, meta.mean) == (digits().classes, digits().mean)
    graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 7
    status, _, error = call("export", tmp_path / "w.pth", "--arch", arch, "--data", "digits", "-o", tmp_path / "x.onnx")
    assert (status, "gives 7 logits, and there are 10 classes" in error) == (1, True)


META = Meta(classes=("a", "b"), input_size=(3, 4, 4), mean=(0.5,) * 3, std=(0.2,) * 3, normalised=False)


def test_a_description_reads_as_it_was_written():
    assert parse_meta(META.props(), "x") == META
    assert parse_meta({"other": "tool"}, "x") is None
    newer = META.props() | {"micronet.version": "2"}
    with pytest.raises(MicronetError, match="description of version 2, this micronet reads up to 1: update"):
        parse_meta(newer, "x")


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("classes", '"ab"'),
        ("classes", "[1, 2]"),
        ("input_size", "[3, 4]"),
        ("input_size", "[3, 4, 1e9]"),
        ("input_size", "[3, 4, true]"),
        ("mean", "[0.5]"),
        ("mean", "[NaN, 0, 0]"),
        ("std", "[0, 1, 1]"),
        ("std", f"[{10**400}, 1, 1]"),
        ("normalised", "1"),
        ("score", "[]"),
        ("format", '"other"'),
        ("version", '"1"'),
        ("version", "true"),
        ("gate", "{"),
        ("gate", "[" * 100_000),
        ("gate", "null"),
    ],
)
def test_a_damaged_description_is_one_line(key, text):
    with pytest.raises(MicronetError, match=r"^x: damaged: .*export it again$"):
        parse_meta(META.props() | {f"micronet.{key}": text}, "x")


def test_what_others_wrote_into_a_file_stays():
    from micronet.onnx_meta import write_meta

    proto = onnx.ModelProto()
    proto.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")
    for meta in (META, replace(META, classes=("c", "d"))):
        write_meta(proto, meta)
    props = [(entry.key, entry.value) for entry in proto.metadata_props]
    assert ("onnx.infer", "onnxruntime.quant") in props
    assert [value for key, value in props if key == "micronet.classes"] == ['["c", "d"]']


# Every family of ours, and two of timm's, with random weights.
FAMILIES = [
    "micronet:resnet20",
    "micronet:preact_resnet18",
    "micronet:wide_resnet,depth=16,width=2",
    "micronet:googlenet",
    "micronet:densenet121",
    "micronet:separable_net",
    "timm:efficientnet_b0",
    "timm:mobilenetv3_small_100",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_passes_the_gate_on_real_images(name, real, tmp_path):
    data = real(cifar10)
    torch.manual_seed(0)
    module, _ = build_named(f"{name},num_classes=10", with_weights=True)
    images = real_images(data, 128)
    shown = {"classes": data.classes, "input_size": data.input_size, "mean": data.mean, "std": data.std}
    bundle = Bundle(seen(module, images.normalise(images.scaled()), momentum=0.1), "", {}, **shown)
    kept = deploy.export(of_bundle(bundle, name), tmp_path / "net.onnx", data)
    assert kept.parity.agreeing == 1000
    assert kept.parity.relative_error < 1e-4
    assert not kept.uncounted


@pytest.mark.slow
def test_the_committed_network_on_real_images(real, tmp_path):
    data = real(cifar10, valid=0.02)
    kept = deploy.export(open_model(COMMITTED), tmp_path / "net.onnx", data, normalise=True)
    assert (kept.parity.before, kept.parity.after) == (904, 904)  # as tests/data/README.md's row has it
    assert kept.parity.agreeing == 1000
    assert kept.parity.relative_error < 1e-5
