"""How much accuracy each group of channels is worth: every group pruned alone, at several ratios, on validation images.

Nothing is trained in between, so that a curve says what a group's channels are worth to the network as it is. What one
group bears alone, all together do not: a recipe's ratios are a beginning, and its training decides.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from callbacks.channels import Group, removal, whole
from callbacks.copies import copied
from callbacks.dependency import find_groups
from callbacks.importance import Importance, ranked_by, scores
from callbacks.widths import narrow
from micronet.data import BatchLoader, Data, plain_loader
from micronet.data.store import progress
from micronet.errors import MicronetError, first_line
from micronet.optim import top_k_hits
from micronet.report import new_figure, save_figure, write_text

FORMAT = "micronet sensitivity"
VERSION = 1
RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
LINES = 6  # curves in one panel: more can't be told apart


@dataclass(frozen=True, kw_only=True)
class Point:
    """A group pruned alone.

    Args:
        ratio: share of its channels that was removed, in (0, 1).
        channels: how many were left.
        top1_count: validation images answered rightly.
        params: parameters of the whole network.
    """

    ratio: float
    channels: int
    top1_count: int
    params: int


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A group at several ratios.

    Args:
        name: of the group's first layer, by which `PruneChannels` knows it.
        layers: all that make its channels.
        channels: how many it has.
        points: by growing ratio.
    """

    name: str
    layers: tuple[str, ...]
    channels: int
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What every group of a network is worth.

    Args:
        model: what it is called.
        data: name of the data set, whose validation images were used.
        images: how many.
        top1_count: answered rightly by the whole network.
        importance: what the channels were judged by.
        curves: one for each group.
        skipped: a line `name: reason` for each layer that was left alone.
    """

    model: str
    data: str
    images: int
    top1_count: int
    importance: str
    curves: tuple[Curve, ...]
    skipped: tuple[str, ...]

    @property
    def top1(self) -> float:
        """Share of the images that the whole network answers rightly, in [0, 1]."""
        return self.top1_count / self.images

    @property
    def noise(self) -> float:
        """The standard error of that share, of as many images drawn at random: what differs by less says nothing."""
        return (self.top1 * (1 - self.top1) / self.images) ** 0.5

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all; `ratios_from` reads it.

        Args:
            path: the file.
        """
        told = {"format": FORMAT, "version": VERSION, **asdict(self), "top1": self.top1, "noise": self.noise}
        write_text(json.dumps(told, indent=1) + "\n", path)


def measure_sensitivity(
    model: nn.Module,
    data: Data,
    *,
    ratios: Sequence[float] = RATIOS,
    importance: Importance = "l1",
    limit: int | None = None,
    device: Any = "cpu",
    name: str = "network",
) -> Sensitivity:
    """Prune each group of channels alone at several ratios, and count what is still answered rightly.

    Args:
        model: the network; it stays as it is.
        data: the image sets; only validation images are looked at.
        ratios: shares of a group's channels to remove, in (0, 1); each group keeps at least one.
        importance: what channels are judged by; not `"taylor"`, which needs gradients.
        limit: most images; None for all.
        device: where to compute.
        name: what to call the network.

    Raises:
        MicronetError: an argument is out of its range; the validation images are the test images; the network can't be
            pruned.
    """
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise MicronetError(f"ratios must be fractions in (0, 1), got {', '.join(map(str, ratios)) or 'none'}")
    if importance == "taylor":
        raise MicronetError("taylor judges by gradients of a training: choose another importance")
    if data.valid_is_test:
        raise MicronetError(f"{data.name}: its validation images are the test images, which must choose nothing")
    images = data.valid if limit is None else data.limit(limit).valid
    loader = plain_loader(images, data, device=device)
    try:
        groups, skipped = find_groups(model, data.input_size)
        found = [group for group in groups if importance == "random" or ranked_by(model, group, importance)]
        ranks = scores(model, found, whole(found), importance)
    except ValueError as error:
        raise MicronetError(f"{name}: {error}") from error
    left = [group.name for group in groups if group not in found]
    plans = {group.name: list(_levels(group, ratios)) for group in found}
    if not any(plans.values()):
        most = max(group.channels for group in found)
        raise MicronetError(
            f"{name}: ratios of {', '.join(f'{ratio:g}' for ratio in ratios)} remove no channel of any group (the "
            f"widest has {most}): give larger ones"
        )
    with progress(f"pruning {len(found)} groups", 1 + sum(map(len, plans.values()))) as advance:
        begun, done = _right(copied(model, torch.clone).to(device), loader, device), 1
        curves = []
        for group in found:
            points = []
            for number in plans[group.name]:
                narrowed = _without(model, group, ranks[group.name].argsort(stable=True)[:number])
                right = _right(narrowed.to(device), loader, device)
                params = sum(p.numel() for p in narrowed.parameters())
                share = number / group.channels
                points.append(Point(ratio=share, channels=group.channels - number, top1_count=right, params=params))
                done += 1
                advance(done)
            makers = tuple(group.makers)
            curves.append(Curve(name=group.name, layers=makers, channels=group.channels, points=tuple(points)))
    return Sensitivity(
        model=name,
        data=data.name,
        images=len(images.labels),
        top1_count=begun,
        importance=importance,
        curves=tuple(curves),
        skipped=(*skipped, *(f"{one}: {importance} can't rank its channels" for one in left)),
    )


