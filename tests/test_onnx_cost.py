"""The ONNX reader's vocabulary, shapes and constants, on graphs made by hand."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import FLATTENED, F, live, node, ones, ops, random, save

from callbacks.ledger import UnknownOperation, build
from callbacks.op_formulas import FORMULAS
from micronet import MicronetError
from micronet.onnx_cost import read_onnx


@pytest.fixture
def read(tmp_path):
    """Write a graph and read it."""

    def made(*nodes, size=None, **arguments):
        return read_onnx(save(tmp_path / "made.onnx", nodes, **arguments), size)

    return made


MAPS = {"shape": ("N", 4, 6, 6)}
ROWS = {"shape": ("N", 6, 4)}
# Operator, inputs, attributes, arrays: the operation, and the attributes that its formula needs.
VOCABULARY = [
    ("Relu", "x", {}, {}, "relu", {}),
    ("LeakyRelu", "x", {}, {}, "leaky_relu", {}),
    ("HardSwish", "x", {}, {}, "hard_swish", {}),
    ("HardSigmoid", "x", {}, {}, "hard_sigmoid", {}),
    ("Ceil", "x", {}, {}, "floor", {}),
    ("PRelu", "x s", {}, {"s": ones(4, 1, 1)}, "prelu", {}),
    ("Clip", "x a b", {}, {"a": np.float32(0), "b": np.float32(6)}, "relu6", {}),
    ("Clip", "x a b", {}, {"a": np.float32(0), "b": np.float32(5)}, "clamp", {"bounds": 2}),
    ("Clip", "x a", {}, {"a": np.float32(0)}, "clamp", {"bounds": 1}),
    ("Add", "x s", {}, {"s": ones(4, 1, 1)}, "add", {}),
    ("Max", "x s", {}, {"s": ones(4, 1, 1)}, "maximum", {}),
    ("Greater", "x s", {}, {"s": ones(4, 1, 1)}, "compare", {}),
    ("Pow", "x s", {}, {"s": np.float32(3)}, "pow", {"exponent": 3.0}),
    ("Div", "x s", {}, {"s": ones(4, 1, 1)}, "div", {}),
    ("Mod", "x s", {"fmod": 1}, {"s": ones(4, 1, 1)}, "remainder", {}),
    ("Softmax", "x", {"axis": 1}, {}, "softmax", {"size": 4}),
    ("LogSoftmax", "x", {}, {}, "log_softmax", {"size": 6}),
    ("MaxPool", "x", {"kernel_shape": [2, 2], "strides": [2, 2]}, {}, "max_pool", {"terms": 4 * 36}),
    ("AveragePool", "x", {"kernel_shape": [3, 3], "pads": [1] * 4}, {}, "avg_pool", {"terms": 9 * 144}),
    ("AveragePool", "x", {"kernel_shape": [6, 6]}, {}, "global_avg_pool", {"terms": 144}),
    ("GlobalAveragePool", "x", {}, {}, "global_avg_pool", {"terms": 144}),
    ("GlobalMaxPool", "x", {}, {}, "max_pool", {"terms": 144}),
    ("ReduceMean", "x a", {}, {"a": [-1, -2]}, "global_avg_pool", {"terms": 144}),
    ("ReduceMean", "x a", {}, {"a": [1]}, "mean", {}),
    ("ReduceSum", "x a", {}, {"a": [1]}, "sum", {}),
    ("ReduceMax", "x a", {}, {"a": [1]}, "amax", {}),
    ("ArgMax", "x", {"axis": 1}, {}, "argmax", {}),
    ("Transpose", "x", {"perm": [0, 2, 3, 1]}, {}, "permute", {"perm": (0, 2, 3, 1)}),
    ("Transpose", "x", {}, {}, "permute", {"perm": (3, 2, 1, 0)}),
    ("Flatten", "x", {}, {}, "reshape", {}),
    ("Unsqueeze", "x a", {}, {"a": [2]}, "reshape", {}),
    ("Expand", "x a", {}, {"a": [1, 4, 6, 6]}, "reshape", {}),
    ("Tile", "x a", {}, {"a": [1, 2, 1, 1]}, "move", {}),
    ("Identity", "x", {}, {}, "identity", {}),
    ("Cast", "x", {"to": TensorProto.FLOAT16}, {}, "identity", {}),
    ("Cast", "x", {"to": TensorProto.INT32}, {}, "move", {}),
    ("Slice", "x a b", {}, {"a": [0, 0, 1, 0], "b": [9, 9, 3, 9]}, "move", {}),
    ("Pad", "x a", {}, {"a": [0, 0, 1, 1, 0, 0, 1, 1]}, "move", {}),
    ("DepthToSpace", "x", {"blocksize": 2}, {}, "move", {}),
    ("Resize", "x r a", {"mode": "nearest"}, {"r": ones(0), "a": ones(4) * 2}, "move", {}),
    ("Resize", "x r a", {"mode": "linear"}, {"r": ones(0), "a": ones(4) * 2}, "interpolate", {"taps": 4}),
    ("Resize", "x r a", {"mode": "cubic"}, {"r": ones(0), "a": ones(4) * 2}, "interpolate", {"taps": 16}),
    ("Conv", "x w b", {"group": 2}, {"w": ones(8, 2, 3, 3), "b": ones(8)}, "conv2d", {"groups": 2}),
    ("ConvTranspose", "x w", {"group": 2}, {"w": ones(4, 3, 3, 3)}, "conv_transpose2d", {"groups": 2}),
    ("BatchNormalization", "x s s s s", {}, {"s": ones(4)}, "batch_norm", {}),
    ("InstanceNormalization", "x s t", {}, {"s": random(4), "t": random(4)}, "layer_norm", {"size": 36}),
    ("LayerNormalization", "x s t", {}, {"s": ones(6), "t": ones(6)}, "layer_norm", {"size": 6}),
    ("MatMul", "x w", {}, {"w": ones(6, 5)}, "linear", {"taps": 6, "channel_axis": 3}),
    ("MatMul", "w x", {}, {"w": ones(5, 6)}, "linear", {"taps": 6, "channel_axis": 2}),
    ("MatMul", "x x", {}, {}, "matmul", {"taps": 6}),
    ("Einsum", "x x", {"equation": "nchw,nchv->ncwv"}, {}, "einsum", {"taps": 6}),
    ("Einsum", "x w", {"equation": "nchw,cd->ndhw"}, {"w": ones(4, 5)}, "linear", {"taps": 4, "channel_axis": None}),
]


@pytest.mark.parametrize("case", VOCABULARY, ids=lambda case: f"{case[0]}-{case[4]}")
def test_each_operator_becomes_its_operation_with_what_the_formula_needs(read, case):
    op, inputs, attrs, arrays, expected, needs = case
    (one,) = live(read(node(op, inputs, **attrs), **arrays, **MAPS))
    assert (one.op, {key: one.attrs[key] for key in needs}) == (expected, needs)
    FORMULAS[one.op](one)  # has all that it needs
    assert one.module == op


def test_the_group_and_root_mean_square_normalisations_of_newer_opsets(read):
    (one,) = live(read(node("GroupNormalization", "x s s", num_groups=2), opset=21, s=ones(4), **MAPS))
    assert (one.op, one.attrs) == ("layer_norm", {"size": 72})
    (one,) = live(read(node("RMSNormalization", "x s"), opset=23, s=ones(6), **MAPS))
    assert (one.op, one.attrs) == ("rms_norm", {"size": 6})


def test_gelu_says_whether_it_is_approximate(read):
    assert ops(read(node("Gelu", "x"), opset=20)) == ["gelu"]
    assert ops(read(node("Gelu", "x", approximate="tanh"), opset=20)) == ["gelu_tanh"]


def test_a_gemm_is_a_linear_layer_with_its_weight_whichever_way_it_lies(read):
    for flip, shape in ((1, (5, 4)), (0, (4, 5))):
        (one,) = live(read(node("Gemm", "x w b", transB=flip), shape=("N", 4), w=ones(*shape), b=ones(5)))
        assert (one.op, one.attrs["taps"], one.inputs[1].names, one.inputs[2].names) == ("linear", 4, ("w",), ("b",))
        assert FORMULAS["linear"](one).macs == 20


def test_a_mean_over_the_one_axis_that_maps_were_flattened_to_is_a_global_average_pool(read):
    flat, mean = node("Reshape", "x to", "f", allowzero=0), node("ReduceMean", "f a", keepdims=0)
    assert ops(read(flat, mean, to=[0, 3, -1], a=[2])) == ["reshape", "global_avg_pool"]
    assert ops(read(flat, mean, to=[0, 6, -1], a=[2])) == ["reshape", "mean"]


def test_operators_of_several_operations_are_written_out(read):
    assert ops(read(node("Sum", "x x x"))) == ["add", "add"]
    assert ops(read(node("Mean", "x x x"))) == ["add", "add", "mul"]
    assert ops(read(node("Max", "x x x"))) == ["maximum", "maximum"]
    assert ops(read(node("ReduceL1", "x a"), a=[1])) == ["abs", "sum"]
    assert ops(read(node("ReduceSumSquare", "x a"), a=[1])) == ["mul", "sum"]
    parts = live(read(node("LRN", "x", size=3)))
    assert [n.op for n in parts if n.op != "permute"] == ["mul", "avg_pool", "mul", "add", "pow", "div"]
    assert next(n for n in parts if n.op == "avg_pool").attrs["terms"] == 3 * 192


def test_softmax_before_opset_13_takes_all_axes_from_one_on(read):
    (one,) = live(read(node("Softmax", "x", axis=1), opset=11))
    assert one.attrs["size"] == 192


def test_old_opsets_say_as_attributes_what_new_ones_say_as_inputs(read):
    nodes = [node("Clip", "x", "c", min=0.0, max=6.0), node("ReduceMean", "c", axes=[2, 3], keepdims=0)]
    assert ops(read(*nodes, opset=10)) == ["relu6", "global_avg_pool"]


def test_what_a_network_does_not_need_is_left_out(read):
    assert ops(read(node("Relu", "x"), node("Exp", "x", "unused"))) == ["relu"]


# What folds into the layer before it.


def lines(graph):
    """Each operation's name, additions and whether it was folded."""
    return [(line.op, line.adds, line.folded is not None) for line in build(graph).lines]


