"""The networks: their exact sizes, their layers against independent lists, and what later steps need of them."""

import inspect
import math
import operator
from collections import Counter
from functools import partial

import pytest
import torch
import torchvision
from torch import fx, nn
from vectors import vectors

from micronet import models
from micronet.models import (
    densenet121,
    googlenet,
    preact_resnet18,
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet44,
    resnet56,
    resnet110,
    separable_net,
    wide_resnet,
)

# (factory with its options, classes, parameters): published counts, or sums written out; none read off our own code.
SIZES = {
    "wrn22_6": (wide_resnet, 100, 9_693_108),
    "wrn28_10": (partial(wide_resnet, depth=28, width=10, residual_scale=1.0), 100, 36_536_884),
    "resnet20": (resnet20, 10, 272_474),
    # One more block in each group: 2 * 9 * (16^2 + 32^2 + 64^2) weights + 4 * (16 + 32 + 64) of BatchNorm = 97,216.
    "resnet32": (resnet32, 10, 272_474 + 2 * 97_216),
    "resnet44": (resnet44, 10, 272_474 + 4 * 97_216),
    "resnet56": (resnet56, 10, 272_474 + 6 * 97_216),
    "resnet110": (resnet110, 10, 272_474 + 15 * 97_216),
    "resnet18": (resnet18, 10, 11_173_962),
    "resnet34": (resnet34, 10, 21_282_122),
    "resnet34_imagenet": (partial(resnet34, stem="imagenet"), 10, 21_289_802),
    "preact_resnet18": (preact_resnet18, 10, 11_171_146),
    "preact_resnet18_weiaicunzai": (partial(preact_resnet18, layout="weiaicunzai"), 100, 11_222_244),
    "googlenet": (googlenet, 100, 6_402_564),
    "densenet121": (densenet121, 10, 6_956_298),
    "densenet121_imagenet": (partial(densenet121, stem="imagenet"), 10, 6_964_106),
    "separable": (separable_net, 11, 265_227),
    "separable_pool1": (partial(separable_net, pool=1), 11, 256_779),
    # Convolutions and biases, BatchNorm, linear layer:
    # 27*16 + 9 * (16*32 + 32*64 + 64*128 + 128*256 + 3 * 256^2) + 1,264 channels; 2 * 1,264; 1,024 * 11 + 11.
    "separable_plain": (partial(separable_net, conv="plain"), 11, 432 + 9 * 240_128 + 3 * 1_264 + 11_275),
    "separable_grouped": (
        partial(separable_net, conv="grouped", groups=4),
        11,
        432 + 9 * 240_128 // 4 + 3 * 1_264 + 11_275,
    ),
}
ACTIVATIONS = (nn.ReLU, nn.ReLU6)


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def on_meta(factory, **options):
    with torch.device("meta"):
        return factory(**options).eval()


@pytest.fixture(scope="module")
def built():
    """Every network of SIZES by name, on the meta device: shapes without memory or arithmetic."""
    return {name: on_meta(factory, num_classes=classes) for name, (factory, classes, _) in SIZES.items()}


@pytest.mark.parametrize("name", SIZES)
def test_has_the_published_number_of_parameters(built, name):
    assert count(built[name]) == SIZES[name][2]


def test_every_factory_is_measured_and_takes_keywords_only():
    measured = {getattr(factory, "func", factory).__name__ for factory, _, _ in SIZES.values()}
    assert measured == set(models.__all__)
    for name in models.__all__:
        parameters = inspect.signature(getattr(models, name)).parameters
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters.values())
        assert parameters["num_classes"].default is inspect.Parameter.empty
        assert parameters["in_channels"].default == 3


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", SIZES)
def test_gives_logits_at_both_sizes(built, name, size):
    images = torch.empty(2, 3, size, size, device="meta")
    assert built[name](images).shape == (2, SIZES[name][1])


