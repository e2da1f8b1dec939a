"""Ramps: frozen functions of progress, giving the share of an aim that is to be reached by then.

A method that makes a network smaller while it trains (`Sparsify`, `PruneChannels`) asks its ramp at progress 0, before
the first step, and after each step: after step k of n, progress is k / n. A ramp is 0 up to its start, 1 from its end
on, exactly, and never falls. It keeps no state, so two fits can share one.
"""

from dataclasses import dataclass
from math import floor


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """What every ramp has.

    Args:
        start: progress up to which nothing is done, in [0, 1]; 0.1 leaves the first tenth of the fit alone.
        end: progress from which the whole aim is reached, in [start, 1].

    Raises:
        ValueError: not 0 <= start <= end <= 1.
    """

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(f"start and end must be 0 <= start <= end <= 1, got {self.start!r} and {self.end!r}")

    def __call__(self, progress: float) -> float:
        """The share of the aim at this progress, both in [0, 1]."""
        if progress >= self.end:
            return 1.0
        if progress <= self.start:
            return 0.0
        return self.shape((progress - self.start) / (self.end - self.start))

    def shape(self, done: float) -> float:
        """The share in between, where `done` in (0, 1) of the ramp's time is over."""
        return done


@dataclass(frozen=True, kw_only=True)
class OneShot(Ramp):
    """The whole aim at once, at `end`; at the first step by default.

    Args:
        start: not looked at.
        end: when, in [0, 1].
    """

    end: float = 0.0

    def shape(self, done: float) -> float:
        """Nothing before the end."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Linear(Ramp):
    """Equal shares at equal times."""


@dataclass(frozen=True, kw_only=True)
class Cubic(Ramp):
    """Fast at first, slower and slower: `1 - (1 - t) ** 3`.

    Source: Zhu and Gupta 2017, "To prune, or not to prune", equation 1 (automated gradual pruning, AGP).
    """

    def shape(self, done: float) -> float:
        """One minus the cube of what is left of the time."""
        return 1 - (1 - done) ** 3


@dataclass(frozen=True, kw_only=True)
class Rounds(Ramp):
    """In equal rounds, with time to recover after each: the first at `start`, the last one's recovery begins at `end`.

    Args:
        start: when the first round is, in [0, 1).
        end: when the last round is, in (start, 1].
        rounds: how many, at least 2.

    Raises:
        ValueError: an argument is out of its range.

    Source: Han et al. 2015, "Learning both Weights and Connections": prune, retrain, again.
    """

    end: float = 0.8
    rounds: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 2 or self.start == self.end:
            raise ValueError(f"rounds must be 2 or more between different start and end, got {self}")

    def __call__(self, progress: float) -> float:
        """The share of the aim at this progress, both in [0, 1]."""
        if progress >= self.end:
            return 1.0
        if progress < self.start:
            return 0.0
        # A start such as 1 / 3 of a fit can be met an ulp short; a step is never as small as 1e-9 of a fit.
        return (1 + floor((progress - self.start) / (self.end - self.start) * (self.rounds - 1) + 1e-9)) / self.rounds
