"""Distillation: published formulae, the batch that the teacher sees, adapters that train, and nothing left behind."""

import copy
import math
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import LRFinder
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam, OptimWrapper
from hypothesis import given, settings
from hypothesis import strategies as st
from learners import make_learner, make_teacher
from torch import nn

import micronet.models as networks
from callbacks.checkpoint import Checkpoint
from callbacks.distill import Decouple, Distill
from callbacks.distill_features import AttentionTransfer, Hints, attention_loss, attention_map, hint_loss
from callbacks.op_counter import OpCounter
from callbacks.precision import Precision
from callbacks.protocol import tell
from callbacks.soft_targets import decoupled_loss, mean_log_probs, soft_target_loss, standardise
from callbacks.widths import narrow
from micronet.optim import CrossEntropy, adamw, decay_groups, muon, sgd

BASE = Path(__file__).parent / "data" / "resnet20_cifar10.pth"
BOTH = (AttentionTransfer({"0": "0"}), Hints({"2": "1"}, weight=0.5))


def log_softmax(*rows):
    return torch.tensor(rows, dtype=torch.float64).log_softmax(-1)


def fit(learn: Learner, *cbs: Callback, epochs: int = 1, lr: float | None = None) -> Learner:
    with learn.no_mbar():
        learn.fit(epochs, lr, cbs=list(cbs))
    return learn


def weights(learn: Learner) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in learn.model.state_dict().values()])


class Look(Callback):
    """Notes what each training batch's loss is made of, once `Distill` (order 5) has changed it."""

    order = 6
    run_valid = False

    def before_fit(self):
        self.seen = []

    def after_loss(self):
        learn = self.learn
        task = learn.loss_func(learn.pred, *learn.yb)
        self.seen.append({"pred": learn.pred.detach().clone(), "xb": learn.xb[0].clone(), "task": task.item()})
        self.seen[-1] |= {"loss": learn.loss.item(), "grad": learn.loss_grad.item(), "yb": learn.yb[0]}
        mixer = getattr(learn.loss_func, "__self__", None)
        if mixer is not None:
            self.seen[-1] |= {"lam": mixer.lam, "yb1": mixer.yb1[0]}


# The formulae.


def test_the_divergence_of_numbers_worked_out_by_hand():
    # Teacher (3/4, 1/4), student (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2).
    teacher, student = log_softmax([math.log(3), 0]), log_softmax([0.0, 0.0])
    assert soft_target_loss(student, teacher).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert soft_target_loss(teacher, teacher).item() == 0


def test_several_teachers_probabilities_are_averaged():
    one, two = log_softmax([math.log(3), 0]), log_softmax([0.0, 0.0])
    assert mean_log_probs([one, two]).exp().tolist()[0] == pytest.approx([0.625, 0.375])
    assert mean_log_probs([one]) is one
    # The same gradient as the mean of the divergences.
    grads = []
    for loss in (
        lambda s: soft_target_loss(s, mean_log_probs([one, two])),
        lambda s: (soft_target_loss(s, one) + soft_target_loss(s, two)) / 2,
    ):
        logits = torch.tensor([[0.3, -1.0]], dtype=torch.float64, requires_grad=True)
        loss(logits.log_softmax(-1)).sum().backward()
        grads.append(logits.grad)
    torch.testing.assert_close(*grads)


NUMBERS = st.floats(-8, 8)


@given(st.integers(2, 6).flatmap(lambda c: st.tuples(*[st.lists(NUMBERS, min_size=c, max_size=c)] * 2)), st.data())
@settings(max_examples=40, deadline=None)
def test_the_decoupled_loss_is_the_published_one_and_contains_the_plain_one(logits, data):
    student, teacher = (torch.tensor([row], dtype=torch.float64) for row in logits)
    label = data.draw(st.integers(0, student.shape[1] - 1))
    p, q = (z.softmax(-1)[0].tolist() for z in (teacher, student))
    others = [i for i in range(len(p)) if i != label]
    rest, rest_q = sum(p[i] for i in others), sum(q[i] for i in others)
    target = p[label] * math.log(p[label] / q[label]) + rest * math.log(rest / rest_q)
    among = sum(p[i] / rest * math.log((p[i] / rest) / (q[i] / rest_q)) for i in others)
    args = student.log_softmax(-1), teacher.log_softmax(-1), torch.tensor([label])
    assert decoupled_loss(*args, 1.0, 8.0).item() == pytest.approx(target + 8 * among, abs=1e-9)
    assert decoupled_loss(*args, 0.5, 0.0).item() == pytest.approx(target / 2, abs=1e-9)
    # Equation 6: KD = TCKD + (1 - p_t) NCKD.
    torch.testing.assert_close(decoupled_loss(*args, 1.0, rest), soft_target_loss(*args[:2]), rtol=0, atol=1e-9)


