"""A state dict at 8 bits an element: each tensor as `round((x - min) / (max - min) * 255)`, with its min and max.

The storage of the study that `separable_net` comes from. Every floating-point tensor goes in, BatchNorm's statistics,
too; whole numbers stay as they are. It is storage and nothing else: read again it is a float32 network, as large in
memory and as fast as before. What a mask holds at zero is zero again. An element is off by at most half a step,
`(max - min) / 510`.

All codes lie in one tensor, one after another: a tensor of its own takes some 300 bytes in a file of PyTorch's.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from micronet.errors import MicronetError

VERSION = 1
STEPS = 255


def encode(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Codes of the floating-point tensors of a state dict.

    Args:
        state: tensors on the CPU.

    Raises:
        MicronetError: one holds what is no finite number.
    """
    names = [name for name, value in state.items() if value.is_floating_point()]
    codes, ranges = [], []
    for name in names:
        value = state[name].float().reshape(-1)
        low, high = (value.min(), value.max()) if value.numel() else (torch.tensor(0.0), torch.tensor(0.0))
        if not bool(torch.isfinite(high.double() - low.double())):
            raise MicronetError(f"{name} holds what is no finite number, which has no 8-bit code")
        ranges.append(torch.stack([low, high]))
        span = high.double() - low.double()
        share = (value.double() - low.double()) / span if span > 0 else torch.zeros(value.numel())
        codes.append((share * STEPS).round().to(torch.uint8))
    return {
        "version": VERSION,
        "names": names,
        "shapes": [list(state[name].shape) for name in names],
        "ranges": torch.stack(ranges) if names else torch.zeros(0, 2),
        "codes": torch.cat(codes) if names else torch.zeros(0, dtype=torch.uint8),
    }


def decode(table: Any) -> dict[str, Tensor]:
    """The tensors that `encode` made codes of, float32.

    Args:
        table: what it gave; from a file, it may be anything.

    Raises:
        MicronetError: it is of a newer version, or not what `encode` gives.
    """
    if isinstance(table, dict) and type(table.get("version")) is int and table["version"] > VERSION:
        raise MicronetError(
            f"8-bit weights of version {table['version']}, this micronet reads up to {VERSION}: update micronet"
        )
    if not _is_sound(table):
        raise MicronetError("damaged: its 8-bit weights are not what `micronet quantize --to minmax8` writes")
    found, start = {}, 0
    for name, shape, (low, high) in zip(table["names"], table["shapes"], table["ranges"].double(), strict=True):
        part = table["codes"][start : start + math.prod(shape)]
        start += len(part)
        # The last code gives the largest number exactly, and a tensor of one number gives that.
        value = torch.where(part == STEPS, high, low + part.double() * ((high - low) / STEPS))
        found[name] = value.float().reshape(shape)
    return found


def _is_sound(table: Any) -> bool:
    if not isinstance(table, dict) or table.get("version") != VERSION:
        return False
    names, shapes, ranges, codes = (table.get(key) for key in ("names", "shapes", "ranges", "codes"))
    if not (
        isinstance(names, list) and isinstance(shapes, list) and len(names) == len(shapes) == len(set(map(str, names)))
    ):
        return False
    if not all(isinstance(name, str) for name in names) or not all(map(_is_shape, shapes)):
        return False
    if not (_is_dense(ranges, torch.float32, (len(names), 2)) and isinstance(codes, Tensor)):
        return False
    if not _is_dense(codes, torch.uint8, (sum(map(math.prod, shapes)),)):
        return False
    low, high = ranges.double().unbind(1)
    return bool(torch.isfinite(ranges).all() and (low <= high).all())


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) <= 8 and all(type(n) is int and 0 <= n < 2**40 for n in shape)


def _is_dense(value: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether a tensor holds every element that it claims: a hostile one can show one byte as any number of them."""
    right = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return right and value.dtype == dtype and tuple(value.shape) == shape and value.is_contiguous()
