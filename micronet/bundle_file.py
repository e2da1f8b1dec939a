"""Reading `model.pth` without running any code of it, and checking that its fields are what a bundle's are."""

import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from micronet.decode import MOST_SIDE
from micronet.errors import MicronetError, first_line
from micronet.factories import is_plain
from micronet.file_kind import look
from micronet.minmax8 import decode

FORMAT = "micronet"
VERSION = 2  # files with weights of 8 bits; without them a file is of version 1, for readers of that
MOST_VALUES = 1_000_000  # texts, numbers and containers in a file; a list that lies in two others counts twice
MOST_SHARED = 64  # times as large as what is stored the tensors may be that share it


def is_bundle(path: str | Path) -> bool:
    """Whether a file is a bundle, whole or not."""
    try:
        content = torch.load(copied_archive(Path(path)), map_location="cpu", weights_only=True)
        return content["format"] == FORMAT
    except Exception:  # anything else fails in any way
        return False


def read_content(path: Path) -> dict[str, Any]:
    """Read a bundle's fields, and check that they are what they should be; what they say may still be wrong.

    Args:
        path: the file.

    Raises:
        MicronetError: no such file; truncated; not PyTorch's; a pickle of objects; not a bundle; of a newer version.
    """
    if not path.is_file():
        what = "is a folder; name the model.pth in it" if path.is_dir() else "no such file"
        raise MicronetError(f"{path}: {what}")
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            start = file.read(4)
        if start.startswith(b"PK"):
            raise MicronetError(
                f"{path}: truncated (it begins like a model file and has no end); copy or make it again"
            )
        raise MicronetError(f"{path}: not a model file of micronet (model.pth); {look(path)}")
    try:
        content = torch.load(copied_archive(path), map_location="cpu", weights_only=True)
    except MicronetError:
        raise
    except pickle.UnpicklingError as error:
        raise MicronetError(
            f"{path}: holds pickled objects, which can run code when read, and was refused; "
            "save it again from its own program as a bundle; `micronet score --trust` runs that code to score it"
        ) from error
    except Exception as error:  # on damaged bytes the restricted unpickler fails with whatever comes
        raise MicronetError(f"{path}: damaged: {first_line(error)[:160]}; copy or make it again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise MicronetError(
            f"{path}: a PyTorch file, but not a bundle of micronet's ({_outline(content)}); "
            "`micronet score` reads a plain state dict with --arch"
        )
    if not isinstance(content.get("version"), int) or content["version"] > VERSION:
        raise MicronetError(
            f"{path}: format version {content.get('version')}, this micronet reads up to {VERSION}: update micronet"
        )
    try:
        check_fields(content, path)
    except RecursionError as error:
        raise MicronetError(f"{path}: damaged: its arguments hold themselves; make it again") from error
    if "minmax8" in content:
        try:
            _decode(content)
        except MicronetError as error:
            raise MicronetError(f"{path}: {error}") from error
    return content


def is_minmax8(path: Path) -> bool:
    """Whether a file that can be loaded holds its weights rounded to 8 bits, as `minmax8` has it."""
    return is_bundle(path) and "minmax8" in read_content(path)


