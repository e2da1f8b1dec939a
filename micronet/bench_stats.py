"""What repeated times of a model say: median, p95, and how much faster than another it is, with an interval.

Times are paired by round: in each round every model had its turn within a second or so of the others, so that a slow
spell of the machine divides out of a round's ratio. The interval is a percentile bootstrap over rounds, and takes their
ratios for independent. Of independent normal ones (1,500 trials each) it holds the truth in 93 % of cases at 12 rounds,
in 95 % at 25; at 8 in 92 %. Where a round's ratio is like that of the round before, as caches or a clock that treat two
models differently can make it, the interval is too narrow: with a correlation of 0.4 between neighbours it holds the
truth in 82 to 85 %, with 0.8 in 51 to 59 %. Rounds resampled in blocks of 3 (400 trials) hardly mend that (0.8: 53 % at
12, 68 % at 25), and make it worse for independent ones (87 % at 12, 89 % at 25). To run the command again tells more.

Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (percentile interval); blocks: Künsch
1989, "The Jackknife and the Bootstrap for General Stationary Observations", of a length as in Hall, Horowitz and Jing
1995, "On blocking rules for the bootstrap with dependent data".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The times of single runs.

    Args:
        median: half of the runs took at most as long, seconds.
        p95: 95 % of the runs took at most as long, seconds.
        runs: how many.
    """

    median: float
    p95: float
    runs: int


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times as fast one model is as another.

    Args:
        value: median over the rounds; above 1 is faster.
        low: lower end of its 95 % interval, were the rounds independent.
        high: upper end.
        rounds: how many.
    """

    value: float
    low: float
    high: float
    rounds: int


def spread(times: Sequence[float]) -> Spread:
    """Median and 95th percentile, interpolated linearly between runs.

    Args:
        times: of single runs, seconds; at least one.
    """
    if not len(times):
        raise ValueError("times must hold at least one run, got none")
    median, p95 = np.quantile(np.asarray(times, np.float64), (0.5, LEVEL))
    return Spread(median=float(median), p95=float(p95), runs=len(times))


def speed_up(first: Sequence[float], other: Sequence[float], seed: int = 0) -> Ratio:
    """How many times as fast a model is as the first, from what both took in each round.

    Args:
        first: what the first model took, one number for each round, above 0.
        other: what the other took in the same rounds.
        seed: of the resampling.

    Raises:
        ValueError: the rounds of the two are not as many, or none.
    """
    if len(first) != len(other) or not len(first):
        raise ValueError(f"both need times of the same rounds, got {len(first)} and {len(other)}")
    ratios = np.asarray(first, np.float64) / np.asarray(other, np.float64)
    chosen = np.random.default_rng(seed).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    medians = np.median(ratios[chosen], axis=1)
    low, high = np.quantile(medians, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Ratio(value=float(np.median(ratios)), low=float(low), high=float(high), rounds=len(ratios))
