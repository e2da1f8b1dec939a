"""Measuring a network on a split: counts of images, nothing averaged over batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from micronet.data import BatchLoader
from micronet.data.store import progress
from micronet.optim import top_k_hits


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a network answered on a split.

    Args:
        images: number of images.
        top1_count: images whose label had the highest logit.
        top5_count: images whose label was among the five highest logits.
        loss: mean cross-entropy, natural logarithm.
        confusion: int64 (C, C), rows the label, columns the answer.
    """

    images: int
    top1_count: int
    top5_count: int
    loss: float
    confusion: Tensor

    @property
    def top1(self) -> float:
        """Share of images answered rightly, in [0, 1]."""
        return self.top1_count / self.images

    @property
    def top5(self) -> float:
        """Share of images whose label was among five answers, in [0, 1]."""
        return self.top5_count / self.images

    def row(self) -> dict[str, Any]:
        """The numbers, for a table or JSON."""
        counts = {"images": self.images, "top1_count": self.top1_count, "top5_count": self.top5_count}
        return counts | {"top1": self.top1, "top5": self.top5, "loss": self.loss}

    def class_accuracy(self) -> Tensor:
        """Share of each class's images answered rightly, float64 (C,); NaN for a class without images."""
        return self.confusion.diagonal().double() / self.confusion.sum(1).double()


@torch.no_grad()
def evaluate(model: nn.Module, loader: BatchLoader, device: Any = "cpu") -> Evaluation:
    """Count what a network answers, in float32, each image once.

    Args:
        model: (B, C, H, W) -> logits; moved to the device, and left in the mode it was in.
        loader: batches of one split, in order, without augmentation.
        device: where to compute.

    Returns:
        Counts, mean loss, confusion matrix.
    """
    was_training = model.training
    model.to(device).eval()
    top1 = top5 = images = 0
    loss, confusion = 0.0, None
    with _full_float32(), progress("evaluating", len(loader.dataset)) as advance:
        for xb, yb in loader:
            logits = model(xb.to(device)).float()
            labels = yb.to(device)
            top1 += top_k_hits(logits, labels, 1)
            top5 += top_k_hits(logits, labels, 5)
            images += len(labels)
            loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
            classes = logits.shape[1]
            pairs = torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).cpu()
            confusion = pairs if confusion is None else confusion + pairs
            advance(images)
    model.train(was_training)
    return Evaluation(images, top1, top5, loss / images, confusion.view(classes, classes))


@contextmanager
def _full_float32() -> Iterator[None]:
    """Keep a GPU's convolutions from rounding float32 to TF32, which has ten bits of mantissa."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
