"""WRN-22-6 on CIFAR-100 by one-cycle, mixup and six augmentations: the fastai entry to the MicroNet Challenge 2019.

Result: 2 epochs (-s epochs=2), seed 0: 25.58 % top-1 (2,558 of 10,000 test images), 55.18 % top-5; validation 25.54 %
    (1,277 of 5,000). 9,693,108 parameters, score 0.4634393 (seed rules). The full 200 epochs: not run yet.
Cost: 452 s an epoch of 45,000 images on 2 cores of an Intel Xeon with AMX (bf16, torch 2.14.1); on a GPU: not measured.
Run: micronet fit recipes/wrn_cifar100.py
     micronet fit recipes/wrn_cifar100.py -s epochs=30 -o runs/wrn_short
Source: a MicroNet Challenge entry on fastai: 600 epochs, over 80 % top-1, 9,693,108 parameters, score 0.46343. Crop
    with reflection, flip, symmetric warp, rotation 10 degrees, zoom, brightness, contrast; mixup; one-cycle.
"""

from functools import partial

from fastai.callback.mixup import MixUp

from callbacks import OneCycle
from micronet import Fit, Recipe, sgd
from micronet.data import cifar100, wrn_augment
from micronet.models import wide_resnet


def recipe(
    *,
    epochs: int = 200,
    lr: float = 0.4,
    batch_size: int = 256,
    mixup: float = 0.4,
    valid: float = 0.1,
    smoke: bool = False,
) -> Recipe:
    """Train the WRN-22-6; later stages compress it.

    Args:
        epochs: passes over the training images; the source took 600.
        lr: largest learning rate of the one-cycle schedule.
        batch_size: images a step.
        mixup: alpha of the Beta distribution that mixes pairs of images, above 0.
        valid: share of the 50,000 training images that chooses the checkpoint.
        smoke: one epoch.
    """
    train = Fit(
        "train",
        epochs=1 if smoke else epochs,
        lr=lr,
        schedule=OneCycle(),
        opt=sgd(),
        wd=5e-4,
        ema=0.999,
        cbs=(partial(MixUp, mixup),),
    )
    return Recipe(
        data=partial(cifar100, batch_size=16 if smoke else batch_size, valid=valid, augment=wrn_augment()),
        model=partial(wide_resnet, depth=22, width=6),
        stages=(train,),
    )
