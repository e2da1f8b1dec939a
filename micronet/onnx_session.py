"""An ONNX file opened by onnxruntime, without importing torch or onnx; what goes wrong is one line."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from micronet.errors import MicronetError, first_line, require_file

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

FUNCTIONS = 25  # number of the field that holds them
# Bytes of a field's value by the number of its kind: a varint, which says its own; 8; as many as a varint says; 4.
_LENGTHS = {0: 0, 1: 8, 2: None, 5: 4}


def open_session(path: str | Path, options: "SessionOptions | None" = None) -> "InferenceSession":
    """Open a file to be run on the CPU.

    Args:
        path: the file.
        options: of onnxruntime, such as the number of threads; its own warnings are switched off in them.

    Raises:
        MicronetError: no such file, or one that onnxruntime can't run.
    """
    import onnxruntime

    require_file(Path(path))
    if _may_have_functions(Path(path)):
        from micronet.onnx_file import open_onnx

        open_onnx(Path(path))  # which refuses those that onnxruntime would write out for ever, or die of
    options = options or onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors come as exceptions, its warnings are about how a graph could be better
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own errors share no class
        raise cannot_run(path, error) from error
    try:
        _ = session.get_modelmeta().custom_metadata_map, [(one.name, one.shape) for one in session.get_inputs()]
    except UnicodeDecodeError as error:
        raise MicronetError(f"{path}: damaged: its names are no text; copy or export it again") from error
    if not session.get_inputs() or not session.get_outputs():
        raise MicronetError(f"{path}: takes no images or gives no answer: not a classifier")
    return session


def _may_have_functions(path: Path) -> bool:
    """Whether a file defines operators of its own; found out without onnx, which takes its time to import.

    Source: the encoding of protobuf messages; onnx.proto's `ModelProto`, of whose fields only the outermost are read.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        while file.tell() < size:
            key = _varint(file)
            kind = key & 7
            if key >> 3 == FUNCTIONS or kind not in _LENGTHS:
                return True
            length = _LENGTHS[kind]
            length = _varint(file) if length is None else length
            if length > size - file.tell():
                return False  # cut short: onnxruntime refuses it
            file.seek(length, 1)
            if kind == 0:
                _varint(file)
    return False


def _varint(file: BinaryIO) -> int:
    """Read a whole number: seven bits a byte, the lowest first; the last byte is below 128."""
    value = 0
    for place in range(0, 64, 7):
        byte = (file.read(1) or b"\0")[0]
        value |= (byte & 127) << place
        if byte < 128:
            break
    return value


def cannot_run(path: str | Path, error: BaseException) -> MicronetError:
    """The error that says what onnxruntime says of a file, and what to do where that is known.

    Args:
        path: the file.
        error: what onnxruntime raised.
    """
    said = first_line(error)
    if "Protobuf parsing failed" in said:
        return MicronetError(f"{path}: not an ONNX file, or one cut short; copy or export it again")
    # What comes before names codes and the file once more.
    said = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from .*? failed: ?|Fatal error: ", "", said)
    unknown = re.match(r"(\S+)\(-?\d+\) is not a registered function", said)
    if unknown:
        said = f"it does not know the operator {unknown[1]}; export the file with ONNX's own operators"
    return MicronetError(f"{path}: onnxruntime can't run it: {said[:200]}")
