"""Another activation in a trained ResNet-20, and a short training that gets used to it: ReLU6, hard-swish or SiLU.

Result: seed 0, 8 epochs: ReLU6 90.70 % top-1 (9,070 of 10,000 test images), validation 91.10 % (911 of 1,000); the
    control with ReLU 90.69 % (9,069), validation 90.80 % (908). The base has 90.38 % (9,038). Others: not run yet.
Cost: 15 min 22 s on 1 core of an Intel Xeon with AMX, beside other work (bf16, 1 thread, torch 2.14.1).
Run: micronet fit recipes/relu6_resnet20.py
     micronet fit recipes/relu6_resnet20.py -s activation=relu -o runs/relu_resnet20    # the control: nothing swapped
Source: a course report on int8 networks, which trained ResNet-18 anew with ReLU6 in the place of ReLU: a bounded
    activation loses less to 8 bits. ReLU6: Krizhevsky 2010; hard-swish: Howard et al. 2019.
"""

from functools import partial
from pathlib import Path
from typing import Literal

from torch import nn

from micronet import Fit, Recipe, sgd
from micronet.data import Augment, cifar10
from micronet.edits import swap_activation

BASE = Path(__file__).parents[1] / "tests" / "data" / "resnet20_cifar10.pth"
ACTIVATIONS = {"relu6": nn.ReLU6, "hardswish": nn.Hardswish, "silu": nn.SiLU}


def recipe(
    *,
    base: Path = BASE,
    activation: Literal["relu6", "hardswish", "silu", "relu"] = "relu6",
    epochs: int = 8,
    lr: float = 0.05,
    smoke: bool = False,
) -> Recipe:
    """Swap the activations of the committed ResNet-20, and fine-tune.

    Args:
        base: the network to begin with, a model.pth.
        activation: what takes ReLU's place; relu swaps nothing, and shows what the training alone does.
        epochs: of fine-tuning.
        lr: its largest learning rate.
        smoke: one epoch.
    """
    edit = () if activation == "relu" else (partial(swap_activation, old=nn.ReLU, new=ACTIVATIONS[activation]),)
    tune = partial(Fit, lr=lr, opt=sgd(), wd=5e-4, ema=0.999, keep="last", label_smoothing=0.1)
    return Recipe(
        data=partial(cifar10, batch_size=64, valid=0.02, augment=Augment(crop=4, flip=0.5)),
        model=base,
        stages=(Fit("base", epochs=0), tune(activation, epochs=1 if smoke else epochs, edit=edit)),
    )
