"""`micronet bench`: parse, call, print."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from micronet.cli_options import Factory, Seed, check_device, check_outputs, find_users_factory, make_console, number
from micronet.cli_score import InputSize, parse_size
from micronet.file_kind import require_model


def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="model.pth, packed and ONNX files, timm:NAME and the like; the first is the yardstick.",
            show_default=False,
        ),
    ],
    threads: Annotated[int, typer.Option(min=1, help="Of each model, each pinned to a core of its own.")] = 1,
    seconds: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=86400,
            callback=number,
            help="Of timing for each model; slow ones take longer, for 12 rounds are run.",
        ),
    ] = 4.0,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time for throughput.")] = 128,
    runtime: Annotated[
        str | None,
        typer.Option(metavar="onnxruntime", help="Export torch networks, so that all run on the same runtime."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where torch computes: cpu, cuda, cuda:1 ...")] = "cpu",
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Time each node, too, by onnxruntime's profiler.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="PNG", help="Draw latency against score, and speed-ups.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="All that was measured; - prints it, not the tables.")
    ] = None,
    seed: Seed = 0,
    input_size: InputSize = None,
    factory: Factory = None,
) -> None:
    """Time models beside each other: latency, throughput, memory, size, score, and what the speed-ups are worth.

    Each model runs in a process of its own, one at a time, in rounds whose order is drawn anew: what slows the machine
    down slows all of them. A speed-up is the median of the rounds' ratios, with a bootstrap interval that takes the
    rounds for independent. Time it on an idle machine; accuracy is not measured (`micronet evaluate`).

    Example: `micronet bench model.onnx model_int8.onnx --per-layer -o bench.png`
    """
    if runtime not in (None, "onnxruntime"):
        raise typer.BadParameter(f"--runtime knows onnxruntime, got {runtime!r}")
    size = parse_size(input_size)
    if size is not None and not all(isinstance(n, int) for n in size):
        raise typer.BadParameter("--input-size: bench times networks of one input, such as 3x32x32")
    prints_json = str(json) == "-"
    for model in models:
        require_model(model)
    check_outputs({"-o": out, "--json": None if prints_json else json}, [*models, factory])
    if device != "cpu":
        check_device(device)
    from json import dumps

    from micronet.bench import bench as measure
    from micronet.bench_report import costs_table, layers_tables, plot, sentences, times_table
    from micronet.bench_results import Options
    from micronet.report import write_text

    options = Options(
        threads=threads,
        seconds=seconds,
        batch=batch,
        seed=seed,
        device=device,
        runtime=runtime,
        input_size=size,
        factory=factory,
        build=find_users_factory(factory),
        per_layer=per_layer,
    )
    found = measure(models, options, lambda line: print(f"micronet: {line}", file=sys.stderr))
    # What was measured is printed before anything is written: a disk that is full must not take it away.
    text = dumps(found.to_json(), indent=1)
    console = make_console()
    if prints_json:
        print(text)
    else:
        for table in (costs_table(found), times_table(found)):
            console.print(table)
        for line in sentences(found):
            console.print(line, highlight=False, markup=False)
        for table in layers_tables(found):
            console.print(table)
    if json is not None and not prints_json:
        write_text(text + "\n", json)
        console.print(f"file: {json}", highlight=False, markup=False)
    if out is not None:
        plot(found, out)
        if not prints_json:
            console.print(f"plot: {out}", highlight=False, markup=False)
