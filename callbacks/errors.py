"""What an error says, in one line; nothing is imported for it."""


def first_line(error: BaseException) -> str:
    """What an error says, cut to one line; the name of its class where it says nothing.

    Args:
        error: of any kind.
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]
