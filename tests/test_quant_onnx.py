"""A quantised network in ONNX: its codes, its ledger, its answers, and what onnxruntime runs."""

from collections import Counter
from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from rich.console import Console
from test_fake_quantize import network, quantised
from torch import nn

from callbacks.fake_quantize import quantised_layers
from callbacks.integer_kernels import integer_kernels, measure
from callbacks.ledger import build
from callbacks.onnx_export import ExportError, deployed, export_onnx
from callbacks.onnx_run import Kernels, kernels
from callbacks.op_trace import trace
from callbacks.quant_aware import QuantAware
from callbacks.quant_onnx import code_tensor
from micronet import Fit, models, sgd
from micronet.bundle import Bundle, load, save
from micronet.counting import Assume, count_official
from micronet.data import cifar10, digits
from micronet.factories import describe_factory
from micronet.learner import make_learner, run_fit
from micronet.onnx_cost import read_onnx
from micronet.rules import RULES

SIZE = (3, 10, 10)
COUNTED = "op in_shape out_shape taps weights nonzero constants mults adds macs weight_bits act_bits acc_bits bias"


def answers(proto, images, folder=None, plain=False):
    """The logits, and the operators that run."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if folder is not None:
        options.optimized_model_filepath = str(folder / "runs.onnx")
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input": images.numpy()})
    if folder is None:
        return torch.from_numpy(logits), {}
    return torch.from_numpy(logits), Counter(node.op_type for node in onnx.load(folder / "runs.onnx").graph.node)


def arrays_of(proto):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


@pytest.mark.parametrize(("bits", "int4"), [(8, False), (4, False), (4, True), (2, True)])
def test_the_file_holds_the_deployed_codes_and_answers_as_torch_does(bits, int4):
    net, images = network(bits, bits), torch.randn(64, *SIZE)
    proto, plain = export_onnx(net, SIZE, int4=int4), deployed(net, SIZE)
    onnx.checker.check_model(proto, full_check=True)
    arrays, kinds = arrays_of(proto), {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    for name, layer in quantised_layers(plain).items():
        if bits <= 4 and name == "7":
            packed = arrays["7.weight.packed"]  # the linear layer: 8 inputs, in one block of 16
            assert packed.shape == (5, 1, 8)
            unpacked = np.stack([packed & 15, packed >> 4], -1).reshape(5, 16).astype(np.int8) - 8
            assert np.array_equal(unpacked[:, :8], layer.codes().numpy())
            assert not unpacked[:, 8:].any()
            continue
        codes, scale = arrays[f"{name}.weight"].astype(np.float32), arrays[f"{name}.weight_scale"]
        assert kinds[f"{name}.weight"] == (TensorProto.INT4 if int4 else TensorProto.INT8)
        stretch = 1 if int4 else 2 ** (8 - bits)
        assert np.array_equal(codes, layer.codes().numpy() * stretch)
        # Bit for bit what torch computes with.
        product = codes * scale.reshape(-1, *[1] * (codes.ndim - 1))
        assert np.array_equal(product, layer.weight.detach().numpy())
    with torch.no_grad():
        expected = plain(images)
    # What onnxruntime makes of the file rounds biases, but for those of 4-bit files.
    for plain_run in (True, False) if int4 else (True,):
        logits, _ = answers(proto, images, plain=plain_run)
        # An input of the second layer may lie between two codes, where float32's last bit decides.
        close = torch.isclose(logits, expected, rtol=1e-4, atol=1e-5).all(1)
        assert close.float().mean() > 0.9


def test_four_bit_codes_lie_two_in_a_byte():
    codes = np.array([[-7, 7, 0], [1, -1, 3]], np.int8)
    tensor = code_tensor("w", codes, narrow=True)
    assert len(tensor.raw_data) == 3
    assert np.array_equal(numpy_helper.to_array(tensor).astype(np.int8), codes)
    odd = code_tensor("w", codes.ravel()[:5], narrow=True)
    assert len(odd.raw_data) == 3
    assert np.array_equal(numpy_helper.to_array(odd).astype(np.int8), codes.ravel()[:5])


def same_ledgers(ours, theirs):
    """Whether two ledgers have the same lines, in order, and the same arrays."""
    lines = [[line for line in one.lines if not line.folded] for one in (ours, theirs)]
    for here, there in zip(*lines, strict=True):
        assert {n: getattr(here, n) for n in COUNTED.split()} == {n: getattr(there, n) for n in COUNTED.split()}
    stored = [
        sorted((a.role, a.numel, a.bits, a.nonzero if a.role == "weight" else 0) for a in one.arrays)
        for one in (ours, theirs)
    ]
    assert stored[0] == stored[1]


@pytest.mark.parametrize(("bits", "int4"), [(8, False), (4, True)])
def test_torch_and_onnx_have_one_ledger(bits, int4, tmp_path):
    net = network(bits, bits)
    with torch.no_grad():
        net[1].weight[2] = 0.5  # a factor of 0 makes zero codes of a whole channel, once it is folded
    onnx.save(export_onnx(net, SIZE, int4=int4), tmp_path / "m.onnx")
    ours, theirs = build(trace(net, SIZE, masks={})), build(read_onnx(tmp_path / "m.onnx"))
    same_ledgers(ours, theirs)
    assert {array.bits for array in ours.arrays if array.role == "weight"} == {bits}
    tallies = [count_official(ledger, RULES["official"], Assume()) for ledger in (ours, theirs)]
    assert tallies[0].storage == tallies[1].storage
    assert tallies[0].score_ops == tallies[1].score_ops
    assert all("no 16-bit freebie: a part of the model is quantised" in tally.notes for tally in tallies)


def test_linear_layers_run_on_four_bits(tmp_path):
    torch.manual_seed(0)
    images = torch.rand(32, *SIZE)  # not negative: all four bits of an unsigned input are used
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()
    quantised(net[0], act_scale=1 / 15)
    with torch.no_grad():
        quantised(net[4], act_scale=float(net[:4](images).amax()) / 15)
    logits, runs = answers(export_onnx(net, SIZE, int4=True), images, tmp_path)
    assert runs["MatMulNBits"] == 1
    assert runs["QLinearConv"] == 0  # as it is said: convolutions are computed in float
    with torch.no_grad():
        assert (logits - net(images)).norm() / logits.norm() < 0.05


@pytest.mark.parametrize("int4", [False, True])
def test_linear_layers_of_images_places_run_on_four_bits(int4):
    """Of three axes a linear layer is a MatMul in ONNX, of turned weights; codes of 4 bits are packed in either way."""

    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(24, 300), nn.Linear(300, 5, bias=False)

        def forward(self, x):
            return self.last(self.first(x.flatten(2).transpose(1, 2)).relu()).mean(1)

    torch.manual_seed(0)
    net, images = Places().eval(), torch.randn(8, 24, 4, 4)
    quantised(net.first, 4, 8, signed=True, act_scale=0.02)
    quantised(net.last, 3, 8, act_scale=0.02)
    proto = export_onnx(net, (24, 4, 4), int4=int4)
    onnx.checker.check_model(proto, full_check=True)
    for file in (proto, integer_kernels(proto, images)):
        assert kernels(file) == Kernels(convs=0, integer_convs=0, products=2, integer_products=0, packed_products=2)
        with torch.no_grad():
            torch.testing.assert_close(answers(file, images)[0], net(images), rtol=1e-4, atol=1e-4)
    # A row of 24 weights is a block of 32; one of 300 is 5 of 64, with a step size each: 180 bytes, in 2 of 256 264.
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    assert shapes["first.weight.packed"] == (300, 1, 16)
    assert shapes["last.weight.packed"] == (5, 5, 32)


def test_linear_layers_of_eight_bits_run_on_integers():
    net, images = network(8, 8), torch.randn(64, *SIZE)
    exact = export_onnx(net, SIZE)
    assert kernels(exact).integer_products == 0  # or it would have been of no use
    assert kernels(integer_kernels(exact, images)).integer_products == 1


@pytest.mark.parametrize(("bits", "int4"), [(8, False), (4, False), (4, True)])
@pytest.mark.parametrize("step", [0.01, 0.5])
def test_a_clip_in_front_of_codes(bits, int4, step):
    """ReLU6 in front of codes that reach less far than it, and farther."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU6(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net, images = net.eval(), 3 * torch.randn(64, *SIZE)
    quantised(net[0], 8, 8, signed=True, act_scale=0.05)
    quantised(net[2], bits, bits, act_scale=step * 15 / (2**bits - 1))
    exact = export_onnx(net, SIZE, int4=int4)
    with torch.no_grad():
        expected = net(images)
    close = torch.isclose(answers(exact, images)[0], expected, rtol=1e-3, atol=1e-3).float().mean()
    assert close > 0.9  # the runtime has to load it, at all
    if not int4:
        proto = integer_kernels(exact, images)
        onnx.checker.check_model(proto, full_check=True)
        assert kernels(proto).integer_convs == 2
        logits, _ = answers(proto, images)
        assert (logits - expected).norm() < 0.03 * expected.norm()


