"""The range of every tensor of a float ONNX graph on some images, three ways.

`minmax` takes the least and the largest number. `percentile` leaves out the outermost 0.001 % of the numbers, half of
it at either end. `entropy` cuts where the histogram, rounded to as many steps as there are codes, differs least from
what it was, by Kullback and Leibler's measure. Images go through in chunks; of the last two only histograms are kept.

Source: onnxruntime's calibrators for `percentile`'s 99.999; Migacz 2017, "8-bit Inference with TensorRT", for
`entropy`. onnxruntime's own entropy makes as many bins as steps by default, so that it cuts nothing on one chunk.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from callbacks.onnx_run import open_session
from callbacks.paired import Watch
from callbacks.quantize_onnx import Calibration, QuantizeError, Range, prepared

METHODS = ("minmax", "entropy", "percentile")
CHUNK = 32  # images at a time
HELD_BYTES = 2**28  # of all tensors of a chunk at once, where a histogram of each is made
BINS = 2048
STRIDE = 16  # bins between two cuts that entropy compares
PERCENTILE = 99.999
SMOOTHING = 1e-4  # of the whole, spread over all bins


class Images(Protocol):
    """Images normalised as a graph takes them: an array `(N, C, H, W)`, or what makes one of a slice when asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> np.ndarray: ...


def calibrated(proto: Any, images: Images, method: str = "minmax", watch: Watch = lambda done: None) -> Calibration:
    """Find the ranges of a graph's tensors.

    Args:
        proto: an `onnx.ModelProto` in float32 with one input; it stays as it is.
        images: at least one; `CHUNK` at a time are made float32.
        method: one of `METHODS`.
        watch: called with the number of images done, of `passes(method) * N`.

    Raises:
        QuantizeError: it is quantised already, or has nothing to quantise; a tensor holds what is no finite number.
        ValueError: no such method, or no images.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not len(images):
        raise ValueError("there are no images to calibrate on")
    graph = prepared(proto)
    names = _tensors(graph)
    ranges = _extremes(graph, names, images, watch)
    if method != "minmax":
        counts = _histograms(graph, ranges, images, watch, folded=method == "entropy")
        cut = _by_entropy if method == "entropy" else _by_percentile
        ranges = {name: cut(counts[name], ranges[name]) for name in names}
    return Calibration(graph, ranges, method, len(images))


def passes(method: str) -> int:
    """How often a method runs the images."""
    return 1 if method == "minmax" else 2


def _tensors(proto: Any) -> list[str]:
    """Names of the float tensors that depend on the image, the image's own among them."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(proto).graph
    given = [*graph.input, *graph.value_info, *graph.output]
    held = {tensor.name for tensor in graph.initializer}
    return [
        value.name
        for value in given
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT and value.name not in held
    ]


def _with_outputs(proto: Any, nodes: Sequence[Any], names: Sequence[str]) -> Any:
    """A copy of a graph with further nodes, and with other outputs."""
    import onnx

    more = onnx.ModelProto()
    more.CopyFrom(proto)
    more.graph.node.extend(nodes)
    del more.graph.output[:]
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names]
    more.graph.output.extend(values)
    return more


def _chunks(images: Images, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(images), size):
        yield np.ascontiguousarray(images[start : start + size], np.float32)


def _extremes(proto: Any, names: Sequence[str], images: Images, watch: Watch) -> dict[str, Range]:
    from onnx import helper

    ends = [(name, op, f"{name}/{op}") for name in names for op in ("ReduceMin", "ReduceMax")]
    nodes = [helper.make_node(op, [name], [out], keepdims=0) for name, op, out in ends]
    session = open_session(_with_outputs(proto, nodes, [out for *_, out in ends]), plain=True)
    found = []
    for chunk in _chunks(images, CHUNK):
        found.append(np.array(session(chunk), np.float64).reshape(len(names), 2))
        watch(min(len(found) * CHUNK, len(images)))
    low, high = np.min([part[:, 0] for part in found], 0), np.max([part[:, 1] for part in found], 0)
    wrong = ~(np.isfinite(low) & np.isfinite(high))
    if wrong.any():
        raise QuantizeError(f"{names[int(wrong.argmax())]} holds what is no finite number on these images")
    return {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}


def _histograms(
    proto: Any, ranges: dict[str, Range], images: Images, watch: Watch, *, folded: bool
) -> dict[str, np.ndarray]:
    """Counts in `BINS` bins over each range; folded, of absolute values from 0."""
    names = list(ranges)
    # An output that is an input, too, comes back as the input's own memory.
    session = open_session(_with_outputs(proto, [], names), plain=True)
    counts = {name: np.zeros(BINS, np.int64) for name in names}
    size, done = 1, 0
    while done < len(images):
        values = session(np.ascontiguousarray(images[done : done + size], np.float32))
        done += size
        size = max(1, min(CHUNK, HELD_BYTES * size // sum(value.nbytes for value in values)))
        for name, value in zip(names, values, strict=True):
            low, high = ranges[name]
            value, span = (np.abs(value), (0.0, max(-low, high))) if folded else (value, (low, high))
            if span[1] > span[0]:
                counts[name] += np.histogram(value, BINS, span)[0]
        watch(len(images) + min(done, len(images)))
    return counts


def _by_percentile(counts: np.ndarray, within: Range) -> Range:
    low, high = within
    total = counts.sum()
    if not total:
        return within
    share = np.cumsum(counts) / total
    tail = (1 - PERCENTILE / 100) / 2
    edges = np.linspace(low, high, BINS + 1)
    return float(edges[np.searchsorted(share, tail)]), float(edges[np.searchsorted(share, 1 - tail) + 1])


def _by_entropy(counts: np.ndarray, within: Range) -> Range:
    low, high = within
    top = max(-low, high)
    # The codes of the longer side: all of them where a tensor is never negative, nearly all behind a SiLU.
    steps = round(256 * top / ((max(high, 0.0) - min(low, 0.0)) or 1.0)) or 256
    counts = counts.astype(np.float64)
    counts[0] = counts[1]  # what a ReLU made zero says nothing of how fine the steps should be
    if not counts.sum():
        return within
    cuts = range(steps, BINS + 1, STRIDE)
    best = min(cuts, key=lambda cut: _divergence(counts, cut, steps))
    cut = top * best / BINS
    return max(low, -cut), min(high, cut)


def _divergence(counts: np.ndarray, cut: int, steps: int) -> float:
    """How far the counts up to a cut, with all beyond it put into the last bin, are from what `steps` steps leave."""
    inside, filled = counts[:cut], counts[:cut] > 0
    step = np.arange(cut) * steps // cut
    sums = np.bincount(step, inside, steps)
    bins = np.bincount(step, filled, steps)
    rounded = np.where(filled, (sums / np.maximum(bins, 1))[step], 0.0)
    wanted = inside.copy()
    wanted[-1] += counts[cut:].sum()
    p, q = (_smooth(part) for part in (wanted, rounded))
    return float((p * np.log(p / q)).sum())


def _smooth(counts: np.ndarray) -> np.ndarray:
    """Shares of the whole, none of them 0: what is cut off may fall into a bin that was empty."""
    return (1 - SMOOTHING) * counts / max(counts.sum(), 1e-30) + SMOOTHING / len(counts)
