"""The time of each node of an ONNX file, from what onnxruntime's profiler wrote.

onnxruntime fuses nodes and rearranges memory before it runs a graph: the nodes are those that run, under the names that
it gives them, not those of the file. What it makes of a name tells which node of the file it began with, and that one's
weights tell the layer.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from micronet.errors import MicronetError

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

_END = "_kernel_time"
_ARRAY = re.compile(r"(.+)\.(?:weight|bias)[^.]*(?:\.apart)?")  # conv1.weight, conv1.weight_quantized, conv1.bias.apart
_TENSOR = re.compile(r"(.+?)(?:_bn)?_nchwc")  # a node is named after its result where it is rearranged by blocks
_NODE = re.compile(r"(.+?)(?:_token_\d+)?")  # fused around a node of the file, or put in its place
# What onnxruntime fuses into the convolution before it; the result is then the activation's.
_ACTIVATIONS = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "Tanh"})
_CUT = 0.25  # share of the runs that is left out at either end: times come in whole microseconds, a median would, too


def read_profile(path: Path) -> list[dict[str, Any]]:
    """Read a profile: the time of each node, the mean of the middle half of its runs, the slowest node first.

    Args:
        path: the JSON file that onnxruntime's profiler wrote.

    Returns:
        For each node: `name`, `op`, `out` (**shape** of its output, with a batch axis), `seconds`, and `share` of all.

    Raises:
        MicronetError: it holds no node.
    """
    nodes: dict[tuple[str, str], dict[str, Any]] = {}
    for event in json.loads(path.read_text()):
        if event.get("cat") != "Node" or not event["name"].endswith(_END):
            continue
        told = event["args"]
        name = event["name"].removesuffix(_END)
        node = nodes.setdefault((told.get("node_index", ""), name), {"name": name, "op": told["op_name"], "times": []})
        node["out"] = next((shape for kind in told.get("output_type_shape", []) for shape in kind.values()), [])
        node["times"].append(event["dur"] / 1e6)
    if not nodes:
        raise MicronetError("onnxruntime's profiler told of no node")
    for node in nodes.values():
        times = sorted(node.pop("times"))
        cut = int(_CUT * len(times))
        node["seconds"] = float(np.mean(times[cut : len(times) - cut]))
    total = sum(node["seconds"] for node in nodes.values()) or 1.0
    found = [node | {"share": node["seconds"] / total} for node in nodes.values()]
    return sorted(found, key=lambda node: -node["seconds"])


class Layers:
    """Tells which layer of the network a node belongs to that onnxruntime runs.

    Args:
        graph: the file's; its nodes have names.
    """

    def __init__(self, graph: "GraphProto") -> None:
        self._arrays = {tensor.name for tensor in graph.initializer}
        self._makers = {result: node for node in graph.node for result in node.output if result}
        self._nodes = {node.name: node for node in graph.node}

    def __call__(self, name: str) -> str:
        """The path of a layer, such as `layer1.0.conv2`; empty where the name does not lead to one.

        Args:
            name: as the profiler has it.
        """
        tensor = _TENSOR.fullmatch(name)
        if tensor:
            return self._behind(tensor[1])
        node = self._nodes.get(name) or self._nodes.get(_NODE.fullmatch(name)[1])
        return self._of(node) if node is not None else ""

    def _of(self, node: "NodeProto") -> str:
        """The layer whose weights a node reads, as numbers or as codes."""
        for name in node.input:
            maker = self._makers.get(name)
            if maker is not None and maker.op_type == "DequantizeLinear":
                name = maker.input[0]
            told = _ARRAY.fullmatch(name) if name in self._arrays else None
            if told:
                return told[1]
        return ""

    def _behind(self, tensor: str) -> str:
        """The layer that a tensor comes from, by way of activations; a pooling is none, and its time is its own."""
        node = self._makers.get(tensor)
        while node is not None:
            layer = self._of(node)
            if layer or node.op_type not in _ACTIVATIONS:
                return layer
            node = self._makers.get(node.input[0])
        return ""


def with_names(path: Path, folder: Path) -> tuple[Path, Layers]:
    """A file whose nodes all have names, by which they are told apart when they run, and what tells their layers.

    Args:
        path: the ONNX file.
        folder: where to write such a file, where some have none; one that keeps its arrays in others stays as it is.
    """
    from onnx import TensorProto

    from micronet.onnx_file import load_proto

    model = load_proto(path)
    apart = any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer)
    nameless = [(place, node) for place, node in enumerate(model.graph.node) if not node.name]
    if nameless and not apart:
        for place, node in nameless:
            node.name = f"{node.op_type}_{place}"
        path = folder / "named.onnx"
        path.write_bytes(model.SerializeToString())
    return path, Layers(model.graph)
