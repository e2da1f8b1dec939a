"""BatchNorm folded into the layer before it: the same answers, by data flow, and nothing folded that must stay."""

import copy
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from counting import Run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import micronet.models as networks
from callbacks.fold import drop_norms, fold_norms
from callbacks.fold_plan import plan_folds
from callbacks.ledger import build
from callbacks.op_trace import trace
from micronet import MicronetError
from micronet.edits import fold_bn, replay
from micronet.models import preact_resnet18, resnet20, separable_net

SIZE = (4, 8, 8)


def lively(model, seed=0):
    """A network in eval mode, its normalisations far from doing nothing: negative and zero factors, too."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0, 1, generator=generator)
            module.running_var.uniform_(0.01, 4, generator=generator)
            module.eps = 0.1
            if module.weight is not None:
                with torch.no_grad():
                    module.weight.normal_(0, 1, generator=generator)
                    module.weight[0] = 0
                    module.bias.normal_(0, 1, generator=generator)
    return model.eval()


def conv(bias=False, c=4):
    return nn.Conv2d(4, c, 3, padding=1, bias=bias)


def folded(model, size=SIZE):
    """The network with all folded that can be, and the plan."""
    plan = plan_folds(model, trace(model, size))
    changed = copy.deepcopy(model)
    fold_norms(changed, plan.layers)
    return changed, plan


class Padding(nn.Conv2d):
    """Does more than to convolve, as timm's Conv2dSame."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


FOLDING = {
    "a class of its own": (lambda s, x: s.bn(s.a(x)), {"a": Padding(4, 4, 3, bias=False), "bn": nn.BatchNorm2d(4)}),
    "in order": (lambda s, x: s.bn(s.a(x)), {"a": conv(), "bn": nn.BatchNorm2d(4)}),
    "with a bias": (lambda s, x: s.bn(s.a(x)), {"a": conv(True), "bn": nn.BatchNorm2d(4)}),
    "registered first": (lambda s, x: s.bn(s.a(x)), {"bn": nn.BatchNorm2d(4), "a": conv()}),
    "crossed": (
        lambda s, x: s.bn_b(s.b(F.relu(s.bn_a(s.a(x))))),
        {"a": conv(), "bn_b": nn.BatchNorm2d(4), "b": conv(), "bn_a": nn.BatchNorm2d(4)},
    ),
    "without scale and shift": (lambda s, x: s.bn(s.a(x)), {"a": conv(), "bn": nn.BatchNorm2d(4, affine=False)}),
    "depthwise": (lambda s, x: s.bn(s.a(x)), {"a": nn.Conv2d(4, 8, 3, groups=4), "bn": nn.BatchNorm2d(8)}),
    "transposed": (lambda s, x: s.bn(s.a(x)), {"a": nn.ConvTranspose2d(4, 6, 3), "bn": nn.BatchNorm2d(6)}),
    "transposed in groups": (
        lambda s, x: s.bn(s.a(x)),
        {"a": nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), "bn": nn.BatchNorm2d(6)},
    ),
    "linear": (lambda s, x: s.bn(s.a(x.flatten(1))), {"a": nn.Linear(256, 5), "bn": nn.BatchNorm1d(5)}),
    "linear, channels moved": (
        lambda s, x: s.bn(s.a(x.flatten(2)).transpose(1, 2)),
        {"a": nn.Linear(64, 5), "bn": nn.BatchNorm1d(5)},
    ),
    "several outputs to a channel": (
        lambda s, x: s.bn(s.a(x.flatten(1)).unflatten(1, (4, 3, 3))),
        {"a": nn.Linear(256, 36), "bn": nn.BatchNorm2d(4)},
    ),
    "dropout between": (lambda s, x: s.bn(F.dropout(s.a(x), 0.5, s.training)), {"a": conv(), "bn": nn.BatchNorm2d(4)}),
    "two in a row": (
        lambda s, x: s.bn2(s.bn(s.a(x))),
        {"a": conv(), "bn": nn.BatchNorm2d(4), "bn2": nn.BatchNorm2d(4)},
    ),
    "instance norm with statistics of its own": (
        lambda s, x: s.bn(s.a(x)),
        {"a": conv(), "bn": nn.InstanceNorm2d(4, affine=True, track_running_stats=True)},
    ),
    "one norm behind two layers": (
        lambda s, x: s.bn(s.a(x)) + s.bn(s.b(x)),
        {"a": conv(), "b": conv(), "bn": nn.BatchNorm2d(4)},
    ),
    "one norm by two names": (
        lambda s, x: s.again(s.a(x)),
        (lambda bn: {"bn": bn, "a": conv(), "again": bn})(nn.BatchNorm2d(4)),
    ),
    "with activation": (lambda s, x: s.bn(s.a(x)), {"a": conv(), "bn": timm.layers.BatchNormAct2d(4)}),
    "a factor behind it stays": (lambda s, x: s.bn(s.a(x)) * 0.5, {"a": conv(), "bn": nn.BatchNorm2d(4)}),
}


