"""model.pth: bit-equal after a round trip, read without running code, each bad file with a line of its own."""

import contextlib
import os
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import micronet.models as networks
from micronet import Bundle, MicronetError, evaluate, load, save
from micronet.data import cifar10, plain_loader
from micronet.factories import describe_factory, find_factory

SMALL = {
    "wide_resnet": {"depth": 10, "width": 1},
    "resnet18": {"width": 8},
    "resnet34": {"width": 8},
    "resnet110": {},
    "densenet121": {"growth": 4},
    "separable_net": {"width_multiplier": 0.25},
}


def bundle_of(build, **extra) -> Bundle:
    factory, kwargs = describe_factory(build)
    torch.manual_seed(1)
    model = build().eval()
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.rand_like(value) * 0.01)  # BatchNorm's statistics, too, are unlike a fresh network's
    parts = {"classes": ("a", "b", "c"), "input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.2,) * 3}
    return Bundle(model=model, factory=factory, kwargs=kwargs, **(parts | extra))


def small() -> Bundle:
    return bundle_of(partial(networks.separable_net, num_classes=3, width_multiplier=0.25))


@pytest.mark.parametrize("name", networks.__all__)
def test_every_network_comes_back_bit_equal(name, tmp_path):
    bundle = bundle_of(partial(getattr(networks, name), num_classes=3, **SMALL.get(name, {})))
    save(bundle, tmp_path / "model.pth")
    again = load(tmp_path / "model.pth")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(bundle.model(x), again.model(x))
    assert (again.classes, again.input_size, again.mean) == (bundle.classes, bundle.input_size, bundle.mean)
    assert not again.model.training


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    depth=st.sampled_from([10, 16]),
    width=st.integers(1, 2),
    classes=st.integers(1, 7),
    note=st.dictionaries(
        st.text(max_size=5), st.one_of(st.integers(), st.floats(allow_nan=False), st.text(max_size=9))
    ),
)
def test_arguments_rows_and_provenance_come_back_as_they_were(tmp_path, depth, width, classes, note):
    build = partial(networks.wide_resnet, depth=depth, width=width, num_classes=classes)
    bundle = bundle_of(build, history=[note], provenance={"options": note})
    save(bundle, tmp_path / "model.pth")
    again = load(tmp_path / "model.pth")
    assert again.kwargs == {"depth": depth, "width": width, "num_classes": classes}
    assert again.history == [note]
    assert again.provenance == {"options": note}


def test_half_precision_halves_the_file_and_is_the_rounded_network(tmp_path):
    bundle = bundle_of(partial(networks.resnet20, num_classes=3))
    save(bundle, tmp_path / "full.pth")
    save(bundle, tmp_path / "half.pth", dtype=torch.float16)
    again = load(tmp_path / "half.pth").model.state_dict()
    for name, value in bundle.model.state_dict().items():
        rounded = value.half().float() if value.is_floating_point() else value
        assert torch.equal(again[name], rounded)
    sizes = [(tmp_path / name).stat().st_size for name in ("half.pth", "full.pth")]
    assert sizes[0] < 0.6 * sizes[1]


def test_loading_leaves_the_random_numbers_alone(tmp_path):
    save(small(), tmp_path / "model.pth")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    load(tmp_path / "model.pth")
    assert torch.equal(torch.rand(1), expected)


def test_the_file_holds_tensors_and_plain_containers_only(tmp_path):
    save(small(), tmp_path / "model.pth")
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    assert content["factory"] == "micronet.models:separable_net"


def test_torchvision_and_timm_networks_load_by_name(tmp_path):
    import torchvision

    save(bundle_of(partial(torchvision.models.squeezenet1_1, num_classes=3)), tmp_path / "tv.pth")
    assert load(tmp_path / "tv.pth").kwargs == {"num_classes": 3}
    timm = pytest.importorskip("timm", reason="the timm extra is not installed")
    bundle = bundle_of(partial(timm.create_model, model_name="resnet10t", num_classes=3))
    save(bundle, tmp_path / "timm.pth")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "timm.pth").model(x), bundle.model(x))


