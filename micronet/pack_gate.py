"""Whether a packed network still is the one that was packed: its answers, and each link where it is quantised.

Answers alone say little of quantised layers: what float32 leaves open tips a code now and then, and at 4 bits one that
tips moves the logits by a tenth, as a fault does. So each quantised layer is given what it gets in the network that was
packed. Then no tip goes anywhere, and what it would have got, and the logits, must be as near as those of floats are.
Noise does not meet every channel, and one of many says little in a norm. So each output's codes, step size and bias
must be what its factor and summand, of the BatchNorms that fold into it, make of those of the network that was packed.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from callbacks.fake_quantize import LEAST, Quantised, quantised_layers
from callbacks.fold import scale_and_shift
from callbacks.fold_plan import plan_folds
from callbacks.graph import Graph
from callbacks.liveness import fold_constants, needed
from callbacks.op_trace import trace
from micronet.bundle import Bundle
from micronet.errors import MicronetError
from micronet.parity import relative_errors

PROBES = 12  # images of noise that the networks are asked about
# Largest relative error beside the network that was packed, at 32 and 16 bits: float32 rounds to 1e-7 and float16 to
# 5e-4, and 100 layers add up.
MOST_APART = {32: 1e-4, 16: 0.01}
# The same of one step size or bias, which is rounded once, and its absolute error: float16 holds multiples of 6e-8.
MOST_APART_EACH = {32: (1e-5, LEAST), 16: (1e-3, 6e-8)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Likeness:
    """How two forms of a network compare on images of noise.

    Args:
        logits: relative error of the logits of each image, each form left to itself, `(PROBES,)`.
        links: largest relative error of what each quantised layer is given, by its name, and of the logits, by `""`,
            where all of them are given what they get in the first form.
    """

    logits: Tensor
    links: dict[str, float]


@torch.no_grad()
def require_like(found: Bundle, source: Bundle, float_bits: int) -> Likeness:
    """Refuse a deployed network that is not the one that it was made from.

    Args:
        found: the deployed one, on the CPU.
        source: the other; it stays as it is.
        float_bits: width at which the former's numbers were stored, 32 or 16.

    Raises:
        MicronetError: other codes, step sizes, biases or answers.
    """
    model, images = copy.deepcopy(source.model).to("cpu", torch.float32).eval(), noise(source)
    before, after = quantised_layers(model), quantised_layers(found.model)
    if list(before) != list(after):
        raise MicronetError("other layers are quantised than in the network that was packed: nothing was kept")
    if before:
        _require_same_outputs(model, after, source.input_size, float_bits)
    likeness = Likeness(
        logits=relative_errors(*(form(images).double().flatten(1) for form in (model, found.model))),
        links=_links(model, found.model, images),
    )
    worst = max(likeness.links, key=likeness.links.__getitem__)
    error, most = likeness.links[worst], MOST_APART[float_bits]
    if not error <= most:
        what = f"what {worst} is given" if worst else "the logits"
        raise MicronetError(
            f"does not answer as the network that was packed: relative error {error:.2g} of {what} on {PROBES} images "
            f"of noise, at most {most:g} is allowed at {float_bits} bits: nothing was kept"
        )
    return likeness


def noise(bundle: Bundle) -> Tensor:
    """Images of noise as a network takes them, always the same."""
    return torch.randn(PROBES, *bundle.input_size, generator=torch.Generator().manual_seed(0))


def _require_same_outputs(
    model: nn.Module, after: Mapping[str, Quantised], input_size: tuple[int, ...], float_bits: int
) -> None:
    """Refuse quantised layers with an output that is not what the network that was packed makes of it, folded."""
    graph = trace(model, input_size)
    folds = {model.get_submodule(name): norms for name, norms in plan_folds(model, graph).layers.items()}
    read = _read(model, graph)
    relative, absolute = MOST_APART_EACH[float_bits]
    for name, layer in quantised_layers(model).items():
        if id(layer.weight) not in read:
            continue  # deployed, it is zeros
        wanted = _folded(layer, [model.get_submodule(norm) for norm in folds.get(layer, ())])
        for (what, right), found in zip(wanted.items(), _outputs(after[name]).values(), strict=True):
            if found.shape != right.shape or not torch.allclose(found, right, rtol=relative, atol=absolute):
                raise MicronetError(
                    f"the {what} of {name} are not those of the network that was packed: nothing was kept"
                )


def _read(model: nn.Module, graph: Graph) -> set[int]:
    """The `id` of each parameter that an answer depends on."""
    own = dict(model.named_parameters(remove_duplicate=False))
    nodes = needed(fold_constants(graph), graph.outputs)
    values = [value for node in nodes for value in node.inputs if value is not None and value.fixed]
    return {id(own[name]) for value in values for name in value.names if name in own}


def _outputs(layer: Quantised) -> dict[str, Tensor]:
    """What the outputs of a layer are computed with, in float64: codes `(out, each)`, the others `(out,)`."""
    codes = layer.codes().flatten(1).double()
    steps = layer.weight_scale.double().abs().clamp_min(LEAST) * codes.any(1)  # that of zeros says nothing
    bias = torch.zeros_like(steps) if layer.bias is None else layer.bias.double()
    return {"codes": codes, "step sizes": steps, "biases": bias}


def _folded(layer: Quantised, norms: list[nn.Module]) -> dict[str, Tensor]:
    """The same with BatchNorms taken in: a factor's sign goes to the codes, its size to the step size."""
    codes, steps, bias = _outputs(layer).values()
    scale, shift = scale_and_shift(norms) if norms else (torch.ones_like(steps), torch.zeros_like(steps))
    scale, shift = (value.repeat_interleave(len(steps) // len(value)) for value in (scale, shift))
    steps = steps * scale.abs()
    held = steps >= LEAST  # a step that float32 can't hold makes zeros
    signs = scale.sign() * held
    return {"codes": codes * signs[:, None], "step sizes": steps * held, "biases": bias * scale + shift}


def _links(model: nn.Module, found: nn.Module, images: Tensor) -> dict[str, float]:
    """Errors as `Likeness` has them."""
    layers, given, errors = quantised_layers(model), {}, {}
    with ExitStack() as stack:
        for name, layer in layers.items():
            given[name] = []
            stack.enter_context(layer.register_forward_pre_hook(_recording(given[name])))
        wanted = model(images)
    with ExitStack() as stack:
        for name, layer in quantised_layers(found).items():
            errors[name] = []
            hook = _replacing(
                iter(given[name]), errors[name], float(layer.act_scale.abs() / layers[name].act_scale.abs())
            )
            stack.enter_context(layer.register_forward_pre_hook(hook))
        errors[""] = [_largest(wanted, found(images))]
    return {name: max(each, default=0.0) for name, each in errors.items()}


def _recording(given: list[Tensor]) -> Any:
    def record(layer: Quantised, args: tuple[Tensor, ...]) -> None:
        given.append(args[0].clone())

    return record


def _replacing(given: Iterator[Tensor], errors: list[float], steps: float) -> Any:
    """A hook that gives a layer what another got, in as many of its own steps."""

    def replace(layer: Quantised, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        wanted = next(given, torch.full_like(args[0], torch.nan))  # run oftener than the other was
        errors.append(max(_largest(wanted, args[0]), abs(steps - 1)))
        return (wanted * steps,)

    return replace


def _largest(wanted: Tensor, found: Tensor) -> float:
    return float(relative_errors(wanted.double().flatten(1), found.double().flatten(1)).max())
