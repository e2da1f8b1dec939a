"""Files of 8-bit and 16-bit weights: what they hold, how exactly, and what is refused."""

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from onnx_networks import Plain, PreActivated, exported, images
from torch import nn

from callbacks.calibrate_onnx import calibrated
from callbacks.half import HalfError, computed_half, computes_half, stored_half
from callbacks.onnx_export import export_onnx
from callbacks.onnx_run import logits
from callbacks.quantize_onnx import quantize
from micronet import Bundle, MicronetError, load
from micronet.bundle import save
from micronet.factories import describe_factory
from micronet.minmax8 import decode, encode
from micronet.models import separable_net

FACTORY = describe_factory(separable_net)[0]
REAL = Path(__file__).parent / "data" / "resnet20_cifar10.pth"


def test_a_tensor_is_stored_by_the_formula_of_the_study():
    value = torch.tensor([-1.0, 0.0, 0.5, 2.0, 1.0])
    table = encode({"w": value})
    low, high = value.min(), value.max()
    assert table["codes"].tolist() == ((value - low) / (high - low) * 255).round().tolist() == [0, 85, 128, 255, 170]
    assert decode(table)["w"].tolist() == pytest.approx([-1.0, 0.0, -1 + 128 * 3 / 255, 2.0, 1.0], abs=1e-6)


numbers = st.floats(-1e6, 1e6, width=32)


@given(tensors=st.lists(st.lists(numbers, max_size=30), max_size=4))
def test_every_number_is_off_by_half_a_step_at_most(tensors):
    state = {str(place): torch.tensor(values, dtype=torch.float32) for place, values in enumerate(tensors)}
    found = decode(encode(state))
    assert list(found) == list(state)
    for name, value in state.items():
        assert found[name].shape == value.shape
        if value.numel():
            step = (value.max() - value.min()).double() / 255
            assert (found[name].double() - value.double()).abs().max() <= step * 0.5 + 1e-6 * value.abs().max()
            assert (found[name].max(), found[name].min()) == (value.max(), value.min())


def test_one_number_everywhere_and_whole_numbers_are_kept_exactly():
    state = {"same": torch.full((3, 2), 0.1), "none": torch.zeros(0, 4), "one": torch.tensor(7.3)}
    found = decode(encode(state | {"count": torch.tensor(12345)}))
    assert set(found) == set(state)
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_numbers_without_a_code_are_refused():
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(MicronetError, match="w holds what is no finite number"):
            encode({"w": torch.tensor([1.0, wrong])})


def sparse_bundle():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = separable_net(num_classes=11, width_multiplier=0.25).eval()
    name = next(name for name, p in model.named_parameters() if p.dim() == 4 and p.shape[1] > 1)
    weight = model.get_parameter(name)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    with torch.no_grad():
        weight.mul_(mask).add_(mask * 0.37)  # so that no code is exactly zero
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(7)
    classes = tuple(map(str, range(11)))
    plain = {"classes": classes, "input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    arguments = {"num_classes": 11, "width_multiplier": 0.25}
    return Bundle(model, FACTORY, arguments, masks={name: mask}, **plain)


def test_a_network_of_8_bit_weights_is_read_back_with_its_zeros(tmp_path):
    bundle = sparse_bundle()
    save(bundle, tmp_path / "small.pth", dtype=torch.uint8)
    found = load(tmp_path / "small.pth")
    (name,) = bundle.masks
    assert torch.equal(found.masks[name], bundle.masks[name])
    assert not found.model.get_parameter(name)[~bundle.masks[name]].any()
    for key, value in bundle.model.state_dict().items():
        near = found.model.state_dict()[key]
        if value.is_floating_point():
            step = (value.max() - value.min()) / 255
            assert near.dtype == torch.float32
            assert (near - value).abs().max() <= 0.51 * step + 1e-6
        else:
            assert torch.equal(near, value)
    save(found, tmp_path / "again.pth")
    assert torch.load(tmp_path / "again.pth", weights_only=True)["version"] == 1  # which older micronets read


def test_the_studys_network_is_a_quarter_of_a_megabyte(tmp_path):
    """265,227 parameters at 11 classes, as the study counted them."""
    model = separable_net(num_classes=11).eval()
    plain = {"classes": tuple("abcdefghijk"), "input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    bundle = Bundle(model, FACTORY, {"num_classes": 11}, **plain)
    assert sum(p.numel() for p in model.parameters()) == 265_227
    save(bundle, tmp_path / "small.pth", dtype=torch.uint8)
    held = sum(value.numel() for value in model.state_dict().values() if value.is_floating_point())
    size = (tmp_path / "small.pth").stat().st_size
    assert held < 265_227 * 1.03  # statistics of BatchNorm, too
    assert held < size < held + 40_000


def change(path, **fields):
    content = torch.load(path, weights_only=True)
    content["minmax8"] = content["minmax8"] | fields
    torch.save(content, path)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"version": 2}, "8-bit weights of version 2, this micronet reads up to 1: update micronet"),
        ({"version": "1"}, "damaged: its 8-bit weights"),
        ({"codes": torch.zeros(7, dtype=torch.uint8)}, "damaged: its 8-bit weights"),
        ({"codes": torch.zeros(1, dtype=torch.uint8).expand(10**9)}, "damaged: its 8-bit weights"),
        ({"shapes": [[10**9, 10**9]]}, "damaged: its 8-bit weights"),
        ({"ranges": torch.full((1, 2), float("nan"))}, "damaged: its 8-bit weights"),
        ({"names": [1]}, "damaged: its 8-bit weights"),
        ({"names": 3}, "damaged: its 8-bit weights"),
    ],
)
def test_hostile_codes_are_one_line(fields, says, tmp_path):
    save(sparse_bundle(), tmp_path / "m.pth", dtype=torch.uint8)
    change(tmp_path / "m.pth", **fields)
    with pytest.raises(MicronetError, match=says) as caught:
        load(tmp_path / "m.pth")
    assert str(caught.value).startswith(f"{tmp_path / 'm.pth'}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t["shapes"].__setitem__(0, [-1]),
        lambda t: t["shapes"].__setitem__(0, [1.5]),
        lambda t: t["shapes"].__setitem__(0, "ab"),
        lambda t: t["ranges"].__setitem__((0, 0), 9.0),
        lambda t: t["ranges"].__setitem__((0, 1), float("inf")),
        lambda t: t.update(ranges=t["ranges"].double()),
        lambda t: t.update(codes=t["codes"].to(torch.int8)),
        lambda t: t.update(codes=t["codes"].to_sparse()),
        lambda t: t.update(codes=t["codes"][:1].expand(17)),  # one byte that claims to be all
        lambda t: t["names"].__setitem__(1, t["names"][0]),
        lambda t: t.pop("codes"),
    ],
)
def test_a_table_is_checked_before_anything_is_made_of_it(spoil):
    table = encode({"a": torch.randn(3, 4), "b": torch.randn(5)})
    decode(table)
    spoil(table)
    with pytest.raises(MicronetError, match="damaged: its 8-bit weights"):
        decode(table)


