"""The C library's memory, kept between the batches of a fit.

What is free at the end of its heap glibc hands back to the system, and gets it again, page by page and filled with
zeros, for the next batch's activations.
Source: glibc's manual, "Malloc Tunable Parameters"; the parameters' numbers are those of its malloc.h.
"""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1  # bytes: the largest that mallopt takes
_LARGEST = (2**30, 2**25)  # bytes; versions of glibc before 2.35 take no more than the second


def keep_freed_memory() -> bool:
    """Have freed memory stay with this process, for its next allocations.

    Returns:
        Whether the C library could be told so: glibc's can; False elsewhere, where nothing has changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    tell = ctypes.CDLL(None).mallopt
    return any(tell(_M_MMAP_THRESHOLD, size) for size in _LARGEST) and bool(tell(_M_TRIM_THRESHOLD, _NEVER))
