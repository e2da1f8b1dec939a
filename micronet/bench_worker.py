"""The process that runs one model for `micronet bench`: a line of JSON says what to do, a line of JSON is the answer.

A process for each model, because its peak memory is to be that of a process that opens the file and answers one image,
and because one model's allocator and threads are not to disturb another. An ONNX file is run without importing torch.
The first line is the job, each later one an order; the end of its input is the end of the process.

Times are of the wall clock (`perf_counter`): that is what a user waits. CPU time would add up over threads, would count
a pool's spinning as work, and knows nothing of a GPU. With one thread, where the kernel tells, the time is taken off
in which the process stood ready while others had its core: a run that is longer than a scheduler's turn bears all of
that, a short one none, so that ratios would be wrong, too. What a hypervisor takes is not seen.
"""

import gc
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import IO, Any

from micronet.bench_runtimes import OnnxModel, Run, TorchModel, peak_memory
from micronet.errors import MicronetError, first_line

WARM = 0.1  # share of a turn that is run before times are taken: caches hold what the model before left there


def main() -> None:
    """Do what the lines on standard input say, until there are none."""
    # Whatever a library prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline() or "null")
    if job is None:
        return
    signal.alarm(job["limit"])  # its default ends a process in any state, whether or not there still is a parent
    _answer(answers, lambda: _serve(job, answers))


def _serve(job: dict[str, Any], answers: IO[str]) -> None:
    worker = Worker(job)
    _tell(answers, worker.opened())
    signal.alarm(0)
    for line in sys.stdin:
        signal.alarm(job["limit"])
        order = json.loads(line)
        _tell(answers, getattr(worker, order.pop("do"))(**order))
        signal.alarm(0)


def _answer(answers: IO[str], work: Run) -> None:
    try:
        work()
    except MemoryError:
        _tell(answers, {"error": "out of memory"})
    except Exception as error:  # a runtime and a network's own code can fail in any way
        said = str(error) if isinstance(error, MicronetError) else first_line(error)
        _tell(answers, {"error": said[:300] or type(error).__name__})


def _tell(answers: IO[str], content: Any) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


class Waits:
    """Seconds in which this process's main thread stood ready while others had its core; zero where nobody tells.

    Source: the Linux kernel's documentation, "Scheduler Statistics": the second number of /proc/PID/schedstat.
    """

    def __init__(self) -> None:
        place = Path("/proc/self/schedstat")
        self.file = os.open(place, os.O_RDONLY) if place.exists() else None

    def __call__(self) -> float:
        """Seconds since the process started."""
        return 0.0 if self.file is None else int(os.pread(self.file, 80, 0).split()[1]) / 1e9


class Worker:
    """One model, opened and run.

    Args:
        job: `model`, `runtime`, `threads`, `cores`, `device`, `input_size`, `factory`, `limit` (seconds for an order).
    """

    def __init__(self, job: dict[str, Any]) -> None:
        if job["cores"]:
            os.sched_setaffinity(0, job["cores"])
        kind = OnnxModel if job["runtime"] == "onnxruntime" else TorchModel
        self.model = kind(job)
        self.run: Run = lambda: None
        self.estimate, self.waits, self.threads = 0.0, Waits(), job["threads"]

    def opened(self) -> dict[str, Any]:
        """Answer one image, and say what memory that took, and with what it ran."""
        self.model.runs(1)()
        return self.model.told() | {"memory": {"before": self.model.before, "peak": peak_memory()}}

    def prepare(self, batch: int) -> dict[str, Any]:
        """Make ready to run batches of a size, and say how long one takes.

        Args:
            batch: images at a time.
        """
        self.run, self.estimate, layout = self.model.fastest(batch)
        return {"seconds": self.estimate, "layout": layout}

    def time(self, seconds: float) -> dict[str, Any]:
        """Take the times of single runs, at least of one.

        Args:
            seconds: how long to go on.
        """
        run, clock, waits, times = self.run, time.perf_counter, self.waits, []
        gc.collect()
        gc.disable()
        try:
            warm = clock() + WARM * seconds
            while self.estimate < WARM * seconds and clock() < warm:
                run()
            stood, began = waits(), clock()
            end = began
            while not times or end - began < seconds:
                stood_before = waits()
                start = clock()
                run()
                end = clock()
                stood_in_it = waits() - stood_before if self.threads == 1 else 0.0
                # What was waited between the two clocks' readings is not of this run.
                times.append(end - start - stood_in_it if stood_in_it < end - start else end - start)
        finally:
            gc.enable()
        return {"times": times, "waited": waits() - stood if waits.file else None, "elapsed": clock() - began}

    def layers(self) -> dict[str, Any]:
        """Take the time of each node, by onnxruntime's profiler."""
        return {"layers": self.model.layers()}


if __name__ == "__main__":
    main()
