"""`micronet export`: parse, call, print."""

import sys
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
from micronet.cli_score import Arch, InputSize, Trust, parse_size
from micronet.errors import MicronetError
from micronet.file_kind import require_model

if TYPE_CHECKING:
    from micronet.data import Data
    from micronet.deploy import Kept
    from micronet.export_quantised import Exported, Stored
    from micronet.model_source import ModelSource


def export(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A model.pth or a packed file; a state dict with --arch.", show_default=False
        ),
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
    int4: Annotated[
        bool,
        typer.Option(
            "--int4",
            help="Quantised layers: store codes of 4 bits and fewer in 4. onnxruntime computes such convolutions in "
            "float: the file is smaller, and several times slower.",
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
    images: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many: of validation first, then of training. [default: 1000; all of validation where layers are "
            "quantised]",
        ),
    ] = None,
    floor: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            callback=number,
            metavar="SHARE",
            help="Least share of them that keep their class. [default: 1; where layers are quantised 0.8, if at most 1 "
            "point of top-1 is lost]",
        ),
    ] = None,
    data_dir: DataPlace = None,
    input_size: InputSize = None,
    arch: Arch = None,
    factory: Factory = None,
    trust: Trust = False,
) -> None:
    """Write a network as one ONNX file, and keep it only where it answers as MODEL does.

    BatchNorm is folded, any number of images can be given at a time, and the file says what its classes are, how images
    are normalised, what it scores and where it came from; no paths. It is read again by onnxruntime: on real images the
    logits must be those of MODEL up to a relative error of 1e-4, with the same class on all. The test images are not
    looked at.

    A network that QuantAware trained is written as codes of 8 bits for onnxruntime's integer kernels, whatever its
    widths; what lies between its layers is rounded to 8 bits, too. So that file may lose a point of top-1 (--floor).

    Example: `micronet export runs/resnet20_cifar10/model.pth -o resnet20.onnx --normalise`
    """
    file = out or model.with_suffix(".onnx")
    if file.suffix != ".onnx":
        raise typer.BadParameter(f"-o {file}: an ONNX file's name ends in .onnx")
    if model.suffix.lower() == ".onnx":
        raise MicronetError(f"{model}: is an ONNX file already; give the model.pth that it came from")
    if not (arch or trust):  # which say themselves what the file is
        require_model(model, onnx=False)
    check_outputs({"-o": file}, [model, factory, data_dir])
    use_data(data_dir)
    if trust:
        print(f"micronet: --trust: reading {model} runs whatever code it holds", file=sys.stderr)
    source = _opened(model, find_users_factory(factory), input_size, arch, trust, int4)
    lines = _written(source, file, _real(source, model, data), int4, normalise, images, floor)
    console = make_console()
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _opened(
    model: Path, build: Any, input_size: str | None, arch: str | None, trust: bool, int4: bool
) -> "ModelSource":
    """The network with its weights; what there is nothing to export of is refused."""
    from callbacks.fake_quantize import quantised_layers
    from micronet.model_source import open_model

    size = parse_size(input_size)
    source = open_model(str(model), input_size=size, factory=build, arch=arch, trust=trust)
    if source.module is None or any(p.is_meta for p in source.module.parameters()):
        raise MicronetError(
            f"{model}: is no network with weights; export takes a model.pth, or a state dict and --arch"
        )
    if int4 and not quantised_layers(source.module):
        raise MicronetError(
            f"{model}: --int4 is for layers that QuantAware trained, and none of its layers is quantised; "
            "`micronet quantize` makes it int8"
        )
    return source


def _written(
    source: "ModelSource",
    file: Path,
    data: "Data",
    int4: bool,
    normalise: bool,
    images: int | None,
    floor: float | None,
) -> list[str]:
    """Write the file; what there is to say of it."""
    from callbacks.fake_quantize import quantised_layers

    if quantised_layers(source.module):
        from micronet.export_quantised import export_quantised

        made = export_quantised(source, file, data, int4=int4, normalise=normalise, number=images, floor=floor)
        return [*_lines(made.kept, source, data), *_quantised_lines(made, source.masked_zeros)]
    from micronet.deploy import export as write

    share = 1.0 if floor is None else floor
    kept = write(source, file, data, normalise=normalise, number=images or 1000, floor=share)
    lines = _lines(kept, source, data)
    if zeros := source.masked_zeros:
        lines.append(
            f"{zeros:,} zeros are stored as numbers: an ONNX file of a sparse network is no smaller, no faster"
        )
    return lines


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
    from micronet.parity import disagreeing

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
    return lines


def _quantised_lines(made: "Exported", zeros: int) -> list[str]:
    """What a file of codes holds, what it costs, and what onnxruntime makes of it."""
    from micronet.machine import int8_told

    run, before, after = made.kernels, made.before, made.after
    lines = [
        f"weights: {_widths(before)} in MODEL, {_widths(after)} in the file; storage by its own ledger "
        f"{after.words:,.0f} words, MODEL's {before.words:,.0f}"
    ]
    if after.sparse:
        lines.append(
            f"its ledger takes {after.sparse} of {sum(after.widths.values())} layers for sparse, where a bit for each "
            "weight and the codes that are not 0 are fewer words: the file itself stores every code"
        )
    if zeros:
        lines.append(
            f"{zeros:,} zeros of MODEL's masks are codes of 0 among these: an ONNX file of a sparse network is no "
            "smaller, no faster"
        )
    kinds = [f"{run.integer_convs} of {run.convs} convolutions with integers"] if run.convs else []
    if run.products:
        packed = f", {run.packed_products} on weights of 4 bits (MatMulNBits)" if run.packed_products else ""
        kinds.append(f"{run.integer_products} of {run.products} matrix products with integers{packed}")
    lines.append(f"onnxruntime computes {'; '.join(kinds)}")
    if made.int4:
        lines.append(
            "convolutions of 4-bit codes it computes in float, made real whenever it runs: a smaller file than without "
            "--int4, and several times slower"
        )
    elif sum(before.widths.values()) - before.widths.get(8, 0) > run.packed_products:
        lines.append(
            "narrower codes of convolutions are stored in 8 bits, as integer kernels take them, and counted so; --int4 "
            "stores 4 bits, and is several times slower"
        )
    if note := "" if made.int4 else int8_told("", reduced=8 not in before.widths):
        lines.append(note)
    return lines


def _widths(stored: "Stored") -> str:
    parts = [f"{count} layer{'s' if count > 1 else ''} of {bits} bits" for bits, count in stored.widths.items()]
    return ", ".join(parts)
