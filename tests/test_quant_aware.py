"""Training with quantised weights and inputs: set up, trained, resumed, saved, and what stands beside it."""

import copy
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback
from fastai.optimizer import OptimWrapper
from learners import make_learner, make_teacher
from rich.console import Console
from torch import nn

from callbacks.calibration import augmented_batches
from callbacks.checkpoint import KeepBest
from callbacks.distill import Distill
from callbacks.distill_features import Hints
from callbacks.ema import EMA
from callbacks.expected import Expected
from callbacks.fake_quantize import bits_of, quantised_layers
from callbacks.masks import KeepZeros
from callbacks.precision import Precision
from callbacks.prune import PruneChannels
from callbacks.quant_aware import QuantAware
from callbacks.ramp import OneShot
from callbacks.sparsify import Sparsify
from callbacks.step_sizes import best_steps
from micronet import Fit, MicronetError, sgd
from micronet.bundle import Bundle, load, save
from micronet.data import digits
from micronet.learner import make_learner as learner_of
from micronet.learner import run_fit
from micronet.models import resnet20
from micronet.optim import decay_groups
from micronet.score import score

QAT = partial(QuantAware, 4, 4, images=16, norm_images=16)


def fit(learn, epochs=1, cbs=(), **arguments):
    with learn.no_mbar():
        learn.fit(epochs, cbs=list(cbs), **arguments)
    return learn


