"""Zeros in ResNet-20: the smallest weights masked along a cubic ramp, while it trains on.

Result: seed 0, 8 epochs: 60 % zeros 90.53 % top-1 (9,053 of 10,000 test images), validation 90.70 % (907 of 1,000),
    storage 63,042 words by the official rules; 80 % zeros 90.07 % (9,007), validation 90.10 %, 35,952 words; 90 % zeros
    89.17 % (8,917), validation 89.40 %, 22,408 words. The base has 90.38 % (9,038) and 135,845 words; trained on for as
    long without zeros, 90.69 %.
Cost: 13 min 36 s on 1 core of an AMD EPYC with AVX512-BF16 (80 %), 14 min 51 s on one of an Intel Xeon with AMX (60 and
    90 %), beside other work (bf16, 1 thread, torch 2.14.1).
Run: micronet fit recipes/sparsify_resnet20.py
     micronet fit recipes/sparsify_resnet20.py -s sparsity=0.8 -o runs/sparse80
Source: Zhu and Gupta 2017, "To prune, or not to prune" (the ramp); Han et al. 2015 (magnitude).
"""

from functools import partial
from pathlib import Path
from typing import Literal

from callbacks import Cubic, Sparsify
from micronet import Fit, Recipe, sgd
from micronet.data import Augment, cifar10

BASE = Path(__file__).parents[1] / "tests" / "data" / "resnet20_cifar10.pth"


def recipe(
    *,
    base: Path = BASE,
    sparsity: float = 0.6,
    epochs: int = 8,
    lr: float = 0.05,
    criterion: Literal["magnitude", "random", "movement", "taylor"] = "magnitude",
    smoke: bool = False,
) -> Recipe:
    """Mask weights of the committed ResNet-20 while it is fine-tuned.

    Args:
        base: the network to begin with, a model.pth.
        sparsity: share of the weights that is zero at the end, in [0, 1).
        epochs: of fine-tuning; the ramp takes the first half of them.
        lr: the largest learning rate.
        criterion: which weights go.
        smoke: one epoch.
    """
    masks = partial(Sparsify, sparsity, schedule=Cubic(end=0.5), criterion=criterion)
    sparse = Fit(
        "sparse",
        epochs=1 if smoke else epochs,
        lr=lr,
        opt=sgd(),
        wd=5e-4,
        ema=0.999,
        keep="last",
        label_smoothing=0.1,
        cbs=(masks,),
    )
    return Recipe(
        data=partial(cifar10, batch_size=64, valid=0.02, augment=Augment(crop=4, flip=0.5)),
        model=base,
        stages=(Fit("base", epochs=0), sparse),
    )