def test_a_batch_norm_in_training_mode_is_computed_of_the_image_and_folds_into_nothing(read):
    conv, arrays = node("Conv", "x w", "h"), {"w": ones(4, 3, 1, 1), "s": random(4)}
    norm = [conv, node("BatchNormalization", "h s s s s", "y mean var", training_mode=1)]
    graph = read(*norm, **arrays)
    assert ops(graph) == ["conv2d", "layer_norm"]
    last = live(graph)[-1]
    assert (last.attrs, len(last.inputs), last.inputs[1].names) == ({"size": 64}, 3, ("s",))
    built = build(read(*norm, **arrays))
    assert [line.folded for line in built.lines] == [None, None]
    assert (built.lines[1].mults, built.lines[1].adds) == (3 * 256 + 4 * 4, 4 * 256 - 4)
    assert ops(read(conv, node("BatchNormalization", "h s s s s", training_mode=0), **arrays))[1] == "batch_norm"


def test_before_opset_14_a_batch_norm_with_more_outputs_is_in_training_mode(read):
    for outputs, op in (("y", "batch_norm"), ("y mean var saved_mean saved_var", "layer_norm")):
        assert ops(read(node("BatchNormalization", "x s s s s", outputs), opset=9, s=random(3))) == [op]


def test_remainders_and_divisions_of_whole_numbers_fold_into_no_layer(read):
    for op, kind, expected in (
        ("Div", "float32", "div"),
        ("Mod", "float32", "remainder"),
        ("Div", "int32", "floor_div"),
    ):
        nodes = [node("MatMul", "x w", "h"), node(op, "h s", **({"fmod": 1} if op == "Mod" else {}))]
        arrays = {"w": np.ones((6, 5), kind), "s": np.full(5, 3, kind)}
        graph = read(*nodes, shape=("N", 6), kind=helper.np_dtype_to_tensor_dtype(np.dtype(kind)), **arrays)
        assert lines(graph) == [("linear", 25, False), (expected, 0, expected == "div")]


