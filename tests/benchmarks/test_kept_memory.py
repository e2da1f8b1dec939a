"""What it brings to keep freed memory (micronet/allocator.py): training steps of ResNet-20, with and without, by turns.

Run: pytest -m benchmark tests/benchmarks/test_kept_memory.py -s      (a minute; an otherwise idle machine)
"""

import platform
import statistics
import subprocess
import sys

import pytest

pytestmark = pytest.mark.benchmark

STEPS = """
import statistics, sys, time
import torch
from callbacks.precision import bf16_speeds_up
from micronet.allocator import keep_freed_memory
from micronet.models import resnet20

if sys.argv[1] == "kept":
    keep_freed_memory()
torch.manual_seed(0)
net = resnet20(num_classes=10).to(memory_format=torch.channels_last).train()
images, labels = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last), torch.randint(10, (128,))
seconds = []
for _ in range(25):
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16_speeds_up("cpu")):
        logits = net(images)
    torch.nn.functional.cross_entropy(logits.float(), labels).backward()
    net.zero_grad()
    seconds.append(time.perf_counter() - began)
print(statistics.median(seconds[5:]))
"""


def step(how: str) -> float:
    """Seconds of a training step in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STEPS, how], capture_output=True, text=True, check=True
    )
    return float(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_kept_memory_makes_training_faster():
    ratios = [step("as it is") / step("kept") for _ in range(5)]
    ratio = statistics.median(ratios)
    print(f"\ntraining steps, as it is / kept: {ratio:.2f} (above 1), rounds {[round(r, 2) for r in ratios]}")
    assert ratio > 1
