"""Models timed beside each other: what they take on paper, in memory and in time, and what that means.

Each model runs in a process of its own (`bench_worker.py`), pinned to the same cores as the others; one runs at a time.
In every round each model has a turn, in an order that is drawn anew, so that a machine that slows down or speeds up
does so for all of them. First rounds of one image (latency), then rounds of many (throughput).
"""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from micronet.bench_cost import Cost, cost_of
from micronet.bench_process import Process, pick_cores
from micronet.bench_results import Bench, Options, Phase, Timed, against
from micronet.bench_stats import spread
from micronet.errors import MicronetError, first_line
from micronet.machine import busy, hardware, versions

if TYPE_CHECKING:
    from micronet.model_source import ModelSource

# Fewest, whatever they take, and most; what intervals of so few are worth is in `bench_stats.py`.
ROUNDS = (12, 25)
DISTURBED = 0.05  # share of the time in which others held the core, from which on it is said


@dataclass
class _Runner:
    """A model and its process, while it is being measured."""

    name: str
    label: str
    process: Process
    source: "ModelSource | None" = None
    cost: Cost = field(default_factory=Cost)
    opened: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    phases: dict[int, Phase] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)


def bench(models: Sequence[str], options: Options | None = None, tell: Callable[[str], None] = lambda _: None) -> Bench:
    """Measure models beside each other.

    Args:
        models: paths of `model.pth`, packed and ONNX files, or `timm:NAME` and the like; the first is the yardstick.
        options: how.
        tell: called with a line about what is done, now and then.

    Raises:
        MicronetError: a model can't be opened or run, its process dies or hangs, or there are fewer cores than threads.
    """
    options = options or Options()
    warning, cores = busy(), pick_cores(options.threads)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="micronet-")))
        tell(f"opening {_count(models)}")
        runners = [
            _start(stack, name, label, place, folder, cores, options)
            for place, (name, label) in enumerate(zip(models, labels(models), strict=True))
        ]
        for runner in runners:  # while the processes import what they need
            if runner.source is None:
                runner.source = _open(runner.name, options)
            if options.per_layer and not runner.name.lower().endswith(".onnx"):
                _require_float(runner.source)
            runner.cost = cost_of(runner.source)
        for runner in runners:
            runner.opened = runner.process.answer()
        waits = _measure(runners, options, tell)
        if options.per_layer:
            _take_layers(runners, folder, cores, options, tell)
        told = _results(runners, options)
    waited = sum(part for part, _ in waits) / sum(whole for _, whole in waits) if waits else None
    warnings = [warning] if warning else []
    if waited is not None and waited > DISTURBED:
        effect = "that is taken off the times, what they did to caches and clock is not"
        if options.threads > 1:
            effect = "times are too long, of slower models most"
        warnings.append(f"others held the core for {100 * waited:.0f} % of the time: {effect}")
    machine = hardware(options.device) | {"threads": options.threads}
    return Bench(
        models=told,
        options=options,
        cores=tuple(cores),
        machine={"hardware": machine, "versions": versions() | _versions(runners)},
        waited=waited,
        warnings=tuple(warnings),
    )


def labels(models: Sequence[str]) -> list[str]:
    """Short names that differ: of the file, with its folder where that does not tell them apart, or with a number."""
    short, longer = ([str(Path(*Path(name).parts[-parts:])) for name in models] for parts in (1, 2))
    told_apart = {label: len({b for a, b in zip(short, longer, strict=True) if a == label}) > 1 for label in short}
    found = [longer[i] if told_apart[label] else label for i, label in enumerate(short)]
    seen = [found[: place + 1].count(label) for place, label in enumerate(found)]
    return [f"{label} #{seen[i]}" if found.count(label) > 1 else label for i, label in enumerate(found)]


def _count(models: Sequence[Any]) -> str:
    return f"{len(models)} model{'s' * (len(models) > 1)}"


def _open(name: str, options: Options, *, with_weights: bool = False) -> "ModelSource":
    from micronet.model_source import open_model
    from micronet.named_networks import build_named

    source = open_model(name, input_size=options.input_size, factory=options.build)
    if with_weights and any(tensor.is_meta for tensor in source.module.parameters()):
        source = replace(source, module=build_named(name, with_weights=True)[0])
    return source


def _start(
    stack: ExitStack, name: str, label: str, place: int, folder: Path, cores: list[int], options: Options
) -> _Runner:
    """Start a model's process; a torch network that is to run on onnxruntime is exported first."""
    is_onnx, notes, source, file = name.lower().endswith(".onnx"), [], None, name
    if not is_onnx and options.runtime == "onnxruntime":
        source = _open(name, options, with_weights=True)
        file = str(_exported(source, folder / f"{place}.onnx"))
        notes.append("exported to a temporary ONNX file, which is what was timed")
    on_ort = is_onnx or source is not None
    if on_ort and options.device != "cpu":
        notes.append(f"onnxruntime computes on the CPU, not on {options.device}")
    process = stack.enter_context(Process(name, _job(file, on_ort, cores, options)))
    return _Runner(name=name, label=label, process=process, source=source, notes=notes)


