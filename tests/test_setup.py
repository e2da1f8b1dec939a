"""setup.sh, run for real on a copy: a real virtual environment and a real pip, tiny packages, no network."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASH = shutil.which("bash") or "/bin/bash"

# A build backend of 15 lines, because the real one would have to come from an index.
BACKEND = """
import pathlib, zipfile
def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "micronet-0.1.0-py3-none-any.whl"
    info = "micronet-0.1.0.dist-info/"
    files = {
        "micronet.pth": str(pathlib.Path.cwd()),
        info + "METADATA": "Metadata-Version: 2.1\\nName: micronet\\nVersion: 0.1.0\\n",
        info + "WHEEL": "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
        info + "entry_points.txt": "[console_scripts]\\nmicronet = stub_cli:main\\n",
    }
    with zipfile.ZipFile(pathlib.Path(folder, name), "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(info + "RECORD", "".join(f"{path},,\\n" for path in [*files, info + "RECORD"]))
    return name
"""


def write_wheel(folder: Path, version: str) -> None:
    """A wheel of the package `stub`, whose one module says its version."""
    info = f"stub-{version}.dist-info"
    files = {
        "stub/__init__.py": f"version = {version!r}\n",
        "stub/data.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: stub\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / f"stub-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]))


class Project:
    """A copy of setup.sh among stand-ins for everything else."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.root = root
        self.wheels = root.parent / "wheels"
        self.wheels.mkdir()
        for version in ("1.0", "2.0"):
            write_wheel(self.wheels, version)
        shutil.copy(ROOT / "setup.sh", root)
        (root / "backend.py").write_text(BACKEND)
        (root / "stub_cli.py").write_text("import sys\n\n\ndef main():\n    print('micronet', *sys.argv[1:])\n")
        (root / "pyproject.toml").write_text(
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        )
        self.require("1.0")

    @property
    def site(self) -> Path:
        """Where the environment keeps its packages."""
        return next((self.root / ".venv/lib").glob("python*/site-packages"))

    def require(self, version: str) -> None:
        """Pin `stub` to a version, to be found among the wheels made here and nowhere else."""
        self.version = version
        lines = ["--no-index", f"--find-links {self.wheels}", f"stub=={version}"]
        (self.root / "requirements.txt").write_text("\n".join(lines) + "\n")

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Start setup.sh, from another folder than its own."""
        return subprocess.Popen(
            [BASH, str(self.root / "setup.sh"), *arguments],
            env={**os.environ, "PYTHON": sys.executable, **env},
            cwd=self.root.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, status: int = 0, **env: str) -> tuple[str, str]:
        """What setup.sh wrote to stdout and to stderr, once it ended with that exit status."""
        process = self.start(*arguments, **env)
        out, err = process.communicate(timeout=120)
        assert process.returncode == status, f"exit status {process.returncode}\n{out}\n{err}"
        return out, err

    def works(self) -> str:
        """Check that a command finds the package as it is pinned; return what setup.sh said on the way there."""
        out, err = self.run("python", "-c", "import stub, stub.data; print(stub.version)")
        assert out.strip() == self.version
        return err


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("setup") / "a project")
    out, err = project.run()
    assert "micronet fit recipes/quickstart.py" in out
    assert "installing 1 packages" in err
    return project


@contextmanager
def dying_pip(project: Project) -> Iterator[Path]:
    """While this lasts, pip kills itself as `kill -9` would; the file it leaves says that it was called."""
    main = project.site / "pip/__main__.py"
    called = project.root.parent / "pip-was-called"
    text = main.read_text()
    # `pip --version` is how setup.sh asks whether there is a pip at all.
    main.write_text(
        "import os, sys\nif sys.argv[1] == '--version':\n    sys.exit()\n"
        f"open({str(called)!r}, 'w').close()\nos.kill(os.getpid(), {signal.SIGKILL:d})\n"
    )
    try:
        yield called
    finally:
        main.write_text(text)
        called.unlink(missing_ok=True)


def write_script(path: Path, text: str) -> str:
    path.write_text(f"#!{BASH}\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_the_command_gets_its_arguments_its_folder_and_its_status_back(project: Project) -> None:
    code = "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['VIRTUAL_ENV']); sys.exit(7)"
    out, err = project.run("python", "-c", code, "two words", "", "--data", "*", status=7)
    arguments = ["two words", "", "--data", "*"]
    assert out.strip() == f"{arguments} {project.root.parent.resolve()} {project.root.resolve() / '.venv'}"
    assert err == ""


def test_a_second_call_does_not_run_pip(project: Project) -> None:
    with dying_pip(project) as called:
        assert project.works() == ""
        assert not called.exists()


def test_progress_is_shown_while_pip_works_and_ends_with_it(project: Project) -> None:
    main = project.site / "pip/__main__.py"
    text = main.read_text()
    main.write_text(
        "import sys, time\nif 'install' in sys.argv:\n"
        "    print('Downloading stub-1.0 (900.1 MB)', flush=True)\n    time.sleep(2.5)\n"
    )
    (project.root / ".venv/.micronet-installed").unlink()
    try:
        _, err = project.run("true")
    finally:
        main.write_text(text)
    said = re.findall(r"setup.sh: 0:0(\d), (\d) packages in place; Downloading stub-1.0 \(900.1 MB\)\n", err)
    assert said[0][1] == str(len(list(project.site.glob("*.dist-info"))))
    assert 2 <= len(said) <= 4  # two calls of pip
    (project.root / ".venv/.micronet-installed").unlink()
    assert "installing" in project.works()


def test_data_is_fetched_before_the_command(project: Project) -> None:
    out, err = project.run("--data", "cifar10", "--data=cifar100", "python", "-c", "print('command')")
    assert (out.split("\n"), err) == (
        ["micronet data fetch cifar10", "micronet data fetch cifar100", "command", ""],
        "",
    )


def test_an_install_killed_halfway_is_finished_by_the_next_call(project: Project) -> None:
    before = project.version
    with dying_pip(project) as called:
        project.require("3.0")
        _, err = project.run("true", status=1)
        assert called.exists()
        assert "pip failed" in err
        # The pins are as they were before, but the killed pip may have changed anything: nothing counts as installed.
        called.unlink()
        project.require(before)
        project.run("true", status=1)
        assert called.exists()
    assert "installing" in project.works()


def test_pip_errors_are_shown_and_new_pins_are_installed(project: Project) -> None:
    project.require("3.0")
    _, err = project.run("true", status=1)
    assert "No matching distribution found for stub==3.0" in err
    assert "run ./setup.sh again" in err
    project.require("2.0")
    assert "installing" in project.works()


@pytest.mark.parametrize("lost", ["stub", "../../../bin/micronet"])
def test_a_lost_package_is_noticed_and_put_back(project: Project, lost: str) -> None:
    path = project.site / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "installing" in project.works()
    assert path.exists()


def test_a_package_that_a_killed_pip_left_incomplete_is_mended(project: Project) -> None:
    (project.root / ".venv/.micronet-installed").unlink()
    (project.site / "stub/data.py").unlink()
    (project.site / "~tub").mkdir()
    err = project.works()
    assert f"mending stub-{project.version}, which lacks files" in err
    assert "rebuilding" not in err
    assert not (project.site / "~tub").exists()


def test_two_calls_at_once_install_once(project: Project) -> None:
    (project.root / ".venv/.micronet-installed").unlink()
    both = [project.start("python", "-c", "import stub") for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    if shutil.which("flock"):
        assert "".join(said).count("installing") == 1


def test_a_moved_environment_is_rebuilt(project: Project) -> None:
    project.root = project.root.rename(project.root.with_name("moved"))
    assert "rebuilding" in project.works()
    assert str(project.root) in (project.root / ".venv/bin/pip").read_text()


def test_an_environment_whose_python_is_gone_is_rebuilt(project: Project, tmp_path: Path) -> None:
    python = project.root / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/nowhere/python3")
    # Rebuilding takes 3 s, so a Python that can't stands in: what it says must be shown.
    stand_in = write_script(tmp_path / "python", '[[ $1 != -c ]] || exec echo "3.12.0 $0"; echo "disk full"; exit 1')
    _, err = project.run("true", status=1, PYTHON=stand_in)
    assert "rebuilding" in err
    assert "disk full" in err
    assert "could not make .venv" in err


def test_an_old_python_is_named(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    old = write_script(tmp_path / "python3", "echo 3.9.18 /usr/bin/python3.9")
    _, err = project.run("true", status=1, PYTHON=old)
    assert f"{old} is Python 3.9.18" in err
    # Without PYTHON every Python on PATH is tried, and a pyenv shim that runs nothing is passed over.
    write_script(tmp_path / "python3.11", "echo 'pyenv: python3.11: command not found' >&2; exit 127")
    write_script(tmp_path / "python3.12", "echo 3.12.1")
    _, err = project.run("true", status=1, PYTHON="", PATH=str(tmp_path))
    assert f"{old} is Python 3.9.18" in err
    assert "python3.12-venv" in err
    assert "PYTHON=/path/to/python3.12 ./setup.sh" in err
    assert "python3.11" not in err
    _, err = project.run("true", status=1, PYTHON="/nowhere/python3")
    assert "/nowhere/python3, which does not run" in err
    assert not (project.root / ".venv").exists()


@pytest.mark.parametrize("arguments", [["--data"], ["--data", "--help"], ["--dat", "cifar10"]])
def test_a_wrong_option_is_named(tmp_path: Path, arguments: list[str]) -> None:
    _, err = Project(tmp_path / "project").run(*arguments, status=1)
    assert arguments[0] in err


def test_help(tmp_path: Path) -> None:
    out, _ = Project(tmp_path / "project").run("--help")
    assert "--data NAME" in out


def test_every_requirement_is_pinned_exactly_and_every_dependency_is_there() -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    pins = [line for line in lines if line]
    assert [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []
    names = [pin.split("==")[0].lower().replace("_", "-") for pin in pins]
    assert len(set(names)) == len(names)
    with (ROOT / "pyproject.toml").open("rb") as file:
        metadata = tomllib.load(file)
    extras = metadata["project"]["optional-dependencies"]
    wanted = metadata["project"]["dependencies"] + extras["dev"] + extras["timm"] + extras["tensorboard"]
    wanted += metadata["build-system"]["requires"]
    assert {re.split(r"[<>=\[]", one)[0] for one in wanted} - set(names) == {"micronet"}
