"""How long an epoch of a fit takes, from a few of its real steps."""

import time
from dataclasses import dataclass, replace
from statistics import median

import torch
from fastai.callback.core import Callback, CancelFitException, CancelTrainException, CancelValidException
from fastai.learner import Learner
from rich.console import Console

from micronet.errors import MicronetError
from micronet.learner import run_fit
from micronet.recipe import Fit

WARM_UP = 3  # steps that are not taken: kernels are chosen, memory is fetched, images are padded
STEPS = (3, 20)  # fewest and most steps that are taken
BATCHES = 6  # of validation, the first of which is not taken
SECONDS = 10.0  # after which the fewest steps are enough; after three times as long, whatever there is


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long the parts of a fit take.

    Args:
        step_seconds: one step, the median of those taken.
        steps: in an epoch.
        valid_seconds: one validation.
        measured: how many steps were taken.
    """

    step_seconds: float
    steps: int
    valid_seconds: float
    measured: int

    @property
    def epoch_seconds(self) -> float:
        """One epoch: all its steps, and the validation after them."""
        return self.step_seconds * self.steps + self.valid_seconds


class _Clock(Callback):
    """Takes the time of a few steps and of a few batches of validation, then ends the fit."""

    order = 98  # after all others, so that what they do is in the time

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self.steps: list[float] = []
        self.batches: list[float] = []  # seconds an image: the last batch is smaller than the others
        self._began = self._last = 0.0

    def before_fit(self) -> None:
        """Start the clock that ends it all."""
        self._began = self._now()

    def before_train(self) -> None:
        """Start the clock of the first step."""
        self._last = self._now()

    def before_validate(self) -> None:
        """Start the clock of the first batch."""
        self._last = self._now()

    def after_batch(self) -> None:
        """Take the time since the last batch; making this one is part of it."""
        now = self._now()
        seconds, self._last = now - self._last, now
        if self.learn.training:
            self.steps.append(seconds)
            if self._enough():
                raise CancelTrainException
        else:
            self.batches.append(seconds / len(self.learn.y))
            if len(self.batches) >= BATCHES or (len(self.batches) >= 2 and now - self._began > 4 * SECONDS):
                raise CancelValidException

    def after_cancel_train(self) -> None:
        """Have the Recorder write the epoch's training loss all the same: KeepBest counts its columns."""
        self.learn.recorder.cancel_train = False

    def after_cancel_validate(self) -> None:
        """Have the Recorder write the validation's numbers all the same."""
        self.learn.recorder.cancel_valid = False

    def after_epoch(self) -> None:
        """End the fit when enough was seen."""
        if self._enough():
            raise CancelFitException

    def _enough(self) -> bool:
        taken, seconds = len(self.steps) - WARM_UP, time.perf_counter() - self._began
        few = seconds > SECONDS and taken >= STEPS[0]
        return taken >= STEPS[1] or few or (seconds > 3 * SECONDS and len(self.steps) >= 2)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def time_fit(learn: Learner, fit: Fit) -> Timing:
    """Run the first steps of a fit, and take their time; the Learner's network is trained by them.

    Args:
        learn: as `make_learner` gives it.
        fit: the same stage.

    Raises:
        MicronetError: the loss is no longer finite after them.
    """
    clock = _Clock(torch.device(learn.dls.device))
    steps = len(learn.dls.train)
    # A small set has fewer steps in an epoch than are needed, and nothing may end it before.
    longer = replace(fit, epochs=max(fit.epochs, -(-(WARM_UP + STEPS[0]) // steps)), early_stop=None)
    result = run_fit(learn, longer, Console(quiet=True, force_terminal=False), cbs=(clock,))
    if result.diverged is not None:
        raise MicronetError(f"the training loss is no longer finite within {len(clock.steps)} steps: lower lr={fit.lr}")
    taken = clock.steps[WARM_UP:] or clock.steps[-1:]
    images = len(learn.dls.valid.dataset)
    return Timing(
        step_seconds=median(taken),
        steps=steps,
        valid_seconds=median(clock.batches[1:] or clock.batches) * images,
        measured=len(taken),
    )
