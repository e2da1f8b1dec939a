"""`micronet export`: parse, call, print."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from micronet.cli_options import DataPlace, Factory, data_of, find_users_factory, make_console, split_of, use_data
from micronet.cli_score import Arch, InputSize, Trust, parse_size
from micronet.errors import MicronetError

if TYPE_CHECKING:
    from micronet.data import Data
    from micronet.deploy import Kept
    from micronet.model_source import ModelSource


def export(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A model.pth; a state dict with --arch.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The ONNX file; replaced. [default: beside MODEL]"),
    ] = None,
    normalise: Annotated[
        bool,
        typer.Option(
            "--normalise",
            help="Normalise inside the graph: it takes RGB from 0 to 1. Else mean and std are yours to do.",
        ),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Real images to compare on: digits, cifar10, cifar100, or an image folder. "
            "[default: those that MODEL was trained on]",
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="How many: of validation first, then of training.")] = 1000,
    floor: Annotated[
        float, typer.Option(min=0, max=1, metavar="SHARE", help="Least share of them that keep their class.")
    ] = 1.0,
    data_dir: DataPlace = None,
    input_size: InputSize = None,
    arch: Arch = None,
    factory: Factory = None,
    trust: Trust = False,
) -> None:
    """Write a network as one ONNX file, float32, and keep it only where it answers as MODEL does.

    BatchNorm is folded, any number of images can be given at a time, and the file says what its classes are, how images
    are normalised, what it scores and where it came from; no paths. It is read again by onnxruntime: on real images the
    logits must be those of MODEL up to a relative error of 1e-4, with the same class on all. The test images are not
    looked at.

    Example: `micronet export runs/resnet20_cifar10/model.pth -o resnet20.onnx --normalise`
    """
    file = out or model.with_suffix(".onnx")
    if file.suffix != ".onnx":
        raise typer.BadParameter(f"-o {file}: an ONNX file's name ends in .onnx")
    if model.suffix.lower() == ".onnx":
        raise MicronetError(f"{model}: is an ONNX file already; give the model.pth that it came from")
    if not file.parent.is_dir():
        raise MicronetError(f"{file.parent}: no such folder to write {file.name} to; make it first")
    use_data(data_dir)
    if trust:
        print(f"micronet: --trust: reading {model} runs whatever code it holds", file=sys.stderr)
    from micronet.model_source import open_model

    build, size = find_users_factory(factory), parse_size(input_size)
    source = open_model(str(model), input_size=size, factory=build, arch=arch, trust=trust)
    if source.module is None or any(p.is_meta for p in source.module.parameters()):
        raise MicronetError(
            f"{model}: is no network with weights; export takes a model.pth, or a state dict and --arch"
        )
    from micronet.deploy import export as write

    chosen = _real(source, model, data)
    kept = write(source, file, chosen, normalise=normalise, number=images, floor=floor)
    console = make_console()
    for line in _lines(kept, source, chosen):
        console.print(line, highlight=False, markup=False)


def _real(source: "ModelSource", model: Path, data: str | None) -> "Data":
    """The data set whose images are compared on, with the splits of the network's own training where they are known."""
    from micronet.measure import images_for

    name = data or data_of(source)
    if name is None:
        raise MicronetError(
            f"{model}: its file does not say which images it was trained on, and it is to be compared on real ones: "
            "name them with --data (digits, cifar10, cifar100, or an image folder)"
        )
    try:
        how: dict[str, Any] = split_of(source, model, name, "valid")
    except MicronetError:  # other images than it was trained on: any of them do, to compare two forms of it
        how = {}
    try:
        return images_for(source, name, **how)
    except MicronetError as error:
        hint = "" if data else "; --data names others, --data-dir says where they are"
        raise MicronetError(f"{model}: to be compared on images of {name}: {error}{hint}") from error


def _lines(kept: "Kept", source: "ModelSource", data: "Data") -> list[str]:
    from micronet.deploy import disagreeing

    parity, meta = kept.parity, kept.meta
    answer = "all" if parity.agreeing == parity.images else f"{parity.agreeing:,}"
    lines = [
        f"{kept.path}: {kept.bytes:,} bytes",
        f"compared on {meta.gate['images']}: {answer} of {parity.images:,} keep their class, relative error of the "
        f"logits {parity.relative_error:.1e}; right {parity.before:,} before, {parity.after:,} after",
    ]
    if parity.disagreeing:
        lines.append(f"another class: {disagreeing(parity)}")
    lines.append(f"input: {meta.props()['micronet.input'][1:-1]}; {' x '.join(map(str, meta.input_size))}, any number")
    if not source.classes:
        lines.append(f"its file names no classes and no mean and std: those of {data.name} were written")
    if kept.uncounted:
        lines.append(f"no score was written: {kept.uncounted}")
    zeros = sum(int((~mask).sum()) for mask in (source.masks or {}).values())
    if zeros:
        lines.append(
            f"{zeros:,} zeros are stored as numbers: an ONNX file of a sparse network is no smaller, no faster"
        )
    return lines
