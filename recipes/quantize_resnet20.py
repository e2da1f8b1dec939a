"""ResNet-20 with weights and activations of four bits, trained that way.

Result: 5 epochs, seeds 0, 1, 2: 90.49, 90.47 and 90.25 % top-1 (9,049, 9,047 and 9,025 of 10,000 test images),
    validation 898, 903 and 904 of 1,000; storage 35,606 words by the official rules. The same training in float:
    90.63, 90.41, 90.44 % (9,063, 9,041, 9,044). The base has 90.38 % (9,038) and 135,845 words. From the network with
    60 % zeros (9,053) to 4 bits, seed 0: 90.58 % (9,058), 23,733 words.
Cost: 11 min 38 s, the control 8 min 6 s, on 1 core of an AMD EPYC with AVX512-BF16, beside other work (bf16, 1 thread,
    torch 2.14.1).
Run: micronet fit recipes/quantize_resnet20.py
     micronet fit recipes/quantize_resnet20.py -s weight_bits=3 -s act_bits=3 -o runs/quantize3
     micronet fit recipes/quantize_resnet20.py -s control=True -o runs/quantize_control
     micronet fit recipes/quantize_resnet20.py -s base=runs/sparsify_resnet20/model.pth -o runs/sparse_quantized
Source: Esser et al. 2020, "Learned Step Size Quantization", https://arxiv.org/abs/1902.08153.
"""

from functools import partial
from pathlib import Path

from callbacks import QuantAware
from micronet import Fit, Recipe, sgd
from micronet.data import Augment, cifar10

BASE = Path(__file__).parents[1] / "tests" / "data" / "resnet20_cifar10.pth"


def recipe(
    *,
    base: Path = BASE,
    weight_bits: int = 4,
    act_bits: int = 4,
    first_last_bits: int = 8,
    epochs: int = 5,
    lr: float = 0.02,
    control: bool = False,
    smoke: bool = False,
) -> Recipe:
    """Train the committed ResNet-20 on with quantised weights and activations.

    Args:
        base: the network to begin with, a model.pth.
        weight_bits: width of the weights, 2 to 8.
        act_bits: width of the layers' inputs, 2 to 8.
        first_last_bits: width of both in the first and the last layer.
        epochs: of training; 0 only finds the step sizes.
        lr: its largest learning rate.
        control: train the same without quantising, for comparison.
        smoke: one epoch.
    """
    quantise = partial(QuantAware, weight_bits, act_bits, first_last_bits=first_last_bits)
    trained = Fit(
        "control" if control else "qat",
        epochs=1 if smoke else epochs,
        lr=lr,
        opt=sgd(),
        wd=5e-4,
        ema=0.999,
        keep="last",
        label_smoothing=0.1,
        cbs=() if control else (quantise,),
    )
    return Recipe(
        data=partial(cifar10, batch_size=64, valid=0.02, augment=Augment(crop=4, flip=0.5)),
        model=base,
        stages=(Fit("base", epochs=0), trained),
    )