def bundle_of(model, **fields):
    """A small network of micronet's in a bundle."""
    known = {"factory": "micronet.models.resnet:resnet20", "kwargs": {"num_classes": 3}, "classes": ("a", "b", "c")}
    known |= {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return Bundle(model=model, **known | fields)


def train_small(cbs, epochs=1, seed=0, model=None):
    """ResNet-20 on noise: the structure matters, not the answers."""
    learn = make_learner(seed)
    torch.manual_seed(seed)
    learn.model = model or resnet20(num_classes=3)
    learn.create_opt()
    return fit(learn, epochs, cbs)


def test_step_sizes_are_those_of_least_error():
    torch.manual_seed(0)
    rows = torch.cat([torch.randn(3, 500), torch.rand(1, 500) * 9, torch.zeros(1, 500)])
    for low, high in ((-7, 7), (-1, 1), (-127, 127)):
        steps = best_steps(rows, low, high)

        def error(step, low=low, high=high):
            return ((rows / step[:, None]).round().clamp(low, high) * step[:, None] - rows).square().sum(1)

        fine = torch.stack([error(torch.full((5,), size)) for size in torch.logspace(-3, 1, 2000).tolist()])
        # steps are tried 7.4 % apart
        assert (error(steps)[:4] <= 1.12 * fine.min(0).values[:4]).all()
        # what LSQ begins with: Esser et al. 2020, section 2.1
        assert (error(steps)[:4] <= error(2 * rows.abs().mean(1) / high**0.5)[:4]).all()
        assert steps[4] == steps[:4].mean()  # a row of zeros
    assert (best_steps(torch.zeros(2, 4), -7, 7) == 1).all()


def test_first_and_last_layer_named_layers_and_own_widths():
    seen = {}
    for name, arguments in {
        "plain": {},
        "alike": {"first_last_bits": None},
        "own": {"own": {"layer1.0.conv1": (2, 8), "fc": (6, 5)}},
        "layers": {"layers": ("layer1.0.conv1", "layer2.0.conv1", "fc"), "first_last_bits": 6},
    }.items():
        seen[name] = bits_of(train_small([QAT(**arguments)], epochs=0).model)
    middle = {name: bits for name, bits in seen["plain"].items() if name not in ("conv1", "fc")}
    assert len(middle) == 20
    assert set(middle.values()) == {(4, 4)}
    assert seen["plain"]["conv1"] == seen["plain"]["fc"] == (8, 8)
    assert set(seen["alike"].values()) == {(4, 4)}
    assert (seen["own"]["layer1.0.conv1"], seen["own"]["fc"], seen["own"]["conv1"]) == ((2, 8), (6, 5), (8, 8))
    assert seen["layers"] == {"layer1.0.conv1": (6, 6), "layer2.0.conv1": (4, 4), "fc": (6, 6)}


def test_inputs_are_signed_where_the_data_is():
    layers = quantised_layers(train_small([QAT()], epochs=0).model)
    assert [name for name, layer in layers.items() if layer.act_signed] == ["conv1"]  # all others come behind a ReLU


@pytest.mark.parametrize("opt", ["fastai", "one group", "groups"])
def test_step_sizes_train_without_weight_decay(opt):
    learn = make_learner()
    functions = {"one group": partial(torch.optim.SGD, weight_decay=0.5), "groups": torch.optim.SGD}
    if opt != "fastai":
        learn.opt_func = partial(OptimWrapper, opt=functions[opt])
    if opt == "groups":
        learn.splitter = decay_groups
        learn.wd = [0.5, 0.0]
    else:
        learn.wd = 0.5
    learn.create_opt()
    groups = len(learn.opt.hypers)
    kept = {}

    class Still(Callback):
        """Nothing but weight decay moves anything."""

        order = 37

        def before_step(self):
            kept.setdefault("scale", learn.model[0].weight_scale.detach().clone())
            kept.setdefault("weight", learn.model[0].weight.detach().clone())
            kept["grad"] = learn.model[0].weight_scale.grad.abs().sum(), learn.model[5].act_scale.grad.abs()
            for p in learn.model.parameters():
                p.grad.zero_()

    with learn.no_mbar():
        learn.fit(2, 0.1, cbs=[QAT(), Still(), Look := Watch()])
    assert all(grad > 0 for grad in kept["grad"])
    assert torch.equal(Look.scale, kept["scale"])
    assert Look.weight.norm() < kept["weight"].norm() * 0.9
    parameters = [id(p) for group in learn.opt.param_lists for p in group]
    assert sorted(parameters) == sorted(id(p) for p in learn.model.parameters())  # each once
    assert len(learn.opt.hypers) == groups


class Watch(Callback):
    """Looks at a layer before the end of the fit."""

    order = 39

    def after_epoch(self):
        self.scale = self.learn.model[0].weight_scale.detach().clone()
        self.weight = self.learn.model[0].weight.detach().clone()


def test_every_parameter_trains():
    learn = make_learner()
    before = {}

    class First(Callback):
        order = 41

        def before_train(self):
            if not before:
                before.update({name: p.detach().clone() for name, p in self.learn.model.named_parameters()})

        def after_epoch(self):
            self.now = {name: p.detach().clone() for name, p in self.learn.model.named_parameters()}

    fit(learn, 2, [QAT(), first := First()])
    assert set(before) == set(first.now)
    assert "0.act_scale" in before
    assert [name for name in before if torch.equal(before[name], first.now[name])] == []


def test_the_end_is_codes_times_scale_with_the_averaged_weights_and_fresh_statistics():
    learn = make_learner()
    seen = {}

    class Seen(Callback):
        order = 61  # behind EMA and KeepBest, before the end of QuantAware

        def after_fit(self):
            seen["model"] = copy.deepcopy(self.learn.model)

    fit(learn, 2, [QAT(), EMA(0.9), KeepBest("valid_loss"), Seen()])
    model, averaged = learn.model, seen["model"]
    for name, layer in quantised_layers(model).items():
        other = averaged.get_submodule(name)
        assert torch.equal(layer.codes(), other.codes())
        assert torch.equal(layer.weight_scale, other.weight_scale)
        product = layer.codes().float() * layer.weight_scale.detach().reshape(-1, *[1] * (layer.weight.dim() - 1))
        assert torch.equal(layer.weight.detach(), product)
        assert not torch.equal(other.weight, product)
    # BatchNorm's statistics: the mean over two batches of 8, with the weights that stay
    with torch.no_grad():
        random = torch.cat([batch[0] for batch in augmented_batches(learn, 32)])
        outputs = model[0](random)
    assert not torch.equal(model[1].running_mean, averaged[1].running_mean)
    assert (model[1].running_mean - outputs.mean((0, 2, 3))).abs().max() < 0.2
    assert int(model[1].num_batches_tracked) == 2
    before = averaged[1].running_mean.clone()
    learn = make_learner()
    fit(learn, 2, [QAT(norm_images=0), EMA(0.9), KeepBest("valid_loss")])
    assert torch.equal(learn.model[1].running_mean, before)


def small_net():
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10))
    first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*first, nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(), *head)


