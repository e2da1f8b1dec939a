"""Zeros that stay: masks of a network's weights, kept through a fit.

What: `KeepZeros` sets masked weights to zero after each step of the optimizer, whatever gradient, momentum, weight
decay or another callback did to them.
When: in every fit of a network that has been sparsified. `Sparsify` does the same for the masks that it makes.
Cost: one pass over the masked weights a step.
Interactions: runs before the moving average (`EMA`, order 40) takes a step's weights in, so that the average has the
same zeros; `PruneChannels` cuts the masks with the weights.
Source: Zhu and Gupta 2017, "To prune, or not to prune": masks are applied at each step. A mask that is applied once, as
after `torch.nn.utils.prune.remove`, is gone after one step of momentum.
"""

from collections.abc import Mapping
from typing import Any

import torch
from fastai.callback.core import Callback
from torch import Tensor

from callbacks.protocol import tell
from callbacks.widths import for_each_weight, kept_of, take


@torch.no_grad()
def apply_masks(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set elements to zero, in place.

    Args:
        tensors: by name; ones that no mask names stay as they are.
        masks: by the same names, bool, of the same **shapes**: False where the element becomes zero.
    """
    for name, mask in masks.items():
        if name in tensors:
            # Not a product with the mask: that leaves -0.0 of negative weights, other bits than a file's zeros.
            tensors[name].masked_fill_(~mask, 0)


@torch.no_grad()
def forget_masked(opt: Any, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set to zero what an optimizer keeps for masked weights, such as their momentum.

    Args:
        opt: a torch optimizer, one of fastai's, or fastai's wrapper around one of torch's.
        tensors: the parameters by name.
        masks: by the same names, False where the weight is masked.
    """
    state = kept_of(opt)
    for name, mask in masks.items():
        for value in state.get(tensors[name], {}).values():
            if for_each_weight(value, mask):
                value.masked_fill_(~mask, 0)


def _cut(masks: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: take(mask, kept[name]) if name in kept else mask for name, mask in masks.items()}


def _two_of_four(mask: Tensor) -> bool:
    """Whether just two of each four consecutive input channels are kept, and not by chance."""
    if mask.dim() < 2 or mask.shape[1] % 4 or mask.numel() < 64:
        return False
    return bool((mask.movedim(1, -1).reshape(-1, 4).sum(1) == 2).all())


class KeepZeros(Callback):
    """Keeps masked weights at zero.

    Args:
        masks: for each masked parameter, by its name in the state dict, a bool tensor of its **shape**: False where
            the parameter is zero and stays so. As `Bundle.masks` and `Sparsify(...).masks` have them.

    Raises:
        ValueError: in `before_fit`, where the network has no such parameter, or one of another shape.
    """

    order = 30  # before EMA (40) averages a step's weights

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._given = dict(masks)
        self._masks: dict[str, Tensor] = {}

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks as they are now."""
        return self._masks

    def before_fit(self) -> None:
        """Check the masks against the network, and apply them."""
        parameters = dict(self.learn.model.named_parameters())
        for name, mask in self._given.items():
            if name not in parameters or mask.dtype is not torch.bool or mask.shape != parameters[name].shape:
                raise ValueError(f"masks: {name} is not a parameter of the network of that shape")
        self._masks = {name: mask.to(parameters[name].device) for name, mask in self._given.items()}
        self._mask()

    def after_step(self) -> None:
        """Set to zero what the step moved."""
        apply_masks(dict(self.learn.model.named_parameters()), self._masks)

    def resized(self, kept: Mapping[str, Tensor]) -> None:
        """Cut the masks as the weights were cut."""
        cut = _cut(self._masks, kept)
        broken = [n for n, mask in self._masks.items() if _two_of_four(mask) and not _two_of_four(cut[n])]
        if broken:
            raise ValueError(
                f"{broken[0]}: two of each four input channels are zero, and would not be any more: remove channels "
                "before the 2:4 zeros are made"
            )
        self._masks = cut
        # Where the fit had no epochs, channels go when this callback is through with it.
        self._given = _cut(self._given, kept)

    def after_fit(self) -> None:
        """Remember masks that were cut: they are what a further fit begins with."""
        self._given = self._masks

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on."""
        return {"masks": self._masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        parameters = dict(self.learn.model.named_parameters())
        self._masks = {name: mask.to(parameters[name].device) for name, mask in state["masks"].items()}

    def _mask(self) -> None:
        """Apply the masks to weights and momentum, and have all others do so to what they keep of the weights."""
        parameters = dict(self.learn.model.named_parameters())
        apply_masks(parameters, self._masks)
        forget_masked(self.learn.opt, parameters, self._masks)
        tell(self.learn, "masked", self._masks)
