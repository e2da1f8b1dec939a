"""Networks as ONNX graphs: what they answer, what is folded, and that nothing of the machine is left in them."""

import io
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from callbacks import onnx_export
from callbacks.onnx_export import ExportError, deployed, export_onnx, normalising


def run(proto, images):
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": images.numpy()})[0])


class Net(nn.Module):
    """Two layers of equal weights, BatchNorm with negative factors, GELU, a linear layer on a sequence."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.second = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.norm.weight.data.copy_(torch.tensor([-1.0, 0.5, 2.0]))
        self.norm.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
        self.norm.running_var.copy_(torch.tensor([0.5, 1.5, 2.5]))
        self.act = nn.GELU()
        self.mix = nn.Linear(3, 5)
        self.drop = nn.Dropout(0.9)
        self.one, self.same = nn.Linear(5, 5), nn.Linear(5, 5)
        self.same.load_state_dict(self.one.state_dict())
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        y = self.act(self.norm(self.second(self.first(x))))
        y = self.drop(self.mix(y.flatten(2).transpose(1, 2))).mean(1)
        return self.head(self.same(self.one(y).relu()).relu())


@pytest.fixture(scope="module")
def exported():
    net = Net().train()
    mask = torch.rand(net.second.weight.shape) < 0.5
    net.second.weight.data[~mask] = 0
    return net, mask, export_onnx(net, (3, 8, 8))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_number_of_images_is_answered_as_the_network_does(exported, batch):
    net, _, proto = exported
    images = torch.randn(batch, 3, 8, 8)
    before = net.eval()(images).detach()
    assert ((run(proto, images) - before).norm(dim=1) / before.norm(dim=1)).max() < 1e-5
    net.train()


def test_the_network_stays_as_it_was():
    net = Net().train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    copy = deployed(net, (3, 8, 8))
    assert net.training
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not copy.training
    assert isinstance(copy.norm, nn.Identity)


def test_zeros_stay_zeros_and_names_stay(exported):
    _, mask, proto = exported
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    assert (weights["second.weight"][~mask.numpy()] == 0).all()
    assert not np.signbit(weights["second.weight"][~mask.numpy()]).any()  # a negative factor makes no -0.0 of them
    assert not any("norm" in name for name in weights)
    onnx.checker.check_model(proto, full_check=True)


def test_equal_arrays_are_one_in_the_file(exported):
    """What it answers with them is compared above."""
    weights = {tensor.name for tensor in exported[2].graph.initializer}
    assert len(weights & {"one.weight", "same.weight"}) == 1
    assert sum(node.op_type == "Gemm" for node in exported[2].graph.node) == 3


def test_nothing_of_the_machine_or_the_program_is_left(exported):
    _, _, proto = exported
    content = proto.SerializeToString()
    for word in (str(Path.cwd()), str(Path.home()), "site-packages", "test_onnx_export", "forward", ".py", "Net"):
        assert word.encode() not in content
    assert not proto.metadata_props
    assert all(not node.metadata_props and not node.doc_string for node in proto.graph.node)


def test_what_a_control_flow_body_notes_is_taken_away_too():
    from onnx import TensorProto, helper

    body = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"], doc_string="/home/me")],
        "body",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1])],
        doc_string="/home/me",
    )
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)]
    values = [helper.make_tensor_value_info(name, kind, [1]) for name, kind in (("x", 1), ("c", 9), ("y", 1))]
    proto = helper.make_model(helper.make_graph(nodes, "g", values[:2], values[2:]))
    assert b"/home/me" in proto.SerializeToString()
    assert b"/home/me" not in onnx_export.stripped(proto).SerializeToString()


class Two(nn.Module):
    """Two outputs."""

    def forward(self, x):
        return x.mean((2, 3)), x.amax((2, 3))


class Looks(nn.Module):
    """What it computes depends on the image."""

    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def test_what_is_no_classifier_or_too_large_for_one_file_is_refused(monkeypatch):
    with pytest.raises(ExportError, match="gives 2 outputs"):
        export_onnx(Two(), (3, 4, 4))
    with pytest.raises(ValueError, match=r".") as caught:
        export_onnx(Looks(), (3, 4, 4))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(onnx_export, "MOST_BYTES", 100)
    with pytest.raises(ExportError, match=r"\d\d\d bytes of weights don't fit into one ONNX file"):
        export_onnx(Net(), (3, 8, 8))


def test_normalisation_in_the_graph(exported):
    net, _, proto = exported
    inside = onnx.load(io.BytesIO(proto.SerializeToString()))
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    normalising(inside, mean, std)
    onnx.checker.check_model(inside, full_check=True)
    images = torch.rand(3, 3, 8, 8)
    by_hand = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(run(inside, images), net.eval()(by_hand), rtol=1e-4, atol=1e-5)
    net.train()
    with pytest.raises(ValueError, match="takes 3 channels, got 1 means"):
        normalising(proto, (0.5,), (0.2,))
