"""Other counters beside ours: they agree where they count the same, and every difference has its reason and number."""

import dataclasses
import sys
from collections import OrderedDict
from io import StringIO
from pathlib import Path

import pytest
import torch
from counting import Run
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.nn.utils import prune
from vectors import vectors

from micronet.cross_check import cross_check, cross_check_table
from micronet.errors import MicronetError
from micronet.model_source import ModelSource, open_model
from micronet.models import resnet20, separable_net, wide_resnet

HALF = "FlopCounterMode / 2"


def weight(*shape):
    return nn.Parameter(torch.randn(shape))


def checked(module, size=(3, 8, 8), allow_unknown=False):
    source = open_model(module, input_size=size)
    return {(row.counter, row.what): row for row in cross_check(source, source.ledger(allow_unknown=allow_unknown))}


def why(rows, counter, what="MACs"):
    """What a row's reasons begin with, and their numbers, once they are seen to add up."""
    row = rows[counter, what]
    assert row.unexplained == {}
    assert row.theirs == row.ours + sum(reason.amount for reason in row.reasons)
    return {reason.text.split(":")[0]: reason.amount for reason in row.reasons}


# ---- the project's networks


@pytest.mark.parametrize(
    "build",
    [
        lambda: resnet20(num_classes=10),
        lambda: wide_resnet(depth=10, width=1, num_classes=5),
        lambda: separable_net(num_classes=10, width_multiplier=0.25),
    ],
    ids=["resnet20", "wide_resnet", "separable_net"],
)
def test_three_counters_find_the_same_macs_in_the_projects_networks(build):
    with torch.device("meta"):
        rows = checked(build(), (3, 32, 32))
    assert why(rows, HALF) == {}
    assert rows[HALF, "MACs"].theirs == rows["fvcore", "MACs"].ours > 0
    assert {*why(rows, "fvcore")} <= {"also counts batch_norm", "also counts adaptive_avg_pool2d"}
    kinds = ("BatchNorm2d", "ReLU", "ReLU6", "MaxPool2d")
    assert {*why(rows, "torchstat")} <= {"biases of convolutions", *(f"also counts {kind}" for kind in kinds)}
    for counter in ("torchstat", "fvcore", "torch"):
        why(rows, counter, "parameters")
    assert "linear layers" in why(rows, "torchstat", "mults + adds")


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("resnet20_c10", lambda: resnet20(num_classes=10)),
        pytest.param(
            "wrn22_6_fastai_c100", lambda: wide_resnet(depth=22, width=6, num_classes=100), marks=pytest.mark.slow
        ),
    ],
)
def test_the_other_counters_say_what_the_vectors_say(name, build):
    totals = vectors(name)["totals"]
    with torch.device("meta"):
        rows = checked(build(), (3, 32, 32))
    expected, half, fvcore = totals["xcheck"], rows[HALF, "MACs"], rows["fvcore", "MACs"]
    assert (half.theirs, half.ours) == (expected["torch_flop_counter_div2"], totals["macs_conv_linear"])
    assert fvcore.theirs == expected["fvcore_total_incl_bn_pool"]
    assert fvcore.theirs - sum(why(rows, "fvcore").values()) == expected["fvcore_conv_linear"]
    for counter in ("torchstat", "fvcore", "torch"):
        row = rows[counter, "parameters"]
        assert (row.theirs, row.ours) == (totals["params_all"], totals["official"]["params"])


# ---- each reason, by hand


