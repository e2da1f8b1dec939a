"""Options of the commands, and the checks that come before anything slow is imported."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from micronet.errors import MicronetError, first_line
from micronet.provenance import data_call

if TYPE_CHECKING:
    from rich.console import Console

    from micronet.bundle import Bundle
    from micronet.model_source import ModelSource

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: a Python file.", show_default=False)]
ModelFile = Annotated[Path, typer.Argument(metavar="MODEL", help="A model.pth.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="NAME=VALUE", help="An option of the recipe; may be given again."),
]
DataFolder = Annotated[
    Path | None,
    typer.Option("--data", "-d", metavar="DIR", envvar="MICRONET_DATA", help="Where the data set or its .tgz lies."),
]
# Where --data is taken by the name of the data set.
DataPlace = Annotated[
    Path | None,
    typer.Option("--data-dir", "-d", envvar="MICRONET_DATA", help="Where the data set or its .tgz lies."),
]
DataName = Annotated[
    str | None, typer.Option(help="Measure the accuracy, too: digits, cifar10, cifar100, or an image folder.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; by default a GPU where there is one.")]
Seed = Annotated[int, typer.Option(min=0, max=10**8, help="Of all that is drawn.")]
Factory = Annotated[
    str | None,
    typer.Option(metavar="FILE:NAME", help="Build the network with this function of yours. Runs the file's code."),
]


class _PlainFlags:
    """Help in which an option that takes no value shows no type; typer writes `<bool>` beside it."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The command's parameters, flags without a type."""
        params = super().get_params(ctx)
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class Command(_PlainFlags, TyperCommand):
    """A command with such help."""


class Group(_PlainFlags, TyperGroup):
    """A group of commands with such help, which says in a line that it was interrupted: typer ends without a word."""

    def invoke(self, ctx: typer.Context) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("\nmicronet: interrupted", err=True)
            raise typer.Exit(130) from None


@contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """Have what ends a process as a rule end it as Ctrl-C does: so that nothing half written is left behind.

    Around a process's whole work: after it, signals are ignored. What comes then is the interpreter's end, which has no
    handlers: a signal would undo the exit status. Who goes on in this process puts the handlers back.
    """
    mine = threading.current_thread() is threading.main_thread()
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if mine and signal.getsignal(n) is signal.SIG_DFL]
    for number in numbers:  # nohup's, which is another, stays
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        ignore_signals()


def ignore_signals() -> None:
    """Ignore, from where its outcome is known, what ends a process; a thread other than the main one can't."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)


def make_console() -> "Console":
    """A rich console; into a file or a pipe nothing is folded or cut."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=200, soft_wrap=True)


def use_data(folder: Path | None) -> None:
    """Look for data sets where the user says."""
    if folder is not None:
        if not folder.exists():
            raise MicronetError(f"{folder}: no such folder or archive (where the data should lie)")
        os.environ["MICRONET_DATA"] = str(folder)


def check_device(name: str | None) -> None:
    """Say in one line that a device named by the user can't be used, before anything slow begins."""
    if name is None:
        return
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise MicronetError(f"--device {name}: not usable here: {first_line(error)}") from error


def check_outputs(outputs: Mapping[str, Path | None], inputs: Sequence[str | Path | None]) -> None:
    """Refuse, before anything slow, to write over what is read, twice to one file, or where no file can be made.

    Args:
        outputs: files by the option that names them; None for one that is not written.
        inputs: files and folders that are read; names of networks and data sets do no harm; `FILE:NAME` of a factory.

    Raises:
        MicronetError: such an output.
    """
    files = {option: file for option, file in outputs.items() if file is not None}
    read = [Path(name) for one in inputs if one is not None for name in (str(one), str(one).rpartition(":")[0]) if name]
    for place, (option, file) in enumerate(files.items()):
        if not file.parent.is_dir():
            # As a rule it lies beside what is read, which then is what is missing: say that.
            gone = next((one for one in inputs if isinstance(one, Path) and not one.exists()), None)
            if gone is not None:
                raise MicronetError(f"{gone}: no such file")
            raise MicronetError(f"{file.parent}: no such folder to write {file.name} to; make it first")
        if file.exists() and not file.is_file():  # a device would be replaced by a file
            what = "is a folder; name a file in it" if file.is_dir() else "is no ordinary file; name another one"
            raise MicronetError(f"{file}: {what} with {option}")
        if not os.access(file.parent, os.W_OK):
            raise MicronetError(f"{file.parent}: not yours to write {file.name} to; name another file with {option}")
        if any(_same_file(file, one) for one in read):
            raise MicronetError(f"{file}: is what is read; name another file with {option}")
        for other, earlier in list(files.items())[:place]:
            if _same_file(file, earlier):
                raise MicronetError(f"{file}: both {other} and {option} would be written to it; name another file")


def _same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file, which need not be there; a link is the file that it leads to."""
    return os.path.realpath(one) == os.path.realpath(other) or (one.exists() and other.exists() and one.samefile(other))


def number(value: float | None) -> float | None:
    """Refuse `nan`, which no bound of an option refuses, as it is neither below nor above it."""
    if value is not None and value != value:
        raise typer.BadParameter("nan is no number")
    return value


def parse_settings(settings: list[str] | None) -> dict[str, str]:
    """Split every NAME=VALUE."""
    pairs = [setting.partition("=") for setting in settings or []]
    for name, equals, value in pairs:
        if not equals:
            raise typer.BadParameter(f"-s wants NAME=VALUE, got {name!r}{value}")
    return {name: value for name, _, value in pairs}


def find_users_factory(name: str | None) -> Any:
    """Run the file of `--factory FILE:NAME`, saying so, and give the function; None where none is named."""
    if name is None:
        return None
    from micronet.recipe import run_file

    file, _, function = name.rpartition(":")
    if not file or not Path(file).is_file():
        raise MicronetError(f"--factory {name}: wants FILE:NAME, and no such file {file!r}")
    if not file.endswith(".py"):
        raise MicronetError(f"--factory {name}: {file} is not a Python file, whose name ends in .py")
    typer.echo(f"micronet: running the code of {file}, as --factory asks", err=True)
    module = run_file(Path(file))
    if not callable(getattr(module, function, None)):
        raise MicronetError(f"--factory {name}: {file} defines no function {function}")
    return getattr(module, function)


def data_of(source: "Bundle | ModelSource") -> str | None:
    """The data set that a network was trained on, as `--data` takes it; None where its file does not say."""
    used = data_call(source.provenance)
    name = str(used.get("call")).rpartition(":")[2]
    if name == "image_folder":
        return str(used.get("path"))
    return name if name in ("digits", "cifar10", "cifar100") else None


def split_of(source: "Bundle | ModelSource", model: Path, data: str, split: str) -> dict[str, Any]:
    """How the network's own recipe cut valid from train: cut otherwise, most of valid would be what it trained on."""
    if split == "test":
        return {}
    used = data_call(source.provenance)
    known = str(used.get("call")).rpartition(":")[2]
    if known != data and not (known == "image_folder" and Path(data).is_dir()):
        raise MicronetError(
            f"{model}: its file does not say which images of {data} it was trained on, so that --split {split} "
            "has no meaning; use --split test"
        )
    return {name: used[name] for name in ("valid", "split_seed") if name in used}
