"""A full disk, Ctrl-C, and two commands at once: what was there stays, what is new is whole, nothing else is left."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open

import micronet.deploy as deploying
import micronet.pack as packing
import micronet.quantize as quantising
from callbacks.onnx_export import export_onnx
from callbacks.saving import whole_or_absent
from micronet import load
from micronet.bundle import Bundle, save
from micronet.data import digits
from micronet.factories import describe_factory
from micronet.models import separable_net
from micronet.pack import pack
from micronet.unpack import read

ROOT = Path(__file__).parent.parent
NETWORK = partial(separable_net, width_multiplier=0.125, num_classes=10)
PROVENANCE = {"resolved": {"recipe": {"data": {"call": "micronet.data.sources:digits", "valid": 0.2}}}}
RECIPE = '''
"""Two stages on few digits."""
from functools import partial
from micronet import Fit, Recipe
from micronet.data import digits
from micronet.models import separable_net

def recipe(*, epochs: int = 2, smoke: bool = False) -> Recipe:
    """Small."""
    net = partial(separable_net, width_multiplier=0.125)
    return Recipe(partial(digits, batch_size=32), net, (Fit("a", epochs=epochs, lr=0.05), Fit("b", epochs=1, lr=0.01)))
'''


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A network as a model file and packed; and its graph, which torch takes seconds to make."""
    folder, data = tmp_path_factory.mktemp("models"), digits(valid=0.2)
    torch.manual_seed(0)
    net = NETWORK().train()
    with torch.no_grad():
        for _ in range(3):  # statistics of BatchNorm
            net(torch.randn(64, 3, 32, 32))
    factory, kwargs = describe_factory(NETWORK)
    shown = {"classes": data.classes, "input_size": (3, 32, 32), "mean": data.mean, "std": data.std}
    bundle = Bundle(net.eval(), factory, kwargs, **shown, provenance=PROVENANCE)
    save(bundle, folder / "model.pth")
    pack(bundle, folder / "model.safetensors")
    (folder / "recipe.py").write_text(RECIPE)
    proto = export_onnx(net, (3, 32, 32))
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.MonkeyPatch.context() as patch:
        for module in (deploying, quantising):
            patch.setattr(
                module, "export_onnx", lambda model, size: onnx.ModelProto.FromString(proto.SerializeToString())
            )
        yield folder


def commands(models: Path, out: Path) -> dict[str, tuple]:
    """Every command that writes a file, by the name of the file."""
    model = models / "model.pth"
    few = ("--images", "64")
    return {
        "out.onnx": ("export", model, "-o", out / "out.onnx", *few),
        "int8.onnx": ("quantize", model, "-o", out / "int8.onnx", "--floor", "100", *few),
        "half.onnx": ("quantize", model, "--to", "float16", "-o", out / "half.onnx", "--floor", "100"),
        "small.pth": ("quantize", model, "--to", "minmax8", "-o", out / "small.pth", "--floor", "100"),
        "out.safetensors": ("pack", model, "-o", out / "out.safetensors"),
        "coded.safetensors": ("pack", model, "--code", "entropy", "-o", out / "coded.safetensors"),
        "out.pth": ("unpack", models / "model.safetensors", "-o", out / "out.pth"),
        "out.json": (
            *("sensitivity", model, "--data", "digits", "--limit", "32", "--ratios", "0.5"),
            *("--json", out / "out.json", "-o", out / "curves.png"),
        ),
        "out.png": ("evaluate", model, "--data", "digits", "-o", out / "out.png"),
        "bench.json": ("bench", models / "model.onnx", "--seconds", "0.05", "--json", out / "bench.json"),
    }


NAMES = list(commands(Path(), Path()))


@contextmanager
def small_disk(size: int):
    """No file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def out(tmp_path):
    """A folder with an earlier file under each name."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes(b"an earlier file")
    return folder


def without_progress(error: str) -> str:
    """What a command says but for what bench says of its doing."""
    return re.sub(r"^micronet: (opening 1 model|\d+ rounds of .*)\n", "", error, flags=re.MULTILINE)


