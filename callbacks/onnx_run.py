"""An ONNX graph in memory, run by onnxruntime on the CPU."""

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[np.ndarray], list[np.ndarray]]

_INTEGER_CONVS = ("QLinearConv", "ConvInteger")
_FLOAT_CONVS = ("Conv", "FusedConv")
_INTEGER_PRODUCTS = ("QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat")
_FLOAT_PRODUCTS = ("Gemm", "FusedGemm", "MatMul", "FusedMatMul")


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What onnxruntime computes the layers of a graph with, counted after its rewriting.

    Args:
        convs: convolutions.
        integer_convs: of these, computed with integers.
        products: matrix products, those of linear layers among them.
        integer_products: of these, computed with integers.
        packed_products: of these, computed with weights that are read as 4 bits (MatMulNBits).
    """

    convs: int
    integer_convs: int
    products: int
    integer_products: int
    packed_products: int


def open_session(proto: Any, *, plain: bool = False) -> Run:
    """Open a graph; the result takes images and gives all outputs.

    Args:
        proto: an `onnx.ModelProto` with one input.
        plain: whether it runs as it is written, without onnxruntime's rewriting, which takes its time.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
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


def rewritten(proto: Any, *, weights_as_they_are: bool = False) -> Any:
    """The graph that onnxruntime makes of one for this CPU, and runs: an `onnx.GraphProto`.

    Args:
        proto: an `onnx.ModelProto`.
        weights_as_they_are: whether it stops before it writes kernels' own formats of weights, some of which no file
            can hold.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if weights_as_they_are:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "rewritten.onnx")
        onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath).graph


def kernels(proto: Any) -> Kernels:
    """Have onnxruntime rewrite a graph for this CPU, and count what it runs.

    Args:
        proto: an `onnx.ModelProto`.
    """
    found = Counter(node.op_type for node in rewritten(proto).node)

    def number(*names: str) -> int:
        return sum(found[name] for name in names)

    integer, packed = number(*_INTEGER_PRODUCTS), number("MatMulNBits")
    return Kernels(
        convs=number(*_INTEGER_CONVS, *_FLOAT_CONVS),
        integer_convs=number(*_INTEGER_CONVS),
        products=integer + packed + number(*_FLOAT_PRODUCTS),
        integer_products=integer,
        packed_products=packed,
    )
