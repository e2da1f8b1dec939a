"""What callbacks say to each other and to the pipeline, beyond fastai's events.

A callback class may define any of these; nobody keeps a list of the classes that do:

    expected()             what will hold when its fit is over, told before it runs (`expected.py`)
    state_dict(), load_state_dict(state)
                           what it needs to go on from a checkpoint (`checkpoint.py`)
    settled                False as long as what its fit is to leave is not reached: such an epoch is never the best one
    masks                  the mask of each masked parameter, by its name in the state dict; False where it stays zero
    masked(masks)          weights were set to zero: do the same to what is kept of each weight
    resized(kept)          elements were taken away: `kept` is `widths.narrow`'s; take them from what is kept of them
    rewound()              the weights were put back to what they once were: begin anew what is averaged over steps
    onnx                   a property: an `OnnxFile` that its fit leaves beside the network; None before, or where none
    cost_changes           shares of the fit, growing, in (0, 1), at which a step begins to take another time
    as_at(share)           act as at this share of the fit until another begins: so the time of each part is taken
    training_loss          what it makes of the training loss, in a word, for plots: "distillation"; empty for nothing
    summary                what it did, in one line, to be printed after the fit; a property: Learner has this name, too
"""

from dataclasses import dataclass
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from torch import Tensor


@dataclass(frozen=True)
class OnnxFile:
    """A graph that a callback made of the network that a fit left.

    Args:
        name: of the file that it is to be.
        content: its bytes.
        how: what it was made by, plain values.
        floor: most percentage points of top-1 on the validation images that it may lose; None for the usual.
    """

    name: str
    content: bytes
    how: dict[str, Any]
    floor: float | None = None


def having(learn: Learner, name: str) -> list[Callback]:
    """The callbacks of a Learner whose class defines a name, in the Learner's order.

    Args:
        learn: a Learner.
        name: of a method or property. It is looked up on the class: a Callback's unknown attributes are looked up in
            the Learner, and from there in the network.
    """
    return [cb for cb in learn.cbs.sorted("order") if hasattr(type(cb), name)]


def onnx_of(learn: Learner) -> OnnxFile | None:
    """The ONNX graph that a fit left; None where there is none.

    Args:
        learn: after the fit.

    Raises:
        ValueError: two callbacks leave one of the same name.
    """
    found = [made for cb in having(learn, "onnx") if (made := cb.onnx) is not None]
    if len(found) > 1:
        raise ValueError(f"two callbacks of one fit leave an ONNX file: {found[0].name} and {found[1].name}")
    return found[0] if found else None


def tell(learn: Learner, name: str, *args: Any) -> None:
    """Call a method of every callback that defines it."""
    for cb in having(learn, name):
        getattr(cb, name)(*args)


def all_settled(learn: Learner) -> bool:
    """Whether every callback has reached what the fit is to leave."""
    return all(cb.settled for cb in having(learn, "settled"))


def all_masks(learn: Learner) -> dict[str, Tensor]:
    """The masks of all callbacks together: an element is kept where each of them keeps it."""
    found: dict[str, Tensor] = {}
    for cb in having(learn, "masks"):
        for name, mask in cb.masks.items():
            found[name] = torch.logical_and(found[name], mask) if name in found else mask
    return found
