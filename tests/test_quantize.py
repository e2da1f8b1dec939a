"""Static int8: the graph that is made, the ranges it is made from, and the callback that makes it."""

import logging
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from fastai.callback.schedule import Learner  # with lr_find
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from learners import make_learner
from onnx import numpy_helper
from onnx_networks import Plain, PreActivated, exported, images, network
from torch import nn

import callbacks.calibrate_onnx as calibrating
import callbacks.quantize as quantizing
from callbacks.calibrate_onnx import calibrated
from callbacks.ema import EMA
from callbacks.layer_noise import snr
from callbacks.onnx_run import logits
from callbacks.paired import Paired
from callbacks.precision import Precision
from callbacks.quantize import QuantizeInt8, chosen_images, plain_batches
from callbacks.quantize_onnx import Calibration, QuantizeError, float_nodes, prepared, quantize, require_layers
from micronet.data import digits, loaders
from micronet.data.augment import Augment


def arrays(proto):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def real_weights(proto, name):
    """What the codes of a layer's weights stand for."""
    held = arrays(proto)
    codes, scale = held[f"{name}.weight_quantized"], held[f"{name}.weight_scale"]
    return codes * scale.reshape(-1, *[1] * (codes.ndim - 1))


@pytest.mark.parametrize("kind", [Plain, PreActivated])
def test_an_int8_graph_answers_nearly_as_the_float_one(kind):
    proto, given = exported(kind), images()
    made = quantize(calibrated(proto, given))
    onnx.checker.check_model(made, full_check=True)
    wanted = network(kind)(torch.from_numpy(given)).detach().numpy()
    assert snr(wanted, logits(proto, given)) > 100
    assert snr(wanted, logits(made, given)) > 25
    assert logits(made, given[:1]).shape == (1, 4)


def test_weights_are_codes_of_eight_bits_with_a_scale_for_each_output():
    proto = prepared(exported(Plain))
    made = quantize(calibrated(proto, images()))
    held, before = arrays(made), arrays(proto)
    for name in ("conv1", "conv2", "fc"):
        codes, weight = held[f"{name}.weight_quantized"], before[f"{name}.weight"]
        largest = np.abs(weight).reshape(len(weight), -1).max(1)
        assert codes.dtype == np.int8
        assert np.abs(codes.reshape(len(codes), -1)).max(1).tolist() == [127] * len(codes)
        np.testing.assert_allclose(held[f"{name}.weight_scale"], largest / 127, rtol=1e-6)
        step = held[f"{name}.weight_scale"].reshape(-1, *[1] * (codes.ndim - 1))
        assert (np.abs(real_weights(made, name) - weight) <= step * 0.5001).all()
    assert not [name for name, value in held.items() if value.dtype == np.float32 and value.size > 8]


@pytest.mark.parametrize("kind", [Plain, PreActivated])
def test_weights_of_seven_bits_never_fill_a_sum_of_two_products_in_16_bits(kind):
    calibration = calibrated(exported(kind), images())
    kept = {}
    for reduced in (False, True):
        made = quantize(calibration, ("conv2",), reduce_range=reduced)
        held = arrays(made)
        codes = [held[name].astype(int) for name in held if name.endswith(".weight_quantized")]
        assert codes
        kept[reduced] = max(int(np.abs(part).max()) for part in codes)
        assert snr(logits(calibration.proto, images()), logits(made, images())) > 15
        np.testing.assert_array_equal(held["conv2.weight"], arrays(calibration.proto)["conv2.weight"])
    assert kept == {False: 127, True: 64}
    assert 2 * 255 * kept[True] <= 2**15 - 1 < 2 * 255 * kept[False]