def test_the_decoupled_losss_gradient_is_a_number_where_a_class_is_certain():
    logits = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[300.0, 0.0, -300.0]]).log_softmax(-1)
    decoupled_loss(logits.log_softmax(-1), teacher, torch.tensor([0]), 1.0, 8.0).sum().backward()
    assert logits.grad.isfinite().all()


def test_standardised_logits_forget_shift_and_scale():
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(standardise(logits), expected)
    torch.testing.assert_close(standardise(3.5 * logits - 2), expected)
    zero = torch.zeros(1, 4, requires_grad=True)
    standardise(zero).square().sum().backward()
    assert zero.grad.isfinite().all()


def test_attention_is_the_published_one():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4, 5, 5, dtype=torch.float64), torch.randn(3, 7, 5, 5, dtype=torch.float64)
    maps = [(x**2).sum(1).reshape(3, -1) for x in (student, teacher)]
    unit = [m / (m**2).sum(1, keepdim=True).sqrt() for m in maps]
    assert attention_loss(student, teacher).item() == pytest.approx(((unit[0] - unit[1]) ** 2).mean().item())
    assert attention_loss(teacher, teacher).item() == 0
    assert attention_loss(2 * student, -5 * teacher).item() == pytest.approx(attention_loss(student, teacher).item())


def test_maps_of_another_size_are_averaged_to_the_smaller_one():
    student, teacher = torch.randn(2, 3, 8, 4), torch.randn(2, 5, 4, 8)
    pooled = [F.avg_pool2d(attention_map(x)[:, None], k).flatten(1) for x, k in ((student, (2, 1)), (teacher, (1, 2)))]
    expected = (F.normalize(pooled[0]) - F.normalize(pooled[1])).square().mean()
    torch.testing.assert_close(attention_loss(student, teacher), expected)
    small = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(hint_loss(student, small), (F.avg_pool2d(student, (2, 1)) - small).square().mean())


# The loss of a fit.

MIXES = {"plain": (), "mixup": (partial(MixUp, 0.4),), "cutmix": (partial(CutMix, 1.0),)}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mix", MIXES)
def test_the_loss_is_the_tasks_share_and_the_teachers(mix, smoothing):
    learn, teacher = make_learner(), make_teacher().eval()
    learn.loss_func = CrossEntropy(smoothing)
    fit(learn, Distill(teacher, temperature=20, weight=0.7), look := Look(), *[make() for make in MIXES[mix]])
    assert len(look.seen) == 4
    for batch in look.seen:
        with torch.no_grad():
            p, q = ((z.double() / 20).softmax(-1) for z in (teacher(batch["xb"]), batch["pred"]))
        divergence = (p * (p / q).log()).sum(-1).mean().item()
        expected = 0.3 * batch["task"] + 0.7 * 400 * divergence
        assert batch["loss"] == pytest.approx(expected, rel=1e-4)
        assert batch["grad"] == batch["loss"]
    if mix != "plain":
        mixed = torch.cat([batch["xb"] for batch in look.seen])
        images = torch.stack([image for image, _ in learn.dls.train.dataset])
        assert not all(any(torch.equal(one, image) for image in images) for one in mixed)


@pytest.mark.parametrize("mix", MIXES)
def test_the_decoupled_loss_weighs_both_labels_of_a_mixed_image(mix):
    learn, teacher = make_learner(), make_teacher().eval()
    cb = Distill(teacher, temperature=2, weight=1, decouple=Decouple(alpha=1, beta=3))
    fit(learn, cb, look := Look(), *[make() for make in MIXES[mix]])
    for batch in look.seen:
        with torch.no_grad():
            args = [(z.double() / 2).log_softmax(-1) for z in (batch["pred"], teacher(batch["xb"]))]
        lam = batch.get("lam", 1.0)
        expected = lam * decoupled_loss(*args, batch["yb"], 1, 3)
        if mix != "plain":
            expected = expected + (1 - lam) * decoupled_loss(*args, batch["yb1"], 1, 3)
        assert batch["loss"] == pytest.approx(4 * expected.mean().item(), rel=1e-4)


