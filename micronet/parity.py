"""How far two forms of one network agree on the same images, classes and logits, and how far they have to."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from micronet.errors import MicronetError

Answers = Callable[[Tensor], Tensor]
"""Normalised images `(B, C, H, W)`, float32, to logits `(B, classes)`: a module in eval mode, an `OnnxModule`."""

MOST_LOST = 1.0  # percentage points of top-1 that a quantised file may lose
# Share of the images on which a quantised file must name its source's class: networks in int8 do on 0.9 to 0.99. A loss
# of top-1 alone says little of one that is seldom right.
AGREEMENT = 0.8
MOST = 5  # images that a message names


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
        images: **shape** `(N, C, H, W)`, as both take them, on the CPU; at least one.
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


def least_agreement(most_lost: float) -> float:
    """Least share of the images that must keep their class where nobody says: who allows a loss allows other classes.

    Args:
        most_lost: percentage points of top-1 that may be lost, at least 0.
    """
    return max(0.0, min(AGREEMENT, 1 - most_lost / 100))


def require(
    parity: Parity,
    told: str,
    *,
    floor: float,
    tolerance: float | None = None,
    most_lost: float | None = None,
    options: tuple[str, str] = ("--floor", "--floor"),
) -> None:
    """Refuse a file that does not answer as its source.

    Args:
        parity: how the two compare.
        told: the images, in words.
        floor: least share of the images on which both have to name the same class, in [0, 1].
        tolerance: largest relative error of an image's logits; None for any, of a quantised model.
        most_lost: most percentage points of top-1 that it may lose; None for any.
        options: what sets `floor` and `most_lost`, for messages.

    Raises:
        MicronetError: it does not.
    """
    if tolerance is not None and not parity.relative_error <= tolerance:
        raise MicronetError(
            f"it does not answer as its source: relative error {parity.relative_error:.2g} on {told}, "
            f"at most {tolerance:g} is allowed"
        )
    lost = 100 * ((parity.before or 0) - (parity.after or 0)) / parity.images
    if most_lost is not None and lost > most_lost:
        raise MicronetError(
            f"right on {parity.after:,} of {told}, its source on {parity.before:,}: it loses {lost:.2f} points, "
            f"at most {most_lost:g} are allowed ({options[1]})"
        )
    if parity.agreement < floor:
        raise MicronetError(
            f"{disagreeing(parity)} of {told} {'get' if len(parity.disagreeing) > 1 else 'gets'} another class "
            f"than from its source; at least {100 * floor:g} % must agree ({options[0]})"
        )


def disagreeing(parity: Parity) -> str:
    """Which images the two answer otherwise, in words."""
    count = len(parity.disagreeing)
    named = ", ".join(map(str, parity.disagreeing[:MOST])) + (", ..." if count > MOST else "")
    return f"{count:,} ({'images' if count > 1 else 'image'} {named}, counted from 0)" if count else "none"