def test_zeros_stay_zeros():
    made = network(Plain)
    with torch.no_grad():
        made.conv2.weight[torch.rand(made.conv2.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.6] = 0
    zeros = (made.conv2.weight == 0).numpy()
    from callbacks.onnx_export import export_onnx

    codes = arrays(quantize(calibrated(export_onnx(made, (3, 8, 8)), images())))["conv2.weight_quantized"]
    assert zeros.mean() > 0.5
    assert not codes[zeros].any()


def test_tensors_are_codes_and_logits_are_not():
    made = quantize(calibrated(exported(Plain), images()))
    makers = {node.output[0]: node for node in made.graph.node}
    for node in made.graph.node:
        if node.op_type in ("Conv", "Gemm", "Add"):
            assert [makers[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
    assert makers["logits"].op_type == "Gemm"  # 256 levels of a logit would make ties
    assert not any(node.op_type in ("Relu", "Clip") for node in made.graph.node)  # codes end where they do
    kinds = {arrays(made)[node.input[2]].dtype for node in made.graph.node if node.op_type == "QuantizeLinear"}
    assert kinds == {np.dtype(np.uint8)}


def test_what_a_batch_norm_reads_stays_in_float_back_to_the_layers():
    calibration = calibrated(exported(PreActivated), images())
    assert len([node for node in calibration.proto.graph.node if node.op_type == "BatchNormalization"]) == 2
    made = quantize(calibration)
    makers = {name: node for node in made.graph.node for name in node.output}
    norms = [node for node in made.graph.node if node.op_type == "BatchNormalization"]
    stream = next(makers[norm.input[0]] for norm in norms if makers[norm.input[0]].op_type == "Add")
    assert len(norms) == 2
    assert all("Quantize" not in node.op_type for node in made.graph.node if stream.output[0] in node.input)
    for node in made.graph.node:
        if node.op_type == "Conv":
            assert makers[node.input[0]].op_type == makers[node.input[1]].op_type == "DequantizeLinear"
    assert not float_nodes(prepared(exported(Plain)).graph)


def test_a_constant_factor_goes_into_the_layer_before_it():
    proto = exported(PreActivated)
    folded = prepared(proto)
    assert [node.op_type for node in proto.graph.node].count("Mul") == 1
    assert not [node for node in folded.graph.node if node.op_type == "Mul"]
    assert snr(logits(proto, images()), logits(folded, images())) > 100
    np.testing.assert_allclose(arrays(folded)["conv2.weight"], 0.25 * arrays(proto)["conv2.weight"], rtol=1e-6)


def test_minmax_is_what_the_network_gives_on_the_images(monkeypatch):
    given, seen = images(), []
    model = network(Plain)
    model.fc.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.from_numpy(given))
    monkeypatch.setattr(calibrating, "CHUNK", 7)
    calibration = calibrated(exported(Plain), given)
    (node,) = [node for node in calibration.proto.graph.node if node.op_type == "Gemm"]
    assert calibration.ranges[node.input[0]] == pytest.approx((seen[0].min().item(), seen[0].max().item()), abs=1e-5)
    assert calibration.ranges["input"] == pytest.approx((float(given.min()), float(given.max())))
    assert (calibration.images, calibration.method) == (48, "minmax")


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_ranges_depend_on_the_images_and_not_on_the_chunks(method, monkeypatch):
    whole = calibrated(exported(Plain), images(), method)
    monkeypatch.setattr(calibrating, "CHUNK", 5)
    monkeypatch.setattr(calibrating, "HELD_BYTES", 1)
    assert calibrated(exported(Plain), images(), method).ranges == whole.ranges


def test_what_is_rare_is_cut_off_by_two_of_the_three():
    given = images(2000)
    given[7, 0, 0, 0] = 80.0  # one number of 384,000 in the input: 0.00026 %, and 0.0005 % go at either end
    minmax, percentile, entropy = (
        calibrated(exported(Plain), given, method).ranges["input"] for method in ("minmax", "percentile", "entropy")
    )
    assert minmax == (float(given.min()), 80.0)
    assert 3 < percentile[1] < 6
    assert percentile[0] > minmax[0]
    assert 1 < entropy[1] < 20
    assert entropy[0] == max(minmax[0], -entropy[1])


def test_percentile_leaves_out_as_many_numbers_as_it_says():
    counts, _ = np.histogram(np.arange(1_000_000), calibrating.BINS, (0.0, 1_000_000.0))
    low, high = calibrating._by_percentile(counts, (0.0, 1_000_000.0))
    width = 1_000_000 / calibrating.BINS
    assert low <= 5 <= low + width  # 0.0005 % of them at either end, to a bin
    assert high - width <= 999_995 <= high


def test_entropy_keeps_all_of_what_is_spread_evenly():
    assert calibrating._by_entropy(np.full(calibrating.BINS, 1000), (0.0, 4.0)) == (0.0, 4.0)
    assert calibrating._by_entropy(np.zeros(calibrating.BINS, np.int64), (0.0, 0.0)) == (0.0, 0.0)


def test_entropy_gives_a_side_the_codes_that_it_has():
    """A little below 0, as a SiLU gives, the positive side has all codes but some: it is cut where a ReLU's is."""
    sizes = np.abs(np.random.default_rng(0).laplace(size=200_000))
    counts = np.histogram(sizes, calibrating.BINS, (0, 13.5))[0]
    cuts = [calibrating._by_entropy(counts, (low, 13.5))[1] for low in (0.0, -0.01, -13.5)]
    assert cuts[1] == cuts[0] > 1.02 * cuts[2]


def test_layers_left_in_float_keep_their_weights():
    calibration = calibrated(exported(Plain), images())
    assert list(calibration.layers) == ["conv1", "conv2", "fc"]
    made = quantize(calibration, ("conv2",))
    np.testing.assert_array_equal(arrays(made)["conv2.weight"], arrays(calibration.proto)["conv2.weight"])
    assert "conv1.weight_quantized" in arrays(made)
    wanted = logits(calibration.proto, images())
    assert snr(wanted, logits(made, images())) > snr(wanted, logits(quantize(calibration), images()))


def test_what_is_refused():
    calibration = calibrated(exported(Plain), images())
    with pytest.raises(QuantizeError, match=r"no layer 'conv9'; near it: conv[12], conv[12] \(3 in all\)"):
        quantize(calibration, ("conv9",))
    with pytest.raises(QuantizeError, match=r"no layer 'head'; there are conv1, conv2, fc \(3 in all\)"):
        require_layers(exported(Plain), ("head",))
    with pytest.raises(QuantizeError, match="no layer is left"):
        quantize(calibration, ("conv1", "conv2", "fc"))
    with pytest.raises(QuantizeError, match="quantised already"):
        calibrated(quantize(calibration), images())
    with pytest.raises(QuantizeError, match="no finite number"):
        calibrated(exported(Plain), np.full((2, 3, 8, 8), np.nan, np.float32))
    with pytest.raises(ValueError, match="method must be one of minmax"):
        calibrated(exported(Plain), images(), "mean")
    with pytest.raises(ValueError, match="no images"):
        calibrated(exported(Plain), images()[:0])


def test_nothing_is_left_behind(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    handlers, disabled = list(logging.root.handlers), logging.root.manager.disable
    proto = exported(Plain)
    before = proto.SerializeToString()
    first, second = (quantize(calibrated(proto, images(), "entropy")).SerializeToString() for _ in range(2))
    assert first == second
    assert proto.SerializeToString() == before
    assert list(tmp_path.iterdir()) == []
    assert (logging.root.handlers, logging.root.manager.disable) == (handlers, disabled)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_committed_resnet20_loses_at_most_a_fifth_of_a_point(real):
    from micronet import load
    from micronet.data import cifar10
    from micronet.gate_images import Floats

    data = real(cifar10)
    bundle = load(Path(__file__).parent / "data" / "resnet20_cifar10.pth")
    from callbacks.onnx_export import export_onnx

    proto = export_onnx(bundle.model, (3, 32, 32))
    given = Floats(data.train.images[chosen_images(len(data.train), 512, 0)], data)
    made = quantize(calibrated(proto, given))
    right = [
        int((logits(form, Floats(data.test.images, data)).argmax(1) == data.test.labels.numpy()).sum())
        for form in (proto, made)
    ]
    assert right[0] == 9038
    assert right[0] - right[1] <= 20
    assert proto.ByteSize() >= 3.3 * made.ByteSize()


# The callback


def small(network=None, **arguments):
    """A Learner on real digits, as a recipe makes it."""
    data = digits(batch_size=32, **arguments).limit(96)
    model = network or nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )
    learn = Learner(loaders(data), model, nn.CrossEntropyLoss(), lr=0.1)
    learn.logger = lambda _: None
    return learn, data


@pytest.fixture
def unexported(monkeypatch):
    """Without the export, which takes a second: what goes into the calibration is noted, and the result is given."""
    seen = {}

    def note(proto, images, method):
        seen.update(images=images, method=method, model=proto)
        return Calibration(exported(Plain), {}, method, len(images))

    monkeypatch.setattr(quantizing, "export_onnx", lambda model, size: model)
    monkeypatch.setattr(quantizing, "calibrated", note)
    monkeypatch.setattr(quantizing, "quantize", lambda calibration, kept, reduce_range: exported(Plain))
    monkeypatch.setattr(quantizing, "compared", lambda before, after, batches: Paired(100, 90, 90, 0, 0, 100))
    return seen


def fit(learn, cb, epochs=0, cbs=()):
    with learn.no_mbar():
        learn.fit(epochs, cbs=[cb, *cbs])
    return cb


def pixels(batch):
    return {np.ascontiguousarray(image).tobytes() for image in batch}


@pytest.mark.parametrize("split", ["train", "valid"])
def test_calibration_draws_from_its_split_without_augmentation(split, unexported):
    learn, data = small(augment=Augment(crop=2, flip=0.5))
    fit(learn, QuantizeInt8(images=20, split=split, seed=5))
    part = getattr(data, split)
    places = chosen_images(len(part), 20, 5)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (data.mean, data.std))
    wanted = (part.images[places].contiguous().float() / 255 - mean) / std
    np.testing.assert_allclose(unexported["images"], wanted.numpy(), atol=1e-5)


def test_the_seed_and_the_number_say_which_images(unexported):
    learn, _ = small()
    drawn = {}
    for number, seed in ((20, 0), (20, 1), (40, 0), (20, 0), (10_000, 0)):
        fit(learn, QuantizeInt8(images=number, seed=seed))
        again = drawn.setdefault((number, seed), pixels(unexported["images"]))
        assert again == pixels(unexported["images"])
        assert len(unexported["images"]) == min(number, 96)
    assert drawn[20, 0] != drawn[20, 1]
    assert chosen_images(50, 10, 0) == chosen_images(50, 10, 0) == sorted(set(chosen_images(50, 10, 0)))


def test_validation_images_that_are_the_test_images_calibrate_nothing(unexported):
    learn, _ = small(valid="test")
    for split in ("valid", "train"):  # the loss that is allowed is judged on them, and layers are ranked on them
        with pytest.raises(ValueError, match="validation images are the test images, which calibrate, rank and judge"):
            fit(learn, QuantizeInt8(split=split))
    assert "images" not in unexported


def test_what_is_quantised_is_the_average_that_the_fit_leaves(unexported):
    learn, _ = small()
    states = []

    class Look(quantizing.Callback):
        order = 39

        def after_fit(self):
            states.append(self.learn.model[0].weight.detach().clone())

    def keep(model, size):
        states.append(model[0].weight.detach().clone())
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizing, "export_onnx", keep)
        fit(learn, QuantizeInt8(), 2, (EMA(0.9), Look()))
    trained, quantised = states
    assert torch.equal(quantised, learn.model[0].weight)
    assert not torch.equal(quantised, trained)


