"""micronet: train small image classifiers with fastai, and count what they cost.

The names are found when they are first used: importing micronet imports neither torch nor fastai.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from micronet.errors import MicronetError as MicronetError

__version__ = "0.1.0"

if TYPE_CHECKING:
    from micronet.bundle import Bundle as Bundle
    from micronet.bundle import load as load
    from micronet.bundle import save as save
    from micronet.counting import Assume as Assume
    from micronet.evaluate import evaluate as evaluate
    from micronet.muon import Muon as Muon
    from micronet.optim import adam as adam
    from micronet.optim import adamw as adamw
    from micronet.optim import muon as muon
    from micronet.optim import sgd as sgd
    from micronet.recipe import Fit as Fit
    from micronet.recipe import Recipe as Recipe
    from micronet.recipe import load_recipe as load_recipe
    from micronet.rules import RULES as RULES
    from micronet.rules import Rules as Rules
    from micronet.run import RunOptions as RunOptions
    from micronet.run import run as run
    from micronet.score import Score as Score
    from micronet.score import score as score
    from micronet.sensitivity import ratios_from as ratios_from
    from micronet.teachers import distill_from as distill_from

_HOMES = {
    "Bundle": "bundle",
    "load": "bundle",
    "save": "bundle",
    "evaluate": "evaluate",
    "Muon": "muon",
    "adam": "optim",
    "adamw": "optim",
    "muon": "optim",
    "sgd": "optim",
    "Fit": "recipe",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "RULES": "rules",
    "Assume": "counting",
    "Rules": "rules",
    "RunOptions": "run",
    "run": "run",
    "Score": "score",
    "score": "score",
    "distill_from": "teachers",
    "ratios_from": "sensitivity",
}

__all__ = ["MicronetError", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'micronet' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"micronet.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing micronet.score binds the module to this name, over the function that the name stands for.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
