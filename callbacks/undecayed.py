"""New parameters in an optimizer that exists, trained without weight decay.

Its groups stay as many as they are, between two steps: schedulers give a learning rate for each, files hold them.
"""

from collections.abc import Sequence
from typing import Any

from fastai.optimizer import OptimWrapper
from torch import nn


class Undecayed:
    """Parameters that join an optimizer, after all others in a group without weight decay, if it has one.

    If it has none, they have a group of their own for the time of each step. Parameters that are in the optimizer
    already are moved, so that a checkpoint finds the same order, whoever made the optimizer.

    Args:
        opt: one of fastai's optimizers, or fastai's wrapper around one of torch's.
        parameters: what joins.
    """

    def __init__(self, opt: Any, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        # Not its groups, which a checkpoint puts others in the place of.
        self._torch = opt.opt if isinstance(opt, OptimWrapper) else None
        self._apart: dict[str, Any] | None = None
        free = [place for place, hypers in enumerate(opt.hypers) if not hypers.get("wd")]
        self._place = free[-1] if free else len(opt.hypers) - 1
        if self._torch is not None:
            for group in self._torch.param_groups:
                self._take_from(group)
            self._torch.param_groups[self._place]["params"].extend(self._parameters)
            return
        known = {id(p) for params in opt.param_lists for p in params}
        for parameter in self._parameters:
            if id(parameter) not in known:
                opt.param_lists[self._place].append(parameter)
            opt.state[parameter]["do_wd"] = False  # fastai's own optimizers keep for each parameter whether it decays

    def before_step(self) -> None:
        """Leave a group with weight decay."""
        home = self._torch.param_groups[self._place] if self._torch is not None else {}
        if home.get("weight_decay"):
            self._take_from(home)
            self._apart = {**home, "params": self._parameters, "weight_decay": 0.0}
            self._torch.param_groups.insert(0, self._apart)  # in front: others look for the last group

    def after_step(self) -> None:
        """Come back to it."""
        if self._apart is not None:
            groups = self._torch.param_groups
            groups[:] = [group for group in groups if group is not self._apart]
            groups[self._place]["params"].extend(self._parameters)
            self._apart = None

    def _take_from(self, group: dict[str, Any]) -> None:
        ids = set(map(id, self._parameters))
        group["params"][:] = [p for p in group["params"] if id(p) not in ids]
