"""The contract of every public callback: a plain valid loss, and a Learner as found, however the fit ends."""

import ast
import copy
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.learner import Learner
from learners import make_learner, make_teacher
from torch import nn

import callbacks
from callbacks.checkpoint import Checkpoint, EarlyStop, KeepBest
from callbacks.distill import Distill
from callbacks.distill_features import AttentionTransfer, Hints
from callbacks.ema import EMA, update_average
from callbacks.masks import KeepZeros
from callbacks.op_counter import OpCounter
from callbacks.precision import Precision, bf16_speeds_up
from callbacks.prune import PruneChannels
from callbacks.quant_aware import QuantAware
from callbacks.quantize import QuantizeInt8
from callbacks.ramp import OneShot, Rounds
from callbacks.resize import ProgressiveResizing
from callbacks.sparsify import Sparsify

ROOT = Path(__file__).parent.parent
# How each public callback is made for the contract; a public callback that is missing here fails test_every_callback...
CASES = {
    Checkpoint: lambda folder: Checkpoint(folder / "checkpoint.pth"),
    EarlyStop: lambda folder: EarlyStop(5, monitor="valid_loss"),
    KeepBest: lambda folder: KeepBest(monitor="valid_loss"),
    Distill: lambda folder: Distill(make_teacher(), features=(AttentionTransfer({"0": "0"}), Hints({"2": "1"}))),
    EMA: lambda folder: EMA(0.9),
    KeepZeros: lambda folder: KeepZeros({"0.weight": torch.ones(4, 3, 3, 3).tril() > 0}),
    OpCounter: lambda folder: OpCounter(),
    Precision: lambda folder: Precision(bf16=True, channels_last=True),
    ProgressiveResizing: lambda folder: ProgressiveResizing(((0.5, 5),)),
    PruneChannels: lambda folder: PruneChannels(0.25, importance="taylor", schedule=OneShot(end=0.1)),
    QuantAware: lambda folder: QuantAware(4, 4, images=16, norm_images=16),
    QuantizeInt8: lambda folder: QuantizeInt8(images=8, floor=100),
    Sparsify: lambda folder: Sparsify(0.5, Rounds(start=0.1, rounds=3), criterion="taylor", rewind=0.1),
}


def modules():
    return [importlib.import_module(f"callbacks.{info.name}") for info in pkgutil.iter_modules(callbacks.__path__)]


def public_callbacks():
    found = {}
    for module in modules():
        for name, value in vars(module).items():
            own = inspect.isclass(value) and issubclass(value, Callback) and value.__module__ == module.__name__
            if own and not name.startswith("_"):
                found[name] = value
    return found


# What a callback leaves in the network, by design: the step sizes of layers that stay quantised.
STAYS = ("weight_scale", "act_scale")


def found(learn: Learner) -> dict:
    """What a callback may not leave changed."""
    parameters = [p for name, p in learn.model.named_parameters() if not name.endswith(STAYS)]
    return {
        "callbacks": sorted(cb.name for cb in learn.cbs),
        "loss": learn.loss_func,
        "model": learn.model,
        "forward": "forward" in vars(learn.model),
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in learn.model.modules()
        ],
        "metrics": [metric.name for metric in learn.metrics],
        "layout": [p.is_contiguous() for p in parameters],  # strides change where channels go
        "grad": [p.requires_grad for p in parameters],
        "keys": [name for name in learn.model.state_dict() if not name.endswith(STAYS)],
        "autocast": torch.is_autocast_enabled("cpu"),
    }


class Raise(Callback):
    """Raises at the second batch of the second epoch, in the middle of training or validation."""

    order = 11

    def __init__(self, error: BaseException, validating: bool = False) -> None:
        super().__init__()
        self.error, self.validating = error, validating

    def after_pred(self) -> None:
        if self.learn.epoch == 1 and self.learn.iter == 1 and self.learn.training != self.validating:
            raise self.error


