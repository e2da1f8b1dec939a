"""`micronet quantize`: parse, call, print."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from micronet.cli_options import (
    DataPlace,
    Factory,
    check_outputs,
    data_of,
    find_users_factory,
    make_console,
    number,
    split_of,
    use_data,
)
from micronet.errors import MicronetError
from micronet.file_kind import require_model

if TYPE_CHECKING:
    from callbacks.layer_noise import Ranking
    from micronet.bundle import Bundle
    from micronet.data import Data
    from micronet.quantised_file import Quantised

_KINDS = {"int8": ".onnx", "float16": ".onnx", "minmax8": ".pth"}
_SHOWN = 5


def quantize(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model.pth.", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Images to calibrate and measure on: digits, cifar10, cifar100, or an image folder. "
            "[default: those that MODEL was trained on]",
        ),
    ] = None,
    to: Annotated[str, typer.Option(help="int8, float16 (both ONNX) or minmax8 (a model.pth).")] = "int8",
    images: Annotated[
        int | None, typer.Option(min=1, help="int8: how many images to calibrate on. [default: 512]")
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(metavar="SPLIT", help="int8: from train (without augmentation) or valid. [default: train]"),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="int8: ranges by minmax, entropy or percentile. [default: minmax]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=10**8, help="int8: which images are drawn. [default: 0]")
    ] = None,
    rank: Annotated[
        bool, typer.Option("--rank", help="int8: which layers bring the noise; what leaving the worst in float does.")
    ] = False,
    keep_float: Annotated[
        str | None,
        typer.Option(metavar="NUMBER|NAMES", help="int8: leave the worst so many layers in float, or these (a,b)."),
    ] = None,
    reduce_range: Annotated[
        bool,
        typer.Option(
            "--reduce-range", help="int8: weights of 7 bits, for CPUs whose 16-bit sums saturate (no VNNI, no AMX)."
        ),
    ] = False,
    compute: Annotated[
        str | None, typer.Option(metavar="float16", help="float16: compute in it, too, where a runtime can.")
    ] = None,
    floor: Annotated[
        float,
        typer.Option(
            min=0,
            callback=number,
            metavar="POINTS",
            help="Most points of top-1 that may be lost on validation images.",
        ),
    ] = 1.0,
    agreement: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            callback=number,
            metavar="SHARE",
            help="Least share of validation images that keep their class. [default: 0.8; less if --floor is above 20]",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The file; replaced. [default: MODEL-int8.onnx, ...]"),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="What was measured, with the images that differ.")
    ] = None,
    factory: Factory = None,
    data_dir: DataPlace = None,
) -> None:
    """Write a network in 8 or 16 bits, and keep the file only where it answers about as well as MODEL does.

    int8 is what onnxruntime computes with integers: weights and what flows between layers, calibrated on training
    images as they are. The float ONNX graph and the file answer all validation images; the test images are not looked
    at. More than a point of top-1 lost, five times what 8 bits usually cost, keeps no file (--floor); nor does another
    class than MODEL's on more than a fifth of the images (--agreement).

    Example: `micronet quantize runs/resnet20_cifar10/model.pth --rank -o resnet20-int8.onnx`
    """
    given = {"images": images, "calibrate": calibrate, "method": method, "seed": seed, "keep_float": keep_float}
    given |= {"rank": rank or None, "reduce_range": reduce_range or None}
    given = {name: value for name, value in given.items() if value is not None}
    _check(to, given, compute)
    target = _target(model, out, to)
    if model.suffix.lower() == ".onnx":
        raise MicronetError(f"{model}: is an ONNX file, quantised or not; give the model.pth that it came from")
    require_model(model, onnx=False)
    check_outputs({"-o": target, "--json": json}, [model, factory, data_dir])
    use_data(data_dir)
    asked = Asked(model, target, to, given, compute, floor, agreement, find_users_factory(factory))
    found, told = _made(asked, data)
    console = make_console()
    for line in [*_lines(found), *told]:
        console.print(line, highlight=False, markup=False)
    if json is not None:
        from json import dumps

        from micronet.report import write_text

        write_text(dumps(found.to_json(), indent=1) + "\n", json)


@dataclass(frozen=True)
class Asked:
    """What the command was asked for; names as of its options."""

    model: Path
    target: Path
    to: str
    int8: dict[str, Any]
    compute: str | None
    floor: float
    agreement: float | None
    build: Any


def _check(to: str, given: dict[str, Any], compute: str | None) -> None:
    """Refuse options that would do nothing, and words that mean nothing."""
    if to not in _KINDS:
        raise typer.BadParameter(f"--to must be one of {', '.join(_KINDS)}, got {to!r}")
    if to != "int8" and given:
        raise typer.BadParameter(f"--{next(iter(given)).replace('_', '-')} is for --to int8")
    if compute is not None and (to != "float16" or compute != "float16"):
        raise typer.BadParameter("--compute float16 is all that it takes, and is for --to float16")
    if given.get("calibrate", "train") not in ("train", "valid"):
        raise typer.BadParameter(f"--calibrate must be train or valid, got {given['calibrate']!r}")
    if given.get("method", "minmax") not in ("minmax", "entropy", "percentile"):
        raise typer.BadParameter(f"--method must be minmax, entropy or percentile, got {given['method']!r}")
    if "keep_float" in given:
        text = given["keep_float"]
        given["keep_float"] = int(text) if text.isdecimal() else tuple(part.strip() for part in text.split(","))


def _target(model: Path, out: Path | None, to: str) -> Path:
    """The file that is to be written."""
    target = out or model.with_name(f"{model.stem}-{to}{_KINDS[to]}")
    if target.suffix != _KINDS[to]:
        raise typer.BadParameter(f"-o {target}: the name of such a file ends in {_KINDS[to]}")
    return target


def _made(asked: Asked, data: str | None) -> "tuple[Quantised, list[str]]":
    """Write the file; what a user should know of what it was made from."""
    from micronet.bundle import load

    bundle = load(asked.model, factory=asked.build)
    told = _stored(asked, bundle)
    graph = _graph(asked, bundle)
    chosen, more = _images(bundle, asked.model, data)
    return _written(asked, bundle, chosen, graph), [*told, *more]


def _stored(asked: Asked, bundle: "Bundle") -> list[str]:
    """Refuse weights that are codes already; say so where they were rounded to 8 bits as they were stored."""
    from micronet.bundle_file import is_minmax8

    if bundle.bits:
        raise MicronetError(
            f"{asked.model}: was trained with quantised weights ({len(bundle.bits)} layers): `micronet export` writes "
            "them"
        )
    if not is_minmax8(asked.model):
        return []
    if asked.to == "minmax8":
        raise MicronetError(
            f"{asked.model}: its weights are stored in 8 bits already (minmax8): a file of these would be compared "
            "with them, not with the network that was trained; copy it, or give the model.pth that it came from"
        )
    return [f"{asked.model} stores weights rounded to 8 bits (minmax8): in float32 means these, not those trained"]


def _graph(asked: Asked, bundle: "Bundle") -> Any:
    """The float graph where layers are named, so that a wrong name is found before any image is read; else None."""
    from micronet.model_source import of_bundle
    from micronet.quantize import float_graph

    names = asked.int8.get("keep_float", 0)
    return None if isinstance(names, int) else float_graph(of_bundle(bundle, str(asked.model)), names)


def _images(bundle: "Bundle", model: Path, data: str | None) -> "tuple[Data, list[str]]":
    """The images, split as in the network's own training where that is known; what a user should know of them."""
    from micronet.measure import images_for
    from micronet.model_source import of_bundle

    source = of_bundle(bundle, str(model))
    name = data or data_of(source)
    if name is None:
        raise MicronetError(
            f"{model}: its file does not say which images it was trained on, and it is to be calibrated and measured: "
            "name them with --data (digits, cifar10, cifar100, or an image folder)"
        )
    try:
        how, told = split_of(source, model, name, "valid"), []
    except MicronetError:
        how, told = {}, [f"its file does not say how {name} was split: it may have been trained on these images"]
    return images_for(source, name, **how), told


