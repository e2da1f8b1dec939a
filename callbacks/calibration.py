"""What methods read of a Learner's data beside a fit: the size of an image, some batches, gradients of some batches.

None moves the order of the images nor a generator, so that the fit sees what it would have seen.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from fastai.learner import Learner
from torch import Tensor

from callbacks.checkpoint import random_state, set_random_state
from callbacks.importance import Key, gather

BATCHES = 8


def image_size(learn: Learner) -> tuple[int, ...]:
    """The **shape** of one image of a Learner's data, `(C, H, W)`; no generator is moved."""
    drawn = random_state()
    try:
        batch = (learn.dls.valid if len(learn.dls.valid) else learn.dls.train).one_batch()
    finally:
        set_random_state(drawn)
    return tuple(batch[0].shape[1:])


def training_batches(learn: Learner, images: int) -> Iterator[tuple[Any, ...]]:
    """Some training images, spread evenly over the set, as the loader gives them without augmentation.

    Args:
        learn: its training set's order and epoch stay. Generators may move: see `random_state`.
        images: how many at most.
    """
    train = learn.dls.train
    number = min(len(train.dataset), images)
    chosen = [place * len(train.dataset) // number for place in range(number)]
    yield from train.new(shuffle=False, drop_last=False, get_idxs=lambda: chosen)


def augmented_batches(learn: Learner, images: int) -> Iterator[tuple[Any, ...]]:
    """Training batches as a fit gets them: in a drawn order, augmented.

    Args:
        learn: its training set's epoch stays. Generators may move: see `random_state`.
        images: how many at least, of one pass at most.
    """
    train = learn.dls.train
    epoch = vars(train).get("epoch")
    try:
        yield from islice(train, -(-images // train.bs))
    finally:
        if epoch is not None:
            train.epoch = epoch


def calibrate(learn: Learner, loss: Any, keys: Sequence[Key], sums: dict[Key, Tensor]) -> None:
    """Gather Taylor's averages from some batches spread over the training images; no step is made.

    Args:
        learn: its network stays as it is, and no generator is moved.
        loss: the task's.
        keys: of the layers that are looked at.
        sums: the averages, filled here.
    """
    network = learn.model
    drawn, training = random_state(), network.training
    network.eval()
    try:
        with torch.enable_grad():
            for batch in training_batches(learn, BATCHES * learn.dls.train.bs):
                inputs = getattr(learn.dls, "n_inp", len(batch) - 1)  # as Learner splits a batch
                network.zero_grad()
                loss(network(*batch[:inputs]).float(), *batch[inputs:]).backward()
                gather(network, keys, sums)
    finally:
        network.zero_grad()
        network.train(training)
        set_random_state(drawn)
