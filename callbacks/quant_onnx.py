"""A quantised network in ONNX: the rounding as QuantizeLinear and DequantizeLinear, the weights as their codes.

What: `translation` tells torch's exporter how to write `micronet::fake_quantize`; `store_codes` puts codes in the place
of weights. Those of convolutions are stored in 8 bits, which a runtime multiplies fast: narrower ones stretched by a
power of two and their step sizes shrunk by it, which changes no product; onnxruntime rounds biases to units of input
step times weight step, and those of 4-bit codes are too coarse. Narrower inputs are cut to their range by a Clip on the
codes. Linear layers of 4 bits and fewer are stored in 4 and run on them (MatMulNBits): of 512 inputs and 1000 outputs
one image took 0.06 ms, in 8 bits with weights made real at each run 0.14. With `int4` all codes of 4 bits and fewer are
stored in 4 (opset 21): a file of about half the size, whose convolutions onnxruntime computes in float, several times
slower. Their biases are added behind them, where it does not round them.
When: `onnx_export.export_onnx` does it for a network with quantised layers. `integer_kernels.py` makes it fast.
Cost: none beside the export.
Source: the ONNX specification, QuantizeLinear of opsets 13 and 21; halves are rounded to even there, as in torch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from callbacks.fake_quantize import LEAST, act_range

INT4_OPSET = 21
NARROW = 4
_MICROSOFT = "com.microsoft"


def translation(int4: bool) -> dict[Any, Callable[..., Any]]:
    """How torch's exporter writes the rounding.

    Args:
        int4: whether codes of 4 bits and fewer are stored in 4.
    """
    from onnx import TensorProto, helper
    from onnxscript import opset18, opset21

    op = opset21 if int4 else opset18

    def constant(kind: int, number: float) -> Any:
        return op.Constant(value=helper.make_tensor("", kind, [], [number]))

    def fake_quantize(x: Any, scale: Any, low: int, high: int) -> Any:
        if len(scale.shape):  # weights, one step size a row: `store_codes` does it once and for all
            codes = op.QuantizeLinear(x, scale, constant(TensorProto.INT8, 0), axis=0)
            codes = op.Clip(codes, constant(TensorProto.INT8, low), constant(TensorProto.INT8, high))
            return op.DequantizeLinear(codes, scale, axis=0)
        # Clip knows no codes of 4 bits: inputs that don't fill these are cut in 8.
        if int4 and (low, high) == act_range(NARROW, low < 0):
            # A zero point of 4 bits behind a Clip, as of ReLU6, makes onnxruntime 1.31 fail: here is none.
            kind = (TensorProto.UINT4, TensorProto.INT4)[low < 0]
            return op.DequantizeLinear(op.QuantizeLinear(x, scale, output_dtype=kind), scale)
        kind = (TensorProto.UINT8, TensorProto.INT8)[low < 0]
        zero = constant(kind, 0)
        codes = op.QuantizeLinear(x, scale, zero)
        if (low, high) != act_range(8, low < 0):
            codes = op.Clip(codes, constant(kind, low), constant(kind, high))
        return op.DequantizeLinear(codes, scale, zero)

    return {torch.ops.micronet.fake_quantize.default: fake_quantize}


def store_codes(proto: Any, int4: bool) -> Any:
    """Put codes in the place of weights that `translation` rounds, in place: a file holds them and nothing wider.

    Args:
        proto: an `onnx.ModelProto`, as torch's exporter gives it.
        int4: whether codes of 4 bits and fewer are stored in 4.
    """
    from onnx import numpy_helper

    graph = proto.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    constants = tensors | {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant"}
    makers = {node.output[0]: node for node in graph.node}
    gone: dict[int, Any] = {}
    stored: dict[str, Any] = {}
    made: dict[tuple[str, ...], tuple[str, str]] = {}
    products = _products(graph)
    for node in graph.node:
        cut = makers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        rounds = makers.get(cut.input[0]) if cut is not None and cut.op_type == "Clip" else None
        if rounds is None or rounds.op_type != "QuantizeLinear" or rounds.input[0] not in tensors:
            continue
        key = (*rounds.input[:2], *cut.input[1:])
        if key not in made:
            weight, step, low, high = (numpy_helper.to_array(constants[name]) for name in key)
            codes = weight_codes(weight, step, int(low), int(high))
            narrow = int(high) < 1 << (NARROW - 1) and (int4 or node.output[0] in products)
            stretch = 1 if narrow else 128 // (int(high) + 1)
            # Two layers whose weights are equal have one tensor here, and perhaps other step sizes.
            made[key] = tuple(name if name not in stored else f"{name}#{len(made) + 1}" for name in key[:2])
            stored[made[key][0]] = code_tensor(made[key][0], codes * np.int8(stretch), narrow)
            stored[made[key][1]] = numpy_helper.from_array(step / np.float32(stretch), made[key][1])
        node.input[:2] = made[key]
        gone |= {id(cut): cut, id(rounds): rounds}
    for node in gone.values():
        graph.node.remove(node)
    _packed_products(proto, stored, products)
    if int4:
        _bias_apart(graph, tensors, stored)
    _keep_read(graph, stored)
    return proto


def weight_codes(weight: np.ndarray, step: np.ndarray, low: int, high: int) -> np.ndarray:
    """The codes of weights, int8, as `fake_quantize.round_to_codes` has them."""
    step = np.maximum(step, np.float32(LEAST)).reshape(-1, *[1] * (weight.ndim - 1))
    return np.clip(np.rint(weight / step), low, high).astype(np.int8)


def _bias_apart(graph: Any, tensors: Mapping[str, Any], stored: dict[str, Any]) -> None:
    """Add biases of convolutions behind them: inside, onnxruntime rounds them to input step times weight step."""
    from onnx import helper, numpy_helper

    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        graph.node.append(node)
        if node.op_type != "Conv" or len(node.input) < 3 or node.input[2] not in tensors:
            continue
        conv, name, (out,) = graph.node[-1], node.input[2], node.output
        bias = numpy_helper.to_array(tensors[name])
        shape = (1, -1, *[1] * len(_said(node)["kernel_shape"]))
        stored[f"{name}.apart"] = numpy_helper.from_array(bias.reshape(shape), f"{name}.apart")
        del conv.input[2]
        conv.output[0] = f"{out}/product"
        graph.node.append(helper.make_node("Add", [conv.output[0], f"{name}.apart"], [out]))


def _said(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _products(graph: Any) -> dict[str, list[Any]]:
    """Linear layers that MatMulNBits can stand for, by the name of weights that nothing else reads."""
    readers: dict[str, list[tuple[Any, int]]] = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, place))
    found = {}
    for name, reading in readers.items():
        nodes: list[Any] = []
        for node, place in reading:
            if node.op_type == "Transpose" and list(_said(node).get("perm", ())) == [1, 0]:  # of more than two axes
                last = readers.get(node.output[0], [])
                nodes += [reader if reader.op_type == "MatMul" and at == 1 else None for reader, at in last]
            else:
                nodes.append(node if place == 1 and _is_linear(node) else None)
        if nodes and None not in nodes:
            found[name] = nodes
    return found


def _is_linear(node: Any) -> bool:
    """Whether a node multiplies with the transpose of its weights, and at most adds a bias."""
    said = _said(node) if node.op_type == "Gemm" else {}
    plain = all(said.get(name, 1.0) == 1.0 for name in ("alpha", "beta")) and not said.get("transA")
    return plain and bool(said.get("transB"))


def _packed_products(proto: Any, stored: dict[str, Any], products: Mapping[str, list[Any]]) -> None:
    """Write linear layers of 4-bit weights as onnxruntime's MatMulNBits.

    A MatMul of weights made real becomes one by itself, but not where its input was codes, too.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = proto.graph
    for real in [node for node in graph.node if node.output[0] in products]:
        codes = stored.get(real.input[0]) if real.op_type == "DequantizeLinear" else None
        if codes is None or codes.data_type != TensorProto.INT4:
            continue
        block = block_size(codes.dims[1])
        name, scale = f"{codes.name}.packed", f"{real.input[1]}.blocks"
        packed = pack_blocks(numpy_helper.to_array(codes).astype(np.int8), block)
        stored[name] = numpy_helper.from_array(packed, name)
        steps = np.repeat(numpy_helper.to_array(stored[real.input[1]]), packed.shape[1])
        stored[scale] = numpy_helper.from_array(steps, scale)
        attributes = {"K": codes.dims[1], "N": codes.dims[0], "bits": NARROW, "block_size": block}
        for node in products[real.output[0]]:
            bias = node.input[2:] if node.op_type == "Gemm" else ()
            inputs = [node.input[0], name, scale, *(("", "", *bias) if bias else ())]
            new = helper.make_node("MatMulNBits", inputs, node.output, node.name, domain=_MICROSOFT, **attributes)
            node.CopyFrom(new)
        if _MICROSOFT not in {opset.domain for opset in proto.opset_import}:
            proto.opset_import.append(helper.make_opsetid(_MICROSOFT, 1))
    for kind in ("Transpose", "DequantizeLinear"):  # what nobody reads any more, readers first
        read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        for node in [n for n in graph.node if n.op_type == kind and n.output[0] not in read]:
            graph.node.remove(node)


