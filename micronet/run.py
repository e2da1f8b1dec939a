"""Running a recipe in a folder: stages in order, resumed where they were left, a measured row for each."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastai.callback.core import Callback
from rich.console import Console
from torch import nn

from micronet import bundle as bundles
from micronet.bundle import Bundle
from micronet.data import Data, plain_loader
from micronet.errors import MicronetError
from micronet.evaluate import evaluate
from micronet.folder import copy_file, locked, read_rows
from micronet.learner import FitResult, make_learner, pick_device, run_fit, seed_all, uses_bf16
from micronet.machine import git_state, hardware, versions
from micronet.recipe import Fit, Recipe, describe
from micronet.report import flat, plot_curves, plot_rates, write_csv, write_text
from micronet.score import score

SMOKE_IMAGES = 64


@dataclass(frozen=True)
class RunOptions:
    """What the command line adds to a recipe.

    Args:
        seed: of weights, order, augmentation and all that is drawn, at least 0.
        limit: most images in each split; None for all.
        device: where to train; None for a GPU where there is one.
        smoke: recorded; a smoke run takes few images.
        tensorboard: whether fastai's own TensorBoard callback logs into the run folder.
    """

    seed: int = 0
    limit: int | None = None
    device: str | None = None
    smoke: bool = False
    tensorboard: bool = False

    @property
    def images(self) -> int | None:
        """Most images in each split."""
        return SMOKE_IMAGES if self.smoke and self.limit is None else self.limit


def run(
    recipe: Recipe,
    folder: str | Path,
    options: RunOptions | None = None,
    *,
    source: Path | None = None,
    console: Console | None = None,
) -> Bundle:
    """Run a recipe in a folder, or go on with the run that is there.

    Args:
        recipe: what to run.
        folder: made where absent; holds afterwards what the README's "A run folder" lists.
        options: seed, limit, device and so on.
        source: the recipe's file, to be kept with the run.
        console: where to say what happens; None for nowhere.

    Returns:
        The last stage's network with its rows; the same as `model.pth` in the folder.

    Raises:
        MicronetError: the folder holds something else, or another run; another process works in it; the loss diverged.
    """
    return _Run(recipe, Path(folder), options or RunOptions(), source, console or Console(quiet=True)).run()


class _Run:
    def __init__(
        self, recipe: Recipe, folder: Path, options: RunOptions, source: Path | None, console: Console
    ) -> None:
        self.recipe, self.folder, self.options, self.console = recipe, folder, options, console
        self.source = source
        self.device = pick_device(options.device)
        self.factory, _ = bundles.describe_factory(recipe.model)

    def run(self) -> Bundle:
        resolved = {"recipe": describe(self.recipe), "seed": self.options.seed, "limit": self.options.images}
        self._make_folder()
        with locked(self.folder):
            record = self._open(resolved)
            with self._blaming("data"):
                data = self.recipe.data()
            if self.options.images is not None:
                data = data.limit(self.options.images)
            self._introduce(data)
            previous: Path | None = None
            for index in range(len(self.recipe.stages)):
                previous = self._stage(index, data, previous, record)
            write_csv([flat(row) for row in read_rows(self.folder)], self.folder / "rows.csv")
            copy_file(previous / "model.pth", self.folder / "model.pth")
            return self._load(previous)

    def _place(self, index: int) -> Path:
        return self.folder / f"{index + 1}-{self.recipe.stages[index].name}"

    def _make_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise MicronetError(f"{self.folder}: a file; choose another folder with -o")
        known = (self.folder / "run.json").exists() or not self.folder.exists()
        if not known and any(file.name != ".lock" for file in self.folder.iterdir()):
            raise MicronetError(f"{self.folder}: not empty and not a run folder; choose another one with -o")
        self.folder.mkdir(parents=True, exist_ok=True)

    def _open(self, resolved: dict[str, Any]) -> dict[str, Any]:
        """Begin the run's record, or check that the run in the folder is this one; returns what run.json says."""
        file = self.folder / "run.json"
        now = {
            "resolved": resolved,
            "smoke": self.options.smoke,
            "versions": versions(),
            "hardware": hardware(self.device),
            "source": self.source.name if self.source else None,
            "git": git_state(self.source.parent if self.source else Path.cwd()),
        }
        if file.exists():
            try:
                then = json.loads(file.read_text())
            except ValueError as error:
                raise MicronetError(f"{file}: damaged ({error}); start over with --fresh") from error
            return self._compare(then, now)
        if self.source:
            shutil.copyfile(self.source, self.folder / "recipe.py")
        write_text(json.dumps(now, indent=1) + "\n", file)
        return now

    def _compare(self, then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
        old, new = flat(_listed(then["resolved"])), flat(_listed(now["resolved"]))
        differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if differing:
            key = differing[0]
            raise MicronetError(
                f"{self.folder}: holds a run of other values ({key.rstrip('_')} was {old.get(key)!r}, is "
                f"{new.get(key)!r}): choose another folder with -o, or start over with --fresh"
            )
        threads = then["hardware"]["threads"]
        if threads != torch.get_num_threads():
            self.console.print(
                f"using {threads} threads, as the run began with: other numbers of threads round otherwise"
            )
            torch.set_num_threads(threads)
            now["hardware"]["threads"] = threads
        old, new = (flat({"hardware": part["hardware"], "versions": part["versions"]}) for part in (then, now))
        changed = [f"{key} {old.get(key)} -> {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]
        if changed:
            self.console.print(f"changed since the run began, so that last digits may differ: {'; '.join(changed)}")
        return then

    def _introduce(self, data: Data) -> None:
        test = f", test {len(data.test):,}" if data.test is not None else ""
        also = " (the test images: this recipe copies a source that validated on them)" if data.valid_is_test else ""
        self.console.print(
            f"[bold]{self.folder}[/bold]: {data.name}, {data.num_classes} classes; "
            f"train {len(data.train):,}, valid {len(data.valid):,}{also}{test}",
            highlight=False,
        )

    def _stage(self, index: int, data: Data, previous: Path | None, record: dict[str, Any]) -> Path:
        """Run one stage, or find it done; returns its folder."""
        fit, place = self.recipe.stages[index], self._place(index)
        if (place / "row.json").exists() and (place / "model.pth").exists():
            self.console.print(f"stage {fit.name}: done before", highlight=False)
            return place
        place.mkdir(exist_ok=True)
        # A stage's draws depend on its number, not on what was drawn before: so does a resumed one's.
        seed = self.options.seed * 1000 + index
        seed_all(seed)
        with self._blaming(f"stage {fit.name}"):
            model = self._build(data) if previous is None else self._load(previous).model
            learn = make_learner(fit, model, data, device=self.device, seed=seed, path=place)
        self._announce(fit, model)
        logger = _tensorboard(place) if self.options.tensorboard else ()
        result = run_fit(learn, fit, self.console, checkpoint=place / "checkpoint.pth", cbs=logger)
        if result.diverged is not None:
            (place / "checkpoint.pth").unlink(missing_ok=True)
            raise MicronetError(
                f"{place}: the training loss was no longer finite in epoch {result.diverged + 1}: lower the "
                f"learning rate (lr={fit.lr}) or clip the gradient (grad_clip), then start over with --fresh"
            )
        self._measure(index, learn.model, data, result, record)
        return place

    @contextmanager
    def _blaming(self, part: str) -> Iterator[None]:
        """Say of an error in what the recipe's values gave that the recipe is where to mend it."""
        try:
            yield
        except (ValueError, TypeError) as error:
            raise MicronetError(f"{self.source or 'recipe'}, {part}: {error}") from error

    def _build(self, data: Data) -> nn.Module:
        return self.recipe.model(num_classes=data.num_classes)

    def _load(self, place: Path) -> Bundle:
        function: Callable[..., Any] = self.recipe.model
        while hasattr(function, "func"):
            function = function.func
        return bundles.load(place / "model.pth", factory=function)

    def _announce(self, fit: Fit, model: nn.Module) -> None:
        params = sum(p.numel() for p in model.parameters())
        bf16 = "bf16 and channels_last" if uses_bf16(fit, self.device) else "float32"
        self.console.print(
            f"stage {fit.name}: {self.factory.partition(':')[2]}, {params:,} parameters; {fit.epochs} epochs on "
            f"{self.device} in {bf16}, {torch.get_num_threads()} threads",
            highlight=False,
        )

    def _measure(self, index: int, model: nn.Module, data: Data, result: FitResult, record: dict[str, Any]) -> None:
        """Write the stage's files; row.json comes last and marks the stage as done."""
        fit, place = self.recipe.stages[index], self._place(index)
        model.to("cpu", memory_format=torch.contiguous_format).eval()
        valid = evaluate(model, plain_loader(data.valid, data, device=self.device), self.device)
        row: dict[str, Any] = {
            "stage": fit.name,
            "epochs": len(result.rows),
            "best_epoch": None if result.best_epoch is None else result.best_epoch + 1,
            "seconds": sum(epoch["seconds"] for epoch in result.rows),
            "valid": valid.row(),
            "valid_is_test": data.valid_is_test,
        }
        if index == len(self.recipe.stages) - 1 and data.test is not None:
            test = evaluate(model, plain_loader(data.test, data, device=self.device), self.device)
            row["test"] = test.row()
        model.cpu()
        totals = score(model, input_size=data.input_size).to_json()["totals"]
        row |= {name: totals[name] for name in ("params", "mults", "adds", "macs", "ops", "score")}
        _, kwargs = bundles.describe_factory(self.recipe.model)
        bundle = Bundle(
            model=model,
            factory=self.factory,
            kwargs=kwargs | {"num_classes": data.num_classes},
            classes=data.classes,
            input_size=data.input_size,
            mean=data.mean,
            std=data.std,
            history=[*read_rows(self.folder), row],
            provenance=record,
        )
        bundles.save(bundle, place / "model.pth")
        if result.rows:
            write_csv(result.rows, place / "history.csv")
            plot_curves(result.rows, place / "curves.png", f"{self.folder.name}: {fit.name}")
            plot_rates(result.lrs, place / "lr.png", f"{self.folder.name}: {fit.name}")
        row["file_bytes"] = (place / "model.pth").stat().st_size
        write_text(json.dumps(row, indent=1) + "\n", place / "row.json")
        (place / "checkpoint.pth").unlink(missing_ok=True)


def _listed(value: Any) -> Any:
    """Turn lists into dicts by position, so that `flat` names their items."""
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    if isinstance(value, list):
        return {str(place): _listed(item) for place, item in enumerate(value)}
    return value


def _tensorboard(place: Path) -> tuple[Callback, ...]:
    try:
        from fastai.callback.tensorboard import TensorBoardCallback
    except ImportError as error:
        raise MicronetError(
            f"--tensorboard needs the package tensorboard: pip install tensorboard ({error})"
        ) from error
    return (TensorBoardCallback(log_dir=place / "tensorboard", trace_model=False, log_preds=False),)
