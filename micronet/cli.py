"""The command line: parse, call, print. torch and fastai are imported inside the commands only."""

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from micronet import __version__
from micronet.cli_bench import bench
from micronet.cli_evaluate import evaluate
from micronet.cli_export import export
from micronet.cli_options import (
    Command,
    DataFolder,
    Device,
    Group,
    RecipeFile,
    Seed,
    Settings,
    check_device,
    check_outputs,
    ended_as_by_ctrl_c,
    ignore_signals,
    make_console,
    parse_settings,
    use_data,
)
from micronet.cli_pack import pack, unpack
from micronet.cli_plan import plan
from micronet.cli_predict import predict
from micronet.cli_quantize import quantize
from micronet.cli_score import score
from micronet.cli_sensitivity import sensitivity
from micronet.errors import MicronetError, first_line, printable

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(
    cls=Group,
    help="Fetch and look at data sets.\n\nExample: `micronet data show cifar100 -o grid.png`",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(data_app, name="data")


def main() -> None:
    """Run the command line; what the user can mend is one line and exit status 1; signals are ignored after it."""
    # fastai decorates two functions with it at import; nothing that the user can do.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    try:
        with ended_as_by_ctrl_c():
            _run()
    except KeyboardInterrupt:  # no command runs any more, and its end is not reached
        ignore_signals()
        print("\nmicronet: interrupted", file=sys.stderr)
        sys.exit(130)


def _run() -> None:
    try:
        app()
    except MicronetError as error:
        _fail(str(error))
    except OSError as error:  # a full disk, a folder that is not ours to write
        _fail((f"{error.filename}: " if error.filename else "") + (error.strerror or str(error)))
    except MemoryError as error:
        _fail(f"not enough memory ({first_line(error)})")


def _fail(told: str) -> None:
    ignore_signals()
    print(f"micronet: {printable(told)}", file=sys.stderr)
    sys.exit(1)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"micronet {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train small image classifiers, count their parameters and operations, score and compare them.

    Example: `micronet fit recipes/quickstart.py`
    """


@app.command(cls=Command)
def fit(
    recipe: RecipeFile,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder. [default: runs/NAME-OF-RECIPE]", show_default=False)
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Every stage in seconds, on few images: does it run?")] = False,
    limit: Annotated[int | None, typer.Option(min=1, metavar="IMAGES", help="Most images in each split.")] = None,
    seed: Seed = 0,
    device: Device = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over; an earlier run in the folder is moved to FOLDER.1.")
    ] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log to TensorBoard, too.")] = False,
    data_dir: DataFolder = None,
) -> None:
    """Train by a recipe, stage after stage; run again to go on where it was stopped.

    Example: `micronet fit recipes/wrn_cifar100.py -s epochs=30 -o runs/short`
    """
    given = parse_settings(settings)
    use_data(data_dir)
    check_device(device)
    from micronet.allocator import keep_freed_memory
    from micronet.folder import is_begun, read_rows, set_aside
    from micronet.recipe import load_recipe
    from micronet.report import stages_table
    from micronet.run import RunOptions, run

    plan = load_recipe(recipe, given, smoke=smoke)
    folder = out or Path("runs") / (f"{recipe.stem}-smoke" if smoke else recipe.stem)
    console = make_console()
    if fresh and (moved := set_aside(folder)):
        console.print(f"moved the earlier run to {moved}")
    options = RunOptions(seed=seed, limit=limit, device=device, smoke=smoke, tensorboard=tensorboard)
    keep_freed_memory()
    try:
        run(plan, folder, options, source=recipe, console=console)
    except KeyboardInterrupt:
        if is_begun(folder):
            then = f"the same command goes on from the last finished epoch in {folder}"
        else:
            then = f"no epoch is finished and nothing is saved yet: the same command starts again in {folder}"
        print(f"\nmicronet: interrupted; {then}", file=sys.stderr)
        sys.exit(130)
    console.print(stages_table(read_rows(folder)))
    console.print(f"model: {folder / 'model.pth'}")
    console.print(f"next:  micronet score {folder / 'model.pth'}")


app.command(cls=Command)(plan)
app.command(cls=Command)(score)
app.command(cls=Command)(sensitivity)
app.command(cls=Command)(export)
app.command(cls=Command)(predict)
app.command(cls=Command)(quantize)
app.command(cls=Command)(pack)
app.command(cls=Command)(unpack)
app.command(cls=Command)(bench)
app.command(cls=Command)(evaluate)


@app.command("lr-find", cls=Command)
def lr_find(
    recipe: RecipeFile,
    settings: Settings = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The plot.")] = Path("lr_find.png"),
    steps: Annotated[int, typer.Option(min=20, help="Steps of the mock training.")] = 100,
    seed: Seed = 0,
    limit: Annotated[int | None, typer.Option(min=1, metavar="IMAGES", help="Most images in each split.")] = None,
    device: Device = None,
    data_dir: DataFolder = None,
) -> None:
    """Try growing learning rates on a recipe's first stage that has epochs, draw the loss, and suggest one.

    That is the rate at which the smoothed loss was least: the highest that a schedule which warms up should reach. It
    tells the power of ten; the plot shows how sharp it is.

    Example: `micronet lr-find recipes/resnet20_cifar10.py -o lr.png`
    """
    given = parse_settings(settings)
    check_outputs({"-o": out}, [recipe, data_dir])
    use_data(data_dir)
    check_device(device)
    from micronet.learner import find_lr, first_trained
    from micronet.recipe import load_recipe
    from micronet.report import plot_lr_find

    plan = load_recipe(recipe, given)
    rates, losses, suggested = find_lr(plan, steps=steps, seed=seed, limit=limit, device=device)
    plot_lr_find(rates, losses, suggested, out)
    console = make_console()
    console.print(
        f"suggested learning rate for {first_trained(plan).name}: {suggested:.2g}, where the smoothed loss was least "
        f"(the recipe has {first_trained(plan).lr:g}); plot: {out}"
    )


@data_app.command("fetch", cls=Command)
def data_fetch(
    name: Annotated[str, typer.Argument(metavar="SET", help="digits, cifar10 or cifar100.", show_default=False)],
    data_dir: DataFolder = None,
) -> None:
    """Download and decode a data set, so that it is there when needed.

    Example: `micronet data fetch cifar100`
    """
    use_data(data_dir)
    from micronet.data import fetch

    make_console().print(f"{name} is ready in {fetch(name)}")


@data_app.command("show", cls=Command)
def data_show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_SET", help="A recipe, or digits, cifar10, cifar100 or a folder.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture.")] = Path("grid.png"),
    images: Annotated[int, typer.Option("--images", "-n", min=1, max=400, help="How many.")] = 36,
    plain: Annotated[bool, typer.Option("--plain", help="Without augmentation.")] = False,
    seed: Seed = 0,
    data_dir: DataFolder = None,
) -> None:
    """Draw training images: those of a recipe as its network will see them, augmented as the recipe says.

    By its name alone, cifar10 or cifar100 is drawn with the augmentation of the WRN recipe, other images as they are.

    Example: `micronet data show recipes/resnet20_cifar10.py -o grid.png`
    """
    check_outputs({"-o": out}, [name, data_dir])
    use_data(data_dir)
    from dataclasses import replace

    from micronet.data import by_name, loaders, usual_augment
    from micronet.recipe import blaming, load_recipe
    from micronet.report import new_figure, save_figure

    with blaming(name):
        if name.endswith(".py"):
            chosen = load_recipe(name).data()
        else:
            chosen = replace(by_name(name), augment=usual_augment(name))
    if plain:
        chosen = replace(chosen, augment=None)
    new_figure()  # sets a backend that opens no window
    with blaming(name):
        loader = loaders(replace(chosen, batch_size=min(images, len(chosen.train))), seed=seed).train
    save_figure(loader.show_batch(max_n=images, show=False), out)
    how = "augmented" if chosen.augment else "not augmented"
    make_console().print(f"{min(images, len(chosen.train))} training images of {chosen.name}, {how}: {out}")
