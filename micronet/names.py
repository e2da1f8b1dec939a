"""Names of record: what files call functions and classes, so that they are found again wherever the code has moved to.

A run's record and a `model.pth` name what made them by the public name (`micronet.data:cifar10`,
`callbacks:PruneChannels`), not by the file that holds it today.
"""

import importlib
from collections.abc import Mapping
from typing import Any

# The packages whose public names are names of record; the first that offers a thing names it.
FACES = ("callbacks", "micronet", "micronet.data", "micronet.edits", "micronet.models")

# What records of version 0.1.0 and earlier say, by the file that held it then.
_MOVED = {
    "callbacks": {
        "checkpoint": "Checkpoint EarlyStop KeepBest",
        "distill": "Distill",
        "distill_features": "AttentionTransfer Hints",
        "ema": "EMA",
        "masks": "KeepZeros",
        "op_counter": "OpCounter",
        "precision": "Precision",
        "prune": "PruneChannels",
        "quant_aware": "QuantAware",
        "quantize": "QuantizeInt8",
        "ramp": "Cubic Linear OneShot Ramp Rounds",
        "resize": "ProgressiveResizing",
        "schedule": "Constant Cosine MultiStep OneCycle Schedule Step",
        "soft_targets": "Decouple",
        "sparsify": "Sparsify",
    },
    "micronet": {
        "muon": "Muon",
        "optim": "adam adamw muon sgd",
        "recipe": "Fit Recipe",
        "sensitivity": "ratios_from",
        "teachers": "distill_from",
    },
    "micronet.data": {
        "augment": "Augment wrn_augment",
        "sources": "cifar10 cifar100 digits image_folder",
    },
    "micronet.edits": {
        "activations": "swap_activation",
        "depthwise": "separable",
        "factored": "low_rank",
        "folded": "fold_bn",
    },
    "micronet.models": {
        "densenet": "densenet121",
        "googlenet": "googlenet",
        "preact_resnet": "preact_resnet18",
        "resnet": "resnet18 resnet20 resnet32 resnet34 resnet44 resnet56 resnet110",
        "separable": "separable_net",
        "wide_resnet": "wide_resnet",
    },
}
RENAMED = {
    f"{face}.{file}:{name}": f"{face}:{name}"
    for face, files in _MOVED.items()
    for file, names in files.items()
    for name in names.split()
}


def name_of(value: Any) -> str:
    """Name a function or class for a file: `module:name`, where ours go by the package that offers them.

    Args:
        value: anything with `__module__` and `__qualname__`.
    """
    module, name = value.__module__, value.__qualname__
    package = module.partition(".")[0]
    for face in FACES:
        if face.partition(".")[0] != package or "." in name:
            continue
        offered = importlib.import_module(face)
        if name in offered.__all__ and getattr(offered, name) is value:
            return f"{face}:{name}"
    return f"{module}:{name}"


def current(record: Any) -> Any:
    """Give what a file says with the names of today in the place of earlier ones.

    Args:
        record: a name, or containers of plain values that hold some: an earlier `run.json` or provenance.
    """
    if isinstance(record, str):
        return RENAMED.get(record, record)
    if isinstance(record, Mapping):
        return {key: current(value) for key, value in record.items()}
    if isinstance(record, (list, tuple)):
        return [current(value) for value in record]
    return record