def test_labels_without_a_class_are_refused_by_the_decoupled_loss():
    learn = make_learner()
    learn.loss_func = lambda pred, y: F.cross_entropy(pred, y)  # without y_int, MixUp mixes the labels themselves
    learn.dls.train.dataset = [(x, F.one_hot(y, 3).float()) for x, y in learn.dls.train.dataset]
    with pytest.raises(ValueError, match="labels that are whole numbers"):
        fit(learn, Distill(make_teacher(), decouple=Decouple()), MixUp(0.4))


def test_standardised_training_forgets_the_teachers_scale():
    finals = []
    for factor in (1.0, 7.0):
        teacher = make_teacher()
        with torch.no_grad():
            teacher[5].weight.mul_(factor)
            teacher[5].bias.mul_(factor)
        finals.append(weights(fit(make_learner(), Distill(teacher, weight=1, standardise=True))))
    torch.testing.assert_close(*finals, rtol=1e-3, atol=1e-4)
    plain = weights(fit(make_learner(), Distill(make_teacher(), weight=1)))
    assert not torch.allclose(plain, finals[0], rtol=1e-2, atol=1e-3)


def test_weight_zero_is_plain_training_bit_for_bit():
    finals = [weights(fit(make_learner(), *cbs, epochs=2)) for cbs in ((), (Distill(make_teacher(), weight=0),))]
    assert torch.equal(*finals)


@pytest.mark.parametrize("decouple", [None, Decouple()])
def test_a_student_that_equals_its_teacher_has_no_gradient(decouple):
    learn, norms = make_learner(), []
    learn.model[1].requires_grad_(False)

    class Still(Callback):
        run_valid = False

        def before_train(self):
            self.learn.model.eval()  # a teacher's BatchNorm is

        def before_step(self):
            norms.append(max(p.grad.abs().max() for p in self.learn.model.parameters() if p.grad is not None))

    fit(learn, Distill(copy.deepcopy(learn.model), weight=1, decouple=decouple), Still(), lr=0.0)
    assert max(norms) < 1e-6


def test_accumulated_gradients_hold_the_whole_loss():
    finals = []
    for size, cbs in ((16, ()), (8, (GradientAccumulation(16),))):
        learn = make_learner()
        learn.dls = type(learn.dls)(learn.dls.train.new(bs=size, shuffle=False), learn.dls.valid)
        learn.model[1] = nn.Identity()  # BatchNorm sees another batch
        learn.create_opt()
        learn.opt_func = sgd(0.0, nesterov=False)
        learn.opt = None
        fit(learn, Distill(make_teacher(), features=BOTH), *cbs, lr=0.01)
        finals.append(weights(learn))
    torch.testing.assert_close(*finals, rtol=1e-4, atol=1e-6)


def test_clipping_clips_the_whole_losss_gradient():
    class Norm(Callback):
        order = 12

        def before_step(self):
            norms.append(torch.cat([p.grad.flatten() for p in self.learn.model.parameters()]).norm())

    norms = []
    fit(make_learner(), Distill(make_teacher(), features=BOTH), GradientClip(1e-3), Norm())
    assert max(norms) < 1.01e-3


# The teacher.


