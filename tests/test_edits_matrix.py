"""Every edit on every network of the project, and on timm's EfficientNet and MobileNetV3, at 32 and 64 pixels."""

from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import micronet.models as networks
from callbacks.op_trace import total_params
from micronet import Bundle, MicronetError, load, save
from micronet.data import cifar10
from micronet.edits import fold_bn, low_rank, separable, swap_activation
from micronet.start import some_images

TIMM = ("efficientnet_b0", "mobilenetv3_small_100", "mobilenetv3_large_100")
EDITS = {
    "fold_bn": fold_bn,
    "svd": partial(low_rank, method="svd", rank=2),
    "spatial_svd": partial(low_rank, method="spatial_svd", rank=2),
    "tucker2": partial(low_rank, method="tucker2", rank=2),
    "separable": separable,
}
# All of their k x k convolutions are depthwise, but for the one that reads the image.
DEPTHWISE = (*TIMM, "separable_net")
CASES = [(name, edit) for name in (*networks.__all__, *TIMM) for edit in (*EDITS, "swap_activation")]
QUICK = [("mobilenetv3_small_100", "fold_bn"), ("mobilenetv3_small_100", "svd"), ("separable_net", "tucker2")]


@pytest.fixture(scope="module")
def images(real):
    return some_images(real(cifar10, valid=0.02), 8)


def built(name):
    torch.manual_seed(0)
    if name in TIMM:
        kwargs = {"model_name": name, "num_classes": 10}
        return timm.create_model(**kwargs), "timm.models._factory:create_model", kwargs
    factory, kwargs = getattr(networks, name), {"num_classes": 10}
    return factory(**kwargs), f"{factory.__module__}:{name}", kwargs


def swap(model, images):
    """Put another activation in the place of the first one that the network has."""
    kinds = (nn.SiLU, nn.Hardswish, nn.ReLU6, nn.ReLU)
    old = next(kind for kind in kinds if any(type(m) is kind for m in model.modules()))
    return swap_activation(model, old, nn.LeakyReLU, images=images)


def check(name, edit, size, images, folder):
    """An edit passes its gates, its file gives the same answers, and low-rank factors are fewer weights."""
    model, factory, kwargs = built(name)
    model.eval()
    images = images if size == 32 else F.interpolate(images, size=(size, size), mode="bilinear")
    if edit == "separable" and name in DEPTHWISE:
        with pytest.raises(MicronetError, match="there is no layer that it applies to"):
            separable(model, images=images)
        return
    edited = swap(model, images) if edit == "swap_activation" else EDITS[edit](model, images=images)
    assert edited.images == len(images)
    if edit in ("svd", "spatial_svd", "tucker2", "separable"):
        assert total_params(edited.model) < total_params(model)
    bundle = Bundle(
        model=edited.model, factory=factory, kwargs=kwargs, classes=tuple("abcdefghij"), input_size=(3, size, size),
        mean=(0.5,) * 3, std=(0.2,) * 3, edits=[edited.log],
    )  # fmt: skip
    save(bundle, folder / "model.pth")
    with torch.no_grad():
        assert torch.equal(load(folder / "model.pth").model(images), edited.model(images))


@pytest.mark.parametrize(("name", "edit"), QUICK)
def test_an_edit_works_and_is_kept(name, edit, images, tmp_path):
    check(name, edit, 32, images, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize(("name", "edit"), CASES)
def test_every_edit_works_on_every_network(name, edit, size, images, tmp_path):
    check(name, edit, size, images, tmp_path)
