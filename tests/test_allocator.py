"""Memory that was freed is used again."""

import json
import platform
import subprocess
import sys

import pytest

FAULTS = """
import json, resource, sys
import numpy as np
from micronet.allocator import keep_freed_memory

told = keep_freed_memory() if sys.argv[1] == "kept" else None

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [np.ones(20 << 20, np.uint8) for _ in range(10)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(json.dumps([told, *(faults() for _ in range(4))]))
"""


def faults(how: str) -> list:
    result = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_blocks_are_not_fetched_from_the_system_twice():
    told, first, *later = faults("kept")
    assert told is True
    assert first >= 100  # pages of 2 MiB at most
    assert max(later) < first / 10
    _, first, *later = faults("as it is")
    assert min(later) > first / 2  # or there would be nothing to tell


def test_elsewhere_nothing_is_told(monkeypatch):
    from micronet import allocator

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert allocator.keep_freed_memory() is False
