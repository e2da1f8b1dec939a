"""What a file is by its first bytes, in words, so that a wrong one is refused before anything slow is imported."""

import codecs
from pathlib import Path

from micronet.errors import MicronetError, require_file
from micronet.named_networks import LIBRARIES

MOST_HEADER = 1 << 24  # bytes that a packed file's header may take; a DenseNet-121's takes 60,000
_LOOKED_AT = 512  # bytes
# Source: each format's own description.
_STARTS = {
    b"PK": "a zip archive, as a model.pth is",
    b"\x80": "a Python pickle",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"\x1f\x8b": "a gzip archive",
    b"%PDF": "a PDF",
    b"\x7fELF": "a program",
    b"\x89HDF": "an HDF5 file",
}
# ONNX is a protobuf message: field 1, the version, a number (its key is 8); then a text (fields 2 to 4, and 6), a
# number (5), the graph (7) or a set of operators (8). Source: onnx.proto's `ModelProto`.
_ONNX_FIRST, _ONNX_NEXT = 0x08, (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42)


def look(path: Path) -> str:
    """Say what a file looks like: `it looks like text`.

    Args:
        path: the file.
    """
    with path.open("rb") as file:
        start = file.read(_LOOKED_AT)
    if not start:
        return "it is empty"
    # Before the others: its first bytes are a length, which may be any of theirs (1 of 32 begins like a pickle). A file
    # that was cut short may have fewer bytes than that.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= max(MOST_HEADER, path.stat().st_size):
        return "it looks like a safetensors file, as a packed one is"
    for begins, kind in _STARTS.items():
        if start.startswith(begins):
            return f"it looks like {kind}"
    if len(start) > 2 and start[0] == _ONNX_FIRST and start[2] in _ONNX_NEXT:
        return "it looks like an ONNX file"
    return "it looks like text" if _is_text(start) else f"it begins with the bytes {start[:4].hex(' ')}"


def _is_text(start: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)  # a letter of several bytes may be cut
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter.isspace() for letter in text)


def require_model(name: str | Path, *, onnx: bool = True) -> None:
    """Refuse a path that leads to no file, or to one that is no model by its first bytes; more is read later.

    Args:
        name: a path; the name of a network of a library does no harm.
        onnx: whether ONNX files are read, which are told by their names.

    Raises:
        MicronetError: it is not there, a folder, or something else.
    """
    name = str(name)
    if name.partition(":")[0] in LIBRARIES:
        return
    path = Path(name)
    require_file(path)
    if onnx and name.lower().endswith(".onnx"):
        return
    looks = look(path)
    if "zip archive" in looks or "safetensors" in looks:
        return  # what the readers tell apart
    if path.suffix.lower() == ".safetensors":
        raise MicronetError(f"{path}: not a safetensors file; {looks}")
    if onnx and "ONNX" in looks:
        looks += ": rename it, so that its name ends in .onnx"
    kinds = "a model.pth, a packed or an ONNX file" if onnx else "a model.pth or a packed file"
    raise MicronetError(f"{path}: not a model file of micronet ({kinds}); {looks}")
