"""micronet's callbacks beside fasterai's, on the same network, images and seed: what each leaves behind.

Run: pip install fasterai==0.4.0, then pytest -m benchmark tests/benchmarks/test_fasterai.py -s      (about a minute)
Asserted is what micronet promises; what fasterai does is measured in the same run and printed beside it. Skipped
without fasterai, which is no dependency of the project.
"""

import contextlib
import io

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn

from callbacks.distill import Distill
from callbacks.masks import KeepZeros
from callbacks.prune import PruneChannels
from callbacks.ramp import Cubic, OneShot
from callbacks.sparsify import Sparsify
from micronet.data import digits, loaders
from micronet.models import resnet20

pytestmark = [pytest.mark.benchmark, pytest.mark.filterwarnings("ignore")]  # fasterai's own warnings
pytest.importorskip("fasterai", reason="compares with fasterai: pip install fasterai==0.4.0")

from fasterai.core.criteria import large_final  # noqa: E402  after the line that skips without it
from fasterai.core.schedule import Schedule, sched_agp, sched_oneshot  # noqa: E402
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback  # noqa: E402
from fasterai.distill.losses import SoftTarget  # noqa: E402
from fasterai.prune.prune_callback import PruneCallback  # noqa: E402
from fasterai.sparse.sparsify_callback import SparsifyCallback  # noqa: E402

START, END, SHARE = 0.2, 0.8, 0.6


class Watch(Callback):
    """The share of zeros after each optimizer step."""

    order = 99

    def before_fit(self) -> None:
        self.seen: list[float] = []

    def after_step(self) -> None:
        self.seen.append(zeros(self.learn.model))


def zeros(model: nn.Module) -> float:
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def learner() -> Learner:
    torch.manual_seed(0)
    learn = Learner(loaders(digits(batch_size=32), seed=0), resnet20(num_classes=10), CrossEntropyLossFlat(), lr=0.05)
    learn.logger = lambda _: None
    return learn


def fit(learn: Learner, epochs: int, *cbs: Callback) -> None:
    with learn.no_bar(), learn.no_mbar(), contextlib.redirect_stdout(io.StringIO()):
        learn.fit(epochs, cbs=[*cbs])


def in_optimizer(learn: Learner) -> tuple[int, int]:
    """How many of the network's parameters the optimizer holds, of how many."""
    held = {id(p) for p, *_ in learn.opt.all_params()}
    own = {id(p) for p in learn.model.parameters()}
    return len(held & own), len(own)


def trained(learn: Learner) -> tuple[int, int]:
    """How many of the network's parameters change in one more epoch, of how many."""
    before = {name: p.detach().clone() for name, p in learn.model.named_parameters()}
    fit(learn, 1)
    after = dict(learn.model.named_parameters())
    return sum(not torch.equal(before[name], after[name]) for name in before), len(before)


@pytest.mark.parametrize("whose", ["micronet", "fasterai"])
def test_ramp_and_zeros(whose):
    """The ramp begins and ends where it says; the zeros outlive the fit that made them."""
    learn, watch = learner(), Watch()
    if whose == "micronet":
        sparsify = Sparsify(SHARE, schedule=Cubic(start=START, end=END), skip=("fc",))  # fasterai takes convolutions
    else:
        sparsify = SparsifyCallback(
            SHARE, "weight", "global", large_final, Schedule(sched_agp, start_pct=START, end_pct=END)
        )
    fit(learn, 2, sparsify, watch)
    steps, last = len(watch.seen), zeros(learn.model)
    first = next(index for index, share in enumerate(watch.seen) if share > 0)
    full = next(index for index, share in enumerate(watch.seen) if share == last)
    fit(learn, 1, *([KeepZeros(sparsify.masks)] if whose == "micronet" else []))
    print(
        f"\n{whose}: asked for {SHARE:.0%} between {START:.0%} and {END:.0%} of {steps} steps: first zeros after step "
        f"{first + 1} ({(first + 1) / steps:.1%}), all after step {full + 1} ({(full + 1) / steps:.1%}), {last:.4%} at "
        f"the end; after one more epoch {zeros(learn.model):.4%}"
    )
    if whose == "micronet":
        assert START * steps < first + 1 <= START * steps + 2  # at its very start the ramp is at nothing
        assert END * steps <= full + 1 <= END * steps + 1
        assert last == zeros(learn.model) == pytest.approx(SHARE, abs=1e-4)


@pytest.mark.parametrize("whose", ["micronet", "fasterai"])
def test_valid_loss_under_distillation(whose):
    """The recorded validation loss is the task's."""
    torch.manual_seed(1)
    teacher, learn = resnet20(num_classes=10).eval(), learner()
    if whose == "micronet":
        fit(learn, 1, Distill(teacher, temperature=20, weight=0.5))
    else:
        fit(learn, 1, KnowledgeDistillationCallback(teacher, SoftTarget, weight=0.5))
    recorded = learn.recorder.values[-1][1]
    learn.model.eval()
    with torch.no_grad():
        batches = [(learn.model(xb), yb) for xb, yb in learn.dls.valid]
    logits, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    plain = float(F.cross_entropy(logits, labels))
    print(f"\n{whose}: valid loss recorded {recorded:.4f}, plain cross-entropy {plain:.4f}")
    if whose == "micronet":
        assert recorded == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("whose", ["micronet", "fasterai"])
def test_optimizer_after_pruning(whose):
    """Every parameter of the pruned network is in the optimizer and trains on."""
    learn = learner()
    fit(learn, 1)
    if whose == "micronet":
        fit(learn, 1, PruneChannels(0.3, schedule=OneShot()))
    else:
        fit(learn, 1, PruneCallback(0.3, Schedule(sched_oneshot), "local", large_final))
    params = sum(p.numel() for p in learn.model.parameters())
    (held, own), (moved, _) = in_optimizer(learn), trained(learn)
    print(f"\n{whose}: {params:,} parameters left; {held} of {own} tensors in the optimizer, {moved} of {own} train on")
    if whose == "micronet":
        assert held == moved == own
        assert params < sum(p.numel() for p in resnet20(num_classes=10).parameters())
