"""`model.pth`: a network that loads anywhere, with what is needed to use it and to know where it came from.

The file holds tensors and plain containers only and is read with `torch.load(weights_only=True)`: loading runs no code
of the file's. It names a factory (a function that builds the network) which is called only if it is one of micronet's,
torchvision's or timm's own.
"""

import inspect
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from callbacks.saving import plain, write_atomically
from micronet.errors import MicronetError

FORMAT = "micronet"
VERSION = 1
# Arguments that fetch weights from elsewhere: a bundle has its own.
_FETCH = frozenset(
    {
        "weights",
        "weights_backbone",
        "progress",
        "pretrained",
        "checkpoint_path",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
    }
    | {"cache_dir", "scriptable"}
)


@dataclass
class Bundle:
    """A network and all that belongs to it.

    Args:
        model: the network, in eval mode after `load`.
        factory: `module:name` of the function that builds it.
        kwargs: keyword arguments for the factory: numbers, text, and lists and dicts of these.
        classes: class names in the order of the logits.
        input_size: channels, height and width of one image.
        mean: what to subtract from each channel of an image scaled to [0, 1].
        std: what to divide each channel by after that.
        history: one row of measured numbers for each stage that made the network.
        provenance: recipe, options, seed, versions, hardware, git state.
    """

    model: nn.Module
    factory: str
    kwargs: dict[str, Any]
    classes: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    history: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)


def describe_factory(build: Callable[..., nn.Module]) -> tuple[str, dict[str, Any]]:
    """Name a factory so that a file can say how its network is built.

    Args:
        build: a function or class, or a `functools.partial` of one with keyword arguments only.

    Returns:
        `module:name`, and the keyword arguments, without those that fetch weights.

    Raises:
        MicronetError: positional arguments, an argument that is not plain, or a function without a name.
    """
    kwargs: dict[str, Any] = {}
    while isinstance(build, partial):
        if build.args:
            raise MicronetError(f"model: give arguments of {build.func.__name__} by name, so that they can be stored")
        kwargs, build = {**build.keywords, **kwargs}, build.func
    name = getattr(build, "__qualname__", "<lambda>")
    if "<" in name:
        raise MicronetError("model: use a named function or functools.partial of one: a lambda can't be stored")
    kept = {key: value for key, value in kwargs.items() if key not in _FETCH}
    for key, value in kept.items():
        if not _is_plain(value):
            raise MicronetError(f"model: argument {key} of {name} must be numbers and text to be stored, got {value!r}")
    return f"{build.__module__}:{name}", kept


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def find_factory(name: str, kwargs: Mapping[str, Any]) -> Callable[..., nn.Module]:
    """Find a factory named in a file, if it is on the allow-list: public network functions of three packages.

    Args:
        name: `module:name` as `describe_factory` gives it.
        kwargs: the file's keyword arguments; none may fetch anything.

    Raises:
        MicronetError: the factory or an argument is not allowed, or the package is not installed.
    """
    refused = MicronetError(
        f"the file's factory {name} is not a network of micronet, torchvision or timm; "
        "if you trust the code that made it, name that with --factory FILE:NAME"
    )
    module, _, attribute = name.partition(":")
    package = module.partition(".")[0]
    if bad := sorted(_FETCH & set(kwargs)):
        raise MicronetError(f"the file's arguments for {name} would fetch something: {', '.join(bad)}; refused")
    if package == "micronet":
        import micronet.models as networks

        found = getattr(networks, attribute, None) if attribute in networks.__all__ else None
        if found is None or found.__module__ != module:
            raise refused
        return found
    if package == "torchvision":
        from torchvision.models import get_model_builder, list_models

        if attribute not in list_models() or get_model_builder(attribute).__module__ != module:
            raise refused
        return partial(get_model_builder(attribute), weights=None)
    if package == "timm":
        return _timm_factory(attribute, kwargs, refused)
    raise refused


def _timm_factory(attribute: str, kwargs: Mapping[str, Any], refused: MicronetError) -> Callable[..., nn.Module]:
    try:
        import timm
    except ImportError as error:
        raise MicronetError("the file's network is one of timm's: pip install timm") from error
    model = kwargs.get("model_name") if attribute == "create_model" else attribute
    # A name outside the list can be a path or a hub's address.
    if not isinstance(model, str) or not timm.is_model(model) or ":" in model or "/" in model:
        raise refused
    build = partial(timm.create_model, pretrained=False)
    return build if attribute == "create_model" else partial(build, model_name=model)


def save(bundle: Bundle, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a bundle; a reader finds the old file or the new one, never half of one.

    Args:
        bundle: what to write.
        path: the file.
        dtype: floating-point type of the stored weights, such as `torch.float16` for half the size; None as they are.
            `load` gives float32 back: the network that the file describes is the rounded one.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in bundle.model.state_dict().items()}
    if dtype is not None:
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "factory": bundle.factory,
        "kwargs": bundle.kwargs,
        "state": state,
        "classes": list(bundle.classes),
        "input_size": list(bundle.input_size),
        "mean": list(bundle.mean),
        "std": list(bundle.std),
        "history": bundle.history,
        "provenance": bundle.provenance,
    }
    write_atomically(plain(content), path)