def test_what_is_no_table_is_refused():
    for wrong in (None, 3, [], {}, {"version": 1}):
        with pytest.raises(MicronetError, match="damaged"):
            decode(wrong)


@pytest.mark.parametrize("kind", [Plain, PreActivated])
def test_weights_of_16_bits_take_half_and_compute_in_float32(kind):
    proto = exported(kind)
    made = stored_half(proto)
    onnx.checker.check_model(made, full_check=True)
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    for name, value in before.items():
        if value.dtype == np.float32:
            np.testing.assert_array_equal(stored[f"{name}.half"], value.astype(np.float16))
    assert not computes_half(made)
    wanted, found = logits(proto, images()), logits(made, images())
    assert 0 < np.abs(found - wanted).max() < 5e-3 * np.abs(wanted).max()


def test_files_of_the_committed_resnet20_are_as_small_as_is_said():
    """Without descriptions, both: 1,094,694 bytes in float32."""
    proto = export_onnx(load(REAL).model, (3, 32, 32))
    small = quantize(calibrated(proto, np.random.default_rng(0).standard_normal((4, 3, 32, 32), np.float32)))
    half = stored_half(proto)
    weights = sum(4 * np.prod(tensor.dims) for tensor in proto.graph.initializer if tensor.data_type == 1)
    assert proto.ByteSize() > 3.3 * small.ByteSize()
    assert proto.ByteSize() - half.ByteSize() == pytest.approx(weights / 2, rel=0.02)


def test_a_graph_that_computes_in_16_bits_takes_and_gives_32():
    made = computed_half(exported(PreActivated))
    onnx.checker.check_model(made, full_check=True)
    shaped = onnx.shape_inference.infer_shapes(made)
    kinds = {value.type.tensor_type.elem_type for value in shaped.graph.value_info}
    assert TensorProto.FLOAT not in kinds
    assert TensorProto.FLOAT16 in kinds
    ends = [*made.graph.input, *made.graph.output]
    assert {value.type.tensor_type.elem_type for value in ends} == {TensorProto.FLOAT}
    wanted, found = logits(exported(PreActivated), images()), logits(made, images())
    assert np.abs(found - wanted).max() < 5e-2 * np.abs(wanted).max()


def test_a_weight_beyond_16_bits_is_refused():
    proto = onnx.ModelProto()
    proto.CopyFrom(exported(Plain))
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "fc.weight")
    tensor.CopyFrom(numpy_helper.from_array(np.full((4, 8), 1e5, np.float32), "fc.weight"))
    for make in (stored_half, computed_half):
        with pytest.raises(HalfError, match=r"fc.weight holds a number that float16 can't: its largest is 65504"):
            partial(make, proto)()
