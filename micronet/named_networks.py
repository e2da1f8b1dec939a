"""Untrained networks by name: timm's, torchvision's and micronet's own."""

import ast
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from micronet.errors import MicronetError, first_line

if TYPE_CHECKING:
    from torch import nn

DEFAULT_SIZE = (3, 32, 32)
LIBRARIES = ("timm", "torchvision", "micronet")  # whose networks have names, `timm:NAME`


def build_named(spec: str, *, with_weights: bool = False) -> "tuple[nn.Module, tuple[int, int, int]]":
    """Build an untrained network by name, without memory for its weights where that is possible.

    Args:
        spec: `timm:NAME`, `torchvision:NAME` or `micronet:NAME`, with arguments after commas.
        with_weights: Whether to give it memory all the same.

    Returns:
        The network, in eval mode; the image size that it is made for, `(C, H, W)`.

    Raises:
        MicronetError: There is no such network, or it does not take such arguments.
    """
    import torch

    package, _, rest = spec.partition(":")
    name, _, arguments = rest.partition(",")
    build = {"timm": _timm, "torchvision": _torchvision, "micronet": _micronet}.get(package)
    if build is None or not name:
        raise MicronetError(f"{spec}: a network is named timm:NAME, torchvision:NAME or micronet:NAME")
    kwargs = _arguments(spec, arguments)
    factory, size = build(spec, name)
    try:
        try:
            with torch.device("cpu" if with_weights else "meta"), torch.random.fork_rng(devices=[]):
                module = factory(**kwargs)
        except (RuntimeError, NotImplementedError):  # it calculates with tensors while it is built
            with _weightless(), torch.random.fork_rng(devices=[]):
                module = factory(**kwargs)
    except Exception as error:  # its own code refuses arguments in any way
        raise MicronetError(f"{spec}: can't be built: {first_line(error)[:200]}") from error
    return module.eval(), size


@contextmanager
def _weightless() -> Iterator[None]:
    """Give parameters no memory from the moment that a module gets them, so that drawing them takes no time.

    For networks that need real tensors while they are built: torchvision's largest RegNet has 645 million parameters,
    and drawing them takes 10 s.
    """
    from torch import nn

    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        empty = None if param is None else nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, empty)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _arguments(spec: str, text: str) -> dict[str, Any]:
    """Read `depth=22,widths=(1,2),block=basic` as keyword arguments: plain values, or words as text."""
    wrong = MicronetError(f"{spec}: arguments are NAME=VALUE with commas between, got {text!r}")
    try:
        call = ast.parse(f"f({text})", mode="eval").body
    except SyntaxError as error:
        raise wrong from error
    if not isinstance(call, ast.Call) or call.args or not all(keyword.arg for keyword in call.keywords):
        raise wrong
    given = {}
    for keyword in call.keywords:
        try:
            given[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:
            given[keyword.arg] = ast.unparse(keyword.value)
    return given


def _timm(spec: str, name: str) -> tuple[Any, tuple[int, int, int]]:
    try:
        import timm
    except ImportError as error:
        raise MicronetError(f"{spec}: needs timm: pip install timm") from error
    if ":" in name or "/" in name or not timm.is_model(name):
        raise MicronetError(f"{spec}: timm has no such network{_near(name, timm.list_models())}")
    config = timm.models.get_pretrained_cfg(name)

    def factory(**kwargs: Any) -> Any:
        return timm.create_model(name, pretrained=False, **kwargs)

    return factory, tuple(config.input_size) if config else (3, 224, 224)


def _torchvision(spec: str, name: str) -> tuple[Any, tuple[int, int, int]]:
    import torchvision
    from torchvision.models import get_model_builder, list_models

    names = list_models(module=torchvision.models)
    if name not in names:
        raise MicronetError(f"{spec}: torchvision has no such classifier{_near(name, names)}")
    builder = get_model_builder(name)

    def factory(**kwargs: Any) -> Any:
        if name in ("googlenet", "inception_v3"):  # which warn that drawing their weights takes long, unless told to
            kwargs = {"init_weights": False} | kwargs
        return builder(weights=None, **kwargs)

    return factory, (3, 299, 299) if name == "inception_v3" else (3, 224, 224)


def _micronet(spec: str, name: str) -> tuple[Any, tuple[int, int, int]]:
    import micronet.models as networks

    if name not in networks.__all__:
        raise MicronetError(f"{spec}: micronet has no such network{_near(name, networks.__all__)}")
    return getattr(networks, name), DEFAULT_SIZE


def _near(name: str, names: Sequence[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, names, n=3)
    return f"; near it: {', '.join(near)}" if near else ""
