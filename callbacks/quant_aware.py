"""Training with quantised weights and inputs, so that a network keeps its accuracy at few bits.

What: `QuantAware` makes the convolutions and linear layers quantised ones (`fake_quantize.py`): each computes with
weights and inputs of a few bits, in training, validation and whenever the network runs afterwards. The step sizes are
found on training images, then trained along (LSQ). At the end the weights are put on their codes times step size.
When: below 8 bits; at 8 bits quantising without training is nearly always enough. On a trained network, for a few
epochs at a tenth to a third of the largest learning rate of its training. A fit of 0 epochs only finds the step sizes.
Cost: a training step of ResNet-20 takes about 1.5 times as long on a CPU in bf16. Once a fit: `images` images to find
the step sizes, `norm_images` for BatchNorm.
Interactions: what is quantised stays so: later fits train on through the rounding, files and the ledger know the
widths. Zeros stay zeros (`KeepZeros`, `Sparsify`: code 0). `EMA` averages weights and step sizes, which are rounded
anew. In bf16 the rounding is float32. `Distill` may stand beside it. Remove channels before: `PruneChannels` in the
same fit is refused. Steps of Adam are as large as the learning rate, and a step size is about 0.01: 1e-4 is much.
BatchNorm's statistics are taken anew at the end, with the weights that stay, on images augmented as in the
fit: of the committed ResNet-20, taken on 4,096 images as they are, they cost 1.5 points.
Source: Esser et al. 2020, "Learned Step Size Quantization", https://arxiv.org/abs/1902.08153; 8 bits for the first and
the last layer: ibid., section 2.3. BatchNorm: Yu and Huang 2019, https://arxiv.org/abs/1903.05134, section 3.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from fastai.callback.core import Callback
from torch import Tensor, nn

from callbacks.calibration import augmented_batches, training_batches
from callbacks.checkpoint import random_state, set_random_state
from callbacks.expected import Expected
from callbacks.fake_quantize import BITS, Quantised, bits_of, quantise_layer, quantised_layers, weight_range
from callbacks.methods import by_reason, chosen
from callbacks.modules import computes_plainly, plain_weight
from callbacks.prune import PruneChannels
from callbacks.step_sizes import Seen, best_steps, observe, reestimate_norms
from callbacks.undecayed import Undecayed

FLOOR = 0.01  # of what a step size was at first: one step of the optimizer must not make it 0 or less

Widths = tuple[int, int]


def quantisable(model: nn.Module, named: Sequence[str] = ()) -> tuple[dict[str, nn.Module], list[str]]:
    """The layers that can be quantised, and what is skipped.

    Args:
        model: the network; it stays as it is.
        named: names of the layers that are wanted; empty for all.

    Returns:
        The layers by name; a line `name: reason` for each one with weights that is skipped.

    Raises:
        ValueError: there is none, or a named one can't be quantised.
    """
    layers, skipped = chosen("quantise", model, named or None)
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, layer in list(layers.items()):
        reason = ""
        if not isinstance(layer, Quantised) and not computes_plainly(layer):
            reason = f"it is a {type(layer).__name__}, whose forward may be its own"
        elif not plain_weight(layer):
            reason = "its weights are calculated from others"
        elif owners[id(layer.weight)] > 1:
            reason = "its weights are another layer's, too"
        if reason and named:
            raise ValueError(f"quantise does not work on {name}: {reason}")
        if reason:
            skipped.append(f"{name}: {reason}")
            del layers[name]
    if not layers:
        raise ValueError(f"quantise: there is no layer that it applies to ({by_reason(skipped, 2)})")
    return layers, skipped


@torch.no_grad()
def quantise(layer: nn.Module, bits: Widths, seen: Seen) -> None:
    """Quantise a layer in place, with the step sizes of least squared error.

    One that is quantised at this width already keeps its own step sizes.

    Args:
        layer: a plain layer, or a quantised one.
        bits: widths of the weights and of the input.
        seen: what was seen of its input.
    """
    old = (layer.weight_bits, layer.act_bits, layer.act_signed) if isinstance(layer, Quantised) else (0, 0, False)
    quantise_layer(layer, *bits, act_signed=seen.signed)
    if bits[0] != old[0]:
        layer.weight_scale.copy_(best_steps(layer.weight.flatten(1), *weight_range(bits[0])))
    if (bits[1], seen.signed) != old[1:]:
        layer.act_scale.copy_(seen.step(bits[1]))


class QuantAware(Callback):
    """Trains a network with quantised weights and inputs.

    Args:
        weight_bits: width of the weights, 2 to 8.
        act_bits: width of the layers' inputs, 2 to 8.
        first_last_bits: width of both in the layer that runs first and in the one that runs last; None for no
            exception.
        own: other widths for single layers: (of the weights, of the input) by the layer's name.
        layers: names of the layers to quantise; empty for all that can be. `callbacks/methods.py` says which kinds,
            `summary` names what is skipped.
        images: training images, without augmentation, that the step sizes are found on; at least 2.
        norm_images: training images, augmented as in the fit, that BatchNorm's statistics are taken from at the end; 0
            to leave them as the training left them.

    Raises:
        ValueError: an argument is out of its range. In `before_fit`, before anything is changed: there is no such
            layer, or none at all; channels are removed in the same fit.
    """

    # Its before_fit comes after the masks' (30, 36), before EMA (40) copies the network, step sizes among it.
    order = 38
    run_valid = False

    def __init__(
        self,
        weight_bits: int = 4,
        act_bits: int = 4,
        *,
        first_last_bits: int | None = 8,
        own: Mapping[str, Widths] = {},
        layers: Sequence[str] = (),
        images: int = 512,
        norm_images: int = 4096,
    ) -> None:
        super().__init__()
        self.weight_bits, self.act_bits, self.first_last_bits = weight_bits, act_bits, first_last_bits
        self.own = {name: tuple(bits) for name, bits in own.items()}
        self.layers = layers if isinstance(layers, str) else tuple(layers)
        self.images, self.norm_images = images, norm_images
        self._check_arguments()
        self._ending = _Ending(self)
        self._forget()

    def _check_arguments(self) -> None:
        if isinstance(self.layers, str):
            raise ValueError(f"layers must be a list of names, got the text {self.layers!r}")
        for name in ("weight_bits", "act_bits", "first_last_bits"):
            bits = getattr(self, name)
            if not _is_width(bits) and not (name == "first_last_bits" and bits is None):
                raise ValueError(f"{name} must be a whole number from 2 to 8, got {bits!r}")
        for name, pair in self.own.items():
            if len(pair) != 2 or not all(map(_is_width, pair)):
                raise ValueError(f"own: {name} must have two widths from 2 to 8, got {pair!r}")
        for name, least in (("images", 2), ("norm_images", 0)):
            if type(value := getattr(self, name)) is not int or value < least:
                raise ValueError(f"{name} must be a whole number from {least}, got {value!r}")

    def _forget(self) -> None:
        self._skipped: list[str] = []
        self._floors: list[tuple[nn.Parameter, Tensor]] = []
        self._told = ""
        self._steps: Undecayed | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Take the part that ends a fit away, too, when the callback is removed: an aborted fit has no other moment."""
        if name == "learn" and value is None and self.learn is not None:
            self.learn.remove_cb(self._ending)
        super().__setattr__(name, value)

    @property
    def summary(self) -> str:
        """What was quantised, in one line."""
        return self._told or "nothing was quantised"

    def expected(self) -> Expected:
        """The widths of most layers; where some have their own, an estimate."""
        own = {(self.weight_bits, self.act_bits)} | set(self.own.values())
        own |= {(self.first_last_bits,) * 2} if self.first_last_bits is not None else set()
        exceptions = len(own) > 1 or bool(self.layers)
        return Expected(weight_bits=self.weight_bits, act_bits=self.act_bits, estimate=exceptions)

    def before_fit(self) -> None:
        """Quantise the network, and have the optimizer train the step sizes."""
        if self._steps is not None:
            self._steps.after_step()  # a fit may have been aborted in the middle of a step
        self._forget()
        learn, network = self.learn, self.learn.model
        if any(isinstance(cb, PruneChannels) for cb in learn.cbs):
            raise ValueError("QuantAware: channels are removed in the same fit: remove them in a fit before")
        if any(isinstance(cb, QuantAware) and cb is not self for cb in learn.cbs):
            raise ValueError("a fit can have one QuantAware; `own` gives single layers other widths")
        layers, self._skipped = quantisable(network, self.layers)
        unknown = set(self.own) - set(layers)
        if unknown:
            raise ValueError(f"own: the network has no layer {min(unknown)!r} that is to be quantised")
        _forget_compiled(network)  # code that was compiled before does not look for hooks
        seen = self._look(layers)
        self._skipped += [f"{name}: no image reaches it" for name in layers if name not in seen]
        for name, bits in self._widths(list(seen)).items():
            quantise(layers[name], bits, seen[name])
        _forget_compiled(network)  # it ran as it was a moment ago
        layers = quantised_layers(network).values()
        steps = [step for layer in layers for step in (layer.weight_scale, layer.act_scale) if step.requires_grad]
        self._floors = [(step, FLOOR * step.detach().clone()) for step in steps]
        self._steps = Undecayed(learn.opt, steps)
        if self._ending not in learn.cbs:
            learn.add_cb(self._ending)

    def before_step(self) -> None:
        """Keep weight decay away from the step sizes."""
        self._steps.before_step()

    def after_step(self) -> None:
        """Keep the step sizes above 0."""
        self._steps.after_step()
        with torch.no_grad():
            for step, floor in self._floors:
                step.clamp_min_(floor)

    def finish(self) -> None:
        """Put the weights on their codes, and take BatchNorm's statistics anew."""
        learn, network = self.learn, self.learn.model
        layers = quantised_layers(network)
        for layer in layers.values():
            layer.freeze()
        norms = 0
        if self.norm_images:
            drawn = random_state()
            try:
                norms = reestimate_norms(network, self._inputs(augmented_batches(learn, self.norm_images)))
            finally:
                set_random_state(drawn)
        self._told = self._tell(norms)
        self._floors, self._steps = [], None
        learn.remove_cb(self._ending)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on: the structure; step sizes are the network's and the optimizer's."""
        layers = quantised_layers(self.learn.model)
        return {"layers": {name: [b.weight_bits, b.act_bits, b.act_signed] for name, b in layers.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name, widths in state["layers"].items():
            quantise_layer(self.learn.model.get_submodule(name), *widths)

    def _look(self, layers: Mapping[str, nn.Module]) -> dict[str, Seen]:
        drawn = random_state()
        try:
            return observe(self.learn.model, layers, self._inputs(training_batches(self.learn, self.images)))
        finally:
            set_random_state(drawn)

    def _inputs(self, batches: Iterable[Any]) -> Iterator[tuple[Tensor, ...]]:
        """The part of batches that a network takes, as Learner splits them."""
        for batch in batches:
            yield tuple(batch[: getattr(self.learn.dls, "n_inp", len(batch) - 1)])

    def _widths(self, names: Sequence[str]) -> dict[str, Widths]:
        """The widths of layers, given in the order in which they run."""
        widths = dict.fromkeys(names, (self.weight_bits, self.act_bits))
        if self.first_last_bits is not None and names:
            widths |= dict.fromkeys((names[0], names[-1]), (self.first_last_bits,) * 2)
        return widths | {name: bits for name, bits in self.own.items() if name in widths}

    def _tell(self, norms: int) -> str:
        counts: dict[Widths, list[str]] = {}
        for name, bits in bits_of(self.learn.model).items():
            counts.setdefault(bits, []).append(name)
        parts = []
        for (weight, act), names in counts.items():
            told = ", ".join(names) if len(names) < 3 else f"{len(names)} layers"
            parts.append(f"{told} at {weight}-bit weights, {act}-bit inputs")
        told = "; ".join(parts) + (f"; {norms} BatchNorms re-estimated" if norms else "")
        return told + (f"; skipped {by_reason(self._skipped)}" if self._skipped else "")


class _Ending(Callback):
    """Ends a fit of `QuantAware`'s, when `EMA` (40) and `KeepBest` (60) have put in the weights that stay."""

    order = 70

    def __init__(self, owner: QuantAware) -> None:
        super().__init__()
        self.owner = owner

    def after_fit(self) -> None:
        """Have it done."""
        self.owner.finish()


def _is_width(bits: Any) -> bool:
    return type(bits) is int and bits in BITS


def _forget_compiled(network: nn.Module) -> None:
    if any(module._compiled_call_impl is not None for module in network.modules()):
        torch.compiler.reset()
