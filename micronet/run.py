"""Running a recipe in a folder: stages in order, resumed where they were left, a measured row for each."""

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fastai.callback.core import Callback
from rich.console import Console

from callbacks.ema import EMA
from callbacks.protocol import OnnxFile, all_masks, having, onnx_of
from micronet import bundle as bundles
from micronet.bundle import Bundle
from micronet.data import Data
from micronet.differences import differences
from micronet.errors import MicronetError
from micronet.folder import copy_file, is_empty, locked, read_rows, sweep
from micronet.learner import FitResult, make_learner, pick_device, precision, run_fit, seed_all
from micronet.machine import git_state, hardware, versions
from micronet.names import current
from micronet.recipe import Fit, Recipe, blaming, describe
from micronet.report import flat, stage_lines, write_csv, write_text
from micronet.stage_files import check_reload, draw, keep_onnx, measured
from micronet.start import begin, check_masks_fit, load_stage, own_factory, some_images

SMOKE_IMAGES = 64
MOST_THREADS = 1024  # that a record may ask for


@dataclass(frozen=True)
class RunOptions:
    """What the command line adds to a recipe.

    Args:
        seed: of weights, order, augmentation and all that is drawn, in [0, 10^8].
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

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= 10**8:  # its products with stages and epochs must fit a generator's 64 bits
            raise ValueError(f"seed must be a whole number in [0, 10^8], got {self.seed}")

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

    def run(self) -> Bundle:
        resolved = {"recipe": describe(self.recipe), "seed": self.options.seed, "limit": self.options.images}
        self._make_folder()
        with locked(self.folder):
            sweep(self.folder)
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
            for file in [previous / "model.pth", *previous.glob("*.onnx")]:
                copy_file(file, self.folder / file.name)
            return self._load(previous)

    def _place(self, index: int) -> Path:
        return self.folder / f"{index + 1}-{self.recipe.stages[index].name}"

    def _make_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise MicronetError(f"{self.folder}: a file; choose another folder with -o")
        if self.folder.exists() and not (self.folder / "run.json").exists() and not is_empty(self.folder):
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
                # A record without a stage is of a run that failed on its first values: the mended one takes its place.
                if then["resolved"] and any(self.folder.glob("*-*/")):
                    return self._compare(then, now)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise MicronetError(f"{file}: damaged ({error!r}), or not a run's; start over with --fresh") from error
        write_text(json.dumps(now, indent=1) + "\n", file)
        if self.source:
            copy_file(self.source, self.folder / "recipe.py")
        return now

    def _compare(self, then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
        differing = differences(current(then["resolved"]), now["resolved"])
        if differing:
            more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise MicronetError(
                f"{self.folder}: holds a run of other values ({'; '.join(differing[:3])}{more}): choose another folder "
                "with -o, or start over with --fresh"
            )
        threads = then["hardware"]["threads"]
        if type(threads) is not int or not 0 < threads <= MOST_THREADS:
            raise ValueError(f"{threads!r} threads")
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
            (place / "checkpoint.pth").unlink(missing_ok=True)  # a kill after the last file can leave it
            return place
        # A stage's draws depend on its number, not on what was drawn before: so does a resumed one's.
        seed = self.options.seed * 1000 + index
        seed_all(seed)
        with self._blaming(f"stage {fit.name}"):
            before = begin(self.recipe, data) if previous is None else self._load(previous)
            bundle = self._edit(fit, before, data)
            learn = make_learner(fit, bundle.model, data, masks=bundle.masks, device=self.device, seed=seed, path=place)
        place.mkdir(exist_ok=True)
        self._announce(fit, bundle, any(isinstance(cb, EMA) for cb in learn.cbs))
        logger = _tensorboard(place) if self.options.tensorboard else ()
        result = run_fit(learn, fit, self.console, checkpoint=place / "checkpoint.pth", cbs=logger)
        if result.diverged is not None:
            (place / "checkpoint.pth").unlink(missing_ok=True)
            raise MicronetError(
                f"{place}: the training loss was no longer finite in epoch {result.diverged + 1}: lower the "
                f"learning rate (lr={fit.lr}) or clip the gradient (grad_clip), then start over with --fresh"
            )
        for cb in having(learn, "summary"):
            self.console.print(f"{cb.name}: {cb.summary}", highlight=False)
        with self._blaming(f"stage {fit.name}"):
            onnx = onnx_of(learn)
        masks = {name: mask.cpu() for name, mask in all_masks(learn).items()}
        model = learn.model.to("cpu", memory_format=torch.contiguous_format)
        model._compiled_call_impl = None  # what Module.compile made rounds otherwise than the network of a file
        self._measure(index, replace(bundle, model=model, masks=masks, provenance=record), data, result, onnx)
        return place

    def _blaming(self, part: str) -> AbstractContextManager[None]:
        return blaming(f"{self.source or 'recipe'}, {part}")

    def _edit(self, fit: Fit, bundle: Bundle, data: Data) -> Bundle:
        """Change the structure as the fit asks; what was done is printed."""
        images = some_images(data) if fit.edit else None
        for edit in fit.edit:
            edited = edit(bundle.model, images=images)
            bundle = replace(bundle, model=edited.model, edits=[*bundle.edits, edited.log])
            check_masks_fit(bundle, edited.log)
            self.console.print(f"{edited.log['edit']}: {edited.summary}", highlight=False)
        return bundle

    def _load(self, place: Path) -> Bundle:
        return load_stage(self.recipe, place / "model.pth")

    def _save(self, bundle: Bundle, place: Path) -> None:
        bundles.save(bundle, place / "model.pth", factory=own_factory(self.recipe))

    def _announce(self, fit: Fit, bundle: Bundle, averaged: bool) -> None:
        params = sum(p.numel() for p in bundle.model.parameters())
        bf16, channels_last = precision(fit, self.device)
        threads = torch.get_num_threads()
        how = ("bf16" if bf16 else "float32") + (", channels_last" if channels_last else "")
        self.console.print(
            f"stage {fit.name}: {bundle.factory.partition(':')[2]}, {params:,} parameters; "
            f"{_count(fit.epochs, 'epoch')} on {self.device} in {how}, {_count(threads, 'thread')}",
            highlight=False,
        )
        if fit.epochs:  # why the last epoch's numbers and the stage's differ
            seen = f"in {'bf16' if bf16 else 'float32'}{', averaged weights' * averaged}"
            told = f"top-1 of an epoch: validation images {seen}; of the stage: the same with its file in float32"
            self.console.print(told, highlight=False)

    def _measure(self, index: int, made: Bundle, data: Data, result: FitResult, onnx: OnnxFile | None) -> None:
        """Write the stage's files; row.json comes last and marks the stage as done.

        The row inside the file cannot say how large the file is; row.json does.
        """
        fit, place = self.recipe.stages[index], self._place(index)
        self._save(made, place)
        bundle = self._load(place)  # every number below is measured on what the file gives
        check_reload(made, bundle, data, place / "model.pth")
        test = index == len(self.recipe.stages) - 1
        row: dict[str, Any] = {
            "stage": fit.name,
            "epochs": len(result.rows),
            "best_epoch": None if result.best_epoch is None else result.best_epoch + 1,
            "seconds": sum(epoch["seconds"] for epoch in result.rows),
            **measured(bundle, data, self.device, test=test),
        }
        if onnx is not None:
            row["onnx"] = keep_onnx(onnx, bundle, data, place, test=test)
        # The rows of this run's stages before are read with what their files could not say of themselves.
        bundle.history = [*made.history[: len(made.history) - index], *read_rows(self.folder)[:index], row]
        self._save(bundle, place)
        draw(fit, result, data, row["valid"]["images"], place, f"{self.folder.name}: {fit.name}")
        row["file_bytes"] = (place / "model.pth").stat().st_size
        write_text(json.dumps(row, indent=1) + "\n", place / "row.json")
        (place / "checkpoint.pth").unlink(missing_ok=True)
        for line in stage_lines(row):
            self.console.print(line, highlight=False)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _tensorboard(place: Path) -> tuple[Callback, ...]:
    try:
        from fastai.callback.tensorboard import TensorBoardCallback
    except ImportError as error:
        raise MicronetError(
            f"--tensorboard needs the package tensorboard: pip install tensorboard ({error})"
        ) from error

    class TensorBoard(TensorBoardCallback):
        """fastai's own; it logs every hyper-parameter, of which torch's optimizers have some that are no numbers."""

        def after_batch(self) -> None:
            self.writer.add_scalar("train_loss", self.learn.smooth_loss, self.learn.train_iter)
            self.writer.add_scalar("lr_0", self.learn.opt.hypers[-1]["lr"], self.learn.train_iter)

    return (TensorBoard(log_dir=place / "tensorboard", trace_model=False, log_preds=False),)
