"""The time of each node of an ONNX file, from what onnxruntime's profiler wrote.

onnxruntime fuses nodes and rearranges memory before it runs a graph: the nodes are those that run, under the names that
it gives them, not those of the file.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from micronet.errors import MicronetError

_END = "_kernel_time"
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
