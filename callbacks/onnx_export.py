"""A network as an ONNX graph that holds nothing but what runs: folded, one file, no traces of where it was made.

What: `export_onnx` folds BatchNorm by data flow (`fold.py`), lets torch's exporter make the graph, and takes away what
    it notes of the machine and the program: paths, stack traces, names of scopes. Names of weights stay.
When: before a network leaves for a runtime; before int8.
Cost: 2 to 6 s, most of it torch's exporter.
Source: the ONNX specification, IR version 10 (`metadata_props` of models, graphs and nodes).
"""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from callbacks.copies import unwrap
from callbacks.errors import first_line
from callbacks.fake_quantize import quantised_layers
from callbacks.fold import fold_norms
from callbacks.fold_plan import plan_folds
from callbacks.op_trace import trace
from callbacks.quant_onnx import INT4_OPSET, store_codes, translation

OPSET = 18
MOST_BYTES = 2**31 - 1  # of a protobuf message; what is larger torch's exporter puts into a second file
INPUT, OUTPUT, BATCH = "input", "logits", "batch"


class ExportError(ValueError):
    """A network that torch's exporter can't bring to ONNX."""


def deployed(model: nn.Module, input_size: Sequence[int]) -> nn.Module:
    """A copy of a network as it is deployed: on the CPU, in eval mode, every BatchNorm folded that can be.

    Quantised layers have their weights on their codes times step size. What a fit wraps forwards in is left out.

    Args:
        model: the network; it stays as it is.
        input_size: **shape** of one image, `(C, H, W)`.

    Raises:
        TraceError: it can't be traced.
    """
    compiled, model._compiled_call_impl = model._compiled_call_impl, None  # which can't be copied
    try:
        network = copy.deepcopy(model)
    finally:
        model._compiled_call_impl = compiled
    unwrap(network)
    network = network.to("cpu", memory_format=torch.contiguous_format).eval()
    for layer in quantised_layers(network).values():
        layer.freeze()
    fold_norms(network, plan_folds(network, trace(network, input_size)).layers)
    return network


def export_onnx(model: nn.Module, input_size: Sequence[int], *, int4: bool = False) -> Any:
    """Bring a network to ONNX, with any number of images at a time.

    What quantised layers compute with is stored as codes (`quant_onnx.py`); `integer_kernels.py` makes such a network
    fast on onnxruntime.

    Args:
        model: the network; it stays as it is.
        input_size: **shape** of one image, `(C, H, W)`.
        int4: whether a quantised network's codes of 4 bits and fewer are stored in 4, not in 8.

    Returns:
        An `onnx.ModelProto`: `input` of `(batch, C, H, W)` float32, `logits` of `(batch, classes)`; all weights inside.

    Raises:
        ExportError: torch's exporter can't.
        TraceError: it can't be traced.
    """
    network = deployed(model, input_size)
    quantised = bool(quantised_layers(network))
    if int4 and not quantised:
        raise ExportError("int4 stores a quantised network's codes, and no layer of it is quantised")
    size = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    if size > MOST_BYTES:
        raise ExportError(f"its {size:,} bytes of weights don't fit into one ONNX file, which holds {MOST_BYTES:,}")
    # Two images: a batch of one is taken for a constant by torch.export.
    images = torch.zeros(2, *input_size)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch's exporter about itself
            program = torch.onnx.export(
                network,
                (images,),
                None,
                dynamo=True,
                verbose=False,
                external_data=False,
                opset_version=INT4_OPSET if int4 else OPSET,
                dynamic_shapes=({0: BATCH},),
                input_names=[INPUT],
                output_names=[OUTPUT],
                custom_translation_table=translation(int4) if quantised else None,
            )
    except Exception as error:  # the exporter's own errors share no class
        raise ExportError(f"torch can't export it to ONNX: {first_line(error)[:200]}") from error
    proto = program.model_proto
    if len(proto.graph.output) != 1:
        raise ExportError(f"it gives {len(proto.graph.output)} outputs, and a classifier gives logits alone")
    return stripped(store_codes(proto, int4) if quantised else proto)


def drop_unread(graph: Any) -> None:
    """Take out the arrays that no node reads, in place.

    Args:
        graph: an `onnx.GraphProto` without subgraphs.
    """
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def stripped(proto: Any) -> Any:
    """Take away what no runtime reads: notes, paths, stack traces, shapes of what lies between. In place.

    Args:
        proto: an `onnx.ModelProto`.
    """
    proto.doc_string = ""
    del proto.metadata_props[:]
    _strip_graph(proto.graph)
    for function in proto.functions:
        function.doc_string = ""
        del function.metadata_props[:], function.value_info[:]
        _strip_nodes(function.node)
    return proto


def _strip_graph(graph: Any) -> None:
    graph.doc_string = ""
    del graph.metadata_props[:], graph.value_info[:]
    for value in [*graph.input, *graph.output, *graph.initializer]:
        value.doc_string = ""
        del value.metadata_props[:]
    _strip_nodes(graph.node)


def _strip_nodes(nodes: Any) -> None:
    for node in nodes:
        node.doc_string = ""
        del node.metadata_props[:]
        for attribute in node.attribute:
            attribute.doc_string = ""
            for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                _strip_graph(graph)


def normalising(proto: Any, mean: Sequence[float], std: Sequence[float]) -> None:
    """Let a graph normalise its images itself, so that it takes RGB from 0 to 1. In place.

    Args:
        proto: an `onnx.ModelProto` with one input of `(batch, C, H, W)`, float32.
        mean: what to subtract from each channel.
        std: what to divide each channel by after that, above 0.

    Raises:
        ValueError: the graph has other channels than there are means and deviations.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    (given,) = proto.graph.input
    channels = given.type.tensor_type.shape.dim[1].dim_value
    if not channels == len(mean) == len(std):
        raise ValueError(f"the graph takes {channels} channels, got {len(mean)} means and {len(std)} deviations")
    centred, normalised = f"{given.name}.centred", f"{given.name}.normalised"
    for node in proto.graph.node:
        for place, name in enumerate(node.input):
            if name == given.name:
                node.input[place] = normalised
    for name, values in ((f"{given.name}.mean", mean), (f"{given.name}.std", std)):
        array = np.array(values, np.float32).reshape(1, channels, 1, 1)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    proto.graph.node.insert(0, helper.make_node("Div", [centred, f"{given.name}.std"], [normalised], "normalise"))
    proto.graph.node.insert(0, helper.make_node("Sub", [given.name, f"{given.name}.mean"], [centred], "centre"))