def test_every_callback_has_a_case_here():
    assert set(public_callbacks().values()) == set(CASES)


@pytest.mark.parametrize("validating", [False, True], ids=["training", "validating"])
@pytest.mark.parametrize("ending", ["success", "cancel", "error", "ctrl-c"])
@pytest.mark.parametrize("cls", CASES, ids=lambda cls: cls.__name__)
def test_learner_is_left_as_it_was_found(cls, ending, validating, tmp_path):
    learn = make_learner()
    cb = CASES[cls](tmp_path)
    before = found(learn)
    errors = {"cancel": CancelFitException(), "error": RuntimeError("no"), "ctrl-c": KeyboardInterrupt()}
    with learn.no_mbar():
        if ending == "success":
            learn.fit(2, cbs=[cb])
        elif ending == "cancel":
            learn.fit(3, cbs=[cb, Raise(errors[ending], validating)])
        else:
            with pytest.raises(type(errors[ending])):
                learn.fit(3, cbs=[cb, Raise(errors[ending], validating)])
            assert found(learn)["autocast"] == before["autocast"]
            # Nothing is told to callbacks after such an end: the next fit has to begin by undoing what is left.
            learn.fit(1, cbs=[cb])
    assert found(learn) == before


@pytest.mark.parametrize("cls", CASES, ids=lambda cls: cls.__name__)
def test_valid_loss_is_the_plain_task_loss(cls, tmp_path):
    learn = make_learner()
    seen = {}

    class Look(Callback):
        order = 54

        def before_validate(self):
            seen["state"] = {name: value.clone() for name, value in self.learn.model.state_dict().items()}

    with learn.no_mbar():
        learn.fit(2, cbs=[CASES[cls](tmp_path), Look()])
    recorded = learn.recorder.values[-1][1]
    learn.model.load_state_dict(seen["state"])
    learn.model.eval()
    logits = torch.cat([learn.model(xb) for xb, _ in learn.dls.valid])
    plain = nn.functional.cross_entropy(logits, torch.cat([yb for _, yb in learn.dls.valid])).item()
    # bf16 keeps eight bits of each product
    assert recorded == pytest.approx(plain, rel=2e-2 if cls is Precision else 1e-5)


@pytest.mark.parametrize("cls", CASES, ids=lambda cls: cls.__name__)
def test_two_fits_with_one_instance_equal_two_instances(cls, tmp_path):
    finals = []
    for reuse in (True, False):
        learn = make_learner()
        one = CASES[cls](tmp_path)
        with learn.no_mbar():
            learn.fit(2, cbs=[one])
            learn.fit(2, cbs=[one if reuse else CASES[cls](tmp_path)])
        finals.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    assert torch.equal(*finals)


def test_callbacks_never_import_micronet():
    for module in modules():
        tree = ast.parse(Path(module.__file__).read_text())
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not [name for name in names if name.split(".")[0] == "micronet"], module.__name__
    names = ", ".join(module.__name__ for module in modules())
    code = f"import sys, {names}; sys.exit('micronet' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=False).returncode == 0


def test_method_cards_name_their_sources():
    for module in modules():
        if any(cls.__module__ == module.__name__ for cls in public_callbacks().values()):
            for part in ("What:", "When:", "Cost:", "Interactions:", "Source:"):
                assert part in module.__doc__, f"{module.__name__} lacks {part}"


def test_average_is_the_weighted_sum_of_what_went_in():
    average, values = torch.tensor([0.0]), torch.tensor([1.0])
    counter = torch.tensor(0)
    for step in range(1, 6):
        update_average([average, counter], [values, torch.tensor(step)], 0.9)
        assert average.item() == pytest.approx(1 - 0.9**step)
        assert counter == step


