"""BatchNorm that does not fold, as one factor and one summand for each channel."""

from typing import Any

from torch import nn

from callbacks.affine import as_affine


def again(model: nn.Module, entry: dict[str, Any]) -> None:
    """Repeat an edit from its log, in place."""
    if not isinstance(entry["layers"], list | tuple):
        raise ValueError("layers must be a list of names")
    as_affine(model, entry["layers"])