class Spy(nn.Module):
    """A teacher that notes how it is called."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.calls, self.fail = net, [], False
        net[0].register_forward_hook(lambda module, args, out: self.calls.append(out.dtype))
        self.inputs, self.flags = [], []

    def forward(self, x):
        if self.fail:
            raise RuntimeError("no")
        self.inputs.append(x.clone())
        self.flags.append((any(m.training for m in self.modules()), torch.is_grad_enabled()))
        return self.net(x)


def state_of(teacher: nn.Module) -> dict:
    return {
        "training": [m.training for m in teacher.modules()],
        "hooks": [len(m._forward_hooks) for m in teacher.modules()],
        "grad": [(p.requires_grad, p.grad) for p in teacher.parameters()],
        "strides": [p.stride() for p in teacher.parameters()],
        "values": torch.cat([v.flatten().double() for v in teacher.state_dict().values()]).tolist(),
        "own": sorted(vars(teacher)),
    }


def mixed_teacher() -> Spy:
    """In train mode but for one layer, one parameter frozen: what careless callbacks even out."""
    spy = Spy(make_teacher()).train()
    spy.net[1].eval()
    spy.net[0].weight.requires_grad_(False)
    return spy


@pytest.mark.parametrize("ending", ["success", "error", "ctrl-c", "its own error"])
def test_the_teacher_is_left_as_it_is_found_and_runs_in_eval_mode(ending):
    spy = mixed_teacher()
    before = state_of(spy)

    class Stop(Callback):
        order = 7

        def after_loss(self):
            if self.learn.iter == 2 and ending != "success":
                spy.fail = ending == "its own error"
                if not spy.fail:
                    raise {"error": RuntimeError("no"), "ctrl-c": KeyboardInterrupt()}[ending]

    cbs = Distill(spy, features=(AttentionTransfer({"0": "net.0"}),)), Precision(), Stop()
    if ending == "success":
        fit(make_learner(), *cbs)
    else:
        raised = {"error": RuntimeError, "ctrl-c": KeyboardInterrupt, "its own error": ValueError}[ending]
        with pytest.raises(raised):
            fit(make_learner(), *cbs)
    assert state_of(spy) == before
    assert len(spy.flags) >= 3
    assert set(spy.flags) == {(False, False)}


@pytest.mark.parametrize("mix", MIXES)
def test_the_teacher_sees_the_students_batch_once_and_none_of_validation(mix):
    learn, spy, inputs = make_learner(), Spy(make_teacher()), []
    learn.model.register_forward_pre_hook(lambda m, args: inputs.append(args[0].clone()) if m.training else None)
    fit(learn, Distill(spy, features=(AttentionTransfer({"0": "net.0"}),)), Precision(), *[m() for m in MIXES[mix]])
    assert len(spy.inputs) == len(inputs) == 4
    for seen, shown in zip(spy.inputs, inputs, strict=True):
        assert torch.equal(seen, shown)
        assert seen.stride() == shown.stride()


@pytest.mark.parametrize(
    ("cbs", "bf16", "kind"),
    [
        ((), None, torch.float32),
        ((Precision,), None, torch.bfloat16),
        ((Precision,), False, torch.float32),
        ((), True, torch.bfloat16),
        ((partial(Precision, bf16=False),), None, torch.float32),
    ],
)
def test_the_teacher_computes_as_the_student_does_unless_told(cbs, bf16, kind):
    spy = Spy(make_teacher())
    fit(make_learner(), Distill(spy, bf16=bf16), *[make() for make in cbs])
    assert set(spy.calls) == {kind}


def test_a_teacher_on_another_device_is_copied_there():
    teacher = make_teacher().to("meta")  # stands in for a GPU's: its own tensors stay where they are
    learn = make_learner()
    with pytest.raises(NotImplementedError):
        fit(learn, Distill(teacher))
    assert {p.device.type for p in teacher.parameters()} == {"meta"}


def test_the_network_in_training_is_not_its_own_teacher():
    learn = make_learner()
    with pytest.raises(ValueError, match="weights of the network in training"):
        fit(learn, Distill(learn.model))


def test_a_compiled_teacher_and_a_compiled_student_learn_the_same_in_every_fit(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # hooks and guards, no code
    finals = []
    for compiled in (False, True):
        learn, teacher = make_learner(), make_teacher()
        if compiled:
            learn.model.compile(backend="eager")
        fit(learn)  # without hooks
        fit(learn, Distill(teacher, features=BOTH, compile=compiled))
        fit(learn, Distill(teacher, features=BOTH, compile=compiled))
        assert teacher._compiled_call_impl is None
        finals.append(weights(learn))
    torch.testing.assert_close(*finals)


# Layers and adapters.

OPTIMIZERS = {
    "sgd": {"opt_func": sgd()},
    "adamw, two groups": {"opt_func": adamw(), "splitter": decay_groups},
    "fastai's Adam": {"opt_func": Adam},
    "muon": {"opt_func": muon()},
}


def with_optimizer(way: str) -> Learner:
    plain = make_learner()
    learn = Learner(plain.dls, plain.model, CrossEntropyLossFlat(), lr=0.01, **OPTIMIZERS[way])
    learn.logger = lambda _: None
    return learn


class Watch(Callback):
    """Notes the adapters' weights before each step, and the optimizer's size between steps."""

    order = 7
    run_valid = False

    def before_fit(self):
        self.adapters, self.sizes, self.states = [], set(), []

    def before_batch(self):
        self.sizes.add(sum(map(len, self.learn.opt.param_lists)))

    def after_batch(self):
        self.before_batch()
        kept = self.learn.distill.state_dict()["adapters"]
        self.adapters.append([value.clone() for entry in kept for value in entry["state"].values()])
        self.states.append([state for entry in kept for state in entry["optimizer"]])


@pytest.mark.parametrize("way", OPTIMIZERS)
def test_adapters_train_and_leave_no_trace(way):
    learn = with_optimizer(way)
    learn.create_opt()
    keys, groups = list(learn.model.state_dict()), [len(group) for group in learn.opt.param_lists]
    state = learn.opt.opt.state if isinstance(learn.opt, OptimWrapper) else learn.opt.state
    fit(learn, Distill(make_teacher(), features=(Hints({"0": "0", "2": "1"}),)), watch := Watch(), epochs=2)
    assert [value.shape for value in watch.adapters[0]] == [(6, 4, 1, 1), (6,)] * 2
    for before, after in zip(watch.adapters, watch.adapters[1:], strict=False):
        assert not any(map(torch.equal, before, after))
    # No normalisation follows an adapter: its size has to be learned, too, by an optimizer that keeps norms (Muon).
    assert watch.adapters[-1][0].norm() != pytest.approx(float(watch.adapters[0][0].norm()), rel=1e-5)
    # What the optimizer keeps of them goes from step to step.
    assert all({"momentum_buffer", "exp_avg", "grad_avg"} & set(state) for state in watch.states[-1])
    assert all(state.get("step", 8) == 8 for state in watch.states[-1])
    assert watch.sizes == {sum(groups)}
    assert [len(group) for group in learn.opt.param_lists] == groups
    assert len(state) == sum(groups)
    assert list(learn.model.state_dict()) == keys


def test_hints_are_learned():
    learn = make_learner()
    losses = []

    class NoteLoss(Callback):
        order = 6
        run_valid = False

        def after_loss(self):
            losses.append(self.learn.loss.item() - self.learn.loss_func(self.learn.pred, *self.learn.yb).item())

    fit(learn, Distill(make_teacher(), weight=0, features=(Hints({"2": "0"}),)), NoteLoss(), epochs=15, lr=0.1)
    assert losses[-1] < 0.6 * losses[0]


def test_a_steps_exception_leaves_an_optimizer_that_the_next_fit_mends():
    learn, cb = make_learner(), Distill(make_teacher(), features=BOTH)
    learn.create_opt()
    size = sum(map(len, learn.opt.param_lists))

    class Stop(Callback):
        order = 8

        def before_step(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(learn, cb, Stop())
    fit(learn, cb, watch := Watch())
    assert watch.sizes == {size}
    assert sum(map(len, learn.opt.param_lists)) == size


def test_the_learning_rate_finder_finds_the_optimizer_as_it_was(tmp_path):
    learn = make_learner()
    learn.path = tmp_path
    before = weights(learn)
    with learn.no_mbar():
        finder = LRFinder(num_it=6)
        learn.fit(2, cbs=[Distill(make_teacher(), features=BOTH), finder])  # a state that does not fit would warn
    assert torch.equal(weights(learn), before)


def test_a_copy_of_the_student_does_not_speak_for_it():
    class Copy(Callback):
        order = 4
        run_valid = False

        def after_loss(self):
            copied = copy.deepcopy(self.learn.model)
            copied(torch.ones(8, 3, 8, 8))

    # The score's column traces a copy, too.
    finals = [
        weights(fit(make_learner(), Distill(make_teacher(), features=BOTH), *cbs))
        for cbs in ((), (Copy(), OpCounter()))
    ]
    assert torch.equal(*finals)


def test_what_a_layer_gave_is_kept_although_the_next_one_works_in_place():
    def learner(inplace):
        learn = make_learner()
        learn.model[2] = nn.ReLU(inplace=inplace)
        return learn

    finals = [weights(fit(learner(one), Distill(make_teacher(), features=(Hints({"1": "1"}),)))) for one in (0, 1)]
    assert torch.equal(*finals)


def test_removed_channels_leave_the_adapter_too():
    learn, kept = make_learner(), torch.tensor([0, 2, 3])
    answers = []

    class Remove(Callback):
        order = 25
        run_valid = False

        def after_batch(self):
            if (self.learn.epoch, self.learn.iter) != (0, 1):
                return
            model, cb = self.learn.model, self.learn.distill
            x = torch.randn(2, 4, 3, 3)
            x[:, 1] = 0
            adapters = cb._adapters
            keys = [tuple(entry["key"]) for entry in cb.state_dict()["adapters"]]
            answers.append([adapters(key, x, x) for key in keys])
            places, table = {}, {"0": {"in_channels": 3, "out_channels": 3, "groups": 1}, "1": {"num_features": 3}}
            table["5"] = {"in_features": 3, "out_features": 3}
            for name, value in model.state_dict().items():
                if value.dim() and name != "5.bias":
                    axis = 1 if name == "5.weight" else 0
                    places[name] = torch.arange(value.numel()).reshape(value.shape).index_select(axis, kept)
            narrow(model, places, table, self.learn.opt)
            tell(self.learn, "resized", places)
            answers.append([adapters(key, x[:, kept], x) for key in keys])

    features = (Hints({"0": "0", "1": "1"}),)
    fit(learn, Distill(make_teacher(), features=features), watch := Watch(), Remove(), epochs=2)
    for whole, cut in zip(*answers, strict=True):
        torch.testing.assert_close(cut, whole)
    assert watch.adapters[-1][0].shape == (6, 3, 1, 1)
    assert not torch.equal(watch.adapters[-1][0], watch.adapters[-2][0])


def test_channels_that_went_no_one_knows_where_are_an_error():
    class Remove(Callback):
        order = 7
        run_valid = False

        def after_batch(self):
            self.learn.model[2] = nn.Sequential(nn.ReLU(), Half())
            self.learn.model[5] = nn.Linear(2, 3)
            self.learn.distill._taps.close()
            self.learn.distill._taps = type(self.learn.distill._taps)(self.learn.model, ["2"], "student")
            self.learn.distill._taps.open()

    class Half(nn.Module):
        def forward(self, x):
            return x[:, :2]

    with pytest.raises(ValueError, match="which of its 4 channels the student's layer '2' lost"):
        fit(make_learner(), Distill(make_teacher(), features=(Hints({"2": "0"}),)), Remove())


# What does not fit together.


class Wrong(nn.Module):
    """A network whose answers are whatever a function says."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.layer, self.answer = nn.Conv2d(3, 2, 3), answer

    def forward(self, x):
        return self.answer(x, self.layer)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Distill(make_teacher(classes=10)), r"answers with \(8, 10\), the student with \(8, 3\)"),
        (lambda: Distill(Wrong(lambda x, layer: layer(x))), "one tensor of logits"),
        (lambda: Distill(Wrong(lambda x, layer: (x, x))), "one tensor of logits"),
        (
            lambda: Distill(Wrong(lambda x, _: x[:, :, 0, 0]), features=(Hints({"0": "layer"}),)),
            "layer 'layer' of the teacher did not run",
        ),
        (
            lambda: Distill(make_teacher(), features=(AttentionTransfer({"3": "0"}),)),
            "a map of one place, 1 x 1, says nothing",
        ),
        (
            lambda: Distill(make_teacher(), features=(AttentionTransfer({"layer9": "0"}),)),
            "the student has no layer 'layer9'; its parts are 0, 1, 2, 3, 4, 5",
        ),
        (lambda: Distill(make_teacher(), features=(Hints([("0", "")]),)), "the teacher has no layer ''"),
    ],
)
def test_what_does_not_fit_is_an_error_before_the_first_step(make, says):
    learn = make_learner()
    before = [p.detach().clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match=says):
        fit(learn, make())
    assert all(map(torch.equal, before, learn.model.parameters()))