def test_biases_norms_activations_and_pools():
    layers = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU6(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1)
    rows = checked(nn.Sequential(*layers, nn.BatchNorm2d(2), nn.SiLU(), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1)))
    n, m = 4 * 6 * 6, 2 * 3 * 3
    norms = 2 * n + 2 * m + 2 * m
    counted = {"also counts BatchNorm2d": norms, "also counts ReLU6": n, "also counts MaxPool2d": n}
    assert why(rows, "torchstat") == counted | {"biases of convolutions": m}
    assert why(rows, "fvcore") == {"also counts batch_norm": norms, "also counts adaptive_avg_pool2d": m}
    assert why(rows, "torchstat", "mults + adds") == {
        "BatchNorm": 2 * norms - 2 * m,  # the last one stays, since no layer is before it
        "convolutions": -n,  # the second has a bias of its own
        "ReLU6": -n,
        "max pooling": 3 * n // 4,
        "SiLU": -4 * m,
        "AdaptiveAvgPool2d": -m,
    }
    folded = {"BatchNorm's parameters, which fold into the layers before": 2 * 4 + 2 * 2}
    assert why(rows, "torch", "parameters") == folded | {"biases that folding gives to layers without one": -4}
    assert rows["torch", "parameters"].ours == 27 * 4 + 4 + 8 + 2 + 4


def test_functions_and_parameters_of_blocks_are_not_seen_by_hooks():
    def run(net, x):
        x = F.conv2d(x + net.shift, net.kernel) * net.conv(x)
        return F.linear(x.flatten(1), net.weight)

    rows = checked(
        Run(run, conv=nn.Conv2d(3, 2, 3), kernel=weight(2, 3, 3, 3), shift=weight(3, 8, 8), weight=weight(5, 72))
    )
    outside = " outside a layer's call"
    assert why(rows, "torchstat") == {
        "conv2d" + outside: -54 * 36,
        "linear" + outside: -360,
        "biases of convolutions": 72,
    }
    assert why(rows, "torchstat", "mults + adds") == {
        "conv2d" + outside: -54 * 36 - 53 * 36 + 36,  # 27 products for each of 72 outputs, 26 sums
        "linear" + outside: -360 - 355,
        "add" + outside: -192,
        "mul" + outside: -72,
    }
    blocks = "parameters of blocks, or of layers that are not called"
    assert why(rows, "torchstat", "parameters") == {blocks: -(54 + 192 + 360)}
    assert why(rows, "fvcore") == why(rows, HALF) == why(rows, "fvcore", "parameters") == {}


def test_a_reused_layer_counts_for_each_call():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    rows = checked(nn.Sequential(conv, nn.ReLU(), conv))
    assert rows["torchstat", "MACs"].ours == 2 * 81 * 64
    assert why(rows, "torchstat") == {"biases of convolutions": 2 * 192, "also counts ReLU": 192}
    assert why(rows, "torchstat", "mults + adds") == why(rows, HALF) == why(rows, "fvcore") == {}
    assert why(rows, "torchstat", "parameters") == {}


def test_a_shared_tensor_counts_once_here():
    net = nn.Sequential(OrderedDict(a=nn.Linear(4, 4, bias=False), relu=nn.ReLU(), b=nn.Linear(4, 4, bias=False)))
    net.b.weight = net.a.weight
    rows = checked(net, (4,))
    assert why(rows, "torchstat", "parameters") == {"parameters that several layers share": 16}
    assert why(rows, "torch", "parameters") == {}


def test_what_else_makes_stored_numbers_other_than_parameters():
    def run(net, x):
        x = net.norm(x)  # no layer is before it
        x = net.a(net.conv(x)) - net.b(net.conv(x)) * net.scale
        return x + net.table + net.plain

    parts = {"norm": nn.BatchNorm2d(3, affine=False), "a": nn.BatchNorm2d(2), "b": nn.BatchNorm2d(2)}
    net = Run(run, conv=nn.Conv2d(3, 2, 1, bias=False), scale=weight(2, 1, 1), plain=torch.randn(8), **parts)
    net.register_buffer("table", torch.randn(8, 8))
    rows = checked(net)
    assert rows["torch", "parameters"].ours == 2 * 3 + 2 * (6 + 2) + 64 + 8
    assert why(rows, "torch", "parameters") == {
        "BatchNorm that stays": -6,
        "BatchNorm's parameters, which fold into the layers before": 8,
        "biases that folding gives to layers without one": -4,
        "buffers": -64,
        "constant factors and summands, which fold into layers": 2,
        "constants in the code": -8,
        "stored twice, since different things fold into the uses of one tensor": -6,
    }


