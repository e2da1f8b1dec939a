"""Ramps: where they begin and end, to the step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from callbacks.ramp import Cubic, Linear, OneShot, Rounds

STEPS = st.integers(1, 500)
TIMES = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)


@given(STEPS, TIMES, st.sampled_from([Linear, Cubic]))
def test_a_ramp_never_falls_and_ends_exactly_when_it_says(steps, times, kind):
    start, end = times
    ramp = kind(start=start, end=end)
    values = [ramp(k / steps) for k in range(steps + 1)]
    assert values == sorted(values)
    assert all(value == 1 for k, value in enumerate(values) if k / steps >= end)
    assert all(value == 0 for k, value in enumerate(values) if k / steps <= start and k / steps < end)
    assert all(0 < value < 1 for k, value in enumerate(values) if start < k / steps < end)


def test_published_shapes():
    assert Linear(start=0.2, end=0.6)(0.4) == pytest.approx(0.5)
    assert Cubic()(0.5) == 0.875  # 1 - (1 - 0.5)^3
    assert [OneShot()(p) for p in (0, 0.5, 1)] == [1, 1, 1]
    assert [OneShot(end=0.5)(p) for p in (0, 0.49, 0.5)] == [0, 0, 1]


@pytest.mark.parametrize("steps", [7, 10, 100, 391])
def test_rounds_come_at_equal_distances_and_have_equal_size(steps):
    ramp = Rounds(start=0.0, end=0.75, rounds=4)
    values = [ramp(k / steps) for k in range(steps + 1)]
    assert sorted(set(values)) == [0.25, 0.5, 0.75, 1.0]
    firsts = [next(k for k, value in enumerate(values) if value == size) for size in (0.25, 0.5, 0.75, 1.0)]
    assert firsts == [0, *(-(-steps * quarter // 4) for quarter in (1, 2, 3))]


@pytest.mark.parametrize(
    "make",
    [lambda: Linear(start=0.6, end=0.5), lambda: Cubic(end=1.1), lambda: Rounds(rounds=1), lambda: Rounds(end=0)],
)
def test_ramps_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()
