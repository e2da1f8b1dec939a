"""What repeated times of a model say: median, p95, and how much faster than another it is, with an interval.

Times are paired by round: in each round every model had its turn within a second or so of the others, so that a slow
spell of the machine divides out of a round's ratio. The interval is a percentile bootstrap over rounds.

Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (percentile interval).
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
        low: lower end of its 95 % interval.
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