@pytest.mark.parametrize("fused", [True, False])
def test_attention(fused):
    def run(net, x):
        q, k, v = net.qkv(x.flatten(2).transpose(1, 2)).chunk(3, 2)
        if fused:
            return F.scaled_dot_product_attention(q, k, v)
        return (q @ k.transpose(1, 2)).softmax(-1) @ v

    rows, n = checked(Run(run, qkv=nn.Linear(3, 12))), 64 * 64
    assert rows[HALF, "MACs"].ours == 36 * 64 + 2 * 4 * n
    assert why(rows, HALF) == {}
    assert why(rows, "fvcore") == ({"scaled_dot_product_attention": -8 * n} if fused else {})
    inside = {("attention" if fused else "matmul") + " outside a layer's call": -8 * n}
    assert why(rows, "torchstat") == {"Linear": -36 * 64} | inside  # its formula wants one vector


def test_a_network_that_reads_values_runs_on_real_tensors():
    def run(net, x):
        x = x.flatten(1, 2)[None] * net.signs.tolist()[1]
        return F.scaled_dot_product_attention(x, x, x)

    rows = checked(Run(run, signs=torch.ones(2)))  # a meta tensor has no list
    assert rows[HALF, "MACs"].theirs == rows[HALF, "MACs"].ours == 2 * 24 * 24 * 8


def test_transformer_layers_of_torch_run_as_written():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    rows = checked(layer, (5, 8))
    products = 2 * 5 * 5 * 8
    assert rows[HALF, "MACs"].theirs == 5 * (3 * 64 + 64 + 2 * 128) + products
    assert why(rows, HALF) == {}
    assert why(rows, "fvcore") == {"scaled_dot_product_attention": -products, "also counts layer_norm": 2 * 5 * 40}


def test_what_constants_alone_feed():
    net = Run(lambda net, x: net.conv(x) + net.embed(net.table), conv=nn.Conv2d(3, 4, 1), embed=nn.Conv2d(2, 4, 1))
    net.register_buffer("table", torch.randn(1, 2, 8, 8))
    rows = checked(net)
    constant, bias = {"layers fed by constants alone": 8 * 64}, {"biases of convolutions": 2 * 4 * 64}
    assert why(rows, HALF) == why(rows, "fvcore") == constant
    assert why(rows, "torchstat") == constant | bias
    constants = {"layers fed by constants alone": 2 * 8 * 64, "add outside a layer's call": -256}
    assert why(rows, "torchstat", "mults + adds") == constants
    assert why(rows, "torch", "parameters") == {
        "parameters that only constants are computed from": 12,
        "results of what depends on constants alone": -256,
    }


def test_layers_that_torchstat_does_not_know():
    def run(net, x):
        return net.signal(net.up(x).flatten(2))

    rows = checked(Run(run, up=nn.ConvTranspose2d(3, 2, 3, stride=2, bias=False), signal=nn.Conv1d(2, 4, 5)))
    up, signal = 54 * 64, 10 * 4 * (17 * 17 - 4)
    assert why(rows, "torchstat") == {"ConvTranspose2d": -up, "Conv1d": -signal}
    assert why(rows, HALF) == why(rows, "fvcore") == {}
    # It sums 27 products for each of 64 positions and 2 channels; they make 17 * 17 * 2 outputs.
    sums = 26 * 64 * 2 - (up - 17 * 17 * 2)
    assert why(rows, "torchstat", "mults + adds") == {"Conv1d": -2 * signal, "transposed convolutions": sums}


