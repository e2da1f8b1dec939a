"""WRN-22-6 on CIFAR-100 by one-cycle, mixup and six augmentations: the fastai entry to the MicroNet Challenge 2019.

Result: not run yet.
Cost: not measured yet.
Run: micronet fit recipes/wrn_cifar100.py
     micronet fit recipes/wrn_cifar100.py -s epochs=30 -o runs/wrn_short
Source: a MicroNet Challenge entry on fastai: 600 epochs, over 80 % top-1, 9,693,108 parameters, score 0.46343. Crop
    with reflection, flip, symmetric warp, rotation 10 degrees, zoom, brightness, contrast; mixup; one-cycle.
"""

from functools import partial

from fastai.callback.mixup import MixUp

from callbacks.schedule import OneCycle
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
