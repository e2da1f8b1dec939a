"""The counter against torchstat, against counting one by one, and against what it must leave alone."""

import copy
import functools
import importlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from counting import Counted, Run, convolved, transformed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from callbacks.ledger import UnknownOperation, build
from callbacks.op_trace import TraceError, count_ops, total_params, trace
from callbacks.seed import seed_cost, torchstat_cost

SIZE = (6, 8, 8)


def test_mults_and_adds_make_torchstats_sum_for_every_layer_kind_it_knows():
    stat = importlib.import_module("torchstat.compute_madd")  # as an attribute, its own function hides it
    kinds = [nn.Conv2d(6, 9, 3, stride=2, padding=1, groups=3), nn.Conv2d(6, 4, (1, 3), dilation=2, bias=False)]
    kinds += [nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), nn.ConvTranspose2d(6, 4, (2, 3), bias=False)]
    kinds += [nn.MaxPool2d(3, stride=2, padding=1), nn.MaxPool2d((2, 4)), nn.AvgPool2d(2), nn.AvgPool2d((8, 8))]
    kinds += [nn.BatchNorm2d(6), nn.ReLU(), nn.ReLU6(inplace=True), nn.Softmax(1)]
    kinds += [nn.Linear(6, 5), nn.Linear(6, 5, bias=False), nn.Bilinear(2, 4, 5)]
    known = {name.removeprefix("compute_").removesuffix("_madd") for name in vars(stat) if name.startswith("compute_")}
    assert {type(kind).__name__ for kind in kinds} == known - {"madd"} | {"ReLU6"}
    for kind in kinds:
        flat = isinstance(kind, nn.Linear | nn.Bilinear)
        x = torch.randn(1, 6) if flat else torch.randn(1, *SIZE)
        net, inp = kind, x
        if isinstance(kind, nn.Bilinear):
            net, inp = Run(lambda self, x: self.layer(x[:, :2], x[:, 2:]), layer=kind), (x[:, :2], x[:, 2:])
        out = net(x.clone())
        lines = count_ops(net, x.shape[1:])
        assert len(lines) == 1, kind
        assert sum(torchstat_cost(lines[0])) == stat.compute_madd(kind, inp, out) > 0, kind


@st.composite
def small_nets(draw):
    size, channels = draw(st.integers(4, 6)), draw(st.sampled_from((1, 2, 4)))
    shape, convs = (channels, size, size), []
    for _ in range(draw(st.integers(1, 2))):
        groups = draw(st.sampled_from([g for g in (1, 2, 4) if channels % g == 0]))
        kernel, dilation = draw(st.sampled_from(((1, 1), (2, 1), (3, 1), (2, 2))))
        out = groups * draw(st.integers(1, 2))
        kwargs = {"stride": draw(st.integers(1, 2)), "padding": draw(st.integers(1, 2)), "bias": draw(st.booleans())}
        convs.append(nn.Conv2d(channels, out, kernel, dilation=dilation, groups=groups, **kwargs))
        channels = out
    features = nn.Sequential(*convs)(torch.zeros(1, *shape)).numel()
    return shape, convs, nn.Linear(features, draw(st.integers(1, 3)), bias=draw(st.booleans()))


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(small_nets())
def test_random_networks_cost_what_multiplying_one_by_one_costs(drawn):
    shape, convs, linear = drawn
    image = torch.randn(1, *shape)
    Counted.mults = Counted.adds = 0
    x = [[[Counted(v) for v in row] for row in channel] for channel in image[0].tolist()]
    for conv in convs:
        x = convolved(x, conv)
    flat = [v for channel in x for row in channel for v in row]
    logits = [number.value for number in transformed(flat, linear)]
    net = nn.Sequential(*convs, nn.Flatten(), linear)
    torch.testing.assert_close(torch.tensor([logits]), net(image), rtol=1e-4, atol=1e-4)
    lines = count_ops(net, shape)
    assert sum(line.mults for line in lines) == sum(line.macs for line in lines) == Counted.mults
    assert sum(line.adds for line in lines) == Counted.adds
    assert sum(line.weights + line.constants for line in lines) == total_params(net)


def busy_net(pruned=False):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Linear(8, 5))
    if pruned:  # its weight is then a tensor like any other attribute, made by a hook
        prune.random_unstructured(net[0], "weight", 0.5)
    net.register_buffer("seen", torch.zeros(2), persistent=False)
    net.plain = torch.ones(3)
    net(torch.randn(4, 3, 8, 8)).sum().backward()
    net[1].eval()
    net[5].bias.requires_grad_(False)
    return net


