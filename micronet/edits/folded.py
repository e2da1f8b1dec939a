"""BatchNorm taken into the layers before it."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from callbacks.fold import drop_norms, fold_norms
from callbacks.fold_plan import plan_folds
from callbacks.ledger import Ledger, build
from micronet.edits.gate import Edited, checked, size_of, staying, trace
from micronet.errors import MicronetError


def fold_bn(model: nn.Module, *, images: Tensor | None = None, input_size: Sequence[int] | None = None) -> Edited:
    """Take every BatchNorm into the convolution or linear layer before it, found by data flow.

    In eval mode the network answers as before; trained further, it does so without BatchNorm. What does not directly
    follow a layer that only it reads stays, and is named: a BatchNorm in front of its convolution, a layer that runs
    twice. What a forward multiplies or adds itself stays, too. The ledger counts the same before and after.

    Args:
        model: the network; it stays as it is.
        images: `(N, C, H, W)`, normalised: on them the logits must stay what they were, to 1e-4, and the classes. None
            to check nothing but that the log repeats the structure, and that the cost is the same.
        input_size: **shape** of one image, `(C, H, W)`, where there are no images.

    Raises:
        MicronetError: no BatchNorm folds; the network can't be traced; it answers otherwise afterwards.
    """
    size = size_of(images, input_size, "fold_bn")
    graph = trace(model, size, "fold_bn")
    plan = plan_folds(model, graph)
    stays = [f"{name}: {reason}" for name, reason in plan.stays.items()]
    if not plan.layers:
        raise MicronetError(f"fold_bn: no BatchNorm folds{staying(stays)}")
    changed = copy.deepcopy(model)
    fold_norms(changed, plan.layers)
    _require_same_cost(*(build(g, allow_unknown=True) for g in (graph, trace(changed, size, "fold_bn"))))
    log = {"edit": "fold_bn", "layers": {name: list(norms) for name, norms in plan.layers.items()}}
    count = len({norm for norms in plan.layers.values() for norm in norms})
    summary = f"{count} of {count + len(stays)} BatchNorms folded{staying(stays)}"
    return checked(model, changed, log, again, summary, images, same=True)


def again(model: nn.Module, entry: dict[str, Any]) -> None:
    """Repeat an edit from its log, in place."""
    if not all(isinstance(norms, list | tuple) for norms in entry["layers"].values()):
        raise ValueError("a layer's BatchNorms must be a list")
    drop_norms(model, entry["layers"])


def _require_same_cost(before: Ledger, after: Ledger) -> None:
    """The ledger counts a network as if it were folded: one that is costs the same, or its forward does otherwise."""
    counts = [
        (sum(line.mults for line in ledger.lines), sum(line.adds for line in ledger.lines), _stored(ledger))
        for ledger in (before, after)
    ]
    if counts[0] != counts[1]:
        raise MicronetError(
            "fold_bn: folded, the network runs other operations than the ledger says it would: a forward reads its "
            "layers in a way that is not followed; nothing was kept"
        )


def _stored(ledger: Ledger) -> int:
    return sum(array.numel for array in ledger.arrays)
