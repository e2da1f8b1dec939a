"""Files that hold nothing but tensors and plain containers, and that are whole or absent.

`plain` makes such content of what optimizers and callbacks keep, so that `torch.load(weights_only=True)` reads it and
no code of the file's runs; `write_atomically` writes it, so that a kill in the middle leaves the old file.

Source: Python's documentation of `os.replace`: the renaming is atomic, as POSIX demands, within one file system.
"""

import io
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch


def plain(value: Any) -> Any:
    """Turn nested containers and numbers into dicts, lists, tuples, Python numbers and tensors, and nothing else."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, list) or type(value).__name__ == "L":  # fastcore's list
        return [plain(item) for item in value]
    return value


@contextmanager
def whole_or_absent(path: str | Path) -> Iterator[Path]:
    """Give a place beside a path to write to; rename it to the path once all is written, and remove it otherwise.

    Args:
        path: the file; its folder must exist.
    """
    path = Path(path)
    # Hidden, with ".tmp." in the name: what a kill leaves can be told from files, and swept. Two processes can have the
    # same number: in two containers, or one after the other.
    beside = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.tmp.{path.name}")
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        error.filename = str(path)  # a failed write does not say of what, a failed opening names the place beside
        raise
    finally:
        beside.unlink(missing_ok=True)


def write_atomically(value: Any, path: str | Path) -> None:
    """Save with `torch.save` beside the path, then rename: whoever looks finds the old file or the new one, whole.

    Args:
        value: tensors and plain containers.
        path: the file; its folder must exist.
    """
    # By way of memory: a full disk met by torch's own writer is a RuntimeError that does not say so.
    content = io.BytesIO()
    torch.save(value, content)
    with whole_or_absent(path) as beside:
        beside.write_bytes(content.getbuffer())
