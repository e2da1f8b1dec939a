"""The command line: parse, call, print. torch and fastai are imported inside the commands only."""

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from micronet.cli_options import (
    DataFolder,
    Device,
    Factory,
    ModelFile,
    RecipeFile,
    Seed,
    Settings,
    check_device,
    find_users_factory,
    make_console,
    parse_settings,
    split_of,
    use_data,
)
from micronet.errors import MicronetError

app = typer.Typer(
    help="Train small image classifiers, compress them, and count what they cost.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Fetch and look at data sets.", no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(data_app, name="data")


def main() -> None:
    """Run the command line; what the user can mend is one line and exit status 1."""
    # fastai decorates two functions with it at import; nothing that the user can do.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    try:
        app()
    except MicronetError as error:
        print(f"micronet: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:  # a full disk, a folder that is not ours to write
        where = f"{error.filename}: " if error.filename else ""
        print(f"micronet: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nmicronet: interrupted", file=sys.stderr)
        sys.exit(130)


@app.command()
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
    from micronet.folder import read_rows, set_aside
    from micronet.recipe import load_recipe
    from micronet.report import stages_table
    from micronet.run import RunOptions, run

    plan = load_recipe(recipe, given, smoke=smoke)
    folder = out or Path("runs") / (f"{recipe.stem}-smoke" if smoke else recipe.stem)
    console = make_console()
    if fresh and (moved := set_aside(folder)):
        console.print(f"moved the earlier run to {moved}")
    options = RunOptions(seed=seed, limit=limit, device=device, smoke=smoke, tensorboard=tensorboard)
    try:
        run(plan, folder, options, source=recipe, console=console)
    except KeyboardInterrupt:
        print(f"\nmicronet: interrupted; the same command goes on from the last epoch in {folder}", file=sys.stderr)
        sys.exit(130)
    console.print(stages_table(read_rows(folder)))
    console.print(f"model: {folder / 'model.pth'}")
    console.print(f"next:  micronet score {folder / 'model.pth'}")


@app.command()
def score(
    model: ModelFile,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, a stable form for programs.")] = False,
    factory: Factory = None,
) -> None:
    """Count parameters and operations of a model, and score them.

    The rules are those of the fastai entry to the MicroNet Challenge 2019 ("seed"): all parameters at 32 bits;
    multiplications of convolutions, linear layers and global average pooling at 16 bits, their additions at 32.

    Example: `micronet score runs/wrn_cifar100/model.pth --json`
    """
    from dataclasses import replace

    from micronet.bundle import load
    from micronet.score import score as score_model

    build = find_users_factory(factory)
    bundle = load(model, factory=build)
    result = replace(score_model(bundle.model, input_size=bundle.input_size), model=str(model))
    if json:
        from json import dumps

        print(dumps(result.to_json(), indent=1))
        return
    from micronet.report import score_table, totals_table

    console = make_console()
    console.print(score_table(result))
    console.print(totals_table(result))
    rules = result.rules
    console.print(
        f"score  = {result.params:,} params / {rules.params_norm:,.0f}"
        f" + {result.ops:,.0f} ops / {rules.ops_norm:,.0f}\n"
        f"       = {result.score_params:.7f} + {result.score_ops:.7f} = [bold]{result.score:.7f}[/bold]",
        highlight=False,
    )


@app.command()
def evaluate(
    model: ModelFile,
    data: Annotated[str, typer.Option(help="digits, cifar10, cifar100, or the path of an image folder.")],
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Confusion matrix as PNG. [default: beside MODEL]")
    ] = None,
    device: Device = None,
    factory: Factory = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", "-d", envvar="MICRONET_DATA", help="Where the data set or its .tgz lies."),
    ] = None,
) -> None:
    """Measure a model on a split: top-1 and top-5 as counts, loss, confusion matrix and worst classes.

    Example: `micronet evaluate runs/wrn_cifar100/model.pth --data cifar100`
    """
    if split not in ("train", "valid", "test"):
        raise typer.BadParameter(f"--split must be train, valid or test, got {split!r}")
    use_data(data_dir)
    check_device(device)
    from dataclasses import replace

    from micronet.bundle import load
    from micronet.data import by_name, plain_loader
    from micronet.evaluate import evaluate as measure
    from micronet.learner import pick_device
    from micronet.report import plot_confusion

    bundle = load(model, factory=find_users_factory(factory))
    images = by_name(data, size=bundle.input_size[1], **split_of(bundle, model, data, split))
    if images.input_size != bundle.input_size:
        raise MicronetError(
            f"{model}: takes images of {'x'.join(map(str, bundle.input_size))} (channels, height, width), "
            f"those of {data} are {'x'.join(map(str, images.input_size))}"
        )
    if images.classes != bundle.classes:
        raise MicronetError(
            f"{model}: its {len(bundle.classes)} classes ({', '.join(bundle.classes[:3])}, ...) are not the "
            f"{len(images.classes)} of {data} ({', '.join(images.classes[:3])}, ...)"
        )
    chosen = getattr(images, split)
    if chosen is None:
        raise MicronetError(f"{data} has no {split} split")
    device = pick_device(device)
    # The network's own mean and std: what it was trained with.
    images = replace(images, mean=bundle.mean, std=bundle.std)
    result = measure(bundle.model, plain_loader(chosen, images, device=device), device)
    console = make_console()
    console.print(
        f"{model} on {images.name} {split}, {device}, float32:\n"
        f"top-1  {result.top1_count:,} of {result.images:,} = {100 * result.top1:.2f} %\n"
        f"top-5  {result.top5_count:,} of {result.images:,} = {100 * result.top5:.2f} %\n"
        f"loss   {result.loss:.4f} (cross-entropy)",
        highlight=False,
    )
    target = out or model.with_name(f"{model.stem}-{images.name}-{split}.png")
    plot_confusion(result, bundle.classes, target, f"{images.name} {split}: {100 * result.top1:.2f} % right")
    console.print(f"confusion matrix and worst classes: {target}")


