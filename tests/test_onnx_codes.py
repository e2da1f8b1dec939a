"""Quantised ONNX graphs: codes, what they store, and one network written in two ways."""

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_graphs import MS, F, live, node, ones, ops, random, save
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from callbacks.ledger import build
from micronet.onnx_cost import read_onnx


@pytest.fixture
def read(tmp_path):
    """Write a graph and read it."""

    def made(*nodes, size=None, **arguments):
        return read_onnx(save(tmp_path / "made.onnx", nodes, **arguments), size)

    return made


def q(name, source, scale, zero, target):
    return node("QuantizeLinear", f"{source} {scale} {zero}", target, name=name)


def dq(source, scale, zero, target, **attrs):
    return node("DequantizeLinear", f"{source} {scale} {zero}", target, **attrs)


class _Images(CalibrationDataReader):
    def __init__(self):
        self.images = iter([{"x": random(1, 3, 8, 8) - 0.3} for _ in range(2)])

    def get_next(self):
        return next(self.images, None)


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """One network quantised as QDQ and as QOperator."""
    folder = tmp_path_factory.mktemp("quantised")
    nodes = [
        node("Conv", "x w1 b1", "c1", pads=[1] * 4),
        node("Relu", "c1", "r1"),
        node("Conv", "r1 w2 b2", "c2", pads=[1] * 4, group=2),
        node("Add", "c2 r1", "a"),
        node("MaxPool", "a", "m", kernel_shape=[2, 2], strides=[2, 2]),
        node("Sigmoid", "m", "s"),
        node("Mul", "s m", "p"),
        node("Concat", "p m", "cat", axis=1),
        node("AveragePool", "cat", "v", kernel_shape=[2, 2]),
        node("GlobalAveragePool", "v", "g"),
        node("Flatten", "g", "f"),
        node("Gemm", "f w3 b3", transB=1),
    ]
    arrays = {"w1": random(4, 3, 3, 3), "b1": random(4), "w2": random(4, 2, 3, 3) - 0.5, "b2": random(4)}
    path = save(folder / "float.onnx", nodes, **arrays, w3=random(5, 8), b3=random(5))
    for form in (QuantFormat.QDQ, QuantFormat.QOperator):
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(path, folder / f"{form.name}.onnx", _Images(), quant_format=form, per_channel=True, **kinds)
    return folder


def test_one_network_quantised_in_two_forms_costs_the_same(twice):
    qdq, qoperator = (build(read_onnx(twice / f"{form}.onnx")) for form in ("QDQ", "QOperator"))
    real = build(read_onnx(twice / "float.onnx"))
    kinds = Counter(n.op_type for n in onnx.load(twice / "QOperator.onnx").graph.node)
    assert kinds["QLinearConv"] == 2
    assert kinds["QLinearConcat"] == kinds["QGemm"] == kinds["QLinearAdd"] == kinds["QLinearGlobalAveragePool"] == 1

    def layers(ledger):
        lines = [line for line in ledger.lines if line.op in ("conv2d", "linear")]
        return [
            (x.op, x.mults, x.adds, x.macs, x.weights, x.nonzero, x.weight_bits, x.act_bits, x.out_shape) for x in lines
        ]

    def everything(ledger):
        return Counter((x.op, x.mults, x.adds, x.act_bits, x.in_shape, x.out_shape) for x in ledger.lines)

    assert layers(qdq) == layers(qoperator)
    assert [line[1:5] for line in layers(qdq)] == [line[1:5] for line in layers(real)]
    assert {line[6:8] for line in layers(qdq)} == {(8, 8)}
    assert everything(qdq) == everything(qoperator)
    # The two forms name the scales after different tensors.
    stored = [Counter((a.role, a.shape, a.bits, a.nonzero) for a in ledger.arrays) for ledger in (qdq, qoperator)]
    assert stored[0] == stored[1]


def test_what_a_quantised_layer_stores_are_codes_biases_scales_and_zero_points_that_are_not_zero(twice):
    graph = read_onnx(twice / "QDQ.onnx")
    first, second = (n for n in live(graph) if n.op == "conv2d")
    codes, bias = first.inputs[1:]
    assert (codes.shape, codes.bits, codes.names) == ((4, 3, 3, 3), 8, ("w1_quantized",))
    assert (bias.bits, bias.names) == (32, ("b1_quantized",))  # its scale is the product of the other two
    assert [(v.names, v.bits, v.role, v.shape) for v in first.attrs["extra"]] == [(("w1_scale",), 32, "scale", (4,))]
    assert second.inputs[0].bits == 8
    assert second.out.bits == 32
    entry = graph.nodes[0]
    assert (entry.op, entry.inputs[0], entry.out.bits) == ("quantize", graph.inputs[0], 8)
    assert [(v.names, v.role, v.bits) for v in entry.attrs["extra"]] == [
        (("x_scale",), "scale", 32),
        (("x_zero_point",), "zero_point", 8),
    ]


