"""How long a score takes, against what it cannot do without: exporting the network once."""

import time
from functools import partial

import pytest
import torch

import callbacks.op_trace  # noqa: F401  what is imported is not what a score takes
from micronet.models import wide_resnet
from micronet.score import score

pytestmark = pytest.mark.benchmark


def test_scoring_costs_little_more_than_one_export():
    make = partial(wide_resnet, depth=22, width=6, num_classes=100)
    with torch.device("meta"):
        began = time.perf_counter()
        score(make())
        first = time.perf_counter() - began
        times = {"score": [], "export": []}
        for _ in range(5):
            net = make().eval()
            began = time.perf_counter()
            score(net)
            times["score"].append(time.perf_counter() - began)
            began = time.perf_counter()
            with torch.no_grad():
                torch.export.export(net, (torch.zeros(1, 3, 32, 32),), strict=False)
            times["export"].append(time.perf_counter() - began)
    ratio = min(times["score"]) / min(times["export"])
    print(f"\nWRN-22-6: first score {first:.2f} s, then {min(times['score']):.2f} s: {ratio:.2f} exports (at most 2.5)")
    assert ratio <= 2.5
