"""fastai DataLoaders whose batches are cut, augmented and normalised as whole tensors on the training device."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from torch import Tensor

from micronet.data.augment import Augment, augment_batch, cutout, gather
from micronet.data.splits import Data, ImageSet


class BatchLoader(DataLoader):
    """Batches `(images, labels)`: float32 (B, 3, H, W) in channels_last memory, normalised, and int64 (B,).

    The order and the augmentation of a shuffled pass depend on `seed` and `epoch` alone, and each such pass moves
    `epoch` on by one: a resumed training sets `epoch` and sees the batches that it would have seen.

    Args:
        dataset: the images.
        bs: images a batch.
        mean: mean of each channel, fractions of full scale.
        std: standard deviation of each channel, fractions of full scale.
        augment: what to draw for each image, or None.
        classes: class names in label order, for `show_batch`.
        device: where batches are made.
        shuffle: whether every pass has an order of its own.
        drop_last: whether an incomplete last batch is left out.
        seed: seed of order and augmentation.
        epoch: number of the next shuffled pass.
        **kwargs: fastai's own, such as `get_idxs`.
    """

    def __init__(
        self,
        dataset: ImageSet,
        bs: int,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augment: Augment | None = None,
        classes: tuple[str, ...] = (),
        device: Any = "cpu",
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        epoch: int = 0,
        **kwargs: Any,
    ) -> None:
        fixed = {"indexed": True, "num_workers": 0, "n": len(dataset)}
        if augment and augment.pad == "reflect" and augment.crop >= min(dataset.images.shape[2:]):
            raise ValueError(f"crop must be smaller than the image for reflection, got {augment.crop}")
        super().__init__(dataset, bs, shuffle=shuffle, drop_last=drop_last, device=device, **(kwargs | fixed))
        self.mean, self.std, self.augment, self.classes = mean, std, augment, classes
        self.seed, self.epoch = seed, epoch
        self._store: Tensor | None = None
        self._stored_for: Any = None

    def get_idxs(self) -> list[int]:
        """Indices of the next pass, in its order."""
        if not self.shuffle:
            return list(range(self.n))
        return torch.randperm(self.n, generator=self._generator("cpu", stream=0)).tolist()

    def _generator(self, device: Any, stream: int) -> torch.Generator:
        # Order (stream 0) and augmentation (stream 1) draw apart. torch's CPU generator keeps 32 bits of a seed:
        # Knuth's factor (odd, 2^32 / phi) spreads the seeds over all of them, so that no two below 2^32 begin alike.
        spread = self.seed * 0x9E3779B1 + 2 * self.epoch + stream
        return torch.Generator(device).manual_seed(spread % 2**32)

    def _pixels(self) -> Tensor:
        """The whole set on the device, uint8 (N, H + 2 crop, W + 2 crop, 3): padded and moved once."""
        # Compared as it was asked for: a tensor sent to "cuda" says that it is on "cuda:0".
        if self._store is None or self._stored_for != self.device:
            pixels = self.dataset.images.permute(0, 2, 3, 1)
            crop = self.augment.crop if self.augment else 0
            if crop and self.augment.pad == "reflect":
                rows = _reflected(pixels.shape[1], crop)
                pixels = pixels[:, rows][:, :, _reflected(pixels.shape[2], crop)]
            elif crop:
                pixels = F.pad(pixels, (0, 0, crop, crop, crop, crop))
            self._store, self._stored_for = pixels.to(self.device).contiguous(), self.device
        return self._store

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        indices = torch.as_tensor(self.get_idxs(), dtype=torch.int64)
        generator = self._generator(self.device, stream=1)
        if self.shuffle:
            self.epoch += 1
        labels = self.dataset.labels[indices].to(self.device)
        indices = indices.to(self.device)
        stop = len(indices) - len(indices) % self.bs if self.drop_last else len(indices)
        for start in range(0, stop, self.bs):
            end = min(start + self.bs, stop)
            yield self._images(indices[start:end], generator), labels[start:end]

    def _images(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        pixels = self._pixels()
        if self.augment:
            images = augment_batch(pixels, indices, self.augment, generator)
        else:
            corner = torch.zeros_like(indices)
            images = gather(pixels, indices, corner, corner, corner.bool(), tuple(pixels.shape[1:3]))
        mean, std = (torch.tensor(values, device=pixels.device) for values in (self.mean, self.std))
        batch, height, width, _ = images.shape
        # Rows of W * 3 numbers instead of pixels of 3: the same sums, vectorised.
        scale, shift = (1 / (255 * std)).repeat(width), (-mean / std).repeat(width)
        images = torch.addcmul(shift, images.reshape(batch, height, width * 3), scale).view(batch, height, width, 3)
        if self.augment and self.augment.cutout:
            images = cutout(images, self.augment.cutout, generator)
        return images.permute(0, 3, 1, 2)

    def new(self, dataset: ImageSet | None = None, cls: type | None = None, **kwargs: Any) -> "BatchLoader":
        """A loader like this one without augmentation, as fastai asks for to predict."""
        own = {"mean": self.mean, "std": self.std, "classes": self.classes, "seed": self.seed, "augment": None}
        return super().new(dataset, cls, **(own | kwargs))

    def show_batch(self, b: Any = None, max_n: int = 9, show: bool = True, **kwargs: Any) -> Any:
        """Draw images of a batch as the network sees them, under their class names.

        Args:
            b: a batch `(images, labels)`; the next one where None.
            max_n: most images to draw.
            show: whether to open the figure (`matplotlib.pyplot.show`); else it is only returned.
            **kwargs: passed to `matplotlib.pyplot.subplots`.

        Returns:
            The matplotlib figure.
        """
        import matplotlib.pyplot as plt

        images, labels = self.one_batch() if b is None else b
        count = min(max_n, len(images))
        columns = max(1, round(count**0.5))
        rows = -(-count // columns)
        figure, axes = plt.subplots(rows, columns, squeeze=False, **({"figsize": (1.6 * columns, 1.8 * rows)} | kwargs))
        std, mean = (torch.tensor(values).view(3, 1, 1) for values in (self.std, self.mean))
        for ax in axes.flat:
            ax.axis("off")
        for ax, image, label in zip(axes.flat, images[:count].cpu(), labels[:count].tolist(), strict=False):
            ax.imshow((image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.set_title(self.classes[label] if self.classes else str(label), fontsize=8)
        figure.tight_layout()
        if show:
            plt.show()
        return figure


def _reflected(size: int, pad: int) -> Tensor:
    """Positions 0 to size + 2 pad - 1 of a padded line, as positions of the line: ... 2 1 | 0 1 2 ..."""
    place = torch.arange(-pad, size + pad).abs()
    return torch.where(place >= size, 2 * (size - 1) - place, place)


def loaders(data: Data, *, device: Any = "cpu", seed: int = 0) -> DataLoaders:
    """Make fastai DataLoaders of a data set: training batches shuffled and augmented, validation batches neither.

    Args:
        data: the image sets, their statistics, batch size and augmentation.
        device: where batches are made.
        seed: seed of order and augmentation.

    Returns:
        DataLoaders `(train, valid)`. An incomplete last training batch is left out where there is another one.

    Raises:
        ValueError: the crop is as large as the image.
    """
    train = BatchLoader(
        data.train,
        data.batch_size,
        mean=data.mean,
        std=data.std,
        augment=data.augment,
        classes=data.classes,
        device=device,
        shuffle=True,
        drop_last=len(data.train) > data.batch_size,
        seed=seed,
    )
    dls = DataLoaders(train, plain_loader(data.valid, data, device=device), device=device)
    dls.valid_is_test = data.valid_is_test  # so that a callback can tell
    return dls


def plain_loader(images: ImageSet, data: Data, *, device: Any = "cpu") -> BatchLoader:
    """Make a loader of one split to measure on: in order, whole, not augmented.

    Args:
        images: the split.
        data: the data set it belongs to, for its statistics and batch size.
        device: where batches are made.
    """
    # Without gradients a batch needs less memory: twice the size, as fastai does.
    return BatchLoader(images, 2 * data.batch_size, mean=data.mean, std=data.std, classes=data.classes, device=device)
