"""How far two forms of a network agree: counts, places and relative errors, whatever the batches; never on NaN."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from micronet import MicronetError
from micronet.parity import compare, least_agreement, relative_errors, require


def answers(logits):
    """A network that gives an image the logits at the number that is written into it."""
    table = torch.tensor(logits, dtype=torch.float32)
    return lambda images: table[images[:, 0, 0, 0].long()]


def numbered(count):
    return torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


BEFORE = [[3.0, 4.0], [0.0, 2.0], [5.0, 0.0], [1.0, 0.0]]
AFTER = [[3.0, 4.5], [2.0, 0.0], [5.0, 0.0], [1.0, 0.1]]


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 128])
def test_counts_places_and_the_largest_error(batch):
    found = compare(answers(BEFORE), answers(AFTER), numbered(4), torch.tensor([1, 0, 0, 1]), batch=batch)
    assert (found.images, found.agreeing, found.disagreeing) == (4, 3, (1,))
    assert found.relative_error == pytest.approx(math.sqrt(8) / 2)  # of image 1: |(2, -2)| / |(0, 2)|
    assert (found.before, found.after) == (2, 3)
    assert found.agreement == 0.75


def test_without_labels_nothing_is_right():
    found = compare(answers(BEFORE), answers(BEFORE), numbered(4))
    assert (found.before, found.after, found.relative_error, found.disagreeing) == (None, None, 0.0, ())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("both", [False, True])
def test_what_is_no_number_never_passes_for_agreement(wrong, both):
    """`argmax` finds the same place of NaN in both, and comparisons with NaN are all false."""
    broken = [[3.0, 4.0], [wrong, 2.0]]
    found = compare(answers(broken if both else BEFORE[:2]), answers(broken), numbered(2), torch.tensor([1, 0]))
    assert found.disagreeing == (1,)
    assert found.relative_error == math.inf
    assert found.after == 1


def test_logits_of_zero():
    zeros, ones = torch.zeros(1, 3).double(), torch.ones(1, 3).double()
    assert relative_errors(zeros, zeros).tolist() == [0.0]
    assert relative_errors(zeros, ones).tolist() == [math.inf]
    assert relative_errors(ones, zeros).tolist() == [1.0]


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="no images"):
        compare(answers(BEFORE), answers(BEFORE), numbered(0))
    for other in (lambda images: torch.zeros(len(images), 3), lambda images: torch.zeros(1, 2)):
        with pytest.raises(ValueError, match=r"logits must be \(B, classes\) and alike"):
            compare(answers(BEFORE), other, numbered(4))
    with pytest.raises(ValueError, match="logits must be"):
        compare(lambda x: torch.zeros(len(x)), lambda x: torch.zeros(len(x)), numbered(4))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(-100, 100, width=32)] * 6), min_size=1, max_size=7),
    st.integers(1, 8),
)
def test_batches_and_order_change_nothing(rows, batch):
    before, after = [row[:3] for row in rows], [row[3:] for row in rows]
    images = numbered(len(rows))
    whole = compare(answers(before), answers(after), images)
    cut = compare(answers(before), answers(after), images, batch=batch)
    assert cut == whole
    turned = compare(answers(before), answers(after), images.flip(0))
    assert turned.relative_error == whole.relative_error
    assert turned.disagreeing == tuple(sorted(len(rows) - 1 - place for place in whole.disagreeing))


def test_who_allows_a_loss_allows_other_classes():
    assert [least_agreement(points) for points in (0, 1, 20)] == [0.8, 0.8, 0.8]
    assert least_agreement(50) == 0.5
    assert least_agreement(100) == least_agreement(1000) == 0


def test_what_is_required():
    found = compare(answers(BEFORE), answers(AFTER), numbered(4), torch.tensor([1, 0, 0, 1]))  # 3 of 4 agree, 2 -> 3
    require(found, "4 images", floor=0.75, most_lost=0)
    with pytest.raises(
        MicronetError, match=r"1 \(image 1, counted from 0\) of 4 images gets .* 80 % must .*\(--floor\)"
    ):
        require(found, "4 images", floor=0.8)
    with pytest.raises(MicronetError, match=r"relative error 1\.4 on 4 images, at most 0\.1 is allowed"):
        require(found, "4 images", floor=0, tolerance=0.1)
    turned = compare(answers(AFTER), answers(BEFORE), numbered(4), torch.tensor([1, 0, 0, 1]))
    with pytest.raises(MicronetError, match=r"loses 25\.00 points, at most 24 are allowed \(b\)"):
        require(turned, "4 images", floor=1, most_lost=24, options=("a", "b"))
    require(turned, "4 images", floor=0, most_lost=25)
