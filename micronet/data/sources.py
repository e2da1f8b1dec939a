"""The data sets that recipes name: digits, cifar10, cifar100 and any tree of image files.

Train, valid and test are three splits. Valid is cut from the training images, stratified and by a fixed seed; it
chooses the checkpoint and anything else. Test is measured once. Files are decoded once (`store.py`) and mapped after.
"""

import hashlib
import os
import sys
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch

from micronet.data.store import Entry, Stored, ensure, moments, progress
from micronet.errors import MicronetError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TEST_SHARE = 0.2  # cut from a source that has no test split of its own, always with seed 0
CIFAR = {"cifar10": (10, "CIFAR"), "cifar100": (100, "CIFAR_100")}  # classes, name in fastai's URLs
CIFAR_IMAGES = {"train": 50_000, "test": 10_000}  # equally many in each class. Source: Krizhevsky 2009
MEMBER_BYTES = 1 << 20  # a 32x32 image takes 3 KB even without compression; no more than this is read into memory


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
        """Refuses tensors that are not as described."""
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
        """Checks the values."""
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


def _data(name: str, parts: dict[str, ImageSet], classes, mean, std, options: Options) -> Data:
    """Cuts valid from train where the source has none, or takes test for it where asked to."""
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
        found = list(_scan(root))
    except OSError as error:
        raise MicronetError(f"{error.filename} cannot be read ({error.strerror}): mend its permissions") from error
    entries = _tree_entries(root, [parts for parts, _ in found])
    state = repr((size, [(parts, stat.st_size, stat.st_mtime_ns) for parts, stat in found]))
    fingerprint = hashlib.sha256(state.encode()).hexdigest()
    key = hashlib.sha256(f"{root}\n{size}".encode()).hexdigest()[:12]
    stored = ensure(f"{root.name}-{key}", fingerprint, lambda: (entries, {"path": str(root)}), size=size)
    return _from_cache(root.name, stored, options)


def fetch(name: str) -> Path:
    """Makes sure that a data set is on this machine, decoded; returns the folder that holds it.

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


def _scan(folder: Path, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], os.stat_result]]:
    """Yields each image file's path, as parts below the root, with its size and time of change."""
    where = f"{folder} holds"
    with os.scandir(folder) as listing:
        seen = sorted((e for e in listing if not e.name.startswith((".", "__MACOSX"))), key=lambda entry: entry.name)
    images = [e for e in seen if e.is_file() and e.name.lower().endswith(IMAGE_SUFFIXES)]
    folders = [e for e in seen if e.is_dir()]
    if images and not above:
        raise MicronetError(f"{where} images itself, such as {images[0].name}: put each in a folder named as its class")
    if images and folders:
        raise MicronetError(
            f"{where} both images and the folder {folders[0].name}: only a class folder may hold images"
        )
    if not images and not folders:
        raise MicronetError(f"{where} no image files ({' '.join(IMAGE_SUFFIXES)}): add some or remove it")
    if len(above) > 3:  # also what a link to a folder above leads to
        raise MicronetError(f"{folder} is nested too deep: at most split/super-class/class/file is understood")
    for entry in images:
        yield (*above, entry.name), entry.stat()
    for entry in folders:
        yield from _scan(Path(entry.path), (*above, entry.name))


def _tree_entries(root: Path, files: list[tuple[str, ...]]) -> list[Entry]:
    """Gives each file its split and its class.

    Args:
        root: the tree.
        files: their paths below it, as parts.
    """
    names = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}
    has_splits = any(parts[0] in names and len(parts) > 2 for parts in files)  # else "train" is a class, of trains
    if has_splits:
        tops = {parts[0] for parts in files}
        if "train" not in tops or {"valid", "val"} <= tops or tops - names.keys():
            raise MicronetError(
                f"{root} holds {', '.join(sorted(tops))}: needs train, beside it only valid (or val) and test"
            )
    splits = [names[parts[0]] if has_splits else "train" for parts in files]
    entries = [
        Entry(split, parts[-2], str(root.joinpath(*parts)), root.joinpath(*parts))
        for split, parts in zip(splits, files, strict=True)
    ]
    _check_classes(root, entries, has_splits)
    if has_splits:
        return entries
    index = {label: i for i, label in enumerate(sorted({entry.label for entry in entries}))}
    _, cut = stratified_cut(torch.tensor([index[entry.label] for entry in entries]), TEST_SHARE, 0)
    for i in cut.tolist():
        entries[i] = replace(entries[i], split="test")
    return entries


def _check_classes(root: Path, entries: list[Entry], has_splits: bool) -> None:
    """Refuses one class, a class in two places and classes that a split lacks."""
    folders: dict[str, dict[str, set[Path]]] = defaultdict(lambda: defaultdict(set))
    for entry in entries:
        folders[entry.split][entry.label].add(Path(entry.name).parent)
    for classes in folders.values():
        for label, places in classes.items():
            if len(places) > 1:
                first, second = sorted(map(str, places))[:2]
                raise MicronetError(
                    f"class {label} is in {first} and in {second}: give each class one folder in a split"
                )
    train = folders["train"].keys()
    if len(train) < 2:
        raise MicronetError(
            f"{root} has {len(train)} class ({', '.join(train)}): a classifier needs folders of at least 2"
        )
    for split, classes in folders.items():
        for label in sorted(classes.keys() ^ train):
            lacks = split if label in train else "train"
            raise MicronetError(
                f"{root}: class {label} has no images in {lacks}: give every split the same class folders"
            )
    if not has_splits and (few := [label for label in train if sum(e.label == label for e in entries) < 3]):
        raise MicronetError(f"{root}: class {few[0]} has fewer than 3 images: train, valid and test need one each")