def test_a_gemm_whose_summand_depends_on_the_image_takes_no_factor_in(read):
    nodes = [node("Relu", "x", "c"), node("Gemm", "x w c", "h"), node("BatchNormalization", "h s s s s")]
    arrays = {"shape": ("N", 5), "w": ones(5, 5), "s": random(5)}
    assert lines(read(*nodes, **arrays)) == [("relu", 0, False), ("linear", 25, False), ("batch_norm", 5, False)]
    nodes[1] = node("Gemm", "x w s", "h")
    assert lines(read(*nodes[1:], **arrays)) == [("linear", 25, False), ("batch_norm", 0, True)]


# Shapes.


def test_a_batch_is_one_image_whether_it_was_open_or_fixed(read):
    for batch in ("N", 4, 1):
        graph = read(node("Relu", "x"), shape=(batch, 3, 8, 8))
        assert (graph.inputs[0].shape, graph.outputs[0].shape) == ((1, 3, 8, 8),) * 2


def test_a_reshape_that_names_a_fixed_batch_is_read_for_one_image(read):
    nodes = [node("Reshape", "x to", "f"), node("Gemm", "f w", transB=1)]
    for target in ([4, -1], [4, 192]):
        graph = read(*nodes, shape=(4, 3, 8, 8), to=target, w=ones(5, 192))
        assert graph.outputs[0].shape == (1, 5)
    with pytest.raises(MicronetError, match="4 images at once; export it with a batch of 1"):
        read(node("Reshape", "x to"), shape=(4, 3, 8, 8), to=[-1, 3])


