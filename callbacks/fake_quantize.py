"""Layers that compute with quantised weights and inputs in training already, with step sizes that are learned.

A quantised layer is the layer that it was, of the same parameters under the same names, with two more: `weight_scale`,
a step size for each output, and `act_scale`, one for its input. Its forward rounds both to whole steps, in float32
whatever autocast says. In training the gradient goes through the rounding as if it were not there, and to the step
sizes as LSQ has it. In eval mode the rounding is one operation, `micronet::fake_quantize`, which tracers see as one.

Weights are symmetric: codes from -(2^(b-1) - 1) to 2^(b-1) - 1, so that a negative factor folded into them flips signs
and nothing else. Inputs are from 0 to 2^b - 1 where they are not negative, else from -2^(b-1) to 2^(b-1) - 1.
Source: Esser et al. 2020, "Learned Step Size Quantization", https://arxiv.org/abs/1902.08153, eq. 1 to 5.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from callbacks.modules import computes_plainly

BITS = range(2, 9)
# A step of 0 would divide by it. Folding a BatchNorm multiplies steps, so that small ones are no error.
LEAST = 1e-30


def weight_range(bits: int) -> tuple[int, int]:
    """The least and the largest code of a weight of some bits."""
    return 1 - (1 << (bits - 1)), (1 << (bits - 1)) - 1


def act_range(bits: int, signed: bool) -> tuple[int, int]:
    """The least and the largest code of an input of some bits."""
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def along_rows(values: Tensor, x: Tensor) -> Tensor:
    """A number for each row of a tensor, in a shape that the tensor can be multiplied with."""
    return values.reshape(-1, *[1] * (x.dim() - 1))


def along(scale: Tensor, x: Tensor) -> Tensor:
    """Step sizes, one for all or one for each row, in a shape that a tensor can be divided by; all above 0."""
    return (along_rows(scale, x) if scale.dim() else scale).abs().clamp_min(LEAST)


def round_to_codes(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """The codes of numbers, in float32: whole numbers from `low` to `high`, halves to the even one.

    Args:
        x: any **shape**.
        scale: step sizes: `()`, or `(N,)` for the N rows of `x`.
        low: least code.
        high: largest code.
    """
    return (x.float() / along(scale, x)).round_().clamp_(low, high)


def _rounded(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    # Adding 0 makes 0.0 of -0.0: codes are whole numbers, which have one zero.
    return round_to_codes(x, scale, low, high).mul_(along(scale, x)).add_(0.0).to(x.dtype)


# Not `torch.library.custom_op`, whose first call imports torch's compiler, for seconds.
_LIBRARY = torch.library.Library("micronet", "DEF")
_LIBRARY.define("fake_quantize(Tensor x, Tensor scale, int low, int high) -> Tensor")
_LIBRARY.impl("fake_quantize", _rounded, "CompositeExplicitAutograd")
torch.library.register_fake("micronet::fake_quantize", lambda x, *_: torch.empty_like(x), lib=_LIBRARY)


class _Learned(torch.autograd.Function):
    """Rounds, with LSQ's gradients: 1 in range; for the step size `code - x / scale` in range, else the end of it.

    One thing is not the paper's: a number that rounds to the last code is in range, up to `high + 0.5`, as torch's own
    fake quantisation has it; the paper's range ends at `high`. Weights that lie on their last codes can move.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, damping: float) -> Tensor:
        ratio, size = x.float() / along(scale, x), along(scale, x)
        ctx.save_for_backward(ratio)
        ctx.low, ctx.high, ctx.damping, ctx.rows, ctx.dtype = low, high, damping, scale.dim(), x.dtype
        return ratio.round().clamp_(low, high).mul_(size).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ratio,) = ctx.saved_tensors
        grad, ends = grad.float(), (ctx.low - 0.5, ctx.high + 0.5)
        keep = torch.ops.aten.hardtanh_backward  # its first argument where the second is in range, else 0: one pass
        slope = ratio.round().clamp_(ctx.low, ctx.high).sub_(keep(ratio, ratio, *ends)).mul_(grad)
        step = slope.flatten(1).sum(1) if ctx.rows else slope.sum()
        return keep(grad, ratio, *ends).to(ctx.dtype), step.mul_(ctx.damping), None, None, None


def fake_quantize(x: Tensor, scale: Tensor, low: int, high: int, numbers: int) -> Tensor:
    """Round numbers to whole steps.

    Args:
        x: any **shape** and type, which the result has, too; the arithmetic is float32.
        scale: step sizes: `()`, or `(N,)` for the N rows of `x`.
        low: least code.
        high: largest code.
        numbers: how many numbers share a step size, in one image: it damps the step size's gradient, by
            `1 / sqrt(numbers * high)`.

    Source: Esser et al. 2020, eq. 1 to 3 and section 2.2, but for where the range ends: half a step beyond the last
    code, as in torch's `fake_quantize_per_tensor_affine`.
    """
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return _Learned.apply(x, scale, low, high, (max(1, numbers) * high) ** -0.5)
    return torch.ops.micronet.fake_quantize(x, scale, low, high)


