"""Count what a network costs for one image, and show a score while it trains.

What: `count_ops` (`op_trace.py`) traces a copy of a module and yields one `Line` for every operation that runs: layers,
functional calls, residual adds; a module called twice gives two lines. `OpCounter` puts a score made of these lines
into fastai's training table.
When: to know parameters, multiplications and additions before, while and after a network is made smaller.
Cost: one trace, about 0.1 to 1 s, the first in a process 1 s more; while training, at the first batch and then only
when the structure has changed. No storage is copied and no arithmetic is done.
Interactions: hooks are not run, so what a forward hook does to the data is not counted (what torch's weight_norm and
prune compute by hooks is weights, not data); nor is what a callback such as `Precision` puts around a forward for the
time of a fit. BatchNorm, dropout and extra heads are counted as in eval mode.
Source: the formulas (`op_formulas.py`) are those of torchstat 0.0.7, compute_madd.py; the fastai entry to the MicroNet
Challenge (2019) changed its lines 27 and 124 so that multiplications and additions come back apart.
"""

from collections.abc import Callable, Sequence
from typing import Any

from fastai.callback.core import Callback
from fastai.learner import ValueMetric
from fastai.torch_core import get_model
from torch import nn

from callbacks.column import ShowsColumn
from callbacks.ledger import Line as Line
from callbacks.op_trace import TraceError as TraceError
from callbacks.op_trace import count_ops as count_ops
from callbacks.op_trace import total_params as total_params
from callbacks.seed import seed_cost as seed_cost
from callbacks.seed import seed_score as seed_score


def _structure(model: nn.Module) -> tuple[Any, ...]:
    """What changes when layers are swapped, removed or resized."""
    modules = tuple((name, type(m), m.extra_repr()) for name, m in model.named_modules())
    return modules, tuple((name, p.shape) for name, p in model.named_parameters())


class OpCounter(ShowsColumn, Callback):
    """Show a score, counted on the network as it stands, as the column `score` of the training table.

    Args:
        score: Takes the count of parameters and the lines of `count_ops`, returns the number to show.
        input_size: **Shape** of one image, `(C, H, W)`; None takes it from each batch as it comes.
    """

    order = 45  # before Recorder (50), which reads the metrics' names in its before_fit

    def __init__(
        self,
        score: Callable[[int, Sequence[Line]], float] = seed_score,
        input_size: Sequence[int] | None = None,
    ):
        self._score, self._fixed_size = score, input_size
        self._column = ValueMetric(self._value, "score")
        self._forget()

    def _forget(self) -> None:
        self._size, self._counted, self._shown = self._fixed_size, None, None

    def before_fit(self) -> None:
        """Add the column, after taking away what an aborted fit left."""
        self._forget()
        self.show_column()

    def before_batch(self) -> None:
        """Note the size of the images; a network that cannot be traced fails at the first batch."""
        if self._fixed_size is None:
            self._size = tuple(self.xb[0].shape[1:])
        if self._counted is None:
            self._value()

    def after_fit(self) -> None:
        """Take the column away."""
        self.hide_column()

    def _value(self) -> float | None:
        if self._size is None:  # no batch came
            return None
        model = get_model(self.learn.model)
        structure = self._size, _structure(model)
        if structure != self._counted:
            self._shown = self._score(total_params(model), count_ops(model, self._size))
            self._counted = structure
        return self._shown