def test_an_open_size_comes_from_the_caller(read):
    channels = [1, 3, 5, 7]
    with pytest.raises(
        MicronetError, match=r"made.onnx: the input 'x' leaves its size open; give --input-size"
    ) as told:
        read(node("Relu", "x"), shape=("N", 3, "H", "W"))
    assert "\n" not in str(told.value)
    assert read(node("Relu", "x"), shape=("N", 3, "H", "W"), size=(3, 10, 12)).outputs[0].shape == (1, 3, 10, 12)
    assert read(node("Relu", "x"), shape=("N", "H", "W", 3), size=(3, 10, 12)).outputs[0].shape == (1, 10, 12, 3)
    with pytest.raises(MicronetError, match="takes 3 x any x any "):
        read(node("Relu", "x"), shape=("N", 3, "H", "W"), size=channels[:1] + [10, 12])


OPEN = {"x": ("N", 3, "H", "W"), "z": ("N", 3, 1, 1)}
COLOURS = r"3 x any x any \(channels, height, width\)"
# Shapes of the inputs, the size that is given, what is said.
SIZES = [
    (OPEN["x"], None, rf"input 'x' leaves its size open; give --input-size for {COLOURS}, such as 3x224x224$"),
    (OPEN["x"], (16, 16, 3), rf"input 'x' takes {COLOURS}, not 16x16x3; give --input-size, such as 3x224x224$"),
    (OPEN["x"], (3, 16), rf"input 'x' takes {COLOURS}, not 3x16; "),
    (OPEN["x"], ((3,), (16,), (16,)), rf"takes 1 input \('x': {COLOURS}\), but --input-size gives 3 sizes, 3,16,16; "),
    (("N", "H", "W", 3), None, r"for any x any x 3 \(height, width, channels\), such as 3x224x224$"),
    (("N", "H", "W", 5), None, r"for any x any x 5 \(height, width, channels\), such as 5x224x224$"),
    (("N", 3, 8, 8), (3, 9, 9), r"takes 3 x 8 x 8 \(channels, height, width\), not 3x9x9; leave --input-size away$"),
    (("N", 192), (3, 8, 8), r"takes 192, not 3x8x8; leave --input-size away$"),
    (OPEN, None, rf"input 'x' leaves its size open; give --input-size for {COLOURS}, such as 3x224x224,3x1x1$"),
    (OPEN, (3, 8, 8), rf"takes 2 inputs \('x': {COLOURS}, 'z': 3 x 1 x 1 .*\), but --input-size gives 1 size, 3x8x8; "),
    (OPEN, ((3, 8, 8),) * 3, r"'z': .*gives 3 sizes, 3x8x8,3x8x8,3x8x8; give one for each, such as 3x224x224,3x1x1$"),
    (
        OPEN,
        ((3, 8, 8), (3, 2, 2)),
        r"input 'z' takes 3 x 1 x 1 .*, not 3x2x2; give --input-size, such as 3x224x224,3x1x1$",
    ),
]


