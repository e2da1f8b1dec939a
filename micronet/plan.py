"""What a recipe will cost, before it is trained: a row a stage, and what the recipe asks for and will not get."""

import copy
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fastai.learner import Learner

from callbacks.checkpoint import random_state, set_random_state
from callbacks.expected import Expected, declared, follow, narrowed, requantised, together
from callbacks.ledger import Ledger, UnknownOperation, build
from micronet import bundle as bundles
from micronet.counting import Assume
from micronet.data import Data
from micronet.errors import MicronetError
from micronet.learner import make_learner, pick_device, precision, seed_all
from micronet.machine import busy, hardware, versions
from micronet.model_source import open_model
from micronet.plan_checks import Finding, check_data, check_stage, one_line
from micronet.plan_time import Timing, time_fit
from micronet.recipe import Fit, Recipe, blaming, describe
from micronet.rules import Rules, official
from micronet.score import Score, tally
from micronet.start import begin, check_masks_fit, own_factory, some_images


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one stage will cost.

    Args:
        name: of the stage.
        epochs: passes over the training images.
        batch_size: images a step.
        bf16: whether it computes in bfloat16.
        expected: what will hold of the network after it, as the callbacks of this stage and of those before declare.
        score: of the network as it will be then, by the rules that were asked for.
        file_bytes: about what its `model.pth` will take, weights as 32-bit numbers.
        timing: of an epoch, on the network as it is at first; None where it was not taken.
    """

    name: str
    epochs: int
    batch_size: int
    bf16: bool
    expected: Expected
    score: Score
    file_bytes: int
    timing: Timing | None

    @property
    def params(self) -> int | None:
        """Count of all parameters as they are trained, which a run's rows say, too; storage is the deployed form's."""
        return self.score.ledger.params

    @property
    def seconds(self) -> float | None:
        """All its epochs; None where the time of one is not known."""
        if self.epochs == 0:
            return 0.0
        return None if self.timing is None else self.epochs * self.timing.epoch_seconds

    def to_json(self) -> dict[str, Any]:
        """Give plain values, in the form that stays the same from version to version."""
        known = ("storage", "mults", "adds", "macs", "ops", "score_params", "score_ops", "score")
        time = self.timing
        return {
            "stage": self.name,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "bf16": self.bf16,
            "expected": vars(self.expected)
            | {"estimate": self.expected.estimated, "masked": len(self.expected.masked)},
            "params": self.params,
            **{name: getattr(self.score, name) for name in known},
            "file_bytes": self.file_bytes,
            "timing": time and vars(time),
            "epoch_seconds": time and time.epoch_seconds,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe will cost.

    Args:
        data: name of the data set.
        images: how many there are in train, valid and test.
        device: where it will be trained.
        rules: who counted.
        stages: a row each.
        findings: what the recipe asks for and will not get.
        notes: how to read the numbers, in sentences.
    """

    data: str
    images: dict[str, int]
    device: str
    rules: str
    stages: tuple[StagePlan, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float | None:
        """All stages; None where the time of one is not known."""
        times = [stage.seconds for stage in self.stages]
        return None if None in times else sum(times)

    @property
    def refused(self) -> bool:
        """Whether `micronet fit` would end with an error."""
        return any(finding.refused for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Give plain values, in the form that stays the same from version to version."""
        return {
            "data": self.data,
            "images": self.images,
            "device": self.device,
            "rules": self.rules,
            "stages": [stage.to_json() for stage in self.stages],
            "seconds": self.seconds,
            "findings": [vars(finding) for finding in self.findings],
            "notes": list(self.notes),
        }


def plan(
    recipe: Recipe,
    *,
    rules: Rules = official,
    limit: int | None = None,
    device: str | None = None,
    timed: bool = True,
    where: Any = "recipe",
) -> Plan:
    """Say what a recipe will cost. Nothing is kept: no file, no trained network, no drawn random number.

    Args:
        recipe: what would be run.
        rules: who counts.
        limit: most images in each split; None for all.
        device: where to train; None for a GPU where there is one.
        timed: whether to run a few steps of each stage, for their time and for what only fails when it runs.
        where: what errors name, such as the recipe's file.

    Raises:
        MicronetError: the data cannot be had, or the network cannot be built, stored or scored.
    """
    state = random_state()
    try:
        seed_all(0)
        with tempfile.TemporaryDirectory() as folder:
            return _Planner(recipe, rules, limit, pick_device(device), timed, where, Path(folder)).plan()
    finally:
        set_random_state(state)


class _Planner:
    def __init__(
        self, recipe: Recipe, rules: Rules, limit: int | None, device: str, timed: bool, where: Any, folder: Path
    ) -> None:
        self.recipe, self.rules, self.device, self.timed, self.folder = recipe, rules, device, timed, folder
        self.resolved = describe(recipe)
        with blaming(f"{where}, data"):
            data = recipe.data()
            self.data: Data = data if limit is None else data.limit(limit)
        with blaming(f"{where}, model"):
            self.bundle = begin(recipe, self.data)
        self.masks = dict(self.bundle.masks)
        self.ledger, logits = self._count()
        self.findings = [*check_data(self.data, logits)]
        self.busy = busy()

    def plan(self) -> Plan:
        stages, expected = [], Expected()
        for fit in self.recipe.stages:
            learn = self._learner(fit) if self._edit(fit) else None
            timing = None
            if learn is not None:
                self.findings += check_stage(fit, learn, self.data, self.device)
                expected = self._expected(fit, learn, expected)
                if self.timed and fit.epochs and len(self.data.train) and len(self.data.valid):
                    timing = self._time(fit, learn)
            stages.append(self._row(fit, expected, timing))
        sizes = {"train": self.data.train, "valid": self.data.valid, "test": self.data.test}
        return Plan(
            data=self.data.name,
            images={name: len(images) for name, images in sizes.items() if images is not None},
            device=self.device,
            rules=self.rules.name,
            stages=tuple(stages),
            findings=tuple(self.findings),
            notes=tuple(self._notes(stages)),
        )

    def _count(self) -> tuple[Ledger, int]:
        """The network's ledger, and how many numbers it answers with."""
        masks = self.bundle.masks or None
        source = open_model(self.bundle.model, input_size=self.data.input_size, masks=masks)
        graph = source.graph()
        try:
            return build(graph), graph.outputs[0].numel
        except UnknownOperation as error:
            raise MicronetError(f"{source.name}: {error}: micronet fit could not score a stage's network") from error

    def _refuse(self, fit: Fit, error: BaseException) -> None:
        text = str(error) if isinstance(error, MicronetError) else one_line(error)
        self.findings.append(Finding(fit.name, True, text))

    def _edit(self, fit: Fit) -> bool:
        """Change the structure as the fit will; False where it can't be."""
        try:
            for edit in fit.edit:
                edited = edit(self.bundle.model, images=some_images(self.data, 32))
                self.bundle = replace(self.bundle, model=edited.model, edits=[*self.bundle.edits, edited.log])
                check_masks_fit(replace(self.bundle, masks=self.masks), edited.log)
            if fit.edit:
                self.ledger, _ = self._count()
        except Exception as error:  # an edit can fail in any way on a network that it was not made for
            self._refuse(fit, error)
            return False
        return True

    def _learner(self, fit: Fit) -> Learner | None:
        try:
            model, masks = copy.deepcopy(self.bundle.model), self.bundle.masks
            return make_learner(fit, model, self.data, masks=masks, device=self.device, path=self.folder)
        except Exception as error:  # a recipe's optimizer and callbacks can fail in any way
            self._refuse(fit, error)
            return None

    def _expected(self, fit: Fit, learn: Learner, before: Expected) -> Expected:
        try:
            changes = [change for change in map(declared, learn.cbs) if change is not None]
            after = follow(before, together(changes))
        except ValueError as error:
            self._refuse(fit, MicronetError(str(error)))
            return before
        state = self.bundle.model.state_dict()
        for name in state.keys() & set(after.masked):  # which elements is not known; a later edit may lose them
            self.masks.setdefault(name, torch.ones(state[name].shape, dtype=torch.bool))
        return after

    def _time(self, fit: Fit, learn: Learner) -> Timing | None:
        try:
            return time_fit(learn, fit)
        except Exception as error:  # whatever a callback raises in these steps it raises in the fit
            # What is refused already needs no second line about where it showed.
            if not any(finding.refused and finding.stage in ("recipe", fit.name) for finding in self.findings):
                self._refuse(fit, error)
            return None

    def _row(self, fit: Fit, expected: Expected, timing: Timing | None) -> StagePlan:
        score = self._score(expected)
        return StagePlan(
            name=fit.name,
            epochs=fit.epochs,
            batch_size=fit.batch_size or self.data.batch_size,
            bf16=precision(fit, self.device)[0],
            expected=expected,
            score=score,
            file_bytes=self._file_bytes(expected, score.ledger),
            timing=timing,
        )

    def _score(self, expected: Expected) -> Score:
        ledger, assume = narrowed(self.ledger, expected.ratio), Assume()
        if self.rules.options():  # others know neither sparsity nor bits
            weight, act = expected.weight_bits, expected.act_bits
            assume = Assume(bits=weight if weight == act else None, sparsity=expected.sparsity)
            if weight != act:
                ledger = requantised(ledger, weight, act)
        return tally(type(self.bundle.model).__name__, ledger, self.rules, assume)

    def _file_bytes(self, expected: Expected, ledger: Ledger) -> int:
        """What a file of the network takes: one is written and removed; removed channels shorten its tensors."""
        state = self.bundle.model.state_dict()
        weights = [array.name for array in self.ledger.arrays if array.role == "weight" and array.name in state]
        masks = {name: torch.ones(state[name].shape, dtype=torch.bool) for name in weights if expected.sparsity}
        record = {"resolved": self.resolved, "versions": versions(), "hardware": hardware(self.device)}
        bundle = replace(self.bundle, provenance=record, masks=masks)
        bundles.save(bundle, self.folder / "model.pth", factory=own_factory(self.recipe))
        whole = (self.folder / "model.pth").stat().st_size
        tensors = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        tensors += sum(-(-mask.numel() // 8) for mask in masks.values())  # eight elements of a mask are a byte
        numbers = [sum(array.numel for array in part.arrays) for part in (ledger, self.ledger)]
        return whole - tensors + round(tensors * numbers[0] / max(1, numbers[1]))

    def _notes(self, stages: list[StagePlan]) -> list[str]:
        expected = [stage.expected for stage in stages]
        notes = [self.busy] if self.busy and any(stage.timing for stage in stages) else []
        if any(map(bool, expected)):
            notes.append("what callbacks are expected to bring is assumed, not measured")
        if any(one.estimated for one in expected):
            notes.append(
                "estimate: which channels or weights go is known when it is done; the rest follows from shares"
            )
        if any(one.sparsity for one in expected):
            notes.append("zeros fall on late layers first, which have few operations: up to a quarter more may be left")
        if any(one.ratio for one in expected):
            notes.append("times are those of the whole network: fewer channels will be faster")
        if any(one.weight_bits for one in expected):
            notes.append("files are those of 32-bit weights: packed, a network takes its storage")
        if not self.rules.options() and any(one.sparsity or one.weight_bits or one.act_bits for one in expected):
            notes.append(f"the {self.rules.name} rules know no bits and no sparsity: counted as if there were none")
        return notes