def test_the_model_is_left_untouched_and_its_hooks_do_not_run():
    net, ran = busy_net(pruned=True), []
    net[0].register_forward_hook(lambda *_: ran.append(1))
    tensors = [*net.parameters(), *net.buffers(), net.plain]
    grads = [p.grad for p in net.parameters()]
    facts = [(id(t), t.data_ptr(), t.device, t.dtype, t.requires_grad, t._version) for t in tensors]
    before = [t.detach().clone() for t in tensors]
    modes, hooks = [m.training for m in net.modules()], [list(m._forward_hooks) for m in net.modules()]
    random = torch.get_rng_state()
    count_ops(net, (3, 8, 8))
    tensors = [*net.parameters(), *net.buffers(), net.plain]
    assert facts == [(id(t), t.data_ptr(), t.device, t.dtype, t.requires_grad, t._version) for t in tensors]
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert all(a is b for a, b in zip(grads, [p.grad for p in net.parameters()], strict=True))
    assert modes == [m.training for m in net.modules()]
    assert hooks == [list(m._forward_hooks) for m in net.modules()]
    assert not ran
    assert torch.equal(random, torch.get_rng_state())
    assert torch.is_grad_enabled()


def test_mode_dtype_device_and_layout_make_no_difference():
    net = busy_net()

    def counted(net):  # how many weights happen to be zero is the only thing that a type, or meta, can change
        return [replace(line, nonzero=None) for line in count_ops(net, (3, 8, 8))]

    lines = counted(net)
    assert [line.op for line in lines][:2] == ["conv2d", "batch_norm"]
    assert lines[1].folded == lines[0].name
    others = [getattr(copy.deepcopy(net), change)() for change in ("eval", "train", "half", "bfloat16", "double")]
    others += [copy.deepcopy(net).to(memory_format=torch.channels_last), copy.deepcopy(net).to("meta")]
    assert all(counted(other) == lines for other in others)
    pair = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    mixed = nn.Sequential(copy.deepcopy(pair[0]), copy.deepcopy(pair[1]).half())  # runs under autocast only
    assert counted(mixed) == counted(pair)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert counted(net) == lines


def test_what_wraps_a_forward_for_a_fit_is_not_counted():
    net = busy_net()
    lines = count_ops(net, (3, 8, 8))
    for module, own in [(m, m.forward) for m in (net[0], net)]:  # a function; an object, which export refuses
        wrapper = (lambda x, own=own: own(x) * 2) if module is net[0] else functools.partial(own)
        module.forward = functools.update_wrapper(wrapper, own)
    wrapped = net.forward
    assert count_ops(net, (3, 8, 8)) == lines
    assert net.forward is wrapped  # the copy's is taken away, not the network's


def test_each_call_of_a_module_and_each_functional_call_is_a_line():
    def forward(self, x):
        y = F.relu(self.conv(self.conv(x))) + x
        return F.relu6(y.relu_()) * 0.5

    lines = count_ops(Run(forward, conv=nn.Conv2d(6, 6, 3, padding=1)), SIZE)
    assert " ".join(line.op for line in lines) == "conv2d conv2d relu add relu relu6 mul"
    assert " ".join(line.name for line in lines) == "conv conv relu add relu relu6 mul"
    assert replace(lines[0], live_bytes=0) == replace(lines[1], live_bytes=0)
    assert (lines[0].mults, lines[0].weights, lines[0].constants) == (54 * 6 * 64, 324, 6)
    assert lines[0].arrays == ("conv.weight", "conv.bias")
    assert (lines[0].module, lines[0].in_shape, lines[0].out_shape) == ("Conv2d", SIZE, SIZE)
    nested = count_ops(nn.Sequential(Run(lambda self, x: x + self.act(x), act=nn.ReLU())), SIZE)
    assert [line.name for line in nested] == ["0.act", "0.add"]


@pytest.mark.parametrize(
    "pool",
    [
        lambda self, x: F.adaptive_avg_pool2d(x, 1),
        lambda self, x: nn.AdaptiveAvgPool2d((1, 1))(x),
        lambda self, x: F.avg_pool2d(x, 8),
        lambda self, x: x.mean((2, 3)),
        lambda self, x: x.mean((-1, -2), keepdim=True),
        lambda self, x: x.permute(0, 2, 3, 1).mean((1, 2)),
        lambda self, x: x.flatten(2).mean(-1),
        lambda self, x: x.view(1, 6, 64).mean(2),
    ],
)
def test_every_way_to_average_whole_maps_is_a_global_pool(pool):
    (line,) = count_ops(Run(pool), SIZE)
    assert (line.op, line.taps, line.mults, line.adds) == ("global_avg_pool", 64, 6, 6 * 63)
    assert seed_cost(line) == (6, 6 * 64)


