"""What several test files share: the command line, an empty cache, real digits as files, the archives of real CIFAR."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from micronet import MicronetError, cli

# Workers side by side share the cores: one thread each, of the programs that tests start, too. Set before torch comes.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

TESTS = Path(__file__).resolve().parent
ARCHIVES = Path(os.environ.get("MICRONET_DATA") or TESTS.parents[1] / "shared" / "data").resolve()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Workers take 10 s to start: they are for the whole suite, not for tests that are named, watched or timed."""
    whole = all(Path(place).resolve() in (TESTS, TESTS.parent) for place in config.args)
    chosen = any(config.getoption(name, False) for name in ("keyword", "deselect", "lf", "failedfirst", "stepwise"))
    watched = config.getoption("capture") == "no"
    marks = config.getoption("markexpr")
    timed = "benchmark" in marks and "not benchmark" not in marks
    return None if whole and not (chosen or watched or timed) else 0  # None: a worker for each core


@pytest.fixture
def archive():
    """The path of a real archive by its name; without it, the test is skipped."""

    def find(name):
        path = ARCHIVES / f"{name}.tgz"
        if not path.is_file():
            pytest.skip(f"real {name} is not here: {path} is missing (set MICRONET_DATA)")
        return path

    return find


@pytest.fixture(scope="session")
def real():
    """Make a data set of real images by its function; where the images are not to be had, the test is skipped."""

    def make(source, **arguments):
        with pytest.MonkeyPatch.context() as patch:
            if ARCHIVES.is_dir():
                patch.setenv("MICRONET_DATA", str(ARCHIVES))
            try:
                return source(**arguments)
            except MicronetError as error:
                pytest.skip(f"{source.__name__} is not here: {error}")

    return make


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of its own."""
    monkeypatch.setenv("MICRONET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def in_process():
    """Run a command line in this process, which keeps its arguments and handlers of signals; returns exit status."""

    def run(*arguments):
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        argv, handlers = sys.argv, [signal.getsignal(number) for number in numbers]
        sys.argv = ["micronet", *map(str, arguments)]
        try:
            cli.main()
            return 0
        except SystemExit as end:
            return end.code or 0
        finally:
            sys.argv = argv
            for number, handler in zip(numbers, handlers, strict=True):
                if signal.getsignal(number) is not handler:  # only the main thread may set any
                    signal.signal(number, handler)

    return run


@pytest.fixture
def call(capsys, monkeypatch, in_process):
    """Run a command line in this process; returns exit status, standard output, standard error."""

    def run(*arguments):
        return in_process(*arguments), *capsys.readouterr()

    monkeypatch.setenv("MICRONET_DATA", "")  # so that the one that a command sets is undone
    monkeypatch.delenv("MICRONET_DATA")
    return run


@pytest.fixture
def digit():
    """A real digit, by its number, as a grey 8x8 picture."""
    from sklearn.datasets import load_digits  # slow to import, and most test files need none

    images = load_digits().images
    return lambda i: Image.fromarray((images[i] * 15).astype(np.uint8))


@pytest.fixture
def tree(digit):
    """Fill folders with real digits, in one file format."""

    def fill(root, folders, each=5, suffix="png"):
        for k, folder in enumerate(folders):
            (root / folder).mkdir(parents=True)
            for i in range(each):
                digit(each * k + i).save(root / folder / f"{i}.{suffix}")
        return root

    return fill
