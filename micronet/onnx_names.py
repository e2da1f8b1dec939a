"""Names of an ONNX graph's nodes, as the network's source has them where the file tells: paths of modules."""

import ast
import re

from onnx import NodeProto

_SCOPES = "pkg.torch.onnx.name_scopes"


def _scope(node: NodeProto) -> str:
    """Path of the module that a node comes from, as torch's two exporters note it; empty where neither did."""
    for prop in node.metadata_props:
        if prop.key == _SCOPES:
            try:
                scopes = ast.literal_eval(prop.value)
                return str(scopes[-2]).split("@")[0] if len(scopes) > 1 else ""  # conv@1 is the second call of conv
            except (ValueError, SyntaxError, TypeError):
                return ""
    if not node.name.startswith("/"):
        return ""
    path = ""
    for part in node.name.strip("/").split("/")[:-1]:  # /layer1/layer1.0/conv1/Conv
        path = part if part.startswith(f"{path}.") else f"{path}.{part}".lstrip(".")
    return path


class Names:
    """Names nodes.

    Args:
        nodes: all nodes of the graph.
    """

    def __init__(self, nodes: list[NodeProto]) -> None:
        paths = {_scope(node) for node in nodes}
        # A module that holds others; what it does in its own forward is named after the operation, too.
        self.parents = {path[:i] for path in paths for i, letter in enumerate(path) if letter == "."} | {""}
        self.counts: dict[str, int] = {}
        self.taken: dict[str, str] = {}

    def __call__(self, node: NodeProto, op: str, weights: tuple[str, ...] = ()) -> str:
        """Name what a node does.

        Args:
            node: the node.
            op: the operation.
            weights: names of the arrays that its weights are made of.
        """
        path = _scope(node)
        for weight in weights:
            module = re.fullmatch(r"(.+)\.weight[^.]*", weight)
            # It names the first of the layers that share it.
            if module and self.taken.setdefault(module[1], path) == path:
                return module[1]
        if (path or node.name) and op in ("quantize", "dequantize"):  # part of no layer
            return f"{path or node.name}.{op}"
        if path:
            return f"{path}.{op}" if path in self.parents else path
        if node.name:
            return node.name
        self.counts[op] = self.counts.get(op, 0) + 1
        return f"{op}_{self.counts[op]}"
