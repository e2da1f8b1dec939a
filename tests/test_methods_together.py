"""Every method after the other in one recipe, on every network: what each left is still there at the end."""

from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from torch import nn

import micronet.models as networks
from callbacks.distill import Distill
from callbacks.prune import PruneChannels
from callbacks.ramp import Cubic, OneShot
from callbacks.sparsify import Sparsify
from micronet import Fit, Recipe, RunOptions, load, run, score
from micronet.data import Augment, cifar10
from micronet.edits import fold_bn, low_rank, swap_activation

NETWORKS = {
    "resnet20": networks.resnet20,
    "resnet18": partial(networks.resnet18, width=16),
    "preact_resnet18": networks.preact_resnet18,
    "wide_resnet": partial(networks.wide_resnet, depth=10, width=2),
    "googlenet": networks.googlenet,
    "densenet121": networks.densenet121,
    "separable_net": networks.separable_net,
    "efficientnet_b0": partial(timm.create_model, model_name="efficientnet_b0"),
    "mobilenetv3_small_100": partial(timm.create_model, model_name="mobilenetv3_small_100"),
    "mobilenetv3_large_100": partial(timm.create_model, model_name="mobilenetv3_large_100"),
}
QUICK = ("resnet20",)


def pictures(size: int):
    """Real CIFAR-10, a few images of each split, at 32 or 64 pixels."""
    data = cifar10(batch_size=16, augment=Augment(crop=4, flip=0.5)).limit(32)
    if size == 32:
        return data

    def larger(images):
        pixels = images.images.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return replace(images, images=pixels.contiguous(memory_format=torch.channels_last))

    return replace(data, train=larger(data.train), valid=larger(data.valid), test=larger(data.test))


def taught():
    """Distillation from a network of its own, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Distill(networks.resnet20(num_classes=10), temperature=4, weight=0.5)


def activation(make) -> type[nn.Module]:
    """The activation that a network has most of."""
    kinds = [
        type(m) for m in make(num_classes=10).modules() if isinstance(m, nn.ReLU | nn.ReLU6 | nn.SiLU | nn.Hardswish)
    ]
    return max(set(kinds), key=kinds.count)


def stages(make) -> tuple[Fit, ...]:
    old = activation(make)
    swap = partial(swap_activation, old=old, new=nn.ReLU if old is nn.ReLU6 else nn.ReLU6)
    # Separable and mobile networks have few k x k convolutions that are not depthwise, but many 1 x 1.
    pointwise = old is not nn.ReLU or make is networks.separable_net
    split = partial(low_rank, method="svd" if pointwise else "spatial_svd", params=0.2)
    cut = partial(PruneChannels, 0.25, schedule=OneShot())
    masked = partial(Sparsify, 0.5, schedule=Cubic())
    fit = partial(Fit, epochs=1, lr=0.01, keep="last")
    return (
        fit("pruned", edit=(swap,), cbs=(cut, taught)),
        fit("factored", edit=(split,), cbs=(taught,)),
        fit("sparse", cbs=(masked,), ema=0.9),
        fit("more", cbs=(taught,), wd=0.1),
        Fit("folded", epochs=0, edit=(fold_bn,)),
    )


CASES = [
    pytest.param(name, size, marks=() if name in QUICK and size == 32 else pytest.mark.slow)
    for size in (32, 64)
    for name in NETWORKS
]


@pytest.mark.parametrize(("name", "size"), CASES)
def test_one_method_after_the_other(name, size, real, tmp_path):
    real(cifar10)  # skipped where it is not here
    make = NETWORKS[name]
    recipe = Recipe(data=partial(pictures, size), model=make, stages=stages(make))
    last = run(recipe, tmp_path / "r", RunOptions())
    rows = {row["stage"]: row for row in last.history}
    whole = sum(p.numel() for p in make(num_classes=10).parameters())
    assert rows["pruned"]["params"] < 0.8 * whole
    assert rows["factored"]["params"] < rows["pruned"]["params"]
    assert rows["sparse"]["storage"] < 0.7 * rows["factored"]["storage"]
    assert [entry["edit"] for entry in last.edits] == ["swap_activation", "low_rank", "fold_bn"]
    loaded = load(tmp_path / "r" / "model.pth")
    state, zeros = loaded.model.state_dict(), 0
    for key, mask in loaded.masks.items():
        assert not state[key][~mask].any()
        zeros += int((~mask).sum())
    assert zeros == pytest.approx(0.5 * sum(mask.numel() for mask in loaded.masks.values()), abs=len(loaded.masks))
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), last.model(images))
    # Folding is what the ledger counts anyway: nothing but the parameters as trained may change.
    assert rows["folded"]["score"] == pytest.approx(rows["more"]["score"], rel=1e-9)
    assert score(tmp_path / "r" / "model.pth").storage == rows["folded"]["storage"]
