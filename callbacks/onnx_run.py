"""An ONNX graph in memory, run by onnxruntime on the CPU."""

from collections.abc import Callable
from typing import Any

import numpy as np

Run = Callable[[np.ndarray], list[np.ndarray]]


def open_session(proto: Any, *, plain: bool = False, threads: int = 0) -> Run:
    """Open a graph; the result takes images and gives all outputs.

    Args:
        proto: an `onnx.ModelProto` with one input.
        plain: whether it runs as it is written, without onnxruntime's rewriting, which takes its time.
        threads: to compute with; 0 for as many as there are cores.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


def logits(proto: Any, images: np.ndarray, batch: int = 64) -> np.ndarray:
    """What a graph gives for images, `(N, classes)`.

    Args:
        proto: an `onnx.ModelProto` with one input, and logits as its first output.
        images: **shape** `(N, C, H, W)`, float32, normalised as the graph takes them.
        batch: images that are run at a time.
    """
    run = open_session(proto)
    parts = (np.ascontiguousarray(images[start : start + batch]) for start in range(0, len(images), batch))
    return np.concatenate([run(part)[0] for part in parts])
