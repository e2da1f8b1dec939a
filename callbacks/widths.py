"""Channel widths: read them off a network, give a network others, and take channels away with all that goes along.

A network without channels is the same modules, narrower. `widths` reads the table of every layer that has tensors of
its own, `set_widths` makes a network of the same modules as narrow as a table says: a file or a checkpoint holds the
table, and rebuilds a pruned network without unpickling any. `narrow` takes elements away from a network and from
everything that has a number for each weight: the optimizer's momentum, and what other callbacks keep (`resized`).

A layer of a kind that is not listed here is refused where its tensors would have to change: its forward may depend on
more than their shapes.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from callbacks.modules import tensors

Widths = dict[str, dict[str, int]]


Shapes = dict[str, tuple[int, ...]]


def _conv(m: _ConvNd, w: Mapping[str, int]) -> Shapes:
    first, second = ("in_channels", "out_channels") if m.transposed else ("out_channels", "in_channels")
    weight = (w[first], w[second] // w["groups"], *m.kernel_size)
    # A quantised layer has a step size for each output, too.
    return {"weight": weight} | dict.fromkeys(("bias", "weight_scale"), (w["out_channels"],))


def _linear(m: nn.Linear, w: Mapping[str, int]) -> Shapes:
    weight = (w["out_features"], w["in_features"])
    return {"weight": weight} | dict.fromkeys(("bias", "weight_scale"), (w["out_features"],))


def _channels(m: nn.Module, w: Mapping[str, int]) -> Shapes:
    number = next(iter(w.values()))
    return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (number,))


# For each kind: the attributes that hold its widths, and the shapes of its tensors by these.
_KINDS: tuple[tuple[type[nn.Module], tuple[str, ...], Callable[[Any, Mapping[str, int]], Shapes]], ...] = (
    (_ConvNd, ("in_channels", "out_channels", "groups"), _conv),
    (nn.Linear, ("in_features", "out_features"), _linear),
    (_NormBase, ("num_features",), _channels),
    (nn.GroupNorm, ("num_channels", "num_groups"), _channels),
    (nn.PReLU, ("num_parameters",), _channels),
)


def _kind(module: nn.Module) -> tuple[tuple[str, ...], Callable[[Any, Mapping[str, int]], Shapes]] | None:
    return next(((names, shapes) for cls, names, shapes in _KINDS if isinstance(module, cls)), None)


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own tensors that have a number for each channel or weight."""
    for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if value.dim():  # a count of batches has none
            yield name, value


def widths(model: nn.Module) -> Widths:
    """Read the widths of all layers.

    Args:
        model: the network; a layer that it has at several places is named by the first.

    Returns:
        For each layer of a known kind that has tensors, by its name: `in_channels`, `out_channels` and `groups`, or
        `in_features` and `out_features`, or `num_features`, or `num_channels` and `num_groups`, or `num_parameters`.
    """
    table = {}
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind is not None:
            table[name] = {attribute: int(getattr(module, attribute)) for attribute in kind[0]}
    return table


def shapes_at(model: nn.Module, table: Mapping[str, Mapping[str, int]]) -> dict[str, tuple[int, ...]]:
    """The shapes that tensors get when layers are as wide as a table says.

    Args:
        model: the network, which stays as it is.
        table: widths by the layer's name, as `widths` gives them.

    Returns:
        The shape of each tensor of the layers named, by its name in the state dict.

    Raises:
        ValueError: the network has no such layer, or one of another kind; or a width makes no sense.
    """
    modules, found = dict(model.named_modules()), {}
    for name, wanted in table.items():
        kind = _kind(modules[name]) if name in modules else None
        if kind is None or set(wanted) != set(kind[0]):
            raise ValueError(f"there is no layer {name!r} with {', '.join(map(str, wanted))}")
        if any(type(width) is not int or width < 1 for width in wanted.values()):
            raise ValueError(f"{name}: widths must be whole numbers from 1, got {dict(wanted)}")
        groups = wanted.get("groups", 1)
        if wanted.get("in_channels", 0) % groups or wanted.get("out_channels", 0) % groups:
            raise ValueError(f"{name}: channels must be a multiple of its groups, got {dict(wanted)}")
        right = kind[1](modules[name], wanted)
        for key, _ in _own(modules[name]):
            if key not in right:
                kind_name = type(modules[name]).__name__
                raise ValueError(f"{name}: a {kind_name} with a tensor {key!r} of its own can't be resized")
            found[f"{name}.{key}" if name else key] = right[key]
    return found


