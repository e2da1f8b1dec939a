"""A `Fit` becomes a fastai Learner, and the Learner's fit."""

import random
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixHandler
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import ParamScheduler
from fastai.callback.training import GradientClip
from fastai.learner import Learner
from rich.console import Console
from torch import Tensor, nn

from callbacks.checkpoint import KEPT, Checkpoint, EarlyStop, KeepBest
from callbacks.ema import EMA
from callbacks.expected import declared
from callbacks.masks import KeepZeros
from callbacks.precision import Precision, bf16_speeds_up
from callbacks.protocol import having
from callbacks.schedule import OneCycle
from micronet.bundle_file import copied_archive
from micronet.data import Data, loaders
from micronet.errors import MicronetError
from micronet.optim import CrossEntropy, decay_groups, metrics
from micronet.progress import History, Table
from micronet.recipe import Fit, Recipe, blaming
from micronet.start import begin, some_images


def pick_device(name: str | None = None) -> str:
    """The device to compute on: the one named, else a CUDA GPU where there is one, else the CPU."""
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def seed_all(seed: int) -> None:
    """Seed the global random number generators of torch (all devices), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def precision(fit: Fit, device: str) -> tuple[bool, bool]:
    """Whether a fit computes in bf16, and in channels_last: as the recipe says, else where it is known to be faster."""
    bf16 = bf16_speeds_up(device) if fit.bf16 is None else fit.bf16
    return bf16, bf16 if fit.channels_last is None else fit.channels_last


def make_learner(
    fit: Fit,
    model: nn.Module,
    data: Data,
    *,
    masks: Mapping[str, Tensor] | None = None,
    device: str = "cpu",
    seed: int = 0,
    path: str | Path = ".",
) -> Learner:
    """Build the Learner of a fit, with everything that the fit asks for.

    Args:
        fit: the stage.
        model: the network.
        data: the image sets.
        masks: of the network's zeros, which the fit keeps.
        device: where to train.
        seed: of order and augmentation of the images.
        path: folder for what fastai writes itself.
    """
    if fit.batch_size is not None:
        data = replace(data, batch_size=fit.batch_size)
    bf16, channels_last = precision(fit, device)
    cbs: list[Callback] = [Precision(bf16, channels_last)] if bf16 or channels_last else []
    if masks:
        cbs.append(KeepZeros(masks))
    if fit.grad_clip is not None:
        cbs.append(GradientClip(fit.grad_clip))
    if fit.ema is not None:
        cbs.append(EMA(fit.ema))
    cbs += [make() for make in fit.cbs]
    model.to(device)  # before the optimizer takes its parameters
    learn = Learner(
        loaders(data, device=device, seed=seed),
        model,
        loss_func=CrossEntropy(fit.label_smoothing),
        opt_func=fit.opt,
        lr=fit.lr,
        splitter=_one_group if fit.wd_bn_bias else decay_groups,
        cbs=cbs,
        metrics=metrics(),
        path=path,
        wd=fit.wd if fit.wd_bn_bias else [fit.wd, 0.0],
        wd_bn_bias=True,  # decay_groups does what fastai's flag does, for torch's optimizers too
    )
    # Importing some fastai modules makes its notebook bar a default callback; micronet draws its own (progress.py).
    learn.remove_cbs(ProgressCallback)
    learn.create_opt()  # here, so that wrong arguments of an optimizer are found before anything runs
    if fit.compile:
        model.compile()
    return learn


def _one_group(model: nn.Module) -> list[list[nn.Parameter]]:
    return [[p for p in model.parameters() if p.requires_grad]]


@dataclass(frozen=True)
class FitResult:
    """What a fit leaves besides the network.

    Args:
        rows: one dict an epoch, as `History` has them.
        lrs: learning rate of each step.
        best_epoch: number of the epoch whose weights were kept, from 0; None for the last one's.
        diverged: the epoch, from 0, in which the loss stopped being finite; None where it did not.
        loss: what callbacks made of the training loss, a word each: `distillation`, `MixUp`.
    """

    rows: list[dict[str, Any]]
    lrs: list[float]
    best_epoch: int | None
    diverged: int | None
    loss: tuple[str, ...] = ()


def run_fit(
    learn: Learner,
    fit: Fit,
    console: Console,
    *,
    checkpoint: Path | None = None,
    cbs: tuple[Callback, ...] = (),
) -> FitResult:
    """Fit, from the checkpoint where there is one.

    Args:
        learn: as `make_learner` gives it.
        fit: the same stage.
        console: where the table is printed.
        checkpoint: the file to write after each epoch and to go on from; None for none.
        cbs: further callbacks, such as a logger.

    Raises:
        MicronetError: a callback refuses the fit; the checkpoint is damaged.
    """
    state = _read_checkpoint(checkpoint)
    history = History()
    table = Table(history, console)
    best = KeepBest() if fit.keep == "best" and fit.epochs else None
    extra: list[Callback] = [history, *([table] if fit.epochs else []), *cbs]
    extra += [best] if best else []
    extra += [EarlyStop(fit.early_stop)] if fit.early_stop else []
    extra += [Checkpoint(checkpoint, state)] if checkpoint is not None else []
    start = state["epoch"] if state else 0
    if state:
        console.print(f"going on after epoch {start} of {fit.epochs} of stage {fit.name}", highlight=False)
    try:
        if isinstance(fit.schedule, OneCycle):
            one = fit.schedule
            learn.fit_one_cycle(
                fit.epochs, fit.lr, one.div, one.div_final, one.pct_start, moms=one.moms, cbs=extra, start_epoch=start
            )
        else:
            scheduler = ParamScheduler({"lr": lambda progress: fit.lr * fit.schedule(progress)})
            learn.fit(fit.epochs, fit.lr, cbs=[scheduler, *extra], start_epoch=start)
    except ValueError as error:  # what a callback refuses is the recipe's to mend
        # fastai puts its own words around it, and around those of an event inside an event's.
        refusal = re.split(r"when calling event `\w+`:\n\t", str(error))
        if len(refusal) == 1:
            raise
        raise MicronetError(f"stage {fit.name}: {refusal[-1]}") from error
    finally:
        table.close()
    ran = len(history.rows)
    if best and history.diverged is None and best.best_epoch is not None and best.best_epoch + 1 < ran:
        console.print(f"kept epoch {best.best_epoch + 1} of {ran}: best top-1 on validation", highlight=False)
    lrs = [float(lr) for lr in learn.recorder.lrs]
    best_epoch = best.best_epoch if best else None
    return FitResult(history.rows, lrs, best_epoch, history.diverged, _loss_words(learn))


def _loss_words(learn: Learner) -> tuple[str, ...]:
    """What a Learner's callbacks make of the training loss; fastai's own that mix images don't say it themselves."""
    said = [cb.training_loss for cb in having(learn, "training_loss")]
    said += [type(cb).__name__ for cb in learn.cbs if isinstance(cb, MixHandler)]
    return tuple(word for word in said if word)


