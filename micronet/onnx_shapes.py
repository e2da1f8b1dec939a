"""What is known of an ONNX graph's tensors before it runs: shapes, types, and the numbers that shapes are made of.

Node by node, as the reader comes to them: the shape of a tensor whose shape is known is a constant, so are sums and
slices of it, and so is what a Reshape is told by them. What onnx cannot infer, the file may state; what it does not
state, onnxruntime is asked for, which runs zeros through the network.
"""

import math

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, ValueInfoProto, helper, numpy_helper

from callbacks.graph import Shape
from micronet.errors import first_line
from micronet.onnx_file import OnnxFile, width

MOST_ZEROS = 2**28  # numbers of the inputs: a gigabyte
SMALL = 1024
"""Elements of a constant that may say something about shapes."""

STANDARD = ("", "ai.onnx")
"""Names of ONNX's own domain."""


_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


def kind_of(node: NodeProto) -> str:
    """What a node does, by ONNX's name; another domain's operators have its name before theirs."""
    return node.op_type if node.domain in STANDARD else f"{node.domain}.{node.op_type}"


def _static(kind: TypeProto) -> bool:
    return kind.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in kind.tensor_type.shape.dim)


def _read(graph: GraphProto) -> set[str]:
    """What anybody reads."""
    found = {name for node in graph.node for name in node.input} | {info.name for info in graph.output}
    return found.union(*(_read(a.g) for node in graph.node for a in node.attribute if a.HasField("g")))


