"""Distillation: a network learns from the answers of a better one, the teacher, as well as from the labels.

What: `Distill` adds to the task's loss how far the student's softened probabilities are from the teacher's:
`(1 - weight) * task + weight * temperature^2 * KL(teacher || student)`. Variants: logits standardised first (Sun et
al.), or the loss decoupled into what the teacher says of the label and of all other classes (Zhao et al.). What layers
tell inside can be compared, too (`distill_features.py`).
When: a small network, and a teacher of the same classes that is clearly better. A temperature of 4 suits most; a source
on few classes used 20, with weight 0.5.
Cost: one forward pass of the teacher a training step; nothing in validation, and nothing in any file.
Interactions: the teacher sees the very batch that the student sees, after MixUp and CutMix, whose two labels the
decoupled loss weighs as the task's loss does. The training loss that is shown is the whole sum, the validation loss the
plain task loss. `GradientClip` clips the student's gradient, not that of the adapters of `Hints`, which train with the
learning rate and weight decay of the optimizer's last group. Channels may be removed in the same fit. With `features`,
compiled networks are compiled again when a fit begins.
Source: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network"; Sun et al. 2024, "Logit
Standardization in Knowledge Distillation"; Zhao et al. 2022, "Decoupled Knowledge Distillation".
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.mixup import MixHandler
from torch import Tensor, nn

from callbacks.distill_features import Adapters, Feature
from callbacks.precision import Precision
from callbacks.soft_targets import Decouple as Decouple
from callbacks.soft_targets import decoupled_loss, mean_log_probs, soft_target_loss, standardise
from callbacks.taps import Taps, Teacher


def alike(one: Any, other: Any) -> bool:
    """Whether two networks' class names, or their means or standard deviations (to 1e-4), are the same."""
    if len(one) != len(other):
        return False
    pairs = list(zip(one, other, strict=True))
    return all(a == b or (not isinstance(a, str) and abs(a - b) < 1e-4) for a, b in pairs)


