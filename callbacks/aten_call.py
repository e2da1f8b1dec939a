"""One call of an ATen operation in an exported graph, with its arguments by their names in ATen's schema."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from callbacks.graph import Shape


def tensor_of(node: Node) -> Tensor | None:
    """The tensor a node gives, or the first of several."""
    value = node.meta.get("val")
    return next((v for v in value if isinstance(v, Tensor)), None) if isinstance(value, tuple | list) else value


def shape_of(node: Node) -> Shape:
    """The shape of the tensor that a node gives."""
    return tuple(tensor_of(node).shape)


@dataclass(frozen=True)
class Call:
    """One call in the graph.

    Args:
        op: Its name in ATen, without the underscore of what runs in place.
        in_place: Whether it had that underscore.
        node: Its node.
        args: The arguments by name, defaults filled in.
        out: **Shape** of what it gives.
    """

    op: str
    in_place: bool
    node: Node
    args: dict[str, Any]
    out: Shape

    @classmethod
    def of(cls, node: Node) -> "Call":
        """Read a node."""
        schema = node.target._schema
        name = schema.name.removeprefix("aten::").replace("::", ".")
        given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
        args = {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema.arguments}
        return cls(op=name.rstrip("_"), in_place=name.endswith("_"), node=node, args=args, out=shape_of(node))

    def shape(self, arg: str) -> Shape:
        """The shape of an argument, by its name in ATen's schema."""
        return shape_of(self.args[arg])

    def nodes(self, *names: str) -> list[Node | None]:
        """Arguments as nodes: None for what is not given or is a number."""
        return [a if isinstance(a := self.args.get(name), Node) else None for name in names]

    def all_nodes(self) -> list[Node]:
        """Everything it reads, lists of tensors too."""
        return list(self.node.all_input_nodes)
