"""Exponential moving average of the weights.

What: keeps an average of all weights and BatchNorm statistics; validates with it, and leaves it in the network.
When: with any schedule; most useful in short fits, or where the learning rate ends high.
Cost: one more copy of the network, one multiply-add a weight and step.
Interactions: `KeepBest` keeps averaged weights. Zeros stay zero as long as the trained weights keep them zero.
Source: Polyak and Juditsky 1992; the rising decay is TensorFlow's `ExponentialMovingAverage(num_updates=...)`.
"""

from collections.abc import Iterable, Mapping

import torch
from fastai.callback.core import Callback
from torch import Tensor, nn

from callbacks.masks import apply_masks
from callbacks.modules import set_tensors, tensors
from callbacks.widths import take


@torch.no_grad()
def update_average(average: Iterable[Tensor], current: Iterable[Tensor], decay: float) -> None:
    """Move an average towards current values, in place: `average = decay * average + (1 - decay) * current`.

    Args:
        average: the averages; float tensors, or integer ones (counters), which are copied.
        current: tensors of the same shapes, in the same order.
        decay: share of the old average that stays, in [0, 1].
    """
    pairs = list(zip(average, current, strict=True))
    floats = [(mean, value) for mean, value in pairs if mean.is_floating_point()]
    torch._foreach_lerp_([mean for mean, _ in floats], [value for _, value in floats], 1 - decay)
    for mean, value in pairs:
        if not mean.is_floating_point():
            mean.copy_(value)


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors(module).items()}


class EMA(Callback):
    """Trains as usual, validates and ends with the moving average of the weights.

    Args:
        decay: share of the average that stays at each step, in (0, 1). At step t it is at most (1 + t) / (10 + t), so
            that the first steps, far from the end, are soon forgotten.

    Raises:
        ValueError: `decay` is out of its range.
    """

    # The trained weights come back in after_epoch: KeepBest (60) reads the average in after_validate, a checkpoint (90)
    # the trained weights in after_epoch. In after_fit the average goes in before KeepBest puts the best one in.
    order = 40

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        if not 0 < decay < 1:
            raise ValueError(f"decay must be a fraction in (0, 1), got {decay}")
        self.decay = decay
        self._average: dict[str, Tensor] | None = None
        self._trained: dict[str, Tensor] | None = None
        self._module: nn.Module | None = None
        self._steps = 0

    def before_fit(self) -> None:
        """Begin the average with the weights as they are; first undo what an aborted validation left."""
        self._restore()
        self._module = self.learn.model
        self._average, self._steps = _copy(self._module), 0

    def after_step(self) -> None:
        """Take this step's weights into the average."""
        self._steps += 1
        decay = min(self.decay, (1 + self._steps) / (10 + self._steps))
        update_average(self._average.values(), tensors(self._module).values(), decay)

    def masked(self, masks: Mapping[str, Tensor]) -> None:
        """Forget what masked weights were."""
        apply_masks(self._average or {}, masks)

    def rewound(self) -> None:
        """Begin the average anew."""
        if self._average is not None:
            self._average, self._steps = _copy(self._module), 0

    def resized(self, kept: Mapping[str, Tensor]) -> None:
        """Take the same elements away from the average."""
        self._average.update({name: take(self._average[name], places) for name, places in kept.items()})

    def before_validate(self) -> None:
        """Put the average into the network."""
        if self._average is not None:
            self._trained = _copy(self._module)
            set_tensors(self._module, self._average)

    def after_epoch(self) -> None:
        """Put the trained weights back."""
        self._restore()

    def after_fit(self) -> None:
        """Leave the average in the network."""
        if self._average is not None and self._steps:
            set_tensors(self._module, self._average)
        self._average = self._trained = self._module = None

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint needs to go on: the average and the number of steps."""
        return {"average": self._average, "steps": self._steps}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from a checkpoint, which may have been read to another device than the network's."""
        current = tensors(self._module)
        self._average = {name: value.to(current[name].device) for name, value in state["average"].items()}
        self._steps = state["steps"]

    def _restore(self) -> None:
        if self._trained is not None:
            set_tensors(self._module, self._trained)
            self._trained = None
