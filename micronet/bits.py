"""Codes of 1 to 8 bits and bitmasks as bytes without gaps, the lowest bit of a byte first.

A packed array is one string of bits: its mask, one bit for each element, then its values, and zeros up to a whole byte.
n values of b bits behind a mask of m elements take `ceil((m + n * b) / 8)` bytes.
"""

import numpy as np

# Codes that are spread to single bits at a time: a bit is a byte for that moment. A multiple of 8, so that whole bytes
# come of them.
CHUNK = 1 << 20


def packed_size(count: int, bits: int, mask: int = 0) -> int:
    """Bytes of a packed array.

    Args:
        count: how many values are stored.
        bits: width of one.
        mask: elements of its mask; 0 without one.
    """
    return -(-(mask + count * bits) // 8)


def pack_bits(codes: np.ndarray, bits: int, mask: np.ndarray | None = None) -> np.ndarray:
    """Put codes side by side, behind a mask.

    Args:
        codes: whole numbers, flattened in their order; negative ones as two's complement.
        bits: width of one, 1 to 8.
        mask: bool, of any **shape**; None for none.

    Returns:
        uint8, of `packed_size` bytes.

    Raises:
        ValueError: the width is another, or a code needs more bits.
    """
    _check_width(bits)
    codes = np.ascontiguousarray(codes).reshape(-1)
    low, high = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    least, most = (-1 << bits - 1, 1 << bits - 1) if low < 0 else (0, 1 << bits)
    if low < least or high >= most:
        raise ValueError(f"codes from {low} to {high} don't fit into {bits} bits")
    lead = np.zeros(0, bool) if mask is None else np.ascontiguousarray(mask, bool).reshape(-1)
    whole = lead.size // 8 * 8
    parts, rest = [np.packbits(lead[:whole], bitorder="little")], lead[whole:].view(np.uint8)
    for start in range(0, codes.size, CHUNK):
        part = codes[start : start + CHUNK].astype(np.uint8, casting="unsafe")
        spread = np.unpackbits(part[:, None], axis=1, count=bits, bitorder="little").reshape(-1)
        spread = np.concatenate([rest, spread])
        whole = spread.size // 8 * 8
        parts.append(np.packbits(spread[:whole], bitorder="little"))
        rest = spread[whole:]
    return np.concatenate([*parts, np.packbits(rest, bitorder="little")])


def unpack_mask(data: np.ndarray, count: int) -> np.ndarray:
    """Read the mask that a packed array begins with.

    Args:
        data: uint8, as `pack_bits` gives it.
        count: elements of the mask.

    Returns:
        bool, `(count,)`.

    Raises:
        ValueError: it is shorter than that.
    """
    if data.size * 8 < count:
        raise ValueError(f"{data.size} bytes can't hold a mask of {count} elements")
    return np.unpackbits(data[: packed_size(count, 1)], count=count, bitorder="little").view(bool)


def unpack_bits(data: np.ndarray, bits: int, count: int, *, signed: bool, mask: int = 0) -> np.ndarray:
    """Read codes back.

    Args:
        data: uint8, as `pack_bits` gives it.
        bits: width of one code, 1 to 8.
        count: how many codes there are.
        signed: whether they are two's complement.
        mask: elements of the mask before them; 0 without one.

    Returns:
        int16, `(count,)`.

    Raises:
        ValueError: the data is not just as long as that takes, or its last bits are not zero.
    """
    _check_width(bits)
    if data.size != packed_size(count, bits, mask):
        raise ValueError(f"{count} codes of {bits} bits behind {mask} bits of a mask are not {data.size} bytes")
    end = (mask + count * bits) % 8
    if end and data[-1] >> end:
        raise ValueError("bits are left over behind the last code")
    codes = np.empty(count, np.int16)
    for start in range(0, count, CHUNK):
        number = min(CHUNK, count - start)
        first = mask + start * bits
        part = np.unpackbits(data[first // 8 : -(-(first + number * bits) // 8)], bitorder="little")
        part = part[first % 8 : first % 8 + number * bits].reshape(number, bits)
        codes[start : start + number] = np.packbits(part, axis=1, bitorder="little")[:, 0]
    if signed:
        codes -= (codes >> bits - 1) << bits
    return codes


def _check_width(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be a width from 1 to 8, got {bits}")