ZERO, SCALE = np.uint8(0), np.float32(0.5)


def test_codes_that_are_only_moved_are_not_quantised_again(read):
    moved = [q("q", "x", "s", "z", "c"), dq("c", "s", "z", "d"), node("MaxPool", "d", "m", kernel_shape=[2, 2])]
    arrays = {"s": SCALE, "z": ZERO, "t": np.float32(0.25), "w": ones(1, 3, 1, 1)}
    again = [*moved, node("Flatten", "m", "f"), q("q2", "f", "s", "z", "c2"), dq("c2", "s", "z", "y")]
    graph = read(*again, **arrays)
    assert ops(graph) == ["quantize", "max_pool", "reshape", "dequantize"]
    assert [n.out.bits for n in graph.nodes] == [8] * 4
    other = [*moved, q("q2", "m", "t", "z", "c2"), dq("c2", "t", "z", "y")]
    assert ops(read(*other, **arrays)) == ["quantize", "max_pool", "quantize", "dequantize"]


def test_what_computes_on_real_numbers_reads_them_once_and_layers_read_codes(read):
    codes = np.ones((3, 3, 1, 1), np.int8)
    nodes = [q("q", "x", "s", "z", "c"), dq("c", "s", "z", "d"), dq("wq", "s", "z8", "w"), node("Conv", "d w", "v")]
    nodes += [node("Sigmoid", "d", "g"), node("Mul", "v g", "h"), node("Mul", "h d")]
    graph = read(*nodes, s=SCALE, z=np.uint8(3), z8=np.int8(0), wq=codes)
    by_op = {n.op: n for n in live(graph)}
    assert Counter(ops(graph)) == {"quantize": 1, "conv2d": 1, "dequantize": 1, "sigmoid": 1, "mul": 2}
    assert by_op["conv2d"].inputs[0] is by_op["quantize"].out is by_op["dequantize"].inputs[0]
    assert by_op["sigmoid"].inputs[0] is by_op["mul"].inputs[1] is by_op["dequantize"].out
    assert by_op["dequantize"].out.bits == 8
    assert by_op["quantize"].attrs["zero_point"] is True
    # One scale for all: it is stored once.
    assert len({id(v) for n in graph.nodes for v in n.attrs.get("extra", ()) if v.names == ("s",)}) == 1


def test_a_layer_computes_on_real_numbers_where_one_factor_is_not_quantised(read):
    coded = [q("q", "x", "s", "z", "c"), dq("c", "s", "z", "d"), node("Conv", "d w")]
    assert ops(read(*coded, s=SCALE, z=ZERO, w=ones(5, 3, 1, 1))) == ["quantize", "dequantize", "conv2d"]
    only_weights = [dq("wq", "s", "z", "w"), node("Conv", "x w")]
    (conv,) = live(read(*only_weights, s=SCALE, z=np.int8(0), wq=np.ones((5, 3, 1, 1), np.int8)))
    assert (conv.inputs[0].bits, conv.inputs[1].bits) == (32, 8)


def test_a_bias_with_a_scale_of_its_own_stores_it(read):
    nodes = [q("q", "x", "s", "z", "c"), dq("c", "s", "z", "d"), dq("wq", "ws", "wz", "w", axis=0)]
    nodes += [dq("bq", "bs", "bz", "b", axis=0), node("Conv", "d w b")]
    arrays = {"s": SCALE, "z": ZERO, "wq": np.ones((2, 3, 1, 1), np.int8), "ws": random(2), "wz": np.zeros(2, np.int8)}
    arrays |= {"bq": np.ones(2, np.int32), "bz": np.zeros(2, np.int32)}
    for scale, names in ((0.5 * random(2), ["ws"]), (0.6 * random(2), ["ws", "bs"])):
        conv = live(read(*nodes, **arrays, bs=scale.astype(np.float32)))[-1]
        assert [v.names[0] for v in conv.attrs["extra"]] == names
        assert conv.inputs[2].bits == 32


