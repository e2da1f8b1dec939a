"""A bundle in the form that is deployed, with what a file of it must hold: each array of the ledger, and nothing else.

The form is a network, too, so that it can be run, compared and loaded: every BatchNorm is folded that can be, any other
is one factor and one summand for each channel, masked weights are zero, and so is what it does not read for an answer.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from callbacks.affine import ChannelAffine, as_affine
from callbacks.fake_quantize import quantised_layers
from callbacks.fold import fold_norms
from callbacks.fold_plan import plan_folds
from callbacks.graph import Graph
from callbacks.ledger import Array, Ledger, build
from callbacks.liveness import fold_constants, needed
from callbacks.op_trace import trace
from micronet.bundle import Bundle
from micronet.errors import MicronetError, first_line

SHOWN = 3  # names that a message gives


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """A network as it is deployed.

    Args:
        bundle: the network, its edits those of the bundle that it was made from and what deploying it changed.
        ledger: what it computes and stores.
        arrays: by the name of each of the ledger's arrays, the name of its tensor in the state dict.
        tied: by each other name that one of these tensors goes by, its name in `arrays`.
        unread: names of the tensors that it does not read for an answer; they are zero.
    """

    bundle: Bundle
    ledger: Ledger
    arrays: dict[str, str]
    tied: dict[str, str]
    unread: tuple[str, ...]

    def stored(self) -> list[tuple[str, Array]]:
        """Each array with the name of its tensor in the state dict."""
        return [(self.arrays[array.name], array) for array in self.ledger.arrays]


def deploy(bundle: Bundle) -> Deployed:
    """Bring a bundle to the form that is deployed.

    Args:
        bundle: it stays as it is.

    Raises:
        MicronetError: it can't be traced; a mask would be lost; what the ledger lists are not tensors of the network
            but calculated from them, or folded in a way that is not done here.
    """
    model = copy.deepcopy(bundle.model).to("cpu", torch.float32, memory_format=torch.contiguous_format).eval()
    try:
        graph = trace(model, bundle.input_size, masks=bundle.masks)
        plan = plan_folds(model, graph)
        before = build(graph, allow_unknown=True)
        edits = list(bundle.edits)
        fold_norms(model, plan.layers)
        if plan.layers:
            edits.append({"edit": "fold_bn", "layers": {name: list(norms) for name, norms in plan.layers.items()}})
        left = [name for name in plan.stays if not isinstance(_module(model, name), ChannelAffine)]
        as_affine(model, left)
        if left:
            edits.append({"edit": "channel_affine", "layers": left})
        for layer in quantised_layers(model).values():
            layer.freeze()
        masks = _mask(model, bundle.masks)
        graph = trace(model, bundle.input_size, masks=masks)
        after = build(graph, allow_unknown=True)
    except ValueError as error:
        raise MicronetError(f"it can't be brought to the form that is deployed: {first_line(error)}") from error
    _require_same_cost(before, after)
    form = _Form(model, graph, after)
    _zero(form.unread)
    masks = {name: mask for name, mask in masks.items() if name not in form.unread}
    return Deployed(
        bundle=replace(bundle, model=model, edits=edits, masks=masks),
        ledger=after,
        arrays=form.arrays,
        tied=form.tied,
        unread=tuple(form.unread),
    )


def _module(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules(remove_duplicate=False)).get(name)


@torch.no_grad()
def _mask(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Set to zero what is masked; give the masks, each under its parameter's first name."""
    parameters, found = dict(model.named_parameters(remove_duplicate=False)), {}
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"{name} has a mask, and is folded into the layer before it: the mask would be lost")
        parameters[name].masked_fill_(~mask, 0)  # -0.0 is a masked weight, too, and a file has no bit for its sign
        found[first[id(parameters[name])]] = mask.cpu()
    return found


@torch.no_grad()
def _zero(tensors: Mapping[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor.zero_()


def _require_same_cost(before: Ledger, after: Ledger) -> None:
    """The ledger counts a network as if it were deployed: one that is costs the same."""
    costs = [
        (
            sorted(array.stored(array.bits)[0] for array in ledger.arrays),
            sum(line.mults for line in ledger.lines),
            sum(line.adds for line in ledger.lines),
        )
        for ledger in (before, after)
    ]
    if costs[0] != costs[1]:
        raise MicronetError(
            "deployed, the network stores or computes other things than the ledger says it would: a forward reads its "
            "layers in a way that is not followed; `micronet export` makes an ONNX file of it"
        )


class _Form:
    """Which tensors of a network the ledger's arrays are."""

    def __init__(self, model: nn.Module, graph: Graph, ledger: Ledger) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.state = model.state_dict(keep_vars=True)
        self.own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self.own |= dict(model.named_buffers(remove_duplicate=False))
        self.names: dict[int, str] = {}  # of each tensor, the first in the state dict
        for name, tensor in self.state.items():
            self.names.setdefault(id(tensor), name)
        self.arrays = {array.name: self.tensor(array) for array in ledger.arrays}
        stored = set(self.arrays.values())
        if len(stored) < len(self.arrays):
            raise MicronetError("different things are folded into one tensor's uses; `micronet export` can store that")
        self.require_all(graph, stored)
        first = {name: self.names[id(tensor)] for name, tensor in self.state.items()}
        self.tied = {name: other for name, other in first.items() if name != other and other in stored}
        self.unread = {name: self.state[name] for name, other in first.items() if other not in stored}

    def tensor(self, array: Array) -> str:
        """The name of an array's tensor in the state dict."""
        module, _, part = array.name.rpartition(".")
        affine = self.modules.get(module)
        if array.role in ("scale", "shift") and isinstance(affine, ChannelAffine):
            return self.names[id(affine.weight if part == "scale" else affine.bias)]
        tensor = self.own.get(array.name)
        if tensor is None or id(tensor) not in self.names or tuple(tensor.shape) != array.shape:
            raise MicronetError(
                f"{array.name} is not a tensor of the network's state but calculated from what it holds: this can't be "
                "packed; `micronet export` makes an ONNX file of it"
            )
        if tensor.dtype is not torch.float32:
            raise MicronetError(f"{array.name} is {tensor.dtype}: only numbers of float32 can be packed")
        name = self.names[id(tensor)]
        if array.role != "weight" and array.masked:
            raise MicronetError(f"{name} has a mask, and is no weight of a layer: its mask could not be packed")
        return name

    def require_all(self, graph: Graph, stored: set[str]) -> None:
        """Nothing that an answer depends on may be missing."""
        affine = {f"{name}." for name, module in self.modules.items() if isinstance(module, ChannelAffine)}
        read = {
            name
            for node in needed(fold_constants(graph), graph.outputs)
            for value in [*node.inputs, *node.attrs.get("extra", ())]
            if value is not None and value.fixed
            for name in value.names
        }
        missing = sorted(
            name
            for name in read
            if self.names.get(id(self.own.get(name))) not in stored
            and not any(name == f"{start}running_{what}" for start in affine for what in ("mean", "var"))
        )
        if missing:
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            raise MicronetError(
                f"the ledger counts {', '.join(missing[:SHOWN])}{more} as folded into the layer before, which is not "
                "done here: this can't be packed; `micronet export` makes an ONNX file of it"
            )
