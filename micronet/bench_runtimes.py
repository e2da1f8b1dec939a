"""A model opened in a runtime, ready to answer batches of random images: onnxruntime without torch, or torch.

Images are of random numbers, normally distributed, as normalised ones about are: what dense kernels take does not hang
on the numbers.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from micronet.errors import MicronetError, first_line

Run = Callable[[], Any]
PROFILED = 50  # runs; the profiler writes half a kilobyte for each node of each
TRIES = 3  # runs of each way, of which the fastest counts
_TYPES = {"float": "float32", "float16": "float16", "double": "float64", "uint8": "uint8", "int8": "int8"}


def peak_memory() -> int:
    """The most bytes of memory that this process has had at once.

    Linux hands `ru_maxrss` on from the process that started this one, so that a large parent would be measured; VmHWM
    is this program's own.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmHWM" in fields:
            return int(fields["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _quickest(run: Run) -> float:
    """Seconds of the fastest of a few runs; of one, where that is long enough to tell."""
    times: list[float] = []
    while len(times) < TRIES and sum(times) < 1:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


class OnnxModel:
    """An ONNX file in onnxruntime, on the CPU.

    Args:
        job: as `Worker` takes it.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        import onnxruntime

        self.path, self.version = job["model"], onnxruntime.__version__
        self.threads = job["threads"]
        self.before = peak_memory()
        self.session = self._open(self.path)
        inputs = self.session.get_inputs()
        if len(inputs) != 1:
            raise MicronetError(f"{self.path}: takes {len(inputs)} inputs, and bench gives one: images")
        self.given = inputs[0]
        self.shape, self.batch = self._shape(job["input_size"])
        kind = self.given.type.removeprefix("tensor(").removesuffix(")")
        if kind not in _TYPES:
            raise MicronetError(f"{self.path}: takes {self.given.type}, which are no numbers of an image")
        self.dtype = _TYPES[kind]

    def _open(self, path: str, prefix: str | None = None) -> Any:
        from onnxruntime import SessionOptions

        from micronet.onnx_session import open_session

        options = SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        # Threads that have nothing to do spin for a while, as they do where it is deployed, but not into the turn of
        # another model.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if prefix is not None:
            options.enable_profiling, options.profile_file_prefix = True, prefix
        return open_session(path, options)

    def _shape(self, size: list[int] | None) -> tuple[tuple[int, ...], int | None]:
        """**Shape** of one image, and how many the file takes at a time; None for any number."""
        said = [n if isinstance(n, int) and n > 0 else None for n in self.given.shape]
        first, *rest = said if len(said) != 3 else (1, *said)
        if size and (len(size) != len(rest) or any(n not in (None, m) for n, m in zip(rest, size, strict=True))):
            wants = "x".join("any" if n is None else str(n) for n in rest)
            raise MicronetError(f"{self.path}: takes images of {wants}, not {'x'.join(map(str, size))}")
        if None in rest and not size:
            raise MicronetError(
                f"{self.path}: leaves the size of its images open; give --input-size, such as 3x224x224"
            )
        if first not in (None, 1):
            raise MicronetError(f"{self.path}: was made for {first} images at a time; export it for any number")
        self.has_batch = len(said) != 3
        return tuple(size or rest), first

    def told(self) -> dict[str, Any]:
        """What it runs with."""
        return {"runtime": "onnxruntime", "version": self.version, "input": list(self.shape), "most": self.batch}

    def images(self, batch: int) -> np.ndarray:
        """Images of random numbers."""
        shape = (batch, *self.shape) if self.has_batch else self.shape
        return np.random.default_rng(0).standard_normal(shape).astype(self.dtype)

    def runs(self, batch: int) -> Run:
        """What answers a batch."""
        from micronet.onnx_session import cannot_run

        feed, session = {self.given.name: self.images(batch)}, self.session
        try:
            session.run(None, feed)
        except Exception as error:  # onnxruntime's own errors share no class
            raise cannot_run(self.path, error) from error
        return lambda: session.run(None, feed)

    def fastest(self, batch: int) -> tuple[Run, float, str]:
        """What answers a batch, how long it takes, and how images lie in memory."""
        run = self.runs(batch)
        return run, _quickest(run), "channels first"

    def layers(self) -> list[dict[str, Any]]:
        """The time of each node for one image, as onnxruntime runs it: fused."""
        from micronet.bench_layers import read_profile, with_names

        with tempfile.TemporaryDirectory(prefix="micronet-") as folder:
            file, layer_of = with_names(Path(self.path), Path(folder))
            session = self._open(str(file), str(Path(folder) / "profile"))
            feed = {self.given.name: self.images(1)}
            for _ in range(PROFILED):
                session.run(None, feed)
            nodes = read_profile(Path(session.end_profiling()))
            return [node | {"layer": layer_of(node["name"])} for node in nodes]


class TorchModel:
    """A network in torch: eager, eval mode, float32, its layers as the file has them.

    Args:
        job: as `Worker` takes it.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        import torch

        from micronet.cli_options import find_users_factory
        from micronet.model_source import DEFAULT_SIZE, open_model
        from micronet.named_networks import build_named

        torch.set_num_threads(job["threads"])
        torch.set_num_interop_threads(1)
        torch.backends.cudnn.allow_tf32 = False  # which rounds float32 to ten bits of mantissa
        self.device = torch.device(job["device"])
        self.before = peak_memory()
        source = open_model(job["model"], input_size=job["input_size"], factory=find_users_factory(job["factory"]))
        module = source.module
        if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            module, _ = build_named(job["model"], with_weights=True)  # named, not trained: as fast as any other weights
        self.module = module.float().eval().to(self.device)
        self.size = tuple(source.input_size or DEFAULT_SIZE)
        self.name = job["model"]

    def told(self) -> dict[str, Any]:
        """What it runs with."""
        import torch

        told = {"runtime": "torch", "version": torch.__version__, "input": list(self.size), "most": None}
        if self.device.type == "cuda":
            told["device_peak"] = torch.cuda.max_memory_allocated(self.device)
        return told

    def runs(self, batch: int, layout: str = "channels first") -> Run:
        """What answers a batch that lies in memory in one way, the weights in the same."""
        import torch

        form = torch.channels_last if layout == "channels last" else torch.contiguous_format
        images = torch.from_numpy(np.random.default_rng(0).standard_normal((batch, *self.size)).astype("float32"))
        images = images.to(self.device, memory_format=form if images.ndim == 4 else torch.contiguous_format)
        module, on_gpu = self.module.to(memory_format=form), self.device.type == "cuda"

        @torch.inference_mode()
        def run() -> None:
            module(images)
            if on_gpu:
                torch.cuda.synchronize(self.device)

        try:
            run()
        except Exception as error:  # a network's own code can fail in any way
            raise MicronetError(f"{self.name}: its network can't answer: {first_line(error)[:200]}") from error
        return run

    def fastest(self, batch: int) -> tuple[Run, float, str]:
        """What answers a batch in the faster of two layouts, how long it takes, and which that is."""
        layouts = ("channels first", "channels last") if len(self.size) == 3 else ("channels first",)
        # A network lies in memory in one way at a time: each is timed before the other is made.
        seconds = {layout: _quickest(self.runs(batch, layout)) for layout in layouts}
        best = min(seconds, key=seconds.get)
        return self.runs(batch, best), seconds[best], best
