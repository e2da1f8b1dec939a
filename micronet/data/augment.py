"""Augmentation of whole batches, as tensor code, on the device that holds them.

Every image gets its own draw. All geometry of an image (shift, flip, zoom, rotation, tilt) is one 3 x 3 projective
matrix and one resampling; where only shift and flip are asked, pixels are copied exactly, never interpolated.
"""

from dataclasses import dataclass
from math import log, radians
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """What is drawn at random for each training image; the default draws nothing.

    Args:
        crop: largest shift in pixels, each way, as padding by `crop` and cropping back does; 0 for none.
        pad: what stands beyond the border: `"reflect"` (the border pixel itself is not repeated) or `"zeros"` (black).
        flip: probability of a horizontal flip, in [0, 1].
        zoom: largest magnification about the centre, at least 1; drawn log-uniformly in [1, zoom].
        rotate: largest rotation, degrees each way, in [0, 180].
        warp: largest symmetric warp (a tilt about each axis), in [0, 0.5): one edge grows by that share, the other
            shrinks.
        brightness: largest shift of brightness, in [0, 1], as a fraction of full scale.
        contrast: largest change of contrast, in [0, 1): a factor drawn log-uniformly in [1 - contrast, 1 / (1 -
            contrast)].
        share: share of the images that get each of zoom, rotation, warp, brightness and contrast, in [0, 1].
        cutout: side in pixels of a square set to the mean colour, its centre anywhere in the image; 0 for none.

    Raises:
        ValueError: an argument is out of its range.

    Source: ranges and `share` of fastai's `get_transforms` (rotation 10 degrees, zoom 1.1, warp 0.2, lighting 0.2,
    p_affine = p_lighting = 0.75). fastai changes lighting in logit space; this is its tangent at mid-grey, clipped to
    the range of a pixel, so its lighting 0.2 is brightness 0.1 and contrast 0.2 here. Cutout: DeVries and Taylor 2017.
    """

    crop: int = 0
    pad: Literal["reflect", "zeros"] = "reflect"
    flip: float = 0.0
    zoom: float = 1.0
    rotate: float = 0.0
    warp: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    share: float = 0.75
    cutout: int = 0

    def __post_init__(self) -> None:
        if self.pad not in ("reflect", "zeros"):
            raise ValueError(f'pad must be "reflect" or "zeros", got {self.pad!r}')
        limits = {
            "crop": (0, 1_000),
            "flip": (0, 1),
            "zoom": (1, 10),
            "rotate": (0, 180),
            "warp": (0, 0.49),  # from 0.5 on, two tilts together fold the image over
            "brightness": (0, 1),
            "contrast": (0, 0.99),
            "share": (0, 1),
            "cutout": (0, 10_000),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise ValueError(f"{name} must be a number in [{low}, {high}], got {value!r}")
        for name in ("crop", "cutout"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} must be a whole number of pixels, got {getattr(self, name)!r}")

    @property
    def resamples(self) -> bool:
        """Whether images must be interpolated, and not only shifted and flipped."""
        return self.zoom > 1 or self.rotate > 0 or self.warp > 0


def wrn_augment() -> Augment:
    """Give the fastai WRN-22-6 entry's: crop with reflection, flip, warp, rotation, zoom, brightness and contrast."""
    return Augment(crop=4, flip=0.5, zoom=1.1, rotate=10.0, warp=0.2, brightness=0.1, contrast=0.2)


def gather(
    padded: Tensor, indices: Tensor, top: Tensor, left: Tensor, flipped: Tensor, size: tuple[int, int]
) -> Tensor:
    """Cut a window out of each chosen image, mirrored where asked.

    Args:
        padded: all images, uint8 (N, H + 2 pad, W + 2 pad, 3), contiguous.
        indices: which images, int64 (B,).
        top: first row of each window, int64 (B,).
        left: first column of each window, int64 (B,).
        flipped: whether each window is mirrored, bool (B,).
        size: height and width of the windows.

    Returns:
        float32 (B, H, W, 3), values 0 to 255.
    """
    _, padded_height, padded_width, channels = padded.shape
    height, width = size
    columns = torch.arange(width, device=padded.device)
    column = left[:, None] + torch.where(flipped[:, None], width - 1 - columns, columns)
    row = indices[:, None] * padded_height + top[:, None] + torch.arange(height, device=padded.device)
    # One pixel is one row of a two-column table, so that a single index_select moves the whole batch.
    pixel = row[:, :, None] * padded_width + column[:, None, :]
    return padded.view(-1, channels).index_select(0, pixel.view(-1)).view(-1, height, width, channels).float()


def homographies(augment: Augment, count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw one matrix an image, from output to input coordinates (x, y, 1), where -1 and 1 are the outermost pixels.

    Args:
        augment: what to draw.
        count: number of images B.
        size: height and width of the images, pixels.
        generator: source of the draws; the matrices are made on its device.

    Returns:
        float32 (B, 3, 3).
    """
    height, width = size
    device = generator.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, device=device, generator=generator) * (high - low) + low

    def some(value: Tensor, neutral: float) -> Tensor:
        return torch.where(uniform(0, 1) < augment.share, value, neutral)

    one, zero = torch.ones(count, device=device), torch.zeros(count, device=device)

    def matrix(*entries: Tensor) -> Tensor:
        return torch.stack(entries, 1).view(count, 3, 3)

    shift_x, shift_y = _shifts(augment, count, generator)
    mirror = torch.where(uniform(0, 1) < augment.flip, -1.0, 1.0)
    shrink = some(torch.exp(-uniform(0, log(augment.zoom))), 1.0)
    angle = some(uniform(-1, 1) * radians(augment.rotate), 0.0)
    tilt_x, tilt_y = some(uniform(-1, 1) * augment.warp, 0.0), some(uniform(-1, 1) * augment.warp, 0.0)
    # A shift by one pixel is 2 / (width - 1) of the distance from centre to border.
    move = matrix(one, zero, 2 * shift_x / (width - 1), zero, one, 2 * shift_y / (height - 1), zero, zero, one)
    sine, cosine, aspect = torch.sin(angle), torch.cos(angle), (height - 1) / (width - 1)
    scale = matrix(mirror * shrink, zero, zero, zero, shrink, zero, zero, zero, one)
    turn = matrix(cosine, -sine * aspect, zero, sine / aspect, cosine, zero, zero, zero, one)
    # x -> (x + m) / (1 + m x) leaves the borders x = -1 and 1 where they are; y -> y (1 - m^2) / (1 + m x) makes the
    # left border 1 + m and the right one 1 - m times as long.
    lean_x = matrix(one, zero, tilt_x, zero, 1 - tilt_x**2, zero, tilt_x, zero, one)
    lean_y = matrix(1 - tilt_y**2, zero, zero, zero, one, tilt_y, zero, tilt_y, one)
    return move @ scale @ turn @ lean_x @ lean_y


def resample(images: Tensor, matrices: Tensor, pad: str) -> Tensor:
    """Draw each image anew where its matrix says, with bilinear interpolation.

    Args:
        images: float32 (B, H, W, 3).
        matrices: output to input coordinates, float32 (B, 3, 3), as `homographies` gives them.
        pad: `"reflect"` or `"zeros"`, for what lies beyond the border.

    Returns:
        float32 (B, H, W, 3).
    """
    _, height, width, _ = images.shape
    xs = torch.linspace(-1, 1, width, device=images.device)
    ys = torch.linspace(-1, 1, height, device=images.device)
    corners = torch.stack(
        [xs.expand(height, width), ys[:, None].expand(height, width), torch.ones_like(xs.expand(height, width))], -1
    )
    moved = corners.view(1, -1, 3) @ matrices.transpose(1, 2)
    grid = (moved[..., :2] / moved[..., 2:]).view(-1, height, width, 2)
    mode = "reflection" if pad == "reflect" else "zeros"
    # align_corners: reflection about the centre of the border pixel, which is what padding by reflection does.
    sampled = F.grid_sample(images.permute(0, 3, 1, 2), grid, mode="bilinear", padding_mode=mode, align_corners=True)
    return sampled.permute(0, 2, 3, 1)


def lighting(images: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    """Change brightness and contrast of each image, in place where possible, clipped to [0, 255].

    Args:
        images: float32 (B, H, W, 3), values 0 to 255.
        augment: the ranges.
        generator: source of the draws, on the images' device.

    Returns:
        float32 (B, H, W, 3).
    """
    count = len(images)

    def draw(low: float, high: float, neutral: float) -> Tensor:
        value = torch.rand(count, device=images.device, generator=generator) * (high - low) + low
        chosen = torch.rand(count, device=images.device, generator=generator) < augment.share
        return torch.where(chosen, value, neutral).view(-1, 1, 1, 1)

    contrast = draw(log(1 - augment.contrast), -log(1 - augment.contrast), 0.0).exp()
    brightness = draw(-255 * augment.brightness, 255 * augment.brightness, 0.0)
    return images.mul_(contrast).add_(127.5 * (1 - contrast) + brightness).clamp_(0, 255)


def cutout(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Set one square of each image to zero (the mean colour, once images are normalised); it may hang over the border.

    Args:
        images: normalised, float32 (B, H, W, 3).
        side: side of the square, pixels.
        generator: source of the draws, on the images' device.

    Returns:
        float32 (B, H, W, 3).
    """
    count, height, width, _ = images.shape

    def outside(extent: int) -> Tensor:
        first = torch.randint(0, extent, (count, 1), device=images.device, generator=generator) - side // 2
        place = torch.arange(extent, device=images.device)
        return (place < first) | (place >= first + side)

    keep = outside(height)[:, :, None] | outside(width)[:, None, :]
    return images * keep[..., None]


def _shifts(augment: Augment, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw whole-pixel shifts, int64 (B,) each, in [-crop, crop]: right and down are positive."""
    low, high = -augment.crop, augment.crop + 1
    draw = torch.randint(low, high, (2, count), device=generator.device, generator=generator)
    return draw[0], draw[1]


def augment_batch(padded: Tensor, indices: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    """Take images out of the whole set and augment them, cutout apart.

    Args:
        padded: the whole set, uint8 (N, H + 2 crop, W + 2 crop, 3), contiguous, padded by `augment.crop` on each side.
        indices: which images, int64 (B,), on the same device.
        augment: what to draw.
        generator: source of the draws, on the same device.

    Returns:
        float32 (B, H, W, 3), values 0 to 255.
    """
    count, crop = len(indices), augment.crop
    size = (padded.shape[1] - 2 * crop, padded.shape[2] - 2 * crop)
    if augment.resamples:
        middle = torch.full_like(indices, crop)
        images = gather(padded, indices, middle, middle, torch.zeros_like(indices, dtype=torch.bool), size)
        images = resample(images, homographies(augment, count, size, generator), augment.pad)
    else:
        left, top = _shifts(augment, count, generator)
        flipped = torch.rand(count, device=padded.device, generator=generator) < augment.flip
        images = gather(padded, indices, top + crop, left + crop, flipped, size)
    if augment.brightness or augment.contrast:
        images = lighting(images, augment, generator)
    return images
