"""The parent's side of `bench_worker.py`: processes that are started, asked, and ended whatever happens."""

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import micronet
from micronet.errors import MicronetError, first_line

GRACE = 10.0  # seconds that a process has beyond its own alarm
LOOK = 0.3  # seconds in which it is seen what others take of each core
HELD = 3  # fifths of a core that others take, from which on it is theirs
_POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def pick_cores(threads: int) -> list[int]:
    """Cores to pin processes to, one for each thread; none where the system can't pin, or where others hold all cores.

    The idlest ones; among those one of each physical core as long as there are enough, and the last, for the first
    serve most interrupts.

    Args:
        threads: how many.

    Raises:
        MicronetError: there are fewer cores.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    allowed = os.sched_getaffinity(0)
    if threads > len(allowed):
        raise MicronetError(f"--threads {threads}: this process may use {len(allowed)} cores; give at most as many")
    taken = _taken()
    order = sorted(allowed, key=lambda core: (taken.get(core, 0), -core))
    siblings = [_siblings(core) for core in order]
    second = {core for place, core in enumerate(order) if siblings[place] in siblings[:place]}
    chosen = sorted(order, key=lambda core: (taken.get(core, 0) >= HELD, core in second))[:threads]
    # Pinned beside somebody who never leaves, a process would wait while another core has a pause.
    return [] if any(taken.get(core, 0) >= HELD for core in chosen) else sorted(chosen)


def _siblings(core: int) -> str:
    """The cores that share a physical core with one, as Linux writes them."""
    place = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    return place.read_text().strip() if place.exists() else str(core)


def _taken() -> dict[int, int]:
    """How much of each core others take just now, in fifths: less is noise."""
    before = _busy_seconds()
    time.sleep(LOOK)
    now = _busy_seconds()
    return {core: round(5 * (now[core] - before.get(core, 0)) / LOOK) for core in now}


def _busy_seconds() -> dict[int, float]:
    """Seconds since it started that each core was not idle; nothing where the system does not tell.

    Source: the Linux manual, proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal, in clock ticks.
    """
    place = Path("/proc/stat")
    lines = [line.split() for line in place.read_text().splitlines()] if place.exists() else []
    tick = os.sysconf("SC_CLK_TCK")
    cores = {int(name[3:]): list(map(int, rest)) for name, *rest in lines if re.fullmatch(r"cpu\d+", name)}
    return {core: (sum(ticks[:8]) - sum(ticks[3:5])) / tick for core, ticks in cores.items()}


class Process:
    """A process that runs one model.

    Args:
        name: of the model, for messages.
        job: what `bench_worker.Worker` takes.
    """

    def __init__(self, name: str, job: dict[str, Any]) -> None:
        self.name, self.limit, self.unread = name, job["limit"], b""
        root = str(Path(micronet.__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        threads = dict.fromkeys(_POOLS, str(job["threads"]))
        self.said = tempfile.TemporaryFile()  # noqa: SIM115  closed in __exit__
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "micronet.bench_worker"],  # -P: a micronet.py in this folder is not ours
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            env=os.environ | threads | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C comes to the parent alone, which ends them all
        )
        self.send(job)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.said):
            stream.close()
        with suppress(BrokenPipeError):  # an order that it did not read
            self.process.stdin.close()

    def ask(self, **order: Any) -> dict[str, Any]:
        """Give an order and wait for the answer.

        Args:
            order: `do`, a method of `bench_worker.Worker`, and its arguments.

        Raises:
            MicronetError: it fails, ends, or does not answer.
        """
        self.send(order)
        return self.answer()

    def send(self, content: dict[str, Any]) -> None:
        """Send a line."""
        try:
            self.process.stdin.write(json.dumps(content).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error

    def answer(self) -> dict[str, Any]:
        """Wait for a line.

        Raises:
            MicronetError: it fails, ends, or does not answer.
        """
        answer = json.loads(self._line())
        if "error" in answer:
            said = answer["error"]
            raise MicronetError(said if self.name in said else f"{self.name}: {said}")
        return answer

    def _line(self) -> bytes:
        end = time.monotonic() + self.limit + GRACE
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.unread:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise self._late()
                part = os.read(self.process.stdout.fileno(), 1 << 16)
                if not part:
                    raise self._ended()
                self.unread += part
        line, _, self.unread = self.unread.partition(b"\n")
        return line

    def _late(self) -> MicronetError:
        return MicronetError(f"{self.name}: its process did not answer within {self.limit} s, and was ended")

    def _ended(self) -> MicronetError:
        """Why a process has gone."""
        self.process.kill()
        code = self.process.wait()
        if code == -signal.SIGALRM:
            return self._late()
        if code == -signal.SIGKILL:
            return MicronetError(f"{self.name}: its process was killed: out of memory, or by somebody")
        if code < 0:
            return MicronetError(f"{self.name}: its process crashed ({signal.Signals(-code).name}); is the file sound?")
        self.said.seek(0)
        last = self.said.read().decode(errors="replace").strip().rpartition("\n")[2]
        return MicronetError(f"{self.name}: its process ended: {first_line(RuntimeError(last))[:200] or code}")
