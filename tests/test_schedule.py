"""Schedules honour their start, their end and their steps exactly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from callbacks.schedule import Constant, Cosine, MultiStep, OneCycle, Step


@given(epochs=st.integers(2, 400), data=st.data())
def test_milestones_fall_on_the_first_step_of_their_epoch(epochs, data):
    first = data.draw(st.integers(1, epochs - 1))
    second = data.draw(st.integers(first + 1, epochs))
    schedule = MultiStep(milestones=(first / epochs, second / epochs), gamma=0.1)
    for epoch in range(epochs):
        passed = (epoch >= first) + (epoch >= second)
        assert schedule(epoch / epochs) == pytest.approx(0.1**passed)
        last = epoch / epochs + 0.999 / epochs
        assert schedule(last) == pytest.approx(0.1**passed)


@given(epochs=st.integers(1, 400), every=st.integers(1, 400))
def test_step_falls_every_so_many_epochs(epochs, every):
    every = min(every, epochs)
    schedule = Step(every=every / epochs, gamma=0.5)
    for epoch in range(epochs):
        assert schedule(epoch / epochs) == 0.5 ** (epoch // every)


@given(warmup=st.floats(0.01, 0.9), progress=st.floats(0, 1))
def test_warmup_rises_linearly_and_nothing_leaves_the_unit_interval(warmup, progress):
    for schedule in (Constant(warmup=warmup), Cosine(warmup=warmup), Step(warmup=warmup), MultiStep(warmup=warmup)):
        assert 0 <= schedule(progress) <= 1
    assert Constant(warmup=warmup)(warmup / 2) == pytest.approx(0.5)
    assert Constant(warmup=warmup)(1.0) == 1


def test_cosine_begins_at_one_and_ends_at_its_end():
    assert Cosine()(0) == 1
    assert Cosine()(0.5) == pytest.approx(0.5)
    assert Cosine(end=0.01)(1) == pytest.approx(0.01)
    assert Cosine(warmup=0.2)(0.2) == 1
    assert Cosine(warmup=0.2)(0) == 0


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: MultiStep(milestones=(0.5, 0.4)), "milestones must grow"),
        (lambda: MultiStep(milestones=(40, 60)), "milestones must be"),
        (lambda: Step(every=0), "every must be"),
        (lambda: Cosine(end=2), "end must be"),
        (lambda: Constant(warmup=-1), "warmup must be"),
        (lambda: OneCycle(pct_start=1.0), "pct_start must be"),
    ],
)
def test_bad_arguments_are_named(make, name):
    with pytest.raises(ValueError, match=name):
        make()
