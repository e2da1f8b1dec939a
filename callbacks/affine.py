"""A BatchNorm that can't be folded, as it is deployed: one factor and one summand for each channel.

What: `as_affine` puts a `ChannelAffine` in the place of BatchNorm modules; what they compute in eval mode stays, up to
    float32's rounding. The ledger counts both alike.
When: where a network is stored or handed to a runtime and its BatchNorm does not directly follow a layer.
Cost: none.
Interactions: it has no statistics, so that nothing re-estimates them; its factor and summand can be trained.
Source: Ioffe and Szegedy 2015, "Batch Normalization", section 3.1, https://arxiv.org/abs/1502.03167: with statistics
    that are fixed, a BatchNorm is a linear transform of each channel.
"""

from collections import OrderedDict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from callbacks.fold import NORMS, scale_and_shift, with_activation
from callbacks.modules import replace_module


class ChannelAffine(_NormBase):
    """Multiplies each channel by `weight` and adds `bias`, both `(C,)`.

    Args:
        num_features: channels, C.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, eps=1.0, momentum=None, affine=True, track_running_stats=False)
        # A BatchNorm of mean 0, variance 0 and epsilon 1 divides by exactly 1. They are no part of the state, and stay
        # right when a network is made narrower, which leaves zeros.
        self.register_buffer("running_mean", torch.zeros(num_features), persistent=False)
        self.register_buffer("running_var", torch.zeros(num_features), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `(N, C, ...)`."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


@torch.no_grad()
def as_affine(model: nn.Module, names: Iterable[str]) -> None:
    """Put factors and summands in the place of BatchNorm modules, in place.

    Args:
        model: the network.
        names: of BatchNorm modules with statistics of their own, or instance normalisations with such.

    Raises:
        ValueError: a module is none of these.
        AttributeError: the network has no module of that name.
    """
    for name in names:
        norm = model.get_submodule(name)
        known = type(norm) in NORMS or with_activation(norm)
        if not known or norm.running_var is None:
            raise ValueError(f"{name} is no BatchNorm with statistics of its own")
        affine = ChannelAffine(norm.num_features).to(norm.running_var.device)
        for value, number in zip((affine.weight, affine.bias), scale_and_shift([norm]), strict=True):
            value.copy_(number)
        parts = OrderedDict(affine=affine, drop=norm.drop, act=norm.act) if with_activation(norm) else None
        replace_module(model, norm, (nn.Sequential(parts) if parts else affine).train(norm.training))
