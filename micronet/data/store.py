"""Image files decoded once into a cache of uint8 arrays, which are memory-mapped from then on.

A cache folder holds `images.npy` (uint8, `(N, H, W, 3)`: train, then valid, then test), `labels.npy` (int64, `(N,)`)
and `meta.json`. It is written beside its final place and renamed there, so a folder with that name is a whole one, and
it is checked again whenever it is opened: what is damaged is built anew.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from micronet.decode import Entry, decode
from micronet.errors import MicronetError

FORMAT = 1  # of a cache folder; another number makes every cache be built anew
SPLITS = ("train", "valid", "test")
THREADED_BYTES = 16_384  # mean file size from which threads pay: two made 32x32 images 1.4 times slower


@dataclass(frozen=True, eq=False)
class Stored:
    """A cache that was opened.

    Args:
        folder: the cache folder.
        images: uint8 `(N, 3, H, W)` in channels_last memory, mapped from the file (copy on write).
        labels: int64 `(N,)`.
        splits: images in each split, in the order they are stored.
        classes: names, alphabetical; a label is an index into them.
        mean: of the stored train images, per channel, as fraction of full scale.
        std: the same, population standard deviation over all pixels.
    """

    folder: Path
    images: torch.Tensor
    labels: torch.Tensor
    splits: dict[str, int]
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def cache_home() -> Path:
    """The folder of all caches: `MICRONET_CACHE`, else `micronet` in `XDG_CACHE_HOME` or `~/.cache`."""
    if home := os.environ.get("MICRONET_CACHE"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "micronet"


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the amount done; a bar on stderr appears after the first second.

    Args:
        what: the words in front of the bar.
        total: the amount to do, any unit; None when unknown.
    """
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=total)
    began, shown = time.monotonic(), False

    def advance(done: int) -> None:
        nonlocal shown
        # Into a file or a pipe, a bar that is stopped leaves an empty line.
        if not shown and bar.console.is_interactive and time.monotonic() - began > 1:
            bar.start()
            shown = True
        if shown:
            bar.update(task, completed=done)

    try:
        yield advance
    finally:
        if shown:
            bar.stop()


def moments(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and population standard deviation of each channel, as fractions of full scale.

    Args:
        images: uint8 `(N, H, W, 3)`.
    """
    counts = np.zeros((3, 256), dtype=np.int64)  # a histogram: exact, whatever the number of pixels
    for start in range(0, len(images), 2_000):
        for channel in range(3):
            counts[channel] += np.bincount(images[start : start + 2_000, ..., channel].ravel(), minlength=256)
    levels = np.arange(256) / 255
    total = counts.sum(1)
    mean = (counts * levels).sum(1) / total
    return mean.tolist(), np.sqrt((counts * levels**2).sum(1) / total - mean**2).tolist()


def ensure(
    name: str, fingerprint: str, find: Callable[[], tuple[list[Entry], dict]], *, size: int, exact: bool = False
) -> Stored:
    """Open a cache, building it first when it is missing, damaged or of something else.

    Args:
        name: of the cache folder, unique for the data set.
        fingerprint: stands for the content; a cache with another one is built anew.
        find: lists the images and describes the source; called only to build.
        size: side of the images in pixels.
        exact: refuse images of another size instead of resizing them.

    Raises:
        MicronetError: the images cannot be found or read, or the cache cannot be written.
    """
    folder = cache_home() / f"{name}-v{FORMAT}"
    if stored := open_cache(folder, fingerprint, size):
        return stored
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if stored := open_cache(folder, fingerprint, size):  # another process built it meanwhile
                return stored
            _build(folder, fingerprint, *find(), size=size, exact=exact)
    except OSError as error:
        raise MicronetError(f"cache {folder} cannot be built ({error}): set MICRONET_CACHE to another place") from error
    if stored := open_cache(folder, fingerprint, size):
        return stored
    raise MicronetError(f"cache {folder} is damaged right after it was written: set MICRONET_CACHE to another disk")


def open_cache(folder: Path, fingerprint: str, size: int) -> Stored | None:
    """The cache in `folder`, or None when it is not whole, of another format or of another source.

    Args:
        folder: the cache folder.
        fingerprint: what it must have been built from.
        size: side of the images in pixels.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if (meta["format"], meta["fingerprint"]) != (FORMAT, fingerprint):
            return None
        images = np.load(folder / "images.npy", mmap_mode="c")  # copy on write: torch warns about read-only memory
        labels = np.load(folder / "labels.npy")
        splits, classes = meta["splits"], tuple(meta["classes"])
        mean, std = tuple(meta["mean"]), tuple(meta["std"])
        whole = (
            images.shape == (sum(splits.values()), size, size, 3)
            and (images.dtype, labels.dtype) == (np.uint8, np.int64)
            and (folder / "images.npy").stat().st_size == images.offset + images.nbytes
            and labels.shape == images.shape[:1]
            and np.bincount(labels, minlength=len(classes)).tolist() == meta["counts"]
            and len(meta["counts"]) == len(classes)
            and (len(mean), len(std)) == (3, 3)
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):  # missing or damaged: build anew
        return None
    if not whole:
        return None
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    return Stored(folder, pixels, torch.from_numpy(labels), splits, classes, mean, std)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of one cache; the system drops it when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system: two builders both work, and the second rename wins
        yield
        return
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        with progress(f"waiting for another process to build {folder.name}", None) as advance:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.1)
                    advance(0)
        yield


