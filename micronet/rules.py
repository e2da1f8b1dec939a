"""Whose rules turn a ledger into a score: each as data, with its source and its oddities.

A set of rules says which widths, which lines and which arrays count, and what scores 1. `RULES` holds them by name.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from callbacks.ledger import Ledger
from callbacks.seed import CIFAR100_OPS, CIFAR100_PARAMS
from micronet.counting import Assume, Tally, count_imt, count_imt_profile, count_official, count_seed

# What MobileNetV2-1.4 has at 32 bits; WideResNet-28-10's are the seed's, too.
IMAGENET_PARAMS, IMAGENET_OPS = 6.9e6, 1.17e9


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The accuracy below which a model has no score: a count of images, so that no rounding decides.

    Args:
        data: The data set whose test split is meant.
        correct: Images that must be right.
        images: Of how many.
    """

    data: str
    correct: int
    images: int


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How one source counts.

    Args:
        name: What the source is called here.
        params_norm: Parameters, in 32-bit words, that score 1.
        ops_norm: Operations that score 1.
        count: Counts a ledger by these rules, under assumptions.
        source: Where the rules were published.
        gate: The accuracy that qualifies.
        choices: Which of the following these rules leave to whoever counts; the others mean nothing to them.
        freebie: Whether a model that quantises nothing counts its numbers and multiplications at 16 bits.
        max_pool: Whether the comparisons of max pooling count as multiplications.
        free_batch_norm: Whether a BatchNorm that cannot be folded costs nothing.
        int_acc_bits: Width of the accumulators of integer sums, where the user states it; 32 without.
        adder_tree: Whether integer products are summed by a tree whose levels grow by one bit.
        ps: Share of weights removed with their structure, for rules that ask.
        pu: Share of the weights that is zero, for rules that ask; None reads it from the model.
        qw: Width of weights, for rules that ask; None reads it from the model.
        qa: Width of activations, likewise.
    """

    name: str
    params_norm: float
    ops_norm: float
    count: Callable[[Ledger, "Rules", Assume], Tally]
    source: str
    gate: Gate
    choices: tuple[str, ...] = ()
    freebie: bool = True
    max_pool: bool = False
    free_batch_norm: bool = False
    int_acc_bits: int | None = None
    adder_tree: bool = False
    ps: float = 0.0
    pu: float | None = None
    qw: int | None = None
    qa: int | None = None

    def options(self) -> dict[str, Any]:
        """What was chosen within these rules, as plain values."""
        return {name: getattr(self, name) for name in self.choices}


official = Rules(
    name="official",
    params_norm=CIFAR100_PARAMS,
    ops_norm=CIFAR100_OPS,
    count=count_official,
    source="MicroNet Challenge, final rules of 2019-09-04: https://micronet-challenge.github.io/scoring_and_submission",
    gate=Gate(data="cifar100", correct=8_000, images=10_000),
    choices=("freebie", "max_pool", "free_batch_norm", "int_acc_bits", "adder_tree"),
)
"""The challenge's final rules, on CIFAR-100.

Storage is that of the deployed form in 32-bit words, sparse tensors as values and a one-bit mask each. Multiplications
count by their widest input, additions at 32 bits unless narrower accumulators are stated; products with binary weights
count 1/32. A model that quantises nothing may count numbers and multiplications at 16 bits. Taps on padding count.
Oddities: max pooling is free (`max_pool` counts it); the mean of a global pool costs a multiplication for each channel;
additions of a sparse layer go below zero where fewer than one tap is left; additions stay at 32 bits under the freebie.
"""

official_imagenet = replace(
    official,
    name="official-imagenet",
    params_norm=IMAGENET_PARAMS,
    ops_norm=IMAGENET_OPS,
    gate=Gate(data="imagenet", correct=37_500, images=50_000),
)
"""The challenge's final rules, on ImageNet: MobileNetV2-1.4 scores 1 + 1, and 75 % top-1 qualify."""

seed = Rules(
    name="seed",
    params_norm=CIFAR100_PARAMS,
    ops_norm=CIFAR100_OPS,
    count=count_seed,
    source="the fastai entry to the MicroNet Challenge 2019, write-up of 2019-10-08",
    gate=Gate(data="cifar100", correct=8_000, images=10_000),
)
"""As the fastai entry counted, which printed 0.46343 for its WideResNet-22-6 (0.46343931, cut and not rounded).

Parameters are all parameters, BatchNorm's too, at full width. Convolutions, linear layers and global average pools
count and nothing else: no BatchNorm, ReLU, residual add. Oddities: multiplications are halved for 16 bits while the
parameters are not, a linear layer's bias is not added, and a global average pool adds once more per channel than it
has to. What the write-up's second version counted for ReLU is left out.
"""

imt = Rules(
    name="imt",
    params_norm=5.6e6,
    ops_norm=8.3e8,
    count=count_imt,
    source="a course on embedded systems: (1-(ps+pu)) qw/32 w/5.6e6 + (1-ps) max(qw,qa)/32 f/8.3e8",
    gate=Gate(data="cifar10", correct=9_000, images=10_000),
    choices=("ps", "pu", "qw", "qa"),
)
"""A course on embedded systems, on CIFAR-10: w all parameters, f the multiply-accumulates of the network as it stands.

Oddity: w and f of a structurally pruned network are already smaller, so that a `ps` above 0 counts its pruning twice.
"""

imt_small = replace(imt, name="imt-2.8e8", ops_norm=2.8e8, source=imt.source.replace("8.3e8", "2.8e8"))
"""The same course's other denominator."""

imt_profile = replace(
    imt,
    name="imt-profile",
    count=count_imt_profile,
    choices=(),
    source="the same course's counting script: all parameters and multiplications at 16 bits",
)
"""The course's own script: half of all parameters; mults / 2 + adds of convolutions and linear layers.

Oddities: 3 for each element that a BatchNorm gives, folded or not; 1 for each that a ReLU module gives, while a
functional ReLU is not seen; no pooling, no residual add, no bias of a linear layer.
"""

RULES = {rules.name: rules for rules in (official, official_imagenet, seed, imt, imt_small, imt_profile)}
