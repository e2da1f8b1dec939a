"""Images that grow during a fit."""

from functools import partial

import pytest
import torch
from fastai.callback.core import Callback
from learners import make_learner

from callbacks.resize import ProgressiveResizing
from micronet import Fit, Recipe
from micronet.data import digits
from micronet.learner import find_lr
from micronet.models import separable_net


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


@pytest.mark.parametrize(("steps", "changes"), [(((0.2, 4), (0.6, 6)), (0.2, 0.6)), (((0.5, 4), (1.0, 6)), (0.5,))])
def test_it_says_where_steps_begin_to_cost_more(steps, changes):
    assert ProgressiveResizing(steps).cost_changes == changes


def test_the_size_of_another_part_is_taken_until_a_fit_begins():
    resizing, sizes = ProgressiveResizing(((0.5, 4),)), Sizes()
    learn = make_learner()
    learn.add_cbs([resizing, sizes])
    learn.training, learn.pct_train = True, 0.0
    resizing.as_at(0.5)
    learn.xb = (torch.rand(2, 3, 8, 8),)
    resizing.before_batch()
    assert learn.xb[0].shape[-1] == 8
    with learn.no_mbar():
        learn.fit(2)
    assert sizes.trained == [(4, 4)] * 4 + [(8, 8)] * 4


def test_a_learning_rate_is_looked_for_at_the_full_size():
    sizes = Sizes()
    fit = Fit("train", epochs=2, lr=0.05, cbs=(partial(ProgressiveResizing, ((0.9, 16),)), lambda: sizes))
    net = partial(separable_net, width_multiplier=0.125)
    find_lr(Recipe(partial(digits, batch_size=16), net, (fit,)), steps=30, limit=160, device="cpu")
    assert set(sizes.trained) == {(32, 32)}


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