@pytest.mark.parametrize("name", SIZES)
def test_takes_grey_images_and_any_number_of_classes(name):
    network = on_meta(SIZES[name][0], num_classes=7, in_channels=1)
    assert network(torch.empty(2, 1, 32, 32, device="meta")).shape == (2, 7)


# What later steps need --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_exports_with_one_operation_for_each_activation(built, name):
    exported = torch.export.export(built[name], (torch.empty(2, 3, 32, 32, device="meta"),), strict=False)
    targets = Counter(str(node.target) for node in exported.graph.nodes if node.op == "call_function")
    modules = Counter(type(module) for module in built[name].modules())
    assert targets["aten.relu.default"] == modules[nn.ReLU]
    assert targets["aten.hardtanh.default"] == modules[nn.ReLU6]
    assert targets["aten.conv2d.default"] == modules[nn.Conv2d]
    assert targets["aten.batch_norm.default"] == modules[nn.BatchNorm2d]
    # Nothing but the modules' own operations, residual adds and scales, and concatenation: no shape arithmetic.
    assert set(targets) <= {
        *("aten.conv2d.default", "aten.batch_norm.default", "aten.linear.default", "aten.flatten.using_ints"),
        *("aten.relu.default", "aten.hardtanh.default", "aten.dropout.default"),
        *("aten.max_pool2d.default", "aten.avg_pool2d.default", "aten.adaptive_avg_pool2d.default"),
        *("aten.add.Tensor", "aten.mul.Tensor", "aten.cat.default"),
    }


@pytest.mark.parametrize("name", SIZES)
def test_traces_and_calls_every_layer_once(built, name):
    graph = fx.symbolic_trace(built[name]).graph
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    leaves = [path for path, module in built[name].named_modules() if not list(module.children())]
    assert sorted(called) == sorted(leaves)
    functions = {node.target for node in graph.nodes if node.op == "call_function"}
    assert functions <= {operator.add, operator.mul, torch.cat}
    assert not [node for node in graph.nodes if node.op in ("call_method", "get_attr")]
    assert not any(getattr(module, "inplace", False) for module in built[name].modules())


def test_a_residual_scale_of_one_multiplies_nothing(built):
    def multiplications(network):
        return sum(node.target is operator.mul for node in fx.symbolic_trace(network).graph.nodes)

    assert multiplications(built["wrn22_6"]) == 9
    assert multiplications(built["wrn28_10"]) == 0


# Against independent lists of layers ------------------------------------------------------------------------------

KINDS = {
    nn.Conv2d: "conv",
    nn.BatchNorm2d: "bn",
    nn.ReLU: "relu",
    nn.Linear: "linear",
    nn.AdaptiveAvgPool2d: "gap",
    operator.add: "add",
    operator.mul: "mul",
}


@pytest.mark.parametrize(
    ("name", "vector"),
    [
        ("wrn22_6", "wrn22_6_fastai_c100"),
        ("wrn28_10", "wrn28_10_c100"),
        ("resnet20", "resnet20_c10"),
        ("resnet18", "resnet18_kuangliu_c10"),
        ("preact_resnet18_weiaicunzai", "preactresnet18_weiaicunzai_c100"),
    ],
)
def test_layers_equal_the_independent_list(built, name, vector):
    wanted = vectors(vector)
    network, seen = built[name], []

    def record(module, inputs, output):
        row = {
            "in": list(inputs[0].shape[1:]),
            "out": list(output.shape[1:]),
            "bias": module.bias is not None,
        }
        if isinstance(module, nn.Conv2d):
            row |= {"k": list(module.kernel_size), "stride": list(module.stride)}
            row |= {"padding": list(module.padding), "groups": module.groups}
        seen.append(row)

    hooks = [m.register_forward_hook(record) for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    network(torch.empty(1, 3, 32, 32, device="meta"))
    for hook in hooks:
        hook.remove()
    fields = ("in", "out", "bias", "k", "stride", "padding", "groups")
    layers = [layer for layer in wanted["layers"] if layer["type"] in ("conv", "linear")]
    assert seen == [{field: layer[field] for field in fields if field in layer} for layer in layers]
    assert count(network) == wanted["totals"]["params_all"]

    # Everything between those layers, by kind; the source of ResNet-18 writes its global pool as avg_pool2d(4).
    trace = fx.symbolic_trace(network)
    targets = [
        type(trace.get_submodule(node.target)) if node.op == "call_module" else node.target
        for node in trace.graph.nodes
    ]
    kinds = Counter(KINDS[target] for target in targets if target in KINDS)
    assert kinds == Counter(layer["type"].replace("avgpool", "gap") for layer in wanted["layers"])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (resnet18, torchvision.models.resnet18),
        (densenet121, torchvision.models.densenet121),
    ],
)
def test_the_imagenet_form_computes_what_torchvisions_does(ours, theirs):
    torch.manual_seed(0)
    reference = theirs(num_classes=5).eval()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):  # as they start, BatchNorms could change places unseen
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    network = on_meta(ours, num_classes=5, stem="imagenet")
    network.load_state_dict(reference.state_dict(), strict=True, assign=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network(images), reference(images))


