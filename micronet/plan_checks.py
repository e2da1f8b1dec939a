"""What a recipe asks for and will not get: combinations that a fit refuses, and others that do nothing."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fastai.callback.mixup import MixHandler
from fastai.learner import Learner

from callbacks.checkpoint import Checkpoint, EarlyStop, KeepBest
from callbacks.masks import KeepZeros
from callbacks.precision import bf16_speeds_up
from callbacks.quantize import QuantizeInt8
from callbacks.schedule import MultiStep, OneCycle, Step
from micronet.data import Data
from micronet.recipe import Fit


@dataclass(frozen=True)
class Finding:
    """Something that a recipe asks for and will not get.

    Args:
        stage: the stage's name; "recipe" for what concerns all of them.
        refused: whether `micronet fit` would end with an error; else it trains, and this part of it has no effect.
        text: what, in one line.
    """

    stage: str
    refused: bool
    text: str

    def __str__(self) -> str:
        return f"{self.stage}: {'refused' if self.refused else 'note'}: {self.text}"


def one_line(error: BaseException) -> str:
    """All that an error says, in one line: fastai puts the event before, and the cause behind, a line's end."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def check_data(data: Data, logits: int) -> Iterator[Finding]:
    """Find what is wrong with the data, or with the network for these data.

    Args:
        data: the image sets.
        logits: how many numbers the network answers with.
    """
    if not len(data.train):
        yield Finding("recipe", True, f"{data.name} has no training images")
    if not len(data.valid):
        text = (
            f"{data.name} has no validation images: nothing to choose the best epoch by, nothing to measure a stage on"
        )
        yield Finding("recipe", True, text)
    if logits != data.num_classes:
        text = f"the network answers with {logits} numbers, {data.name} has {data.num_classes} classes"
        yield Finding("recipe", logits < data.num_classes, text)


def check_stage(fit: Fit, learn: Learner, data: Data, device: str) -> Iterator[Finding]:
    """Find what a fit would refuse, or take without effect.

    Args:
        fit: the stage.
        learn: its Learner, as `make_learner` gives it.
        data: the image sets.
        device: where to train.
    """
    if data.valid_is_test and any(isinstance(cb, QuantizeInt8) for cb in learn.cbs):
        yield Finding(
            fit.name, True, "QuantizeInt8 ranks and judges on validation images, which are the test images here"
        )
    if fit.epochs == 0:  # its other settings are as idle, and harmless
        own = list(learn.cbs)[len(learn.cbs) - len(fit.cbs) :]
        idle = [type(cb).__name__ for cb in own if not _acts(cb)]
        if own and idle:
            yield Finding(fit.name, False, f"0 epochs: {', '.join(idle)} acts on steps, and has none")
        elif not own and not fit.edit:
            yield Finding(fit.name, False, "0 epochs, no edit and no callback: it changes nothing")
        return
    for refused, text in (*_batches(fit, learn, data), *_schedule(fit), *_choice(fit, data), *_device(fit, device)):
        yield Finding(fit.name, refused, text)
    own = ([KeepBest] if fit.keep == "best" else []) + ([EarlyStop] if fit.early_stop else []) + [Checkpoint]
    kinds = Counter([*(type(cb) for cb in learn.cbs), *own])
    for kind in (kind for kind, count in kinds.items() if count > 1 and not issubclass(kind, KeepZeros)):
        yield Finding(
            fit.name, False, f"two callbacks {kind.__name__}: the fit's own settings give one already, or cbs"
        )


def _acts(cb: Any) -> bool:
    # An epoch's events never come in a fit without epochs. Asked of the class: an instance looks in the Learner, too.
    # Of micronet's own callbacks those act that declare what they change; another's may do anything in its events.
    kind = type(cb)
    ours = kind.__module__.partition(".")[0] == "callbacks"
    names = ("expected", "onnx") if ours else ("expected", "after_create", "before_fit", "after_fit")
    return any(hasattr(kind, name) for name in names)


def _batches(fit: Fit, learn: Learner, data: Data) -> Iterator[tuple[bool, str]]:
    size, images = fit.batch_size or data.batch_size, len(data.train)
    if size > images > 0:
        yield False, f"batch_size {size:,} is larger than the train split: each step takes all {images:,} images"
    mixers = [cb for cb in learn.cbs if isinstance(cb, MixHandler)]
    names = " and ".join(type(cb).__name__ for cb in mixers)
    if len(mixers) > 1:
        yield True, f"{names} in one fit: each replaces the loss, and the second mixes labels that are whole numbers"
    if mixers and not getattr(learn.loss_func, "y_int", False):
        name = getattr(learn.loss_func, "__name__", type(learn.loss_func).__name__)
        yield (
            True,
            f"{names} with the loss {name}, which does not say y_int: it would mix labels that are whole numbers",
        )
    if mixers and min(size, images) == 1:
        yield True, f"{names} with one image a step: nothing to mix it with"


def _schedule(fit: Fit) -> Iterator[tuple[bool, str]]:
    schedule = fit.schedule
    late = isinstance(schedule, MultiStep) and any(milestone >= 1 for milestone in schedule.milestones)
    if late or (isinstance(schedule, Step) and schedule.every >= 1):
        yield False, "a milestone at 1 is the end of the fit: no step is left for the smaller learning rate"
    momentum = _momentum(fit.opt)
    if isinstance(schedule, OneCycle) and momentum not in (None, 0.9):  # 0.9: nobody chose it
        yield (
            False,
            f"OneCycle moves the momentum through {schedule.moms}: the optimizer's own, {momentum}, has no effect",
        )
    if isinstance(fit.opt, partial) and "lr" in fit.opt.keywords:
        yield False, f"the optimizer's own lr {fit.opt.keywords['lr']} has no effect: the fit's is lr={fit.lr}"


def _momentum(opt: Any) -> float | None:
    made_of = opt.keywords.get("opt") if isinstance(opt, partial) else None
    given = made_of.keywords if isinstance(made_of, partial) else {}
    return given.get("momentum", given.get("betas", (None,))[0])


def _choice(fit: Fit, data: Data) -> Iterator[tuple[bool, str]]:
    # The first epoch is always the best so far; patience is looked at before an epoch.
    if fit.early_stop is not None and fit.early_stop + 1 >= fit.epochs:
        yield False, f"early_stop={fit.early_stop} can't end a fit of {fit.epochs} epochs"
    if data.valid_is_test and (fit.keep == "best" or fit.early_stop):
        yield False, "the test images choose the epoch (valid is the test split): accuracy on test will be optimistic"


def _device(fit: Fit, device: str) -> Iterator[tuple[bool, str]]:
    if fit.bf16 and not bf16_speeds_up(device):
        yield False, f"bf16 is asked for, but {device} has no fast instructions for it: slower than float32, if it runs"
    if fit.compile and torch.device(device).type == "cpu":
        yield False, "compile costs about a minute on a CPU and gains nothing there"
