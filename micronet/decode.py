"""One image file made RGB pixels, whether it is grey, palette, 16-bit or transparent; needs no torch."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from micronet.errors import MicronetError, first_line

# What image folders hold. Pillow would have another program draw PostScript, whatever the file's name.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MOST_SIDE = 4096  # pixels of the images that a network takes; a file can say any number, and memory is taken for it


@dataclass(frozen=True, slots=True)
class Entry:
    """One image that waits to be decoded.

    Args:
        split: "train", "valid" or "test".
        label: name of its class.
        name: where it is, for messages and for the order within a class.
        data: the file's bytes, or the path to read them from.
    """

    split: str
    label: str
    name: str
    data: bytes | Path


def to_rgb(image: Image.Image) -> Image.Image:
    """Grey, palette, 16-bit or transparent to RGB; what shows through is white.

    Args:
        image: as Pillow opened it.

    Raises:
        ValueError: the pixels have no known full scale (32-bit integers, floats).
    """
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255 instead of scaling
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65_535:
            raise ValueError("32-bit pixels have no known full scale")
        return Image.fromarray((pixels // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("float pixels have no known full scale")
    if image.has_transparency_data:
        front = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", front.size, "white"), front).convert("RGB")
    return image.convert("RGB")


def decode(entry: Entry, size: int, exact: bool) -> np.ndarray:
    """The pixels of one image, uint8 `(size, size, 3)`.

    Args:
        entry: the image.
        size: side in pixels; the short side is scaled to it and the long one cropped at its centre.
        exact: refuse any other size instead.

    Raises:
        MicronetError: the file is no image that can be read.
    """
    try:
        source = BytesIO(entry.data) if isinstance(entry.data, bytes) else entry.data
        with Image.open(source, formats=FORMATS) as image:
            if image.size != (size, size):
                if exact:
                    raise ValueError(f"it is {image.size[0]}x{image.size[1]} pixels, not {size}x{size}")
                image = ImageOps.fit(to_rgb(ImageOps.exif_transpose(image)), (size, size), Image.Resampling.BILINEAR)
            else:
                image = to_rgb(ImageOps.exif_transpose(image))
            return np.asarray(image)
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise MicronetError(
            f"{entry.name} cannot be read as an image ({first_line(error)}): mend or remove it"
        ) from error
