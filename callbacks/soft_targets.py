"""Losses between a student's and a teacher's answers, as functions of log-probabilities; `Distill` adds them up.

Source: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network"; Sun et al. 2024, "Logit
Standardization in Knowledge Distillation"; Zhao et al. 2022, "Decoupled Knowledge Distillation".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor


def standardise(logits: Tensor) -> Tensor:
    """Each image's logits `(N, C)` less their mean, over their standard deviation.

    Source: Sun et al. 2024, algorithm 1: the deviation over all C classes, where their program divides by C - 1.
    """
    centred = logits - logits.mean(-1, keepdim=True)
    # The small number is for equal logits, as a last layer of zeros gives them: their gradient would not be a number.
    return centred * (centred.square().mean(-1, keepdim=True) + 1e-12).rsqrt()


def mean_log_probs(answers: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean of several teachers' probabilities.

    The arithmetic mean: its divergence has the same gradient as the mean of the divergences from each teacher.

    Args:
        answers: log-probabilities, each `(N, C)`.

    Source: Hinton et al. 2015, section 5.
    """
    return answers[0] if len(answers) == 1 else torch.stack(tuple(answers)).logsumexp(0) - log(len(answers))


def soft_target_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the student from the teacher for each image, `(N,)`.

    Args:
        student: log-probabilities `(N, C)`.
        teacher: log-probabilities `(N, C)`.
    """
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def decoupled_loss(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, beta: float) -> Tensor:
    """`alpha` times the divergence on "the label or not", plus `beta` times that among all other classes, `(N,)`.

    With alpha 1 and beta the probability that the teacher gives to the other classes, it is `soft_target_loss`.

    Args:
        student: log-probabilities `(N, C)`.
        teacher: log-probabilities `(N, C)`.
        labels: int64 `(N,)`.
        alpha: at least 0.
        beta: at least 0.

    Source: Zhao et al. 2022, equations 4 to 7.
    """
    label = F.one_hot(labels, student.shape[-1]).bool()
    sides, others = [], []
    for log_probs in (student, teacher):
        rest = log_probs.masked_fill(label, float("-inf")).logsumexp(-1, keepdim=True)
        sides.append(torch.cat([log_probs.gather(-1, labels[:, None]), rest], -1))
        others.append((log_probs - rest).masked_fill(label, float("-inf")))
    # At the label both are -inf, whose difference is not a number: its share is zero.
    among = (others[1].exp() * (others[1] - others[0]).masked_fill(label, 0)).sum(-1)
    return alpha * soft_target_loss(*sides) + beta * among


@dataclass(frozen=True)
class Decouple:
    """The two factors of the decoupled loss.

    Args:
        alpha: of "the label or not", at least 0.
        beta: of the other classes among themselves, at least 0; the source has 1 to 8, larger for a surer teacher, and
            lets the loss grow over its first 20 epochs: begin with a small `weight`, or clip the gradient.

    Raises:
        ValueError: a factor is below 0.
    """

    alpha: float = 1.0
    beta: float = 8.0

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.beta < 0:
            raise ValueError(f"alpha and beta must be at least 0, got {self.alpha} and {self.beta}")
