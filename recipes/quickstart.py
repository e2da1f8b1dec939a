"""A small separable network on real handwritten digits: the whole path in a minute, without a download.

Result: seed 0: 98.33 % top-1 (353 of 359 test images), validation 99.30 % (142 of 143). 72,074 parameters, score
    0.0020608 (seed rules).
Cost: 9 s of training, 15 s in all, on 2 cores of an Intel Xeon with AMX (bf16, torch 2.14.1).
Run: micronet fit recipes/quickstart.py
Source: the data are scikit-learn's `load_digits` (UCI, Alpaydin and Kaynak 1998), 8x8 pixels enlarged to 32x32.
"""

from functools import partial

from callbacks import OneCycle
from micronet import Fit, Recipe, sgd
from micronet.data import Augment, digits
from micronet.models import separable_net


def recipe(*, epochs: int = 20, lr: float = 0.1, smoke: bool = False) -> Recipe:
    """Train one small network; later stages (distil, prune, quantise) would follow in `stages`.

    Args:
        epochs: passes over the 1,293 training images.
        lr: largest learning rate of the one-cycle schedule.
        smoke: one epoch.
    """
    return Recipe(
        data=partial(digits, batch_size=64, augment=Augment(crop=3, pad="zeros", rotate=10.0, zoom=1.1)),
        model=partial(separable_net, width_multiplier=0.5),
        stages=(Fit("train", epochs=1 if smoke else epochs, lr=lr, schedule=OneCycle(), opt=sgd(), wd=5e-4, ema=0.98),),
    )
