"""What can be scored: modules, bundles, ONNX files, named untrained networks, plain state dicts, trusted pickles."""

import ast
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from callbacks.ledger import Ledger, UnknownOperation, build
from micronet.errors import MicronetError, first_line

if TYPE_CHECKING:
    from torch import nn

    from callbacks.graph import Graph
    from micronet.bundle import Bundle

DEFAULT_SIZE = (3, 32, 32)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that was opened, with all that is known of it.

    Args:
        name: What to call it.
        input_size: **Shape** of one image, `(C, H, W)`; one for each input where there are several.
        module: The network; None for an ONNX file.
        path: The ONNX file; None for a module.
        masks: The mask of each masked parameter; None where nothing declares which zeros are meant.
        classes: Class names in the order of the logits; empty where the file does not say.
        mean: What to subtract from each channel of an image scaled to [0, 1]; None where the file does not say.
        std: What to divide each channel by after that; None likewise.
        provenance: Recipe, options, seed, versions, git state; empty where the file does not say.
        float_bits: Width at which its numbers are stored that are no codes: 16 in a packed file of 16-bit floats.
    """

    name: str
    input_size: tuple[Any, ...] | None
    module: "nn.Module | None" = None
    path: Path | None = None
    masks: Mapping[str, Any] | None = None
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    float_bits: int = 32

    def graph(self) -> "Graph":
        """Read the network as a graph.

        Raises:
            MicronetError: It cannot be read with such an image.
        """
        if self.path is not None:
            from micronet.onnx_cost import read_onnx

            return read_onnx(self.path, self.input_size)
        from callbacks.op_trace import trace

        try:
            return trace(self.module, self.input_size or DEFAULT_SIZE, masks=self.masks)
        except ValueError as error:  # TraceError, or an input size that is none
            raise MicronetError(f"{self.name}: {first_line(error)}") from error

    def ledger(self, *, allow_unknown: bool = False) -> Ledger:
        """Count what it computes and stores.

        Args:
            allow_unknown: Whether operations without a rule are listed as uncounted, not refused.

        Raises:
            MicronetError: It cannot be read, or runs an operation without a rule.
        """
        try:
            found = build(self.graph(), allow_unknown=allow_unknown)
        except UnknownOperation as error:
            raise MicronetError(f"{self.name}: {error}; --allow-unknown lists them as uncounted") from error
        return found if self.float_bits == 32 else _at_width(found, self.float_bits)


def _at_width(ledger: Ledger, bits: int) -> Ledger:
    """A ledger whose numbers of 32 bits are stored at another width; what is computed with them is not narrower."""
    arrays = (replace(array, bits=bits) if array.bits == 32 else array for array in ledger.arrays)
    lines = (replace(line, weight_bits=bits) if line.weight_bits == 32 else line for line in ledger.lines)
    return replace(ledger, arrays=tuple(arrays), lines=tuple(lines))


def open_model(
    model: "nn.Module | str | PathLike[str]",
    *,
    input_size: Sequence[Any] | None = None,
    masks: Mapping[str, Any] | None = None,
    factory: Any = None,
    arch: str | None = None,
    trust: bool = False,
) -> ModelSource:
    """Open whatever a model comes as.

    Args:
        model: A module; the path of a `model.pth`, a packed file, an ONNX file, a state dict or a pickle; `timm:NAME`
            or `torchvision:NAME`.
        input_size: **Shape** of one image, `(C, H, W)`; None takes what the model says of itself.
        masks: For a module: the mask of each masked parameter.
        factory: Builds a bundle's network instead of the function that the file names.
        arch: Builds a state dict's network: `timm:NAME`, `torchvision:NAME` or `micronet:NAME`, with arguments after
            commas (`micronet:wide_resnet,depth=22,width=6,num_classes=100`).
        trust: Whether a pickle may be read, which runs whatever code it holds.

    Raises:
        MicronetError: No such model, or not of a kind that can be read this way.
    """
    size = tuple(input_size) if input_size is not None else None
    if not isinstance(model, str | PathLike):
        from callbacks.torch_masks import unmasked

        module, masks = unmasked(model, masks)
        return ModelSource(name=type(model).__name__, input_size=size or DEFAULT_SIZE, module=module, masks=masks)
    name = fspath(model)
    if name.partition(":")[0] in ("timm", "torchvision", "micronet"):
        if arch or trust:
            raise MicronetError(f"{name}: is no file: --arch and --trust say how to read one")
        module, own = build_named(name)
        return ModelSource(name=name, input_size=size or own, module=module, masks={})
    if name.lower().endswith(".onnx"):
        return of_onnx(name, size)
    if arch is not None:
        module, own = build_named(arch, with_weights=True)
        return _state_dict(Path(name), module, size or own)
    from micronet.bundle import is_bundle, load
    from micronet.unpack import is_packed, read

    if is_packed(name):
        packed = read(name, factory=factory)
        return replace(of_bundle(packed.bundle, name, size), float_bits=packed.float_bits)
    if trust and not is_bundle(name):
        return _pickled(Path(name), size)
    return of_bundle(load(model, factory=factory), name, size)


def of_bundle(bundle: "Bundle", name: str, input_size: tuple[Any, ...] | None = None) -> ModelSource:
    """A bundle as a source; its masks declare which zeros are meant."""
    return ModelSource(
        name=name,
        input_size=input_size or bundle.input_size,
        module=bundle.model,
        masks=bundle.masks,
        classes=bundle.classes,
        mean=bundle.mean,
        std=bundle.std,
        provenance=bundle.provenance,
    )


def of_onnx(name: str, input_size: tuple[Any, ...] | None = None) -> ModelSource:
    """An ONNX file as a source, with what it says of itself where it is one of ours."""
    from micronet.onnx_meta import read_meta

    meta = read_meta(name)
    if meta is None:
        return ModelSource(name=name, input_size=input_size, path=Path(name))
    return ModelSource(
        name=name,
        input_size=input_size,
        path=Path(name),
        classes=meta.classes,
        mean=meta.input_mean,
        std=meta.input_std,
        provenance=meta.provenance,
    )


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


def _torch_load(path: Path, *, weights_only: bool) -> Any:
    import torch

    if not path.is_file():
        raise MicronetError(f"{path}: {'is a folder; name a file in it' if path.is_dir() else 'no such file'}")
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    except Exception as error:  # damaged bytes fail in any way, and so does what a pickle runs
        raise MicronetError(f"{path}: not a PyTorch file that can be read: {first_line(error)[:160]}") from error


def _state_dict(path: Path, module: "nn.Module", size: tuple[int, ...]) -> ModelSource:
    """Fill a network with a plain state dict; two libraries' wrappers prefix its names, torch's pruning has masks."""
    import torch

    from callbacks.torch_masks import take_masks_of_state

    content = _torch_load(path, weights_only=True)
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise MicronetError(f"{path}: not a state dict (a dict of tensors)")
    state = {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in content.items()}
    state, masks = take_masks_of_state(state)
    try:
        module.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, TypeError) as error:
        lines = str(error).strip().splitlines()
        raise MicronetError(
            f"{path}: its weights don't fit --arch: {' '.join(lines[1:2] or lines).strip()[:200]}"
        ) from error
    return ModelSource(name=str(path), input_size=size, module=module.eval(), masks=masks or None)


def _pickled(path: Path, size: tuple[int, ...] | None) -> ModelSource:
    """Read a whole pickled module, or a fastai Learner; the caller has said that its code may run."""
    import torch

    from callbacks.torch_masks import unmasked

    found = _torch_load(path, weights_only=False)
    module = getattr(found, "model", found)
    if not isinstance(module, torch.nn.Module):
        raise MicronetError(f"{path}: holds a {type(found).__name__}, neither a module nor a fastai Learner")
    if size is None:
        raise MicronetError(f"{path}: does not say how large its images are: give --input-size, such as 3x224x224")
    module, masks = unmasked(module.eval(), None)
    return ModelSource(name=str(path), input_size=size, module=module, masks=masks)