@pytest.mark.parametrize("decay", [True, False])
def test_killed_in_the_middle_it_ends_with_the_same_bits(decay, tmp_path):
    data = digits(batch_size=64).limit(192)
    cbs = (partial(QuantAware, 4, 4, images=64, norm_images=64),)
    plan = Fit("qat", epochs=4, lr=0.05, opt=sgd(), wd=1e-3, wd_bn_bias=decay, ema=0.9, bf16=True, cbs=cbs)

    class Kill(Callback):
        order = 95

        def before_batch(self):
            if self.learn.epoch == 2 and self.learn.iter == 1:
                raise KeyboardInterrupt

    def run(name, *cbs):
        learn = learner_of(plan, small_net(), data)
        run_fit(learn, plan, Console(quiet=True), checkpoint=tmp_path / name, cbs=cbs)
        return learn.model.state_dict()

    straight = run("whole.pth")
    with pytest.raises(KeyboardInterrupt):
        run("part.pth", Kill())
    assert torch.load(tmp_path / "part.pth", weights_only=True)["epoch"] == 2
    resumed = run("part.pth")
    assert list(straight) == list(resumed)
    assert [name for name in straight if not torch.equal(straight[name], resumed[name])] == []


def test_zeros_stay_zero_codes_and_masks_stay_declared(tmp_path):
    model = train_small([Sparsify(0.6, OneShot())]).model
    masks = {name: p.detach() != 0 for name, p in model.named_parameters() if p.dim() > 1}
    learn = train_small([keep := KeepZeros(masks), QAT(), EMA(0.9)], 2, model=model)
    codes = {f"{name}.weight": layer.codes() for name, layer in quantised_layers(learn.model).items()}
    assert all(not codes[name][~mask].any() for name, mask in masks.items())
    assert set(keep.masks) == set(masks)
    save(bundle_of(learn.model, masks=keep.masks), tmp_path / "m.pth")
    ledger = score(tmp_path / "m.pth").ledger
    arrays = {array.name: array for array in ledger.arrays if array.role == "weight"}
    assert all(arrays[name].nonzero == int(mask.sum()) for name, mask in masks.items())
    assert {array.bits for array in arrays.values()} == {4, 8}


def test_a_file_gives_the_same_bits_and_widths(tmp_path):
    learn = train_small([QAT(), Precision()])
    bundle = bundle_of(learn.model)
    save(bundle, tmp_path / "m.pth")
    loaded = load(tmp_path / "m.pth")
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), learn.model.eval()(images))
    assert loaded.bits == bundle.bits == bits_of(learn.model)
    assert loaded.bits["layer1.0.conv1"] == (4, 4)
    save(loaded, tmp_path / "again.pth")  # the log does not grow
    assert load(tmp_path / "again.pth").edits == loaded.edits
    assert len(loaded.edits) == 1
    layers = quantised_layers(loaded.model).values()
    # 32 bits for the scale and the bias of each output, and for each input's scale
    storage = sum(x.weight.numel() * x.weight_bits / 32 + 2 * len(x.weight) + 1 for x in layers)
    assert score(tmp_path / "again.pth").storage == score(tmp_path / "m.pth").storage == storage


def test_a_network_pruned_and_then_quantised_is_saved(tmp_path):
    model = train_small([PruneChannels(0.5)]).model
    learn = train_small([QAT()], model=model)
    save(bundle_of(learn.model), tmp_path / "m.pth")
    loaded = load(tmp_path / "m.pth")
    assert loaded.model.conv1.weight_scale.shape == (8,)
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), learn.model.eval()(images))


@pytest.mark.parametrize(
    "layers",
    [{"conv1": [4, 4]}, {"conv1": [1, 4, False]}, {"bn1": [4, 4, False]}, {"nowhere": [4, 4, True]}, ["conv1"]],
)
def test_a_log_that_fits_no_network_is_refused(layers, tmp_path):
    save(bundle_of(train_small([QAT()], 0).model), tmp_path / "m.pth")
    content = torch.load(tmp_path / "m.pth", weights_only=True)
    content["edits"][0]["layers"] = layers
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(MicronetError, match="quantised does not fit its network"):
        load(tmp_path / "m.pth")


