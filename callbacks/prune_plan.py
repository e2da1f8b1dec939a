"""What pruning is asked for, and which channels that comes to.

`Choice` is what the user asks for. `Plan` is what it means for a network: the groups of channels that may go, whether
the aim can be reached, and which channels are next. `prune.py` follows it through a fit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from callbacks.channels import Alive, Group, whole
from callbacks.dependency import find_groups
from callbacks.importance import Importance, Key, ranked_by
from callbacks.selection import Chunk, Scope, classes, merged, order, shortest, without
from callbacks.sparsity import check_word
from callbacks.targets import Macs, Params, Storage

_UNRANKED = {
    "fpgm": "filters of different groups see different inputs: their distances mean nothing",
    "bn_scale": "no normalisation scales its channels",
    "taylor": "its weights are frozen: they get no gradient",
}
_NOTHING = "its channels are made by no layer with weights"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is to be removed, by what it is chosen; `PruneChannels` says what each argument means.

    Raises:
        ValueError: an argument is out of its range.
    """

    ratio: float | Mapping[str, float] | None = None
    params: float | None = None
    macs: float | None = None
    storage: float | None = None
    importance: Importance = "l1"
    scope: Scope = "local"
    round_to: int = 1
    max_ratio: float = 0.9
    layers: tuple[str, ...] = ()
    feeding: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_word("importance", self.importance, Importance)
        check_word("scope", self.scope, Scope)
        given = [name for name in ("ratio", "params", "macs", "storage") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of ratio, params, macs and storage must be given, got {given or 'none'}")
        if not 0 < self.max_ratio < 1:
            raise ValueError(f"max_ratio must be a fraction in (0, 1), got {self.max_ratio!r}")
        if not isinstance(self.round_to, int) or self.round_to < 1:
            raise ValueError(f"round_to must be a whole number from 1, got {self.round_to!r}")
        for name in ("layers", "feeding"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a tuple of names, got {getattr(self, name)!r}")
        if self.feeding and self.importance in ("bn_scale", "random"):
            raise ValueError(f"feeding judges by weights that read a channel, {self.importance!r} looks at none")
        self._check_ratios()
        for name in ("params", "macs", "storage"):
            value = getattr(self, name)
            whole_number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if value is not None and not whole_number and not (isinstance(value, float) and 0 < value < 1):
                raise ValueError(
                    f"{name} must be the share to remove, a fraction in (0, 1), or what may be left, a whole number "
                    f"from 1, got {value!r}"
                )

    def _check_ratios(self) -> None:
        by_layer = isinstance(self.ratio, Mapping)
        for ratio in self.ratio.values() if by_layer else [] if self.ratio is None else [self.ratio]:
            number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
            if not number or not 0 <= ratio <= self.max_ratio or not (ratio or by_layer):
                most = self.max_ratio
                raise ValueError(f"ratio must be a fraction above 0, at most max_ratio={most}, got {ratio!r}")
        if by_layer and not any(self.ratio.values()):
            raise ValueError("ratio by layer must name a layer that loses channels: none does")
        if by_layer and (self.scope != "local" or self.layers or self.feeding):
            raise ValueError(
                "ratio by layer goes with scope='local' and without layers and feeding: it names the layers"
            )

    @property
    def aim(self) -> float | None:
        """The share to remove or the count to be left, where it is not of channels."""
        return next((v for v in (self.params, self.macs, self.storage) if v is not None), None)


class Plan:
    """What a choice means for a network.

    Args:
        model: the whole network; it stays as it is.
        input_size: **shape** of one image, `(C, H, W)`.
        choice: what is asked for.
        masks: of the network's zeros.

    Attributes:
        groups: the channels that may go.
        skipped: a line `name: reason` for each layer whose channels are left alone for another reason than the choice.

    Raises:
        ValueError: the network can't be pruned, or has no such layer; the aim can't be reached, is reached already, or
            is so small that no channel would go.
    """

    def __init__(
        self, model: nn.Module, input_size: Sequence[int], choice: Choice, masks: Mapping[str, Tensor] | None = None
    ) -> None:
        self.choice, masks = choice, masks or {}
        every, skipped = find_groups(model, input_size)
        self.groups, unranked = _ranked(model, _named(every, skipped, choice), choice)
        self.skipped = skipped + unranked
        self.ratios = _by_group(self.groups, choice.ratio) if isinstance(choice.ratio, Mapping) else {}
        self.target: Params | Macs | Storage | None = None
        if choice.params is not None:
            self.target = Params(model, self.groups)
        elif choice.ratio is None:
            kind = Macs if choice.macs is not None else Storage
            self.target = kind(model, self.groups, input_size, masks)
        self._check(model, masks)

    def next(
        self, model: nn.Module, masks: Mapping[str, Tensor], alive: Alive, scores: Mapping[str, Tensor], share: float
    ) -> list[Chunk]:
        """The channels that go next.

        Args:
            model: the network as it is now.
            masks: of its zeros as they are now.
            alive: which channels are still there.
            scores: of every channel.
            share: of the aim that is to be reached, in (0, 1]; below 1, costs are guessed and not counted.

        Raises:
            ValueError: the aim can't be reached.
        """
        parts = [self._order(members, alive, scores) for members in classes(self.groups, self.choice.scope)]
        if self.target is None:
            near = 1e-9  # a channel that stands exactly at the cut goes
            return [chunk for part in parts for chunk in part if chunk.place <= share * self._ratio(part) + near]
        chunks = merged(parts)
        guess, count = self._counts(model, masks, alive, chunks)
        begin = self.target.begin
        number = shortest(len(chunks), count if share == 1 else guess, guess, begin - share * (begin - self.left))
        if number is None:
            raise ValueError(self._unreachable(count(len(chunks))))
        return chunks[:number]

    def _at_first(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All channels, and scores by which none matters more than another."""
        return whole(self.groups), {group.name: torch.zeros(group.channels) for group in self.groups}

    def rounds(self, model: nn.Module, masks: Mapping[str, Tensor], shares: Sequence[float]) -> list[int]:
        """How many channels are gone at some shares of the aim, where none matters more than another.

        Args:
            model: the whole network.
            masks: of its zeros.
            shares: of the aim, in (0, 1].
        """
        alive, nothing = self._at_first()
        found = (self.next(model, masks, alive, nothing, share) for share in shares)
        return [sum(len(chunk.channels) for chunk in chunks) for chunks in found]

    def left_of(self, model: nn.Module, masks: Mapping[str, Tensor]) -> float:
        """The share of the network's parameters that the aim leaves, where no channel matters more than another.

        Args:
            model: the whole network.
            masks: of its zeros.
        """
        alive, nothing = self._at_first()
        target = Params(model, self.groups)
        after = without(alive, self.next(model, masks, alive, nothing, 1.0))
        return target.guess(after) / target.begin

    def _counts(
        self, model: nn.Module, masks: Mapping[str, Tensor], alive: Alive, chunks: Sequence[Chunk]
    ) -> tuple[Callable[[int], float], Callable[[int], float]]:
        """What is left after so many chunks: guessed, and counted."""

        def guess(number: int) -> float:
            return self.target.guess(without(alive, chunks[:number]))

        def count(number: int) -> float:
            return self.target.count(model, masks, alive, without(alive, chunks[:number]))

        return guess, guess if self.target.exact else count

    def keys(self, model: nn.Module) -> list[Key]:
        """The axes of layers that the importance looks at, by layer and `"out"` or `"in"`."""
        each = (ranked_by(model, group, self.choice.importance, self.choice.feeding) for group in self.groups)
        return list(dict.fromkeys((member.layer, member.axis) for members in each for member in members))

    @property
    def left(self) -> float:
        """What may be left of what is aimed at."""
        aim = self.choice.aim
        return self.target.begin * (1 - aim) if isinstance(aim, float) else float(aim)

    def _order(self, members: Sequence[Group], alive: Alive, scores: Mapping[str, Tensor]) -> list[Chunk]:
        return order(members, alive, scores, self.choice.max_ratio, self.choice.round_to)

    def _ratio(self, part: Sequence[Chunk]) -> float:
        if not part:
            return 0.0
        return self.ratios.get(part[0].group, 0.0) if self.ratios else self.choice.ratio

    def _unreachable(self, least: float) -> str:
        aim = next(name for name in ("params", "macs", "storage") if getattr(self.choice, name) is not None)
        return (
            f"{aim}={self.choice.aim!r} can't be reached: {least:,.0f} {self.target.unit} are left of "
            f"{self.target.begin:,.0f} when every group keeps only what max_ratio={self.choice.max_ratio} and "
            f"round_to={self.choice.round_to} leave it"
        )

    def _check(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Refuse an aim that can't be reached or changes nothing; which channels matter does not matter here."""
        alive, nothing = self._at_first()
        if self.target is None:
            self._check_ratio(model, masks, alive, nothing)
            return
        if self.target.begin <= self.left:
            has, may = f"{self.target.begin:,.0f} {self.target.unit}", f"{self.left:,.0f}"
            raise ValueError(f"nothing to prune: the network has {has}, and {may} may be left")
        chunks = merged([self._order(members, alive, nothing) for members in classes(self.groups, self.choice.scope)])
        least = self._counts(model, masks, alive, chunks)[1](len(chunks))
        if least > self.left:
            raise ValueError(self._unreachable(least))

    def _check_ratio(
        self, model: nn.Module, masks: Mapping[str, Tensor], alive: Alive, nothing: Mapping[str, Tensor]
    ) -> None:
        choice = self.choice
        gone = self.next(model, masks, alive, nothing, 1.0)
        idle = [name for name, ratio in self.ratios.items() if ratio and not any(c.group == name for c in gone)]
        if gone and idle:
            channels = next(group.channels * group.size for group in self.groups if group.name == idle[0])
            raise ValueError(
                f"ratio={self.ratios[idle[0]]!r} of {idle[0]} is less than half a channel, or half a step of round_to="
                f"{choice.round_to}: of its {channels} channels none would go"
            )
        if not gone:
            widest = max(self.groups, key=lambda group: group.channels * group.size)
            raise ValueError(
                f"nothing would be pruned: ratio={choice.ratio!r} is less than half a channel, or half a step of "
                f"round_to={choice.round_to}, of every group; the widest, {widest.name}, has "
                f"{widest.channels * widest.size} channels"
            )
        for members in classes(self.groups, choice.scope) if choice.scope != "local" else ():
            part = self._order(members, alive, nothing)
            total = sum(group.channels * group.size for group in members)
            sizes = {group.name: group.size for group in members}
            most = sum(len(chunk.channels) * sizes[chunk.group] for chunk in part) / total
            if most < choice.ratio - choice.round_to / total:
                raise ValueError(
                    f"ratio={choice.ratio} can't be reached: max_ratio={choice.max_ratio} and round_to="
                    f"{choice.round_to} let {most:.3f} go of {members[0].name} and the groups compared with it"
                )


def _named(groups: Sequence[Group], skipped: Sequence[str], choice: Choice) -> list[Group]:
    """The groups that the user means."""
    found = list(groups)
    for argument, axis in (("layers", "out"), ("feeding", "in")):
        names = getattr(choice, argument)
        held = {member.layer for group in groups for member in group.members if member.axis == axis}
        for name in names:
            if name not in held:
                raise ValueError(f"{argument}: {_absent(name, held, skipped)}")
        if names:
            found = [g for g in found if any(m.axis == axis and m.layer in names for m in g.members)]
    if not found:
        raise ValueError("layers and feeding have no channels in common")
    return found


def _absent(name: str, held: set[str], skipped: Sequence[str]) -> str:
    reason = next((line for line in skipped if line.partition(": ")[0] == name), None)
    near = get_close_matches(name, held, n=3)
    hint = f" ({reason})" if reason else f"; near it: {', '.join(near)}" if near else ""
    return f"there is no layer {name!r} whose channels can be removed{hint}"


def _ranked(model: nn.Module, groups: Sequence[Group], choice: Choice) -> tuple[list[Group], list[str]]:
    """The groups whose channels the importance can rank, and a line for each of the others."""
    if choice.importance == "random":
        return list(groups), []
    found, skipped = [], []
    for group in groups:
        if ranked_by(model, group, choice.importance, choice.feeding):
            found.append(group)
        else:
            skipped.append(f"{group.name}: {_UNRANKED.get(choice.importance, _NOTHING)}")
    if not found:
        raise ValueError(f"{choice.importance} can rank no channel ({'; '.join(skipped[:3])})")
    return found, skipped


def _by_group(groups: Sequence[Group], ratios: Mapping[str, float]) -> dict[str, float]:
    """Ratios by the name of the group, where they were given by the name of any layer that makes its channels."""
    held = {layer for group in groups for layer in group.makers}
    found: dict[str, tuple[str, float]] = {}
    for layer, ratio in ratios.items():
        if layer not in held:
            raise ValueError(f"ratio: {_absent(layer, held, [])}")
        for name in (group.name for group in groups if layer in group.makers):
            if name in found and found[name][1] != ratio:
                raise ValueError(
                    f"ratio: {found[name][0]} and {layer} make the same channels, and have different ratios"
                )
            found[name] = layer, ratio
    return {name: ratio for name, (_, ratio) in found.items()}
