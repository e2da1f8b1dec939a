"""A small Learner on random images, for tests of callbacks."""

import random

import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torch.utils.data import TensorDataset


def make_learner(seed: int = 0) -> Learner:
    torch.manual_seed(seed)
    random.seed(seed)  # fastai's loader draws its order from Python's generator
    images, labels = torch.randn(48, 3, 8, 8), torch.randint(0, 3, (48,))
    sets = TensorDataset(images[:32], labels[:32]), TensorDataset(images[32:], labels[32:])
    dls = DataLoaders.from_dsets(*sets, bs=8, num_workers=0, device="cpu")
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    learn = Learner(dls, net, CrossEntropyLossFlat(), lr=0.01)
    learn.logger = lambda _: None
    return learn


def make_teacher(width: int = 6, classes: int = 3) -> nn.Module:
    """A network for the same images, always the same one; no number is drawn from the test's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, classes),
        )
