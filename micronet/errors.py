"""The one exception that means: the user can mend this."""


class MicronetError(Exception):
    """Something the user can mend: its message is one line that says what, where and what to do.

    The command line prints the message without a traceback and exits with status 1.
    """
