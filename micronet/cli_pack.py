"""`micronet pack` and `micronet unpack`: parse, call, print."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from micronet.cli_options import Factory, check_outputs, find_users_factory, make_console
from micronet.errors import MicronetError
from micronet.file_kind import require_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from micronet.pack import Packing

SUFFIX = ".safetensors"


def pack(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model.pth, or a packed file.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The packed file; replaced. [default: beside MODEL]"),
    ] = None,
    float16: Annotated[bool, typer.Option("--float16", help="Round all numbers that are no codes to 16 bits.")] = False,
    code: Annotated[
        str | None,
        typer.Option(metavar="entropy", help="Code masks and codes by their frequencies: no bytes are claimed then."),
    ] = None,
    factory: Factory = None,
) -> None:
    """Store what a network holds when it is deployed, bit by bit, in a safetensors file.

    BatchNorm is folded, or becomes a scale and a shift; masked weights take a bit each and the kept ones their numbers,
    quantised ones 2 to 8 bits. The file's bytes less its header are those of the arrays that `micronet score` counts.
    It is read again, and kept only where it gives the deployed network, bit for bit, and answers as MODEL does. All
    commands that read a model.pth read it, too.

    Example: `micronet pack runs/resnet20_cifar10/model.pth --float16`
    """
    if code not in (None, "entropy"):
        raise typer.BadParameter(f"--code knows entropy, got {code!r}")
    file = out or model.with_suffix(SUFFIX)
    if file.suffix.lower() != SUFFIX:
        raise typer.BadParameter(f"-o {file}: a packed file's name ends in {SUFFIX}")
    require_model(model, onnx=False)
    check_outputs({"-o": file}, [model, factory])
    from micronet.bundle import load
    from micronet.pack import pack as write

    build = find_users_factory(factory)
    bundle = load(model, factory=build)
    try:
        packing = write(bundle, file, float16=float16, coded=code is not None, factory=build)
    except MicronetError as error:
        raise MicronetError(str(error) if str(error).startswith(str(file)) else f"{model}: {error}") from error
    console = make_console()
    for line in _lines(packing, model):
        console.print(line, highlight=False, markup=False)


def unpack(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A packed file.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="MODEL", help="The model file; replaced. [default: FILE-unpacked.pth]"),
    ] = None,
    factory: Factory = None,
) -> None:
    """Make a model.pth of a packed file: the network as it is deployed, bit for bit.

    Example: `micronet unpack model.safetensors -o model.pth`
    """
    target = out or file.with_name(f"{file.stem}-unpacked.pth")
    if target.suffix.lower() != ".pth":
        raise typer.BadParameter(f"-o {target}: a model file's name ends in .pth")
    require_model(file, onnx=False)
    check_outputs({"-o": target}, [file, factory])
    from micronet.pack import unpack as write
    from micronet.unpack import read

    build = find_users_factory(factory)
    packed = read(file, factory=build)
    write(packed, target, factory=build)
    said = "" if packed.float_bits == 32 else "; its numbers are those that 16 bits hold, in float32"
    make_console().print(
        f"{target}: {target.stat().st_size:,} bytes, the network of {file} bit for bit{said}",
        highlight=False,
        markup=False,
    )


def _lines(packing: "Packing", model: Path) -> "Iterator[str]":
    """What was written, in bytes, and what that has to do with the score."""
    from micronet.rules import official
    from micronet.score import tally

    packed, ledger = packing.packed, packing.deployed.ledger
    width, count = packed.float_bits, len(ledger.arrays)
    yield f"{packing.path}: {packed.file_bytes:,} bytes"
    yield f"header  {packed.header_bytes:,} bytes: names, shapes, how the network is built and where it came from"
    rounded = " (numbers rounded once)" if width == 16 else ""
    if packed.coded:
        yield (
            f"arrays  {packed.data_bytes:,} bytes, masks and codes entropy-coded{rounded}: only the file's bytes are "
            f"claimed; its {count} arrays have {packing.claim_bytes:,}"
        )
    else:
        yield f"arrays  {packed.data_bytes:,} bytes{rounded} = the ledger's {count} arrays, each in whole bytes"
    score = tally(str(packing.path), ledger, official)
    counted = f"{score.storage:,.10g} words of 32 bits = {score.storage * 4:,.10g} bytes"
    quantised = any(array.role == "weight" and array.bits < 16 for array in ledger.arrays)
    if quantised and width == 16:
        yield f"score   the model it came from counts {counted}, its numbers at 32 bits; this file's have 16"
    elif quantised or width == 16:
        same = "not coded" if packed.coded else "without rounding to whole bytes"
        yield f"score   official storage: {counted}, the same arrays {same}"
    else:
        yield (
            f"score   official storage: {counted}: where nothing is quantised, numbers count at 16 bits for "
            "free; this file holds them at 32, twice that: --float16 stores them at 16"
        )
    norms = sum(len(edit["layers"]) for edit in packed.bundle.edits if edit["edit"] == "channel_affine")
    if norms:
        yield f"{norms} BatchNorms can't be folded: each is a scale and a shift"
    if unread := packing.deployed.unread:
        yield f"left out: {len(unread)} tensors that no answer depends on, such as {unread[0]}: zero when it is read"
    yield "read again: the deployed network, bit for bit (state, masks, logits)"
    apart, links = packing.likeness.logits, packing.likeness.links
    yield (
        f"beside {model}: relative error of the logits {float(apart.max()):.1e} at most, "
        f"{float(apart.median()):.1e} in the median, on {len(apart)} images of noise"
    )
    if len(links) > 1:
        yield (
            f"the same codes; given what it gets there, each of {len(links) - 1} quantised layers hands on the same up "
            f"to a relative error of {max(links.values()):.1e}"
        )
    yield f"next:   micronet score {packing.path}"
