"""Networks and Learners for tests of channel pruning."""

import random

import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from callbacks.channels import removal, whole
from callbacks.importance import scores
from callbacks.prune import PruneChannels
from callbacks.prune_plan import Choice, Plan
from callbacks.selection import without
from callbacks.widths import narrow
from micronet import sgd

CLASSES = 5
STEPS = 4  # in an epoch of `learner`


class Coupled(nn.Module):
    """Every way in which channels depend on each other: sums, depthwise, gates, groups, stacks, flattened pixels."""

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.one = nn.Sequential(nn.Conv2d(8, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(10, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8))
        self.pointwise = nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12), nn.PReLU(12))
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.grouped = nn.Sequential(nn.Conv2d(12, 18, 3, groups=3, bias=False), nn.BatchNorm2d(18), nn.ReLU())
        self.branch = nn.Conv2d(18, 6, 3, padding=1, bias=False)
        self.mix = nn.Sequential(nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 10, 1), nn.AdaptiveAvgPool2d(2))
        self.hidden, self.fc = nn.Linear(40, 16), nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.two(self.one(x)))
        x = self.pointwise(torch.relu(self.depthwise(x)))
        x = x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = self.grouped(x)
        x = self.mix(torch.cat([x, self.branch(x)], 1))
        return self.fc(torch.relu(self.hidden(x.flatten(1))))


def plain(width: int = 8, classes: int = CLASSES) -> nn.Sequential:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes),
    )  # fmt: skip


def coupled() -> Coupled:
    """One that always begins alike, as if it had been trained: no two numbers of a layer are equal."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Coupled()
        for value in [*model.parameters(), *model.buffers()]:
            if value.dim():
                value.data = value.data + 0.2 * torch.rand_like(value)
    return model


def learner(model: nn.Module | None = None, opt_func=None, size: int = 8, seed: int = 0) -> Learner:
    """A Learner on random images, four steps an epoch."""
    torch.manual_seed(seed)
    random.seed(seed)
    images, labels = torch.randn(48, 3, size, size), torch.randint(0, CLASSES, (48,))
    sets = TensorDataset(images[:32], labels[:32]), TensorDataset(images[32:], labels[32:])
    dls = DataLoaders.from_dsets(*sets, bs=8, num_workers=0, device="cpu")
    model = coupled() if model is None else model
    learn = Learner(dls, model, CrossEntropyLossFlat(), lr=0.05, opt_func=opt_func or sgd())
    learn.logger = lambda _: None
    return learn


def fit(learn: Learner, epochs: int, *cbs, lr: float = 0.05) -> Learner:
    """Fit without a bar."""
    with learn.no_mbar():
        learn.fit(epochs, lr, cbs=[*cbs])
    return learn


def prune(model: nn.Module, size: int = 8, **choice) -> PruneChannels:
    """Prune in a fit of no epochs."""
    cb = PruneChannels(**choice)
    fit(learner(model, size=size), 0, cb)
    return cb


def cut(model: nn.Module, size: int = 8, put_back: int = 0, **choice) -> nn.Module:
    """Prune a network by itself, with the chunks that went last put back."""
    choice = Choice(**choice)
    plan = Plan(model, (3, size, size), choice)
    alive = whole(plan.groups)
    ranks = scores(model, plan.groups, alive, choice.importance, feeding=choice.feeding)
    chunks = plan.next(model, {}, alive, ranks, 1.0)
    gone = removal(model, plan.groups, alive, without(alive, chunks[: len(chunks) - put_back]))
    narrow(model, gone.kept, gone.table)
    return model


def count(model: nn.Module) -> int:
    """All parameters."""
    return sum(p.numel() for p in model.parameters())
