"""`micronet evaluate`: parse, call, print."""

from pathlib import Path
from typing import Annotated

import typer

from micronet.cli_options import (
    DataPlace,
    Device,
    Factory,
    check_device,
    check_outputs,
    find_users_factory,
    make_console,
    split_of,
    use_data,
)
from micronet.file_kind import require_model


def evaluate(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A model.pth, a packed file or an ONNX file.", show_default=False)
    ],
    data: Annotated[str, typer.Option(help="digits, cifar10, cifar100, or the path of an image folder.")],
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="PNG", help="The plot. [default: MODEL-DATA-SPLIT.png, beside it]"),
    ] = None,
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Write no plot.")] = False,
    device: Device = None,
    factory: Factory = None,
    data_dir: DataPlace = None,
) -> None:
    """Measure a model on a split: top-1 and top-5 as counts, loss, and a plot of confusion matrix and worst classes.

    Example: `micronet evaluate runs/wrn_cifar100/model.pth --data cifar100`
    """
    if split not in ("train", "valid", "test"):
        raise typer.BadParameter(f"--split must be train, valid or test, got {split!r}")
    if no_plot and out is not None:
        raise typer.BadParameter("-o names the plot that --no-plot leaves out: give one of them")
    require_model(model)
    check_outputs({"-o": out}, [model, factory, data_dir])
    use_data(data_dir)
    check_device(device)
    from micronet.measure import measure
    from micronet.model_source import open_model
    from micronet.report import plot_confusion

    source = open_model(str(model), factory=find_users_factory(factory))
    measured = measure(source, data, split, device, **split_of(source, model, data, split))
    images, result = measured.data, measured.result
    how = "onnxruntime" if source.path is not None else "float32"
    console = make_console()
    console.print(
        f"{model} on {images.name} {split}, {measured.device}, {how}:\n"
        f"top-1  {result.top1_count:,} of {result.images:,} = {100 * result.top1:.2f} %\n"
        f"top-5  {result.top5_count:,} of {result.images:,} = {100 * result.top5:.2f} %\n"
        f"loss   {result.loss:.4f} (cross-entropy)",
        highlight=False,
    )
    if no_plot:
        return
    target = out or model.with_name(f"{model.stem}-{images.name}-{split}.png")
    plot_confusion(result, images.classes, target, f"{images.name} {split}: {100 * result.top1:.2f} % right")
    hint = " (beside the model; --no-plot leaves it out)" if out is None else ""
    console.print(f"plot of confusion matrix and worst classes: {target}{hint}", highlight=False, markup=False)