def copied_archive(path: Path) -> io.BytesIO:
    """An archive that PyTorch saved, entry by entry in memory: torch's own reader trusts an archive more than it may.

    It would unpack any number of gigabytes, and takes wrong bytes for weights: it looks at no checksum.

    Args:
        path: the file, a zip archive.

    Raises:
        MicronetError: its entries are more than the file can hold.
        Exception: whatever the reading of damaged bytes fails with.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as made:
        entries = archive.infolist()
        if not any(entry.filename.endswith("/data.pkl") for entry in entries):
            raise MicronetError(f"{path}: a zip archive, but not one that PyTorch wrote; name a model.pth")
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        once = len({entry.filename for entry in entries}) == len(entries)
        if not (stored and once and sum(entry.file_size for entry in entries) <= path.stat().st_size):
            raise MicronetError(
                f"{path}: is packed otherwise than PyTorch does it, and could hold any number of bytes: refused; "
                "save it again with torch.save"
            )
        for entry in entries:
            content = archive.read(entry)  # which looks at the checksum
            if entry.filename.endswith("/data.pkl") and b"\nbytearray\n" in content:
                raise pickle.UnpicklingError("bytearray")  # which PyTorch lets a file make, of any size
            made.writestr(zipfile.ZipInfo(entry.filename), content)
    copy.seek(0)
    return copy


def check_fields(content: dict[str, Any], path: Path) -> None:
    """Check that a file's fields are what a bundle's are; what they say may still be wrong.

    Args:
        content: the fields by name, with `state` and `masks`.
        path: the file, for messages.

    Raises:
        MicronetError: they are not.
    """
    if not _is_countable(content):
        raise MicronetError(f"{path}: damaged: its fields hold themselves, or more than any file does; make it again")
    kinds = {
        "factory": str,
        "kwargs": dict,
        "state": dict,
        "classes": list,
        "input_size": list,
        "mean": list,
        "std": list,
    }
    for name, kind in (kinds | {"history": list, "provenance": dict}).items():
        if not isinstance(content.get(name), kind):
            raise MicronetError(f"{path}: damaged: its {name} is not a {kind.__name__}; make it again")
    for name, kind in {"masks": dict, "edits": list, "widths": dict}.items():  # files of earlier versions have none
        if not isinstance(content.get(name, kind()), kind):
            raise MicronetError(f"{path}: damaged: its {name} are not a {kind.__name__}; make it again")
    size, numbers = content["input_size"], [*content["mean"], *content["std"]]
    sound = (
        all(map(is_plain, (content["kwargs"], content.get("edits", []), content.get("widths", {}))))
        and all(isinstance(edit, dict) for edit in content.get("edits", []))
        and all(isinstance(table, dict) for table in content.get("widths", {}).values())
        and all(_is_whole(value) for value in [*content["state"].values(), *content.get("masks", {}).values()])
        and _is_stored([*content["state"].values(), *content.get("masks", {}).values()])
        and all(isinstance(name, str) for name in [*content["classes"], *content["state"]])
        and all(isinstance(row, dict) for row in content["history"])
        and len(size) == 3
        and all(type(n) is int and 0 < n <= MOST_SIDE for n in size)
        and len(content["mean"]) == len(content["std"]) == size[0]
        and all(isinstance(n, float) and math.isfinite(n) for n in numbers)
        and min(content["std"]) > 0
    )
    if not sound:
        raise MicronetError(f"{path}: damaged: its fields are not what a bundle's are; make it again")


def _decode(content: dict[str, Any]) -> None:
    """Put the weights that a file holds at 8 bits into its state, masked ones as the zeros that they were."""
    state = content["state"] | decode(content["minmax8"])
    for name, bits in content.get("masks", {}).items():
        mask = unpacked_mask(bits, state.get(name))
        if mask.dtype is torch.bool and name in state and mask.shape == state[name].shape:
            state[name][~mask] = 0
    content["state"] = state


def _is_whole(value: Any) -> bool:
    """Whether a file holds every element of a tensor: a hostile one can claim any shape for none, or for one."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    return dense and value.device.type == "cpu" and value.is_contiguous()


def _is_stored(tensors: list[Tensor]) -> bool:
    """Whether tensors are about as large as what a file stores of them: any number of them can share the same bytes."""
    stored = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors}
    return sum(value.nbytes for value in tensors) <= MOST_SHARED * sum(stored.values())


def _is_countable(content: Any) -> bool:
    """Whether a walk through all containers comes to an end soon: they can lie in each other, in many places each."""
    left, count = [content], 0
    while left and count <= MOST_VALUES:
        value = left.pop()
        count += 1
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
    return not left


def packed_mask(mask: Tensor) -> Tensor:
    """A mask as eight elements a byte: a file of a sparse network is not to be larger by a byte a weight.

    Args:
        mask: bool, of any **shape**.
    """
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy()))


def unpacked_mask(bits: Tensor, value: Tensor | None) -> Tensor:
    """A mask of a parameter's shape; as it is where the file does not hold just these bits: it is checked then.

    Args:
        bits: uint8, eight elements a byte.
        value: the parameter; None where there is none of that name.
    """
    if value is None or bits.dtype is not torch.uint8 or bits.shape != (-(-value.numel() // 8),):
        return bits
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=value.numel())).bool().reshape(value.shape)


def _outline(content: Any) -> str:
    if isinstance(content, dict):
        return "keys " + ", ".join(repr(str(key)[:40]) for key in list(content)[:4])
    return f"a {type(content).__name__}"