@pytest.mark.parametrize(
    ("pool", "op", "mults", "adds"),
    [
        (lambda self, x: F.avg_pool2d(x, 7), "avg_pool", 6, 6 * 48),
        (lambda self, x: F.adaptive_avg_pool2d(x, 2), "avg_pool", 24, 24 * 15),
        # Windows of 3, 4 and 3 (0-3, 2-6, 5-8): 10 * 10 terms in 9 sums.
        (lambda self, x: F.adaptive_avg_pool2d(x, 3), "avg_pool", 54, 6 * (100 - 9)),
        (lambda self, x: x.mean(1), "mean", 64, 64 * 5),
        (lambda self, x: x.mean(3), "mean", 48, 48 * 7),
        (lambda self, x: x.mean(), "mean", 1, 6 * 64 - 1),
        (lambda self, x: x.flatten(2).mean(1), "mean", 64, 64 * 5),
        (lambda self, x: x.reshape(1, 64, 6).mean(2), "mean", 64, 64 * 5),
    ],
)
def test_other_averages_are_no_global_pools(pool, op, mults, adds):
    (line,) = count_ops(Run(pool), SIZE)
    assert (line.op, line.mults, line.adds, seed_cost(line)) == (op, mults, adds, (0, 0))


def test_a_product_with_weights_is_a_linear_layer_and_one_of_activations_is_not():
    weight, bias = nn.Parameter(torch.zeros(5, 8)), nn.Parameter(torch.zeros(5))
    (line,) = count_ops(Run(lambda self, x: x @ self.w.t(), w=weight), SIZE)
    assert (line.op, line.mults, line.adds, line.weights) == ("linear", 48 * 40, 48 * 35, 40)
    assert line.arrays == ("w",)
    (line,) = count_ops(Run(lambda self, x: torch.addmm(self.b, x[0, 0], self.w.t()), w=weight, b=bias), SIZE)
    assert (line.op, line.mults, line.adds, line.arrays) == ("linear", 8 * 40, 8 * 40, ("w", "b"))
    (line,) = count_ops(Run(lambda self, x: x @ x), SIZE)
    assert (line.op, line.mults, line.adds, line.weights) == ("matmul", 6 * 64 * 8, 6 * 64 * 7, 0)


def test_what_no_formula_covers_is_refused_or_listed():
    odd = Run(lambda self, x: torch.fft.fft(F.relu(x)).real)
    with pytest.raises(UnknownOperation, match="fft"):
        build(trace(odd, SIZE))
    ledger = build(trace(odd, SIZE), allow_unknown=True)
    assert any("fft" in name for name in ledger.uncounted)
    assert [line.mults for line in ledger.lines if line.op == "relu"] == [6 * 64]


def test_blocks_that_only_wrap_are_read_and_control_flow_is_refused():
    def forward(self, x):
        with torch.no_grad():
            x = self.conv(x)
        with torch.autocast("cpu", torch.bfloat16):
            x = self.conv(x)
        return checkpoint(self.conv, x, use_reentrant=False)

    conv = nn.Conv2d(6, 6, 1)
    lines = count_ops(Run(forward, conv=conv), SIZE)
    said = [(line.mults, line.constants, line.arrays) for line in lines if line.op == "conv2d"]
    assert said == [(36 * 64, 6, ("conv.weight", "conv.bias"))] * 3
    branch = Run(lambda self, x: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)))
    with pytest.raises(TraceError, match="cond"):
        count_ops(branch, SIZE)


def test_what_only_real_tensors_can_do_is_traced_on_the_cpu():
    cut = Run(lambda self, x: self.conv(x)[:, : self.n.tolist()[0]] + 1, conv=nn.Conv2d(6, 6, 1), n=torch.tensor([2]))
    lines = count_ops(cut, SIZE)
    assert (lines[0].mults, lines[-1].out_shape) == (36 * 64, (2, 8, 8))


def test_errors_name_what_to_mend():
    conv = nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match=r"input_size .* got \(3, 0, 32\)"):
        count_ops(conv, (3, 0, 32))
    with pytest.raises(TraceError, match=r"Conv2d with an image of \(3, 2, 2\): .*[Kk]ernel size"):
        count_ops(conv, (3, 2, 2))
    with pytest.raises(TraceError, match="run it once"):
        count_ops(nn.LazyLinear(3), (3,))


def test_total_params_counts_shared_ones_once():
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    assert total_params(nn.Sequential(a, b, nn.BatchNorm1d(4))) == 16 + 8