def test_a_loss_beyond_the_floor_fails_the_fit(unexported, monkeypatch):
    learn, _ = small()
    monkeypatch.setattr(quantizing, "compared", lambda *_: Paired(200, 180, 177, 5, 2, 190))
    cb = QuantizeInt8(floor=1.0)
    with pytest.raises(ValueError, match=r"177 of 200 validation images rightly, float 180: 1\.50 points are lost"):
        fit(learn, cb)
    assert (cb.onnx, cb.result) == (None, None)
    assert fit(learn, QuantizeInt8(floor=1.5)).result.drop == 1.5


def test_a_fit_of_no_epochs_leaves_the_graph_of_the_network():
    learn, data = small()
    cb = QuantizeInt8(images=64, floor=100, keep_float=1)
    assert (cb.onnx, cb.summary) == (None, "")
    before = torch.random.get_rng_state()
    fit(learn, cb)
    assert torch.equal(torch.random.get_rng_state(), before)
    made = onnx.load_from_string(cb.onnx.content)
    assert [layer.name for layer in cb.ranking.noise] in (["0", "4"], ["4", "0"])
    kept = cb.ranking.noise[0].name
    np.testing.assert_array_equal(arrays(made)[f"{kept}.weight"], learn.model[int(kept)].weight.detach().numpy())
    answered = np.concatenate([logits(made, xb).argmax(1) == yb for xb, yb in plain_batches(learn.dls.valid)])
    assert (cb.result.images, cb.result.after) == (len(data.valid), answered.sum())
    assert cb.summary == (
        f"int8 from 64 images of train (seed 0, minmax): {len(cb.onnx.content):,} bytes; "
        f"right on {cb.result.after:,} of "
        f"{len(data.valid)} validation images, float on {cb.result.before:,}; "
        f"the same class on {cb.result.agreeing:,}; "
        f"in float: {kept}; "
        + "; ".join(
            f"{layer.name} alone {layer.snr:.1f} dB, with it in float {cb.ranking.confirmed[layer.name].told}"
            for layer in cb.ranking.noise
        )
    )
    # The paired test is of the whole int8 graph beside the one that is kept, on all validation images here.
    test = cb.ranking.confirmed[kept]
    assert (test.images, test.after) == (len(data.valid), cb.result.after)
    assert cb.onnx.how == {
        "images": 64,
        "split": "train",
        "seed": 0,
        "method": "minmax",
        "keep_float": [kept],
        "reduce_range": False,
    }