@pytest.mark.parametrize(
    ("known", "says"),
    [
        ({"classes": ("a", "c", "b")}, r"its classes are \(a, c, b\), the data's \(a, b, c\)"),
        ({"classes": ("a", "b")}, r"its classes are \(a, b\), the data's \(a, b, c\)"),
        ({"mean": (0.5, 0.5, 0.4)}, r"normalised with mean \(0.5, 0.5, 0.4\), the data's \(0.5, 0.5, 0.5\)"),
        ({"std": (0.2, 0.2, 0.3)}, r"normalised with std \(0.2, 0.2, 0.3\), the data's \(0.2, 0.2, 0.2\)"),
    ],
)
def test_classes_and_normalisation_are_compared(known, says):
    learn = make_learner()
    vars(learn.dls.train).update(classes=("a", "b", "c"), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    fit(learn, Distill(make_teacher(), classes=["a", "b", "c"], mean=(0.5, 0.5, 0.50001), std=[0.2] * 3))
    with pytest.raises(ValueError, match=says):
        fit(learn, Distill(make_teacher(), **known))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"weight": 1.5}, r"weight must be a fraction in \[0, 1\], got 1.5"),
        ({"teacher": "resnet20.pth"}, "teacher must be a module"),
        ({"teacher": []}, "teacher must be a module"),
        ({"features": ("layer1",)}, "features must be AttentionTransfer and Hints"),
    ],
)
def test_arguments_out_of_their_range_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        Distill(**({"teacher": make_teacher()} | arguments))
    with pytest.raises(ValueError, match="alpha and beta"):
        Decouple(alpha=-1)
    for pairs in ({}, ("layer1", "layer2"), {1: 2}):
        with pytest.raises(ValueError, match="pairs must name layers"):
            Hints(pairs)
    with pytest.raises(ValueError, match="weight must be above 0"):
        Hints({"a": "b"}, weight=0)


