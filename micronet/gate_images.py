"""Real images that a file is compared on with the network that it was made from."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from micronet.data import Data
from micronet.data.splits import spread
from micronet.errors import MicronetError


def scaled(pixels: Tensor) -> Tensor:
    """Images of uint8 as float32 in [0, 1], four times their bytes."""
    return pixels.contiguous().float() / 255


def normalised(scaled: Tensor, how: "RealImages | Data") -> Tensor:
    """Images from 0 to 1 as a network takes them.

    Args:
        scaled: **shape** `(N, C, H, W)`, in [0, 1].
        how: has the mean and deviation of each channel.
    """
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (how.mean, how.std))
    return (scaled - mean) / std


@dataclass(frozen=True, eq=False)
class Floats:
    """Images as a network takes them, made of bytes when a slice is asked for: in float32 all take four times as much.

    Args:
        pixels: **shape** `(N, C, H, W)`, uint8.
        how: has the mean and deviation of each channel.
    """

    pixels: Tensor
    how: "RealImages | Data"

    def __len__(self) -> int:
        """How many there are."""
        return len(self.pixels)

    def __getitem__(self, part: slice) -> np.ndarray:
        """Some of them, `(N, C, H, W)`, float32."""
        return normalised(scaled(self.pixels[part]), self.how).numpy()

    def batches(self, labels: Tensor, size: int = 64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All of them with their labels, some at a time.

        Args:
            labels: `(N,)`.
            size: how many at a time.
        """
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield self[part], labels[part].numpy()


@dataclass(frozen=True, eq=False, kw_only=True)
class RealImages:
    """Images that a file is compared on with its source.

    Args:
        pixels: **shape** `(N, C, H, W)`, uint8.
        labels: int64 `(N,)`.
        mean: what to subtract from each channel of an image scaled to [0, 1].
        std: what to divide each channel by after that.
        told: what they are, in words.
    """

    pixels: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    told: str

    def scaled(self, pixels: Tensor | None = None) -> Tensor:
        """Images as float32 in [0, 1].

        Args:
            pixels: some of them, uint8; None for all, which is four times their bytes.
        """
        return scaled(self.pixels if pixels is None else pixels)

    def normalise(self, images: Tensor) -> Tensor:
        """Scaled images as the network takes them."""
        return normalised(images, self)


def real_images(data: Data, number: int) -> RealImages:
    """Images of the validation split, then of the training split, of all classes; the test images are not looked at.

    Args:
        data: the image sets, normalised as the network is to see them.
        number: how many, at least 1; fewer where there are no more.
    """
    # A recipe can have taken the test images for validation.
    parts = {"training": data.train} if data.valid_is_test else {"validation": data.valid, "training": data.train}
    pixels, labels, told = [], [], []
    for name, part in parts.items():
        share = min(number - sum(map(len, labels)), len(part))
        if share:
            chosen = part.subset(spread(part.labels, share))
            pixels.append(chosen.images)
            labels.append(chosen.labels)
            told.append(f"{share:,} {name} images")
    return RealImages(
        pixels=torch.cat(pixels),
        labels=torch.cat(labels),
        mean=data.mean,
        std=data.std,
        told=f"{' and '.join(told)} of {data.name}",
    )


def validation(data: Data) -> RealImages:
    """All validation images.

    Args:
        data: the image sets.

    Raises:
        MicronetError: they are the test images.
    """
    if data.valid_is_test:
        raise MicronetError(
            f"{data.name}: its validation images are the test images, which choose nothing; cut validation images from "
            "the training images in the recipe"
        )
    told = f"{len(data.valid):,} validation images of {data.name}"
    return RealImages(pixels=data.valid.images, labels=data.valid.labels, mean=data.mean, std=data.std, told=told)
