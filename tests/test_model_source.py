"""What can be scored, what is refused and with which words; measuring against a gate; the command's forms."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from counting import Run
from onnx_graphs import node, ones
from onnx_graphs import save as save_graph
from rich.console import Console
from torch import nn

from micronet.bundle import Bundle, load, save
from micronet.errors import MicronetError
from micronet.factories import describe_factory
from micronet.model_source import build_named, open_model
from micronet.models import resnet20
from micronet.score import score
from micronet.score_report import footer, score_table, summary, to_csv

COMMITTED = Path(__file__).parent / "data" / "resnet20_cifar10.pth"


def bundle(tmp_path, net=None, **more):
    net = net or resnet20(num_classes=10)
    factory, kwargs = describe_factory(partial(resnet20, num_classes=10))
    classes = tuple("0123456789")
    made = Bundle(net, factory, kwargs, classes, input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.2,) * 3, **more)
    path = tmp_path / "model.pth"
    save(made, path)
    return path


def test_a_bundles_masks_are_kept_and_make_it_sparse(tmp_path):
    net = resnet20(num_classes=10)
    mask = torch.rand(net.fc.weight.shape) < 0.25
    net.fc.weight.data[~mask] = 0
    path = bundle(tmp_path, net, masks={"fc.weight": mask})
    assert torch.equal(load(path).masks["fc.weight"], mask)
    assert score(path).lines[-1].mults == int(mask.sum())
    assert score(bundle(tmp_path, net)).lines[-1].mults == 640  # the same zeros, and nothing that declares them
    with torch.no_grad():
        net.fc.weight[~mask] = 1
    with pytest.raises(MicronetError, match="not zero where its mask says so"):
        bundle(tmp_path, net, masks={"fc.weight": mask})
    with pytest.raises(MicronetError, match=r"mask of fc\.wait"):
        bundle(tmp_path, net, masks={"fc.wait": mask})
    content = torch.load(path, weights_only=True)
    for masks, said in (({"fc.weight": ~mask}, "not as sparse"), ({"fc.weight": 3}, "damaged"), (7, "damaged")):
        torch.save(content | {"masks": masks}, path)
        with pytest.raises(MicronetError, match=said):
            load(path)
    torch.save({key: value for key, value in content.items() if key != "masks"}, path)  # of an earlier version
    assert load(path).masks == {}


def test_a_plain_state_dict_needs_its_network(tmp_path, call):
    net, path = resnet20(num_classes=10), tmp_path / "weights.pth"
    net.fc.weight.data[:, :40] = 0
    torch.save({"state_dict": {f"module.{name}": value for name, value in net.state_dict().items()}}, path)
    status, _, error = call("score", path)
    assert (status, "--arch" in error) == (1, True)
    status, out, _ = call("score", path, "--arch", "micronet:resnet20,num_classes=10", "--json")
    told = json.loads(out)
    assert (status, told["lines"][-1]["mults"], told["lines"][-1]["nonzero"]) == (0, 240, 240)  # smaller with a mask
    for arch, said in (
        ("micronet:resnet20,num_classes=7", "don't fit --arch"),
        ("micronet:resnet21", "no such network; near it: .*resnet20"),
        ("resnet20", "timm:NAME, torchvision:NAME or micronet:NAME"),
        ("micronet:resnet20,7", "arguments are NAME=VALUE"),
        ("micronet:resnet20,a=(1,", "arguments are NAME=VALUE"),
        ("micronet:resnet20,depth=7", "can't be built"),
        ("timm:resnet1", "timm has no such network"),
        ("torchvision:resnet1", "torchvision has no such classifier"),
    ):
        with pytest.raises(MicronetError, match=said):
            open_model(path, arch=arch)
    torch.save([1, 2], path)
    with pytest.raises(MicronetError, match="not a state dict"):
        open_model(path, arch="micronet:resnet20,num_classes=10")


def test_untrained_networks_by_name_are_dense_and_bring_their_size():
    result = score("timm:mobilenetv3_small_050")
    params = sum(p.numel() for p in timm.create_model("mobilenetv3_small_050").parameters())
    assert (result.input_size, result.ledger.params) == ((3, 224, 224), params)
    assert all(array.masked is False for array in result.arrays if array.name.endswith("weight"))
    assert score("torchvision:squeezenet1_1", input_size=(3, 64, 64)).input_size == (3, 64, 64)
    tiny = "timm:convnext_atto,depths=(1,1,1,1),dims=(8,8,8,8),num_classes=2"
    assert sum("conv_dw" in line.name for line in score(tiny, input_size=(3, 32, 32)).lines) == 4
    with pytest.raises(MicronetError, match="--arch and --trust say how to read"):
        open_model("timm:convnext_atto", trust=True)
    assert score("micronet:resnet20,num_classes=100").ledger.params == 272_474 + 64 * 90 + 90


def test_a_network_that_calculates_while_it_is_built_gets_no_memory_for_its_weights():
    module, size = build_named("torchvision:regnet_y_400mf")
    assert size == (3, 224, 224)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert not nn.Linear(2, 2).weight.is_meta  # torch itself is as it was
    assert sum(p.numel() for p in module.parameters()) == 4_344_144  # torchvision's documentation


class Pickled(nn.Linear):
    """A module that only a pickle can bring back."""


def test_pickles_are_read_only_when_trusted(tmp_path, call):
    path = tmp_path / "whole.pth"
    torch.save(Pickled(4, 2), path)
    status, _, error = call("score", path)
    assert (status, "pickled objects" in error) == (1, True)
    status, _, error = call("score", path, "--trust")
    assert (status, "--input-size" in error) == (1, True)
    status, out, _ = call("score", path, "--trust", "--input-size", "4", "--json")
    assert (status, json.loads(out)["totals"]["macs"]) == (0, 8)
    torch.save({"no": "module"}, path)
    assert "neither a module nor a fastai Learner" in call("score", path, "--trust", "--input-size", "4")[2]


def as_features(index):
    return torch.full((4,), float(index))


def as_label(index):
    return torch.tensor(index % 2)


def test_a_fastai_export_is_read_when_trusted(tmp_path):
    from fastai.data.core import Datasets
    from fastai.learner import Learner

    dls = Datasets(list(range(8)), [[as_features], [as_label]]).dataloaders(bs=2, num_workers=0)
    learn = Learner(dls, nn.Linear(4, 2), loss_func=nn.CrossEntropyLoss(), path=tmp_path)
    learn.export("export.pkl")
    with pytest.raises(MicronetError, match="pickled objects"):
        open_model(tmp_path / "export.pkl")
    source = open_model(tmp_path / "export.pkl", trust=True, input_size=(4,))
    assert source.ledger().lines[0].macs == 8


def test_every_form_of_the_output_tells_the_same(call):
    told = json.loads(call("score", COMMITTED, "--json")[1])
    rows = list(csv.DictReader(io.StringIO(call("score", COMMITTED, "--csv")[1])))
    assert [row["name"] for row in rows] == [line["name"] for line in told["lines"]]
    assert sum(float(row["ops"]) for row in rows) == told["totals"]["ops"] == 61_404_064
    write_up = call("score", COMMITTED, "--markdown")[1]
    for part in ("0.0095754", "61,404,064", "135,845", "16 bits for free", "not qualified", "| layer3.2.conv2 |"):
        assert part in write_up
    words = call("score", COMMITTED, "--explain")[1]
    assert "conv1 (conv2d): 3x32x32 -> 16x32x32. 27 products for each of 16,384 outputs" in words
    assert "bn1 (batch_norm): 16x32x32 -> 16x32x32. Folded into conv1" in words
    table = call("score", COMMITTED)[1]
    assert "score = 135,845 / 36,500,000 + 61,404,064 / 10,490,000,000" in table
    every = call("score", COMMITTED, "--rules", "all")[1]
    for name, number in (("official", "0.0095754"), ("seed", "0.0132823"), ("imt", "0.0978286")):
        assert name in every
        assert number in every


def test_an_onnx_file_is_scored_without_torch(tmp_path):
    path = save_graph(tmp_path / "net.onnx", [node("Conv", "x w")], w=ones(5, 3, 3, 3))
    code = (
        f"import sys; sys.argv = ['micronet', 'score', {str(path)!r}, '--json']\n"
        "import micronet.cli\n"
        "try:\n    micronet.cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    told = json.loads(run.stdout)
    assert score(path).input_size == score(shutil.copy(path, tmp_path / "NET.ONNX")).input_size == (3, 8, 8)
    assert (told["input"], told["totals"]["mults"]) == ([3, 8, 8], 27 * 5 * 36)


def test_two_models_side_by_side(call, tmp_path):
    out = call("score", COMMITTED, "--against", "micronet:resnet20,num_classes=100")[1]
    assert "1.022" in out  # 271,690 + 90 * 65 numbers against 271,690
    assert "micronet:resnet20,num_classes=100" in out


def test_the_words_of_the_explanation_are_those_of_the_score(call):
    for options, storage in (((), 135_845), (("--assume", "bits=4,sparsity=0.5"), None), (("--no-freebie",), 271_690)):
        words = call("score", COMMITTED, "--explain", *options)[1]
        told = sum(float(number.replace(",", "")) for number in re.findall(r": ([\d,.]+) words\)", words))
        total = float(re.search(r"in ([\d,.]+) words of 32 bits", words)[1].replace(",", ""))
        assert told == pytest.approx(total, abs=0.1)
        assert storage in (None, total)
        table = call("score", COMMITTED, "--markdown", *options)[1]
        rows = re.search(r"## Stored arrays\n\n(.*?)\n\n", table, re.S)[1].splitlines()[2:]
        assert sum(float(row.split("|")[-2].replace(",", "")) for row in rows) == pytest.approx(total, abs=0.1)


@pytest.mark.parametrize("form", [(), ("--csv",), ("--rules", "all"), ("--against", COMMITTED)])
def test_what_is_uncounted_or_assumed_is_marked_in_every_form(call, form):
    net = Run(lambda self, x: torch.fft.fft(x).real)
    status, out, _ = call("score", COMMITTED, "--assume", "bits=8", *form)
    assert (status, "bits=8" in out) == (0, True)
    result = score(nn.Sequential(nn.Linear(4, 4), net), input_size=(4,), allow_unknown=True)
    text = {(): summary, ("--csv",): to_csv}.get(form, lambda one: footer([one]))(result)
    assert "UNCOUNTED" in text or "False" in text


def test_assumptions_are_marked(call):
    out = call("score", COMMITTED, "--assume", "bits=8,acc=16,sparsity=0.5")[1]
    assert "assumed, not measured: bits=8, acc=16, sparsity=0.5" in out
    assert "(an assumption)" in out
    out = call("score", COMMITTED, "--assume", "bits=8", "--markdown")[1]
    assert out.splitlines()[0].endswith("ASSUMED (bits=8)")


def test_the_table_fits_a_narrow_terminal():
    result = score(COMMITTED)
    for width in (80, 200):
        console = Console(width=width, file=io.StringIO(), record=True)
        console.print(score_table(result, width))
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        assert "2,359,296" in text
        assert ("alive" in text) == (width == 200)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rules", "mine"), "--rules must be one of official"),
        (("--assume", "bits=x"), "--assume takes"),
        (("--assume", "bits=40"), "bits must be a width"),
        (("--input-size", "3by3"), "--input-size must be CxHxW"),
        (("--json", "--csv"), "choose one"),
        (("--json", "--cross-check"), "choose one"),
        (("--against", "x", "--explain"), "choose one"),
        (("--acc", "16", "--adder-tree"), "choose one"),
        (("--device", "cpu"), "give both"),
        (("--assume", "bits=8,bits=4"), "given twice"),
        (("--ps", "0.3"), "have no option --ps"),
    ],
)
def test_wrong_usage_is_told_apart(call, arguments, said):
    status, _, error = call("score", COMMITTED, *arguments)
    assert status == 2
    assert said in " ".join(error.replace("│", "").split())


@pytest.mark.slow
def test_the_gate_is_measured_on_the_whole_test_set(call, archive):
    status, out, _ = call("score", COMMITTED, "--rules", "imt", "--data", "cifar10", "-d", archive("cifar10").parent)
    assert status == 0
    assert "9,038 of 10,000 correct on cifar10 test: qualifies (9,000 of 10,000 on cifar10 are asked)" in out
    status, _, error = call("score", COMMITTED, "--data", "digits")
    assert (status, "its 10 classes (airplane" in error) == (1, True)