@pytest.mark.parametrize(("shape", "size", "told"), SIZES, ids=range(len(SIZES)))
def test_a_size_that_does_not_fit_is_told_with_what_the_file_takes_as_the_command_line_has_it(read, shape, size, told):
    inputs = shape if isinstance(shape, dict) else {"x": shape}
    nodes = [node("Mul", "x z")] if "z" in inputs else [node("Relu", "x")]
    with pytest.raises(MicronetError, match=told) as error:
        read(*nodes, inputs=inputs, size=size)
    assert "\n" not in str(error.value)


def test_a_size_that_is_advised_is_one_that_fits(read):
    for shape in (("N", 3, "H", "W"), ("N", "H", "W", 3), ("N", "H", "W", 5), ("N", "C", "H", "W"), ("N", "D"), "CHW"):
        with pytest.raises(MicronetError) as told:
            read(node("Relu", "x"), shape=tuple(shape))
        advised = str(told.value).rpartition("such as ")[2]
        assert read(node("Relu", "x"), shape=tuple(shape), size=[int(n) for n in advised.split("x")])


def test_an_image_without_a_batch_axis_is_read_as_it_is(read):
    for shape, size in (((3, 8, 8), None), ((3, 8, 8), (3, 8, 8)), ((3, "H", "W"), (3, 8, 8)), ("CHW", (3, 8, 8))):
        graph = read(node("Relu", "x"), shape=tuple(shape), size=size)
        assert (graph.outputs[0].shape, graph.input_size) == ((3, 8, 8), (3, 8, 8))
    for size in (None, (3, 8, 6), (8, 6, 3)):  # channels last
        assert read(node("Relu", "x"), shape=(8, 6, 3), size=size).outputs[0].shape == (8, 6, 3)


def test_several_inputs_are_read_where_their_shapes_are_known(read):
    graph = read(node("Add", "x z"), inputs={"x": ("N", 3, 8, 8), "z": ("N", 1, 8, 8)})
    assert [value.shape for value in graph.inputs] == [(1, 3, 8, 8), (1, 1, 8, 8)]


def test_several_sizes_go_to_the_inputs_in_their_order(read):
    for size in (((3, 8, 8), (3, 1, 1)), [[3, 8, 8], [3, 1, 1]]):
        graph = read(node("Mul", "x z"), inputs={"x": ("N", 3, "H", "W"), "z": ("N", "C", "h", "w")}, size=size)
        assert (graph.input_size, graph.outputs[0].shape) == (((3, 8, 8), (3, 1, 1)), (1, 3, 8, 8))
    graph = read(node("Mul", "x z"), inputs={"x": ("N", "H", "W", 3), "z": (3,)}, size=((3, 8, 6), (3,)))
    assert [value.shape for value in graph.inputs] == [(1, 8, 6, 3), (3,)]
    graph = read(node("Mul", "x z"), inputs={"x": ("N", 3, "H", "W"), "z": ()}, size=((3, 8, 8), (1,)))
    assert [value.shape for value in graph.inputs] == [(1, 3, 8, 8), ()]
    assert read(node("Relu", "x"), shape=("N", 3, "H", "W"), size=((3, 8, 8),)).input_size == (3, 8, 8)


