"""Progressive resizing: small images first, full size at the end.

What: shrinks the training batches, with antialiasing, up to given shares of the fit; validation sees the full size.
When: a fit that has to end by a given time: the fewer pixels, the cheaper an epoch.
Cost: one resampling a batch. The network must take any size, as those with global average pooling do.
Interactions: resizes after MixUp and CutMix (order 0), before `Precision` (10). BatchNorm's statistics follow the
size, so the full size needs a good share of the fit. `torch.compile` compiles anew for each size. fastai's `lr_find`
sweeps over the full size.
Source: Howard 2018, "Now anyone can train Imagenet in 18 minutes" (fast.ai), and Howard and Gugger 2020.
"""

from itertools import pairwise

import torch.nn.functional as F
from fastai.callback.core import Callback
from torch import Tensor


class ProgressiveResizing(Callback):
    """Trains on smaller images up to given shares of the fit.

    Args:
        steps: pairs (until, side): up to the share `until` of the fit's steps, in (0, 1] and growing, images are `side`
            pixels high and as wide as keeps their shape; after the last one, their own size.

    Raises:
        ValueError: the shares don't grow or are out of their range, or a side is no whole number above 0.
    """

    order = 5
    training_loss = "growing images"

    def __init__(self, steps: tuple[tuple[float, int], ...]) -> None:
        super().__init__()
        shares = [0.0, *(share for share, _ in steps)]
        if not steps or shares[-1] > 1 or any(late <= early for early, late in pairwise(shares)):
            raise ValueError(f"the shares of steps must grow, and be in (0, 1], got {steps}")
        if any(not isinstance(side, int) or side < 1 for _, side in steps):
            raise ValueError(f"the sides of steps must be whole numbers of pixels above 0, got {steps}")
        self.steps = tuple((float(share), side) for share, side in steps)
        self._share: float | None = None  # of the fit, where another than the step's is acted

    @property
    def cost_changes(self) -> tuple[float, ...]:
        """The shares of the fit at which another size begins."""
        return tuple(until for until, _ in self.steps if until < 1)

    def as_at(self, share: float) -> None:
        """Take the size of this share of the fit from now on, until another fit begins."""
        self._share = share

    def before_fit(self) -> None:
        """Go by the steps."""
        self._share = None

    def before_batch(self) -> None:
        """Shrink a training batch, where its time has not come yet; a sweep over learning rates has one size."""
        if not self.learn.training or hasattr(self.learn, "lr_finder"):
            return
        share = self.learn.pct_train if self._share is None else self._share
        side = next((side for until, side in self.steps if share < until), None)
        if side is not None:
            self.learn.xb = tuple(self._shrunk(x, side) if x.dim() == 4 else x for x in self.learn.xb)

    @staticmethod
    def _shrunk(x: Tensor, side: int) -> Tensor:
        height, width = x.shape[-2:]
        if side >= height:
            return x
        size = (side, max(1, round(width * side / height)))
        return F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)
