"""How far two forms of a network agree: counts, places and relative errors, whatever the batches; never on NaN."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from micronet.parity import compare, relative_errors


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
