"""Train, valid and test: the form in which a fit takes them, and how images are shared out among them.

Valid is cut from the training images, stratified and by a fixed seed; it chooses the checkpoint and anything else.
Test is measured once.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

TEST_SHARE = 0.2  # cut from a source that has no test split of its own, always with seed 0


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Decoded images with their labels.

    Args:
        images: uint8 `(N, 3, H, W)` in channels_last memory.
        labels: int64 `(N,)`, an index into the class names.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __post_init__(self):
        """Refuse tensors that are not as described."""
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        if not images.permute(0, 2, 3, 1).is_contiguous():
            raise ValueError("images must lie in channels_last memory, got another layout")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be int64 ({len(images)},), got {labels.dtype} {tuple(labels.shape)}")

    def __len__(self):
        return len(self.labels)

    def subset(self, indices: torch.Tensor) -> "ImageSet":
        """A copy of the images at `indices`, in that order.

        Args:
            indices: int64 `(M,)`.
        """
        pixels = self.images.permute(0, 2, 3, 1).index_select(0, indices)
        return ImageSet(pixels.permute(0, 3, 1, 2), self.labels[indices])


@dataclass(frozen=True, eq=False)
class Data:
    """A data set as a fit takes it.

    Args:
        name: of the data set.
        train: what is trained on.
        valid: what chooses the checkpoint and anything else.
        test: what is measured once, at the end; None when the source has none.
        classes: names, alphabetical.
        mean: per channel, fraction of full scale, of the source's training images (before valid was cut from them).
        std: the same, population standard deviation over all pixels.
        batch_size: images in a training batch.
        augment: what the loader does to a training batch, or None.
        valid_is_test: valid holds the test images, so numbers on test are optimistic; reports mark them.
    """

    name: str
    train: ImageSet
    valid: ImageSet
    test: ImageSet | None
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    batch_size: int
    augment: Any = None
    valid_is_test: bool = False

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """One image's `(3, H, W)`."""
        return tuple(self.train.images.shape[1:])

    def limit(self, images: int) -> "Data":
        """At most `images` images in each split, with the classes in proportion and each at least once if it can be.

        Args:
            images: at least 1.

        Raises:
            ValueError: `images` is below 1.
        """
        if images < 1:
            raise ValueError(f"images must be at least 1, got {images}")
        train, valid = (part.subset(spread(part.labels, images)) for part in (self.train, self.valid))
        test = self.test and self.test.subset(spread(self.test.labels, images))
        return replace(self, train=train, valid=test if self.valid_is_test else valid, test=test)


@dataclass(frozen=True)
class Options:
    """What every source takes, checked before anything slow runs.

    Args:
        batch_size: images in a training batch, at least 1.
        augment: carried along for the loader.
        valid: share of the training images, in (0, 1), or "test".
        split_seed: chooses the images of valid, in [0, 2**32).

    Raises:
        ValueError: one of them is not as described.
    """

    batch_size: int
    augment: Any
    valid: float | Literal["test"]
    split_seed: int

    def __post_init__(self):
        """Check the values."""
        if type(self.batch_size) is not int or self.batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {self.batch_size!r}")
        if self.valid != "test" and not (isinstance(self.valid, float) and 0 < self.valid < 1):
            raise ValueError(f'valid must be a fraction in (0, 1) or "test", got {self.valid!r}')
        if type(self.split_seed) is not int or not 0 <= self.split_seed < 2**32:
            raise ValueError(f"split_seed must be an integer in [0, 2**32), got {self.split_seed!r}")


def stratified_cut(labels: torch.Tensor, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of what stays and of what is cut off, both ascending.

    Each class gives its share, rounded; one of two or more images is always cut, and one always stays.

    Args:
        labels: int64 `(N,)`.
        share: fraction to cut, in (0, 1).
        seed: in [0, 2**32).
    """
    random = np.random.RandomState(seed)  # its stream is frozen for ever; default_rng's may change with numpy
    cut = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten()
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        cut[members[torch.from_numpy(random.permutation(len(members)))[:count]]] = True
    return torch.nonzero(~cut).flatten(), torch.nonzero(cut).flatten()


def spread(labels: torch.Tensor, images: int) -> torch.Tensor:
    """Indices, ascending, of at most `images` images: one of each class, then the classes in proportion (seed 0).

    Args:
        labels: int64 `(N,)`.
        images: at least 1.
    """
    random = np.random.RandomState(0)
    rank = np.empty((2, len(labels)))  # of an image within its class: is it the first, and at which share does it come
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten().numpy()
        place = random.permutation(len(members))
        rank[:, members] = place > 0, (place + 0.5) / len(members)
    order = np.lexsort((random.permutation(len(labels)), rank[1], rank[0]))
    return torch.from_numpy(np.sort(order[:images]))