def test_matrix_products_that_others_count_otherwise():
    rows = checked(Run(lambda net, x: net.w @ x, w=weight(5, 8)))
    assert why(rows, "fvcore") == {"matrix products whose first factor is used many times": -2 * 5 * 8 * 8}
    assert why(rows, HALF) == {}
    rows = checked(Run(lambda net, x: torch.einsum("bchw,wd->bchd", x, net.w), w=weight(8, 77)))
    assert why(rows, "fvcore") == {"einsum": 2.957e4 / 2 - 24 * 8 * 77}
    rows = checked(Run(lambda net, x: x @ net.w, w=weight(8)))
    assert why(rows, HALF) == {"bilinear layers and products with a vector": -192}
    assert (rows["fvcore", "MACs"].theirs, rows["fvcore", "MACs"].note[:5]) == (None, "fails")
    rows = checked(Run(lambda net, x: net.pair(x[:, 0, 0], x[:, 0, 1]), pair=nn.Bilinear(8, 8, 5)))
    assert why(rows, HALF) == {"bilinear layers and products with a vector": -(64 + 8) * 5}
    assert why(rows, "fvcore") == {"bilinear": -(64 + 8) * 5}
    rows = checked(nn.Conv2d(3, 4, 3, padding="same"))
    assert why(rows, "fvcore") == {"_convolution_mode": -27 * 256}


def test_what_we_have_no_rule_for():
    w = weight(8, 8)
    rows = checked(Run(lambda net, x: torch.einsum("bchw,wd,de->bche", x, net.w, net.w), w=w), allow_unknown=True)
    assert rows[HALF, "MACs"].ours == 0
    assert why(rows, HALF) == {"operations without a rule here": 2 * 192 * 8}


def test_what_nothing_uses():
    def run(net, x):
        net.aside(x)
        return net.conv(x)

    rows = checked(Run(run, conv=nn.Conv2d(3, 2, 1), aside=nn.Conv2d(3, 4, 1), head=nn.Conv2d(3, 9, 1)))
    assert why(rows, HALF) == {"results that nothing reads": 12 * 64}
    assert why(rows, "fvcore") == {}
    assert why(rows, "torch", "parameters") == {"parameters that nothing reads": 16 + 36}
    not_called = {"parameters of blocks, or of layers that are not called": -36}
    assert why(rows, "torchstat", "parameters") == {"parameters that nothing reads": 16 + 36} | not_called


def test_a_batch_made_of_one_image():
    def run(net, x):
        return net.fc(x.flatten(0, 1).flatten(1))  # each channel a row

    rows = checked(Run(run, fc=nn.Linear(64, 5)))
    assert why(rows, "torchstat") == {}
    batch = "layers that get a batch made of one image"
    assert why(rows, "torchstat", "mults + adds") == {batch: -2 * 127 * 5, "linear layers": -15}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}),
        ("edgenext_xx_small", {"dims": (8, 16, 16, 16), "depths": (1, 2, 2, 2)}),
    ],
)
def test_every_difference_in_a_network_of_timm_is_explained(name, options):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        net = timm.create_model(name, pretrained=False, num_classes=3, **options)
    rows = checked(net, (3, 32, 32))
    for counter, what in rows:
        why(rows, counter, what)
    assert ("layers fed by constants alone" in why(rows, HALF)) == (name == "edgenext_xx_small")


# ---- what is not explained, missing or refused


def test_what_is_not_explained_is_shown_and_does_not_cancel_out():
    source = open_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), input_size=(3, 8, 8))
    ledger = source.ledger()
    first, relu, second = ledger.lines
    wrong = dataclasses.replace(first, macs=first.macs - 7), relu, dataclasses.replace(second, macs=second.macs + 7)
    ledger = dataclasses.replace(ledger, lines=wrong)
    rows = {(row.counter, row.what): row for row in cross_check(source, ledger)}
    assert rows[HALF, "MACs"].theirs == rows[HALF, "MACs"].ours
    for counter in ("torchstat", "fvcore", HALF):
        assert rows[counter, "MACs"].unexplained == {"0": 7, "2": -7}
    told = text_of(cross_check_table(source, ledger))
    assert "not explained: 7 (in 0)" in told
    assert "not explained: -7 (in 2)" in told


