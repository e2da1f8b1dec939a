"""The time that a plan says against the time that the fit takes, in one run on this machine; numbers are printed.

Run: pytest -m benchmark tests/benchmarks/test_plan_time.py -s      (about a minute; an otherwise idle machine)
"""

import json
from functools import partial

import pytest
from fastai.callback.mixup import MixUp

from micronet import Fit, Recipe, RunOptions, run
from micronet.data import Augment, digits
from micronet.models import separable_net
from micronet.plan import plan

pytestmark = pytest.mark.benchmark


def test_a_plan_says_about_what_the_fit_takes(tmp_path):
    recipe = Recipe(
        data=partial(digits, batch_size=32, augment=Augment(crop=3, rotate=10.0)),
        model=partial(separable_net, width_multiplier=0.5),
        stages=(Fit("train", epochs=3, ema=0.98, cbs=(partial(MixUp, 0.4),)),),
    )
    said = plan(recipe).seconds
    run(recipe, tmp_path / "run", RunOptions())
    took = json.loads((tmp_path / "run" / "1-train" / "row.json").read_text())["seconds"]
    print(f"\nplan {said:.1f} s, fit {took:.1f} s, ratio {said / took:.2f}")
    assert 0.6 < said / took < 1.6
