"""A network as its operations and the tensors between them, whatever it was read from: torch or ONNX.

Readers (`op_trace.py` for torch, `micronet/onnx_cost.py` for ONNX) bring their own vocabulary to this one; `ledger.py`
folds and counts. `op_formulas.py` says which operations there are and what each costs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]


@dataclass(eq=False, kw_only=True)
class Value:
    """A tensor: the image, what an operation gives, or a constant. Two values are the same only if they are one object.

    Args:
        shape: **Shape**, with a batch axis of 1 where it has a batch axis.
        bits: Width of one element, as it is computed with or stored.
        fixed: Whether it is known before an image comes: a parameter, buffer, initializer or literal.
        literal: Whether it is part of the program, as `0.5 * x` is, and not of what a file must hold.
        names: The parameters, buffers or initializers that it is made of.
        root: The value whose numbers these are, in another shape or order; None for its own.
        nonzero: Counts its non-zero elements; None where nobody knows them (meta tensors).
        masked: Whether its zeros are declared by a mask, or None where nothing can declare them.
        role: What a file would call it: `scale`, `zero_point`; empty where its reader says so.
        storage: The value whose memory this one lives in (a view, an in-place result); None for its own.
        written: Whether something that depends on the image is written into its memory.
    """

    shape: Shape
    bits: int = 32
    fixed: bool = False
    literal: bool = False
    names: tuple[str, ...] = ()
    root: "Value | None" = None
    nonzero: Callable[[], int] | None = None
    masked: bool | None = None
    role: str = ""
    storage: "Value | None" = None
    written: bool = False

    @property
    def numel(self) -> int:
        """Count of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes that it takes while it lives: codes of less than a byte take one."""
        return self.numel * -(-self.bits // 8)

    def original(self) -> "Value":
        """The value whose numbers these are."""
        return self if self.root is None else self.root.original()

    def memory(self) -> "Value":
        """The value whose memory this one lives in."""
        return self if self.storage is None else self.storage.memory()


@dataclass(eq=False, kw_only=True)
class Node:
    """One operation.

    Args:
        op: Its name in `op_formulas.FORMULAS`; any other name is an operation without a rule.
        inputs: What it reads, in the order that the formula of `op` states; None where an optional one is absent.
        outputs: What it gives.
        attrs: What the formula needs beyond the shapes.
        name: Path of the module that runs it, such as `groups.0.conv1`, or the name of the ONNX node.
        module: Class of that module: `Conv2d`; the operator's type in ONNX.
        in_place: Whether it writes into what it reads, so that it matters though nothing reads what it gives.
    """

    op: str
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    module: str = ""
    in_place: bool = False

    @property
    def out(self) -> Value:
        """The first output."""
        return self.outputs[0]

    @property
    def n(self) -> int:
        """Count of elements of the first output."""
        return self.outputs[0].numel

    @property
    def data(self) -> Value:
        """The first input that depends on the image; the first one where none does, the output where there is none."""
        given = [value for value in self.inputs if value is not None]
        return next((value for value in given if not value.fixed), (given or [self.out])[0])


@dataclass(kw_only=True)
class Graph:
    """A network.

    Args:
        nodes: In the order in which they run.
        inputs: The images, or whatever it takes.
        outputs: What it gives.
        params: Count of all parameters as its author counts them; None where there is no telling (ONNX).
    """

    nodes: list[Node]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    params: int | None = None

    @property
    def input_size(self) -> tuple[Any, ...]:
        """**Shape** of one image without its batch axis; a tuple of them where there are several inputs."""
        sizes = tuple(value.shape[1:] if value.shape[:1] == (1,) else value.shape for value in self.inputs)
        return sizes[0] if len(sizes) == 1 else sizes
