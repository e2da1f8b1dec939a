"""An ONNX file, opened: its graph, and its arrays where they lie. Nothing of it is run, nothing is written.

The arrays stay what they are in the file until somebody asks for one: large files are not held twice, and what a file
keeps in a second one is read only from its own folder.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError, Message
from onnx import ModelProto, NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from callbacks.graph import Shape
from micronet.errors import MicronetError, first_line

MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What reading goes wrong with where a file says what no exporter writes: inputs missing, text for numbers."""

MOST_NODES, MOST_DEPTH = 100_000, 100
"""Nodes of a network with its functions written out, and functions within functions: a few bytes can be any number."""

_WIDTHS = {"FLOAT": 32, "DOUBLE": 64, "BOOL": 1, "COMPLEX64": 64, "COMPLEX128": 128}


def width(kind: int) -> int:
    """Bits of one element of a type of ONNX, by the type's number."""
    name = TensorProto.DataType.Name(kind)
    digits = re.search(r"\d+", name)
    return _WIDTHS.get(name) or (int(digits.group()) if digits else 8)


@dataclass
class OnnxFile:
    """A file's graph, taken apart.

    Args:
        path: the file.
        model: the model with its functions written out, without its initializers.
        tensors: initializers, and what Constant nodes hold, by name.
        sparse: initializers that list their non-zero elements only.
        external: size of each second file that a tensor has named.
        size: of the file, bytes.
    """

    path: Path
    model: ModelProto
    tensors: dict[str, TensorProto] = field(default_factory=dict)
    sparse: dict[str, SparseTensorProto] = field(default_factory=dict)
    external: dict[str, int] = field(default_factory=dict)
    size: int = 0

    def error(self, message: str) -> MicronetError:
        """The error that this file is at fault for."""
        return MicronetError(f"{self.path}: {' '.join(message.split())}")  # names may hold anything

    def enter(self, tensor: TensorProto, name: str) -> None:
        """Enter an array under a name; one in a second file is seen to be there."""
        if any(size < 0 for size in tensor.dims) or tensor.data_type not in TensorProto.DataType.values():
            raise self.error(f"{name!r} has a size or a type that ONNX does not know; export the file again")
        if tensor.data_location == TensorProto.EXTERNAL:
            place, start = self._place(tensor, name)
            if start + self._bytes(tensor) > self.external[str(place)]:
                raise self.error(f"{name!r} is cut short in {place.name!r}; copy or export it again")
        elif math.prod(tensor.dims) > 8 * self.size:  # before anything of that size is made
            raise self.error(f"{name!r} claims {math.prod(tensor.dims):,} numbers, more than it holds; export it again")
        self.tensors[name] = tensor

    def shape(self, name: str) -> Shape:
        """Shape of an array."""
        return tuple(self.sparse[name].dims if name in self.sparse else self.tensors[name].dims)

    def kind(self, name: str) -> int:
        """Number of an array's type in ONNX."""
        return (self.sparse[name].values if name in self.sparse else self.tensors[name]).data_type

    def array(self, name: str) -> np.ndarray:
        """Read an array."""
        tensor = self.tensors[name]
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        place, start = self._place(tensor, name)
        if tensor.data_type == TensorProto.BOOL or width(tensor.data_type) >= 8:
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            return np.fromfile(place, dtype, math.prod(tensor.dims), offset=start).reshape(tensor.dims)
        raw = np.fromfile(place, np.uint8, self._bytes(tensor), offset=start).tobytes()
        return numpy_helper.to_array(TensorProto(dims=tensor.dims, data_type=tensor.data_type, raw_data=raw))

    def _bytes(self, tensor: TensorProto) -> int:
        bits = 8 if tensor.data_type == TensorProto.BOOL else width(tensor.data_type)
        return -(-math.prod(tensor.dims) * bits // 8)

    def counter(self, name: str, read: Callable[[], np.ndarray]) -> Callable[[], int]:
        """A function that counts what is not zero in what is made of an array, when it is called."""

        def count() -> int:
            try:
                return int(np.count_nonzero(read()))
            except MALFORMED as error:
                told = f"{name!r} cannot be read: {first_line(error)}; copy or export the file again"
                raise self.error(told) from error

        return count

    def listed(self, name: str) -> np.ndarray:
        """Read an array; of a sparse one, the elements that it lists."""
        return numpy_helper.to_array(self.sparse[name].values) if name in self.sparse else self.array(name)

    def _place(self, tensor: TensorProto, name: str) -> tuple[Path, int]:
        """Where an array lies in a second file: the file, and its first byte there."""
        said = {entry.key: entry.value for entry in tensor.external_data}
        location = said.get("location", "")
        folder = self.path.parent.resolve()
        place = (folder / location).resolve()
        if Path(location).is_absolute() or ".." in Path(location).parts or not place.is_relative_to(folder):
            raise self.error(f"{name!r} lies outside the file's own folder, in {location!r}; put the data beside it")
        if str(place) not in self.external:
            if not place.is_file():
                raise self.error(
                    f"{location!r}, the file with the data of {name!r}, is missing; put it beside this one"
                )
            self.external[str(place)] = place.stat().st_size
        start = said.get("offset") or "0"
        if not start.isdecimal():
            raise self.error(f"{name!r} does not say where in {location!r} it lies; export the file again")
        return place, int(start)


def load_proto(path: Path) -> ModelProto:
    """Read a file as it is, without what it keeps in others.

    Args:
        path: the file.

    Raises:
        MicronetError: it is not ONNX, or holds no network.
    """
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except OSError as error:
        raise MicronetError(f"{path}: {error.strerror or first_line(error)}; give the path of an ONNX file") from error
    except DecodeError as error:
        raise MicronetError(f"{path}: not an ONNX file, or one cut short; copy or export it again") from error
    if not model.ir_version or not model.graph.output or not model.opset_import:
        raise MicronetError(f"{path}: not an ONNX file, or one without a network; give the path of an ONNX file")
    if not all(isinstance(text, str) for text in _texts(model)):  # protobuf gives bytes where they are no UTF-8
        raise MicronetError(f"{path}: damaged: its names are no text; copy or export it again")
    return model


def _texts(message: Message) -> Iterator[str | bytes]:
    """All names and other texts of a message and of those within it."""
    for field_, value in message.ListFields():
        parts = [value] if isinstance(value, str | bytes | Message) else value
        if field_.type == field_.TYPE_STRING:
            yield from parts
        elif field_.type == field_.TYPE_MESSAGE:
            for part in parts:
                yield from _texts(part)


def open_onnx(path: Path) -> OnnxFile:
    """Open a file.

    Args:
        path: the file.

    Raises:
        MicronetError: it is not ONNX, not whole, or keeps data where it must not.
    """
    model = load_proto(path)
    file = OnnxFile(path, model, size=path.stat().st_size)
    try:
        for tensor in model.graph.initializer:
            file.enter(tensor, tensor.name)
        file.sparse = {sparse.values.name: sparse for sparse in model.graph.sparse_initializer}
    except MALFORMED as error:
        raise file.error(f"its arrays are not as ONNX has them: {first_line(error)}; export it again") from error
    # The arrays live on in `file`; what is left of the model is small enough to be handed about.
    model.graph.ClearField("initializer")
    model.graph.ClearField("sparse_initializer")
    if model.functions:
        _check_functions(file)
        try:
            file.model = onnx.inliner.inline_local_functions(model, convert_version=True)
        except Exception as error:  # the C++ code behind it throws whatever it likes
            raise file.error(f"its functions cannot be written out: {first_line(error)}; export it again") from error
    return file


def _check_functions(file: OnnxFile) -> None:
    """Refuse functions that call themselves, which onnx would write out for ever, and those that call too many others.

    Raises:
        MicronetError: they do.
    """
    bodies = {(function.domain, function.name): function.node for function in file.model.functions}
    sizes: dict[tuple[str, str], int] = {}
    open_ones: list[tuple[str, str]] = []

    def size(nodes: Iterable[NodeProto]) -> int:
        total = 0
        for node in nodes:
            total += 1 + sum(size(body.node) for a in node.attribute for body in (*a.graphs, a.g))
            called = (node.domain, node.op_type)
            if called in open_ones:
                raise file.error(f"its function {node.op_type!r} calls itself; export it again")
            if len(open_ones) > MOST_DEPTH:
                raise file.error("its functions call each other too deep; export it without them")
            if called in bodies and called not in sizes:
                open_ones.append(called)
                sizes[called] = size(bodies[called])
                open_ones.pop()
            total += sizes.get(called, 0)
        if total > MOST_NODES:
            raise file.error(f"its functions are more than {MOST_NODES:,} nodes written out; export it without them")
        return total

    size(file.model.graph.node)