def _levels(group: Group, ratios: Sequence[float]) -> Iterator[int]:
    """How many channels go at each ratio, each number once."""
    yield from sorted({removed(group.channels, ratio) for ratio in ratios} - {0})


def removed(channels: int, ratio: float) -> int:
    """How many channels of a group a ratio removes; one stays.

    Args:
        channels: how many it has.
        ratio: share to remove, in (0, 1).
    """
    # Rounded down: a ratio that was asked for, and is read back, must not become one that is refused as too large.
    return min(int(ratio * channels + 1e-9), channels - 1)


def _without(model: nn.Module, group: Group, channels: torch.Tensor) -> nn.Module:
    """A copy of a network without some channels of a group."""
    before, narrowed = whole([group]), copied(model, torch.clone)
    after = {group.name: before[group.name].clone()}
    after[group.name][channels] = False
    gone = removal(narrowed, [group], before, after)
    narrow(narrowed, gone.kept, gone.table)
    return narrowed


@torch.no_grad()
def _right(model: nn.Module, loader: BatchLoader, device: Any) -> int:
    """How many images a network answers rightly."""
    return sum(top_k_hits(model(images.to(device)), labels.to(device), 1) for images, labels in loader)


def ratios_from(path: str | Path, max_drop: float = 0.01) -> dict[str, float]:
    """Read ratios by layer, for `PruneChannels(ratio=...)`, from a file of `micronet sensitivity`.

    Args:
        path: the JSON file.
        max_drop: how much of the top-1 accuracy a group may cost alone, in [0, 1); 0.01 is one point. Differences below
            the file's `noise` are chance.

    Returns:
        For each group, by its name, the largest ratio up to which none cost more; groups that bear none are left out.

    Raises:
        MicronetError: no such file, or not one of these; no group bears any ratio.
    """
    if not 0 <= max_drop < 1:
        raise MicronetError(f"max_drop must be a fraction in [0, 1), got {max_drop!r}")
    try:
        told = json.loads(Path(path).read_text())
        if told["format"] != FORMAT or told["version"] > VERSION:
            raise ValueError(f"format {told['format']!r}, version {told['version']}")
        least = told["top1_count"] - max_drop * told["images"]
        curves = {
            curve["name"]: [(float(point["ratio"]), int(point["top1_count"])) for point in curve["points"]]
            for curve in told["curves"]
        }
    except FileNotFoundError as error:
        raise MicronetError(f"{path}: no such file; `micronet sensitivity MODEL --data NAME` makes one") from error
    except (ArithmeticError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise MicronetError(f"{path}: not a file of `micronet sensitivity` ({first_line(error)})") from error
    found = {}
    for name, points in curves.items():
        for ratio, right in sorted(points):
            if right < least - 1e-9:
                break
            found[name] = ratio
    if not found:
        raise MicronetError(f"{path}: no group bears its smallest ratio within max_drop={max_drop}")
    return found


def plot_sensitivity(found: Sensitivity, path: str | Path) -> None:
    """Draw the curves, a few in each panel, with the noise floor around the whole network's accuracy.

    Args:
        found: what was measured.
        path: the PNG.
    """
    panels = [found.curves[start : start + LINES] for start in range(0, len(found.curves), LINES)]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(rows, columns, (1.2 + 3.6 * columns, 0.8 + 3.0 * rows))
    flat = [axes] if len(panels) == 1 else list(axes.flat)
    base, noise = 100 * found.top1, 100 * found.noise
    for ax, curves in zip(flat, panels, strict=False):
        ax.axhspan(base - noise, base + noise, color="0.85", lw=0)
        ax.axhline(base, color="0.4", lw=0.8)
        for curve, marker in zip(curves, "os^Dvx", strict=False):
            shares = [0, *(100 * point.ratio for point in curve.points)]
            right = [base, *(100 * point.top1_count / found.images for point in curve.points)]
            ax.plot(shares, right, marker=marker, markersize=4, label=f"{curve.name} ({curve.channels})")
        ax.legend(fontsize=7, loc="lower left", framealpha=0.8, edgecolor="none")
        ax.grid(alpha=0.3)
        ax.set(xlim=(0, 100), ylim=(0, min(100, 1.08 * base + 2)))
    for ax in flat[len(panels) :]:
        ax.set_visible(False)
    figure.supxlabel("channels of one group removed, % (in brackets: how many it has)", fontsize=9)
    figure.supylabel("right on validation, %", fontsize=9)
    figure.suptitle(
        f"{found.model}, {found.data}: each group pruned alone, lowest {found.importance} first\n"
        f"line: unpruned, {base:.2f} % of {found.images:,} images; grey: its standard error, ± {noise:.2f}",
        fontsize=10,
    )
    save_figure(figure, path)
