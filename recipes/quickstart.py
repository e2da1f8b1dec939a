"""A small separable network on real handwritten digits: the whole path in a minute, without a download.

Result: not run yet.
Cost: not measured yet.
Run: micronet fit recipes/quickstart.py
Source: the data are scikit-learn's `load_digits` (UCI, Alpaydin and Kaynak 1998), 8x8 pixels enlarged to 32x32.
"""

from functools import partial

from callbacks.schedule import OneCycle
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
