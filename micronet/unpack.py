"""Packed files: what a deployed network stores, bit by bit, in a safetensors file; read as bundles.

The file has one tensor for each array of the ledger, under its name in the state dict, and nothing between them:

- numbers, float32 or float16, in their shape, as any reader of safetensors shows them;
- uint8, a string of bits: the mask of a sparse array and the numbers or codes that it keeps, or codes of 1 to 8 bits
  (`bits.py`). Codes are two's complement; times the scale of their row they are the weights;
- `__coded__`, where masks and codes were coded (`entropy.py`): all that it holds, in the order of the header's `coded`.
  The header's `decoded` is a SHA-256 of what it decodes to, so that no version of a decoder makes another network of
  it; older files lack it.

The header's metadata holds JSON that says how the network is built, as `model.pth` does, and a SHA-256 of it and of all
tensors. Reading a file runs no code of its own, and takes no more memory than what it holds.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from micronet.bundle import Bundle, assemble
from micronet.bundle_file import check_fields
from micronet.errors import MicronetError, first_line, require_file
from micronet.factories import find_factory
from micronet.file_kind import MOST_HEADER, look
from micronet.packed_arrays import CODED, PackedArrays
from micronet.rebuild import rebuilt, shapes_of

SUFFIX = ".safetensors"
FORMAT, VERSION = "micronet packed", 1
# Elements that a file may have beyond eight for each of its bytes: those of coded masks, and those that are not stored.
MOST_ELEMENTS = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A packed file that was read.

    Args:
        bundle: the network, as it is deployed.
        float_bits: width of the numbers that are no codes, 32 or 16.
        file_bytes: of the file.
        header_bytes: of its header, the 8 bytes of its length included.
        coded: whether masks and codes were coded.
    """

    bundle: Bundle
    float_bits: int
    file_bytes: int
    header_bytes: int
    coded: bool

    @property
    def data_bytes(self) -> int:
        """Bytes of all arrays."""
        return self.file_bytes - self.header_bytes


def is_packed(path: str | Path) -> bool:
    """Whether a file is to be read as a packed one: by its name, or because it begins as a safetensors file."""
    path = Path(path)
    if path.suffix.lower() == SUFFIX:
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] <= path.stat().st_size - 8


def read(path: str | Path, *, factory: Callable[..., nn.Module] | None = None) -> Packed:
    """Read a packed file.

    Args:
        path: the file.
        factory: builds the network instead of the function that the file names.

    Raises:
        MicronetError: no such file; truncated or damaged; not one that `micronet pack` wrote; of a newer version; its
            factory is not allowed; its arrays don't fit its network.
    """
    path = Path(path)
    header = header_bytes(path)
    content, tensors = _read(path)
    try:
        build = factory or find_factory(content["factory"], content["kwargs"])
        shapes = _shapes(rebuilt(build, content), content["kwargs"])
        elements, size = sum(shape.numel() for shape in shapes.values()), path.stat().st_size
        if elements > 8 * size + MOST_ELEMENTS:
            raise MicronetError(f"its network has {elements:,} numbers, more than {size:,} bytes can hold")
        state, masks = PackedArrays(content, tensors, shapes).read()
    except MicronetError as error:
        raise MicronetError(f"{path}: {error}") from error
    except ValueError as error:  # what the arrays are read with
        raise MicronetError(f"{path}: damaged: {first_line(error)}; copy or make it again") from error
    return Packed(
        bundle=assemble(content | {"state": state, "masks": masks}, path, factory),
        float_bits=content["float_bits"],
        file_bytes=path.stat().st_size,
        header_bytes=header,
        coded=CODED in tensors,
    )


def header_bytes(path: Path) -> int:
    """Bytes of a safetensors file's header, the 8 of its length included.

    Raises:
        MicronetError: no such file; not a safetensors file; truncated.
    """
    require_file(path)
    with path.open("rb") as file:
        start = file.read(9)
    if len(start) < 9 or start[8:] != b"{":
        raise MicronetError(f"{path}: not a safetensors file, as `micronet pack` writes them; {look(path)}")
    (length,) = struct.unpack("<Q", start[:8])
    if length > path.stat().st_size - 8:
        raise MicronetError(f"{path}: truncated (its header alone is longer than the file); copy or make it again")
    if length > MOST_HEADER:
        raise MicronetError(f"{path}: its header takes {length:,} bytes, at most {MOST_HEADER:,} are read: not ours")
    return 8 + length


def digest(text: str, tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of a file's JSON and of all its tensors, with their names, types and shapes.

    Args:
        text: the JSON.
        tensors: by name.
    """
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        total.update(f"\n{name} {value.dtype.str} {value.shape}\n".encode())
        total.update(value.tobytes())
    return total.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A file's fields and tensors, checked against its digest."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            if "micronet" not in metadata:
                raise MicronetError(
                    f"{path}: a safetensors file, but not one that `micronet pack` wrote (it holds "
                    f"{', '.join(sorted(names)[:3]) or 'nothing'})"
                )
            content = _fields(path, metadata["micronet"])
            tensors = {name: file.get_tensor(name) for name in names}
    except (MicronetError, OSError):
        raise
    except Exception as error:  # safetensors' own errors, and numpy's of types that it does not have
        raise MicronetError(
            f"{path}: truncated or damaged: {first_line(error)[:160]}; copy or make it again"
        ) from error
    if metadata.get("sha256") != digest(metadata["micronet"], tensors):
        raise MicronetError(f"{path}: damaged: its bytes are not those that were written; copy or make it again")
    return content, tensors


def _fields(path: Path, text: str) -> dict[str, Any]:
    """What the header says, checked in its form."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MicronetError(f"{path}: damaged: its header is not JSON: {first_line(error)[:160]}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise MicronetError(f"{path}: a safetensors file, but not one that `micronet pack` wrote")
    if type(content.get("version")) is not int or not 1 <= content["version"] <= VERSION:
        raise MicronetError(
            f"{path}: format version {content.get('version')!r:.40}, this micronet reads {VERSION}: update micronet"
        )
    try:
        check_fields(content | {"state": {}, "masks": {}}, path)
    except RecursionError as error:
        raise MicronetError(f"{path}: damaged: its arguments are nested too deep; make it again") from error
    lists = [content.get(name) for name in ("sparse", "kept", "coded", "unread")]
    codes, tied = content.get("codes"), content.get("tied")
    sound = (
        content.get("float_bits") in (16, 32)
        and all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists)
        and isinstance(codes, dict)
        and all(type(bits) is int and 1 <= bits <= 8 for bits in codes.values())
        and isinstance(tied, dict)
        and all(isinstance(name, str) for name in tied.values())
    )
    if not sound:
        raise MicronetError(f"{path}: damaged: its fields are not what a packed file's are; make it again")
    return content


def _shapes(build: Callable[..., nn.Module], kwargs: dict[str, Any]) -> dict[str, torch.Size]:
    """Shapes of all tensors of the network that a file describes."""
    try:
        shapes = shapes_of(build, kwargs)
        if shapes is None:
            with torch.random.fork_rng(devices=[]):
                shapes = {name: value.shape for name, value in build(**kwargs).state_dict().items()}
    except MicronetError:
        raise
    except Exception as error:  # a file's arguments can make a network's own code fail in any way
        raise MicronetError(f"its network can't be built: {first_line(error)[:160]}") from error
    return shapes
