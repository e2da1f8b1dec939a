"""ResNet-20 with its convolutions split into two or three small ones, at half the multiply-accumulates.

Result: seed 0, 8 epochs: spatial SVD 89.65 % top-1 (8,965 of 10,000 test images), validation 90.20 % (902 of 1,000),
    126,608 parameters, 20.4 M multiply-accumulates; Tucker-2 89.41 % (8,941), validation 89.10 %, 128,319 and 20.4 M.
    The base has 90.38 % (9,038), 272,474 and 40.8 M. Before the training 237 and 174 of 256 images keep their class.
Cost: 12 min 24 s (SVD) and 12 min 49 s on 1 core of an AMD EPYC with AVX512-BF16, beside other work (bf16, 1 thread,
    torch 2.14.1).
Run: micronet fit recipes/low_rank_resnet20.py
     micronet fit recipes/low_rank_resnet20.py -s method=tucker2 -o runs/tucker
Source: Jaderberg, Vedaldi and Zisserman 2014 (k x 1 after 1 x k); Kim et al. 2016 (Tucker-2).
"""

from functools import partial
from pathlib import Path
from typing import Literal

from micronet import Fit, Recipe, sgd
from micronet.data import Augment, cifar10
from micronet.edits import low_rank

BASE = Path(__file__).parents[1] / "tests" / "data" / "resnet20_cifar10.pth"


def recipe(
    *,
    base: Path = BASE,
    method: Literal["spatial_svd", "tucker2"] = "spatial_svd",
    macs: float = 0.5,
    epochs: int = 8,
    lr: float = 0.05,
    smoke: bool = False,
) -> Recipe:
    """Factor the committed ResNet-20, and fine-tune.

    Args:
        base: the network to begin with, a model.pth.
        method: how a k x k convolution is split.
        macs: share of the multiply-accumulates that goes, in (0, 1).
        epochs: of fine-tuning.
        lr: its largest learning rate.
        smoke: one epoch.
    """
    factored = Fit(
        "factored",
        epochs=1 if smoke else epochs,
        lr=lr,
        opt=sgd(),
        wd=5e-4,
        ema=0.999,
        keep="last",
        label_smoothing=0.1,
        edit=(partial(low_rank, method=method, macs=macs),),
    )
    return Recipe(
        data=partial(cifar10, batch_size=64, valid=0.02, augment=Augment(crop=4, flip=0.5)),
        model=base,
        stages=(Fit("base", epochs=0), factored),
    )