# What they compute ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "factory",
    [
        partial(wide_resnet, depth=16, width=2),
        resnet20,
        partial(resnet18, width=16),
        preact_resnet18,
        partial(preact_resnet18, layout="weiaicunzai"),
        googlenet,
        partial(densenet121, growth=8),
        separable_net,
        partial(separable_net, conv="grouped", groups=4),
    ],
)
def test_every_parameter_receives_a_finite_gradient(factory):
    torch.manual_seed(0)
    network = factory(num_classes=10)
    logits = network(torch.randn(4, 3, 32, 32))
    assert logits.isfinite().all()
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A bias in front of a BatchNorm is subtracted again: its gradient is rounding, often 0.
        assert parameter.grad.any() or name.endswith("bias"), name


def test_wide_block_carries_the_activated_input_past_a_scaled_branch():
    torch.manual_seed(0)
    network = wide_resnet(depth=16, width=1, num_classes=10).eval()
    x = torch.randn(2, 32, 8, 8)
    block = network.group2[1]  # no change of shape: an identity shortcut
    activated = block.bn1(x).relu()
    branch = block.conv2(block.bn2(block.conv1(activated)).relu())
    torch.testing.assert_close(block(x), 0.2 * branch + activated)
    first = network.group3[0]  # a projection
    activated = first.bn1(x).relu()
    branch = first.conv2(first.bn2(first.conv1(activated)).relu())
    torch.testing.assert_close(first(x), 0.2 * branch + first.shortcut(activated))


@pytest.mark.parametrize("layout", ["kuangliu", "weiaicunzai"])
def test_preact_layouts_differ_in_what_a_projection_takes(layout):
    torch.manual_seed(0)
    network = preact_resnet18(num_classes=10, layout=layout).eval()
    x = torch.randn(1, 64, 4, 4)
    for block in (network.layer1[0], network.layer2[0]):
        activated = block.bn1(x).relu()
        branch = block.conv2(block.bn2(block.conv1(activated)).relu())
        projects = isinstance(block.shortcut, nn.Conv2d)
        shortcut = block.shortcut(activated if projects and layout == "kuangliu" else x)
        torch.testing.assert_close(block(x), branch + shortcut)


def test_no_batchnorm_has_the_sources_slipped_epsilon(built):
    epsilons = {module.eps for module in built["googlenet"].modules() if isinstance(module, nn.BatchNorm2d)}
    assert epsilons == {1e-5}