class Quantised(nn.Module):
    """What quantised layers have in common; `quantise_layer` makes them of a layer.

    Args:
        weight_bits: width of a weight's code, 2 to 8.
        act_bits: width of an input's code, 2 to 8.
        act_signed: whether inputs may be negative.
        weight_scale: step size of each output's weights, `(out,)`.
        act_scale: step size of the input, `()`.
    """

    weight_bits: int
    act_bits: int
    act_signed: bool
    weight: nn.Parameter
    weight_scale: nn.Parameter
    act_scale: nn.Parameter

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The codes of the weights: int8, of their **shape**; times `weight_scale`, what the layer computes with."""
        return round_to_codes(self.weight, self.weight_scale, *weight_range(self.weight_bits)).to(torch.int8)

    @torch.no_grad()
    def freeze(self) -> None:
        """Make the weights what the layer computes with, codes times scale, in place; again, it changes nothing."""
        self._above_0()
        self.weight.copy_(self.codes().float() * along(self.weight_scale, self.weight))

    @torch.no_grad()
    def _above_0(self) -> None:
        """Reflect step sizes that a step of an optimizer has taken past 0."""
        for scale in (self.weight_scale, self.act_scale):
            scale.abs_().clamp_min_(LEAST)

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        """Multiply the weights by a factor for each output, in place: signs go to the codes, sizes to the step sizes.

        Args:
            factor: `(out,)`; where it is 0, the codes become 0.
        """
        signs = along_rows(factor.sign(), self.weight).float()
        codes = self.codes().float() * signs + 0.0  # 0.0 of -0.0
        self._above_0()
        step = (self.weight_scale.double() * factor.abs()).float()
        # A step that float32 can't hold makes zeros.
        self.weight_scale.copy_(torch.where(step < LEAST, self.weight_scale, step))
        self.weight.copy_(codes.mul_(along_rows(step >= LEAST, codes)) * along(self.weight_scale, codes))

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input and weights as the layer computes with them."""
        if self.training and torch.is_grad_enabled():
            self._above_0()
        each = self.weight.shape[1:].numel()
        weight = fake_quantize(self.weight, self.weight_scale, *weight_range(self.weight_bits), each)
        return fake_quantize(x, self.act_scale, *act_range(self.act_bits, self.act_signed), x.shape[1:].numel()), weight

    def extra_repr(self) -> str:
        """What is printed of it."""
        kind = "signed" if self.act_signed else "unsigned"
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}, act_bits={self.act_bits} {kind}"


class QuantConv2d(Quantised, nn.Conv2d):
    """A convolution with quantised weights and input."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `(N, C, H, W)`."""
        x, weight = self.operands(x)
        return self._conv_forward(x, weight, self.bias)


class QuantLinear(Quantised, nn.Linear):
    """A linear layer with quantised weights and input."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `(..., in_features)`."""
        x, weight = self.operands(x)
        return F.linear(x, weight, self.bias)


def quantise_layer(layer: nn.Module, weight_bits: int, act_bits: int, act_signed: bool) -> None:
    """Make a layer a quantised one, in place: it stays the same object, and its parameters, hooks and places do.

    Step sizes are 1 at first, those of a layer that is quantised already stay.

    Args:
        layer: a plain convolution or linear layer, or a quantised one.
        weight_bits: width of the weights, 2 to 8.
        act_bits: width of the input, 2 to 8.
        act_signed: whether inputs may be negative.

    Raises:
        ValueError: it is another layer, or a width is out of range.
    """
    for name, bits in (("weight_bits", weight_bits), ("act_bits", act_bits)):
        if type(bits) is not int or bits not in BITS:
            raise ValueError(f"{name} must be a whole number from 2 to 8, got {bits!r}")
    if type(act_signed) is not bool:
        raise ValueError(f"act_signed must be True or False, got {act_signed!r}")
    if not isinstance(layer, Quantised):
        if not computes_plainly(layer):
            raise ValueError(f"a {type(layer).__name__} can't be quantised")
        weight = layer.weight
        layer.__class__ = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
        ones = torch.ones(len(weight), device=weight.device)
        layer.weight_scale = nn.Parameter(ones, requires_grad=weight.requires_grad)
        layer.act_scale = nn.Parameter(ones[0].clone(), requires_grad=weight.requires_grad)
    layer.weight_bits, layer.act_bits, layer.act_signed = weight_bits, act_bits, act_signed


def quantised_layers(model: nn.Module) -> dict[str, Quantised]:
    """The quantised layers of a network, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantised)}


def bits_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The widths of a network's quantised layers: by name, of the weights and of the input."""
    return {name: (layer.weight_bits, layer.act_bits) for name, layer in quantised_layers(model).items()}