def test_int4_is_for_quantised_networks():
    with pytest.raises(ExportError, match="no layer of it is quantised"):
        export_onnx(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (3, 2, 2), int4=True)


@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), 4])
def test_every_convolution_of_resnet20_runs_on_integers(bits, real, tmp_path):
    data = real(cifar10).limit(256)
    net = load("tests/data/resnet20_cifar10.pth").model
    plan = Fit("qat", epochs=0, lr=0.1, opt=sgd(), cbs=(partial(QuantAware, bits, bits, images=128, norm_images=0),))
    learn = make_learner(plan, net, data)
    run_fit(learn, plan, Console(quiet=True))
    train, test = (next(iter(loader))[0] for loader in (learn.dls.train.new(shuffle=False), learn.dls.valid))
    exact = export_onnx(net, (3, 32, 32))
    proto = integer_kernels(exact, train)
    onnx.checker.check_model(proto, full_check=True)
    logits, runs = answers(proto, test, tmp_path)
    assert (runs["QLinearConv"], runs["Conv"], runs["FusedConv"], runs["QLinearAdd"]) == (21, 0, 0, 9)
    assert answers(exact, test, tmp_path)[1]["QLinearConv"] < 21  # or it would have been of no use
    with torch.no_grad():
        expected = net.eval()(test)
    assert (logits.argmax(1) == expected.argmax(1)).float().mean() > 0.9
    assert sum(array.nbytes for array in arrays_of(proto).values()) < 1.1 * 272_474