def set_widths(model: nn.Module, table: Mapping[str, Mapping[str, int]]) -> None:
    """Make layers as wide as a table says; tensors whose shape changes are zeros afterwards, to be loaded.

    Args:
        model: the network, changed in place; its parameters stay the same objects.
        table: widths by the layer's name, as `widths` gives them; layers that it does not name stay as they are.

    Raises:
        ValueError: as `shapes_at`; the network is unchanged.
    """
    shapes, modules = shapes_at(model, table), dict(model.named_modules())
    for name, wanted in table.items():
        for attribute, width in wanted.items():
            setattr(modules[name], attribute, width)
    for name, value in tensors(model).items():
        if name in shapes and tuple(value.shape) != shapes[name]:
            _put(value, value.data.new_zeros(shapes[name]))


def _put(value: Tensor, new: Tensor) -> None:
    """Give a parameter or buffer other content, of any shape."""
    value.grad = None
    # As long as anything holds a loss, the node that adds up a parameter's gradient lives on and expects the old shape.
    # torch makes it anew where the type changes, not where the shape does; so the type changes for a moment.
    other = torch.float16 if new.dtype != torch.float16 else torch.float32
    value.data = new.new_empty(0, dtype=other)
    value.data = new


def narrower(model: nn.Module, whole: Mapping[str, Mapping[str, int]]) -> Widths:
    """The layers whose widths are not those of another network of the same structure.

    Args:
        model: the network.
        whole: the other network's `widths`.

    Returns:
        The part of `widths(model)` that differs; layers that `whole` does not have are left out.
    """
    return {name: table for name, table in widths(model).items() if name in whole and whole[name] != table}


def narrow(
    model: nn.Module, kept: Mapping[str, Tensor], table: Mapping[str, Mapping[str, int]], opt: Any = None
) -> None:
    """Take elements away from a network's tensors, in place: the parameters stay the same objects.

    Args:
        model: the network.
        kept: for each tensor that changes, by its name in the state dict, the place of each element that stays in the
            old tensor, flattened: int64, of the new **shape**.
        table: the new widths of the layers that change.
        opt: the optimizer; what it keeps for each weight, such as the momentum, is taken along by the same places, and
            so are gradients.

    Raises:
        ValueError: the new tensors are not those of layers of such widths, or of a kind that can't be resized; the
            network is unchanged.
    """
    shapes, own = shapes_at(model, table), tensors(model)
    for name, places in kept.items():
        if name not in shapes:
            owner = dict(model.named_modules()).get(name.rpartition(".")[0])
            raise ValueError(f"{name}: a tensor of a {type(owner).__name__} can't be resized")
        if places.shape != shapes[name]:
            raise ValueError(f"{name}: {tuple(places.shape)} is kept of a layer whose widths make it {shapes[name]}")
    left = [name for name, shape in shapes.items() if name not in kept and own[name].shape != shape]
    if left:
        raise ValueError(f"{left[0]}: it is not said what to keep of it")
    for name in kept:
        for value in kept_of(opt).get(own[name], {}).values():
            if isinstance(value, Tensor) and value.dim() and not for_each_weight(value, own[name]):
                raise ValueError(
                    f"{name}: its optimizer keeps {tuple(value.shape)} numbers for {tuple(own[name].shape)} weights, "
                    "which can't be cut along with them: choose one that keeps one for each, such as SGD or Adam"
                )
    olds = {name: (own[name].data, own[name].grad) for name in kept}
    set_widths(model, table)
    for name, places in kept.items():
        value, (old, grad) = own[name], olds[name]
        _put(value, take(old, places))
        value.grad = None if grad is None else take(grad, places)
        state = kept_of(opt).get(value, {})
        state.update({k: take(v, places) for k, v in state.items() if for_each_weight(v, old)})


def kept_of(opt: Any) -> dict[Tensor, dict[str, Any]]:
    """What an optimizer keeps of each parameter.

    Args:
        opt: a torch optimizer, one of fastai's, or fastai's wrapper around one of torch's; None for none.
    """
    # The wrapper has a state of its own, too, and never fills it.
    return {} if opt is None else getattr(opt, "opt", opt).state


def for_each_weight(value: Any, parameter: Tensor) -> bool:
    """Whether an optimizer keeps a value for each weight of a parameter, as it does the momentum.

    Args:
        value: what it keeps.
        parameter: of any **shape**.
    """
    return isinstance(value, Tensor) and value.shape == parameter.shape


def take(value: Tensor, places: Tensor) -> Tensor:
    """The elements at some places of a flattened tensor, in the memory format of the tensor.

    Args:
        value: any shape.
        places: int64, of the new shape.
    """
    new = value.reshape(-1)[places.to(value.device)]
    last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous()
    return new.contiguous(memory_format=torch.channels_last) if last else new
