"""What is known of a file in fewer bits: its sizes, how it answers, which layers bring the noise."""

from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from callbacks.layer_noise import Ranking
from micronet.parity import Parity


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """A file that was kept, and how it compares with the float network.

    Args:
        path: the file.
        to: `int8`, `float16` or `minmax8`.
        bytes: size of the file.
        graph_bytes: of what is in it besides its description; of `minmax8`, of the file.
        float_bytes: of the same in float32.
        images: what was compared on, in words.
        parity: the answers beside those of the float network.
        how: what the file was made with.
        ranking: of the layers; None where nobody asked.
        worst: of `minmax8`: the name of the tensor that lost most, and how much: |error| / |tensor|, Euclidean norms.
        notes: what a user should know, in sentences.
    """

    path: Path
    to: str
    bytes: int
    graph_bytes: int
    float_bytes: int
    images: str
    parity: Parity
    how: dict[str, Any]
    ranking: Ranking | None = None
    worst: tuple[str, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """How many times smaller than in float32 it is: graphs without their descriptions, or files."""
        return self.float_bytes / self.graph_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts, texts and numbers."""
        parity = vars(self.parity) | {"agreement": self.parity.agreement}
        parity["relative_error"] = _number(self.parity.relative_error)
        return {
            "file": str(self.path),
            "to": self.to,
            "bytes": self.bytes,
            "graph_bytes": self.graph_bytes,
            "float_bytes": self.float_bytes,
            "images": self.images,
            "parity": parity | {"disagreeing": list(self.parity.disagreeing)},
            "how": self.how,
            "ranking": self.ranking.to_json() if self.ranking else None,
            "worst": list(self.worst) if self.worst else None,
            "notes": list(self.notes),
        }


def _number(value: float) -> float | None:
    """A number as JSON has it, which knows no infinity."""
    return value if isfinite(value) else None
