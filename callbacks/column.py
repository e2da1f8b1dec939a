"""A column of the training table that is there as long as a callback's fit."""

from typing import Any

from fastai.learner import ValueMetric


class ShowsColumn:
    """What a callback inherits, before `Callback`, to show a column; its `order` must be below the Recorder's 50.

    Attributes:
        _column: the column, which the callback makes in its `__init__`.
    """

    _column: ValueMetric

    def __setattr__(self, name: str, value: Any) -> None:
        """Take the column away, too, when the callback is removed: an aborted fit has no other moment for it."""
        if name == "learn" and value is None and self.learn is not None:
            self.hide_column()
        super().__setattr__(name, value)

    def show_column(self) -> None:
        """Add the column, after taking away what an aborted fit left."""
        self.hide_column()
        self.learn.metrics = [*self.learn.metrics, self._column]

    def hide_column(self) -> None:
        """Take the column away."""
        self.learn.metrics = [metric for metric in self.learn.metrics if metric is not self._column]
