"""Noise of each layer alone, and the paired test."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx_networks import Plain, PreActivated, exported, images
from scipy.stats import binomtest

from callbacks.calibrate_onnx import calibrated
from callbacks.layer_noise import alone, confirm, images_to_rank, rank_layers, ranking, rounded, snr
from callbacks.onnx_run import logits
from callbacks.paired import Paired, answers, paired
from callbacks.quantize_onnx import MOST_CODE, REDUCED_CODE, quantize


def batches(given, labels, size=50):
    """Images and labels, some at a time, once."""
    return ((given[start : start + size], labels[start : start + size]) for start in range(0, len(labels), size))


@given(lost=st.integers(0, 60), won=st.integers(0, 60))
def test_the_paired_test_is_the_exact_binomial_one(lost, won):
    found = Paired(images=200, before=100, after=100 - lost + won, lost=lost, won=won, agreeing=0)
    expected = binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert found.p == pytest.approx(expected)


def test_pairs_are_counted():
    eye = np.eye(3)
    labels = np.array([0, 1, 2, 2, 0])
    before, after = eye[[0, 1, 2, 0, 1]], eye[[0, 2, 2, 2, 1]]
    found = paired(before, after, labels)
    assert (found.images, found.before, found.after, found.lost, found.won, found.agreeing) == (5, 3, 3, 1, 1, 3)
    assert (found.drop, found.p) == (0.0, 1.0)
    assert Paired(200, 180, 177, 5, 2, 0).drop == 1.5


def test_what_is_no_number_is_no_answer():
    nothing = np.full((2, 3), np.nan)
    found = paired(nothing, np.eye(3)[:2], np.array([0, 1]))  # the place of the first NaN is taken for the largest
    assert (found.before, found.after, found.won, found.agreeing) == (0, 2, 2, 0)
    assert paired(nothing, nothing, np.array([0, 0])).agreeing == 0


def test_several_graphs_answer_side_by_side():
    proto, given = exported(Plain), images(60)
    labels, done = np.arange(60), []
    (first, second), seen = answers((proto, proto), batches(given, labels, 25), done.append)
    np.testing.assert_allclose(first, logits(proto, given), rtol=1e-5)
    np.testing.assert_array_equal(first, second)
    assert (seen.tolist(), done) == (labels.tolist(), [25, 50, 60])


def test_noise_in_decibels():
    wanted = np.array([[3.0, 4.0]])
    assert snr(wanted, wanted + [[0.3, 0.4]]) == pytest.approx(20)  # a tenth of the amplitude
    assert snr(wanted, wanted) == np.inf


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("kind", [Plain, PreActivated])
def test_a_layer_alone_is_rounded_as_the_int8_graph_has_it(kind, reduced):
    calibration, most = calibrated(exported(kind), images()), REDUCED_CODE if reduced else MOST_CODE
    made = quantize(calibration, reduce_range=reduced)
    codes = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    for name, node in calibration.layers.items():
        proto = alone(calibration, node, most)
        held = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
        step = codes[f"{name}.weight_scale"].reshape(-1, *[1] * (codes[f"{name}.weight_quantized"].ndim - 1))
        np.testing.assert_array_equal(held[f"{name}.weight.rounded"], codes[f"{name}.weight_quantized"] * step)
        others = [key for key in held if key.endswith(".rounded")]
        assert others == [f"{name}.weight.rounded"]
        for key in [key for key in held if key.endswith(".scale")]:
            tensor = key.removesuffix(".scale")
            assert held[key] == pytest.approx(codes[f"{tensor}_scale"], rel=1e-6)
            assert held[f"{tensor}.zero"] == codes[f"{tensor}_zero_point"]


def test_turned_weights_are_rounded_along_their_outputs():
    weight = np.array([[1.0, 100.0], [0.5, -50.0], [-0.25, 3.0]], np.float32)
    np.testing.assert_allclose(rounded(weight, 1)[:, 0] / np.float32(1 / 127), [127, 64, -32], atol=1e-4)
    np.testing.assert_allclose(rounded(weight, 0)[1] / np.float32(50 / 127), [1, -127], atol=1e-4)


def test_the_layer_with_the_coarsest_steps_is_the_worst():
    calibration = calibrated(exported(Plain), images())
    seen = []
    fair = rank_layers(calibration, images(16), seen.append)
    assert seen == [1, 2, 3]
    assert [layer.snr for layer in fair] == sorted(layer.snr for layer in fair)
    assert fair[0].snr > 20
    (name,) = [node.input[0] for node in calibration.proto.graph.node if node.op_type == "Gemm"]
    calibration.ranges[name] = (0.0, 1000.0)  # as an image unlike all others would have it
    spoilt = rank_layers(calibration, images(16))
    assert (spoilt[0].name, fair[0].name != "fc" or spoilt[0].snr < fair[0].snr - 10) == ("fc", True)
    assert {layer.name: layer.snr for layer in spoilt}["conv1"] == {layer.name: layer.snr for layer in fair}["conv1"]


def test_leaving_the_worst_in_float_mends_it():
    calibration = calibrated(exported(Plain), images())
    (name,) = [node.input[0] for node in calibration.proto.graph.node if node.op_type == "Gemm"]
    calibration.ranges[name] = (0.0, 1000.0)
    labels = logits(calibration.proto, images(400)).argmax(1)
    found = confirm(calibration, ("fc", "conv2"), batches(images(400), labels))
    whole = logits(quantize(calibration), images(400)).argmax(1)
    assert found["fc"].before == found["conv2"].before == (whole == labels).sum() < 300
    assert found["fc"].after > 380
    assert found["fc"].p < 1e-6
    assert found["conv2"].p > 0.05


def test_a_ranking_names_the_worst_and_tests_them_on_images_that_are_drawn_for_it():
    calibration = calibrated(exported(Plain), images())
    (name,) = [node.input[0] for node in calibration.proto.graph.node if node.op_type == "Gemm"]
    calibration.ranges[name] = (0.0, 1000.0)
    given = images(400)
    labels, asked = logits(calibration.proto, given).argmax(1), []

    def draw(number):
        asked.append(number)
        return batches(given[:number], labels[:number])

    found = ranking(calibration, draw)
    assert (asked, found.images) == ([images_to_rank(3), 2000], 128)
    assert list(found.confirmed) == [layer.name for layer in found.noise]
    assert found.noise[0].name == "fc"
    assert found.confirmed == confirm(calibration, list(found.confirmed), batches(given, labels))
    assert found.confirmed["fc"].told.startswith(f"right on {found.confirmed['fc'].after} of 400 images, ")


def test_weights_of_seven_bits_bring_more_noise():
    calibration = calibrated(exported(Plain), images())
    eight, seven = (
        {layer.name: layer.snr for layer in rank_layers(calibration, images(16), reduce_range=reduced)}
        for reduced in (False, True)
    )
    assert sum(seven.values()) < sum(eight.values())
    assert seven != eight
