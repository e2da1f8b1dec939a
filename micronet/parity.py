"""How far two forms of one network agree on the same images: classes, and the relative error of the logits."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Answers = Callable[[Tensor], Tensor]
"""Normalised images `(B, C, H, W)`, float32, to logits `(B, classes)`: a module in eval mode, an `OnnxModule`."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """What a candidate answers beside what its reference answers.

    Args:
        images: how many were compared.
        agreeing: of how many the highest logit is of the same class.
        disagreeing: places of the others, ascending, counted from 0.
        relative_error: largest over the images of |candidate - reference| / |reference|, Euclidean norms of an image's
            logits; infinite where a logit is not finite, or where the reference's are all zero and the candidate's not.
        before: images that the reference answers rightly; None without labels.
        after: images that the candidate answers rightly; None without labels.
    """

    images: int
    agreeing: int
    disagreeing: tuple[int, ...]
    relative_error: float
    before: int | None
    after: int | None

    @property
    def agreement(self) -> float:
        """Share of the images of which both say the same class, in [0, 1]."""
        return self.agreeing / self.images


@torch.no_grad()
def compare(
    reference: Answers, candidate: Answers, images: Tensor, labels: Tensor | None = None, *, batch: int = 128
) -> Parity:
    """Let two forms of a network answer the same images.

    An image of which either gives a logit that is no finite number is one on which they disagree.

    Args:
        reference: what the candidate is to answer like.
        candidate: the other form.
        images: **shape** `(N, C, H, W)`, normalised, float32, on the CPU; at least one.
        labels: int64 `(N,)`; without them nothing is counted as right.
        batch: images that are run at a time.

    Raises:
        ValueError: there are no images, or the two don't give logits of one shape `(B, classes)`.
    """
    if not len(images):
        raise ValueError("there are no images to compare on")
    disagreeing: list[int] = []
    worst, right = 0.0, [0, 0]
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        before, after = (form(part).double().cpu() for form in (reference, candidate))
        if before.shape != after.shape or before.dim() != 2 or len(before) != len(part) or not before.shape[1]:
            raise ValueError(
                f"logits must be (B, classes) and alike, got {tuple(before.shape)} and {tuple(after.shape)} "
                f"of {len(part)} images"
            )
        finite = before.isfinite().all(1) & after.isfinite().all(1)
        same = (before.argmax(1) == after.argmax(1)) & finite
        disagreeing += [start + place for place in torch.nonzero(~same).flatten().tolist()]
        worst = max(worst, float(relative_errors(before, after).max()))
        if labels is not None:
            said = labels[start : start + batch]
            for form, logits in enumerate((before, after)):
                right[form] += int(((logits.argmax(1) == said) & logits.isfinite().all(1)).sum())
    return Parity(
        images=len(images),
        agreeing=len(images) - len(disagreeing),
        disagreeing=tuple(disagreeing),
        relative_error=worst,
        before=None if labels is None else right[0],
        after=None if labels is None else right[1],
    )


def relative_errors(before: Tensor, after: Tensor) -> Tensor:
    """|after - before| / |before| of each image's logits, `(B,)`; infinite where that is no number.

    Args:
        before: float64 `(B, classes)`.
        after: the same.
    """
    apart = (after - before).norm(dim=1)
    share = torch.where(apart == 0, 0.0, apart / before.norm(dim=1))
    return share.nan_to_num(nan=torch.inf, posinf=torch.inf)
