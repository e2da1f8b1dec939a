"""Finding a data set by what a user types, and how its images are usually augmented."""

from pathlib import Path
from typing import Any

from micronet.data.augment import Augment, wrn_augment
from micronet.data.sources import cifar10, cifar100, digits, image_folder
from micronet.data.splits import Data
from micronet.errors import MicronetError

KNOWN = {"digits": digits, "cifar10": cifar10, "cifar100": cifar100}


def by_name(name: str, size: int = 32, **cut: Any) -> Data:
    """Load one of the known data sets, or an image folder.

    Args:
        name: digits, cifar10, cifar100, or the path of a folder of images.
        size: height and width, pixels, for a folder's images.
        **cut: `valid` and `split_seed`, as the data sets' functions take them.

    Raises:
        MicronetError: neither a known name nor a folder.
    """
    check_name(name)
    return image_folder(name, size=size, **cut) if name not in KNOWN else KNOWN[name](**cut)


def check_name(name: str) -> None:
    """Refuse what `by_name` does not know.

    Args:
        name: as it takes it.

    Raises:
        MicronetError: neither a known name nor a folder.
    """
    if name not in KNOWN and not Path(name).is_dir():
        raise MicronetError(f"no data set {name!r}: give {', '.join(KNOWN)}, or the path of an image folder")


def usual_augment(name: str) -> Augment | None:
    """How the images of a data set are usually augmented; None where that is not known.

    Photographs of things stay what they are when mirrored; digits, letters and whatever a folder holds may not.

    Args:
        name: as `by_name` takes it.
    """
    return wrn_augment() if name in ("cifar10", "cifar100") else None