def test_what_it_was_made_by_is_what_was_used(unexported):
    learn, _ = small()
    cb = fit(learn, QuantizeInt8(images=10_000, method="entropy", reduce_range=True))
    assert (cb.onnx.how["images"], cb.onnx.how["method"], cb.onnx.how["reduce_range"]) == (96, "entropy", True)
    assert cb.summary.startswith("int8 with weights of 7 bits from 96 images of train (seed 0, entropy)")


def test_layers_are_ranked_where_asked_and_all_stay_in_int8():
    learn, _ = small()
    cb = fit(learn, QuantizeInt8(images=32, floor=100, rank=True))
    assert {layer.name for layer in cb.ranking.noise} == set(cb.ranking.confirmed) == {"0", "4"}
    assert cb.onnx.how["keep_float"] == []
    assert "in float: " not in cb.summary


def test_a_wrong_name_ends_a_fit_before_it_begins():
    learn, _ = small()
    epochs = []

    class Count(quantizing.Callback):
        def before_epoch(self):
            epochs.append(self.epoch)

    drawn = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=r"keep_float: no layer '5'; there are 0, 4 \(2 in all\)"):
        fit(learn, QuantizeInt8(keep_float=("5",)), 1, (Count(),))
    assert epochs == []
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_layers_are_found_by_their_names_in_a_fit_of_bfloat16():
    """Precision (order 10) has wrapped the forward before the names are looked at (order 80)."""
    learn, _ = small()
    cb = fit(learn, QuantizeInt8(images=32, floor=100, keep_float=("4",)), 0, (Precision(bf16=True),))
    made = onnx.load_from_string(cb.onnx.content)
    np.testing.assert_array_equal(arrays(made)["4.weight"], learn.model[4].weight.detach().numpy())
    assert "0.weight_quantized" in arrays(made)
    assert "forward" not in vars(learn.model)
    with pytest.raises(ValueError, match=r"keep_float: no layer '5'; there are 0, 4 \(2 in all\)"):
        fit(learn, QuantizeInt8(keep_float=("5",)), 1, (Precision(bf16=True),))


