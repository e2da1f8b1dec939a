"""Factories: the functions that build networks, named so that a file can hold the name and be trusted with it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from micronet.errors import MicronetError
from micronet.names import current, name_of

# Arguments of torchvision and timm that fetch weights from elsewhere, or say how: a bundle has its own.
_FETCH = frozenset(
    (
        "weights",
        "weights_backbone",
        "progress",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
        "cache_dir",
    )
)


def innermost(build: Callable[..., Any]) -> Callable[..., Any]:
    """The function behind any number of partials."""
    while isinstance(build, partial):
        build = build.func
    return build


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
    fetches = _FETCH if build.__module__.partition(".")[0] in ("torchvision", "timm") else frozenset()
    kept = {key: value for key, value in kwargs.items() if key not in fetches}
    for key, value in kept.items():
        if not is_plain(value):
            raise MicronetError(f"model: argument {key} of {name} must be numbers and text to be stored, got {value!r}")
    return name_of(build), kept


def is_plain(value: Any) -> bool:
    """Whether a value is made of numbers, text, None, and lists and dicts of these."""
    if isinstance(value, (list, tuple)):
        return all(is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
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
    module, _, attribute = current(name).partition(":")
    package = module.partition(".")[0]
    if bad := sorted(_FETCH & set(kwargs)):
        raise MicronetError(f"the file's arguments for {name} would fetch something: {', '.join(bad)}; refused")
    if package == "micronet":
        import micronet.models as networks

        if module != networks.__name__ or attribute not in networks.__all__:
            raise refused
        return getattr(networks, attribute)
    if package == "torchvision":
        import torchvision
        from torchvision.models import get_model_builder, list_models

        # Its own module holds the classifiers; those below it, such as detectors, fetch a backbone when built.
        if attribute not in list_models(module=torchvision.models) or get_model_builder(attribute).__module__ != module:
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
    if attribute != "create_model" and "model_name" in kwargs:
        raise refused  # it would take the place of the name that is looked at here
    model = kwargs.get("model_name") if attribute == "create_model" else attribute
    # A name outside the list can be a path or a hub's address.
    if not isinstance(model, str) or not timm.is_model(model) or ":" in model or "/" in model:
        raise refused
    build = partial(timm.create_model, pretrained=False)
    return build if attribute == "create_model" else partial(build, model_name=model)