class Distill(Callback):
    """Trains on the answers of a teacher, or of several, and on the labels.

    Args:
        teacher: a module whose answers are logits `(N, C)` of the student's classes, or several modules, whose
            probabilities are averaged (feature losses, too). It is left as it is found.
        temperature: divides the logits of both before the softmax, above 0.
        weight: share of the soft targets' loss, in [0, 1]; the task's loss has the rest. At 0 only `features` count.
        standardise: whether each image's logits are standardised first.
        decouple: the factors of the decoupled loss; None for the plain divergence.
        features: losses between layers, `AttentionTransfer` and `Hints`, which are added.
        bf16: whether the teacher computes in bfloat16; None as the student does (`Precision`).
        compile: whether to `torch.compile` the teacher.
        classes: the teacher's class names in the order of its logits; compared with the data's where both are known.
        mean: what was subtracted from each channel of the teacher's images; compared likewise.
        std: what each channel was divided by; compared likewise.

    Raises:
        ValueError: an argument is out of its range; in `before_fit`, where teacher and student or data don't fit, or a
            layer does not exist; at the first batch, where their outputs don't fit.
    """

    # After MixUp and CutMix (0), whose loss and labels it builds on; before gradients are accumulated (6) or scaled
    # for float16 (10), which must happen to the whole loss.
    order = 5
    run_valid = False
    # What a pickled Learner (`learn.export`) leaves out: the teacher enters no file.
    _stateattrs = ("teachers", "_ready", "_taps", "_adapters")

    def __init__(
        self,
        teacher: nn.Module | Sequence[nn.Module],
        temperature: float = 4.0,
        weight: float = 0.5,
        *,
        standardise: bool = False,
        decouple: Decouple | None = None,
        features: Sequence[Feature] = (),
        bf16: bool | None = None,
        compile: bool = False,
        classes: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        several = isinstance(teacher, list | tuple | nn.ModuleList)
        self.teachers = tuple(teacher) if several else (teacher,)
        if not self.teachers or not all(isinstance(one, nn.Module) for one in self.teachers):
            raise ValueError(f"teacher must be a module or several (a file's is read by its reader), got {teacher!r}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must be a fraction in [0, 1], got {weight}")
        if not all(isinstance(feature, Feature) for feature in features):
            raise ValueError(f"features must be AttentionTransfer and Hints, got {features!r}")
        self.temperature, self.weight = temperature, weight
        self.standardise, self.decouple, self.features = standardise, decouple, tuple(features)
        self.bf16, self._compile = bf16, compile
        self.known = {"classes": classes, "mean": mean, "std": std}
        self._ready: list[Teacher] = []
        self._taps: Taps | None = None
        self._adapters: Adapters | None = None

    @property
    def summary(self) -> str:
        """What it does, in one line."""
        sizes = " and ".join(f"{sum(p.numel() for p in one.parameters()):,}" for one in self.teachers)
        parts = [f"taught by {sizes} parameters"]
        if self.weight:
            how = ", standardised" * self.standardise + ", decoupled" * (self.decouple is not None)
            parts.append(f"soft targets{how}, temperature {self.temperature:g}, weight {self.weight:g}")
        for feature in self.features:
            named = ", ".join(f"{ours} to {theirs}" for ours, theirs in feature.named)
            parts.append(f"{type(feature).__name__} of {named}, weight {feature.weight:g}")
        return "; ".join(parts)

    @property
    def training_loss(self) -> str:
        """What it makes of the training loss; empty where it adds nothing."""
        return "distillation" if self.weight or self.features else ""

    def before_fit(self) -> None:
        """Check that all fits together, and listen to the layers; first undo what an aborted fit left."""
        self._undo()
        student = self.learn.model
        own = set(map(id, student.parameters()))
        if any(id(p) in own for one in self.teachers for p in one.parameters()):
            raise ValueError("the teacher has weights of the network in training: give a copy (copy.deepcopy)")
        self._check_known(vars(self.learn.dls.train))
        bf16 = self.bf16
        if bf16 is None:
            bf16 = any(isinstance(cb, Precision) and cb.bf16 for cb in self.learn.cbs)
        pairs = [pair for feature in self.features for pair in feature.named]
        if pairs and (self._compile or any(m._compiled_call_impl is not None for m in student.modules())):
            torch.compiler.reset()  # code that was compiled before does not look for hooks
        device, theirs = next(student.parameters()).device, [name for _, name in pairs]
        self._ready = [Teacher(one, theirs, device, bf16, self._compile) for one in self.teachers]
        self._taps = Taps(student, [name for name, _ in pairs], "student")
        self._taps.open()
        self._adapters = Adapters(student)

    def _check_known(self, data: Mapping[str, Any]) -> None:
        for name, ours in self.known.items():
            theirs = data.get(name)
            if ours and theirs and not alike(ours, theirs):
                what = "its classes are" if name == "classes" else f"its images were normalised with {name}"
                raise ValueError(
                    f"the teacher does not suit the data: {what} {_some(ours)}, the data's {_some(theirs)}"
                )

    def before_batch(self) -> None:
        """Forget the layers' outputs of the batch before."""
        self._taps.forget()

    def after_loss(self) -> None:
        """Add what the teacher says to the loss."""
        if not self.weight and not self.features:
            return
        answers = [teacher(self.learn.xb) for teacher in self._ready]
        loss = self.learn.loss_grad
        if self.weight:
            loss = (1 - self.weight) * loss + self.weight * self._soft_loss(self.learn.pred, answers)
        for feature in self.features:
            loss = loss + feature.weight * self._feature_loss(feature)
        self.learn.loss_grad = loss
        self.learn.loss = loss.clone()

    def _soft_loss(self, pred: Tensor, answers: Sequence[Tensor]) -> Tensor:
        for answer in answers:
            if answer.shape != pred.shape:
                raise ValueError(
                    f"the teacher answers with {tuple(answer.shape)}, the student with {tuple(pred.shape)}: "
                    "images and classes of both must be the same"
                )
        student, teacher = self._log_probs(pred), mean_log_probs([self._log_probs(answer) for answer in answers])
        if self.decouple is None:
            losses = soft_target_loss(student, teacher)
        else:
            alpha, beta = self.decouple.alpha, self.decouple.beta
            losses = sum(
                share * decoupled_loss(student, teacher, labels, alpha, beta) for labels, share in self._labels()
            )
        return self.temperature**2 * losses.mean()

    def _log_probs(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        return F.log_softmax((standardise(logits) if self.standardise else logits) / self.temperature, -1)

    def _labels(self) -> list[tuple[Tensor, Tensor | float]]:
        """The batch's labels with their shares: two of each image where MixUp or CutMix made the batch."""
        labels = self.learn.yb[0]
        if labels.is_floating_point() or labels.dim() != 1:
            raise ValueError("the decoupled loss needs labels that are whole numbers (N,)")
        mixer = getattr(self.learn.loss_func, "__self__", None)  # while they mix, the loss is a method of theirs
        if not isinstance(mixer, MixHandler):
            return [(labels, 1.0)]
        return [(labels, mixer.lam), (mixer.yb1[0], 1 - mixer.lam)]

    def _feature_loss(self, feature: Feature) -> Tensor:
        losses = []
        for number, teacher in enumerate(self._ready):
            for ours, theirs in feature.named:
                student, target = self._taps[ours], teacher.taps[theirs]
                if feature.adapted:
                    student = self._adapters((ours, theirs, number), student, target)
                losses.append(feature.loss(student, target))
        return torch.stack(losses).sum() / len(self._ready)

    def before_step(self) -> None:
        """Have the optimizer step the adapters, too."""
        self._adapters.enter(self.learn.opt)

    def after_step(self) -> None:
        """Take the adapters out of the optimizer, their gradients used."""
        self._adapters.leave()
        self._adapters.zero_grad()

    def after_batch(self) -> None:
        """Take the adapters out of the optimizer where the step was left out, as when gradients are accumulated."""
        self._adapters.leave()
        self._taps.forget()

    def resized(self, kept: Mapping[str, Tensor]) -> None:
        """Take the same channels away from the adapters; in a fit without epochs there are none any more."""
        if self._adapters is not None:
            self._adapters.narrow(kept)

    def after_fit(self) -> None:
        """Stop listening."""
        self._undo()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on: the adapters; the teacher is not in it."""
        return {"adapters": self._adapters.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._adapters.load_state_dict(state["adapters"])

    def _undo(self) -> None:
        if self._taps is not None:
            self._taps.close()
            self._adapters.leave()
        self._ready, self._taps, self._adapters = [], None, None


def _some(values: Sequence[Any]) -> str:
    """The first of many, for a message."""
    more = f", ... {len(values)} in all" if len(values) > 4 else ""
    return (
        "(" + ", ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values[:4]) + more + ")"
    )
