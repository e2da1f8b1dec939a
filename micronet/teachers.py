"""Teachers from files: what a recipe's `cbs` names, so that a run is recorded with the networks that taught it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from callbacks.distill import Distill, alike
from micronet import bundle as bundles
from micronet.errors import MicronetError


def distill_from(path: Path | Sequence[Path], **kwargs: Any) -> Distill:
    """Make a `Distill` whose teacher is read from a `model.pth`.

    In a recipe's `cbs`: `partial(distill_from, Path("teacher.pth"), temperature=4, weight=0.9)`. The file's class names
    and normalisation are compared with the student's data before the fit.

    Args:
        path: the file; several for several teachers.
        **kwargs: the other arguments of `Distill`, such as `temperature` and `weight`.

    Raises:
        MicronetError: a file can't be read, or two teachers have other classes or another normalisation.
        ValueError: an argument of `Distill` is out of its range.
    """
    paths = (path,) if isinstance(path, Path | str) else tuple(path)
    if not paths or not all(isinstance(one, Path) for one in paths):
        # The text of a name would be recorded, and not what the file holds: another teacher could take its place.
        raise MicronetError(f"distill_from: give the teacher's file as a Path, or several as a tuple, got {path!r}")
    first, *others = found = [bundles.load(one) for one in paths]
    for other, place in zip(others, paths[1:], strict=True):
        for name in ("classes", "mean", "std"):
            if not alike(getattr(first, name), getattr(other, name)):
                raise MicronetError(f"{paths[0]} and {place}: teachers with other {name} can't teach one student")
    modules = [bundle.model for bundle in found]
    return Distill(modules, classes=first.classes, mean=first.mean, std=first.std, **kwargs)