@pytest.mark.parametrize(
    ("factory", "fan"),
    [(partial(wide_resnet, depth=10, width=4), 0), (partial(resnet18, width=32), 1), (separable_net, 1)],
)
def test_convolutions_start_as_he_et_al_say(factory, fan):
    torch.manual_seed(0)
    for module in factory(num_classes=10).modules():
        if isinstance(module, nn.Conv2d):
            channels = module.weight.shape[0] if fan else module.weight.shape[1]
            std = math.sqrt(2 / (channels * module.weight[0, 0].numel()))
            # The standard error of a std from n draws is std / sqrt(2 n); five of them.
            assert module.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * module.weight.numel()))
            assert module.bias is None or not module.bias.any()
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_separable_layers_are_as_documented(built):
    layer = built["separable"].layer2
    assert [type(part) for part in layer] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU6, nn.Conv2d, nn.MaxPool2d]
    assert layer.conv.groups == layer.conv.in_channels == layer.conv.out_channels == 16
    assert layer.pointwise.kernel_size == (1, 1)
    pooled = [hasattr(part, "maxpool") for part in built["separable"]]
    assert pooled == [True] * 4 + [False] * 7
    assert {part.conv.groups for part in list(built["separable_grouped"])[1:8]} == {4}
    assert built["separable_grouped"].layer1.conv.groups == 1


def test_widths_scale_to_multiples_of_the_groups():
    network = on_meta(separable_net, num_classes=10, conv="grouped", groups=8, width_multiplier=1.3)
    # 16, 32, 64, 128 and 256 times 1.3 are 20.8, 41.6, 83.2, 166.4 and 332.8.
    assert [part.conv.out_channels for part in list(network)[:8]] == [24, 40, 80, 168, 336, 336, 336, 336]
    narrow = on_meta(resnet18, num_classes=10, width=16)
    assert narrow.fc.in_features == 128


# Wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (wide_resnet, {"depth": 23}, r"depth must be 6n \+ 4 .* got 23"),
        (wide_resnet, {"depth": 4}, r"depth must be 6n \+ 4 .* got 4"),
        (wide_resnet, {"width": 0}, "width must be a whole number of at least 1, got 0"),
        (wide_resnet, {"residual_scale": 0.0}, "residual_scale must be a number above 0, got 0.0"),
        (resnet20, {"num_classes": 0}, "num_classes must be a whole number of at least 1, got 0"),
        (resnet20, {"in_channels": True}, "in_channels must be a whole number of at least 1, got True"),
        (resnet18, {"width": 1.5}, "width must be a whole number of at least 1, got 1.5"),
        (resnet34, {"stem": "7x7"}, "stem must be one of 'cifar', 'imagenet', got '7x7'"),
        (preact_resnet18, {"layout": "he"}, "layout must be one of 'kuangliu', 'weiaicunzai', got 'he'"),
        (googlenet, {"dropout": 1.0}, r"dropout must be a fraction in \[0, 1\), got 1.0"),
        (densenet121, {"growth": -1}, "growth must be a whole number of at least 1, got -1"),
        (densenet121, {"stem": None}, "stem must be one of 'cifar', 'imagenet', got None"),
        (separable_net, {"conv": "depthwise"}, "conv must be one of .* got 'depthwise'"),
        (separable_net, {"widths": ()}, r"widths must name at least one layer, got \(\)"),
        (separable_net, {"widths": (16, 0)}, r"widths\[1\] must be a whole number of at least 1, got 0"),
        (separable_net, {"width_multiplier": -1}, "width_multiplier must be a number above 0, got -1"),
        (separable_net, {"pool": 0}, "pool must be a whole number of at least 1, got 0"),
        (
            separable_net,
            {"groups": 4},
            "groups must be left out unless conv is \"grouped\", got 4 with conv='separable'",
        ),
        (separable_net, {"conv": "grouped"}, "groups must be a whole number of at least 2 .* got None"),
        (separable_net, {"conv": "grouped", "groups": 1}, "groups must be a whole number of at least 2 .* got 1"),
        (separable_net, {"conv": "grouped", "groups": 3}, "groups must divide every one of widths .* got 3"),
        (separable_net, {"conv": "grouped", "groups": 16}, "groups must be smaller than every layer's input .* got 16"),
    ],
)
def test_a_wrong_argument_is_named(factory, options, message):
    with pytest.raises(ValueError, match=message):
        factory(**({"num_classes": 10} | options))