@pytest.mark.parametrize("factor", [1e-7, 1e-12])
def test_a_bias_beside_weights_of_next_to_nothing_is_not_cut_off(factor):
    """Folded, such a channel has a step so small that its bias would be more of them than 32 bits count."""
    net = network(8, 8)
    with torch.no_grad():
        net[1].weight[5], net[1].bias[5] = factor, 2.0
        torch.manual_seed(1)
        images = torch.randn(64, 3, 10, 10)
        wanted = deployed(net, (3, 10, 10))(images)
    found, _ = answers(integer_kernels(export_onnx(net, (3, 10, 10)), images), images)
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_ranges_are_those_of_the_images():
    net, images = network(8, 8), torch.randn(100, *SIZE)
    proto = export_onnx(net, SIZE)
    conv = next(node.output[0] for node in proto.graph.node if node.op_type == "Conv")
    with torch.no_grad():
        outputs = net[1](net[0](images))
    low, high = measure(proto, [conv], images.numpy())[conv]
    assert low == pytest.approx(float(outputs.min()), rel=1e-4)
    assert high == pytest.approx(float(outputs.max()), rel=1e-4)


def test_a_float_graph_is_refused():
    proto = export_onnx(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (3, 2, 2))
    with pytest.raises(ValueError, match="no layer of the graph computes on codes"):
        integer_kernels(proto, np.zeros((1, 3, 2, 2), np.float32))


def correlation(one, other):
    """Of the logits' deviations from their mean over the images."""
    one, other = one - one.mean(0), other - other.mean(0)
    return float((one * other).sum() / one.norm() / other.norm())


FAMILIES = {
    "wide_resnet": (models.wide_resnet, {"depth": 10, "width": 1}),
    "resnet20": (models.resnet20, {}),
    "resnet18": (models.resnet18, {"width": 16}),
    "preact_resnet18": (models.preact_resnet18, {}),
    "googlenet": (models.googlenet, {}),
    "densenet121": (models.densenet121, {}),
    "separable_net": (models.separable_net, {}),
    "efficientnet_b0": ("timm", {}),
    "mobilenetv3_small_100": ("timm", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_trained_saved_counted_and_exported(name, tmp_path):
    torch.manual_seed(0)
    make, kwargs = FAMILIES[name]
    if make == "timm":
        make, kwargs = pytest.importorskip("timm").create_model, {"model_name": name}
    factory, kwargs = describe_factory(partial(make, **kwargs | {"num_classes": 10}))
    net = make(**kwargs)
    plan = Fit("qat", epochs=1, lr=0.01, opt=sgd(), cbs=(partial(QuantAware, 8, 8, images=32, norm_images=64),))
    learn = make_learner(plan, net, digits(batch_size=32).limit(96))
    run_fit(learn, plan, Console(quiet=True))
    images = torch.cat([batch for batch, _ in learn.dls.valid])
    layers = quantised_layers(net)
    assert len(layers) == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in net.modules())
    bundle = Bundle(net, factory, kwargs, tuple("0123456789"), (3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    save(bundle, tmp_path / "m.pth")
    loaded = load(tmp_path / "m.pth")
    with torch.no_grad():
        expected = net.eval()(images)
        assert torch.equal(loaded.model(images), expected)
    ledger = build(trace(loaded.model, (3, 32, 32), masks=loaded.masks))
    weights = [array for array in ledger.arrays if array.role == "weight"]
    assert len(weights) == len(layers)
    assert {array.bits for array in weights} == {8}
    proto = export_onnx(loaded.model, (3, 32, 32))
    onnx.save(proto, tmp_path / "m.onnx")
    counts = [sum(line.macs for line in one.lines) for one in (ledger, build(read_onnx(tmp_path / "m.onnx")))]
    assert counts[0] == counts[1]
    # Hardly trained, they answer nearly alike for all images: what is compared is how the answers differ.
    assert correlation(answers(proto, images, plain=True)[0], expected) > 0.97
    for file, least in ((proto, 0.8), (integer_kernels(proto, images), 0.5)):
        logits, runs = answers(file, images, tmp_path)
        assert correlation(logits, expected) > least
        assert runs["QLinearConv"] + runs["Conv"] + runs["FusedConv"] >= len(layers) - 1