def require_untouched(out: Path) -> None:
    assert sorted(file.name for file in out.iterdir()) == sorted(NAMES)
    assert all((out / name).read_bytes() == b"an earlier file" for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_one_line_and_the_earlier_file_stays(name, models, out, call):
    with small_disk(1000 if name.endswith(".json") else 3000):
        status, said, error = call(*commands(models, out)[name])
    measured = name in ("out.png", "out.json", "bench.json")
    assert (status, bool(said)) == (1, measured)  # numbers that were measured are not lost with their file
    assert without_progress(error) == f"micronet: {out / name}: File too large\n"
    require_untouched(out)


def test_a_full_disk_in_a_fit_leaves_what_goes_on(models, tmp_path, call):
    """The checkpoint of the first stage no longer fits, then what is drawn of it; with more room the fit goes on."""
    run = ("fit", models / "recipe.py", "-o", tmp_path / "run", "--limit", "64")
    for size in (2_000, 40_000):
        with small_disk(size):
            status, _, error = call(*run)
        assert status == 1
        assert re.search(rf"micronet: {tmp_path}/run/.*: File too large\n$", error)
        assert not [file for file in (tmp_path / "run").rglob("*") if ".tmp." in file.name]
    assert call(*run)[0] == 0
    assert load(tmp_path / "run" / "model.pth").classes


class Interrupt:
    """Raises at the call of a function that is reached after so many."""

    def __init__(self, at: int) -> None:
        self.left, self.raised = at, False

    def around(self, function):
        def counted(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                self.raised = True
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return counted


SLOWER = ("half.onnx", "coded.safetensors", "out.json", "out.png", "bench.json")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOWER else []) for name in NAMES]
)
def test_ctrl_c_leaves_the_earlier_file_and_no_other(name, models, out, call):
    """At files that are opened or written, at each renaming, at runs of the network."""
    arguments, others = commands(models, out)[name], {"out.json": "curves.png"}.get(name)
    places = (
        (Path, "write_bytes", (1, 2)),
        (Path, "write_text", (1,)),
        (Path, "replace", (1, 2)),
        (Path, "open", (1, 3)),
        (os, "fsync", (1,)),
        (onnxruntime.InferenceSession, "run", (1, 2)),
    )
    times = 0
    for place, function, moments in places:
        for at in moments:
            stop = Interrupt(at)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(place, function, stop.around(getattr(place, function)))
                status, said, error = call(*arguments)
            if not stop.raised:
                (out / name).write_bytes(b"an earlier file")
                if others:
                    (out / others).unlink()
                break
            times += 1
            assert (status, without_progress(error)) == (130, "\nmicronet: interrupted\n"), (function, at, said)
            if others and (out / others).exists():
                (out / others).unlink()
            if others and (out / name).read_bytes() != b"an earlier file":  # between the two
                (out / name).write_bytes(b"an earlier file")
            require_untouched(out)
    assert times >= 2
    assert call(*arguments)[0] == 0
    assert (out / name).read_bytes() != b"an earlier file"


def test_two_writers_of_one_file_have_places_of_their_own(tmp_path):
    """Also where they have one number: in two containers."""
    path = tmp_path / "file"
    with whole_or_absent(path) as one, whole_or_absent(path) as other:
        assert one != other
        one.write_bytes(b"one")
        other.write_bytes(b"other")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def content(path: Path) -> bytes | str:
    """What tells two files apart; safetensors writes the parts of a header in any order."""
    if path.suffix == ".onnx":
        return path.read_bytes()
    with safe_open(path, framework="numpy") as file:
        return file.metadata()["sha256"]