def test_ema_validates_with_the_average_and_ends_with_it():
    learn = make_learner()
    seen = []

    class Follow(Callback):
        order = 39  # before EMA

        def before_fit(self):
            self.mean, self.steps = learn.model[0].weight.detach().clone(), 0

        def after_step(self):
            self.steps += 1
            decay = min(0.9, (1 + self.steps) / (10 + self.steps))
            self.mean = decay * self.mean + (1 - decay) * learn.model[0].weight.detach()

        def after_validate(self):
            seen.append((self.mean.clone(), learn.model[0].weight.detach().clone()))

        def before_train(self):
            self.trained = learn.model[0].weight.detach().clone()

    with learn.no_mbar():
        learn.fit(3, cbs=[EMA(0.9), follow := Follow()])
    for mean, validated in seen:
        torch.testing.assert_close(validated, mean)
    torch.testing.assert_close(learn.model[0].weight.detach(), follow.mean)
    assert not torch.allclose(follow.trained, seen[1][0])  # training went on from the trained weights


def test_ema_refuses_a_decay_outside_its_range():
    with pytest.raises(ValueError, match="decay must be"):
        EMA(1.0)


def test_precision_computes_in_bf16_and_gives_float32(tmp_path):
    learn = make_learner()
    kinds = set()
    learn.model[0].register_forward_hook(lambda module, args, out: kinds.add((args[0].is_contiguous(), out.dtype)))

    class Look(Callback):
        order = 12

        def after_pred(self):
            kinds.add(self.learn.pred.dtype)

    with learn.no_mbar():
        learn.fit(1, cbs=[Precision(), Look()])
    assert (False, torch.bfloat16) in kinds
    assert torch.float32 in kinds
    assert torch.bfloat16 not in kinds
    assert all(p.dtype == torch.float32 for p in learn.model.parameters())


def test_a_copy_made_in_the_middle_of_a_bf16_fit_runs_its_own_weights():
    learn = make_learner()
    copies = []

    class Copy(Callback):
        order = 12

        def before_train(self):
            copies.append(copy.deepcopy(self.learn.model))

    with learn.no_mbar():
        learn.fit(1, cbs=[Precision(), Copy()])
    with torch.no_grad():
        for p in copies[0].parameters():
            p.zero_()
        assert not copies[0](torch.randn(2, 3, 8, 8)).any()
        assert learn.model.eval()(torch.randn(2, 3, 8, 8)).any()


def test_bf16_is_not_assumed_elsewhere():
    assert bf16_speeds_up("meta") is False
    assert isinstance(bf16_speeds_up("cpu"), bool)


def test_keep_best_ends_with_the_best_epochs_weights():
    learn = make_learner()
    kept = []

    class Worsen(Callback):
        order = 99

        def before_validate(self):
            kept.append(learn.model[5].bias.detach().clone())

        def before_train(self):
            if learn.epoch == 2:
                learn.opt.set_hypers(lr=5.0)

    with learn.no_mbar():
        learn.fit(4, 0.001, cbs=[best := KeepBest("valid_loss"), Worsen()])
    losses = [row[1] for row in learn.recorder.values]
    assert best.best_epoch == losses.index(min(losses))
    assert torch.equal(learn.model[5].bias.detach(), kept[best.best_epoch])


def test_early_stop_waits_as_long_as_it_is_told():
    learn = make_learner()
    with learn.no_mbar():
        learn.fit(20, 0.0, cbs=[EarlyStop(3, "valid_loss"), Freeze()])
    assert len(learn.recorder.values) == 4  # one best epoch, three without improvement


class Freeze(Callback):
    """Keeps BatchNorm's statistics from moving, so that nothing improves."""

    order = 13

    def before_train(self):
        self.learn.model.eval()


def test_a_monitor_that_is_no_column_is_named():
    learn = make_learner()
    with learn.no_mbar(), pytest.raises(ValueError, match="monitor must be one of train_loss, valid_loss"):
        learn.fit(1, cbs=[KeepBest("top9")])
