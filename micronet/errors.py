"""The one exception that means: the user can mend this."""


class MicronetError(Exception):
    """Something the user can mend: its message is one line that says what, where and what to do.

    The command line prints the message without a traceback and exits with status 1.
    """


def first_line(error: BaseException) -> str:
    """What an error says, cut to one line; the name of its class where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]