@pytest.mark.parametrize("name", FOLDING)
def test_what_folds_is_gone_and_the_answers_stay(name):
    forward, children = FOLDING[name]
    model = lively(copy.deepcopy(Run(forward, **children)))
    changed, plan = folded(model)
    assert not plan.stays
    assert not any(isinstance(m, nn.modules.batchnorm._NormBase) for m in changed.modules())
    x = torch.randn(3, *SIZE)
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(x.double())
        assert float((changed(x).double() - wanted).norm() / wanted.norm()) < 2e-6
    again = copy.deepcopy(model)
    drop_norms(again, plan.layers)
    again.load_state_dict(changed.state_dict())
    assert torch.equal(again(x), changed(x))


class Standardised(nn.Conv2d):
    """Computes with other weights than those that it has."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, padding=1)


STAYING = {
    "in front": (lambda s, x: s.a(s.bn(x)), {"a": conv(), "bn": nn.BatchNorm2d(4)}, {"bn"}),
    "behind the activation": (lambda s, x: s.bn(s.a(x).relu()), {"a": conv(), "bn": nn.BatchNorm2d(4)}, {"bn"}),
    "layer read twice": (
        lambda s, x: (y := s.a(x), s.bn(y) + y)[1],
        {"a": conv(), "bn": nn.BatchNorm2d(4)},
        {"bn"},
    ),
    "layer is an output, too": (
        lambda s, x: torch.cat([y := s.a(x), s.bn(y)]),
        {"a": conv(), "bn": nn.BatchNorm2d(4)},
        {"bn"},
    ),
    "layer runs twice": (
        lambda s, x: s.bn2(s.a(s.bn(s.a(x)))),
        {"a": conv(), "bn": nn.BatchNorm2d(4), "bn2": nn.BatchNorm2d(4)},
        {"bn", "bn2"},
    ),
    "layer runs twice, once without": (
        lambda s, x: s.a(s.bn(s.a(x))),
        {"a": conv(), "bn": nn.BatchNorm2d(4)},
        {"bn"},
    ),
    "weights are read elsewhere": (
        lambda s, x: s.bn(s.a(x)) * s.a.weight.mean(),
        {"a": conv(), "bn": nn.BatchNorm2d(4)},
        {"bn"},
    ),
    "norm runs twice, folds once": (
        lambda s, x: s.bn(F.relu(s.bn(s.a(x)))),
        {"a": conv(), "bn": nn.BatchNorm2d(4)},
        {"bn"},
    ),
    "behind one that stays": (
        lambda s, x: s.bn2(s.bn(s.a(x))) + s.bn(F.relu(x)),
        {"a": conv(), "bn": nn.BatchNorm2d(4), "bn2": nn.BatchNorm2d(4)},
        {"bn", "bn2"},
    ),
    "a factor between": (lambda s, x: s.bn(s.a(x) * 0.5), {"a": conv(), "bn": nn.BatchNorm2d(4)}, {"bn"}),
    "behind cat": (
        lambda s, x: s.bn(torch.cat([s.a(x), x], 1)),
        {"a": conv(), "bn": nn.BatchNorm2d(8)},
        {"bn"},
    ),
    "channels cut by a view": (
        lambda s, x: s.bn(s.a(x).view(-1, 8, 4, 8)),
        {"a": conv(), "bn": nn.BatchNorm2d(8)},
        {"bn"},
    ),
    "a function": (
        lambda s, x: F.batch_norm(s.a(x), s.bn.running_mean, s.bn.running_var, s.bn.weight, s.bn.bias),
        {"a": conv(), "bn": nn.BatchNorm2d(4)},
        {"batch_norm"},
    ),
    "weights made of its own": (
        lambda s, x: s.bn(s.a(x)),
        {"a": Standardised(4, 4, 3), "bn": nn.BatchNorm2d(4)},
        {"bn"},
    ),
    "weights made of others": (
        lambda s, x: s.bn(F.conv2d(x, s.a.weight / s.a.weight.norm())),
        {"a": conv(), "bn": nn.BatchNorm2d(4)},
        {"bn"},
    ),
    "a class of its own": (
        lambda s, x: s.bn(s.a(x)),
        {"a": conv(), "bn": type("Other", (nn.BatchNorm2d,), {})(4)},
        {"bn"},
    ),
}


@pytest.mark.parametrize("name", STAYING)
def test_what_must_stay_stays_and_is_named(name):
    forward, children, stays = STAYING[name]
    model = lively(copy.deepcopy(Run(forward, **children)))
    changed, plan = folded(model)
    assert set(plan.stays) == stays
    assert all(plan.stays.values())
    assert not plan.layers
    x = torch.randn(3, *SIZE)
    assert torch.equal(changed(x), model(x))
    with pytest.raises(MicronetError, match="no BatchNorm folds; "):
        fold_bn(model, input_size=SIZE)


def test_two_layers_of_one_weight_keep_it():
    a, b = conv(), conv()
    b.weight = a.weight
    model = lively(Run(lambda s, x: s.bn(s.a(x)) + s.b(x), a=a, b=b, bn=nn.BatchNorm2d(4)))
    assert set(plan_folds(model, trace(model, SIZE)).stays) == {"bn"}


def test_masked_weights_are_plain_zeros_afterwards():
    model = lively(Run(lambda s, x: s.bn(s.a(x)), a=conv(), bn=nn.BatchNorm2d(4)))
    with torch.no_grad():
        model.a.weight[:, ::2] = 0
        model.bn.weight.fill_(-1.0)
    changed, _ = folded(model)
    zeros = changed.a.weight[:, ::2]
    assert not zeros.any()
    assert not zeros.signbit().any()  # -0.0 is another number in a file


def test_a_layer_whose_forward_forgets_a_bias_is_refused():
    class Forgets(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight, padding=1)

    model = lively(Run(lambda s, x: s.bn(s.a(x)), a=Forgets(4, 4, 3, bias=False), bn=nn.BatchNorm2d(4)))
    with pytest.raises(MicronetError, match="runs other operations than the ledger says"):
        fold_bn(model, input_size=SIZE)


def test_a_norm_that_runs_unregistered_is_refused():
    model = lively(Run(lambda s, x: s.kept[0](s.a(x)), a=conv(), bn=nn.BatchNorm2d(4)))
    model.kept = [model.bn]  # a forward that keeps its layers in a list of its own
    with pytest.raises(MicronetError, match=r"runs other operations|should not change"):
        fold_bn(model, images=torch.randn(4, *SIZE))


def same_ledger(model, size):
    """The ledger counts a network as if it were folded: what is folded costs, and stores, the same."""
    changed = fold_bn(model, input_size=size).model
    before, after = (build(trace(m, size)) for m in (model, changed))
    for name in ("mults", "adds", "macs"):
        assert sum(getattr(line, name) for line in before.lines) == sum(getattr(line, name) for line in after.lines)

    def stored(ledger):
        return sorted((array.name, array.role, array.shape, array.bits) for array in ledger.arrays)

    assert stored(before) == stored(after)
    assert not [line.name for line in after.lines if line.op == "batch_norm" and line.folded]
    left = {line.name for line in before.lines if line.op == "batch_norm" and not line.folded}
    assert left == {line.name for line in after.lines if line.op == "batch_norm"}
    return changed


@pytest.mark.parametrize("factory", [resnet20, preact_resnet18, separable_net], ids=lambda f: f.__name__)
def test_what_the_ledger_says_folds_is_what_folds(factory):
    same_ledger(factory(num_classes=10), (3, 32, 32))


TIMM = ("efficientnet_b0", "mobilenetv3_small_100", "mobilenetv3_large_100", "tf_efficientnet_b0", "regnety_002")


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", [*networks.__all__, *TIMM])
def test_what_the_ledger_says_folds_is_what_folds_in_every_network(name, size):
    build_it = partial(timm.create_model, name) if name in TIMM else getattr(networks, name)
    model = lively(build_it(num_classes=10))
    changed = same_ledger(model, (3, size, size))
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        wanted = model.double()(x.double())
        assert float((changed(x).double() - wanted).norm() / wanted.norm()) < 1e-4


@st.composite
def pairs(draw):
    kernel, groups = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2]))
    torch.manual_seed(draw(st.integers(0, 99)))
    cls = draw(st.sampled_from([nn.Conv2d, nn.ConvTranspose2d]))
    layer = cls(4, draw(st.sampled_from([2, 4, 6])), kernel, groups=groups, bias=draw(st.booleans()))
    norm = nn.BatchNorm2d(layer.out_channels, affine=draw(st.booleans()), eps=draw(st.floats(1e-5, 1)))
    norm.running_var.uniform_(1e-4, 10)
    norm.running_mean.normal_()
    return nn.Sequential(layer, norm, nn.ReLU()).eval()


@settings(max_examples=25, deadline=None)
@given(pairs())
def test_any_pair_answers_as_before(model):
    x = torch.randn(2, 4, 7, 7)
    wanted = copy.deepcopy(model).double()(x.double()).detach()
    fold_norms(model, {"0": ["1"]})
    assert type(model[1]) is nn.Identity
    torch.testing.assert_close(model(x).double().detach(), wanted, rtol=1e-4, atol=1e-4)


def test_a_weight_is_rounded_once():
    layer, norm = nn.Conv2d(4, 6, 3), lively(nn.Sequential(nn.BatchNorm2d(6)))[0]
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = (layer.weight.double() * factor[:, None, None, None]).float()
    bias = ((layer.bias.double() - norm.running_mean.double()) * factor + norm.bias.double()).float()
    fold_norms(nn.Sequential(layer, norm), {"0": ["1"]})
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.bias, bias)


@pytest.mark.parametrize(
    "layers",
    [{"a": ["bn", "nowhere"]}, {"nowhere": ["bn"]}, {"relu": ["bn"]}, {"a": ["relu"]}, {"a": "bn"}, {"a": [3]}, ["a"]],
)
def test_a_log_that_does_not_fit_is_refused(layers):
    model = Run(lambda s, x: s.relu(s.bn(s.a(x))), a=conv(), bn=nn.BatchNorm2d(4), relu=nn.ReLU())
    with pytest.raises(MicronetError, match="fold_bn does not fit its network"):
        replay(model, {"edit": "fold_bn", "layers": layers})
