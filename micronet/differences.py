"""Where two recipes differ, in words: what `describe` gave for each."""

import re
from collections.abc import Iterator, Mapping
from typing import Any


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say where the values of two runs differ, such as `stages[0] (train): epochs was 24, is now 30`.

    Args:
        old: as `run.json` has it: `recipe`, `seed`, `limit`.
        new: the same of the run that is asked for.

    Returns:
        One line a value, in the recipe's order; none where the two are equal.
    """
    recipes = [part["recipe"] for part in (old, new)]
    rest = [{key: value for key, value in part.items() if key != "recipe"} for part in (old, new)]
    lines = []
    for path, before, after in (*_walk(*recipes), *_walk(*rest)):
        where = ".".join(path).replace(".[", "[")
        stage = re.fullmatch(r"stages\[(\d+)\]\.(.+)", where)
        if stage:
            where = f"stages[{stage[1]}] ({recipes[0]['stages'][int(stage[1])]['name']}): {stage[2]}"
        words = [_short(value) for value in (before, after)]
        if words[0] == words[1]:  # two functions of one name
            words = [str(value) for value in (before, after)]
        lines.append(f"{where} was {words[0]}, is now {words[1]}")
    return lines


def _walk(old: Any, new: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Each place where two descriptions differ: the way to it, and both values; what is absent is None."""
    old, new = _as_call(old, new), _as_call(new, old)
    if isinstance(old, Mapping) and isinstance(new, Mapping) and old.get("call") == new.get("call"):
        for key in {**old, **new}:
            yield from _walk(old.get(key), new.get(key), (*path, key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, pair in enumerate(zip(old, new, strict=True)):
            yield from _walk(*pair, (*path, f"[{place}]"))
    elif old != new:
        yield path, old, new


def _as_call(value: Any, other: Any) -> Any:
    """A function without arguments, described by its name alone, like the same one with arguments beside it."""
    return {"call": value} if isinstance(value, str) and isinstance(other, Mapping) else value


def _short(value: Any) -> str:
    """A value as a reader knows it: of a stage its name, of a call the function's."""
    if isinstance(value, Mapping):
        return str(value.get("name") or _short(value.get("call")))
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    if isinstance(value, str) and re.fullmatch(r"[\w.]+:[\w.]+", value):
        return value.partition(":")[2]
    return repr(value)