def _read_checkpoint(file: Path | None) -> dict[str, Any] | None:
    if file is None or not file.exists():
        return None
    try:
        state = torch.load(copied_archive(file), map_location="cpu", weights_only=True)
        if not (isinstance(state, dict) and type(state.get("epoch")) is int and state.keys() >= KEPT):
            raise ValueError("it is no checkpoint")
        return state
    except Exception as error:  # damaged bytes fail in any way
        raise MicronetError(f"{file}: damaged checkpoint; delete it to begin this stage anew") from error


def first_trained(recipe: Recipe) -> Fit:
    """The first stage of a recipe that has epochs.

    Raises:
        MicronetError: there is none.
    """
    found = next((fit for fit in recipe.stages if fit.epochs), None)
    if found is None:
        raise MicronetError("no stage of the recipe has epochs: there is no learning rate to look for")
    return found


def find_lr(
    recipe: Recipe, *, steps: int = 100, seed: int = 0, limit: int | None = None, device: str | None = None
) -> tuple[list[float], list[float], float]:
    """Train a recipe's first stage that has epochs with a growing learning rate, until the loss explodes.

    What would change the network's size or zeros on the way is left out: it is not what the rate is chosen for. Images
    that grow in the fit (`ProgressiveResizing`) have their full size.

    Args:
        recipe: that stage names optimizer, loss and callbacks; edits up to it are made.
        steps: at most; the learning rate grows from 1e-7 to 10 over them.
        seed: of weights, order and augmentation.
        limit: most images in each split; None for all.
        device: where to train; None for a GPU where there is one.

    Returns:
        Learning rates, smoothed losses, and the rate at which the smoothed loss was least: a schedule that warms up can
        go as high.

    Raises:
        MicronetError: the loss did not fall.

    Source: Smith 2017, "Cyclical Learning Rates": the largest rate is where the loss stops falling. fastai's rules suit
        other schedules: "valley" takes the middle, on a log scale, of the whole way down, "minimum" a tenth of this.
    """
    seed_all(seed)
    device = pick_device(device)
    with tempfile.TemporaryDirectory() as folder:
        with blaming("recipe"):
            data = recipe.data() if limit is None else recipe.data().limit(limit)
            start, fit = begin(recipe, data), first_trained(recipe)
            model = start.model
            for edit in [edit for stage in recipe.stages[: recipe.stages.index(fit) + 1] for edit in stage.edit]:
                model = edit(model, images=some_images(data)).model
            learn = make_learner(fit, model, data, masks=start.masks, device=device, seed=seed, path=folder)
            learn.remove_cbs([cb for cb in learn.cbs if declared(cb) is not None])
        # fastai's 0.98 averages over about 50 steps, half of 100, and so smears the loss over four powers of ten.
        learn.recorder.smooth_loss.beta = max(0.0, 1 - 10 / steps)
        learn.lr_find(num_it=steps, show_plot=False, suggest_funcs=None)
    rates = [float(lr) for lr in learn.recorder.lrs]
    losses = [float(loss) for loss in learn.recorder.losses]
    first = steps // 10  # before, too few batches are averaged: a lucky one would be the least of all
    finite = [place for place in range(first, len(losses)) if isfinite(losses[place])]
    least = min(finite, key=losses.__getitem__, default=0)
    if not finite or losses[least] > 0.999 * losses[finite[0]]:  # one part in a thousand is noise
        raise MicronetError(f"no learning rate to suggest: the loss did not fall in {steps} steps")
    return rates, losses, rates[least]
