"""Which channels go: the order in which they would go, and how many of that order it takes.

Pure functions that `prune.py` calls. Groups of channels that are compared with each other form a class: `"local"` makes
each group one of its own, `"global"` one of all, `"isomorphic"` one of those that are built alike (Fang et al. 2024,
"Isomorphic Pruning"). Within a class channels are ranked by their scores; the k-th of n to go stands at `(k - 1/2) / n`
of the class, so that all classes lose the same share at any cut, each to half a channel.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, gcd, inf
from typing import Literal

from torch import Tensor

from callbacks.channels import Alive, Group

Scope = Literal["local", "global", "isomorphic"]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Channels of one group that go at the same time.

    Args:
        group: its name.
        channels: their numbers in the group, int64.
        place: where they stand in their class, in (0, 1).
        score: the mean of their scores, or that of channels of the group that go before, where it is larger.
    """

    group: str
    channels: Tensor
    place: float
    score: float


def classes(groups: Sequence[Group], scope: Scope) -> list[list[Group]]:
    """The groups that are compared with each other, together."""
    keys = {"local": lambda g: g.name, "global": lambda g: None, "isomorphic": lambda g: g.kind}
    found: dict[object, list[Group]] = {}
    for group in groups:
        found.setdefault(keys[scope](group), []).append(group)
    return list(found.values())


def fewest(group: Group, max_ratio: float, round_to: int) -> int:
    """How many channels a group keeps at least.

    Args:
        group: the group.
        max_ratio: largest share that it may lose.
        round_to: its first layer's width stays a multiple of this.
    """
    step = round_to // gcd(round_to, group.size)
    least = max(1, ceil((1 - max_ratio) * group.channels - 1e-9))
    return -(-least // step) * step


def order(
    members: Sequence[Group], alive: Alive, scores: Mapping[str, Tensor], max_ratio: float, round_to: int
) -> list[Chunk]:
    """The order in which a class's channels go, the lowest scores first.

    Args:
        members: the groups of the class.
        alive: which channels are still there.
        scores: of every channel.
        max_ratio: largest share that a group may lose of the channels that it had at first.
        round_to: widths go down to multiples of this; the first chunk of a group may be smaller than the others.

    Returns:
        The chunks; where all are gone, every group has as few channels as `fewest` says.
    """
    chunks: list[tuple[float, int, Group, Tensor]] = []
    for number, group in enumerate(members):
        rank = scores[group.name].argsort(stable=True)[: int(alive[group.name].sum())]
        step, least = round_to // gcd(round_to, group.size), fewest(group, max_ratio, round_to)
        start, highest = 0, -inf
        size = len(rank) % step or step
        while len(rank) - start - size >= least:
            part = rank[start : start + size]
            highest = max(highest, float(scores[group.name][part].mean()))
            chunks.append((highest, number, group, part))
            start, size = start + size, step
    chunks.sort(key=lambda chunk: chunk[:2])  # stable: within a group as they came
    total = sum(group.channels * group.size for group in members)
    gone = total - sum(int(alive[group.name].sum()) * group.size for group in members)
    found = []
    for score, _, group, part in chunks:
        width = len(part) * group.size
        found.append(Chunk(group.name, part, (gone + width / 2) / total, score))
        gone += width
    return found


def merged(parts: Sequence[Sequence[Chunk]]) -> list[Chunk]:
    """The orders of several classes as one: all lose the same share, the lowest scores first among equals."""
    return sorted((chunk for part in parts for chunk in part), key=lambda chunk: (chunk.place, chunk.score))


def without(alive: Alive, chunks: Sequence[Chunk]) -> dict[str, Tensor]:
    """What is still there when some chunks are gone."""
    left = {name: there.clone() for name, there in alive.items()}
    for chunk in chunks:
        left[chunk.group][chunk.channels] = False
    return left


def shortest(count: int, value: Callable[[int], float], guess: Callable[[int], float], target: float) -> int | None:
    """The smallest number of chunks whose removal reaches a target, with few exact counts.

    Args:
        count: how many chunks there are.
        value: what is left after so many of them, exactly; never rises.
        guess: the same, cheap and roughly; never rises.
        target: what may be left at most.

    Returns:
        The number, in [0, count]; None where all of them are not enough.
    """
    low, high, shift = -1, count + 1, 0.0
    while high - low > 1:
        first = bisect_left(range(count + 1), True, key=lambda n: guess(n) + shift <= target)
        tried = min(max(first, low + 1), high - 1)
        found = value(tried)
        low, high = (low, tried) if found <= target else (tried, high)
        shift = found - guess(tried)
    return high if high <= count else None
