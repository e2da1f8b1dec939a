"""A plan as people read it: a table of its stages, and lines below it."""

from rich.table import Table

from callbacks.expected import Expected
from micronet.plan import Plan


def duration(seconds: float | None) -> str:
    """A time in two units at most: `0.4 s`, `45 s`, `18 min 10 s`, `2 h 5 min`; `-` where it is not known."""
    if seconds is None:
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f} s" if seconds else "0 s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def effect(expected: Expected) -> str:
    """What is expected of a network, in a few words."""
    said = [f"ratio {expected.ratio:.3g}"] if expected.ratio else []
    said += [f"sparsity {expected.sparsity:.3g}"] if expected.sparsity else []
    if expected.weight_bits and expected.weight_bits == expected.act_bits:
        said.append(f"{expected.weight_bits} bits")
    else:
        said += [f"{expected.weight_bits}-bit weights"] if expected.weight_bits else []
        said += [f"{expected.act_bits}-bit activations"] if expected.act_bits else []
    return ", ".join(said) + (" (estimate)" if said and expected.estimated else "") or "-"


def plan_table(plan: Plan) -> Table:
    """Lay out the stages of a plan, a row each.

    Args:
        plan: what to show.
    """
    table = Table(title=f"plan - rules: {plan.rules}", title_justify="left")
    table.add_column("stage")
    table.add_column("brings")
    for column in ("epochs", "params", "storage", "ops", "score", "file", "an epoch", "in all"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in plan.stages:
        about = "~" if stage.expected.estimated else ""
        table.add_row(
            stage.name,
            effect(stage.expected),
            f"{stage.epochs:,}",
            f"{about}{stage.params:,}",
            f"{about}{stage.score.storage:,.0f}",
            f"{about}{stage.score.ops / 1e6:,.1f} M",
            f"{about}{stage.score.score:.5f}",
            f"about {stage.file_bytes / 1e6:.2f} MB",
            duration(stage.timing and stage.timing.epoch_seconds),
            duration(stage.seconds),
        )
    return table


def plan_lines(plan: Plan, recipe: str) -> tuple[list[str], list[str]]:
    """Put into words what stands above the table and below it.

    Args:
        plan: what to tell.
        recipe: what to call it.
    """
    images = ", ".join(f"{split} {count:,}" for split, count in plan.images.items())
    above = [f"{recipe}: {plan.data}; {images}; on {plan.device}"]
    for stage in plan.stages:
        if stage.timing is not None:
            how = "bf16" if stage.bf16 else "float32"
            parts = f" in {stage.timing.parts} parts, by their shares" if stage.timing.parts > 1 else ""
            above.append(
                f"stage {stage.name}: {stage.timing.steps:,} steps of {stage.batch_size:,} images in {how}, "
                f"{1000 * stage.timing.step_seconds:,.0f} ms each (median of {stage.timing.measured}{parts}), "
                f"validation {duration(stage.timing.valid_seconds)}"
            )
    trained = any(stage.epochs for stage in plan.stages)
    below = [f"training: about {duration(plan.seconds)}"] if trained and plan.seconds is not None else []
    return above, [*below, *map(str, plan.findings), *(f"note: {note}" for note in plan.notes)]