DETECTION = "torchvision.models.detection.faster_rcnn"
MOBILENET = "torchvision.models.mobilenetv2:mobilenet_v2"
REGNET = "torchvision.models.regnet:regnet_x_400mf"


class Own(nn.Module):
    """A user's network."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(4, num_classes)


def test_a_users_class_needs_a_factory(tmp_path):
    bundle = bundle_of(partial(Own, num_classes=3))
    with pytest.raises(MicronetError, match="not a network of micronet"):
        save(bundle, tmp_path / "model.pth")
    save(bundle, tmp_path / "model.pth", factory=Own)
    with pytest.raises(MicronetError, match="--factory FILE:NAME"):
        load(tmp_path / "model.pth")
    again = load(tmp_path / "model.pth", factory=Own)
    assert torch.equal(again.model.fc.weight, bundle.model.fc.weight)


class Measured(nn.Module):
    """A user's network that computes with its own weights while it is built."""

    def __init__(self, num_classes: int, depth: int) -> None:
        super().__init__()
        self.fc = nn.Linear(4, int(torch.ones(num_classes).sum().item()) * depth)


def test_a_trusted_factory_may_compute_while_it_builds(tmp_path):
    bundle = bundle_of(partial(Measured, num_classes=3, depth=2))
    save(bundle, tmp_path / "model.pth", factory=Measured)
    assert torch.equal(load(tmp_path / "model.pth", factory=Measured).model.fc.weight, bundle.model.fc.weight)


def test_whole_numbers_for_statistics_are_stored_as_they_are_read(tmp_path):
    save(bundle_of(partial(networks.resnet20, num_classes=3), mean=(0, 0, 0), std=(1, 1, 1)), tmp_path / "model.pth")
    assert load(tmp_path / "model.pth").std == (1.0, 1.0, 1.0)


def test_the_committed_network_answers_as_its_readme_says(real):
    path = Path(__file__).parent / "data" / "resnet20_cifar10.pth"
    assert path.stat().st_size < 600_000
    bundle = load(path)
    assert bundle.history[-1]["test"]["top1_count"] == 9039
    data = real(cifar10)
    result = evaluate(bundle.model, plain_loader(data.test, data))
    assert bundle.classes == data.classes
    assert result.top1_count == pytest.approx(9038, abs=5)  # another CPU rounds otherwise


