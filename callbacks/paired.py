"""Two models on the same images: what each alone answers rightly, and whether that is chance.

Source: the exact test of McNemar 1947, two-sided.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np

from callbacks.onnx_run import open_session

Batches = Iterable[tuple[np.ndarray, np.ndarray]]
"""Images `(N, C, H, W)`, float32, normalised, and their classes `(N,)`."""
Watch = Callable[[int], None]


@dataclass(frozen=True)
class Paired:
    """Two models on the same images.

    Args:
        images: how many.
        before: images that the first answers rightly.
        after: images that the second answers rightly.
        lost: images that only the first answers rightly.
        won: images that only the second answers rightly.
        agreeing: images of which both say the same class, right or wrong.
    """

    images: int
    before: int
    after: int
    lost: int
    won: int
    agreeing: int

    @property
    def drop(self) -> float:
        """What the second one loses of the first one's accuracy, percentage points."""
        return 100 * (self.before - self.after) / self.images

    @property
    def p(self) -> float:
        """How likely so uneven a share of `lost` and `won`, or a more uneven one, is if neither model is better."""
        number, least = self.lost + self.won, min(self.lost, self.won)
        return min(1.0, 2 * sum(comb(number, k) for k in range(least + 1)) / 2**number)

    @property
    def told(self) -> str:
        """What the second one answers beside the first, in words."""
        return (
            f"right on {self.after:,} of {self.images:,} images, {self.won} won and {self.lost} lost against all in "
            f"int8 (p = {self.p:.2g}, exact McNemar)"
        )


def paired(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> Paired:
    """Count what two models answer rightly, together and alone; logits that are no finite numbers are no answer.

    Args:
        before: logits of the first model, **shape** `(N, classes)`.
        after: logits of the second one.
        labels: the right classes, `(N,)`.
    """
    (was, is_known), (now, is_known_now) = ((form.argmax(1), np.isfinite(form).all(1)) for form in (before, after))
    first, second = (was == labels) & is_known, (now == labels) & is_known_now
    same = (was == now) & is_known & is_known_now
    return Paired(len(labels), *(int(n.sum()) for n in (first, second, first & ~second, second & ~first, same)))


def answers(
    protos: Sequence[Any], batches: Batches, watch: Watch = lambda done: None
) -> tuple[list[np.ndarray], np.ndarray]:
    """Logits of several graphs for the same images, run side by side, so that a batch at a time is in memory; labels.

    Args:
        protos: `onnx.ModelProto`s.
        batches: images and labels; at least one.
        watch: called with the number of images done.
    """
    runs, found, done = [open_session(proto) for proto in protos], [], 0
    for images, labels in batches:
        found.append((*(run(images)[0] for run in runs), labels))
        done += len(labels)
        watch(done)
    *given, labels = (np.concatenate(part) for part in zip(*found, strict=True))
    return given, labels


def compared(before: Any, after: Any, batches: Batches) -> Paired:
    """Let two graphs answer the same images.

    Args:
        before: an `onnx.ModelProto`.
        after: another one.
        batches: images and labels.
    """
    given, labels = answers((before, after), batches)
    return paired(*given, labels)
