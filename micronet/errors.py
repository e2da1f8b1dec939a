"""The one exception that means: the user can mend this."""

from callbacks.errors import first_line as first_line


class MicronetError(Exception):
    """Something the user can mend: its message is one line that says what, where and what to do.

    The command line prints the message without a traceback and exits with status 1.
    """