@app.command("lr-find")
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
    """Try growing learning rates on a recipe's first stage, draw the loss, and suggest one.

    Example: `micronet lr-find recipes/resnet20_cifar10.py -o lr.png`
    """
    given = parse_settings(settings)
    use_data(data_dir)
    check_device(device)
    from micronet.learner import find_lr
    from micronet.recipe import load_recipe
    from micronet.report import plot_lr_find

    plan = load_recipe(recipe, given)
    rates, losses, suggested = find_lr(plan, steps=steps, seed=seed, limit=limit, device=device)
    plot_lr_find(rates, losses, suggested, out)
    console = make_console()
    console.print(f"suggested learning rate: {suggested:.2g} (the recipe has {plan.stages[0].lr:g}); plot: {out}")


@data_app.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(help="digits, cifar10 or cifar100.", show_default=False)],
    data_dir: DataFolder = None,
) -> None:
    """Download and decode a data set, so that it is there when needed.

    Example: `micronet data fetch cifar100`
    """
    use_data(data_dir)
    from micronet.data import fetch

    make_console().print(f"{name} is ready in {fetch(name)}")


@data_app.command("show")
def data_show(
    name: Annotated[str, typer.Argument(help="digits, cifar10, cifar100, a folder, or a recipe.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture.")] = Path("grid.png"),
    images: Annotated[int, typer.Option("--images", "-n", min=1, max=400, help="How many.")] = 36,
    plain: Annotated[bool, typer.Option("--plain", help="Without augmentation.")] = False,
    seed: Seed = 0,
    data_dir: DataFolder = None,
) -> None:
    """Draw what the network will see: training images, augmented as in the WRN recipe, or as a recipe of yours does.

    Example: `micronet data show recipes/resnet20_cifar10.py -o grid.png`
    """
    use_data(data_dir)
    from dataclasses import replace

    from micronet.data import by_name, loaders, wrn_augment
    from micronet.recipe import blaming, load_recipe
    from micronet.report import new_figure, save_figure

    with blaming(name):
        chosen = load_recipe(name).data() if name.endswith(".py") else replace(by_name(name), augment=wrn_augment())
    if plain:
        chosen = replace(chosen, augment=None)
    new_figure()  # sets a backend that opens no window
    with blaming(name):
        loader = loaders(replace(chosen, batch_size=min(images, len(chosen.train))), seed=seed).train
    save_figure(loader.show_batch(max_n=images, show=False), out)
    make_console().print(f"{min(images, len(chosen.train))} training images of {chosen.name}: {out}")
