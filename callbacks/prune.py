"""Channels removed while a network trains, each with everything that depends on it.

What: `PruneChannels` removes the channels that matter least, at once or along a ramp, until a share of the channels, or
of the parameters, multiply-accumulates or storage is gone. The network gets narrower layers; nothing is masked.
When: on a trained network, followed by as much training as it needs to recover. It is what makes a network faster on
any runtime. Half of the channels are three quarters of parameters and multiply-accumulates. Kernels of most runtimes
want widths that are multiples of 8: `round_to=8` where layers have 64 channels and more; one of 16 it can only halve.
Cost: once a fit, reading the dependencies: about three runs of the network on two images (DenseNet-121: 3 s on one
core); for `macs` and `storage` a few traces. At most 200 removals a fit, of 0.06 s (ResNet-20) to 1.2 s (DenseNet-121).
Training on a CPU does not gain what the operations say: torch's BatchNorm in bf16 and channels_last takes 1.5 to 2
times as long for 14 channels as for 16, on one thread, and with two no less (AMD EPYC with AVX512-BF16, torch 2.14.1).
Interactions: the parameters stay the same objects, so that optimizers, schedulers and `Precision` go on; momentum and
gradients are cut by the same places, as are the averages of `EMA` and the masks of `KeepZeros` and `Sparsify`.
`KeepBest` waits until the aim is reached. A compiled network is compiled again after each removal. Which layers are
left out, and why, is in `summary`; layers that no file could hold are among them (`widths.py`).
Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets"; the dependencies: Fang et al. 2023, "DepGraph: Towards
Any Structural Pruning"; what a channel is judged by and compared with: `importance.py`, `selection.py`.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from fastai.callback.core import Callback
from fastai.learner import ValueMetric
from torch import Tensor

from callbacks.calibration import calibrate, image_size
from callbacks.channels import removal, whole
from callbacks.column import ShowsColumn
from callbacks.expected import Expected
from callbacks.importance import Importance, Key, gather, scores
from callbacks.methods import by_reason
from callbacks.op_trace import TraceError, count_ops, total_params
from callbacks.protocol import all_masks, tell
from callbacks.prune_plan import Choice, Plan
from callbacks.ramp import OneShot, Ramp, Rounds
from callbacks.selection import Scope, without
from callbacks.widths import narrow

# A smooth ramp is followed in steps of this share of the aim, so that its cost does not grow with the length of a fit;
# where a ramp starts, jumps and ends it is exact.
STEP = 1 / 200
PENALTY = 1e-4  # Liu et al. 2017 used 1e-4 and 1e-5


class PruneChannels(ShowsColumn, Callback):
    """Removes channels along a ramp until an aim is reached, and shows the column `params` meanwhile.

    Exactly one aim is given. For `params`, `macs` and `storage` a fraction is the share to remove, a whole number what
    may be left; the network ends at or below that, and with the channel that went last it would be above.

    Args:
        ratio: share of the channels to remove, in (0, 1), to the nearest channel of every class of `scope`; or such a
            share for each layer by its name, with `scope="local"`, layers that are not named keeping all. A file of
            `micronet sensitivity` gives these: `ratios_from(file)`.
        params: of the parameters.
        macs: of the multiply-accumulates for one image.
        storage: of the 32-bit words that the deployed form takes, masks among them.
        importance: what channels are judged by: `"l1"`, `"l2"`, `"mean_abs"`, `"bn_scale"`, `"fpgm"`, `"taylor"` or
            `"random"`, as `callbacks/importance.py` says.
        scope: what they are compared with: `"local"`, those of their own group, so that every group loses the same
            share; `"global"`, all; `"isomorphic"`, those of groups that are built alike.
        schedule: share of the aim that is reached by a progress: `OneShot`, `Linear`, `Rounds`, `Cubic`. It is asked
            before the first step and after each: after step k of n the progress is k / n. What is due between two
            epochs comes after the validation, so that a row of the training table tells what a round left, recovered.
            A fit of 0 epochs reaches the whole aim.
        round_to: widths become multiples of this, wherever channels go.
        max_ratio: largest share of its channels that any group may lose, in (0, 1); each keeps at least one.
        layers: names of layers; only channels that one of these makes are removed. Empty for all.
        feeding: names of layers; only channels that one of these reads are removed, and they are judged by these
            layers' weights for them: `("fc",)` prunes a dense layer's inputs with what makes them.
        penalty: with `"bn_scale"`: weight of the L1 penalty on the scales until the aim is reached, at least 0; 1e-4 by
            default.
        seed: with `"random"`; 0 by default.

    Raises:
        ValueError: an argument is out of its range. In `before_fit`, before anything is changed: the network can't be
            pruned, or has no such layer; the aim can't be reached, is reached already, or is so small that no channel
            would go.
    """

    order = 35  # after KeepZeros (30), whose zeros count; before the Recorder (50), which reads the columns' names
    run_valid = False

    def __init__(
        self,
        ratio: float | Mapping[str, float] | None = None,
        *,
        params: float | None = None,
        macs: float | None = None,
        storage: float | None = None,
        importance: Importance = "l1",
        scope: Scope = "local",
        schedule: Ramp = OneShot(),  # noqa: B008 - frozen
        round_to: int = 1,
        max_ratio: float = 0.9,
        layers: Sequence[str] = (),
        feeding: Sequence[str] = (),
        penalty: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        ratio = dict(ratio) if isinstance(ratio, Mapping) else ratio
        self.choice = Choice(
            ratio=ratio,
            params=params,
            macs=macs,
            storage=storage,
            importance=importance,
            scope=scope,
            round_to=round_to,
            max_ratio=max_ratio,
            layers=layers if isinstance(layers, str) else tuple(layers),
            feeding=feeding if isinstance(feeding, str) else tuple(feeding),
        )
        self.schedule, self.penalty, self.seed = schedule, penalty, seed
        self._check_arguments()
        self._column = ValueMetric(self._params_now, "params")
        self._forget()

    def _check_arguments(self) -> None:
        if not isinstance(self.schedule, Ramp):
            raise ValueError(f"schedule must be a ramp, such as OneShot(), got {self.schedule!r}")
        for name, owner in (("penalty", "bn_scale"), ("seed", "random")):
            if getattr(self, name) is not None and self.choice.importance != owner:
                raise ValueError(f"{name} must be None with importance {self.choice.importance!r}: it is {owner!r}'s")
        if self.penalty is not None and not self.penalty >= 0:
            raise ValueError(f"penalty must be a number from 0, got {self.penalty!r}")

    def _forget(self) -> None:
        self._plan: Plan | None = None
        self._alive: dict[str, Tensor] = {}
        self._share: float | None = None  # of the aim that is reached; None before the first step
        self._keys: list[Key] = []  # the axes of layers that the importance looks at
        self._sums: dict[Key, Tensor] = {}  # Taylor's averages
        self._skipped: list[str] = []
        self._size: tuple[int, ...] = ()  # of an image
        self._loss: Any = None  # the task's, whatever others put in its place for the time of the fit
        self._told: list[tuple[int, int, int | None]] = []  # channels, parameters, MACs: at first and at last

    @property
    def settled(self) -> bool:
        """Whether the aim is reached."""
        return self._share == 1

    @property
    def summary(self) -> str:
        """What was removed, in one line."""
        if len(self._told) < 2:
            return "nothing was pruned"
        words = ("channels", "params", "MACs")
        pairs = zip(words, *self._told, strict=True)
        told = ", ".join(f"{word} {then:,} -> {now:,}" for word, then, now in pairs if then is not None)
        told += f" (groups: {len(self._alive)}, {self.choice.scope}, {self.choice.importance})"
        if not self.settled:
            told += f"; the fit ended at {self._share or 0:.2f} of the aim"
        return told + (f"; skipped {by_reason(self._skipped)}" if self._skipped else "")

    def expected(self) -> Expected:
        """The share of the channels; where that is not the aim, what a network of even layers would lose."""
        choice, ratio = self.choice, self.choice.ratio
        if self.learn is not None and (isinstance(ratio, dict) or choice.layers or choice.feeding):
            network, masks = self.learn.model, self._masks()
            ratio = 1 - Plan(network, image_size(self.learn), choice, masks).left_of(network, masks) ** 0.5
        elif isinstance(ratio, dict):
            ratio = sum(ratio.values()) / len(ratio)
        elif ratio is None:
            share = choice.aim
            if not isinstance(share, float):
                network = self.learn.model if self.learn is not None and choice.params is not None else None
                share = 0.0 if network is None else max(0.0, 1 - share / total_params(network))
            ratio = 1 - (1 - share) ** 0.5
        return Expected(ratio=ratio, estimate=True)

    def before_fit(self) -> None:
        """Find what can be removed, and check what is asked."""
        self._forget()
        learn, network = self.learn, self.learn.model
        if any(isinstance(cb, PruneChannels) and cb is not self for cb in learn.cbs):
            raise ValueError("a fit can have one PruneChannels: each has to know which channels there are")
        self._size, self._loss = image_size(learn), learn.loss_func
        self._plan = Plan(network, self._size, self.choice, self._masks())
        self._skipped, self._alive, self._keys = self._plan.skipped, whole(self._plan.groups), self._plan.keys(network)
        self._check_rounds()
        if self.choice.importance == "bn_scale" and (self.schedule(0.0) > 0 or learn.n_epoch == 0):
            self._ranks()  # refuses scales that no training has told apart
        self._told = [self._totals()]
        self.show_column()

    def _check_rounds(self) -> None:
        """Refuse rounds that no epoch follows, or in which nothing goes: each is to be a point of a curve."""
        schedule, epochs = self.schedule, self.learn.n_epoch
        if not isinstance(schedule, Rounds) or not epochs:
            return
        most = int((schedule.end - schedule.start) * epochs + 1e-9) + 1
        if schedule.rounds > most:
            raise ValueError(
                f"{schedule.rounds} rounds between {schedule.start:g} and {schedule.end:g} of {epochs} epochs are less "
                f"than an epoch apart, so that none could be told from the next: at most {most}, or more epochs"
            )
        shares = [place / schedule.rounds for place in range(1, schedule.rounds + 1)]
        gone = self._plan.rounds(self.learn.model, self._masks(), shares)
        for place, (then, now) in enumerate(itertools.pairwise([0, *gone]), 1):
            if now <= then:
                raise ValueError(
                    f"round {place} of {schedule.rounds} would remove nothing, the aim is too small for so many: "
                    f"{gone[-1]} channels go in all"
                )

    def before_train(self) -> None:
        """Do what is due before the epoch's first step; what is due after the last one waits for the validation."""
        self._follow(self.learn.epoch / self.learn.n_epoch)

    def before_step(self) -> None:
        """Look at the gradients, or push scales towards zero."""
        if self.settled:
            return
        if self.choice.importance == "taylor":
            gather(self.learn.model, self._keys, self._sums)
        elif self.choice.importance == "bn_scale":
            penalty, modules = PENALTY if self.penalty is None else self.penalty, dict(self.learn.model.named_modules())
            for layer, _ in self._keys:
                scale = modules[layer].weight
                if scale.grad is not None:
                    scale.grad.add_(scale.detach().sign(), alpha=penalty)

    def after_batch(self) -> None:
        """Follow the ramp; what is due at the end of an epoch that is not the last waits for `before_train`."""
        learn = self.learn
        steps, done = learn.n_epoch * learn.n_iter, learn.epoch * learn.n_iter + learn.iter + 1
        if done % learn.n_iter or done == steps:
            self._follow(done / steps)

    def after_fit(self) -> None:
        """Reach the aim where there was no step; say what was removed, and let go of what only a fit needs."""
        if self.learn.n_epoch == 0:
            self._follow(1.0)
        self._told.append(self._totals())
        self.hide_column()
        self._plan, self._sums, self._loss = None, {}, None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on."""
        sums = [(layer, axis, value) for (layer, axis), value in self._sums.items()]
        return {"alive": self._alive, "share": self._share, "sums": sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, which may have been read to another device than the network's."""
        device = next(self.learn.model.parameters()).device
        self._alive = {name: there.cpu() for name, there in state["alive"].items()}
        self._sums = {(layer, axis): value.to(device) for layer, axis, value in state["sums"]}
        self._share = state["share"]

    def _follow(self, progress: float) -> None:
        """Remove what is due at a progress."""
        before, share = self._share or 0.0, self.schedule(progress)
        jump = isinstance(self.schedule, Rounds) or before == 0 or share == 1
        if share > before and (jump or share - before >= STEP):
            self._remove(share)
            before = share
        self._share = before

    def _remove(self, share: float) -> None:
        """Remove channels until a share of the aim is reached."""
        learn, network = self.learn, self.learn.model
        if self.choice.importance == "taylor" and not self._sums:
            calibrate(learn, self._loss, self._keys, self._sums)
        ranks = self._ranks()
        after = without(self._alive, self._plan.next(network, self._masks(), self._alive, ranks, share))
        gone = removal(network, self._plan.groups, self._alive, after)
        narrow(network, gone.kept, gone.table, learn.opt)
        self._sums = {key: value[gone.left[key]] if key in gone.left else value for key, value in self._sums.items()}
        self._alive = after
        tell(learn, "resized", gone.kept)

    def _ranks(self) -> dict[str, Tensor]:
        """How much each channel matters now."""
        network, choice, seed = self.learn.model, self.choice, self.seed or 0
        fixed = {"feeding": choice.feeding, "sums": self._sums, "seed": seed}
        return scores(network, self._plan.groups, self._alive, choice.importance, **fixed)

    def _masks(self) -> dict[str, Tensor]:
        """The masks of the network's zeros; a callback that comes later may still show those of another fit."""
        parameters = dict(self.learn.model.named_parameters())
        known = all_masks(self.learn)
        return {n: mask for n, mask in known.items() if n in parameters and mask.shape == parameters[n].shape}

    def _totals(self) -> tuple[int, int, int | None]:
        """Channels that can go or could, parameters, and MACs where the network can be traced."""
        network = self.learn.model
        try:
            macs = sum(line.macs for line in count_ops(network, self._size))
        except TraceError:
            macs = None
        channels = sum(int(self._alive[group.name].sum()) * group.size for group in self._plan.groups)
        return channels, self._params_now(), macs

    def _params_now(self) -> int:
        return total_params(self.learn.model)
