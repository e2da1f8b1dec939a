"""The cost ledger's reader for ONNX files: any image classifier's graph in the vocabulary of `callbacks/graph.py`.

`read_onnx` reads float and quantised files, from whatever exporter, for one image. Nothing of the file is run but its
shapes' arithmetic, and a network of zeros where shapes cannot be told otherwise.

Quantised files: the widths are read. Weights have the width of their codes; what scales and shifts them is stored, too,
and hangs on the layer that reads them (`attrs["extra"]`), but for a bias whose scale follows from the input's and the
weights'. Layers, pools and whatever moves numbers compute on codes: they read the codes themselves, and their sums are
32 bits wide until QuantizeLinear, an operation `quantize`, makes codes of them. Anything else computes on real numbers:
an operation `dequantize` before it makes real numbers of the codes, which are still of the codes' width, for they can
take no more values than the codes. Moved codes stay codes: to quantise them as they were is no operation.
"""

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from callbacks.graph import Graph, Shape
from micronet.errors import first_line

if TYPE_CHECKING:  # onnx takes 0.4 s to import
    from onnx import TypeProto, ValueInfoProto

    from micronet.onnx_file import OnnxFile


def _size(file: "OnnxFile", info: "ValueInfoProto", input_size: Shape | None) -> tuple[list[int], int]:
    """The shape of an input for one image, and how many images the file was made for."""
    from onnx import TensorProto

    kind = info.type.tensor_type
    if not kind.HasField("shape") or kind.elem_type not in TensorProto.DataType.values():
        raise file.error(f"the input {info.name!r} has no shape or no type; export the file again")
    said = [d.dim_value if d.dim_value > 0 else None for d in kind.shape.dim]  # some write -1 for what is open
    batched = len(said) in (2, 4, 5) or said[:1] == [None]  # an image without a batch axis has three
    batch, sizes = (said[0] or 1, said[1:]) if batched and said else (1, said)
    if input_size is not None and len(sizes) == len(input_size):
        channels, *rest = input_size
        ways = [way for way in ((channels, *rest), (*rest, channels)) if _agree(sizes, way)]
        if not ways:
            wants = " x ".join("any" if n is None else str(n) for n in sizes)
            raise file.error(f"the input {info.name!r} takes {wants}, not {input_size}; leave --input-size away")
        sizes = list(ways[0])
    if None in sizes:
        raise file.error(f"the input {info.name!r} leaves its size open; give --input-size, such as 3,224,224")
    return [1, *sizes] if batched and said else sizes, batch


def _agree(sizes: Sequence[int | None], way: Sequence[int]) -> bool:
    return all(size in (None, given) for size, given in zip(sizes, way, strict=True))


def _inputs(file: "OnnxFile", input_size: Shape | None) -> tuple[dict[str, "TypeProto"], int]:
    """Shape and type of every input for one image, and how many images the file was made for at once."""
    from onnx import helper

    found, batches = {}, []
    for info in file.model.graph.input:
        if info.name not in file.tensors and info.name not in file.sparse:  # before IR 4, initializers were inputs
            sizes, batch = _size(file, info, input_size)
            found[info.name] = helper.make_tensor_type_proto(info.type.tensor_type.elem_type, sizes)
            batches.append(batch)
    if not found:
        raise file.error("the network takes no input; give a file with a network for images")
    return found, batches[0]


def read_onnx(path: str | PathLike[str], input_size: Sequence[int] | None = None) -> Graph:
    """Read an ONNX file as a graph, for one image.

    Args:
        path: The file.
        input_size: **Shape** of one image, `(C, H, W)`, for a file that leaves it open.

    Raises:
        MicronetError: The file is none of ONNX's, is not whole, keeps data outside its folder, leaves its input's size
            open, or decides what it runs by looking at the image.
    """
    from micronet.onnx_file import MALFORMED, open_onnx
    from micronet.onnx_reader import Reader
    from micronet.onnx_shapes import Shapes

    file = open_onnx(Path(fspath(path)))
    try:
        inputs, batch = _inputs(file, None if input_size is None else tuple(input_size))
        return Reader(file, Shapes(file, inputs, batch)).graph()
    except MALFORMED as error:
        raise file.error(f"not a network as ONNX has them: {first_line(error)}; export it again") from error
