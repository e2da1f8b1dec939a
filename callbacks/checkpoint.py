"""Checkpoints, the best epoch, and early stopping - all of which survive a kill.

What: `Checkpoint` writes everything a fit needs to go on after each epoch; a fit that goes on from it does the same
arithmetic as one that was never stopped. `KeepBest` ends with the weights of the best validation epoch, `EarlyStop`
ends a fit that no longer improves.
When: every fit longer than you would want to repeat.
Cost: one file of about four times the weights (weights, optimizer, average, best), written once an epoch.
Interactions: a callback with `state_dict` and `load_state_dict` of its own is saved and restored, too (`EMA`,
`KeepBest`, `EarlyStop`). A fit that removed channels is gone on with in a network as narrow as it was (`widths.py`).
Equal bits need the same CPU, versions and number of threads.
Source: fastai's Learner and its events; `saving.py` writes the file so that it is whole or absent.
"""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.learner import Learner
from torch import Tensor

from callbacks.protocol import all_settled, having
from callbacks.saving import plain, write_atomically
from callbacks.widths import Widths, narrower, set_widths, widths

# What every checkpoint holds.
KEPT = frozenset(
    ("epoch", "model", "widths", "optimizer", "smooth_loss", "lrs", "losses", "data_epoch", "random", "callbacks")
)


def random_state() -> dict[str, Any]:
    """The state of torch's, CUDA's, numpy's and Python's global random number generators, as plain values."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": plain(np.random.get_state()),
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the global random number generators where `random_state` found them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
    random.setstate(state["python"])


def _stateful(learn: Learner) -> dict[str, Callback]:
    found = [cb for cb in having(learn, "state_dict") if not isinstance(cb, Checkpoint)]
    return {f"{place}: {cb.name}": cb for place, cb in enumerate(found)}  # two of one class are two


class Checkpoint(Callback):
    """Writes a checkpoint after each epoch; given the content of one, goes on from there.

    Call `learn.fit(..., start_epoch=state["epoch"])` with the same state: fastai then skips the epochs done.

    Args:
        path: the file to write.
        state: what `torch.load(path, weights_only=True)` gave, to go on from; None to start anew.
    """

    order = 90  # last: what the other callbacks changed in after_epoch is in the file

    def __init__(self, path: str | Path, state: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.file, self._state = Path(path), state
        self._whole: Widths = {}  # of the network that the fit began with

    def before_fit(self) -> None:
        """Restore structure, weights, optimizer, position in the data, and the callbacks' own state."""
        state = self._state
        self._whole = widths(self.learn.model)
        if state is None:
            return
        learn = self.learn
        set_widths(learn.model, state["widths"])
        learn.model.load_state_dict(state["model"])
        learn.opt.load_state_dict(state["optimizer"])
        for parameter, kept in learn.opt.state.items():  # fastai's own optimizers leave it where it was read to
            kept.update({k: v.to(parameter.device) for k, v in kept.items() if isinstance(v, Tensor)})
        learn.recorder.smooth_loss.count, learn.recorder.smooth_loss.val = state["smooth_loss"]
        learn.recorder.lrs[:] = state["lrs"].tolist()
        learn.recorder.losses[:] = list(state["losses"])
        learn.train_iter = len(learn.recorder.lrs)
        if state["data_epoch"] is not None:
            learn.dls.train.epoch = state["data_epoch"]
        for name, cb in _stateful(learn).items():
            cb.load_state_dict(state["callbacks"][name])

    def before_train(self) -> None:
        """Restore the random number generators, once everything that draws while a fit is set up has drawn."""
        if self._state is not None:
            set_random_state(self._state["random"])
            self._state = None

    def after_epoch(self) -> None:
        """Write the file, but for epochs that are skipped on the way to where the fit goes on."""
        if self._state is None:
            write_atomically(self.content(), self.file)

    def content(self) -> dict[str, Any]:
        """Everything that the fit needs to go on, as tensors and plain containers."""
        learn, recorder = self.learn, self.learn.recorder
        return {
            "epoch": learn.epoch + 1,
            "model": dict(learn.model.state_dict()),
            "widths": narrower(learn.model, self._whole),
            "optimizer": plain(learn.opt.state_dict()),
            "smooth_loss": (recorder.smooth_loss.count, recorder.smooth_loss.val),
            "lrs": torch.tensor([float(lr) for lr in recorder.lrs], dtype=torch.float64),
            "losses": torch.stack([torch.as_tensor(loss).cpu() for loss in recorder.losses] or [torch.zeros(())]),
            "data_epoch": vars(learn.dls.train).get("epoch"),
            "random": random_state(),
            "callbacks": {name: plain(cb.state_dict()) for name, cb in _stateful(learn).items()},
        }