def _written(asked: Asked, bundle: "Bundle", data: "Data", graph: Any) -> "Quantised":
    from micronet.model_source import of_bundle
    from micronet.quantize import Int8, to_float16, to_int8, to_minmax8

    name, target = str(asked.model), asked.target
    source, least = of_bundle(bundle, name), {"floor": asked.floor, "agreement": asked.agreement}
    if asked.to == "minmax8":
        return to_minmax8(bundle, target, data, factory=asked.build, name=name, **least)
    if asked.to == "float16":
        return to_float16(source, target, data, compute=asked.compute is not None, **least)
    return to_int8(source, target, data, Int8(**asked.int8), graph=graph, **least)


def _lines(found: "Quantised") -> list[str]:
    from micronet.parity import disagreeing

    parity = found.parity
    lost = 100 * (parity.before - parity.after) / parity.images
    change = f"{abs(lost):.2f} points {'lost' if lost >= 0 else 'gained'}"
    lines = [
        f"{found.path}: {found.bytes:,} bytes",
        f"{'such a file' if found.to == 'minmax8' else 'the network itself'}: {found.graph_bytes:,} bytes, "
        f"{found.float_bytes:,} in float32: {found.ratio:.2f} times smaller",
        f"{found.images}: right on {parity.after:,}, in float32 on {parity.before:,} ({change}); "
        f"{parity.agreeing:,} keep their class; relative error of the logits at most {parity.relative_error:.2g}",
    ]
    if parity.disagreeing:
        lines.append(f"another class: {disagreeing(parity)}")
    if found.to == "int8":
        how = found.how
        lines.append(
            f"calibrated on {how['images']:,} images of {how['calibrate']} (seed {how['seed']}, {how['method']}); the "
            f"test images were not looked at{'; weights of 7 bits' if how['reduce_range'] else ''}"
        )
    if found.worst:
        lines.append(f"the tensor that lost most: {found.worst[0]}, {100 * found.worst[1]:.2f} % of its norm")
    return [*lines, *(_ranked(found.ranking) if found.ranking else ()), *found.notes]


def _ranked(ranking: "Ranking") -> list[str]:
    shown = ", ".join(f"{layer.name} {layer.snr:.1f} dB" for layer in ranking.noise[:_SHOWN])
    lines = [
        f"noise of each layer alone at the logits, {ranking.images} validation images, {ranking.seconds:.0f} s; the "
        f"worst of {len(ranking.noise)}: {shown}"
    ]
    return lines + [f"with {name} in float: {test.told}" for name, test in ranking.confirmed.items()]
