"""What several test files share: an empty cache, real digits as files, the archives of real CIFAR."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from micronet import MicronetError

ARCHIVES = Path(os.environ.get("MICRONET_DATA") or Path(__file__).parents[2] / "shared" / "data").resolve()


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