def test_two_commands_that_write_one_file_do_not_mix(models, tmp_path, call, monkeypatch):
    """The second begins and ends while the first has written and not yet kept: both are whole, the last one stays."""
    seen = []

    def meanwhile(module, step, name, other):
        original = getattr(module, step)

        def first(*args, **kwargs):
            monkeypatch.setattr(module, step, original)
            assert call(*other)[0] == 0
            seen.append(content(tmp_path / name))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, step, first)

    for module, step, name in (
        (packing, "read", "out.safetensors"),
        (deploying, "_check", "out.onnx"),
        (deploying, "_require_written", "out.onnx"),
    ):
        command = commands(models, tmp_path)[name]
        other = (*command, "--normalise") if name == "out.onnx" else (*command, "--float16")
        meanwhile(module, step, name, other)
        assert call(*command)[0] == 0
        last = content(tmp_path / name)
        assert call(*other)[0] == 0
        assert seen.pop() == content(tmp_path / name) != last
        assert call(*command)[0] == 0
        assert content(tmp_path / name) == last
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.onnx", "out.safetensors"]


def started(*arguments) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "micronet", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# A command that fails, and a signal at a moment after that.
STRUCK = """
import os, signal, sys
from micronet import cli

number, moment = int(sys.argv.pop()), sys.argv.pop()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background has it ignored

def struck(function):
    def with_signal(told):
        os.kill(os.getpid(), number)
        return function(told)
    return with_signal

if moment == "before it is said":
    cli._fail = struck(cli._fail)
if moment == "while it is said":
    cli.printable = struck(cli.printable)
try:
    cli.main()
finally:
    if moment == "after it is said":
        os.kill(os.getpid(), number)
"""


@pytest.mark.parametrize("moment", ["before it is said", "while it is said", "after it is said"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_the_end_does_not_undo_the_exit_status(number, moment, tmp_path):
    command = [sys.executable, "-c", STRUCK, "score", tmp_path / "none.pth", moment, str(int(number))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if moment == "before it is said":
        assert (done.returncode, done.stderr) == (130, "\nmicronet: interrupted\n")
    else:
        assert done.returncode == 1
        assert re.fullmatch(r"micronet: .*none\.pth: .*\n", done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_at_any_moment(name, number, models, out):
    """Real processes, ended at moments between their first and their last."""
    arguments = commands(models, out)[name]
    began = time.monotonic()
    process = started(*arguments)
    process.communicate()
    took = time.monotonic() - began
    (out / "curves.png").unlink(missing_ok=True)
    (out / name).write_bytes(b"an earlier file")
    ended = 0
    for share in (0.3, 0.6, 0.75, 0.85, 0.95):
        process = started(*arguments)
        time.sleep(share * took)
        process.send_signal(number)
        said, error = process.communicate(timeout=120)
        if process.returncode:
            ended += 1
            assert (process.returncode, without_progress(error)) == (130, "\nmicronet: interrupted\n")
        (out / "curves.png").unlink(missing_ok=True)
        if (out / name).read_bytes() != b"an earlier file":
            assert not process.returncode or name == "out.json" or said
            (out / name).write_bytes(b"an earlier file")
        require_untouched(out)
    assert ended


@pytest.mark.slow
def test_two_commands_at_once(models, tmp_path):
    """The same output twice, a fit in one folder twice, quantize while export writes beside it."""
    out = tmp_path / "out"
    out.mkdir()
    same = [
        started(*commands(models, out)[name]) for name in ("out.onnx", "out.onnx", "int8.onnx", "out.safetensors") * 2
    ]
    fits = [started("fit", models / "recipe.py", "-o", tmp_path / "run", "--limit", "64") for _ in range(2)]
    for process in same:
        _, error = process.communicate(timeout=400)
        assert (process.returncode, error) == (0, "")
    told = [(process.communicate(timeout=400)[1], process.returncode) for process in fits]
    assert sorted(status for _, status in told) in ([0, 0], [0, 1])
    for error, status in told:
        assert status == 0 or "another micronet works in this folder; wait for it" in error
    assert sorted(file.name for file in out.iterdir()) == ["int8.onnx", "out.onnx", "out.safetensors"]
    for name in ("int8.onnx", "out.onnx"):
        onnx.checker.check_model(out / name, full_check=True)
    assert read(out / "out.safetensors").bundle.classes
    assert load(tmp_path / "run" / "model.pth").classes