class Hostile:
    """Runs a command when unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def change(path, **changes) -> None:
    content = torch.load(path, weights_only=True)
    torch.save({**content, **changes}, path)


def written(path) -> None:
    save(small(), path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.mkdir(), "is a folder"),
        (lambda p: p.write_bytes(b""), "not a model file"),
        (lambda p: p.write_bytes(b"hello, world"), "not a model file"),
        (lambda p: (written(p), p.write_bytes(p.read_bytes()[:-300])), "truncated"),
        (lambda p: (written(p), p.write_bytes(p.read_bytes()[:50])), "truncated"),
        (lambda p: p.write_bytes(pickle.dumps(Own)), "not a model file"),
        (lambda p: torch.save(Own(3), p), "pickled objects"),
        (lambda p: torch.save(Own(3).state_dict(), p), "not a bundle of micronet's .keys 'fc.weight'"),
        (lambda p: torch.save([1, 2], p), "not a bundle of micronet's .a list"),
        (lambda p: (written(p), change(p, version=99)), "format version 99.*update micronet"),
        (lambda p: (written(p), change(p, kwargs=[1])), "its kwargs is not a dict"),
        (lambda p: (written(p), change(p, state={})), "weights don't fit.*missing"),
        (lambda p: (written(p), change(p, kwargs={"num_classes": 4})), "weights don't fit"),
        (lambda p: (written(p), change(p, kwargs={"num_classes": 3, "huge": 1})), "can't be built"),
        (lambda p: (written(p), change(p, kwargs={"num_classes": 10**12})), "can't be built|don't fit"),
        (lambda p: (written(p), change(p, factory="os:system")), "not a network of micronet"),
        (lambda p: (written(p), change(p, factory="micronet.run:run")), "not a network of micronet"),
        (lambda p: (written(p), change(p, factory="torchvision.datasets:CIFAR10")), "not a network of micronet"),
        (lambda p: (written(p), change(p, factory="timm.models:load_checkpoint")), "not a network of micronet"),
        (lambda p: (written(p), change(p, kwargs={"checkpoint_path": "x"})), "would fetch something"),
        (
            lambda p: (written(p), change(p, factory=f"{DETECTION}:fasterrcnn_resnet50_fpn")),
            "not a network of micronet",
        ),
        (lambda p: (written(p), change(p, input_size=[])), "its fields are not"),
        (lambda p: (written(p), change(p, classes=[1])), "its fields are not"),
        (
            lambda p: (written(p), change(p, state={"x": torch.empty(10**6, 10**6, device="meta")})),
            "its fields are not",
        ),
        (lambda p: (written(p), change(p, state={"x": torch.zeros(1).expand(10**6, 10**6)})), "its fields are not"),
        (lambda p: (written(p), change(p, std=[0.1, 0.0, 0.1])), "its fields are not"),
        (lambda p: (written(p), change(p, mean=[0.1])), "its fields are not"),
        (lambda p: (written(p), change(p, state={"x": torch.eye(2).to_sparse()})), "damaged"),
        (lambda p: (written(p), change(p, factory=MOBILENET, kwargs={"round_nearest": 0})), "can't be built: .*zero"),
        (lambda p: (written(p), change(p, factory=REGNET, kwargs={"block_width": 10**9})), "can't be built"),
    ],
)
def test_each_bad_file_has_a_line_of_its_own(spoil, says, tmp_path):
    path = tmp_path / "model.pth"
    spoil(path)
    with pytest.raises(MicronetError, match=says) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path):
    sign = tmp_path / "ran"
    torch.save({"format": "micronet", "version": 1, "state": Hostile(sign)}, tmp_path / "model.pth")
    with pytest.raises(MicronetError, match="pickled objects"):
        load(tmp_path / "model.pth")
    assert not sign.exists()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_give_a_clear_line_or_the_same_network(tmp_path, data):
    path = tmp_path / "model.pth"
    whole = tmp_path / "whole.pth"
    if not whole.exists():
        save(small(), whole)
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    with contextlib.suppress(MicronetError):  # anything else, a crash included, fails
        again = load(path).model
        assert list(again.state_dict()) == list(load(whole).model.state_dict())


def test_timm_names_that_are_addresses_are_refused():
    pytest.importorskip("timm", reason="the timm extra is not installed")
    for name in ("hf-hub:someone/model", "/tmp/x", "nothing_like_that"):
        with pytest.raises(MicronetError, match="not a network"):
            find_factory("timm.models._factory:create_model", {"model_name": name})


def test_timm_models_of_their_own_name_take_no_other_name():
    pytest.importorskip("timm", reason="the timm extra is not installed")
    with pytest.raises(MicronetError, match="not a network"):
        find_factory("timm.models.resnet:resnet18", {"model_name": "local-dir:/tmp/x"})
    assert find_factory("timm.models.resnet:resnet18", {})(num_classes=2).num_classes == 2


def test_what_cannot_be_stored_is_named_before_anything_is_trained():
    with pytest.raises(MicronetError, match="lambda"):
        describe_factory(lambda num_classes: Own(num_classes))
    with pytest.raises(MicronetError, match="by name"):
        describe_factory(partial(Own, 3))
    with pytest.raises(MicronetError, match="argument num_classes of Own must be numbers and text"):
        describe_factory(partial(Own, num_classes=torch.tensor(3)))


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    save(small(), path)
    before = path.read_bytes()

    write = Path.write_bytes

    def full_disk(self, content):
        write(self, content[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        save(small(), path)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]
