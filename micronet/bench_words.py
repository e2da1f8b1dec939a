"""What a model's times mean beside the first model's, in words."""

from dataclasses import dataclass

from micronet.bench_stats import Ratio

ABOUT = 1.1  # a speed-up up to this much above or below what operations predict is "as they predict"
SAME = (
    0.02  # the same file six times beside itself: medians of the ratios from 0.99 to 1.01, intervals at times above 1
)
TOO_WIDE = "the interval is too wide to tell"
MANY_ZEROS = 0.3  # codes of few bits have up to about a quarter of zeros that nobody asked for


@dataclass(frozen=True, kw_only=True)
class Side:
    """What a verdict has to know of one of two models.

    Args:
        runtime: torch or onnxruntime.
        device: where it ran.
        ops: operations for one image by the official rules; None where they can't be counted.
        zeros: share of its weights that is zero, in [0, 1]; of codes, where the file tells, that masks hold there.
        simulated: bits that its layers are quantised to, where torch imitates that in float; None elsewhere.
    """

    runtime: str
    device: str = "cpu"
    ops: float | None = None
    zeros: float = 0.0
    simulated: int | None = None


def factor(value: float) -> str:
    """A ratio with two digits behind the point, three where it is small."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def predicted(first: Side, other: Side) -> float | None:
    """How many times as fast a model would be than the first, if time went by operations.

    None where they are not counted, and between two runtimes or devices, where they predict nothing.

    Args:
        first: the model that others are compared with.
        other: the model.
    """
    counted = first.ops and other.ops and (first.runtime, first.device) == (other.runtime, other.device)
    return first.ops / other.ops if counted else None


def verdict(first: Side, other: Side, ratio: Ratio, least: float = SAME) -> str:
    """Say what a speed-up means.

    Args:
        first: the model that others are compared with.
        other: the model.
        ratio: how many times as fast it is.
        least: relative difference up to which a file can differ from itself, run by another process.
    """
    between = f"{ratio.value:.3f}, {ratio.low:.3f} to {ratio.high:.3f}"
    faster, slower = ratio.low > 1 + least, ratio.high < 1 / (1 + least)
    if faster:
        speed = f"{ratio.value:.2f} times as fast ({ratio.low:.2f} to {ratio.high:.2f})"
    elif slower:
        speed = f"slower: it takes {1 / ratio.value:.2f} times as long ({1 / ratio.high:.2f} to {1 / ratio.low:.2f})"
    elif ratio.low <= 1 <= ratio.high:
        speed = f"no difference shown (the interval includes 1: {between})"
    else:
        speed = f"no difference to speak of ({between}): a file can differ as much from itself"
    parts = [speed, *_about_prediction(first, other, ratio, faster, slower)]
    if other.simulated is not None:
        parts.append(f"its {other.simulated} bits are imitated in float by torch, which costs time: time its ONNX file")
    if (first.runtime, first.device) != (other.runtime, other.device):
        where = [f"{side.runtime} on {side.device}" for side in (other, first)]
        parts.append(f"{where[0]} against {where[1]}: this compares the runtimes, too, not the networks alone")
    return "; ".join(parts)


def _about_prediction(first: Side, other: Side, ratio: Ratio, faster: bool, slower: bool) -> list[str]:
    """What is to be said of operations, and of zeros."""
    prediction, same = predicted(first, other), (first.runtime, first.device) == (other.runtime, other.device)
    zeros = f"{100 * other.zeros:.0f} % zeros"
    sparse = other.zeros >= MANY_ZEROS and other.zeros > first.zeros + 0.1
    if not same:
        return [f"{zeros}: this runtime computes them like any other number"] if sparse else []
    if prediction is None:
        return [f"{zeros}: no gain on this runtime"] if sparse and not faster else []
    named = f"its operations predict {factor(prediction)}"
    wide = ratio.high > ratio.low * ABOUT**2  # it holds both less than about a prediction, and more
    if not (faster or slower) and 1 < prediction <= ratio.high * ABOUT and wide:
        return [f"{TOO_WIDE} whether it gains what {named}"]
    if not faster and sparse and prediction > 1:
        return [f"{zeros}: no gain on this runtime ({named})"]
    if faster:
        if ratio.high * ABOUT < prediction:
            why = f"; its {zeros} are computed like any other number" if sparse else ""
            return [f"by less than its operations predict ({factor(prediction)}){why}"]
        if ratio.low > prediction * ABOUT:
            return [f"by more than its operations predict ({factor(prediction)})"]
        if wide:
            return [f"{TOO_WIDE} by less or more than its operations predict ({factor(prediction)})"]
        return [f"by about what its operations predict ({factor(prediction)})"]
    if prediction > ABOUT:
        return [f"no gain on this runtime, though {named}"]
    if slower and prediction * ABOUT < 1:
        if ratio.high * ABOUT < prediction:
            return [f"more than its operations explain ({named})"]
        if wide:
            return [f"{TOO_WIDE} by less or more than its operations explain ({named})"]
        return [f"{named}, too"]
    return [] if not slower else [f"which its operations do not explain ({named})"]