def test_arithmetic_on_shapes_is_done_here_and_is_no_operation(tmp_path):
    path = save(tmp_path / "m.onnx", FLATTENED, zero=np.int64(0), axis=[0], rest=[-1])
    code = f"""
import sys
from micronet.onnx_cost import read_onnx
graph = read_onnx({str(path)!r})
print([node.op for node in graph.nodes], graph.outputs[0].shape, "onnxruntime" in sys.modules, "torch" in sys.modules)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == "['reshape'] (1, 192) False False\n"


def test_a_shape_that_hangs_on_large_constants_is_measured_by_onnxruntime(read):
    counts = np.zeros(2000, np.int64)
    counts[:2] = 1, 5
    nodes = [node("ReduceSum", "counts", "n", keepdims=1), node("Concat", "n rest", "to", axis=0)]
    nodes += [node("Reshape", "x to", "f"), node("Reshape", "f back", "b"), node("Conv", "b w")]
    graph = read(*nodes, counts=counts, rest=[32], back=[1, 3, 8, 8], w=ones(400, 3, 1, 1))
    assert next(n for n in live(graph)).out.shape == (6, 32)
    assert graph.outputs[0].shape == (1, 400, 8, 8)


def test_a_huge_tensor_of_zeros_is_never_made(read):
    nodes = [node("ConstantOfShape", "to", "z"), node("ReduceMax", "z", "m", keepdims=0), node("Add", "x m")]
    assert ops(read(*nodes, to=[1 << 20, 1 << 20])) == ["add"]


def test_an_if_with_a_constant_condition_is_the_branch_that_runs(read):
    def branch(op):
        return helper.make_graph([node(op, "x", "inner")], op, [], [helper.make_tensor_value_info("inner", F, None)])

    choice = node("If", "c", then_branch=branch("Relu"), else_branch=branch("Sigmoid"))
    for condition, op in ((True, "relu"), (False, "sigmoid")):
        assert ops(read(choice, node("Identity", "y", "z"), c=np.array(condition))) == [op]
    compare = [node("ReduceMax", "x", "m", keepdims=0), node("Greater", "m t", "c")]
    with pytest.raises(MicronetError, match=r"If .* decides by the image what runs"):
        read(*compare, choice, t=np.float32(1))


def test_a_loop_is_refused_by_name(read):
    infos = [
        helper.make_tensor_value_info(n, kind, ()) for n, kind in (("i", TensorProto.INT64), ("c", TensorProto.BOOL))
    ]
    state = helper.make_tensor_value_info("v", F, None)
    out = [helper.make_tensor_value_info("c2", TensorProto.BOOL, ()), helper.make_tensor_value_info("v2", F, None)]
    body = helper.make_graph([node("Identity", "c", "c2"), node("Relu", "v", "v2")], "b", [*infos, state], out)
    with pytest.raises(MicronetError, match=r"made.onnx: Loop \('again'\) repeats what is in it"):
        read(node("Loop", "n t x", name="again", body=body), n=np.int64(3), t=np.array(True))


def test_local_functions_are_written_out(read):
    opsets = [helper.make_opsetid("", 18)]
    swish = helper.make_function(
        "own", "Swish", ["a"], ["b"], [node("Sigmoid", "a", "s"), node("Mul", "a s", "b")], opsets
    )
    assert ops(read(helper.make_node("Swish", ["x"], ["y"], domain="own"), functions=[swish])) == ["sigmoid", "mul"]


# What no formula covers.


def test_an_operator_without_a_rule_keeps_its_name_and_is_an_error_of_the_ledger(read):
    assert ops(read(node("Hardmax", "x"))) == ["hardmax"]
    with pytest.raises(UnknownOperation, match=r"hardmax"):
        build(read(node("Hardmax", "x")))


def test_an_operator_of_an_unknown_domain_is_unknown_whatever_its_name(read, tmp_path):
    own = helper.make_node("Relu", ["x"], ["h"], domain="own")
    path = save(tmp_path / "m.onnx", [own, node("Relu", "h")])
    with pytest.raises(MicronetError, match=r"the shape of what Relu .* cannot be told"):
        read_onnx(path)
    model = onnx.load(path)
    model.graph.value_info.append(helper.make_tensor_value_info("h", F, ["N", 3, 4, 4]))
    onnx.save(model, path)
    graph = read_onnx(path)
    assert ops(graph) == ["own.relu", "relu"]
    assert graph.outputs[0].shape == (1, 3, 4, 4)


# Constants.


def test_a_number_is_the_programs_and_an_array_is_stored(read):
    number = node("Constant", "", "k", value=numpy_helper.from_array(ones(1)))
    more = node("Constant", "", "s", value=numpy_helper.from_array(random(3, 1, 1)))
    nodes = [
        number,
        more,
        node("Mul", "x k", "a"),
        node("Mul", "a s", "b"),
        node("Add", "b half", "c"),
        node("Add", "c one"),
    ]
    graph = read(*nodes, half=np.float32(0.5), one=ones(1))
    assert [n.inputs[1].literal for n in graph.nodes] == [True, False, True, False]
    assert [array.name for array in build(graph).arrays] == ["s", "one"]


def test_widths_and_zeros_of_constants_are_the_files(read):
    kinds = {"float16": 16, "float64": 64, "int64": 64, "int32": 32, "int8": 8, "bool": 1}
    nodes = [node("Cast", "s", "t", to=F), node("Mul", "x t")]
    for kind, bits in kinds.items():
        cast, _ = read(*nodes, shape=("N", 30), s=np.eye(1, 30).astype(kind)).nodes
        assert (cast.inputs[0].bits, cast.inputs[0].nonzero(), cast.out.fixed) == (bits, 1, True)


def test_operations_on_constants_alone_stay_for_the_ledger_to_fold(read):
    graph = read(node("Transpose", "w", "t", perm=[1, 0]), node("MatMul", "x t"), shape=("N", 6), w=ones(5, 6))
    assert [n.op for n in graph.nodes] == ["permute", "linear"]
    (line,), (array,) = build(graph).lines, build(graph).arrays
    assert (line.macs, line.weights, line.arrays, array.name, array.shape) == (30, 30, ("w",), "w", (5, 6))


def test_a_sparse_weight_has_its_shape_and_its_count_of_non_zeros(tmp_path):
    path = save(tmp_path / "m.onnx", [node("MatMul", "x w")], shape=("N", 6))
    model, values = onnx.load(path), numpy_helper.from_array(ones(2), "w")
    places = numpy_helper.from_array(np.array([3, 7]), "places")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [6, 5]))
    onnx.save(model, path)
    (line,) = build(read_onnx(path)).lines
    assert (line.weights, line.nonzero) == (30, 2)


def test_views_live_in_the_memory_of_what_they_show(read):
    nodes = [node("Relu", "x", "r"), node("Split", "r", "a b", axis=1, num_outputs=2), node("Flatten", "a", "f")]
    graph = read(*nodes, node("Exp", "f", "e"), node("Flatten", "b", "g"), node("Concat", "e g", axis=1), **MAPS)
    relu, split, flat, exp, *_ = graph.nodes
    assert len(split.outputs) == 2
    assert {value.memory() for value in (*split.outputs, flat.out)} == {relu.out}
    assert exp.out.memory() is exp.out


# Names.


def test_lines_are_named_after_the_modules_that_the_file_tells_of(read):
    def told(op, inputs, output, *scopes, **attrs):
        made = node(op, inputs, output, **attrs)
        made.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str(list(scopes)))
        return made

    nodes = [
        told("Conv", "x a.conv.weight", "c", "", "a", "a.bn", "batch_norm"),  # its BatchNorm is folded into it
        told("Conv", "x a.conv.weight", "d", "", "a", "a.again", "conv2d"),  # another layer with the same weight
        told("Relu", "c", "r", "", "a", "a.act", "relu"),
        told("Add", "r d", "s", "", "a", "add_3"),
        node("MatMul", "s w", "m", name="/b/b.0/fc/MatMul"),
        node("Add", "m s", "n", name="/b/b.0/Add_1"),
        node("Exp", "n", "e", name="exponent"),
        node("Abs", "e", "f"),
        node("Abs", "f"),
    ]
    graph = read(*nodes, **{"a.conv.weight": ones(3, 3, 1, 1), "w": ones(8, 8)})
    names = ["a.conv", "a.again", "a.act", "a.add", "b.0.fc", "b.0.add", "exponent", "abs_1", "abs_2"]
    assert [n.name for n in graph.nodes] == names
