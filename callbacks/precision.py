"""bf16 compute and channels_last memory, on a CPU as on a GPU.

What: the forward pass runs under `torch.autocast` in bfloat16, the network and its batches in channels_last memory; the
weights and the optimizer stay float32, the logits come back as float32.
When: on a CPU with AVX512-BF16 instructions (about twice the images a second) and on a GPU. fastai's own `to_bf16` does
nothing on a CPU.
Cost: no copy of the weights; results differ from float32 in the third digit.
Interactions: converts the batch after MixUp and CutMix (order 0) made it. Validation inside a fit is in bf16, too.
Source: torch.autocast's documentation; measured per CPU-second with ResNet-20: 502 images/s against 246 plain.
"""

from collections.abc import Callable
from typing import Any

import torch
from fastai.callback.core import Callback
from torch import nn


def bf16_speeds_up(device: str | torch.device) -> bool:
    """Whether bf16 autocast is faster than float32 on this device.

    Args:
        device: a CPU, a CUDA GPU, or another device (for which the answer is no: untried).
    """
    kind = torch.device(device).type
    if kind == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported())
    return kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


class _Autocast:
    """A forward pass under bf16 autocast; an object, not a closure, so that a copied network runs its own copy."""

    def __init__(self, forward: Callable[..., Any], device_type: str) -> None:
        self.__wrapped__, self.device_type = forward, device_type  # the name that functools.wraps gives it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device_type, torch.bfloat16):
            return self.__wrapped__(*args, **kwargs)


class Precision(Callback):
    """Runs the fit in bf16 and channels_last.

    Args:
        bf16: whether the forward pass runs under autocast.
        channels_last: whether weights and batches lie in channels_last memory.
    """

    order = 10  # after MixUp and CutMix, order 0

    def __init__(self, bf16: bool = True, channels_last: bool = True) -> None:
        super().__init__()
        self.bf16, self.channels_last = bf16, channels_last
        self._wrapped: nn.Module | None = None
        self._relaid: nn.Module | None = None

    def before_fit(self) -> None:
        """Wrap the network's forward pass; first undo what an aborted fit left."""
        self._undo()
        module = self.learn.model
        if self.channels_last:
            module.to(memory_format=torch.channels_last)
            self._relaid = module
        if self.bf16:
            device_type = next(module.parameters()).device.type
            # Wrapping one object, and not entering autocast in one event and leaving it in another: whatever is raised
            # in between, the process does not stay in autocast.
            module.forward = _Autocast(module.forward, device_type)
            self._wrapped = module

    def before_batch(self) -> None:
        """Lay the batch out in channels_last memory."""
        if self.channels_last:
            self.learn.xb = tuple(
                x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in self.learn.xb
            )

    def after_pred(self) -> None:
        """Give the loss and the metrics float32 logits."""
        if self.bf16:
            self.learn.pred = self.learn.pred.float()

    def after_fit(self) -> None:
        """Leave the network as it was found."""
        self._undo()

    def _undo(self) -> None:
        if self._wrapped is not None:
            del self._wrapped.forward  # the instance's attribute; the class's method shows again
        if self._relaid is not None:
            self._relaid.to(memory_format=torch.contiguous_format)
        self._wrapped = self._relaid = None
