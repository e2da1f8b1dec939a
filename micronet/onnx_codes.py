"""What is quantised in an ONNX graph: which tensors are held as codes, in which scheme, and what that stores.

A tensor's name may stand for real numbers while its value is the codes: that is what DequantizeLinear gives here. Who
computes on codes reads the value; for anybody else `real` makes numbers of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto

from callbacks.graph import Node, Value
from callbacks.op_formulas import VIEWS
from micronet.onnx_file import OnnxFile
from micronet.onnx_names import Names
from micronet.onnx_shapes import Shapes

LAYERS = ("conv2d", "conv_transpose2d", "linear", "matmul", "addmm")
_KEEPS = (*VIEWS, "move", "max_pool")  # makes no other numbers of the codes
_ON_CODES = (*LAYERS, *_KEEPS, "avg_pool", "global_avg_pool")
WHOLE = (TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL)


@dataclass(frozen=True)
class Scheme:
    """How codes stand for real numbers.

    Args:
        scale: name of the scale; empty where it follows from others.
        zero: name of the zero point; empty for zero.
        axis: the axis that they are given along.
        block: how many codes along the axis share one; 0 for one for each place.
        mixed: whether the codes are in several schemes.
    """

    scale: str = ""
    zero: str = ""
    axis: int = 1
    block: int = 0
    mixed: bool = False


def _scheme(node: NodeProto) -> Scheme:
    said = {a.name: a.i for a in node.attribute}
    zero = node.input[2] if len(node.input) > 2 else ""
    return Scheme(node.input[1], zero, said.get("axis", 1), said.get("block_size", 0))


def _spread(array: np.ndarray, scheme: Scheme, like: np.ndarray) -> np.ndarray:
    """A scale or zero point for each code."""
    if scheme.block and array.ndim == like.ndim:
        return np.take(np.repeat(array, scheme.block, scheme.axis), range(like.shape[scheme.axis]), scheme.axis)
    if array.size == 1:
        return array.reshape(())
    return array.reshape([-1 if axis == scheme.axis % like.ndim else 1 for axis in range(like.ndim)])


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes that lie side by side in the bytes of each row, the lowest bits first."""
    rows = packed.reshape(len(packed), -1, 1) >> (bits * np.arange(8 // bits, dtype=np.uint8))
    return (rows & ((1 << bits) - 1)).reshape(len(packed), -1)


class Codes:
    """Knows a graph's codes.

    Args:
        file: the file.
        shapes: what is known of its tensors.
        values: the reader's values.
        names: names its nodes.
        emit: enters an operation.
    """

    def __init__(
        self, file: OnnxFile, shapes: Shapes, values: dict[str, Value], names: Names, emit: Callable[[Node], None]
    ) -> None:
        self.file, self.shapes, self.values, self.names, self.emit = file, shapes, values, names, emit
        self.schemes: dict[str, Scheme] = {}  # of tensors that are real numbers, held as codes
        self.sources: dict[str, NodeProto] = {}  # what made them real
        self.reals: dict[tuple[int, Scheme], Value] = {}
        self.entered: dict[str, Value] = {}

    def quantise(self, node: NodeProto) -> None:
        """Read a QuantizeLinear."""
        name, out, scheme = node.input[0], node.output[0], _scheme(node)
        value, held = self.values[name], self.schemes.get(name)
        if held and self._same(held, scheme):  # codes that were only moved
            self.values[out] = value
            return
        codes = Value(shape=value.shape, bits=self.shapes.bits(out), fixed=value.fixed, names=value.names)
        self.values[out] = codes
        if value.fixed:  # weights that the file keeps as real numbers
            if name in self.file.tensors:
                codes.nonzero = self.file.counter(name, lambda: self._rounded(name, scheme))
            return
        attrs = {"zero_point": self._shifts(scheme), "extra": self.stored(scheme)}
        title = self.names(node, "quantize")
        self.emit(Node(op="quantize", inputs=(value,), outputs=(codes,), attrs=attrs, name=title, module=node.op_type))

    def dequantise(self, node: NodeProto) -> None:
        """Read a DequantizeLinear: nothing is done until somebody needs real numbers."""
        name, out, scheme = node.input[0], node.output[0], _scheme(node)
        codes = self.values[out] = self.values[name]
        self.schemes[out], self.sources[out] = scheme, node
        if codes.fixed and name in self.file.tensors and self._shifts(scheme):
            codes.nonzero = self.file.counter(name, lambda: self._shifted(name, scheme))

    def real(self, name: str) -> Value:
        """A tensor's value for who computes on real numbers; constants are made real beforehand."""
        value, scheme = self.values[name], self.schemes.get(name)
        if scheme is None or value.fixed:
            return value
        key = id(value), scheme
        if key not in self.reals:
            node, attrs = self.sources[name], {"zero_point": self._shifts(scheme), "extra": self.stored(scheme)}
            numbers = self.reals[key] = Value(shape=value.shape, bits=value.bits)
            outputs, title = (numbers,), self.names(node, "dequantize")
            self.emit(
                Node(op="dequantize", inputs=(value,), outputs=outputs, attrs=attrs, name=title, module=node.op_type)
            )
        return self.reals[key]

    def read_by(self, op: str, names: list[str]) -> bool:
        """Whether an operation computes on codes: all that it computes with must be codes."""
        main = [name for name in (names[:2] if op in LAYERS else names) if name]
        coded = [name in self.schemes or (op not in LAYERS and self._places(name)) for name in main]
        return op in _ON_CODES and any(name in self.schemes for name in main) and all(coded)

    def kept_by(self, op: str, names: list[str]) -> Scheme | None:
        """The scheme of what an operation on codes gives; None where its sums are codes no more."""
        if op not in _KEEPS:
            return None
        schemes = [self.schemes[name] for name in names if name in self.schemes]
        return schemes[0] if all(self._same(schemes[0], other) for other in schemes) else Scheme(mixed=True)

    def pass_on(self, out: str, scheme: Scheme, node: NodeProto) -> None:
        """Say that a tensor is held as codes."""
        self.schemes[out], self.sources[out] = scheme, node

    def extra(self, op: str, names: list[str], inputs: tuple[Value, ...], on_codes: bool) -> tuple[Value, ...]:
        """What an operation stores to read its codes."""
        found: list[Value] = []
        for index, name in enumerate(names):
            scheme = self.schemes.get(name)
            bias = op in LAYERS and index == 2
            if scheme is None or (bias and self._derived(scheme, names)):
                continue
            # Codes that an operation gave have their scale and zero point stored there.
            if self.values[name].fixed or (on_codes and self.values[name].memory() in inputs):
                found += self.stored(scheme)
        return tuple(dict.fromkeys(found))

    def stored(self, scheme: Scheme) -> tuple[Value, ...]:
        """The scale, and the zero point unless it is zero: one value each, however often they are read."""
        shifts = scheme.zero if self._shifts(scheme) else ""
        found = []
        for name, role in ((scheme.scale, "scale"), (shifts, "zero_point")):
            if name and self.values[name].fixed:
                if name not in self.entered:
                    shape, bits = self.values[name].shape, self.shapes.bits(name)
                    self.entered[name] = Value(shape=shape, bits=bits, fixed=True, names=(name,), role=role)
                found.append(self.entered[name])
        return tuple(found)

    def _array(self, name: str) -> np.ndarray | None:
        return self.file.array(name) if name in self.file.tensors else self.shapes.arrays.get(name)

    def _shifts(self, scheme: Scheme) -> bool:
        if not scheme.zero:
            return scheme.mixed
        array = self._array(scheme.zero)
        return array is None or bool(np.any(array))

    def _same(self, one: Scheme, other: Scheme) -> bool:
        if one.mixed or other.mixed:
            return False
        pairs = ((self._array(one.scale), self._array(other.scale)), (self._array(one.zero), self._array(other.zero)))
        return one == other or all(a is not None and b is not None and np.array_equal(a, b) for a, b in pairs)

    def _places(self, name: str) -> bool:
        """Whether a tensor says where numbers are, and is none of them."""
        return self.values[name].fixed and self.shapes.kind(name) in WHOLE

    def _derived(self, bias: Scheme, names: list[str]) -> bool:
        """Whether a bias is in units of the products: its scale is the input's times the weights'."""
        if not bias.scale:
            return True
        schemes = [self.schemes.get(name) for name in names[:2]]
        scales = [self._array(scheme.scale) if scheme else None for scheme in (*schemes, bias)]
        if any(scale is None for scale in scales):
            return False
        x, weight, own = (np.ravel(scale).astype(np.float64) for scale in scales)
        fits = len({x.size, weight.size, own.size} - {1}) <= 1
        return fits and np.allclose(own, x * weight, rtol=1e-5, atol=0)

    def _shifted(self, name: str, scheme: Scheme) -> np.ndarray:
        codes = self.file.array(name)
        return codes != _spread(self._array(scheme.zero), scheme, codes)

    def _rounded(self, name: str, scheme: Scheme) -> np.ndarray:
        numbers = self.file.array(name)
        return np.rint(numbers / _spread(self._array(scheme.scale), scheme, numbers))
