"""ResNet-20 made smaller step by step: bounded activations, fewer channels, zeros; taught by itself as it was.

Result: seed 0, 3 and 3 epochs: 89.64 % top-1 (8,964 of 10,000 test images), validation 89.90 % (899 of 1,000); 193,458
    parameters, 28.3 M multiply-accumulates, storage 44,765 words by the official rules, score 0.00316. The base has
    90.38 % (9,038), 272,474, 40.8 M, 135,845 and 0.00958. With 5 and 5 epochs it was 90.00 % (9,000).
Cost: 14 min 30 s on 1 core of an AMD EPYC with AVX512-BF16, beside other work (bf16, 1 thread, torch 2.14.1).
Run: micronet fit recipes/combined_resnet20.py
Source: the parts' own recipes: relu6_resnet20.py, prune_resnet20.py, sparsify_resnet20.py, distill_separable.py.
"""

from functools import partial
from pathlib import Path

from torch import nn

from callbacks import Cubic, OneShot, PruneChannels, Sparsify
from micronet import Fit, Recipe, distill_from, sgd
from micronet.data import Augment, cifar10
from micronet.edits import swap_activation

BASE = Path(__file__).parents[1] / "tests" / "data" / "resnet20_cifar10.pth"


def recipe(
    *,
    base: Path = BASE,
    macs: float = 0.3,
    sparsity: float = 0.6,
    prune_epochs: int = 3,
    sparse_epochs: int = 3,
    lr: float = 0.05,
    smoke: bool = False,
) -> Recipe:
    """Prune, then sparsify the committed ResNet-20, which teaches throughout.

    Args:
        base: the network to begin with, a model.pth.
        macs: share of the multiply-accumulates that goes with the channels, in (0, 1).
        sparsity: share of the weights left that is zero at the end, in [0, 1).
        prune_epochs: of training after the cut.
        sparse_epochs: of training while the zeros come, and after.
        lr: their largest learning rate.
        smoke: one epoch each.
    """
    six = partial(swap_activation, old=nn.ReLU, new=nn.ReLU6)
    taught = partial(distill_from, base, temperature=4.0, weight=0.7)
    cut = partial(PruneChannels, macs=macs, importance="l1", scope="local", schedule=OneShot())
    masked = partial(Sparsify, sparsity, schedule=Cubic(end=0.5))
    if smoke:
        prune_epochs = sparse_epochs = 1
    tune = partial(Fit, lr=lr, opt=sgd(), wd=5e-4, ema=0.999, keep="last")
    return Recipe(
        data=partial(cifar10, batch_size=64, valid=0.02, augment=Augment(crop=4, flip=0.5)),
        model=base,
        stages=(
            Fit("base", epochs=0),
            tune("pruned", epochs=prune_epochs, edit=(six,), cbs=(cut, taught)),
            tune("sparse", epochs=sparse_epochs, cbs=(masked, taught)),
        ),
    )