@pytest.mark.parametrize(
    ("flags", "reduced", "says"),
    [
        ("fpu avx2 avx512_vnni", False, None),
        ("fpu avx2 avx512f", False, "16-bit sums saturate, another CPU can answer otherwise than this one; reduce_ran"),
        ("fpu avx2", True, "int8 may be no faster than float; its 16-bit sums hold weights of 7 bits"),
    ],
)
def test_a_processor_of_short_sums_is_said(unexported, flags, reduced, says, monkeypatch):
    learn, _ = small()
    monkeypatch.setattr(quantizing, "processor", lambda: ({}, set(flags.split())))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    summary = fit(learn, QuantizeInt8(reduce_range=reduced)).summary
    assert (says is None and "CPU" not in summary) or says in summary
    assert "\n" not in summary


def test_a_search_for_a_learning_rate_quantises_nothing(unexported):
    learn, _ = small()
    learn.add_cb(QuantizeInt8())
    with learn.no_mbar():
        learn.lr_find(num_it=5, show_plot=False)
    assert not unexported


def test_augmentation_of_fastai_that_cannot_be_switched_off_is_refused():
    from fasttransform import Transform

    class Shaken(Transform):
        split_idx = 0

        def encodes(self, x):
            return x

    def image(place):
        return torch.full((3, 8, 8), float(place))

    def label(place):
        return place % 2

    sets = Datasets(range(4), [[image], [label]])
    shaken = Datasets(range(4), [[image, Shaken()], [label]])
    for dls in (
        DataLoaders(TfmdDL(sets, bs=2, after_item=[Shaken()], num_workers=0), TfmdDL(sets, bs=2, num_workers=0)),
        DataLoaders(TfmdDL(shaken, bs=2, num_workers=0), TfmdDL(sets, bs=2, num_workers=0)),
    ):
        with pytest.raises(ValueError, match="augmented by Shaken, which can't be switched off here"):
            next(plain_batches(dls.train))
        given, labels = next(plain_batches(dls.valid, [1, 3]))
        assert (given[:, 0, 0, 0].tolist(), labels.tolist()) == ([1.0, 3.0], [1, 1])


def test_batches_that_are_no_classes_are_refused(unexported):
    learn = make_learner()
    learn.dls.train.dataset.tensors = (learn.dls.train.dataset.tensors[0], torch.randn(32, 2))
    with pytest.raises(ValueError, match="must be images and class numbers"):
        fit(learn, QuantizeInt8())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"images": 0}, "images must be a whole number of at least 1, got 0"),
        ({"split": "test"}, "split must be one of train, valid, got 'test'"),
        ({"method": "mean"}, "method must be one of minmax, entropy, percentile"),
        ({"keep_float": -1}, "keep_float must be"),
        ({"keep_float": "conv1"}, "keep_float must be"),
        ({"floor": -0.1}, "floor must be"),
        ({"floor": float("nan")}, "floor must be"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        partial(QuantizeInt8, **arguments)()
