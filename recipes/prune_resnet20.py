"""Fewer channels in ResNet-20: pruned at once to a number of parameters, then taught by what it was to recover.

Result: seed 0, 6 epochs: 89.90 % top-1 (8,990 of 10,000 test images), validation 90.50 % (905 of 1,000); 197,702
    parameters (67 of 448 channels went), 30.1 M multiply-accumulates. The base has 90.38 % (9,038), 272,474 and 40.8 M.
    8 epochs gave 90.35 %, 10 epochs 90.32 %; 8 with labels alone (`-s weight=0`) and label smoothing 89.71 %. Six
    epochs are what 15 minutes allow; all four were measured on the test set.
Cost: 13 min 40 s on 1 core of an AMD EPYC with AVX512-BF16, beside other work (bf16, 1 thread, torch 2.14.1).
Run: micronet fit recipes/prune_resnet20.py
     micronet fit recipes/prune_resnet20.py -s params=60000 -s rounds=4 -s epochs=16 -o runs/prune_rounds    # a curve
Source: a course report on light models, which pruned a ResNet-20 of 91.27 % to 198,309 parameters ("structured 30 %";
    14-15 % of the channels give that number) and fine-tuned it to 91.59 %. Li et al. 2017, "Pruning Filters for
    Efficient ConvNets" (L1 norm).
"""

from functools import partial
from pathlib import Path
from typing import Literal

from callbacks import OneShot, PruneChannels, Rounds
from micronet import Fit, Recipe, distill_from, sgd
from micronet.data import Augment, cifar10

BASE = Path(__file__).parents[1] / "tests" / "data" / "resnet20_cifar10.pth"


def recipe(
    *,
    base: Path = BASE,
    params: int = 198_309,
    importance: Literal["l1", "l2", "mean_abs", "fpgm", "random"] = "l1",
    scope: Literal["local", "global"] = "local",
    rounds: int = 1,
    weight: float = 0.7,
    epochs: int = 6,
    lr: float = 0.05,
    smoke: bool = False,
) -> Recipe:
    """Prune the committed ResNet-20, and fine-tune.

    Args:
        base: the network to begin with, a model.pth.
        params: how many parameters may be left.
        importance: by what channels are ranked.
        scope: whether every layer loses the same share, or all channels are ranked together.
        rounds: in how many equal cuts, with epochs to recover between; `rounds.png` draws accuracy against parameters.
        weight: share of the loss that the unpruned network teaches; 0 leaves it out.
        epochs: of fine-tuning.
        lr: its largest learning rate.
        smoke: one epoch.
    """
    schedule = OneShot() if rounds == 1 else Rounds(end=0.75, rounds=rounds)
    cut = partial(PruneChannels, params=params, importance=importance, scope=scope, schedule=schedule)
    taught = (partial(distill_from, base, temperature=4.0, weight=weight),) if weight else ()
    pruned = Fit(
        "pruned",
        epochs=1 if smoke else epochs,
        lr=lr,
        opt=sgd(),
        wd=5e-4,
        ema=0.999,
        keep="last",
        cbs=(cut, *taught),
    )
    return Recipe(
        data=partial(cifar10, batch_size=64, valid=0.02, augment=Augment(crop=4, flip=0.5)),
        model=base,
        stages=(Fit("base", epochs=0), pruned),
    )
