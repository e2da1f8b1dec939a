"""Recipes: data, network and a list of fits, as plain values; and reading one from its file."""

import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from callbacks.schedule import OneCycle, Schedule
from micronet.errors import MicronetError, first_line
from micronet.names import name_of
from micronet.optim import OptFunc, sgd

if TYPE_CHECKING:
    from fastai.callback.core import Callback
    from torch import nn

    from micronet.data import Data
    from micronet.edits import Edited


def _makes(cb: Any) -> bool:
    # A callback is callable, too, but one that two fits share leaks its state.
    return isinstance(cb, type) or (callable(cb) and not hasattr(cb, "learn"))


@dataclass(frozen=True)
class Fit:
    """One stage of a recipe: a training, as plain values.

    Args:
        name: of the stage; letters, digits, `-` and `_`.
        epochs: passes over the training images, at least 0.
        lr: largest learning rate, above 0.
        schedule: of the learning rate; `OneCycle` moves the momentum, too.
        opt: makes the optimizer: `sgd()`, `adam()`, `adamw()`, `muon()`, or any fastai `opt_func`.
        wd: weight decay, at least 0.
        wd_bn_bias: whether BatchNorm's parameters and biases decay, too.
        batch_size: images a step; None for the data's own.
        label_smoothing: share of the target spread over all classes, in [0, 1).
        grad_clip: largest norm of the gradient; None not to clip.
        ema: decay of the moving average of the weights, in (0, 1); None for no average.
        early_stop: epochs without a better top-1 on validation after which the fit ends; None for never.
        keep: end with the weights of the best validation epoch (`"best"`) or the last one (`"last"`).
        bf16: compute in bfloat16; None: where it is known to be faster.
        channels_last: memory layout of weights and batches; None: together with bf16.
        compile: whether to `torch.compile` the network (on a CPU that costs a minute and gains nothing).
        cbs: makers of further callbacks, such as `partial(MixUp, 0.4)`: each fit gets fresh ones.
        edit: changes of structure before the fit, in order, such as `partial(swap_activation, old=nn.ReLU,
            new=nn.ReLU6)`: functions of `micronet.edits`, called with the network and `images=`.

    Raises:
        ValueError: an argument is out of its range.
    """

    name: str
    epochs: int
    lr: float = 0.1
    schedule: Schedule | OneCycle = field(default_factory=OneCycle)
    opt: OptFunc = field(default_factory=sgd)
    wd: float = 5e-4
    wd_bn_bias: bool = True
    batch_size: int | None = None
    label_smoothing: float = 0.0
    grad_clip: float | None = None
    ema: float | None = None
    early_stop: int | None = None
    keep: Literal["best", "last"] = "best"
    bf16: bool | None = None
    channels_last: bool | None = None
    compile: bool = False
    cbs: tuple[Callable[[], "Callback"], ...] = ()
    edit: tuple[Callable[..., "Edited"], ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ValueError(f"name must be made of letters, digits, - and _, got {self.name!r}")
        ranges = [
            ("epochs", self.epochs >= 0 and isinstance(self.epochs, int), "a whole number, at least 0"),
            ("lr", self.lr > 0, "above 0"),
            ("wd", self.wd >= 0, "at least 0"),
            ("batch_size", self.batch_size is None or self.batch_size >= 1, "at least 1 image, or None"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "a fraction in [0, 1)"),
            ("grad_clip", self.grad_clip is None or self.grad_clip > 0, "above 0, or None"),
            ("ema", self.ema is None or 0 < self.ema < 1, "a fraction in (0, 1), or None"),
            ("early_stop", self.early_stop is None or self.early_stop >= 1, "at least 1 epoch, or None"),
            ("keep", self.keep in ("best", "last"), '"best" or "last"'),
            ("cbs", all(map(_makes, self.cbs)), "makers of callbacks, such as partial(MixUp, 0.4), not callbacks"),
            ("edit", isinstance(self.edit, tuple) and all(map(callable, self.edit)), "a tuple of edits"),
        ]
        for name, right, allowed in ranges:
            if not right:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r} (stage {self.name})")


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, and how.

    Args:
        data: makes the image sets, such as `partial(cifar100, batch_size=512)`.
        model: makes the network, called with `num_classes`, such as `partial(wide_resnet, depth=22, width=6)`.
            Or the path of a `model.pth`: the first stage goes on with its network, masks and edits.
        stages: the fits, in order; each goes on with the network of the one before.

    Raises:
        ValueError: there is no stage, or two have the same name.
    """

    data: Callable[[], "Data"]
    model: "Callable[..., nn.Module] | Path"
    stages: tuple[Fit, ...]

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"stages must be one or more fits of different names, got {names}")


def load_recipe(path: str | Path, options: Mapping[str, str] | None = None, *, smoke: bool = False) -> Recipe:
    """Read a recipe file and call its `recipe` with options.

    Args:
        path: a Python file that defines `recipe(*, ..., smoke=False) -> Recipe`. Its code is run.
        options: keyword arguments of `recipe`, as text; the argument's annotation says what the text becomes.
        smoke: passed on: the same stages, in seconds.

    Raises:
        MicronetError: no such file, an error in it, an unknown option, a value of the wrong kind.
    """
    path = Path(path)
    function = _recipe_function(path)
    arguments = {name: parse_option(function, name, text, path) for name, text in (options or {}).items()}
    try:
        recipe = function(**arguments, **({"smoke": True} if smoke else {}))
    except Exception as error:  # whatever the user's file raises is about the user's file
        raise MicronetError(_about_file(error, path)) from error
    if not isinstance(recipe, Recipe):
        raise MicronetError(f"{path}: recipe() must return a micronet.Recipe, got {type(recipe).__name__}")
    return recipe


def _recipe_function(path: Path) -> Callable[..., Recipe]:
    if not path.is_file():
        near = sorted(str(p) for p in Path("recipes").glob("*.py")) if path.suffix in ("", ".py") else []
        hint = f"; there are {', '.join(near)}" if near else ""
        raise MicronetError(f"{path}: no such recipe file{hint}")
    if path.suffix != ".py":
        raise MicronetError(f"{path}: a recipe is a Python file, its name ends in .py")
    function = getattr(run_file(path), "recipe", None)
    if not callable(function):
        raise MicronetError(f"{path}: defines no function recipe(*, ..., smoke=False) that returns a Recipe")
    if "smoke" not in inspect.signature(function).parameters:
        raise MicronetError(f"{path}: recipe() must take the keyword argument smoke=False")
    return function


def run_file(path: Path) -> types.ModuleType:
    """Run a Python file of the user's, and give what it defines.

    Args:
        path: the file; its name ends in `.py`.

    Raises:
        MicronetError: an error in it.
    """
    name = f"micronet_file_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and type hints of the file look their module up here
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises is about the user's file
        raise MicronetError(_about_file(error, path)) from error
    return module


def _about_file(error: BaseException, path: Path) -> str:
    """One line on an error that a recipe file raised: where in the file, what."""
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    else:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    where = f"{path}:{lines[-1]}" if lines else f"{path}"
    return f"{where}: {type(error).__name__}: {first_line(error)}"


@contextmanager
def blaming(where: Any) -> Iterator[None]:
    """Say of a wrong value that a recipe gave where it is to be mended.

    Args:
        where: named in the message.

    Raises:
        MicronetError: what ran inside raised anything but an error of the system's (`OSError`).
    """
    try:
        yield
    except (MicronetError, OSError):
        raise
    except Exception as error:  # a user's network or data can fail in any way, timm's names with RuntimeError
        raise MicronetError(f"{where}: {first_line(error)}") from error


def parse_option(function: Callable[..., Any], name: str, text: str, where: Any = "recipe") -> Any:
    """Turn the text of one option into the value that a function's keyword argument wants.

    Args:
        function: its signature names the arguments, their annotations the types: int, float, bool, str, Path, Literal,
            and these or None.
        name: of the argument.
        text: of the value.
        where: named in errors.

    Raises:
        MicronetError: no such argument, or the text is not of its type.
    """
    names = [n for n in inspect.signature(function).parameters if n != "smoke"]
    if name not in names:
        raise MicronetError(f"{where}: no option {name!r}; it has {', '.join(names) or 'none'}")
    wanted = typing.get_type_hints(function).get(name, str)
    kinds = typing.get_args(wanted) if typing.get_origin(wanted) in (types.UnionType, typing.Union) else (wanted,)
    for kind in sorted(kinds, key=lambda kind: kind is not type(None)):  # "none" before text
        found, value = _parse(kind, text)
        if found:
            return value
    allowed = " or ".join(_describe_kind(kind) for kind in kinds)
    raise MicronetError(f"{where}: option {name} must be {allowed}, got {text!r}")


def _parse(kind: Any, text: str) -> tuple[bool, Any]:
    if kind is type(None):
        return text.lower() == "none", None
    if kind is bool:
        values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        return text.lower() in values, values.get(text.lower())
    if typing.get_origin(kind) is Literal:
        chosen = [value for value in typing.get_args(kind) if str(value) == text]
        return bool(chosen), chosen[0] if chosen else None
    if kind in (int, float):
        try:
            return True, kind(text)
        except ValueError:
            return False, None
    if kind is Path:
        return bool(text), Path(text)
    return kind is str, text


def _describe_kind(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(str(value) for value in typing.get_args(kind))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a file"}
    words[type(None)] = "none"
    return words.get(kind, f"a {kind} (which the command line can't give)")


def describe(value: Any) -> Any:
    """Describe a recipe by its values, as JSON can hold them: two recipes that describe alike train alike.

    Args:
        value: a recipe or a part of one: numbers, text, containers, dataclasses, partials, named functions and classes.

    Raises:
        MicronetError: a part has no name that another process could find, such as a lambda.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, Path):
        # A file is what it holds: another network under the same name is another recipe, one moved elsewhere is not.
        held = {"sha256": hashlib.sha256(value.read_bytes()).hexdigest()} if value.is_file() else {}
        return {"file": value.name, **held} if held else str(value)
    if isinstance(value, partial):
        arguments = {"args": describe(value.args), **describe(value.keywords)}
        return {"call": describe(value.func), **{name: item for name, item in arguments.items() if item != []}}
    if is_dataclass(value) and not isinstance(value, type):
        return {"call": describe(type(value))} | {f.name: describe(getattr(value, f.name)) for f in fields(value)}
    if "<" in getattr(value, "__qualname__", "<nothing>"):
        raise MicronetError(
            f"a recipe is made of values, partials and named functions; {value!r} can't be recorded: use partial(...)"
        )
    return name_of(value)
