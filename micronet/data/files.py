"""Image files found and listed, not yet decoded: any tree of them, and CIFAR as a folder or an archive.

What is not of the expected form, or less than the whole, is refused here, so that it never counts as data.
"""

import hashlib
import os
import sys
import tarfile
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from micronet.data.splits import TEST_SHARE, stratified_cut
from micronet.data.store import progress
from micronet.decode import Entry
from micronet.errors import MicronetError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
CIFAR = {"cifar10": (10, "CIFAR"), "cifar100": (100, "CIFAR_100")}  # classes, name in fastai's URLs
CIFAR_IMAGES = {"train": 50_000, "test": 10_000}  # equally many in each class. Source: Krizhevsky 2009
MEMBER_BYTES = 1 << 20  # a 32x32 image takes 3 KB even without compression; no more than this is read into memory


def scan(folder: Path, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], os.stat_result]]:
    """Yield each image file's path, as parts below the root, with its size and time of change.

    Args:
        folder: the root of the tree, or a folder below it.
        above: the folder's own path below the root, as parts.

    Raises:
        MicronetError: the tree is not of a form that is understood.
        OSError: a folder cannot be read.
    """
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
        yield from scan(Path(entry.path), (*above, entry.name))


def tree_entries(root: Path, files: list[tuple[str, ...]]) -> list[Entry]:
    """Give each file its split and its class.

    Args:
        root: the tree.
        files: their paths below it, as parts.

    Raises:
        MicronetError: the folders make no train, valid and test of the same two or more classes.
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
    """Refuse one class, a class in two places and classes that a split lacks."""
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


def find_cifar(name: str) -> tuple[list[Entry], dict]:
    """List the images of CIFAR and describe where they come from; never less than the whole.

    Args:
        name: "cifar10" or "cifar100".

    Raises:
        MicronetError: the images are not where they should be, or are not all there.
    """
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
    from fastai.data.external import fastai_cfg, fastai_path

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # in a new home it writes config.ini and leaves it open
        fastai_cfg()
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
    """Refuse anything less than all of CIFAR; describe the source."""
    if missing := _shortfall(name, entries):
        raise MicronetError(f"{where} is not the whole of {name}: {missing}; unpack or get it again")
    source: dict[str, Any] = {"path": str(where)}
    if where.is_file():
        with open(where, "rb") as file:
            source |= {"bytes": where.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return entries, source
