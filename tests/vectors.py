"""Answers that were computed apart from this project, to judge it: tests/data/vectors/ and its README."""

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "data" / "vectors"


def vectors(name):
    """One file of independent answers, by its name without the suffix."""
    return json.loads((FOLDER / f"{name}.json").read_text())
