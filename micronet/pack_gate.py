"""Whether a packed network still is the one that was packed: its answers, and each link where it is quantised.

Answers alone say little of quantised layers: what float32 leaves open tips a code now and then, and at 4 bits one that
tips moves the logits by a tenth, as a fault does. So each quantised layer is given what it gets in the network that was
packed. Then no tip goes anywhere, and what it would have got, and the logits, must be as near as those of floats are.
The codes of the weights must be the same ones, but for the sign of an output, which a folded BatchNorm can turn round.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from callbacks.fake_quantize import Quantised, quantised_layers
from micronet.bundle import Bundle
from micronet.errors import MicronetError
from micronet.parity import relative_errors

PROBES = 12  # images of noise that the networks are asked about
# Largest relative error beside the network that was packed, at 32 and 16 bits: float32 rounds to 1e-7 and float16 to
# 5e-4, and 100 layers add up.
MOST_APART = {32: 1e-4, 16: 0.01}


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
        MicronetError: other codes, step sizes or answers.
    """
    model, images = copy.deepcopy(source.model).to("cpu", torch.float32).eval(), noise(source)
    before, after = quantised_layers(model), quantised_layers(found.model)
    if list(before) != list(after):
        raise MicronetError("other layers are quantised than in the network that was packed: nothing was kept")
    for name, layer in before.items():
        if not _same_codes(layer.codes().flatten(1), after[name].codes().flatten(1)):
            raise MicronetError(f"the codes of {name} are not those of the network that was packed: nothing was kept")
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


def _same_codes(before: Tensor, after: Tensor) -> bool:
    """Whether codes `(out, each)` are the same but for the signs of rows; a row whose factor was 0 is 0."""
    return before.shape == after.shape and all(
        bool((row == was).all() or (row == -was).all() or not row.any())
        for was, row in zip(before.short(), after.short(), strict=True)
    )


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
