"""The ledger: folding by data flow, constants, what is stored, what is alive; against counting one by one."""

import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from counting import Counted, Run, averaged, convolved, paired, pixels, relu, sigmoid, transformed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks.ledger import build
from callbacks.op_trace import count_ops, trace
from micronet.models import densenet121, googlenet, preact_resnet18, resnet20, separable_net, wide_resnet
from micronet.rules import official
from micronet.score import tally

SIZE = (4, 8, 8)


def ledger_of(forward, size=SIZE, **children):
    return build(trace(Run(forward, **children), size))


def conv(bias=False, c=4):
    return nn.Conv2d(4, c, 3, padding=1, bias=bias)


FOLDING = {
    "bn behind conv": (lambda s, x: s.bn(s.a(x)), {"a": conv(), "bn": nn.BatchNorm2d(4)}),
    "bn registered first": (lambda s, x: s.bn(s.a(x)), {"bn": nn.BatchNorm2d(4), "a": conv()}),
    "functional": (
        lambda s, x: F.batch_norm(s.a(x), s.bn.running_mean, s.bn.running_var, s.bn.weight, s.bn.bias),
        {"a": conv(), "bn": nn.BatchNorm2d(4)},
    ),
    "without scale and shift": (lambda s, x: s.bn(s.a(x)), {"a": conv(), "bn": nn.BatchNorm2d(4, affine=False)}),
    "through flattened maps": (lambda s, x: s.bn(s.a(x).flatten(2)), {"a": conv(), "bn": nn.BatchNorm1d(4)}),
    "linear, channels moved": (
        lambda s, x: s.bn(s.a(x.flatten(2)).transpose(1, 2)),
        {"a": nn.Linear(64, 5), "bn": nn.BatchNorm1d(5)},
    ),
    "linear, rows flattened": (
        lambda s, x: s.bn(s.a(x.flatten(2)).flatten(0, 1)),
        {"a": nn.Linear(64, 5), "bn": nn.BatchNorm1d(5)},
    ),
    "several channels to one": (
        lambda s, x: s.bn(s.a(x.flatten(1)).unflatten(1, (4, 3, 3))),
        {"a": nn.Linear(256, 36), "bn": nn.BatchNorm2d(4)},
    ),
    "one channel, a batch axis of one": (
        lambda s, x: s.bn(s.a(x).view(1, 1, 8, 8)),
        {"a": conv(c=1), "bn": nn.BatchNorm2d(1)},
    ),
    "instance norm with statistics of its own": (
        lambda s, x: s.bn(s.a(x)),
        {"a": conv(), "bn": nn.InstanceNorm2d(4, affine=True, track_running_stats=True)},
    ),
    "transposed": (lambda s, x: s.bn(s.a(x)), {"a": nn.ConvTranspose2d(4, 6, 3), "bn": nn.BatchNorm2d(6)}),
    "dropout between": (lambda s, x: s.bn(F.dropout(s.a(x), 0.5, s.training)), {"a": conv(), "bn": nn.BatchNorm2d(4)}),
    "constant factor": (lambda s, x: s.a(x) * 0.2, {"a": conv()}),
    "factor for each channel": (lambda s, x: s.a(x) * s.g, {"a": conv(), "g": nn.Parameter(torch.ones(4, 1, 1))}),
    "summand for each channel": (lambda s, x: s.a(x) + s.g, {"a": conv(), "g": nn.Parameter(torch.ones(4, 1, 1))}),
    "two in a row": (lambda s, x: s.bn(s.a(x)) * 0.5, {"a": conv(True), "bn": nn.BatchNorm2d(4)}),
}
STAYING = {
    "bn in front": (lambda s, x: s.a(s.bn(x)), {"a": conv(), "bn": nn.BatchNorm2d(4)}),
    "conv read twice": (lambda s, x: (y := s.a(x), s.bn(y) + y)[1], {"a": conv(), "bn": nn.BatchNorm2d(4)}),
    "behind relu": (lambda s, x: s.bn(s.a(x).relu()), {"a": conv(), "bn": nn.BatchNorm2d(4)}),
    "behind cat": (lambda s, x: s.bn(torch.cat([s.a(x), x], 1)), {"a": conv(), "bn": nn.BatchNorm2d(8)}),
    "another axis": (
        lambda s, x: s.bn(s.a(x.flatten(2)).permute(0, 1, 2)),
        {"a": nn.Linear(64, 4), "bn": nn.BatchNorm1d(4)},
    ),
    "channels cut by a view": (lambda s, x: s.bn(s.a(x).view(1, 8, 4, 8)), {"a": conv(), "bn": nn.BatchNorm2d(8)}),
    "channels mixed by a view": (
        lambda s, x: s.bn(s.a(x).view(1, 2, 2, 64).transpose(1, 2).reshape(1, 4, 8, 8)),
        {"a": conv(), "bn": nn.BatchNorm2d(4)},
    ),
    "a bias made from the image": (
        lambda s, x: s.bn(F.conv2d(x, s.w, x.mean((2, 3)).view(4))),
        {"w": nn.Parameter(torch.ones(4, 4, 3, 3)), "bn": nn.BatchNorm2d(4)},
    ),
    "division without rest": (lambda s, x: s.a(x) // 2, {"a": conv()}),
    "rest of a division": (lambda s, x: s.a(x) % 2, {"a": conv()}),
    "conv is an output, too": (lambda s, x: (y := s.a(x), s.bn(y)), {"a": conv(), "bn": nn.BatchNorm2d(4)}),
    "factor for each pixel": (lambda s, x: s.a(x) * s.g, {"a": conv(), "g": nn.Parameter(torch.ones(8, 8))}),
    "constant less layer": (lambda s, x: 1 - s.a(x), {"a": conv()}),
    "weights made from the image": (
        lambda s, x: s.bn(F.conv2d(x, x.mean((2, 3)).view(4, 1, 1, 1), groups=4)),
        {"bn": nn.BatchNorm2d(4)},
    ),
}


@pytest.mark.parametrize("name", FOLDING)
def test_what_folds_costs_nothing_and_gives_the_layer_one_bias(name):
    forward, children = FOLDING[name]
    ledger = ledger_of(forward, **children)
    layer, *rest = ledger.lines
    assert rest
    assert all(line.folded == layer.name == "a" and line.mults == line.adds == 0 for line in rest)
    factor_only = "factor" in name
    biases = [array for array in ledger.arrays if array.role == "bias"]
    assert len(biases) == (not factor_only)
    assert {array.role for array in ledger.arrays} <= {"weight", "bias"}
    assert layer.bias is not factor_only
    products = layer.mults
    assert layer.adds == products - layer.outputs + layer.bias * layer.outputs


@pytest.mark.parametrize("name", STAYING)
def test_what_cannot_fold_stays_and_costs(name):
    forward, children = STAYING[name]
    ledger = ledger_of(forward, **children)
    assert not any(line.folded for line in ledger.lines)
    norm = [line for line in ledger.lines if line.op == "batch_norm"]
    assert all(line.mults == line.adds == line.outputs for line in norm)
    channels = sum(2 * line.in_shape[0 if line.in_shape[0] != 1 else 1] for line in norm)
    kept = [array for array in ledger.arrays if array.role in ("scale", "shift")]
    assert sum(array.numel for array in kept) == channels


def test_operations_on_constants_cost_nothing_and_their_result_is_stored():
    table = nn.Parameter(torch.randn(7, 3))
    ledger = ledger_of(
        lambda s, x: s.fc(x) + (s.table[s.index].softmax(-1) * 2).sum(-1),
        size=(6,),
        fc=nn.Linear(6, 5, bias=True),
        table=table,
        index=torch.tensor([0, 1, 2, 3, 3]),
    )
    assert [line.op for line in ledger.lines if line.mults or line.adds] == ["linear"]
    assert ledger.lines[0].adds == 5 * 6  # the sum of constants folds into the bias
    standardised = ledger_of(
        lambda s, x: F.conv2d(x, (s.w - s.w.mean((1, 2, 3), keepdim=True)) / s.w.std((1, 2, 3), keepdim=True)),
        w=nn.Parameter(torch.randn(5, 4, 3, 3)),
    )
    assert [line.op for line in standardised.lines] == ["conv2d"]
    assert [(array.role, array.numel) for array in standardised.arrays] == [("weight", 5 * 36)]
    position = ledger_of(lambda s, x: x + s.table.t().reshape(21), size=(21,), table=table)
    assert [(a.name, a.numel) for a in position.arrays] == [("table", 21)]
    assert position.lines[0].adds == 21


def test_a_tensor_used_twice_is_stored_once_unless_different_things_fold_into_it():
    a, b = conv(), conv()
    b.weight = a.weight
    tied = ledger_of(lambda s, x: s.b(s.a(x).relu()), a=a, b=b)
    assert [array.numel for array in tied.arrays] == [144]
    assert sum(line.weights for line in tied.lines) == 288
    reused = ledger_of(lambda s, x: s.bn(s.a(s.bn(s.a(x)).relu())), a=conv(), bn=nn.BatchNorm2d(4))
    assert [array.numel for array in reused.arrays] == [144, 4]
    split = ledger_of(lambda s, x: s.n(s.b(s.bn(s.a(x)).relu())), a=a, b=b, bn=nn.BatchNorm2d(4), n=nn.BatchNorm2d(4))
    assert sorted(array.numel for array in split.arrays) == [4, 4, 144, 144]
    assert len({array.name for array in split.arrays}) == 4


def test_literals_are_the_programs_and_not_stored():
    ledger = ledger_of(lambda s, x: (x * 0.5 + 3) / 2)
    assert not ledger.arrays
    assert [(line.op, line.mults, line.adds) for line in ledger.lines] == [
        ("mul", 256, 0),
        ("add", 0, 256),
        ("div", 256, 0),
    ]
    learned = ledger_of(lambda s, x: x * s.scale, scale=nn.Parameter(torch.ones(1)))
    assert [array.numel for array in learned.arrays] == [1]


def test_what_nothing_reads_is_not_run_and_not_stored():
    spare = ledger_of(lambda s, x: (s.spare(x), s.a(x))[1], a=conv(), spare=nn.Conv2d(4, 9, 3))
    assert [line.name for line in spare.lines] == ["a"]
    assert [array.numel for array in spare.arrays] == [144]

    def written(s, x):
        y = torch.zeros_like(x)
        y[:, :2] = x[:, :2] * 2  # into memory that is read later
        return y + 1

    assert [line.op for line in ledger_of(written).lines] == ["mul", "add"]


def test_the_same_constant_made_twice_is_stored_once():
    ledger = ledger_of(
        lambda s, x: (x * s.table[:2].exp().sum(0)) + x * s.table[:2].exp().sum(0) + x * s.table[2:].exp().sum(0),
        size=(6,),
        table=nn.Parameter(torch.randn(4, 6)),
    )
    assert [array.numel for array in ledger.arrays] == [6, 6]
    chunks = ledger_of(
        lambda s, x: x * s.table.chunk(2)[1].sum(0) * s.table.chunk(2)[1].sum(0),
        size=(6,),
        table=nn.Parameter(torch.randn(4, 6)),
    )
    assert [array.numel for array in chunks.arrays] == [6]


def test_shapes_taken_from_another_tensor_do_not_hinder_folding():
    ledger = ledger_of(lambda s, x: s.bn(s.a(x).view_as(x).type_as(x)), a=conv(), bn=nn.BatchNorm2d(4))
    assert [line.folded for line in ledger.lines] == [None, "a"]
    made = ledger_of(lambda s, x: x + x.new_zeros(8) + torch.addcmul(x, x, x) + torch.addcmul(x, x, x, value=2))
    assert not made.arrays
    assert sum(line.mults for line in made.lines) == 256 + 512


def test_a_batch_norm_on_the_images_own_statistics_is_computed():
    ledger = ledger_of(lambda s, x: s.bn(s.a(x)), a=conv(), bn=nn.BatchNorm2d(4, track_running_stats=False))
    line = ledger.lines[1]
    assert (line.op, line.folded) == ("layer_norm", None)
    assert line.mults == 3 * 256 + 4 * 4
    assert [(array.role, array.numel) for array in ledger.arrays] == [("weight", 144), ("constant", 4), ("constant", 4)]


def test_what_only_moves_numbers_takes_memory():
    # Image of 4x8x8 floats: 1,024 bytes.
    for forward, alive in (
        (lambda s, x: torch.cat([x] * 8, 1), 1024 + 8192),
        (lambda s, x: F.pad(x, (8, 8, 8, 8)), 1024 + 4 * 24 * 24 * 4),
        (lambda s, x: F.interpolate(x, scale_factor=4), 1024 + 16 * 1024),
        (lambda s, x: torch.where(x > 0, x, -x), 1024 + 256 + 1024 + 1024),  # a truth value takes a byte
    ):
        assert ledger_of(forward).peak_bytes == alive


def test_a_result_that_no_image_changes_is_stored():
    ledger = ledger_of(lambda s, x: (x * 2, s.table + 0), table=nn.Parameter(torch.randn(3)))
    assert [array.numel for array in ledger.arrays] == [3]
    dead = ledger_of(lambda s, x: (s.spare(x).relu_(), s.a(x))[1], a=conv(), spare=nn.Conv2d(4, 9, 3))
    assert [line.name for line in dead.lines] == ["a"]


def test_several_inputs_and_networks_without_convolutions():
    ledger = ledger_of(lambda s, x, gate: x * gate.sigmoid(), size=((4, 8, 8), (4, 1, 1)))
    assert [(line.op, line.mults, line.adds) for line in ledger.lines] == [("sigmoid", 8, 4), ("mul", 256, 0)]
    mlp = build(trace(nn.Sequential(nn.Flatten(), nn.Linear(256, 10)), SIZE))
    assert [(line.mults, line.adds) for line in mlp.lines] == [(2560, 2560)]


def brute_attention(q, k, v):
    """Count attention by nested loops: products, additions, exponentials, divisions, the scaling of each score."""
    mults = adds = 0
    heads, length, d = q
    keys, e = k[1], v[2]
    for _ in range(heads * length):
        for _ in range(keys):
            mults += d + 1  # the dot product and its scaling
            adds += d - 1
        mults += 2 * keys  # exp, division
        adds += keys - 1
        mults += keys * e
        adds += (keys - 1) * e
    return mults, adds


def test_attention_is_its_parts():
    class Attention(nn.Module):
        def forward(self, x):
            q, k, v = x.split((3, 3, 2), -1)
            return F.scaled_dot_product_attention(q, k, v)

    (line,) = count_ops(Attention(), (2, 5, 8))
    assert (line.op, line.mults, line.adds) == ("attention", *brute_attention((2, 5, 3), (2, 5, 3), (2, 5, 2)))

    class Parts(nn.Module):
        def forward(self, x):
            q, k, v = x.split((3, 3, 2), -1)
            return ((q @ k.transpose(-1, -2)) * 3**-0.5).softmax(-1) @ v

    parts = count_ops(Parts(), (2, 5, 8))
    assert (sum(p.mults for p in parts), sum(p.adds for p in parts), sum(p.macs for p in parts)) == (
        line.mults,
        line.adds,
        line.macs,
    )


class Peak(TorchDispatchMode):
    """The most bytes alive after any operation, in memory that tensors other than the network's own hold."""

    def __init__(self, image, own):
        super().__init__()
        self.own = {tensor.untyped_storage()._cdata for tensor in own}
        self.holders, self.most = {}, 0
        self.see(image)

    def see(self, tensor):
        memory = tensor.untyped_storage()
        if memory._cdata not in self.own:
            self.holders.setdefault(memory._cdata, (memory.nbytes(), weakref.WeakSet()))[1].add(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # First, for what is new may lie where something else was.
        self.holders = {key: held for key, held in self.holders.items() if len(held[1])}
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.see(value)
        self.most = max(self.most, sum(size for size, _ in self.holders.values()))
        return out


PEAKS = {
    "resnet20": (partial(resnet20, num_classes=10), (3, 32, 32)),
    "wide_resnet": (partial(wide_resnet, depth=10, width=2, num_classes=10), (3, 32, 32)),
    "preact_resnet18": (partial(preact_resnet18, num_classes=10), (3, 16, 16)),
    "densenet121": (partial(densenet121, num_classes=10), (3, 32, 32)),
    "googlenet": (partial(googlenet, num_classes=10), (3, 32, 32)),
    "separable_net": (partial(separable_net, num_classes=11), (3, 32, 32)),
}


LARGE = ("densenet121", "googlenet")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in PEAKS])
def test_peak_memory_is_what_a_forward_pass_holds(name):
    make, size = PEAKS[name]
    net = make().eval()
    ledger = build(trace(net, size))
    with torch.no_grad():
        program = torch.export.export(net, (torch.zeros(1, *size),), strict=False).module()
        image = torch.zeros(1, *size)
        steps = torch.fx.Interpreter(program, garbage_collect_values=True)
        with Peak(image, [*program.parameters(), *program.buffers()]) as peak:
            steps.run(image)
    assert ledger.peak_bytes == peak.most