def _cifar(name: str) -> Stored:
    counts = f"{CIFAR_IMAGES} in {CIFAR[name][0]} classes"
    return ensure(name, f"{name}: {counts}", lambda: _find_cifar(name), size=32, exact=True)


def _find_cifar(name: str) -> tuple[list[Entry], dict]:
    """Lists the images of CIFAR and describes where they come from; never less than the whole."""
    given = os.environ.get("MICRONET_DATA")
    if not given:
        return _through_fastai(name)
    root = Path(given).expanduser().resolve()
    itself = not (root / name).is_dir() and any((root / split).is_dir() for split in CIFAR_IMAGES)
    folder = root if itself else root / name
    archive = root if root.is_file() else root / f"{name}.tgz"
    if folder.is_dir():
        entries = _read_folder(folder)
        if _shortfall(name, entries) is None or not archive.is_file():
            return _whole(name, folder, entries)
    if archive.is_file():  # the folder beside it may be what an interrupted unpacking left
        return _whole(name, archive, _read_archive(archive))
    raise MicronetError(
        f"MICRONET_DATA={given} holds neither a folder {name} nor {name}.tgz: put one there, or unset it to download"
    )


def _through_fastai(name: str) -> tuple[list[Entry], dict]:
    """What fastai's cache holds; it takes any folder there for whole, even a half-extracted one, so that is checked."""
    from fastai.data.external import fastai_path

    folder = _untar(name, force=False)
    entries = _read_folder(folder)
    if _shortfall(name, entries) is None:
        return _whole(name, folder, entries)
    archive = fastai_path("archive") / f"{name}.tgz"
    if archive.is_file():
        try:
            return _whole(name, archive, _read_archive(archive))
        except MicronetError:  # cut off as well: download it again, once
            pass
    folder = _untar(name, force=True)
    return _whole(name, folder, _read_folder(folder))


def _untar(name: str, *, force: bool) -> Path:
    from fastai.data.external import URLs, untar_data

    try:
        with redirect_stdout(sys.stderr):  # its progress bar must not mix with a command's result
            return untar_data(getattr(URLs, CIFAR[name][1]), force_download=force)
    except Exception as error:  # OSError without a network, a bare Exception when the download is damaged
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise MicronetError(
            f"{name} cannot be downloaded ({reason}): try again, or set MICRONET_DATA (--data) to where {name}.tgz is"
        ) from error


def _place(path: PurePosixPath) -> tuple[str, str] | None:
    """Split and class of `[name/]split/[super-class/]class/file`; None for another file."""
    parts = path.parts
    if path.name.startswith(".") or not path.name.lower().endswith(IMAGE_SUFFIXES):
        return None
    for start in (0, 1):  # the first one counts: CIFAR-100 has a class of trains, called train
        if parts[start : start + 1] and parts[start] in CIFAR_IMAGES and len(parts) - start in (3, 4):
            return parts[start], parts[-2]
    return None


def _read_folder(folder: Path) -> list[Entry]:
    entries = []
    for path in folder.rglob("*"):
        if placed := _place(PurePosixPath(path.relative_to(folder).as_posix())):
            entries.append(Entry(*placed, str(path), path))
    return entries


def _read_archive(archive: Path) -> list[Entry]:
    """The images of a `.tgz`, straight from the stream; nothing is unpacked to the disk."""
    found: dict[str, Entry] = {}
    try:
        with (
            open(archive, "rb") as file,
            progress(f"reading {archive.name}", archive.stat().st_size) as advance,
            tarfile.open(fileobj=file, mode="r|gz") as members,
        ):
            for member in members:
                advance(file.tell())
                placed = _place(PurePosixPath(member.name)) if member.isfile() else None
                if placed is None:
                    continue
                if member.size > MEMBER_BYTES or len(found) > sum(CIFAR_IMAGES.values()):
                    raise MicronetError(f"{archive} holds more than 60,000 images, or one over 1 MB: get it again")
                found[member.name] = Entry(*placed, f"{archive}:{member.name}", members.extractfile(member).read())
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise MicronetError(f"{archive} is damaged or was cut off ({error}): get it again") from error
    return list(found.values())


def _shortfall(name: str, entries: list[Entry]) -> str | None:
    """What is missing of CIFAR, in words, or None."""
    classes = CIFAR[name][0]
    for split, images in CIFAR_IMAGES.items():
        counts = Counter(entry.label for entry in entries if entry.split == split)
        if counts.total() != images:
            return f"{counts.total():,} of {images:,} {split} images are there"
        if len(counts) != classes or set(counts.values()) != {images // classes}:
            return f"{len(counts)} classes in {split} instead of {classes} with {images // classes:,} images each"
    return None


def _whole(name: str, where: Path, entries: list[Entry]) -> tuple[list[Entry], dict]:
    """Refuses anything less than all of CIFAR; describes the source."""
    if missing := _shortfall(name, entries):
        raise MicronetError(f"{where} is not the whole of {name}: {missing}; unpack or get it again")
    source: dict[str, Any] = {"path": str(where)}
    if where.is_file():
        with open(where, "rb") as file:
            source |= {"bytes": where.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return entries, source
