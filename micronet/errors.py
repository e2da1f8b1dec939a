"""The one exception that means: the user can mend this."""

from pathlib import Path

from callbacks.errors import first_line as first_line


class MicronetError(Exception):
    """Something the user can mend: its message is one line that says what, where and what to do.

    The command line prints the message without a traceback and exits with status 1.
    """


def printable(text: str) -> str:
    """A file's or a stranger's words as one line, without what would command a terminal."""
    line = " ".join(text.splitlines())
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def require_file(path: Path) -> None:
    """Refuse a path that leads to no file.

    Args:
        path: of a file that is to be read.

    Raises:
        MicronetError: it is a folder, or nothing.
    """
    if not path.is_file():
        raise MicronetError(f"{path}: {'is a folder; name a file in it' if path.is_dir() else 'no such file'}")