class _Monitor(Callback):
    """Looks at one validation number after each epoch.

    Args:
        monitor: a column of the training table; one whose name holds "loss" is better when smaller, others when larger.
    """

    order = 60  # after the Recorder (50) has the epoch's numbers

    def __init__(self, monitor: str = "top1") -> None:
        super().__init__()
        self.monitor = monitor
        self._best: float | None = None

    def before_fit(self) -> None:
        """Forget an earlier fit."""
        self._best = None
        names = list(self.learn.recorder.metric_names)
        if self.monitor not in names:
            raise ValueError(f"monitor must be one of {', '.join(names[1:])}, got {self.monitor!r}")

    def _improved(self) -> bool:
        recorder = self.learn.recorder
        value = float(recorder.log[list(recorder.metric_names).index(self.monitor)])
        sign = -1 if "loss" in self.monitor else 1
        if self._best is None or sign * value > sign * self._best:
            self._best = value
            return True
        return False


class KeepBest(_Monitor):
    """Ends the fit with the weights of the best validation epoch, the first one among equals.

    An epoch in which another callback has not yet reached what the fit is to leave (`settled`), such as a sparsity that
    still grows, is never the best one, however right its answers are.

    Args:
        monitor: the column to judge by.
    """

    def __init__(self, monitor: str = "top1") -> None:
        super().__init__(monitor)
        self._weights: dict[str, Tensor] | None = None
        self._best_epoch: int | None = None

    def before_fit(self) -> None:
        """Forget an earlier fit."""
        super().before_fit()
        self._weights = self._best_epoch = None

    def after_validate(self) -> None:
        """Copy the weights where they are the best so far."""
        if all_settled(self.learn) and self._improved():
            self._weights = {name: value.clone() for name, value in self.learn.model.state_dict().items()}
            self._best_epoch = self.learn.epoch

    def after_fit(self) -> None:
        """Put the best weights into the network."""
        if self._weights is not None:
            self.learn.model.load_state_dict(self._weights)
        self._weights = None

    @property
    def best_epoch(self) -> int | None:
        """Number of the best epoch, from 0; None before the first validation."""
        return self._best_epoch

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on."""
        return {"best": self._best, "epoch": self._best_epoch, "weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._best, self._best_epoch, self._weights = state["best"], state["epoch"], state["weights"]


class EarlyStop(_Monitor):
    """Ends the fit after a number of epochs without improvement.

    Args:
        patience: epochs without improvement after which no further one begins, at least 1.
        monitor: the column to judge by.

    Raises:
        ValueError: `patience` is below 1.
    """

    def __init__(self, patience: int, monitor: str = "top1") -> None:
        super().__init__(monitor)
        if patience < 1:
            raise ValueError(f"patience must be at least 1 epoch, got {patience}")
        self.patience = patience
        self._waited = 0

    def before_fit(self) -> None:
        """Forget an earlier fit."""
        super().before_fit()
        self._waited = 0

    def before_train(self) -> None:
        """End the fit where patience is over: here, the last epoch's checkpoint is written, and MixUp is set up."""
        if self._waited >= self.patience:
            raise CancelFitException

    def after_validate(self) -> None:
        """Count the epochs without improvement."""
        if all_settled(self.learn):  # before, the numbers are of networks that the fit is not about
            self._waited = 0 if self._improved() else self._waited + 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on."""
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._best, self._waited = state["best"], state["waited"]