def text_of(table):
    console = Console(width=200, file=StringIO())
    console.print(table)
    return console.file.getvalue()


def test_without_fvcore_its_rows_say_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    rows = checked(nn.Conv2d(3, 4, 3))
    for what, ours in (("parameters", 112), ("MACs", 108 * 36)):
        row = rows["fvcore", what]
        assert (row.theirs, row.ours, row.note) == (None, ours, "not installed: pip install fvcore")
    assert why(rows, HALF) == {}
    source = open_model(nn.Conv2d(3, 4, 3))
    assert "pip install fvcore" in text_of(cross_check_table(source, source.ledger()))


def test_an_onnx_file_has_no_module_to_run():
    source = ModelSource(name="net.onnx", input_size=None, path=Path("net.onnx"))
    ledger = open_model(nn.Conv2d(3, 4, 3)).ledger()
    with pytest.raises(MicronetError, match=r"net.onnx: the cross-check needs the network as a torch module"):
        cross_check(source, ledger)


def test_the_network_and_torch_are_left_as_they_were(capfd, recwarn):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(144, 2)).train()
    net[0].weight.requires_grad_(False)
    prune.l1_unstructured(net[4], "weight", 0.5)  # its mask is put on by a hook
    calls = []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    for part in (net[1].weight, net[1].bias):
        part.grad = torch.ones(4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    flags = [(p.requires_grad, p.grad is None, id(p)) for p in net.parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    everywhere = len(torch_module._global_forward_hooks), len(torch_module._global_forward_pre_hooks)
    call, fast, state = nn.Conv2d.__call__, torch.backends.mha.get_fastpath_enabled(), torch.random.get_rng_state()
    for counter in ("torchstat", HALF):
        why(checked(net), counter)
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert flags == [(p.requires_grad, p.grad is None, id(p)) for p in net.parameters()]
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    assert all(module.training for module in net.modules())
    assert calls == []
    assert everywhere == (len(torch_module._global_forward_hooks), len(torch_module._global_forward_pre_hooks))
    assert (nn.Conv2d.__call__, torch.backends.mha.get_fastpath_enabled()) == (call, fast)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert capfd.readouterr() == ("", "")  # torchstat prints what it does not know, and fvcore logs it
    assert [str(warning.message) for warning in recwarn] == []


def test_the_table_has_a_line_for_each_number_and_reason():
    source = open_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU()), input_size=(3, 8, 8))
    told = [
        " ".join(line.replace("\u2502", " ").split())
        for line in text_of(cross_check_table(source, source.ledger())).splitlines()
    ]
    assert told[0] == "Sequential - other counters, for one image"
    assert "torchstat MACs 4,032 3,888 +144" in told
    assert "+144 biases of convolutions: one each" in told
    assert "FlopCounterMode / 2 MACs 3,888 3,888 0 the same" in told
    assert "-576 SiLU: a layer that it does not know" in told


def test_several_images_and_lists_of_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(1, 2, 1)

        def forward(self, x, y):
            return [self.a(x), self.b(y)]

    rows = checked(Two(), ((3, 4, 4), (1, 8, 8)))
    assert rows["fvcore", "MACs"].theirs == rows[HALF, "MACs"].theirs == 6 * 16 + 2 * 64
    assert why(rows, HALF) == why(rows, "fvcore") == {}


def test_a_network_that_cannot_run_is_named():
    def run(net, x):
        if not torch.compiler.is_exporting():
            raise RuntimeError("not today")
        return net.conv(x)

    source = open_model(Run(run, conv=nn.Conv2d(3, 4, 3)))
    with pytest.raises(MicronetError, match=r"Run: can't be run for the cross-check: not today"):
        cross_check(source, source.ledger())