# Files.


def test_the_teacher_enters_no_file(tmp_path):
    sizes = {}
    for width in (6, 6000):
        cb = Distill(make_teacher(width), features=(AttentionTransfer({"0": "0"}),))
        learn = fit(make_learner(), cb, Checkpoint(tmp_path / "checkpoint.pth"))
        learn.save(tmp_path / "learner")
        files = [path.stat().st_size for path in (tmp_path / "checkpoint.pth", tmp_path / "learner.pth")]
        sizes[width] = [*files, len(pickle.dumps(cb))]  # as `learn.export` pickles it
    assert sum(p.numel() for p in make_teacher(6000).parameters()) * 4 > 700_000
    assert max(sizes[6000]) < 30_000
    assert sizes[6] == pytest.approx(sizes[6000], rel=0.05)


def test_the_summary_is_one_line():
    cb = Distill([make_teacher(), make_teacher()], 20, standardise=True, features=BOTH)
    assert cb.summary == (
        "taught by 201 and 201 parameters; soft targets, standardised, temperature 20, weight 0.5; "
        "AttentionTransfer of 0 to 0, weight 1000; Hints of 2 to 1, weight 0.5"
    )


# On the project's networks.

STUDENT_LAYERS = {
    "densenet121": "features",
    "googlenet": "inception3b",
    "separable_net": "layer3",
    "wide_resnet": "group2",
    "timm": "blocks.2",
}
SMALL = {"wide_resnet": {"depth": 10, "width": 2}, "separable_net": {"width_multiplier": 0.25}}