def _build(folder: Path, fingerprint: str, entries: list[Entry], source: dict, *, size: int, exact: bool) -> None:
    """Decode into a temporary sibling, then rename it to `folder`; nothing is left of an interrupted one."""
    for stale in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a killed process; the lock is ours
        shutil.rmtree(stale, ignore_errors=True)
    needed, free = len(entries) * size * size * 3, shutil.disk_usage(folder.parent).free
    if needed > free:  # a mapped file on a full disk would kill the process without a word
        gigabytes = f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise MicronetError(f"cache {folder} needs {gigabytes}: make room or set MICRONET_CACHE to another place")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        _write(temporary, fingerprint, entries, source, size=size, exact=exact)
        if folder.exists():
            damaged = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
            folder.rename(damaged)
            shutil.rmtree(damaged)
        temporary.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(temporary: Path, fingerprint: str, entries: list[Entry], source: dict, *, size: int, exact: bool) -> None:
    entries = sorted(entries, key=lambda entry: (SPLITS.index(entry.split), entry.label, entry.name))
    classes = sorted({entry.label for entry in entries})
    index = {label: i for i, label in enumerate(classes)}
    labels = np.array([index[entry.label] for entry in entries], dtype=np.int64)
    splits = {split: sum(entry.split == split for entry in entries) for split in SPLITS}
    shape = (len(entries), size, size, 3)
    images = np.lib.format.open_memmap(temporary / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
    _decode_all(entries, images, exact)
    images.flush()
    np.save(temporary / "labels.npy", labels)
    mean, std = moments(images[: splits["train"]])
    meta = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "classes": classes,
        "splits": splits,
        "mean": mean,
        "std": std,
    }
    meta |= {"counts": np.bincount(labels, minlength=len(classes)).tolist(), "source": source}
    (temporary / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    for path in (*temporary.iterdir(), temporary):
        _sync(path)


def _decode_all(entries: list[Entry], images: np.ndarray, exact: bool) -> None:
    def one(i: int) -> None:
        images[i] = decode(entries[i], images.shape[1], exact)

    some = entries[:: max(1, len(entries) // 100)]
    sizes = [len(e.data) if isinstance(e.data, bytes) else e.data.stat().st_size for e in some]
    workers = (os.cpu_count() or 1) if sum(sizes) > THREADED_BYTES * len(some) else 1
    with progress(f"decoding {len(entries):,} images", len(entries)) as advance:
        if workers == 1:
            for i in range(len(entries)):
                one(i)
                advance(i + 1)
            return
        pool = ThreadPoolExecutor(workers)
        try:
            for done, _ in enumerate(pool.map(one, range(len(entries)))):
                advance(done + 1)
        finally:
            pool.shutdown(cancel_futures=True)


def _sync(path: Path) -> None:
    """Make sure that a file or folder is on the disk before a rename says so."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
