"""The step sizes that quantisation-aware training begins with, and BatchNorm's statistics after it, from images."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from callbacks.fake_quantize import act_range

# Step sizes that are tried, as shares of the one that reaches the largest number: 1 to 1/20, each 7.4 % below the last.
SHARES = tuple(0.05 ** (place / 39) for place in range(40))
SAMPLES = 8192  # numbers of a layer's input that are looked at in each batch


@torch.no_grad()
def best_steps(rows: Tensor, low: int, high: int) -> Tensor:
    """The step size of each row whose rounding makes the least squared error.

    Args:
        rows: `(R, N)`; a row of zeros gets the mean step of the others, 1 where there are none.
        low: least code.
        high: largest code.

    Returns:
        `(R,)`, float32, above 0.
    """
    rows = rows.float()
    reach = rows.amax(1) / high
    if low < 0:
        reach = torch.maximum(reach, rows.amin(1) / low)
    dead = reach <= 0
    reach = torch.where(dead, torch.ones_like(reach), reach)
    best, least = reach.clone(), torch.full_like(reach, torch.inf)
    for share in SHARES:
        step = reach * share
        codes = (rows / step[:, None]).round_().clamp_(low, high)
        error = codes.mul_(step[:, None]).sub_(rows).square_().sum(1)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    if bool(dead.any()) and not bool(dead.all()):
        best[dead] = best[~dead].mean()
    return best


@dataclass
class Seen:
    """What was seen of a layer's input.

    Args:
        least: the smallest number of all.
        samples: some of the numbers.
    """

    least: float = torch.inf
    samples: list[Tensor] = field(default_factory=list)

    @property
    def signed(self) -> bool:
        """Whether it may be negative."""
        return self.least < 0

    def step(self, bits: int) -> Tensor:
        """The step size `()` for so many bits."""
        return best_steps(torch.cat(self.samples)[None], *act_range(bits, self.signed))[0]


@torch.no_grad()
def observe(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[tuple[Tensor, ...]]
) -> dict[str, Seen]:
    """Look at the inputs of layers, as in training but for dropout and the like; the network is left as it was.

    BatchNorm uses the batches' statistics: those that it keeps may be far off, as in a network that was never trained.

    Args:
        model: the network.
        layers: by name.
        batches: the network's inputs.

    Returns:
        By the layer's name, in the order in which they run; a layer that no image reaches is not there.
    """
    found: dict[str, Seen] = {}

    def look(name: str, given: Tensor) -> None:
        seen, numbers = found.setdefault(name, Seen()), given.detach().float()
        seen.least = min(seen.least, float(numbers.amin()))
        flat = numbers.reshape(-1)
        # An odd stride: one that divides the width would look at some columns only.
        seen.samples.append(flat[:: max(1, len(flat) // SAMPLES) | 1].clone())

    hooks = [
        layer.register_forward_pre_hook(lambda module, given, name=name: look(name, given[0]))
        for name, layer in layers.items()
    ]
    try:
        with _batch_statistics(model) as norms:
            kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
            for batch in batches:
                if len(batch[0]) > 1:  # one image can't be normalised by its own statistics
                    model(*batch)
            for buffer, value in kept:
                buffer.copy_(value)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[list[_NormBase]]:
    """Have BatchNorm use each batch's own statistics, as in training, while all else is in eval mode."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for norm in norms:
            norm.train()
        yield norms
    finally:
        for module, mode in training.items():
            module.training = mode


@torch.no_grad()
def reestimate_norms(model: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> int:
    """Take BatchNorm's statistics anew, as the mean over batches; all else is in eval mode meanwhile.

    Args:
        model: the network, changed in place; its mode stays.
        batches: the network's inputs.

    Returns:
        How many normalisations there are with statistics of their own.
    """
    with _batch_statistics(model) as norms:
        momenta = [norm.momentum for norm in norms]
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # torch's word for a plain mean over all batches
            for batch in batches if norms else ():
                model(*batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return len(norms)
