"""Images that grow during a fit."""

import pytest
import torch
from fastai.callback.core import Callback
from learners import make_learner

from callbacks.resize import ProgressiveResizing


class Sizes(Callback):
    """Writes down what the network is given."""

    order = 6

    def __init__(self):
        super().__init__()
        self.trained, self.validated = [], []

    def before_batch(self):
        sizes = self.trained if self.learn.training else self.validated
        sizes.append(tuple(self.learn.xb[0].shape[-2:]))


def seen(steps, epochs=5, **cut):
    learn, sizes = make_learner(), Sizes()
    with learn.no_mbar():
        learn.fit(epochs, cbs=[ProgressiveResizing(steps), sizes], **cut)
    return sizes


def test_each_size_ends_at_its_share_of_the_fit():
    sizes = seen(((0.2, 4), (0.6, 6)))  # 20 steps of 8 x 8 pixels
    assert sizes.trained == [(4, 4)] * 4 + [(6, 6)] * 8 + [(8, 8)] * 8
    assert set(sizes.validated) == {(8, 8)}


def test_a_resumed_fit_goes_on_with_its_size():
    assert seen(((0.5, 4),), epochs=4, start_epoch=1).trained == [(4, 4)] * 4 + [(8, 8)] * 8


def test_images_are_never_enlarged_and_keep_their_shape():
    assert set(seen(((1.0, 20),)).trained) == {(8, 8)}
    shrunk = ProgressiveResizing._shrunk(torch.rand(2, 3, 8, 16), 4)
    assert shrunk.shape == (2, 3, 4, 8)


def test_shrinking_averages_and_does_not_skip_pixels():
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2.0
    small = ProgressiveResizing._shrunk(board[None, None], 4)
    torch.testing.assert_close(small, torch.full_like(small, 0.5), atol=0.02, rtol=0)


@pytest.mark.parametrize("steps", [(), ((0.0, 4),), ((1.1, 4),), ((0.5, 4), (0.5, 6)), ((0.5, 4), (0.4, 6))])
def test_shares_that_do_not_grow_are_refused(steps):
    with pytest.raises(ValueError, match="shares"):
        ProgressiveResizing(steps)


@pytest.mark.parametrize("side", [0, -1, 4.5])
def test_sides_that_are_no_pixels_are_refused(side):
    with pytest.raises(ValueError, match="sides"):
        ProgressiveResizing(((0.5, side),))
