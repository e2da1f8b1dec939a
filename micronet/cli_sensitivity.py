"""`micronet sensitivity`: parse, call, print."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from micronet.cli_options import (
    DataPlace,
    Device,
    Factory,
    ModelFile,
    check_device,
    check_outputs,
    find_users_factory,
    make_console,
    split_of,
    use_data,
)
from micronet.errors import MicronetError
from micronet.file_kind import require_model

if TYPE_CHECKING:
    from rich.table import Table

    from micronet.sensitivity import Sensitivity


def _shares(text: str) -> tuple[float, ...]:
    """Read `0.1,0.3,0.5`."""
    try:
        shares = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        raise typer.BadParameter(f"--ratios must be fractions with commas between, got {text!r}") from None
    if not all(0 < share < 1 for share in shares):
        raise typer.BadParameter(f"--ratios must be fractions in (0, 1), got {text!r}")
    return shares


def sensitivity(
    model: ModelFile,
    data: Annotated[str, typer.Option(help="digits, cifar10, cifar100, or the path of an image folder.")],
    ratios: Annotated[
        str, typer.Option(metavar="SHARES", help="Shares of a group's channels to remove.")
    ] = "0.1,0.3,0.5,0.7,0.9",
    importance: Annotated[
        str, typer.Option(help="What goes first: l1, l2, mean_abs, bn_scale, fpgm or random.")
    ] = "l1",
    limit: Annotated[int | None, typer.Option(min=1, metavar="IMAGES", help="Most validation images.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The plot. [default: beside MODEL]")] = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="What was measured. [default: beside MODEL]")
    ] = None,
    device: Device = None,
    factory: Factory = None,
    data_dir: DataPlace = None,
) -> None:
    """Prune each group of channels alone at several ratios, and measure the accuracy on the validation images.

    Nothing is trained in between. The test images are not looked at. A recipe reads the file for its ratios:
    `PruneChannels(ratio=ratios_from(FILE, max_drop=0.01))`.

    Example: `micronet sensitivity runs/resnet20_cifar10/model.pth --data cifar10 --ratios 0.25,0.5,0.75`
    """
    shares = _shares(ratios)
    words = ("l1", "l2", "mean_abs", "bn_scale", "fpgm", "random")
    if importance not in words:
        raise typer.BadParameter(f"--importance must be one of {', '.join(words)}, got {importance!r}")
    file = json or model.with_name(f"{model.stem}-sensitivity.json")
    plot = out or model.with_name(f"{model.stem}-sensitivity.png")
    require_model(model, onnx=False)
    check_outputs({"-o": plot, "--json": file}, [model, factory, data_dir])
    use_data(data_dir)
    check_device(device)
    from micronet.bundle import load
    from micronet.data import check_name
    from micronet.learner import pick_device
    from micronet.measure import images_for
    from micronet.model_source import of_bundle
    from micronet.sensitivity import measure_sensitivity, plot_sensitivity

    check_name(data)
    bundle = load(model, factory=find_users_factory(factory))
    try:
        how = split_of(bundle, model, data, "valid")
    except MicronetError as error:
        raise MicronetError(
            f"{model}: its file does not say which images of {data} it was trained on, so that there is no telling "
            "which are for validation; the test images must choose nothing"
        ) from error
    found = measure_sensitivity(
        bundle.model,
        images_for(of_bundle(bundle, str(model)), data, **how),
        ratios=shares,
        importance=importance,
        limit=limit,
        device=pick_device(device),
        name=model.name if model.parent == Path() else f"{model.parent.name}/{model.name}",
    )
    console = make_console()
    console.print(_table(found, shares))  # before it is written: a full disk must not take away what was measured
    for line in found.skipped:
        console.print(f"left alone: {line}", highlight=False, markup=False)
    found.save(file)
    plot_sensitivity(found, plot)
    console.print(f"plot: {plot}\nfile: {file}", highlight=False, markup=False)
    console.print(
        f'in a recipe: PruneChannels(ratio=ratios_from("{file}", max_drop=0.01)), from micronet.sensitivity',
        highlight=False,
        markup=False,
    )


def _table(found: "Sensitivity", shares: tuple[float, ...]) -> "Table":
    """A row for each group, a column for each ratio that was asked for."""
    from rich.table import Table

    from micronet.sensitivity import removed

    title = (
        f"{found.model} on {found.data} valid: {100 * found.top1:.2f} % of {found.images:,} images, "
        f"standard error {100 * found.noise:.2f} points; with one group pruned, lowest {found.importance} first "
        "(channels left: top-1 in %)"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("group", no_wrap=True)
    table.add_column("channels", justify="right", no_wrap=True)
    for share in shares:
        table.add_column(f"{100 * share:g} % removed", justify="right", no_wrap=True)
    for curve in found.curves:
        measured = {point.channels: 100 * point.top1_count / found.images for point in curve.points}
        left = [curve.channels - removed(curve.channels, share) for share in shares]
        # A share of few channels can be none of them.
        cells = [f"{number}: {measured[number]:.1f}" if number in measured else "none" for number in left]
        table.add_row(curve.name, str(curve.channels), *cells)
    return table
