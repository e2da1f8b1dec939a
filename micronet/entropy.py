"""Masks and codes in fewer bits than they have, by a range coder that learns their statistics as it goes.

One stream holds all of them, in a fixed order. What is coded next is expected by what came before it in the same array,
which writer and reader both know, and begins as the array before it ended, so that no table of frequencies is stored:

- a mask row by row (output channels), a kernel's position after the other: whether an element is kept is expected by
  how many are kept of its kernel so far. Kernels are emptied as a whole more often than chance would;
- codes by how often each occurred before.

Source: constriction's range coder (Bamler 2022, "Understanding Entropy Coding With Asymmetric Numeral Systems",
https://arxiv.org/abs/2201.01741); the estimate of frequencies is that of Krichevsky and Trofimov 1981.
"""

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
from constriction import stream as coding

# What each outcome is taken to have occurred before it was ever seen: Krichevsky and Trofimov's half.
PRIOR = 0.5
# What was counted in the array before, as so many outcomes of the next.
CARRIED = 32
# Codes that are expected alike before they are counted, too: first so many, then twice as many each time.
FIRST, MOST = 32, 256

_Place = tuple[int, slice, int]
_Counts = dict[tuple[str, int], np.ndarray]


class Encoder:
    """Writes the stream."""

    def __init__(self) -> None:
        self._stream, self._seen = coding.queue.RangeEncoder(), _Counts()
        self._total = hashlib.sha256()

    def add(self, mask: np.ndarray | None, codes: np.ndarray | None, bits: int = 0) -> bool:
        """Append an array, where that makes it smaller.

        Args:
            mask: bool, of the array's **shape**; None where it has none.
            codes: whole numbers from 0, flattened, those that the mask keeps; None for a mask alone.
            bits: width of a code, 1 to 8.

        Returns:
            Whether it was appended: not where the stream would grow by as much as its bits are.
        """
        stream, seen = self._stream.clone(), dict(self._seen)
        if mask is not None:
            kernels = mask.reshape(_kernels(mask.shape))

            def put_kept(chance: np.ndarray, place: _Place) -> np.ndarray:
                stream.encode(kernels[place].astype(np.int32), coding.model.Bernoulli(perfect=False), chance)
                return kernels[place]

            _each_kept(kernels.shape, seen, put_kept)
        if codes is not None:

            def put_codes(chances: np.ndarray, part: slice) -> np.ndarray:
                stream.encode(codes[part].astype(np.int32), coding.model.Categorical(chances, perfect=False))
                return codes[part]

            _each_code(codes.size, bits, seen, put_codes)
        plain = (0 if mask is None else mask.size) + (0 if codes is None else codes.size * bits)
        if stream.num_bits() - self._stream.num_bits() >= plain:
            return False
        self._stream, self._seen = stream, seen
        _update(self._total, mask, codes)
        return True

    def digest(self) -> str:
        """SHA-256 of all masks and codes that were appended, as they were before they were coded."""
        return self._total.hexdigest()

    def data(self) -> np.ndarray:
        """The stream: uint8, a multiple of 4 bytes."""
        return self._stream.get_compressed().astype("<u4").view(np.uint8)


class Decoder:
    """Reads the stream: the same arrays in the same order.

    Args:
        data: uint8, as `Encoder.data` gives it.

    Raises:
        ValueError: it is no stream.
    """

    def __init__(self, data: np.ndarray) -> None:
        if data.size % 4:
            raise ValueError(f"a stream of {data.size} bytes is not one of whole words")
        self._stream = coding.queue.RangeDecoder(np.frombuffer(data.tobytes(), "<u4").astype(np.uint32))
        self._seen = _Counts()
        self._total = hashlib.sha256()

    def digest(self) -> str:
        """SHA-256 of all masks and codes that were read, which is the writer's where they are the same."""
        return self._total.hexdigest()

    def mask(self, shape: Sequence[int]) -> np.ndarray:
        """Read a mask of a **shape**: bool.

        Raises:
            ValueError: the stream holds none.
        """
        kernels = np.zeros(_kernels(shape), bool)

        def take_kept(chance: np.ndarray, place: _Place) -> np.ndarray:
            kernels[place] = self._decoded(coding.model.Bernoulli(perfect=False), chance).astype(bool)
            return kernels[place]

        _each_kept(kernels.shape, self._seen, take_kept)
        _update(self._total, kernels, None)
        return kernels.reshape(tuple(shape))

    def codes(self, count: int, bits: int) -> np.ndarray:
        """Read codes: uint8, `(count,)`.

        Args:
            count: how many.
            bits: width of one.

        Raises:
            ValueError: the stream holds none.
        """
        codes = np.zeros(count, np.uint8)

        def take_codes(chances: np.ndarray, part: slice) -> np.ndarray:
            codes[part] = self._decoded(coding.model.Categorical(chances, perfect=False), codes[part].size)
            return codes[part]

        _each_code(count, bits, self._seen, take_codes)
        _update(self._total, None, codes)
        return codes

    def _decoded(self, model: object, given: np.ndarray | int) -> np.ndarray:
        try:
            return self._stream.decode(model, given)
        except AssertionError as error:  # so constriction says that no message has these bits
            raise ValueError("the coded masks and codes are damaged") from error


def _update(total: "hashlib._Hash", mask: np.ndarray | None, codes: np.ndarray | None) -> None:
    """Add a mask, a byte for each element, and codes, a byte for each."""
    for array in (mask, codes):
        if array is not None:
            total.update(np.ascontiguousarray(array, np.uint8).tobytes())


def _kernels(shape: Sequence[int]) -> tuple[int, int, int]:
    """Rows, kernels in a row, positions in a kernel; of a matrix a kernel is one weight."""
    rows, kernels = shape[:2] if len(shape) > 1 else (1, math.prod(shape))
    return rows, kernels, math.prod(shape[2:])


def _begin(seen: _Counts, kind: tuple[str, int], shape: tuple[int, ...]) -> np.ndarray:
    """The counts that an array begins with: those that the last one of its kind ended with, as if of few outcomes."""
    seen.setdefault(kind, np.zeros(shape))
    ended = seen[kind]
    seen[kind] = PRIOR + ended * (CARRIED / np.maximum(ended.sum(-1, keepdims=True), CARRIED))
    return seen[kind]


def _each_kept(
    shape: tuple[int, int, int], seen: _Counts, exchange: Callable[[np.ndarray, _Place], np.ndarray]
) -> None:
    """Go through a mask as both sides do; `exchange` codes what comes next, given the chance that each is kept."""
    rows, kernels, positions = shape
    counts = _begin(seen, ("mask", positions), (positions, 2))  # removed and kept, by how many of the kernel are before
    for row in range(rows):
        before = np.zeros(kernels, np.int64)
        for position in range(positions):
            kept = exchange((counts[:, 1] / counts.sum(1))[before], (row, slice(None), position))
            counts += np.bincount(2 * before + kept, minlength=2 * positions).reshape(positions, 2)
            before += kept


def _each_code(count: int, bits: int, seen: _Counts, exchange: Callable[[np.ndarray, slice], np.ndarray]) -> None:
    """Go through codes; `exchange` codes what comes next, given the chance of each code."""
    counts = _begin(seen, ("codes", bits), (1 << bits,))
    start, step = 0, FIRST
    while start < count:
        end = min(start + step, count)
        counts += np.bincount(exchange(counts / counts.sum(), slice(start, end)), minlength=1 << bits)
        start, step = end, min(2 * step, MOST)
