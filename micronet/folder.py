"""Run folders: one process at a time, nothing overwritten, nothing half written."""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from callbacks.saving import whole_or_absent
from micronet.errors import MicronetError, first_line


def read_rows(folder: str | Path) -> list[dict[str, Any]]:
    """Read the rows of the stages that are done, in order.

    Args:
        folder: a run folder.

    Raises:
        MicronetError: a row is damaged.
    """
    places = sorted(Path(folder).glob("*-*/row.json"), key=lambda place: int(place.parent.name.partition("-")[0]))
    rows = []
    for place in places:
        try:
            rows.append(dict(json.loads(place.read_text())))
        except (RecursionError, TypeError, ValueError) as error:
            told = (
                f"{place}: damaged ({first_line(error)}); remove it to run the stage again, or start over with --fresh"
            )
            raise MicronetError(told) from error
    return rows


def is_begun(folder: str | Path) -> bool:
    """Whether a run folder holds an epoch or a stage that a later command would go on from.

    Args:
        folder: a run folder, or none.
    """
    return any(any(Path(folder).glob(f"*-*/{name}")) for name in ("checkpoint.pth", "row.json"))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file to a place where it is whole or absent."""
    with whole_or_absent(target) as beside:
        shutil.copyfile(source, beside)


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, but for what a micronet that was killed at its first steps left there."""
    return all(file.name == ".lock" or ".tmp." in file.name for file in folder.iterdir())


def sweep(folder: Path) -> None:
    """Remove what a kill in the middle of writing left; call with the folder locked."""
    for file in folder.rglob(".*.tmp.*"):
        file.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; the lock goes with the process, however it ends."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MicronetError(f"{folder}: another micronet works in this folder; wait for it") from error
        yield


def set_aside(folder: str | Path) -> Path | None:
    """Move a run folder away for a fresh start; nothing is deleted.

    Args:
        folder: a run folder, or none.

    Returns:
        Where it went, `<folder>.1` or the next free number; None where there was none.

    Raises:
        MicronetError: the folder holds something that is not a run.
    """
    folder = Path(folder).absolute()
    if not folder.exists():
        return None
    if not (folder / "run.json").exists() and not is_empty(folder):
        raise MicronetError(f"{folder}: not a run folder (it has no run.json), so --fresh leaves it alone")
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    with locked(folder):
        folder.rename(target)
    return target
