"""What pruning reads of a Learner's data before a fit: the size of an image, and gradients of some batches.

Neither moves the order of the images nor a generator, so that the fit afterwards sees what it would have seen.
"""

from collections.abc import Sequence
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


def calibrate(learn: Learner, loss: Any, keys: Sequence[Key], sums: dict[Key, Tensor]) -> None:
    """Gather Taylor's averages from some batches spread over the training images; no step is made.

    Args:
        learn: its network stays as it is, and no generator is moved.
        loss: the task's.
        keys: of the layers that are looked at.
        sums: the averages, filled here.
    """
    network, train = learn.model, learn.dls.train
    number = min(len(train.dataset), BATCHES * train.bs)
    chosen = [place * len(train.dataset) // number for place in range(number)]
    drawn, training = random_state(), network.training
    network.eval()
    try:
        with torch.enable_grad():
            for batch in train.new(shuffle=False, drop_last=False, get_idxs=lambda: chosen):
                inputs = getattr(learn.dls, "n_inp", len(batch) - 1)  # as Learner splits a batch
                network.zero_grad()
                loss(network(*batch[:inputs]).float(), *batch[inputs:]).backward()
                gather(network, keys, sums)
    finally:
        network.zero_grad()
        network.train(training)
        set_random_state(drawn)
