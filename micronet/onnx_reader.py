"""An ONNX graph, node by node, as `callbacks/graph.py`'s operations and values.

See `onnx_cost.py` for what is counted how.
"""

import math
import re
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from callbacks.graph import Graph, Node, Value
from micronet.errors import first_line
from micronet.onnx_codes import LAYERS, WHOLE, Codes, Scheme, unpack
from micronet.onnx_file import MALFORMED, OnnxFile
from micronet.onnx_names import Names
from micronet.onnx_ops import RULES, Call
from micronet.onnx_rewrite import Writer, rewrite
from micronet.onnx_shapes import Shapes, kind_of

# Results that live in the memory of what they are made of, as torch has it.
_SHARED = ("Dropout", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
# Operations named after their weights.
_NAMED = (*LAYERS, "batch_norm", "layer_norm", "rms_norm", "prelu")
# Elements of whole numbers that are taken for sizes, axes or places where they are calculated with.
_FEW = 16
# What torch's exporter calls its own constants.
_OWN = re.compile(r"val_\d+")


class Reader:
    """Reads a graph in the order in which it runs.

    Args:
        file: the file.
        shapes: what is known of its tensors.
    """

    def __init__(self, file: OnnxFile, shapes: Shapes) -> None:
        self.file, self.shapes = file, shapes
        self.names = Names(list(file.model.graph.node))
        self.nodes: list[Node] = []
        self.makers: dict[int, Node] = {}
        self.values = {name: Value(shape=shapes.shape(name), bits=shapes.bits(name)) for name in shapes.inputs}
        self.inputs = tuple(self.values.values())
        self.codes = Codes(file, shapes, self.values, self.names, self.emit)

    def graph(self) -> Graph:
        """Read it all; what nothing needs is left out."""
        for node in self.file.model.graph.node:
            try:
                self.read(node)
            except MALFORMED as error:
                told = f"{node.op_type} ({node.name or node.output[:1]}) is not what ONNX calls one"
                raise self.file.error(f"{told}: {first_line(error)}; export the file again") from error
        for info in self.file.model.graph.output:
            self.value(info.name)
        results = tuple(self.codes.real(info.name) for info in self.file.model.graph.output)
        if self.shapes.batch > 1 and any(value.shape[:1] != (1,) for value in results):
            raise self.file.error(f"it is made for {self.shapes.batch} images at once; export it with a batch of 1")
        needed, kept = {id(value) for value in results}, []
        for node in reversed(self.nodes):
            if any(id(out) in needed for out in node.outputs):
                needed |= {id(value) for value in node.inputs if value is not None}
                kept.append(node)
        return Graph(nodes=kept[::-1], inputs=self.inputs, outputs=results)

    def value(self, name: str, reader: str = "the graph") -> Value:
        """The value of a tensor; an array of the file is entered when it is first read."""
        if name not in self.values:
            if name not in self.file.tensors and name not in self.file.sparse:
                raise self.file.error(f"{reader} reads {name!r}, which nothing gives; export the file again")
            self.shapes.enter(name)
            shape = self.shapes.shape(name)
            self.values[name] = Value(
                shape=shape,
                bits=self.shapes.bits(name),
                fixed=True,
                literal=not shape or (math.prod(shape) == 1 and bool(_OWN.fullmatch(name))),
                names=(name,),
                nonzero=self.file.counter(name, lambda: self.file.listed(name)),
            )
        return self.values[name]

    def read(self, node: NodeProto) -> None:
        """Read one node."""
        kind = kind_of(node)
        if kind == "If":
            self.branch(node)
        elif any(a.HasField("g") or a.graphs for a in node.attribute):
            raise self.file.error(f"{kind} ({node.name!r}) repeats what is in it; export it without loops")
        elif kind == "com.microsoft.MatMulNBits":
            self.packed(node)
        else:
            for plain in rewrite(node):
                self.plain(plain)

    def plain(self, node: NodeProto) -> None:
        """Read a node that is one operation."""
        if not self.shapes.outputs(node):
            return
        kind = kind_of(node)
        if kind == "Constant":
            self.constant(node)
            return
        for name in filter(None, node.input):
            self.value(name, kind)
        if self.shapes.batch > 1:
            node = self.of_one_image(node)
        self.shapes.infer(node)
        coded = kind in ("QuantizeLinear", "DequantizeLinear")
        if kind in ("Shape", "Size") or all(self.literal(n, not coded) for n in node.input if n):
            for name in self.shapes.outputs(node):
                self.values[name] = self.new(name, fixed=True, literal=True)
        elif kind == "QuantizeLinear":
            self.codes.quantise(node)
        elif kind == "DequantizeLinear":
            self.codes.dequantise(node)
        else:
            self.operation(node)

    def literal(self, name: str, whole: bool) -> bool:
        """Whether a tensor is part of the program: its numbers, its sizes and what follows from them."""
        value = self.values[name]
        few = whole and value.fixed and self.shapes.kind(name) in WHOLE and value.numel <= _FEW
        return value.literal or few

    def new(self, name: str, **known: Any) -> Value:
        """A value for a tensor whose shape is known."""
        return Value(shape=self.shapes.shape(name), **{"bits": self.shapes.bits(name)} | known)

    def constant(self, node: NodeProto) -> None:
        """A constant among the nodes: part of the program where it is one number."""
        (said,), name = node.attribute, node.output[0]
        if said.name == "sparse_value":
            self.file.sparse[name] = said.sparse_tensor
        elif said.name == "value":
            self.file.enter(said.t, name)
        else:
            array = np.array(helper.get_attribute_value(said))
            kinds = {"f": np.float32, "i": np.int64}
            self.file.tensors[name] = numpy_helper.from_array(array.astype(kinds.get(array.dtype.kind, array.dtype)))
        value = self.value(name)
        value.literal = value.numel == 1

    def branch(self, node: NodeProto) -> None:
        """An If whose condition is constant: one of its branches runs."""
        self.value(node.input[0], "If")
        condition = self.shapes.arrays.get(node.input[0])
        if condition is None:
            raise self.file.error(f"If ({node.name!r}) decides by the image what runs; export it without branches")
        said = {a.name: a.g for a in node.attribute}
        body = said["then_branch" if condition.all() else "else_branch"]
        for tensor in body.initializer:
            self.file.enter(tensor, tensor.name)
        for inner in body.node:
            self.read(inner)
        for inner, name in zip(body.output, node.output, strict=True):
            self.values[name] = self.value(inner.name, "If")
            self.alias(name, inner.name)

    def alias(self, name: str, of: str) -> None:
        """Give a tensor another name, too."""
        for table in (self.shapes.types, self.shapes.arrays, self.codes.schemes, self.codes.sources):
            if of in table:
                table[name] = table[of]

    def of_one_image(self, node: NodeProto) -> NodeProto:
        """A node that names the count of images, for a file that is made for several at once."""
        if node.op_type not in ("Reshape", "Expand") or self.values[node.input[0]].fixed:
            return node
        target = self.shapes.arrays.get(node.input[1])
        if target is None or not target.size or target[0] <= 0 or target[0] % self.shapes.batch:
            return node
        name, one = f"{node.output[0]}/of one image", target.copy()
        one[0] //= self.shapes.batch
        self.shapes.enter_array(name, one)
        self.values[name] = self.new(name, fixed=True, literal=True)
        changed = NodeProto()
        changed.CopyFrom(node)
        changed.input[1] = name
        return changed

    def packed(self, node: NodeProto) -> None:
        """A linear layer whose weights' codes lie side by side in bytes: MatMulNBits."""
        said = {a.name: a.i for a in node.attribute}
        x, weight, scale, zero, _, bias = [*node.input, "", "", "", ""][:6]
        outputs, inputs, bits, block = said["N"], said["K"], said.get("bits", 4), said["block_size"]
        for name in filter(None, (x, weight, scale, zero, bias)):
            self.value(name, node.op_type)

        def unequal() -> np.ndarray:
            codes, zeros = unpack(self.file.array(weight), bits)[:, :inputs], np.array([[1 << (bits - 1)]])
            if zero:
                zeros = unpack(self.file.array(zero).reshape(outputs, -1), bits)
                zeros = np.repeat(zeros, block, axis=1)[:, :inputs]
            return codes != zeros

        name, write = f"{weight}/codes", Writer(node)
        known = not zero or self.shapes.kind(zero) == TensorProto.UINT8
        # As real numbers, which MatMul multiplies: what it gives can be inferred.
        self.shapes.types[name] = helper.make_tensor_type_proto(TensorProto.FLOAT, (inputs, outputs))
        self.values[name] = Value(
            shape=(inputs, outputs),
            bits=bits,
            fixed=True,
            names=(weight,),
            nonzero=self.file.counter(weight, unequal) if known else None,
        )
        self.codes.pass_on(name, Scheme(scale, zero), node)
        product = write("MatMul", x, name, out=None if bias else node.output[0])
        if bias:
            write("Add", product, bias, out=node.output[0])
        for plain in write.nodes:
            self.plain(plain)

    def operation(self, node: NodeProto) -> None:
        """Anything that computes or moves numbers."""
        call = Call(node, self.shapes, self.values, self.makers)
        kind = kind_of(node)
        op, names, attrs = RULES[kind](call) if kind in RULES else (kind.lower(), call.names(), {})
        on_codes = self.codes.read_by(op, names)
        inputs = tuple((self.values[n] if on_codes else self.codes.real(n)) if n else None for n in names)
        extra = self.codes.extra(op, names, self.inputs, on_codes)
        scheme = self.codes.kept_by(op, names) if on_codes else None
        given = [value for value in inputs if value is not None]
        fixed = all(value.fixed for value in given)
        made_of = tuple(dict.fromkeys(name for value in given if fixed for name in value.names))
        shared = kind in _SHARED or (kind == "Gather" and (op == "reshape" or inputs[1].numel == 1))
        outputs = []
        for name in self.shapes.outputs(node):
            value = self.new(name, fixed=fixed, names=made_of, storage=given[0] if shared else None)
            if scheme:
                value.bits = given[0].bits
                self.codes.pass_on(name, scheme, node)
            self.values[name] = value
            outputs.append(value)
        weights = inputs[1].names if op in _NAMED and len(inputs) > 1 and inputs[1] and inputs[1].fixed else ()
        self.emit(
            Node(
                op=op,
                inputs=inputs,
                outputs=tuple(outputs),
                attrs=attrs | ({"extra": extra} if extra else {}),
                name=self.names(node, op, weights),
                module=node.op_type,
            )
        )

    def emit(self, node: Node) -> None:
        """Enter an operation."""
        self.nodes.append(node)
        self.makers |= {id(value): node for value in node.outputs}