def test_a_code_at_its_zero_point_is_a_zero(read):
    codes = np.array([[3, 3, 1], [0, 3, 0]], np.uint8)
    nodes = [dq("wq", "ws", "wz", "w", axis=0), node("MatMul", "w x")]
    for zero, count in (([3, 0], 2), ([3, 3], 3)):
        graph = read(*nodes, shape=("N", 3, 4), wq=codes, ws=random(2), wz=np.array(zero, np.uint8))
        (linear,) = live(graph)
        assert linear.inputs[1].nonzero() == count
        assert [v.role for v in linear.attrs["extra"]] == ["scale", "zero_point"]


def test_four_bit_weights_are_four_bits_wide(read):
    codes = helper.make_tensor("wq", TensorProto.INT4, (6, 8), [i % 3 - 1 for i in range(48)])
    nodes = [dq("wq", "ws", "", "w", axis=0, block_size=3), node("Transpose", "w", "t"), node("MatMul", "x t")]
    graph = read(*nodes, opset=21, shape=("N", 8), wq=codes, ws=random(2, 8))
    (linear,) = live(graph)
    assert (linear.inputs[1].bits, linear.inputs[1].shape) == (4, (8, 6))
    (line,), arrays = build(graph).lines, {a.name: a for a in build(graph).arrays}
    assert (line.weight_bits, line.weights, line.macs, line.nonzero) == (4, 48, 48, 32)
    assert (arrays["wq"].bits, arrays["ws"].shape, arrays["ws"].role) == (4, (2, 8), "scale")


def test_matmulnbits_is_a_linear_layer(read):
    codes = np.random.default_rng(0).integers(0, 16, (5, 32), np.uint8)  # 5 outputs, 24 inputs in two blocks of 16
    codes[:, 24:] = 8
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).reshape(5, 2, 8)
    product = node("MatMulNBits", "x b s", "y", domain=MS, K=24, N=5, bits=4, block_size=16)
    (linear,) = live(read(product, shape=("N", 7, 24), b=packed, s=random(10)))
    assert (linear.op, linear.out.shape, linear.attrs["taps"]) == ("linear", (1, 7, 5), 24)
    weight = linear.inputs[1]
    assert (weight.numel, weight.bits, weight.names) == (120, 4, ("b",))
    assert weight.nonzero() == np.count_nonzero(codes[:, :24] != 8)
    assert [(v.names, v.bits) for v in linear.attrs["extra"]] == [(("s",), 32)]


def test_integer_products_with_dynamic_scales_read_codes(read):
    nodes = [node("DynamicQuantizeLinear", "x", "c s z"), node("MatMulInteger", "c wq z wz", "i")]
    nodes += [node("Cast", "i", "f", to=F), node("Mul", "s ws", "t"), node("Mul", "f t")]
    arrays = {"wq": np.ones((6, 5), np.int8), "wz": np.int8(2), "ws": SCALE}
    graph = read(*nodes, shape=("N", 6), **arrays)
    linear = next(n for n in graph.nodes if n.op == "linear")
    assert (linear.inputs[0].bits, linear.inputs[1].bits, linear.out.bits) == (8, 8, 32)
    assert [v.names for v in linear.attrs["extra"]] == [("wz",)]
    assert next(n for n in graph.nodes if n.op == "quantize").attrs["zero_point"]
    build(graph)


def test_real_weights_that_are_quantised_on_the_way_count_as_codes(read):
    weights = random(5, 3, 1, 1)
    weights[0] = 0.001
    nodes = [q("q", "w", "s", "z", "c"), dq("c", "s", "z", "d"), node("Conv", "x d")]
    (conv,) = live(read(*nodes, s=SCALE, z=np.int8(0), w=weights))
    assert (conv.inputs[1].bits, conv.inputs[1].names) == (8, ("w",))
    assert conv.inputs[1].nonzero() == np.count_nonzero(np.rint(weights / 0.5))


def test_an_image_of_codes_has_its_scale_stored_where_it_is_read(read):
    nodes = [dq("x", "s", "z", "d"), dq("wq", "ws", "wz", "w"), node("Conv", "d w", "c"), node("Relu", "c")]
    arrays = {"s": SCALE, "z": np.uint8(9), "ws": SCALE, "wz": np.int8(0), "wq": np.ones((2, 3, 1, 1), np.int8)}
    graph = read(*nodes, kind=TensorProto.UINT8, **arrays)
    conv, _ = live(graph)
    assert (graph.inputs[0].bits, conv.inputs[0]) == (8, graph.inputs[0])
    assert [v.names[0] for v in conv.attrs["extra"]] == ["s", "z", "ws"]
