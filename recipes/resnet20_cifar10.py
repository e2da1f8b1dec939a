"""ResNet-20 on CIFAR-10: Muon and images that grow; or SGD, one-cycle or by the source's milestones [40, 60].

Result: muon, 27 epochs, seed 0: 91.60 % top-1 (9,160 of 10,000 test images), 99.71 % top-5; validation 91.00 % (910 of
    1,000). 272,474 parameters, score 0.0132823 (seed rules). 24 epochs gave 91.26 %, 30 epochs on one core, in
    37 min, 91.91 %. Rate and sizes were chosen on 5,000 validation images, in fits of a fifth of the length.
    one_cycle, 24 epochs: 90.39 % (9,039). The milestones: not run yet. The source has 91.27 %.
Cost: 19 min 36 s, 27 to 56 s an epoch of 49,000 images, on 2 cores of an AMD EPYC with AVX512-BF16 (bf16, torch
    2.14.1); one_cycle: 18 min 10 s on 2 cores of an Intel Xeon with AMX.
Run: micronet fit recipes/resnet20_cifar10.py
     micronet fit recipes/resnet20_cifar10.py -s way=milestones -s epochs=70 -o runs/resnet20_milestones
Source: a course report on light models (batch 128, augmentation, label smoothing, SGD 0.1, weight decay 1e-5,
    milestones [40, 60], gamma 0.1), which printed 91.27 %. The network is He et al. 2016, with 1x1 shortcuts.
"""

from functools import partial
from typing import Literal

from callbacks import MultiStep, OneCycle, ProgressiveResizing
from micronet import Fit, Recipe, muon, sgd
from micronet.data import Augment, cifar10
from micronet.models import resnet20

# On smaller images an epoch costs less, and a fit that has to end in 20 minutes has more of them.
RESIZING = partial(ProgressiveResizing, ((0.3, 20), (0.6, 26)))


def recipe(
    *,
    epochs: int = 27,
    lr: float | None = None,
    way: Literal["muon", "one_cycle", "milestones"] = "muon",
    valid: float = 0.02,
    smoke: bool = False,
) -> Recipe:
    """Train ResNet-20 in one of three ways.

    Args:
        epochs: passes over the training images; the source trained on beyond 60 of them.
        lr: largest learning rate; none for the way's own: 0.02 for Muon, the source's 0.1 for SGD.
        way: muon: one-cycle, images that grow, averaged weights; one_cycle: SGD, averaged weights, weight decay 5e-4;
            milestones: as the source did, weight decay 1e-5.
        valid: share of the 50,000 training images that chooses the checkpoint.
        smoke: one epoch.
    """
    epochs = 1 if smoke else epochs
    lr = (0.02 if way == "muon" else 0.1) if lr is None else lr
    fit = partial(Fit, "train", epochs=epochs, lr=lr)
    if way == "muon":
        cycle = OneCycle(pct_start=0.2, moms=(0.9, 0.9, 0.9))
        stage = fit(opt=muon(), schedule=cycle, wd=5e-4, ema=0.998, keep="last", cbs=(RESIZING,))
    elif way == "one_cycle":
        # Half the source's batch: in so few epochs the network gains more from steps than it loses to their noise.
        stage = fit(opt=sgd(), label_smoothing=0.1, schedule=OneCycle(), batch_size=64, wd=5e-4, ema=0.999, keep="last")
    else:
        steps = MultiStep(milestones=(40 / 70, 60 / 70), gamma=0.1)
        stage = fit(opt=sgd(), label_smoothing=0.1, schedule=steps, wd=1e-5)
    return Recipe(
        data=partial(cifar10, batch_size=128, valid=valid, augment=Augment(crop=4, flip=0.5)),
        model=resnet20,
        stages=(stage,),
    )