def block_size(inputs: int) -> int:
    """How many weights of a row share a step size in MatMulNBits: 16 to 256, a power of two, for the fewest bytes."""
    # A block is padded with zeros, and has a step size of 32 bits; of the same bytes, fewer blocks.
    return min((256, 128, 64, 32, 16), key=lambda block: -(-inputs // block) * (block // 2 + 4))


def pack_blocks(codes: np.ndarray, block: int) -> np.ndarray:
    """Codes of 4 bits as MatMulNBits reads them: 8 added, two in a byte, the first one low.

    Args:
        codes: int8, **shape** `(N, K)`, from -8 to 7.
        block: weights that share a step size.

    Returns:
        uint8, `(N, blocks, block / 2)`; places beyond K are zeros.
    """
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % block)))
    pairs = (padded + 8).astype(np.uint8).reshape(len(codes), -1, block // 2, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def code_tensor(name: str, codes: np.ndarray, narrow: bool) -> Any:
    """Codes as a tensor of ONNX.

    Args:
        name: its name.
        codes: int8.
        narrow: whether they take 4 bits each: two in a byte, the first one low.
    """
    from onnx import TensorProto, helper

    kind, raw = TensorProto.INT8, np.ascontiguousarray(codes).tobytes()
    if narrow:
        pairs = np.pad(codes.ravel(), (0, codes.size % 2)).view(np.uint8).reshape(-1, 2) & 15
        kind, raw = TensorProto.INT4, (pairs[:, 0] | pairs[:, 1] << 4).tobytes()
    return helper.make_tensor(name, kind, codes.shape, raw, raw=True)


def _keep_read(graph: Any, stored: dict[str, Any]) -> None:
    """Store what was made, and of the rest what is still read."""
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read and tensor.name not in stored]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *(tensor for name, tensor in stored.items() if name in read)])