@st.composite
def networks(draw):
    size, channels = draw(st.integers(4, 6)), draw(st.sampled_from((1, 2, 4)))
    shape, layers = (channels, size, size), []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(("conv", "conv bn", "relu", "avg", "residual", "gate")))
        if kind.startswith("conv"):
            groups = draw(st.sampled_from([g for g in (1, 2, 4) if channels % g == 0]))
            out = groups * draw(st.integers(1, 2))
            kernel, dilation = draw(st.sampled_from(((1, 1), (3, 1), (2, 2))))
            options = {"stride": draw(st.integers(1, 2)), "padding": 2, "bias": draw(st.booleans())}
            made = [nn.Conv2d(channels, out, kernel, dilation=dilation, groups=groups, **options)]
            layers.append((kind, made + [nn.BatchNorm2d(out)] * (kind == "conv bn")))
            channels = out
        elif kind == "residual":
            layers.append((kind, [nn.Conv2d(channels, channels, 3, padding=1, bias=draw(st.booleans()))]))
        elif kind == "gate":
            layers.append((kind, [nn.Linear(channels, channels)]))
        else:
            layers.append((kind, []))
    return shape, layers, nn.Linear(channels, draw(st.integers(1, 3)), bias=draw(st.booleans()))


class Drawn(nn.Module):
    """The network of some drawn layers."""

    def __init__(self, layers, linear):
        super().__init__()
        self.kinds = [kind for kind, _ in layers]
        self.layers = nn.ModuleList(nn.ModuleList(modules) for _, modules in layers)
        self.linear = linear

    def forward(self, x):
        for kind, modules in zip(self.kinds, self.layers, strict=True):
            if kind.startswith("conv"):
                for module in modules:
                    x = module(x)
            elif kind == "relu":
                x = F.relu(x)
            elif kind == "avg":
                x = F.avg_pool2d(x, 2, 1)
            elif kind == "residual":
                x = x + modules[0](x)
            else:
                x = x * modules[0](x.mean((2, 3))).sigmoid()[:, :, None, None]
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def computed(x, layers, linear):
    """The same network, number by number, each BatchNorm folded into its convolution."""
    for kind, modules in layers:
        if kind.startswith("conv"):
            layer = fuse_conv_bn_eval(*[m.eval() for m in modules]) if len(modules) == 2 else modules[0]
            x = convolved(x, layer)
        elif kind == "relu":
            x = pixels(x, relu)
        elif kind == "avg":
            x = averaged(x, 2, 1)
        elif kind == "residual":
            x = paired(x, convolved(x, modules[0]), lambda a, b: a + b)
        else:
            means = [channel[0][0] for channel in averaged(x, len(x[0]), 1)]
            gates = [sigmoid(v) for v in transformed(means, modules[0])]
            x = [[[v * gate for v in row] for row in channel] for channel, gate in zip(x, gates, strict=True)]
    return transformed([channel[0][0] for channel in averaged(x, len(x[0]), 1)], linear)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(networks())
def test_random_networks_cost_what_computing_them_number_by_number_costs(drawn):
    shape, layers, linear = drawn
    net, image = Drawn(layers, linear).eval(), torch.randn(1, *shape)
    Counted.mults = Counted.adds = 0
    with torch.no_grad():
        logits = computed([[[Counted(v) for v in row] for row in channel] for channel in image[0].tolist()], *drawn[1:])
    result = tally("drawn", build(trace(net, shape)), official)
    assert (result.mults, result.adds) == (Counted.mults, Counted.adds)
    # What was computed is what the network computes, so that the right thing was counted.
    torch.testing.assert_close(torch.tensor([[n.value for n in logits]]), net(image).detach(), rtol=1e-4, atol=1e-4)
    folded = {m for kind, modules in layers if kind == "conv bn" for m in modules[1:]}
    trained = sum(p.numel() for m in net.modules() if m not in folded for p in m.parameters(recurse=False))
    new = sum(modules[0].out_channels for kind, modules in layers if kind == "conv bn" and modules[0].bias is None)
    assert result.params == trained + new
