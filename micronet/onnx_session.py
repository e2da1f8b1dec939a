"""An ONNX file opened by onnxruntime, without importing torch or onnx; what goes wrong is one line."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from micronet.errors import MicronetError, first_line

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions


def open_session(path: str | Path, options: "SessionOptions | None" = None) -> "InferenceSession":
    """Open a file to be run on the CPU.

    Args:
        path: the file.
        options: of onnxruntime, such as the number of threads; its own warnings are switched off in them.

    Raises:
        MicronetError: no such file, or one that onnxruntime can't run.
    """
    import onnxruntime

    if not Path(path).is_file():
        raise MicronetError(f"{path}: {'is a folder; name a file in it' if Path(path).is_dir() else 'no such file'}")
    options = options or onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors come as exceptions, its warnings are about how a graph could be better
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own errors share no class
        raise cannot_run(path, error) from error


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