def load(path: str | Path, *, factory: Callable[..., nn.Module] | None = None) -> Bundle:
    """Read a bundle; its logits are bit-equal to those of the network that was saved.

    Args:
        path: the file.
        factory: builds the network instead of the one that the file names; called with the file's keyword arguments.

    Raises:
        MicronetError: no such file; truncated; not PyTorch's; a pickle of objects; not a bundle; of a newer version;
            its factory is not allowed; its weights don't fit.
    """
    content = _read(Path(path))
    kwargs = content["kwargs"]
    try:
        build = factory or find_factory(content["factory"], kwargs)
        model = _fill(build, kwargs, content["state"])
    except MicronetError as error:
        raise MicronetError(f"{path}: {error}") from error
    return Bundle(
        model=model.eval(),
        factory=content["factory"],
        kwargs=kwargs,
        classes=tuple(content["classes"]),
        input_size=tuple(content["input_size"]),
        mean=tuple(content["mean"]),
        std=tuple(content["std"]),
        history=content["history"],
        provenance=content["provenance"],
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        what = "is a folder; name the model.pth in it" if path.is_dir() else "no such file"
        raise MicronetError(f"{path}: {what}")
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            start = file.read(4)
        if start.startswith(b"PK"):
            raise MicronetError(
                f"{path}: truncated (it begins like a model file and has no end); copy or make it again"
            )
        raise MicronetError(f"{path}: not a model file of micronet (model.pth); it begins with {start!r}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise MicronetError(
            f"{path}: holds pickled objects, which can run code when read, and was refused; "
            f"save it again from its own program as a bundle ({reason[:120]})"
        ) from error
    except Exception as error:  # on damaged bytes the restricted unpickler fails with whatever comes
        reason = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise MicronetError(f"{path}: damaged: {reason}; copy or make it again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise MicronetError(f"{path}: a PyTorch file, but not a bundle of micronet's ({_outline(content)})")
    if not isinstance(content.get("version"), int) or content["version"] > VERSION:
        raise MicronetError(
            f"{path}: format version {content.get('version')}, this micronet reads up to {VERSION}: update micronet"
        )
    _check_fields(content, path)
    return content


def _check_fields(content: dict[str, Any], path: Path) -> None:
    kinds = {
        "factory": str,
        "kwargs": dict,
        "state": dict,
        "classes": list,
        "input_size": list,
        "mean": list,
        "std": list,
    }
    for name, kind in (kinds | {"history": list, "provenance": dict}).items():
        if not isinstance(content.get(name), kind):
            raise MicronetError(f"{path}: damaged: its {name} is not a {kind.__name__}; make it again")
    if not _is_plain(content["kwargs"]) or not all(isinstance(value, Tensor) for value in content["state"].values()):
        raise MicronetError(f"{path}: damaged: its arguments or weights are of the wrong kind; make it again")


def _outline(content: Any) -> str:
    if isinstance(content, dict):
        return "keys " + ", ".join(repr(str(key)[:40]) for key in list(content)[:4])
    return f"a {type(content).__name__}"


def _fill(build: Callable[..., nn.Module], kwargs: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """Build a network and put the weights in; the caller's random numbers are not drawn from."""
    try:
        inspect.signature(build).bind(**kwargs)
        _check_shapes(_shapes(build, kwargs), state)
        with torch.random.fork_rng(devices=[]):
            model = build(**kwargs)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise MicronetError(f"its network can't be built: {(str(error) or repr(error)).splitlines()[0]}") from error
    _check_shapes({name: value.shape for name, value in model.state_dict().items()}, state)
    model.load_state_dict(state)
    return model


def _shapes(build: Callable[..., nn.Module], kwargs: dict[str, Any]) -> dict[str, torch.Size] | None:
    """Shapes of the weights, without memory for them: a hostile file's width of 10^9 must not be allocated."""
    try:
        with torch.device("meta"):
            return {name: value.shape for name, value in build(**kwargs).state_dict().items()}
    except (RuntimeError, NotImplementedError):  # some networks (torchvision's RegNet) compute with their weights
        return None


def _check_shapes(wanted: Mapping[str, torch.Size] | None, state: Mapping[str, Tensor]) -> None:
    if wanted is None:
        return
    missing, surplus = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    shaped = [name for name in wanted if name in state and wanted[name] != state[name].shape]
    if missing or surplus or shaped:
        raise MicronetError(
            f"its weights don't fit its network ({len(missing)} missing, {len(surplus)} surplus, "
            f"{len(shaped)} of another shape, such as {(missing + surplus + shaped)[0]})"
        )
