"""What an ONNX file of ours says of itself: class names, what its input is, what it costs, where it came from.

It stands in the file's own `metadata_props`, pairs of texts, which every runtime gives; the values are JSON. Reading it
needs neither torch nor onnx where a runtime has the file open.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micronet.decode import MOST_SIDE
from micronet.errors import MicronetError

if TYPE_CHECKING:
    from onnx import ModelProto

FORMAT, VERSION = "micronet", 1
_PREFIX = "micronet."
_ROOT = r"/|~[\w.-]*[/\\]|[A-Za-z]:[/\\]|\\\\|file:|\.\.?[/\\]"  # what a path begins with
_PATH = re.compile(rf"(?:{_ROOT})(?!\s)")
# In a longer text: up to a space, and a lone `/word` is none. A colon that `//` follows is that of an address.
_PATH_WITHIN = re.compile(rf"(?:(?<=[\s'\"=(,;\[])|(?<=:)(?!//))(?:{_ROOT})(?=[^\s/\\]*[/\\]|(?<!/))[^\s'\",;)\]]+")
INSIDE = "RGB, each channel from 0 to 1; the graph normalises"
OUTSIDE = "RGB, each channel from 0 to 1, minus mean, divided by std"


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What a file says of itself.

    Args:
        classes: class names in the order of the logits; empty where nobody knows them.
        input_size: **shape** of one image, `(C, H, W)`.
        mean: what to subtract from each channel of an image scaled to [0, 1].
        std: what to divide each channel by after that.
        normalised: whether the graph does both itself, so that it is to be given what is scaled to [0, 1].
        score: totals of its score, with the rules' name; empty where an operation has no rule.
        gate: how it compared with the network that it was made from, on real images; by which runtime, on which
            processor.
        provenance: recipe and its values, versions, commit. No paths.
    """

    classes: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    normalised: bool
    score: Mapping[str, Any] = field(default_factory=dict)
    gate: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def input_mean(self) -> tuple[float, ...]:
        """What to subtract from an image before the graph gets it: zeros where the graph does it."""
        return (0.0,) * len(self.mean) if self.normalised else self.mean

    @property
    def input_std(self) -> tuple[float, ...]:
        """What to divide an image by before the graph gets it: ones where the graph does it."""
        return (1.0,) * len(self.std) if self.normalised else self.std

    def props(self) -> dict[str, str]:
        """The pairs of texts that stand in the file."""
        values = {
            "format": FORMAT,
            "version": VERSION,
            "classes": self.classes,
            "input_size": self.input_size,
            "mean": self.mean,
            "std": self.std,
            "normalised": self.normalised,
            "input": INSIDE if self.normalised else OUTSIDE,
            "score": self.score,
            "gate": self.gate,
            "provenance": without_paths(self.provenance),
        }
        return {_PREFIX + name: json.dumps(value, default=str) for name, value in values.items()}


def parse_meta(props: Mapping[str, str], name: str) -> Meta | None:
    """Read the pairs of texts of a file; None where it has none of ours.

    Args:
        props: `metadata_props`, or a runtime's `custom_metadata_map`.
        name: of the file, for messages.

    Raises:
        MicronetError: they are of a newer version, or not what we write.
    """
    ours = {key.removeprefix(_PREFIX): text for key, text in props.items() if key.startswith(_PREFIX)}
    if not ours:
        return None
    try:
        values = {key: json.loads(text) for key, text in ours.items()}
    except (ValueError, RecursionError) as error:
        raise MicronetError(f"{name}: damaged: what it says of itself is no JSON; export it again") from error
    if values.get("format") != FORMAT or type(values.get("version")) is not int:
        raise MicronetError(f"{name}: damaged: it does not say which version its description has; export it again")
    if values["version"] > VERSION:
        raise MicronetError(
            f"{name}: description of version {values['version']}, this micronet reads up to {VERSION}: update micronet"
        )
    if not _is_sound(values):
        raise MicronetError(f"{name}: damaged: its description is not what an export writes; export it again")
    return Meta(
        classes=tuple(values["classes"]),
        input_size=tuple(values["input_size"]),
        mean=tuple(map(float, values["mean"])),
        std=tuple(map(float, values["std"])),
        normalised=values["normalised"],
        score=values["score"],
        gate=values["gate"],
        provenance=values["provenance"],
    )


def _is_sound(values: Mapping[str, Any]) -> bool:
    kinds = {"classes": list, "input_size": list, "mean": list, "std": list, "normalised": bool}
    kinds |= dict.fromkeys(("score", "gate", "provenance"), dict)
    if not all(isinstance(values.get(name), kind) for name, kind in kinds.items()):
        return False
    size, numbers = values["input_size"], [*values["mean"], *values["std"]]
    return (
        all(isinstance(name, str) for name in values["classes"])
        and len(size) == 3
        and all(type(n) is int and 0 < n <= MOST_SIDE for n in size)
        and len(values["mean"]) == len(values["std"]) == size[0]
        and all(type(n) in (int, float) and abs(n) < 1e30 and math.isfinite(n) for n in numbers)
        and min(values["std"]) > 0
    )


def write_meta(proto: "ModelProto", meta: Meta) -> None:
    """Put a description into a model in place of the one it has; what others wrote stays.

    Args:
        proto: the model, changed in place.
        meta: the description.
    """
    others = {entry.key: entry.value for entry in proto.metadata_props if not entry.key.startswith(_PREFIX)}
    del proto.metadata_props[:]
    for key, value in (others | meta.props()).items():
        proto.metadata_props.add(key=key, value=value)


def read_meta(path: str | Path) -> Meta | None:
    """Read the description of an ONNX file; None where it has none of ours.

    Args:
        path: the file.

    Raises:
        MicronetError: no ONNX file, or one whose description is damaged.
    """
    from micronet.onnx_file import load_proto

    props = load_proto(Path(path)).metadata_props
    return parse_meta({entry.key: entry.value for entry in props}, str(path))


def without_paths(value: Any) -> Any:
    r"""Shorten every path in nested values to its last part, and one of somebody's home folder to nothing.

    A path is what says where something lies on a machine: from the root (`/`, `~`, a drive, `\\host`, `file:`), or
    from a folder (`./`, `../`). All else stays as it is: "1/2", "feature/int8", an address of the web.

    Args:
        value: numbers, texts, and containers of them.
    """
    if isinstance(value, Mapping):
        return {without_paths(str(key)): without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    if _PATH.match(value):  # names of folders may have spaces
        return _last_part(value)
    return _PATH_WITHIN.sub(lambda found: _last_part(found[0]), value)


def _last_part(path: str) -> str:
    """The last folder or file of a path; nothing where that is somebody's home."""
    parts = [part for part in re.split(r"[/\\]+", path) if part]
    at_home = parts[-2:-1] and parts[-2].lower() in ("home", "users")
    return "" if not parts or at_home or (len(parts) == 1 and parts[0].startswith("~")) else parts[-1]
