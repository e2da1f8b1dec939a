"""Schedules: frozen functions of progress, a number in [0, 1], giving a fraction of the largest value.

A schedule keeps no state, so two fits can share one. Of a fit of E epochs, "at epoch e" is the progress e / E.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import cos, pi


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be a number in [{low}, {high}], got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What every schedule has: a linear warm-up from nearly 0.

    Args:
        warmup: share of the fit over which the fraction grows linearly from 0 to what the schedule says, in [0, 1]; a
            source's "warm-up of 1 epoch" is 1 / epochs.
    """

    warmup: float = 0.0

    def __post_init__(self) -> None:
        _check("warmup", self.warmup, 0, 1)

    def __call__(self, progress: float) -> float:
        """The fraction at this progress, both in [0, 1]."""
        rise = min(1.0, progress / self.warmup) if self.warmup else 1.0
        return rise * self.shape(progress)

    def shape(self, progress: float) -> float:
        """The fraction without warm-up: 1 throughout."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """1 throughout, after the warm-up."""


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine from 1 to `end`, beginning where the warm-up ends.

    Args:
        warmup: share of the fit that warms up.
        end: the fraction at the end, in [0, 1].

    Source: Loshchilov and Hutter 2017, SGDR, one period.
    """

    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("end", self.end, 0, 1)

    def shape(self, progress: float) -> float:
        """The cosine over what the warm-up leaves of the fit."""
        rest = 1 - self.warmup
        done = max(0.0, progress - self.warmup) / rest if rest else 1.0
        return self.end + (1 - self.end) * (1 + cos(pi * done)) / 2


@dataclass(frozen=True, kw_only=True)
class MultiStep(Schedule):
    """Multiplied by `gamma` at each milestone.

    Args:
        warmup: share of the fit that warms up.
        milestones: growing shares of the fit, in (0, 1]; a source's [40, 60] of 70 epochs is (40 / 70, 60 / 70).
        gamma: the factor, in (0, 1].
    """

    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("gamma", self.gamma, 1e-12, 1)
        for milestone in self.milestones:
            _check("milestones", milestone, 1e-12, 1)
        if any(later <= earlier for earlier, later in pairwise(self.milestones)):
            raise ValueError(f"milestones must grow, got {self.milestones}")

    def shape(self, progress: float) -> float:
        """`gamma` to the number of milestones passed."""
        return self.gamma ** sum(progress >= milestone for milestone in self.milestones)


@dataclass(frozen=True, kw_only=True)
class Step(Schedule):
    """Multiplied by `gamma` after every `every` of the fit.

    Args:
        warmup: share of the fit that warms up.
        every: share of the fit between two steps, in (0, 1]; "/10 every 30 epochs" of 90 is 30 / 90.
        gamma: the factor, in (0, 1].
    """

    every: float = 1 / 3
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("every", self.every, 1e-12, 1)
        _check("gamma", self.gamma, 1e-12, 1)

    def shape(self, progress: float) -> float:
        """`gamma` to the number of whole steps done."""
        # 60 / 90 over 30 / 90 can fall an ulp short of 2; a step of the optimizer is never as small as 1e-9 of a fit.
        return self.gamma ** int(progress / self.every + 1e-9)


@dataclass(frozen=True, kw_only=True)
class OneCycle:
    """fastai's one-cycle policy, which also moves the momentum; run by `learn.fit_one_cycle`.

    Args:
        div: the largest learning rate over the first one, at least 1.
        div_final: the largest learning rate over the last one, at least 1.
        pct_start: share of the fit that the learning rate grows, in (0, 1).
        moms: momentum at the start, at the largest learning rate, and at the end.

    Source: Smith and Topin 2017, "Super-Convergence"; the defaults are fastai's.
    """

    div: float = 25.0
    div_final: float = 1e5
    pct_start: float = 0.25
    moms: tuple[float, float, float] = (0.95, 0.85, 0.95)

    def __post_init__(self) -> None:
        _check("div", self.div, 1, 1e12)
        _check("div_final", self.div_final, 1, 1e12)
        _check("pct_start", self.pct_start, 1e-6, 1 - 1e-6)
        for mom in self.moms:
            _check("moms", mom, 0, 1)
