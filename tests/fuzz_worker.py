"""Reads strangers' files for `test_fuzz.py`, in a process of its own: one request a line, one answer a line, both JSON.

Whatever dies, hangs or eats memory here is not the test. Memory and computing time are limited, and Python's audit
events tell what a file made it do: run a program, write, connect, read somewhere else.
"""

import json
import os
import resource
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

SPARE_BYTES = 1 << 30  # that an input may take
CPU_SECONDS = 30  # that it may compute
RUNS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
    "pty.spawn",
)
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "shutil.rmtree")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

heard: list[str] = []
listening = False


def hear(event: str, arguments: tuple) -> None:
    """Note what nothing that is read may cause."""
    if not listening:
        return
    if event == "open":
        path, _, flags = arguments
        written = isinstance(flags, int) and flags & WRITING and path != os.devnull
        if written or str(path) in ("/etc/passwd", "/dev/zero"):
            heard.append(f"open {path!r} {flags}")
    elif event in RUNS or (event in CHANGES and not (event == "os.mkdir" and os.path.isdir(arguments[0]))):
        heard.append(f"{event} {arguments!r:.200}")


def readers() -> dict[str, Callable[[str], object]]:
    """What reads files, by name; imported before memory is limited."""
    import numpy as np
    import torch

    from micronet.bundle import load
    from micronet.deploy import _check
    from micronet.measure import OnnxModule
    from micronet.model_source import open_model
    from micronet.onnx_meta import read_meta
    from micronet.predict import open_predictor, pixels_of
    from micronet.score import score
    from micronet.sensitivity import ratios_from

    image = Path(sys.argv[1])

    @torch.no_grad()
    def answered(path: str) -> object:
        """As evaluate does: our own reader first, then onnxruntime."""
        source = open_model(path)
        source.graph()
        return OnnxModule(source.path)(torch.zeros(2, 3, 8, 8)).shape

    return {
        "bundle": load,
        "state": lambda path: open_model(path, arch="micronet:separable_net,num_classes=3,width_multiplier=0.125"),
        "score": score,
        "meta": read_meta,
        "evaluate": answered,
        "predict": lambda path: open_predictor(path)(image, 5),
        "checker": lambda path: _check(Path(path)),
        "curves": ratios_from,
        "image": lambda path: np.array(pixels_of(Path(path), 16)),
    }


def starved(error: BaseException | None) -> bool:
    """Whether an error began as one of memory."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def main() -> None:
    """Answer until there are no more requests."""
    global listening
    known = readers()
    warnings.simplefilter("error")  # as in tests
    sys.addaudithook(hear)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        reader, path = json.loads(line)
        from micronet.errors import MicronetError, printable

        used = resource.getrusage(resource.RUSAGE_SELF)
        spent = int(used.ru_utime + used.ru_stime)
        resource.setrlimit(resource.RLIMIT_CPU, (spent + CPU_SECONDS, resource.RLIM_INFINITY))
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + SPARE_BYTES, resource.RLIM_INFINITY))
        heard.clear()
        listening, result = True, {}
        try:
            if reader.startswith("!"):  # what the worker is to see, by the test of itself
                exec(reader[1:], {"os": os, "path": path})
            else:
                known[reader](path)
            result = {"outcome": "answered"}
        except MicronetError as error:
            result = {"outcome": "refused", "told": printable(str(error)), "starved": starved(error)}
        except BaseException:
            result = {"outcome": "raised", "told": traceback.format_exc()[-1500:]}
        listening = False
        print(json.dumps(result | {"heard": heard}), file=answers, flush=True)


if __name__ == "__main__":
    main()
