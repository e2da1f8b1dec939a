"""One network read twice, from its module and from the ONNX file that torch makes of it: line by line the same."""

import warnings
from collections import Counter

import pytest
import torch

from callbacks.ledger import build
from callbacks.op_trace import trace
from micronet import models
from micronet.onnx_cost import read_onnx

pytest.importorskip("onnxscript", reason="torch's exporter needs it")
timm = pytest.importorskip("timm")


def randomised(model):
    """Give every tensor numbers of its own: the exporter merges equal ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) / 2 + 0.25)
    return model.eval()


def both(model, size, path):
    """The ledgers of a module and of its ONNX file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(
            randomised(model),
            (torch.zeros(2, *size),),
            path,
            dynamo=True,
            verbose=False,
            external_data=False,
            opset_version=18,
            dynamic_shapes=({0: "batch"},),
            input_names=["input"],
            output_names=["logits"],
        )
        source = build(trace(model, size))
    return source, build(read_onnx(path))


def costs(ledger):
    """What each line that costs anything costs, in order."""
    return [
        (x.name, x.op, x.mults, x.adds, x.macs, x.comparisons, x.weights, x.nonzero, x.bias, x.in_shape, x.out_shape)
        for x in ledger.lines
        if x.mults or x.adds or x.comparisons
    ]


def stored(ledger):
    """What is stored; the exporter turns the weights of matrix products round."""
    return Counter((array.role, array.numel, array.bits, array.nonzero) for array in ledger.arrays)


def total(ledger, what):
    return sum(getattr(line, what) for line in ledger.lines)


SMALL = {"resnet20": {}, "wide_resnet": {"depth": 10, "width": 2}, "separable_net": {}}
LARGE = {"preact_resnet18": {}, "googlenet": {}, "densenet121": {"growth": 8}}
OWN = [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]


@pytest.mark.parametrize("name", OWN)
def test_our_networks_cost_the_same_line_by_line_whichever_they_are_read_from(name, tmp_path):
    model = getattr(models, name)(num_classes=10, **{**SMALL, **LARGE}[name])
    source, onnx = both(model, (3, 32, 32), tmp_path / "m.onnx")
    assert costs(onnx) == costs(source)
    assert stored(onnx) == stored(source)
    assert onnx.peak_bytes == source.peak_bytes


SCALED = "attention: the file scales its factors; the module counts a scaling of the scores"
WITHOUT_ZERO = "sums that start with the number 0: the exporter leaves that sum out"
# All that differs between module and file, for the families where anything does.
DIFFERENT = {
    "cait_xxs24_224": SCALED,
    "crossvit_tiny_240": SCALED,
    "dla46_c": "two equal poolings of one tensor: the exporter makes one of them",
    "eva02_tiny_patch14_224": SCALED,
    "fastvit_t8": WITHOUT_ZERO,
    "mobileone_s0": WITHOUT_ZERO,
    "mobilevit_xxs": SCALED,
    "nf_regnet_b0": "products with the number 1: the exporter leaves them out",
    "pit_ti_224": SCALED,
    "pvt_v2_b0": SCALED,
    "tiny_vit_5m_224": SCALED,
    "vit_tiny_patch16_224": SCALED,
    "volo_d1_224": SCALED,
    "xcit_nano_12_p16_224": SCALED,
}


def check_timm(name, path, size=None, **options):
    """Equal MACs and weights; but for what is explained above, equal costs and arrays in all."""
    model = timm.create_model(name, **options)
    source, onnx = both(model, size or model.default_cfg["input_size"], path)
    assert onnx.uncounted == source.uncounted == ()
    for what in ("macs", "weights"):
        assert total(onnx, what) == total(source, what), what
    differs = [what for what in ("mults", "adds", "comparisons") if total(onnx, what) != total(source, what)]
    differs += ["arrays"] * (stored(onnx) != stored(source))
    assert bool(differs) == (name in DIFFERENT), differs


BLOCKS = [
    ("vit_tiny_patch16_224", {"depth": 1, "img_size": 32}),
    ("convnext_atto", {"depths": (1, 1, 1, 1)}),
]


@pytest.mark.parametrize(("name", "options"), BLOCKS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_block_of_a_family_of_timm_has_the_same_macs_whichever_it_is_read_from(name, options, tmp_path):
    check_timm(name, tmp_path / "m.onnx", (3, 32, 32), num_classes=10, **options)


FAMILIES = (
    "cait_xxs24_224 coat_lite_tiny convnext_atto crossvit_tiny_240 dla46_c edgenext_xx_small efficientformer_l1 "
    "efficientnet_b0 efficientnet_lite0 eva02_tiny_patch14_224 nf_regnet_b0 pvt_v2_b0 tiny_vit_5m_224 volo_d1_224 "
    "fastvit_t8 ghostnet_050 gmlp_ti16_224 inception_v3 lcnet_050 levit_128s mixer_s32_224 mobilenetv3_small_050 "
    "mobileone_s0 mobilevit_xxs mobilevitv2_050 pit_ti_224 poolformer_s12 regnety_002 repvgg_a0 res2net50_14w_8s "
    "resmlp_12_224 resnest14d resnet18 skresnet18 swin_tiny_patch4_window7_224 tinynet_e vgg11 vit_tiny_patch16_224 "
    "xcit_nano_12_p16_224"
)
# What torch's exporter cannot write.
FAILING = ("nest_tiny", "twins_svt_small")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES.split())
def test_a_family_of_timm_has_the_same_macs_whichever_it_is_read_from(name, tmp_path):
    check_timm(name, tmp_path / "m.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILING)
def test_the_families_that_torch_cannot_export_still_are_those(name, tmp_path):
    with pytest.raises(torch.onnx.OnnxExporterError):
        check_timm(name, tmp_path / "m.onnx")