def _job(file: str, on_ort: bool, cores: list[int], options: Options) -> dict[str, Any]:
    return {
        "model": file,
        "runtime": "onnxruntime" if on_ort else "torch",
        "threads": options.threads,
        "cores": cores,
        "device": "cpu" if on_ort else options.device,
        "input_size": options.input_size,
        "factory": options.factory,
        "limit": int(options.limit + options.seconds),
    }


def _exported(source: "ModelSource", path: Path) -> Path:
    """A torch network as an ONNX file, as `micronet export` writes it, but not compared with it."""
    _require_float(source)
    from callbacks.onnx_export import ExportError, export_onnx
    from micronet.model_source import DEFAULT_SIZE

    try:
        proto = export_onnx(source.module, source.input_size or DEFAULT_SIZE)
    except (ExportError, ValueError) as error:  # TraceError is one, too
        raise MicronetError(f"{source.name}: {first_line(error)}") from error
    path.write_bytes(proto.SerializeToString())
    return path


def _require_float(source: "ModelSource") -> None:
    """Refuse to export quantised layers here: what onnxruntime computes on integers needs ranges of real images."""
    from callbacks.fake_quantize import quantised_layers

    if quantised_layers(source.module):
        raise MicronetError(f"{source.name}: its layers are quantised: run `micronet export` first, and time that file")


def _measure(runners: list[_Runner], options: Options, tell: Callable[[str], None]) -> list[tuple[float, float]]:
    """Both phases; gives the seconds in which others held the core, and of how many, for each turn."""
    rng, waits = np.random.default_rng(options.seed), []
    for batch in dict.fromkeys((1, options.batch)):
        able = [runner for runner in runners if batch == 1 or runner.opened["most"] is None]
        for runner in runners:
            if runner not in able:
                runner.notes.append(f"takes {runner.opened['most']} image at a time: no throughput at {batch}")
        if able:
            waits += _phase(able, batch, options.seconds / 2, rng, options, tell)
    return waits


def _phase(
    runners: list[_Runner],
    batch: int,
    seconds: float,
    rng: np.random.Generator,
    options: Options,
    tell: Callable[[str], None],
) -> list[tuple[float, float]]:
    ready = [runner.process.ask(do="prepare", batch=batch) for runner in runners]
    slowest = max(one["seconds"] for one in ready)
    rounds = int(np.clip(seconds / slowest, *ROUNDS))
    expected = rounds * sum(max(seconds / rounds, one["seconds"]) for one in ready)
    tell(f"{rounds} rounds of {batch} image{'s' * (batch > 1)} at a time, about {expected:.0f} s")
    times: list[list[list[float]]] = [[] for _ in runners]
    waits = []
    for _ in range(rounds):
        for place in rng.permutation(len(runners)):
            turn = runners[place].process.ask(do="time", seconds=seconds / rounds)
            times[place].append(turn["times"])
            if turn["waited"] is not None:
                waits.append((turn["waited"], turn["elapsed"]))
    for runner, one, turns in zip(runners, ready, times, strict=True):
        runner.phases[batch] = Phase(
            batch=batch,
            spread=spread([time for turn in turns for time in turn]),
            rounds=tuple(float(np.median(turn)) for turn in turns),
            layout=one["layout"],
        )
    return waits


def _take_layers(
    runners: list[_Runner], folder: Path, cores: list[int], options: Options, tell: Callable[[str], None]
) -> None:
    for place, runner in enumerate(runners):
        tell(f"layers of {runner.label}")
        if runner.opened["runtime"] == "onnxruntime":
            runner.layers = runner.process.ask(do="layers")["layers"]
            continue
        source = _open(runner.name, options, with_weights=True)
        file = str(_exported(source, folder / f"{place}-layers.onnx"))
        with Process(runner.name, _job(file, True, cores, options)) as process:
            process.answer()
            runner.layers = process.ask(do="layers")["layers"]
        runner.notes.append("its layers are those of a temporary ONNX file in onnxruntime, not of torch")


def _results(runners: list[_Runner], options: Options) -> tuple[Timed, ...]:
    found: list[Timed] = []
    for runner in runners:
        timed = Timed(
            name=runner.name,
            label=runner.label,
            runtime=runner.opened["runtime"],
            device="cpu" if runner.opened["runtime"] == "onnxruntime" else options.device,
            cost=runner.cost,
            memory=runner.opened["memory"] | _on_device(runner.opened),
            latency=runner.phases[1],
            throughput=runner.phases.get(options.batch),
            notes=tuple(runner.notes),
            layers=tuple(runner.layers),
        )
        found.append(against(found[0], timed, options) if found else timed)
    return tuple(found)


def _on_device(opened: dict[str, Any]) -> dict[str, int]:
    return {"device_peak": opened["device_peak"]} if "device_peak" in opened else {}


def _versions(runners: list[_Runner]) -> dict[str, str]:
    return {runner.opened["runtime"]: runner.opened["version"] for runner in runners}
