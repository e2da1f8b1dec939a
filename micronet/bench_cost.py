"""What a model costs on paper, for `micronet bench`: bytes, numbers, operations, score, zeros, widths."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from micronet.errors import MicronetError

if TYPE_CHECKING:
    from micronet.model_source import ModelSource


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a model costs on paper; None where it can't be told.

    Args:
        file_bytes: of its file, and of files that it keeps its arrays in; None for a network by name.
        params: numbers that the deployed form stores.
        storage: 32-bit words that they take.
        macs: multiply-accumulates for one image, zeros among the weights included.
        ops: operations for one image by the official rules, which leave zeros out and weigh widths.
        score: by the official rules.
        zeros: share of its weights that is stored as zero, for whatever reason, in [0, 1]; of an array with a mask,
            what that holds at zero.
        masked: share of its weights that masks hold at zero, part of `zeros`; None for an ONNX file, which has none.
        weight_bits: width of its narrowest weights.
        unknown: why there is no score.
    """

    file_bytes: int | None = None
    params: int | None = None
    storage: float | None = None
    macs: int | None = None
    ops: float | None = None
    score: float | None = None
    zeros: float = 0.0
    masked: float | None = None
    weight_bits: int = 32
    unknown: str = ""


def cost_of(source: "ModelSource") -> Cost:
    """Count a model; what can't be counted is None, with the reason.

    Args:
        source: the model.
    """
    from micronet.rules import official
    from micronet.score import tally

    file = Path(source.name)
    size = file.stat().st_size if file.is_file() else None
    try:
        if source.path is not None:
            size += _beside(source.path)
        ledger = source.ledger()
        score = tally(source.name, ledger, official)
    except MicronetError as error:
        told = str(error).removeprefix(f"{source.name}: ").removesuffix("; --allow-unknown lists them as uncounted")
        return Cost(file_bytes=size, unknown=told)
    weights = [array for array in ledger.arrays if array.role == "weight" and array.nonzero is not None]
    numbers = sum(array.numel for array in weights)
    zeros = numbers - sum(array.nonzero for array in weights)
    masked = None if source.path is not None or not numbers else min(source.masked_zeros, zeros) / numbers
    return Cost(
        file_bytes=size,
        params=score.params,
        storage=score.storage,
        macs=score.macs,
        ops=score.ops,
        score=score.score,
        zeros=zeros / numbers if numbers else 0.0,
        masked=masked,
        weight_bits=min((line.weight_bits for line in ledger.lines if line.weight_bits), default=32),
    )


def _beside(path: Path) -> int:
    """Bytes of the files that an ONNX file keeps arrays in."""
    from micronet.onnx_file import open_onnx

    return sum(open_onnx(path).external.values())
