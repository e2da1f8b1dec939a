"""The separable network on CIFAR-10, taught by the committed ResNet-20; `-s weight=0` trains it alone.

Result: seed 0, 10 epochs: taught 76.39 % top-1 (7,639 of 10,000 test images), validation 76.50 % (765 of 1,000); alone
    75.94 % (7,594), validation 75.70 %: 0.45 points from the teacher, of 90.38 %, about one standard error of 10,000
    images. 264,202 parameters, 1.9 M multiply-accumulates.
Cost: 10 min 29 s taught, 4 min 17 s alone, on 1 core of an AMD EPYC with AVX512-BF16, beside other work (bf16,
    1 thread, torch 2.14.1).
Run: micronet fit recipes/distill_separable.py
     micronet fit recipes/distill_separable.py -s weight=0 -o runs/separable_scratch    # the same without a teacher
Source: a course report on a separable student for Food-11 (temperature 20, weight 0.5), where a teacher of 80.09 %
    brought a student of 77.34 % to 79.91 %, one of 88.41 % to 83.44 %. Hinton, Vinyals and Dean 2015.
"""

from functools import partial
from pathlib import Path

from micronet import Fit, Recipe, distill_from, sgd
from micronet.data import Augment, cifar10
from micronet.models import separable_net

TEACHER = Path(__file__).parents[1] / "tests" / "data" / "resnet20_cifar10.pth"


def recipe(
    *,
    teacher: Path = TEACHER,
    epochs: int = 10,
    lr: float = 0.1,
    temperature: float = 20.0,
    weight: float = 0.5,
    smoke: bool = False,
) -> Recipe:
    """Train the separable network with soft targets.

    Args:
        teacher: a model.pth, trained on the same classes.
        epochs: passes over the training images.
        lr: largest learning rate.
        temperature: divides the logits of both networks before the softmax.
        weight: share of the teacher's loss; 0 leaves the teacher out.
        smoke: one epoch.
    """
    taught = (partial(distill_from, teacher, temperature=temperature, weight=weight),) if weight else ()
    return Recipe(
        data=partial(cifar10, batch_size=128, valid=0.02, augment=Augment(crop=4, flip=0.5)),
        model=separable_net,
        stages=(
            Fit(
                "distil" if weight else "scratch",
                epochs=1 if smoke else epochs,
                lr=lr,
                opt=sgd(),
                wd=5e-4,
                ema=0.999,
                keep="last",
                cbs=taught,
            ),
        ),
    )
