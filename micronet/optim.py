"""Optimizers, the loss and the metrics of a fit."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fastai.learner import Learner, Metric
from fastai.optimizer import OptimWrapper
from torch import Tensor, nn

from micronet.muon import Muon

OptFunc = Callable[..., OptimWrapper]


def sgd(momentum: float = 0.9, nesterov: bool = True) -> OptFunc:
    """Make torch's SGD for a Learner; weight decay is added to the gradient.

    Args:
        momentum: in [0, 1); a one-cycle schedule replaces it step by step.
        nesterov: whether to look ahead; needs a momentum above 0.
    """
    return partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=momentum, nesterov=nesterov))


def adam(betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> OptFunc:
    """Make torch's Adam for a Learner; weight decay is added to the gradient.

    Args:
        betas: decay of the averages of gradient and squared gradient, each in [0, 1).
        eps: added to the denominator, above 0.
    """
    return partial(OptimWrapper, opt=partial(torch.optim.Adam, betas=betas, eps=eps))


def adamw(betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> OptFunc:
    """Make torch's AdamW for a Learner; weight decay shrinks the weights themselves.

    Args:
        betas: decay of the averages of gradient and squared gradient, each in [0, 1).
        eps: added to the denominator, above 0.
    """
    return partial(OptimWrapper, opt=partial(torch.optim.AdamW, betas=betas, eps=eps))


def muon(momentum: float = 0.9) -> OptFunc:
    """Make Muon for a Learner: for weights of convolutions; everything else is trained by SGD with Nesterov momentum.

    Args:
        momentum: in [0, 1); a one-cycle schedule replaces it step by step.
    """
    return partial(OptimWrapper, opt=partial(Muon, momentum=momentum))


def decay_groups(model: nn.Module) -> list[list[nn.Parameter]]:
    """Split parameters into those with two and more dimensions and the rest: biases and what normalisation layers have.

    Args:
        model: the network.

    Returns:
        Two lists: to decay, not to decay.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [[p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]]


class CrossEntropy:
    """Cross-entropy of logits (B, C) and labels int64 (B,), smoothed in training only.

    Smoothing is a means of training. Without gradients, as in validation, the plain cross-entropy is returned, so that
    the valid losses of two recipes can be compared. MixUp and CutMix understand it (`y_int`, `reduction`).

    Args:
        label_smoothing: share of the target spread evenly over all classes, in [0, 1).

    Source: Szegedy et al. 2016, "Rethinking the Inception Architecture".
    """

    y_int = True

    def __init__(self, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be a fraction in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing
        self.reduction = "mean"

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        """The loss: one number, or (B,) where `reduction` is "none"."""
        smoothing = self.label_smoothing if torch.is_grad_enabled() else 0.0
        return F.cross_entropy(pred, target, reduction=self.reduction, label_smoothing=smoothing)

    def activation(self, pred: Tensor) -> Tensor:
        """Probabilities (B, C), for `learn.get_preds`."""
        return pred.softmax(-1)

    def decodes(self, pred: Tensor) -> Tensor:
        """The most probable class (B,)."""
        return pred.argmax(-1)


class TopK(Metric):
    """Share of images whose label is among the k highest logits: a count over a count, whatever the batch sizes.

    Args:
        k: at least 1; where there are fewer classes, all of them.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.reset()

    def reset(self) -> None:
        """Begin a new count."""
        self._hits, self._images = 0, 0

    def accumulate(self, learn: Learner) -> None:
        """Count one batch."""
        self._hits += top_k_hits(learn.pred, learn.y, self.k)
        self._images += len(learn.y)

    @property
    def value(self) -> float | None:
        """The share, in [0, 1]; None before the first batch."""
        return self._hits / self._images if self._images else None

    @property
    def name(self) -> str:
        """The column's name: top1, top5."""
        return f"top{self.k}"


def top_k_hits(logits: Tensor, labels: Tensor, k: int) -> int:
    """Count the images whose label is among their k highest logits.

    Args:
        logits: (B, C).
        labels: int64 (B,).
        k: at least 1; C where that is smaller.
    """
    best = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
    return int((best == labels[:, None]).sum())


def metrics() -> list[Any]:
    """The columns of every training table: top-1 and top-5."""
    return [TopK(1), TopK(5)]
