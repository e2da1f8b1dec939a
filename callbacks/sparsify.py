"""Weights that become zero while a network trains, and stay zero.

What: `Sparsify` masks the weights that a criterion thinks least of, along a ramp, until the asked share of them is
zero. Which go together (`granularity`: single weights, k x k kernels, filters, 2:4, blocks), which layers are compared
with each other (`scope`) and how they are judged (`criterion`) is chosen; `sparsity.py` has the arithmetic.
When: on a trained network, with a learning rate between the largest and the last one of its training and a ramp that
leaves time to recover, such as `Cubic(end=0.7)`. Single zeros make a file smaller, and a score; runtimes without sparse
kernels compute them all the same (`PruneChannels` makes a network faster).
Cost: at most 200 updates of the masks a fit, each one less than a tenth of a training step of ResNet-20 with 64 images;
one pass over the masked weights a step; movement and Taylor keep a number for each weight, `rewind` a copy of it all.
Interactions: zeros that `KeepZeros` keeps count towards the asked share. `EMA` averages get the same zeros, and begin
anew where weights are rewound. `KeepBest` waits until the share is reached. `PruneChannels` in the same fit cuts the
masks along with the weights, and the share is of what is left; 2:4 and blocks refuse that once they have masked fours
of channels. Gradients are seen as they reach the optimizer, clipped. A layer's best unit is never masked (2:4 takes
half of every layer).
Source: magnitude: Han et al. 2015, "Learning both Weights and Connections"; the gradual ramp: Zhu and Gupta 2017, "To
prune, or not to prune"; 2:4: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks"; rewinding: Frankle et al.
2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis"; the others stand where they are computed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from callbacks.expected import Expected
from callbacks.masks import KeepZeros
from callbacks.methods import by_reason, chosen, verdict
from callbacks.modules import set_tensors, tensors
from callbacks.protocol import all_masks, tell
from callbacks.ramp import Cubic, Ramp, Rounds
from callbacks.sparsity import (
    Criterion,
    Granularity,
    Scope,
    check_room,
    check_word,
    first_scores,
    gather,
    grow,
    learns,
    sums,
    too_little,
)
from callbacks.widths import take

# A longer fit's masks follow a smooth ramp in so many updates, so that their cost does not grow with the fit; where it
# starts, jumps and ends they are exact to the step.
UPDATES = 200


class Sparsify(KeepZeros):
    """Masks weights along a ramp until the asked share of them is zero, and keeps them zero.

    The share is of the weights of all layers that the granularity applies to (`callbacks/methods.py` says which;
    `summary` names the ones that it skips) and that are not in `skip`. It is reached to one unit: to half a weight,
    kernel, filter or block; with `scope="local"` and with a dict in each layer. Biases and normalisation are left
    alone. A masked weight stays masked.

    Args:
        sparsity: share of the weights that is zero at the end, in [0, 1); 0.5 for 2:4. Or such a share for each layer
            by the layer's name, with `scope="local"`: layers that are not named stay as they are.
        schedule: share of the aim that is reached by a progress: `OneShot`, `Linear`, `Cubic`, `Rounds`. It is asked
            before the first step and after each: after step k of n the progress is k / n. A fit of 0 epochs reaches
            the whole aim.
        scope: which weights compete: `"global"`, those of all layers; `"normalised"`, too, after each layer's scores
            were divided by their L2 norm; `"local"`: each layer loses the same share.
        criterion: what goes first: `"magnitude"`, the smallest; `"random"`; `"movement"`, what moved towards zero most,
            summed over all steps; `"taylor"`, what changes the loss least, averaged over the last hundred steps. The
            latter two need steps to look at before anything is masked: a schedule that is 0 at first.
        granularity: what goes together: `"weight"`; `"kernel"`, the k x k weights between two channels; `"filter"`, all
            weights of an output channel; `"2:4"`, two of each four consecutive input channels, for each output and
            place of the kernel; `"block"`, 4 output by 4 input channels at a place of the kernel.
        skip: names of layers that stay as they are.
        seed: of the random criterion; other criteria have none. 0 by default.
        rewind: progress whose weights are put back, for all that is not masked: after each round of `Rounds`, else when
            the ramp has reached its end; None for never. All parameters and statistics are put back, the optimizer
            forgets its momentum; the learning rate goes on by its own schedule.

    Raises:
        ValueError: an argument is out of its range. In `before_fit`, before anything is changed: the network has no
            such layer, or one that can't be made sparse so; more is masked already than is asked; less than one unit
            would be left in a layer. Where channels are removed in the same fit, and a 2:4 or block pattern with them.
    """

    # After KeepZeros (30), whose masks are where it begins, and PruneChannels (35): the share is of what that leaves.
    # Before EMA (40) averages a step's weights.
    order = 36
    run_valid = False

    def __init__(
        self,
        sparsity: float | Mapping[str, float],
        schedule: Ramp = Cubic(),  # noqa: B008 - frozen
        *,
        scope: Scope = "global",
        criterion: Criterion = "magnitude",
        granularity: Granularity = "weight",
        skip: Sequence[str] = (),
        seed: int | None = None,
        rewind: float | None = None,
    ) -> None:
        super().__init__({})
        self.sparsity = dict(sparsity) if isinstance(sparsity, Mapping) else sparsity
        self.schedule, self.scope, self.criterion, self.granularity = schedule, scope, criterion, granularity
        self.skip, self.seed, self.rewind = tuple(skip), seed, rewind
        self._check_arguments()
        self._forget()

    def _check_arguments(self) -> None:
        for name, words in (("scope", Scope), ("criterion", Criterion), ("granularity", Granularity)):
            check_word(name, getattr(self, name), words)
        if not isinstance(self.schedule, Ramp):
            raise ValueError(f"schedule must be a ramp, such as Cubic(), got {self.schedule!r}")
        by_layer = isinstance(self.sparsity, dict)
        for share in self.sparsity.values() if by_layer else [self.sparsity]:
            if not isinstance(share, int | float) or not 0 <= share < 1:
                raise ValueError(f"sparsity must be a fraction in [0, 1), got {share!r}")
            if self.granularity == "2:4" and share != 0.5:
                raise ValueError(f"sparsity must be 0.5 with 2:4, which is two of four, got {share!r}")
        if by_layer and not self.sparsity:
            raise ValueError("sparsity by layer must name a layer, got an empty dict")
        if by_layer and self.scope != "local":
            raise ValueError(f"scope must be 'local' with sparsity by layer, got {self.scope!r}")
        if by_layer and self.skip:
            raise ValueError(
                f"skip must be empty with sparsity by layer, which names all it changes, got {self.skip!r}"
            )
        if self.seed is not None and self.criterion != "random":
            raise ValueError(f"seed must be None with criterion {self.criterion!r}, which draws nothing")
        if learns(self.criterion) and self.schedule(0.0) > 0:
            raise ValueError(
                f"schedule must be 0 at first with criterion {self.criterion!r}, which judges by the gradients of the "
                f"steps before, such as OneShot(end=0.1), got {self.schedule}"
            )
        rounds = isinstance(self.schedule, Rounds)
        last = self.schedule.start if rounds else self.schedule.end
        if self.rewind is not None and not (0 <= self.rewind < last or (rounds and self.rewind == last)):
            when = f"at most at the first round ({last})" if rounds else f"before the ramp's end ({last})"
            raise ValueError(f"rewind must be a progress from 0, {when}, got {self.rewind!r}")

    def _forget(self) -> None:
        self._masks: dict[str, Tensor] = {}
        self._scores: dict[str, Tensor] = {}
        self._shares: dict[str, float] = {}  # what is asked of each layer, by its weight's name
        self._skipped: list[str] = []
        self._share: float | None = None  # of the aim that is reached; None before the first step
        self._cut = False  # whether weights were taken away since the masks were made
        self._looked = False  # whether a gradient was seen
        self._start: dict[str, Tensor] | None = None  # what is put back

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks as they are now, of the layers that have zeros."""
        return {name: mask for name, mask in self._masks.items() if not bool(mask.all())}

    @property
    def settled(self) -> bool:
        """Whether the asked share is reached."""
        return self._share == 1

    @property
    def summary(self) -> str:
        """What was reached, in one line."""
        zeros, size = sums(self._masks)
        layers = f"{len(self._masks)} layer" + ("s" if len(self._masks) > 1 else "")
        told = f"{zeros / max(1, size):.4f} of {size:,} weights in {layers} are zero"
        told += f" ({self.granularity}, {self.scope}, {self.criterion})"
        if not self.settled:
            told += f"; the fit ended at {self._share or 0:.2f} of the aim"
        return told + (f"; skipped {by_reason(self._skipped)}" if self._skipped else "")

    def expected(self) -> Expected:
        """The share of all convolutions' and linear layers' weights; where some are skipped, an estimate."""
        asked = self.sparsity
        share = sum(asked.values()) / len(asked) if isinstance(asked, dict) else asked
        partial, masked = isinstance(asked, dict) or bool(self.skip), ()
        if self.learn is not None:
            network = self.learn.model
            shares, _ = self._find(network)
            weights = dict(network.named_parameters())
            every, _ = chosen("sparsify weight", network)
            whole = sum(layer.weight.numel() for layer in every.values())
            share = sum(s * weights[name].numel() for name, s in shares.items()) / whole
            partial, masked = partial or len(shares) < len(every), tuple(shares)
        return Expected(sparsity=share, estimate=partial or self.scope != "local", partial=partial, masked=masked)

    def before_fit(self) -> None:
        """Find the layers, check what is asked, and begin with the masks that there are."""
        self._forget()
        network = self.learn.model
        self._shares, self._skipped = self._find(network)
        weights = {name: p for name, p in network.named_parameters() if name in self._shares}
        known = all_masks(self.learn)
        masks = {name: known.get(name, torch.ones_like(p, dtype=torch.bool)) for name, p in weights.items()}
        little = []
        for names, share in self._pools():
            where = f"of {names[0]}" if self.scope == "local" else "of the weights"
            check_room({name: masks[name] for name in names}, share, self.granularity, where)
            little.append(too_little({name: masks[name] for name in names}, share, self.granularity))
        if all(little) or (isinstance(self.sparsity, dict) and any(little)):
            asked, unit = self.sparsity, self.granularity
            raise ValueError(f"sparsity {asked} is less than half a {unit}: nothing would be masked")
        if learns(self.criterion) and self.learn.n_epoch == 0:
            raise ValueError(f"criterion {self.criterion!r} judges by the gradients of steps: epochs must be above 0")
        self._masks, self._scores = masks, first_scores(self.criterion, weights, self.seed or 0)

    def before_train(self) -> None:
        """Do what is due before the first step: here, a fit that goes on from a checkpoint knows that it is past it."""
        if self._share is None:
            self._follow(0.0)

    def before_step(self) -> None:
        """Look at the gradients."""
        if learns(self.criterion) and not self.settled:
            gather(self.criterion, self._scores, self._weights())
            self._looked = True

    def after_batch(self) -> None:
        """Follow the ramp: also where no step was made, as while gradients are accumulated."""
        learn = self.learn
        step, steps = learn.epoch * learn.n_iter + learn.iter + 1, learn.n_epoch * learn.n_iter
        self._follow(step / steps, on_time=step % -(-steps // UPDATES) == 0)

    def after_fit(self) -> None:
        """Let go of what only a fit needs; the masks stay to be read. Without steps, all is due here."""
        if self.learn.n_epoch == 0:
            self._follow(0.0)  # which remembers
            self._follow(1.0)
        self._scores, self._start = {}, None

    def resized(self, kept: Mapping[str, Tensor]) -> None:
        """Cut masks, scores and remembered weights as the weights were cut."""
        if self.granularity in ("2:4", "block"):
            method, layers = f"sparsify {self.granularity}", dict(self.learn.model.named_modules())
            if self.masks or not all(verdict(method, layers[name.rpartition(".")[0]]) for name in self._masks):
                raise ValueError(f"{self.granularity} looks at channels in fours: remove channels before, by fours")
        super().resized(kept)
        self._cut = True
        for held in (self._scores, self._start or {}):
            held.update({name: take(value, kept[name]) for name, value in held.items() if name in kept})

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on."""
        mine = {"scores": self._scores, "share": self._share, "start": self._start}
        return {"masks": self._masks} | mine

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, which may have been read to another device than the network's."""
        super().load_state_dict(state)
        weights = self._weights()
        self._scores = {name: value.to(weights[name].device) for name, value in state["scores"].items()}
        self._share, self._start = state["share"], state["start"]

    def _weights(self) -> dict[str, nn.Parameter]:
        parameters = dict(self.learn.model.named_parameters())
        return {name: parameters[name] for name in self._masks}

    def _find(self, network: nn.Module) -> tuple[dict[str, float], list[str]]:
        """The share that is asked of each layer, by its weight's name; and what is skipped, with the reason."""
        method, asked = f"sparsify {self.granularity}", self.sparsity
        layers, skipped = chosen(method, network, asked if isinstance(asked, dict) else None)
        unknown = set(self.skip) - set(layers) - {line.partition(": ")[0] for line in skipped}
        if unknown:
            raise ValueError(f"skip: the network has no layer {min(unknown)!r} with weights to mask")
        parameters, shares = dict(network.named_parameters()), {}
        for layer in layers:
            name = f"{layer}.weight" if layer else "weight"
            if f"{name}_orig" in parameters:
                raise ValueError(f"{layer} is masked by torch.nn.utils.prune: call torch_masks.take_masks first")
            if layer in self.skip:
                skipped.append(f"{layer}: as asked")
            elif name in parameters:
                shares[name] = asked[layer] if isinstance(asked, dict) else asked
            else:  # also where the same tensor goes by an earlier name
                skipped.append(f"{layer}: its weight is another layer's, or made of other tensors")
        if not shares:
            raise ValueError(f"{method}: no layer is left ({by_reason(skipped)})")
        return shares, skipped

    def _pools(self) -> list[tuple[list[str], float]]:
        """The layers that are compared with each other, and the share asked of them together."""
        if self.scope == "local":
            return [([name], share) for name, share in self._shares.items()]
        return [(list(self._shares), self.sparsity)]

    def _follow(self, progress: float, on_time: bool = True) -> None:
        """Mask, remember and put back what is due at a progress; what is not `on_time` waits, where it can."""
        if self.rewind is not None and self._start is None and progress >= self.rewind and not self.settled:
            self._start = {name: value.detach().clone() for name, value in tensors(self.learn.model).items()}
        before, share = self._share or 0.0, self.schedule(progress)
        rounds = isinstance(self.schedule, Rounds)
        due = share > before and (on_time or rounds or before == 0 or share == 1)
        if due and learns(self.criterion) and not self._looked:
            if share == 1:
                raise ValueError(f"criterion {self.criterion!r} has seen no gradient yet: end the ramp later")
            due = False
        self._share = share if due else before
        if due or self._cut:
            self._grow()
        if due and self.rewind is not None and (share == 1 or rounds):
            self._put_back()
        if self.settled:
            self._start = None

    def _grow(self) -> None:
        """Mask what the ramp asks for by now."""
        self._cut = False
        weights = self._weights()
        scores = self._scores or {name: weight.detach().abs().float() for name, weight in weights.items()}
        for names, share in self._pools():
            masks = {name: self._masks[name] for name in names}
            zeros = self._share * share * sum(mask.numel() for mask in masks.values())
            self._masks.update(grow(masks, scores, zeros, self.granularity, self.scope == "normalised"))
        self._mask()

    def _put_back(self) -> None:
        """Put the remembered weights back, but for masked ones."""
        set_tensors(self.learn.model, self._start)
        self.learn.opt.clear_state()
        self._mask()
        tell(self.learn, "rewound")
