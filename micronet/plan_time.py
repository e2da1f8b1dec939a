"""How long an epoch of a fit takes, from a few of its real steps."""

import time
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

import torch
from fastai.callback.core import Callback, CancelFitException, CancelTrainException, CancelValidException
from fastai.learner import Learner
from rich.console import Console

from callbacks.protocol import having, tell
from micronet.errors import MicronetError
from micronet.learner import run_fit
from micronet.recipe import Fit

WARM_UP = 3  # steps of a part that are not taken: kernels are chosen, memory is fetched, images are padded
STEPS = (3, 20)  # fewest and most steps of a part that are taken
BATCHES = 6  # of validation, the first of which is not taken
SECONDS = 10.0  # for all parts, after which the fewest steps are enough; after three times as long, whatever there is


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long the parts of a fit take.

    Args:
        step_seconds: one step, the median of those taken; where the fit has parts, the mean of theirs by their shares.
        steps: in an epoch.
        valid_seconds: one validation.
        measured: how many steps were taken.
        parts: of the fit, whose steps take different times.
    """

    step_seconds: float
    steps: int
    valid_seconds: float
    measured: int
    parts: int = 1

    @property
    def epoch_seconds(self) -> float:
        """One epoch, the mean of the fit's: all its steps, and the validation after them."""
        return self.step_seconds * self.steps + self.valid_seconds


class _Clock(Callback):
    """Takes the time of a few steps of each part of a fit and of a few batches of validation, then ends the fit.

    Args:
        device: where the fit computes.
        starts: of the parts, as shares of the fit; the first is 0.
        most: steps of a part.
    """

    order = 98  # after all others, so that what they do is in the time

    def __init__(self, device: torch.device, starts: tuple[float, ...], most: int) -> None:
        super().__init__()
        self._device, self._starts, self._most = device, starts, most
        self.steps: list[list[float]] = []  # seconds, of each part that is begun
        self.batches: list[float] = []  # seconds an image: the last batch is smaller than the others
        self._began = self._part_began = self._last = 0.0

    def before_fit(self) -> None:
        """Start the clock that ends it all, and the first part."""
        self._began = self._now()
        self._begin_part()

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
            self.steps[-1].append(seconds)
            if self._over():
                raise CancelTrainException
            if self._enough():
                self._begin_part()
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
        if self._over():
            raise CancelFitException

    def _begin_part(self) -> None:
        tell(self.learn, "as_at", self._starts[len(self.steps)])
        self.steps.append([])
        self._part_began = self._now()

    def _over(self) -> bool:
        return len(self.steps) == len(self._starts) and self._enough()

    def _enough(self) -> bool:
        run, seconds, limit = len(self.steps[-1]), self._now() - self._part_began, SECONDS / len(self._starts)
        few = seconds > limit and run >= WARM_UP + STEPS[0]
        return run >= self._most or few or (seconds > 3 * limit and run >= 2)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def time_fit(learn: Learner, fit: Fit) -> Timing:
    """Run the first steps of a fit, and take their time; the Learner's network is trained by them.

    Where callbacks say at which shares of the fit a step's time changes (`cost_changes`), some are run as in each part.
    Schedules go by the steps all the same: a rate that is high later could make the loss explode so early.

    Args:
        learn: as `make_learner` gives it.
        fit: the same stage.

    Raises:
        MicronetError: the loss is no longer finite after them.
    """
    starts = (0.0, *sorted({share for cb in having(learn, "cost_changes") for share in cb.cost_changes}))
    steps, parts = len(learn.dls.train), len(starts)
    # A small set has fewer steps in an epoch than are needed, and nothing may end it before.
    longer = replace(fit, epochs=max(fit.epochs, -(-parts * (WARM_UP + STEPS[0]) // steps)), early_stop=None)
    clock = _Clock(torch.device(learn.dls.device), starts, min(WARM_UP + STEPS[1], longer.epochs * steps // parts))
    result = run_fit(learn, longer, Console(quiet=True, force_terminal=False), cbs=(clock,))
    if result.diverged is not None:
        raise MicronetError(
            f"the training loss is no longer finite within {sum(map(len, clock.steps))} steps: lower lr={fit.lr}"
        )
    taken = [run[WARM_UP:] or run[-1:] for run in clock.steps]
    shares = [end - start for start, end in pairwise((*starts, 1.0))]
    images = len(learn.dls.valid.dataset)
    return Timing(
        step_seconds=sum(share * median(part) for share, part in zip(shares, taken, strict=True)),
        steps=steps,
        valid_seconds=median(clock.batches[1:] or clock.batches) * images,
        measured=sum(map(len, taken)),
        parts=parts,
    )