class Shapes:
    """Shapes, types and small constants of a graph's tensors, by their names.

    Args:
        file: the file.
        inputs: shape and type of each input.
        batch: images that the file was written for at once, where their count is fixed.
    """

    def __init__(self, file: OnnxFile, inputs: dict[str, TypeProto], batch: int = 1) -> None:
        self.file, self.inputs, self.batch = file, inputs, batch
        self.types = dict(inputs)
        self.arrays: dict[str, np.ndarray] = {}
        self.opsets = {opset.domain: opset.version for opset in file.model.opset_import}
        self.opset = max(self.opsets.get(domain, 0) for domain in STANDARD) or 1
        self.graph = file.model.graph
        self.observed: dict[str, TypeProto] = {}
        self.unread = {name for node in self.graph.node for name in node.output} - _read(self.graph)
        self.declared = {info.name: info.type for info in (*self.graph.value_info, *self.graph.output)}

    def enter(self, name: str) -> None:
        """Take in one of the file's arrays."""
        self.types[name] = helper.make_tensor_type_proto(self.file.kind(name), self.file.shape(name))
        if name in self.file.tensors and math.prod(self.file.shape(name)) <= SMALL:
            self.arrays[name] = self.file.array(name)

    def enter_array(self, name: str, array: np.ndarray) -> None:
        """Take in a constant that follows from shapes."""
        self.types[name] = helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        if array.size <= SMALL:
            self.arrays[name] = array

    def shape(self, name: str) -> Shape:
        """Shape of a tensor."""
        return tuple(d.dim_value for d in self.types[name].tensor_type.shape.dim)

    def kind(self, name: str) -> int:
        """Number of a tensor's type in ONNX."""
        return self.types[name].tensor_type.elem_type

    def bits(self, name: str) -> int:
        """Bits of one element of a tensor."""
        return width(self.kind(name))

    def outputs(self, node: NodeProto) -> list[str]:
        """What a node gives and somebody reads: nothing else has to be known."""
        return [name for name in node.output if name and name not in self.unread]

    def infer(self, node: NodeProto) -> None:
        """Find out the shapes and types of what a node gives, and its numbers where they follow from shapes.

        Raises:
            MicronetError: There is no telling.
        """
        outs = self.outputs(node)
        kind = kind_of(node)
        if kind in ("QuantizeLinear", "DequantizeLinear"):
            self.types[outs[0]] = self._recoded(node)
        elif kind in ("Shape", "Size"):
            said = {a.name: a.i for a in node.attribute}
            shape = np.array(self.shape(node.input[0]), np.int64)
            part = shape[said.get("start", 0) : said.get("end")]
            self.enter_array(outs[0], part if kind == "Shape" else np.array(shape.prod(), np.int64))
        else:
            known = node.domain in STANDARD and all(self._is_number(name) for name in node.input if name)
            types = self._inferred(node, outs)
            small = types and all(
                math.prod(d.dim_value for d in t.tensor_type.shape.dim) <= SMALL for t in types.values()
            )
            if known and (small or kind == "NonZero") and self._evaluate(node, outs):
                return
            types = types or {name: self.observed[name] for name in outs if name in self.observed}
            self.types |= types or self._stated(outs) or self._observed(node, outs)

    def _recoded(self, node: NodeProto) -> TypeProto:
        said = {a.name: a.i for a in node.attribute}
        if node.op_type == "QuantizeLinear":
            default = said.get("output_dtype") or TensorProto.UINT8
            kind = self.kind(node.input[2]) if len(node.input) > 2 and node.input[2] else default
        else:
            kind = self.kind(node.input[1]) if node.input[1] else TensorProto.FLOAT
        return helper.make_tensor_type_proto(kind, self.shape(node.input[0]))

    def _inferred(self, node: NodeProto, outs: list[str]) -> dict[str, TypeProto]:
        """What onnx infers; nothing where that is not all."""
        if node.domain not in STANDARD or not onnx.defs.has(node.op_type):
            return {}
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opset)
        except onnx.defs.SchemaError:  # newer than the file says: onnxruntime's tools write such nodes
            schema = onnx.defs.get_schema(node.op_type)
        given = [name for name in node.input if name]
        data = {name: numpy_helper.from_array(self.arrays[name]) for name in given if name in self.arrays}
        kinds = {name: self.types[name] for name in given}
        opset = helper.make_opsetid("", max(self.opset, schema.since_version))
        try:
            types = onnx.shape_inference.infer_node_outputs(schema, node, kinds, data, opset_imports=[opset])
        except Exception:  # the C++ code behind it throws whatever it likes; onnxruntime says what is wrong
            return {}
        return {name: types[name] for name in outs} if all(n in types and _static(types[n]) for n in outs) else {}

    def _is_number(self, name: str) -> bool:
        """Whether a tensor is a known constant, and no text: patterns on text can take for ever."""
        return name in self.arrays and self.arrays[name].dtype.kind not in "OSU"

    def _evaluate(self, node: NodeProto, outs: list[str]) -> bool:
        """Compute a node on small constants."""
        from onnx.reference import ReferenceEvaluator

        given = list(dict.fromkeys(name for name in node.input if name))
        opsets = [helper.make_opsetid("", self.opset)]
        function = helper.make_function("micronet", "constant", given, outs, [node], opsets)
        try:
            results = ReferenceEvaluator(function).run(None, {name: self.arrays[name] for name in given}, {})
        except Exception:  # an operator or type that the evaluator lacks: only the shape is known then
            return False
        for name, result in zip(outs, results, strict=True):
            self.enter_array(name, np.asarray(result))
        return True

    def _stated(self, outs: list[str]) -> dict[str, TypeProto]:
        """What the file itself says; nothing where that is not all."""
        names = {
            d.dim_param: self.inputs[info.name].tensor_type.shape.dim[axis].dim_value
            for info in self.graph.input
            if info.name in self.inputs
            for axis, d in enumerate(info.type.tensor_type.shape.dim)
            if d.dim_param
        }
        found = {}
        for out in outs:
            kind = self.declared.get(out)
            if kind is None or not kind.tensor_type.HasField("shape"):
                return {}
            sizes = [
                d.dim_value if d.HasField("dim_value") else names.get(d.dim_param) for d in kind.tensor_type.shape.dim
            ]
            if sizes and sizes[0] == self.batch:
                sizes[0] = 1
            if None in sizes:
                return {}
            found[out] = helper.make_tensor_type_proto(kind.tensor_type.elem_type, sizes)
        return found

    def _observed(self, node: NodeProto, outs: list[str]) -> dict[str, TypeProto]:
        """What onnxruntime gives for zeros, for all nodes of this kind at once."""
        import onnxruntime as ort

        if sum(math.prod(self.shape(name)) for name in self.inputs) > MOST_ZEROS:
            told = f"the shape of what {node.op_type} gives cannot be told: its images are too large to be tried"
            raise self.file.error(f"{told}; give a smaller --input-size")
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        same = [name for n in self.graph.node if n.op_type == node.op_type for name in n.output if name]
        wanted = list(dict.fromkeys([*same, *outs]))
        model, feeds = self._bare(wanted)
        try:
            # Its own way to try again prints.
            session = ort.InferenceSession(
                model.SerializeToString(), options, ["CPUExecutionProvider"], enable_fallback=0
            )
            results = session.run(wanted, feeds)
        except Exception as error:  # onnxruntime's errors have no base class of their own
            told = f"the shape of what {node.op_type} ({node.name or outs[0]!r}) gives cannot be told"
            raise self.file.error(f"{told}: {first_line(error)}; export it again") from error
        for name, result in zip(wanted, results, strict=True):
            if not isinstance(result, np.ndarray):
                raise self.file.error(f"{node.op_type} ({name!r}) gives no tensor; export it without lists of tensors")
            kind = helper.np_dtype_to_tensor_dtype(result.dtype)
            self.observed[name] = helper.make_tensor_type_proto(kind, result.shape)
        return {name: self.observed[name] for name in outs}

    def _bare(self, wanted: list[str]) -> tuple[ModelProto, dict[str, np.ndarray]]:
        """The model that gives some tensors, and zeros for its inputs; weights are inputs, too, and so not copied."""
        model, feeds = ModelProto(), {}
        model.CopyFrom(self.file.model)
        for listed in (model.graph.input, model.graph.output, model.graph.value_info):
            del listed[:]
        given = {name for n in self.graph.node for name in n.output}  # by Constant nodes
        for name, tensor in self.file.tensors.items():
            if math.prod(tensor.dims) > SMALL and tensor.data_type in _FLOATS:
                feeds[name] = np.zeros(tuple(tensor.dims), helper.tensor_dtype_to_np_dtype(tensor.data_type))
            elif name not in given:
                model.graph.initializer.append(numpy_helper.from_array(self.file.array(name), name))
        for name, kind in self.inputs.items():
            feeds[name] = np.zeros(self.shape(name), helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type))
        for name, zeros in feeds.items():
            kind = helper.np_dtype_to_tensor_dtype(zeros.dtype)
            model.graph.input.append(helper.make_tensor_value_info(name, kind, zeros.shape))
        model.graph.output.extend(ValueInfoProto(name=name) for name in wanted)
        model.ir_version = max(model.ir_version, 4)  # before 4, an initializer had to be an input, too
        return model, feeds
