"""Every network with every importance, on real CIFAR at two sizes: pruned in a fit, trained on, read bit for bit."""

from functools import partial

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from pruning import count, fit
from torch import nn
from torch.utils.data import TensorDataset

import micronet.models as networks
from callbacks.prune import PruneChannels
from callbacks.ramp import OneShot
from micronet import load, sgd
from micronet.bundle import Bundle, save
from micronet.data import cifar10, plain_loader

TIMM = ("efficientnet_b0", "mobilenetv3_small_100", "mobilenetv3_large_100")
SMALLER = {"wide_resnet": {"depth": 10, "width": 2}}
IMPORTANCES = ("l1", "l2", "mean_abs", "bn_scale", "fpgm", "taylor", "random")
SCOPES = ("local", "global", "isomorphic")

pytestmark = pytest.mark.slow


def factory(name):
    if name in TIMM:
        timm = pytest.importorskip("timm", reason="the timm extra is not installed")
        return partial(timm.create_model, name)
    return partial(getattr(networks, name), **SMALLER.get(name, {}))


@pytest.fixture(scope="module")
def images(real):
    """Some real images and their labels, by size."""
    data = real(cifar10, batch_size=16).limit(48)
    batches = list(plain_loader(data.valid, data))
    x, y = (torch.cat([batch[part] for batch in batches]) for part in (0, 1))
    x = x.contiguous()
    return {32: (x, y), 64: (nn.functional.interpolate(x, size=64, mode="bilinear"), y)}


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("name", [*networks.__all__, *TIMM])
def test_pruned_trained_and_read_again(name, importance, size, images, tmp_path):
    build = factory(name)
    torch.manual_seed(0)
    model = build(num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # as if trained: scales that are alike choose nothing
    x, y = images[size]
    sets = TensorDataset(x[:32], y[:32]), TensorDataset(x[32:], y[32:])
    dls = DataLoaders.from_dsets(*sets, bs=16, num_workers=0, device="cpu")
    learn = Learner(dls, model, CrossEntropyLossFlat(), opt_func=sgd())
    learn.logger = lambda _: None
    before = count(model)
    scope = SCOPES[IMPORTANCES.index(importance) % len(SCOPES)]
    cb = PruneChannels(params=0.5, importance=importance, scope=scope, schedule=OneShot(end=0.5))
    fit(learn, 1, cb, lr=1e-3)
    assert cb.settled
    assert 0.3 * before < count(model) <= 0.5 * before
    fit(learn, 1, lr=1e-3)  # with what is left, by an optimizer of the same parameters
    names = tuple(map(str, range(10)))
    bundle = Bundle(model.eval(), "tests:network", {"num_classes": 10}, names, (3, size, size), (0.5,) * 3, (0.5,) * 3)
    save(bundle, tmp_path / "model.pth", factory=build)
    again = load(tmp_path / "model.pth", factory=build).model
    with torch.no_grad():
        answers = model(x[:8])
        assert answers.shape == (8, 10)
        assert answers.isfinite().all()
        assert torch.equal(again(x[:8]), answers)
