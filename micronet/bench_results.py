"""What `micronet bench` is asked for and what it finds."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from micronet.bench_cost import Cost
from micronet.bench_stats import Ratio, Spread, speed_up
from micronet.bench_words import Side, predicted, verdict

NARROW = 8  # bits, up to which weights are codes: some are 0 because that is the nearest


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to time.

    Args:
        threads: of each model, each on a core of its own.
        seconds: for each model, half of them for one image and half for many; slow models take longer, for there are
            at least twelve rounds of each.
        batch: how many images throughput is measured with.
        seed: of the order of turns and of the bootstrap.
        device: where torch computes; onnxruntime stays on the CPU.
        runtime: `onnxruntime` exports torch networks, so that all run on the same; None leaves each on its own.
        input_size: **shape** of one image, `(C, H, W)`, for files that leave it open.
        factory: `FILE:NAME` of the function that builds bundles' networks; its code runs in each process, too.
        build: that function.
        per_layer: whether to take the time of each node, too; torch networks are exported for that.
        limit: seconds after which a process that does not answer is given up.
    """

    threads: int = 1
    seconds: float = 4.0
    batch: int = 128
    seed: int = 0
    device: str = "cpu"
    runtime: str | None = None
    input_size: tuple[int, ...] | None = None
    factory: str | None = None
    build: Callable[..., Any] | None = None
    per_layer: bool = False
    limit: int = 300


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What a model took for batches of one size.

    Args:
        batch: images at a time.
        spread: of single runs.
        rounds: median of each round's runs, seconds.
        layout: how images lay in memory.
        ratio: how many times as fast as the first model; None where that has no such times.
    """

    batch: int
    spread: Spread
    rounds: tuple[float, ...]
    layout: str
    ratio: Ratio | None = None

    @property
    def images_per_second(self) -> float:
        """Throughput."""
        return self.batch / self.spread.median


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One model, measured.

    Args:
        name: as it was given.
        label: what to call it, short.
        runtime: torch or onnxruntime.
        device: where it ran.
        cost: on paper.
        memory: peak bytes of a fresh process that opens it and answers one image, `peak`; `before` it was opened.
        latency: of one image.
        throughput: of many images at a time; None where it takes one only.
        predicted: speed-up over the first model if time went by operations.
        verdict: against the first model, in words.
        notes: what else is to be known of its numbers.
        layers: its nodes with their times and layers, the slowest first; empty unless asked for.
    """

    name: str
    label: str
    runtime: str
    device: str
    cost: Cost
    memory: dict[str, int]
    latency: Phase
    throughput: Phase | None = None
    predicted: float | None = None
    verdict: str = ""
    notes: tuple[str, ...] = ()
    layers: tuple[dict[str, Any], ...] = ()

    @property
    def side(self) -> Side:
        """What a verdict has to know of it."""
        narrow = self.cost.weight_bits <= NARROW
        return Side(
            runtime=self.runtime,
            device=self.device,
            ops=self.cost.ops,
            # Codes of few bits that came out as 0 are no sparsity.
            zeros=self.cost.zeros if self.cost.masked is None or not narrow else self.cost.masked,
            simulated=self.cost.weight_bits if self.runtime == "torch" and narrow else None,
        )


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Models measured beside each other.

    Args:
        models: in the order that they were given in; the first is what others are compared with.
        options: how they were timed.
        cores: that they were pinned to; none where the system can't.
        machine: hardware and versions.
        waited: share of the time in which others held the core; None where the system does not tell.
        warnings: why its times may be wrong.
    """

    models: tuple[Timed, ...]
    options: Options
    cores: tuple[int, ...]
    machine: dict[str, Any]
    waited: float | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Give plain lists, dicts, strings and numbers; seconds and bytes throughout."""
        told = asdict(replace(self, options=replace(self.options, build=None)))
        del told["options"]["build"]
        for model, plain in zip(self.models, told["models"], strict=True):
            if model.throughput is not None:
                plain["throughput"]["images_per_second"] = model.throughput.images_per_second
        return {"format": "micronet bench", "version": 1} | told


def against(first: Timed, timed: Timed, options: Options) -> Timed:
    """A model with what it is beside the first."""
    latency, throughput = timed.latency, timed.throughput
    latency = replace(latency, ratio=speed_up(first.latency.rounds, latency.rounds, options.seed))
    if first.throughput is not None and throughput is not None:
        throughput = replace(throughput, ratio=speed_up(first.throughput.rounds, throughput.rounds, options.seed))
    return replace(
        timed,
        latency=latency,
        throughput=throughput,
        predicted=predicted(first.side, timed.side),
        verdict=verdict(first.side, timed.side, latency.ratio),
    )
