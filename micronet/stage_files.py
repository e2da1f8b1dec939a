"""What a stage leaves in its folder beside its network: measured rows, plots, an ONNX file; each read from its file."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from micronet.bundle import Bundle
from micronet.curves import plot_rounds, rounds_of
from micronet.data import Data, ImageSet, plain_loader
from micronet.errors import MicronetError
from micronet.evaluate import evaluate
from micronet.learner import FitResult
from micronet.recipe import Fit
from micronet.report import plot_curves, plot_rates, write_csv
from micronet.score import Score, score
from micronet.start import some_images

if TYPE_CHECKING:
    from callbacks.protocol import OnnxFile

COSTS = ("storage", "mults", "adds", "macs", "ops", "score")


def check_reload(made: Bundle, loaded: Bundle, data: Data, file: Path) -> None:
    """Refuse a file that does not hold the network that was trained, and remove it.

    Args:
        made: what was written.
        loaded: what was read again.
        data: the image sets.
        file: the file.

    Raises:
        MicronetError: the two answer otherwise.
    """
    images = some_images(data, 32)
    with torch.no_grad():
        same = torch.equal(made.model.eval()(images), loaded.model(images))
    if not same:
        file.unlink()
        raise MicronetError(
            f"{file}: read again, the network answers otherwise than the one that was trained: its forward depends on "
            "something that no file holds (a hook, an attribute); the file was removed"
        )


def measured(bundle: Bundle, data: Data, device: Any, *, test: bool) -> dict[str, Any]:
    """The numbers of a network: what it answers on valid, and on test where asked; what it costs.

    Args:
        bundle: the network, read from its file.
        data: the image sets.
        device: where to compute.
        test: whether this is the run's end.
    """
    cost = score(bundle.model, input_size=bundle.input_size, masks=bundle.masks)
    # Parameters as they are trained; storage as they are deployed.
    return _answers(bundle.model, data, device, test) | {"params": cost.ledger.params} | _costs(cost)


def keep_onnx(made: "OnnxFile", bundle: Bundle, data: Data, place: Path, *, test: bool) -> dict[str, Any]:
    """Write the ONNX graph that a callback made of a stage's network, through the gate, and measure the file.

    Args:
        made: the graph.
        bundle: the network that it was made of.
        data: the image sets.
        place: the stage's folder.
        test: whether this is the run's end.

    Raises:
        MicronetError: it is not sound, does not run, or answers otherwise than the network: no file is kept.
    """
    import onnx

    from micronet.deploy import described, keep
    from micronet.gate_images import validation
    from micronet.measure import OnnxModule
    from micronet.model_source import of_bundle
    from micronet.parity import MOST_LOST, least_agreement

    file = place / made.name
    seen = replace(data, mean=bundle.mean, std=bundle.std)
    meta = described(of_bundle(bundle, made.name), seen, made={"made": made.how})
    proto, images = onnx.load_from_string(made.content), validation(data)
    most = MOST_LOST if made.floor is None else made.floor
    by = ("floor of the callback",) * 2
    least, source = least_agreement(most), bundle.model.eval()
    keep(proto, file, source=source, images=images, meta=meta, floor=least, tolerance=None, most_lost=most, options=by)
    found = {"file": made.name, "file_bytes": file.stat().st_size}
    return found | _answers(OnnxModule(file), data, "cpu", test) | _costs(score(file))


def draw(fit: Fit, result: FitResult, data: Data, images: int, place: Path, title: str) -> None:
    """Write a stage's history and its plots.

    Args:
        fit: the stage.
        result: of its fit.
        data: the image sets.
        images: how many of them there are in valid.
        place: the stage's folder.
        title: of the plots.
    """
    if not result.rows:
        return
    write_csv(result.rows, place / "history.csv")
    plot_curves(result.rows, place / "curves.png", title, _training(fit, data, result))
    plot_rates(result.lrs, place / "lr.png", title)
    if len({epoch.get("params") for epoch in result.rows}) > 1:
        plot_rounds({fit.name: rounds_of(result.rows, images)}, place / "rounds.png", title)


def _answers(model: nn.Module, data: Data, device: Any, test: bool) -> dict[str, Any]:
    def on(images: ImageSet) -> Mapping[str, Any]:
        return evaluate(model, plain_loader(images, data, device=device), device).row()

    found = {"valid": on(data.valid), "valid_is_test": data.valid_is_test}
    return found | ({"test": on(data.test)} if test and data.test is not None else {})


def _costs(cost: Score) -> dict[str, Any]:
    return {"rules": cost.rules.name} | {name: getattr(cost, name) for name in COSTS}


def _training(fit: Fit, data: Data, result: FitResult) -> str:
    """What a fit's training loss is of, in a few words: as a rule more than the cross-entropy of plain images."""
    changes = [*result.loss, *(["smoothed labels"] if fit.label_smoothing else [])]
    changes += ["augmented images"] if data.augment else []
    return f"training loss ({', '.join(changes)})" if changes else "training loss"
