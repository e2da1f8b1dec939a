"""`micronet plan`: parse, call, print."""

import json as jsons
from typing import Annotated

import typer

from micronet.cli_options import (
    DataFolder,
    Device,
    RecipeFile,
    Settings,
    check_device,
    make_console,
    parse_settings,
    use_data,
)


def plan(
    recipe: RecipeFile,
    settings: Settings = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Plan the smoke run: every stage, on few images.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, metavar="IMAGES", help="Most images in each split.")] = None,
    rules: Annotated[
        str, typer.Option(help="official, official-imagenet, seed, imt, imt-2.8e8 or imt-profile.")
    ] = "official",
    time: Annotated[
        bool, typer.Option(" /--no-time", help="Don't run the few steps whose time is taken.", show_default=False)
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, a stable form for programs.")] = False,
    device: Device = None,
    data_dir: DataFolder = None,
) -> None:
    """Say what a recipe will cost before it is trained: size, operations, score, file and time of every stage.

    The time is that of a few real steps; nothing is kept of them. What the recipe asks for and will not get is said in
    one line each; the exit status is 1 where `micronet fit` would refuse the recipe.

    Example: `micronet plan recipes/wrn_cifar100.py -s epochs=30`
    """
    given = parse_settings(settings)
    use_data(data_dir)
    check_device(device)
    from rich.console import Console

    from micronet.allocator import keep_freed_memory
    from micronet.plan import plan as make_plan
    from micronet.plan_report import plan_lines, plan_table
    from micronet.recipe import load_recipe
    from micronet.rules import RULES
    from micronet.run import RunOptions

    if rules not in RULES:
        raise typer.BadParameter(f"--rules must be one of {', '.join(RULES)}, got {rules!r}")
    loaded = load_recipe(recipe, given, smoke=smoke)
    images = RunOptions(limit=limit, smoke=smoke).images
    keep_freed_memory()  # as `fit` does: it has a part in the time
    with Console(stderr=True).status("running a few steps" if time else "counting"):
        planned = make_plan(loaded, rules=RULES[rules], limit=images, device=device, timed=time, where=recipe)
    if json:
        print(jsons.dumps({"recipe": str(recipe)} | planned.to_json(), indent=1))
    else:
        console = make_console()
        above, below = plan_lines(planned, str(recipe))
        console.print("\n".join(above), highlight=False, markup=False)
        console.print(plan_table(planned))
        for line in below:
            console.print(line, highlight=False, markup=False)
    if planned.refused:
        raise typer.Exit(1)