def test_later_fits_train_on_through_the_rounding():
    learn = train_small([QAT()])
    widths = bits_of(learn.model)
    codes = {name: layer.codes() for name, layer in quantised_layers(learn.model).items()}
    learn = train_small([EMA(0.9)], 2, model=learn.model)
    assert bits_of(learn.model) == widths
    assert any(not torch.equal(layer.codes(), codes[name]) for name, layer in quantised_layers(learn.model).items())
    learn = train_small([sparse := Sparsify(0.7, OneShot())], model=learn.model)
    assert bits_of(learn.model) == widths
    assert all(
        not quantised_layers(learn.model)[name.removesuffix(".weight")].codes()[~mask].any()
        for name, mask in sparse.masks.items()
    )
    scales = learn.model.layer1[0].conv1.weight_scale.detach().abs()  # a step of Adam's can take one past 0
    learn = train_small([QAT()], 0, model=learn.model)  # the same widths again: trained step sizes stay
    assert torch.equal(learn.model.layer1[0].conv1.weight_scale, scales)
    learn = train_small([QuantAware(2, 2, images=16, norm_images=0)], 0, model=learn.model)
    assert bits_of(learn.model)["layer1.0.conv1"] == (2, 2)
    assert not torch.equal(learn.model.layer1[0].conv1.weight_scale, scales)


def test_a_teacher_may_stand_beside_it():
    learn = make_learner()
    learn.opt_func = partial(OptimWrapper, opt=partial(torch.optim.SGD, weight_decay=0.1))
    learn.create_opt()
    number = len(list(learn.model.parameters()))
    fit(learn, 2, [QAT(), Distill(make_teacher(), features=(Hints({"2": "1"}),))])
    assert len(quantised_layers(learn.model)) == 2
    # the step sizes joined the optimizer, the hints' convolution left it
    assert sum(len(group) for group in learn.opt.param_lists) == number + 4
    parameters = {id(p) for group in learn.opt.param_lists for p in group}
    assert parameters == {id(p) for p in learn.model.parameters()}


def test_what_it_did_is_said():
    learn = make_learner()
    learn.model = nn.Sequential(*learn.model[:3], nn.ConvTranspose2d(4, 4, 3), *learn.model[3:])
    learn.create_opt()
    fit(learn, 1, [cb := QAT(first_last_bits=None)])
    assert cb.summary == (
        "0, 6 at 4-bit weights, 4-bit inputs; 1 BatchNorms re-estimated; "
        "skipped 3 (it is transposed: its filters lie along the other axis)"
    )
    assert QuantAware(4, 6, first_last_bits=None).expected() == Expected(weight_bits=4, act_bits=6)
    assert QuantAware(4, 6).expected() == Expected(weight_bits=4, act_bits=6, estimate=True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"weight_bits": 1}, "weight_bits must be a whole number from 2 to 8, got 1"),
        ({"act_bits": 32}, "act_bits must be a whole number from 2 to 8, got 32"),
        ({"first_last_bits": 0}, "first_last_bits must be"),
        ({"own": {"fc": (4, 9)}}, r"own: fc must have two widths from 2 to 8, got \(4, 9\)"),
        ({"layers": "fc"}, "layers must be a list of names"),
        ({"images": 1}, "images must be a whole number from 2, got 1"),
        ({"norm_images": -1}, "norm_images must be a whole number from 0, got -1"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        QuantAware(**arguments)


@pytest.mark.parametrize(
    ("cbs", "says"),
    [
        ([lambda: QAT(layers=("nowhere",))], "the network has no layer 'nowhere'"),
        ([lambda: QAT(layers=("1",))], "quantise does not work on 1"),
        ([lambda: QAT(own={"1": (4, 4)})], "own: the network has no layer '1' that is to be quantised"),
        ([QAT, lambda: PruneChannels(0.5)], "channels are removed in the same fit"),
        ([QAT, QAT], "a fit can have one QuantAware"),
    ],
)
def test_fits_that_cannot_be_are_refused_untouched(cbs, says):
    learn = make_learner()
    before = {name: value.clone() for name, value in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        fit(learn, 1, [make() for make in cbs])
    assert list(learn.model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in learn.model.state_dict().items())


def test_channels_of_a_quantised_network_stay():
    model = train_small([QAT()], 0).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError):  # noqa: PT011 - which layer is named is the dependencies' matter
        train_small([PruneChannels(0.5)], model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_digits_are_learned_with_four_bits():
    data = digits(batch_size=64).limit(640)
    torch.manual_seed(0)
    plan = Fit("qat", epochs=3, lr=0.1, opt=sgd(), cbs=(partial(QuantAware, 4, 4, images=128, norm_images=256),))
    learn = learner_of(plan, small_net(), data)
    run_fit(learn, plan, Console(quiet=True))
    assert set(bits_of(learn.model).values()) == {(4, 4), (8, 8)}
    images, labels = (torch.cat(parts) for parts in zip(*learn.dls.valid, strict=True))
    with torch.no_grad():
        assert (learn.model.eval()(images).argmax(1) == labels).float().mean() > 0.8