def one_step(student, ours, teacher, theirs, size):
    """A step of each variant; the loss is finite, and every weight that the step could reach has moved."""
    data = torch.utils.data.TensorDataset(torch.randn(4, 3, size, size), torch.randint(0, 10, (4,)))
    dls = DataLoaders.from_dsets(data, data, bs=4, num_workers=0, device="cpu")
    learn = Learner(dls, student, CrossEntropy(), opt_func=sgd(), lr=1e-4)  # untrained teachers have large outputs
    learn.logger = lambda _: None
    features = AttentionTransfer({ours: theirs}), Hints({ours: theirs})
    for arguments in ({"features": features}, {"standardise": True, "decouple": Decouple()}):
        before = [p.detach().clone() for p in student.parameters()]
        fit(learn, Distill(teacher, **arguments), Precision(), MixUp(0.4))
        assert math.isfinite(learn.recorder.losses[-1])
        moved = [not torch.equal(p, old) for p, old in zip(student.parameters(), before, strict=True)]
        assert sum(moved) > 0.9 * len(moved)


def test_a_separable_student_of_a_residual_teacher():
    student = networks.separable_net(num_classes=10, width_multiplier=0.25)
    one_step(student, "layer2", networks.resnet20(num_classes=10), "layer2", 32)


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", [*networks.__all__, "efficientnet_b0", "mobilenetv3_small_100"])
def test_every_network_learns_and_teaches(name, size):
    if hasattr(networks, name):
        net, layer = getattr(networks, name)(num_classes=10, **SMALL.get(name, {})), STUDENT_LAYERS.get(name, "layer2")
    else:
        import timm

        net, layer = timm.create_model(name, num_classes=10), "blocks.2"
    one_step(networks.resnet20(num_classes=10), "layer2", net, layer, size)
    one_step(net, layer, networks.resnet20(num_classes=10), "layer2", size)
