"""The data sets that recipes name: digits, cifar10, cifar100 and any tree of image files.

Their files are decoded once (`store.py`) and mapped from then on.
"""

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch

from micronet.data.files import CIFAR, CIFAR_IMAGES, find_cifar, scan, tree_entries
from micronet.data.splits import TEST_SHARE, Data, ImageSet, Options, stratified_cut
from micronet.data.store import Stored, ensure, moments
from micronet.errors import MicronetError


def _data(name: str, parts: dict[str, ImageSet], classes, mean, std, options: Options) -> Data:
    """Cut valid from train where the source has none, or take test for it where asked to."""
    train, valid, test = (parts.get(split) for split in ("train", "valid", "test"))
    if options.valid == "test":
        if test is None:
            raise MicronetError(f'{name} has no test images to validate on: give valid as a fraction instead of "test"')
        valid = test
    elif valid is None:
        rest, cut = stratified_cut(train.labels, options.valid, options.split_seed)
        train, valid = train.subset(rest), train.subset(cut)
    carried = {"batch_size": options.batch_size, "augment": options.augment, "valid_is_test": options.valid == "test"}
    return Data(name, train, valid, test, tuple(classes), tuple(mean), tuple(std), **carried)


def _from_cache(name: str, stored: Stored, options: Options) -> Data:
    parts, start = {}, 0
    for split, count in stored.splits.items():
        if count:
            parts[split] = ImageSet(stored.images[start : start + count], stored.labels[start : start + count])
        start += count
    return _data(name, parts, stored.classes, stored.mean, stored.std, options)


def digits(
    *, batch_size: int = 128, augment: Any = None, valid: float | Literal["test"] = 0.1, split_seed: int = 0
) -> Data:
    """1,797 real handwritten digits, 8x8 grey made 32x32 with three channels; a fifth of each class is the test split.

    Args:
        batch_size: images in a training batch, at least 1.
        augment: what the loader does to a training batch, or None.
        valid: share of the training images cut off for valid, in (0, 1), or "test": validate on the test images.
        split_seed: chooses the images of valid, in [0, 2**32).

    Source: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits (UCI), in scikit-learn.
    """
    options = Options(batch_size, augment, valid, split_seed)
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)  # its levels are 0..16
    large = torch.nn.functional.interpolate(grey, size=(32, 32), mode="bilinear").round().to(torch.uint8)
    pixels = large.permute(0, 2, 3, 1).repeat(1, 1, 1, 3)
    whole = ImageSet(pixels.permute(0, 3, 1, 2), torch.from_numpy(bunch.target).long())
    train, test = (whole.subset(part) for part in stratified_cut(whole.labels, TEST_SHARE, 0))
    mean, std = moments(train.images.permute(0, 2, 3, 1).numpy())
    return _data("digits", {"train": train, "test": test}, map(str, range(10)), mean, std, options)


def cifar10(
    *, batch_size: int = 128, augment: Any = None, valid: float | Literal["test"] = 0.1, split_seed: int = 0
) -> Data:
    """60,000 photographs of 32x32 in 10 classes; 10,000 are the test split.

    They come from the cache, else from the folder `MICRONET_DATA`, else through fastai's `untar_data`.

    Args:
        batch_size: images in a training batch, at least 1.
        augment: what the loader does to a training batch, or None.
        valid: share of the training images cut off for valid, in (0, 1), or "test": validate on the test images.
        split_seed: chooses the images of valid, in [0, 2**32).

    Raises:
        MicronetError: the images are not where they should be, or are not all there.

    Source: Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images.
    """
    options = Options(batch_size, augment, valid, split_seed)
    return _from_cache("cifar10", _cifar("cifar10"), options)


def cifar100(
    *, batch_size: int = 128, augment: Any = None, valid: float | Literal["test"] = 0.1, split_seed: int = 0
) -> Data:
    """60,000 photographs of 32x32 in 100 (fine) classes; 10,000 are the test split. The rest as for `cifar10`.

    Args:
        batch_size: images in a training batch, at least 1.
        augment: what the loader does to a training batch, or None.
        valid: share of the training images cut off for valid, in (0, 1), or "test": validate on the test images.
        split_seed: chooses the images of valid, in [0, 2**32).

    Raises:
        MicronetError: the images are not where they should be, or are not all there.

    Source: Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images.
    """
    options = Options(batch_size, augment, valid, split_seed)
    return _from_cache("cifar100", _cifar("cifar100"), options)


def image_folder(
    path: str | Path,
    *,
    size: int = 32,
    batch_size: int = 128,
    augment: Any = None,
    valid: float | Literal["test"] = 0.1,
    split_seed: int = 0,
) -> Data:
    """Any tree of image files, `split/class/file` or `class/file`; the folder that holds the files names the class.

    Splits are called train, valid (or val) and test and are taken as they are: without a valid folder, valid is cut
    from train; without a test folder there is no test split. From a `class/file` tree a fifth of each class is cut as
    test first, always the same. Grey, palette and 16-bit files become RGB, transparent ones lie on white; other files
    and hidden ones are passed over.

    Args:
        path: the tree.
        size: side of the decoded images, in pixels; the short side is scaled to it, the long one cropped at its centre.
        batch_size: images in a training batch, at least 1.
        augment: what the loader does to a training batch, or None.
        valid: share of the training images cut off for valid where there is no such folder, in (0, 1), or "test":
            validate on the test images.
        split_seed: chooses the images of valid, in [0, 2**32).

    Raises:
        MicronetError: the tree is not of that form, or a file is no image that can be read.
    """
    options = Options(batch_size, augment, valid, split_seed)
    if type(size) is not int or size < 1:
        raise ValueError(f"size must be an integer of at least 1, got {size!r}")
    root = Path(path).expanduser().resolve()
    if not root.is_dir():
        raise MicronetError(f"{root} is not a folder: give the folder that holds the class folders or train/ and test/")
    try:
        found = list(scan(root))
    except OSError as error:
        raise MicronetError(f"{error.filename} cannot be read ({error.strerror}): mend its permissions") from error
    entries = tree_entries(root, [parts for parts, _ in found])
    state = repr((size, [(parts, stat.st_size, stat.st_mtime_ns) for parts, stat in found]))
    fingerprint = hashlib.sha256(state.encode()).hexdigest()
    key = hashlib.sha256(f"{root}\n{size}".encode()).hexdigest()[:12]
    stored = ensure(f"{root.name}-{key}", fingerprint, lambda: (entries, {"path": str(root)}), size=size)
    return _from_cache(root.name, stored, options)


def fetch(name: str) -> Path:
    """Make sure that a data set is on this machine, decoded; return the folder that holds it.

    Args:
        name: "digits", "cifar10" or "cifar100".

    Raises:
        MicronetError: there is no such data set, or it cannot be had.
    """
    if name in CIFAR:
        return _cifar(name).folder
    if name != "digits":
        raise MicronetError(f"there is no data set {name!r} to fetch: choose one of digits, {', '.join(CIFAR)}")
    import sklearn.datasets

    return Path(sklearn.datasets.__file__).parent / "data"


def _cifar(name: str) -> Stored:
    counts = f"{CIFAR_IMAGES} in {CIFAR[name][0]} classes"
    return ensure(name, f"{name}: {counts}", lambda: find_cifar(name), size=32, exact=True)
