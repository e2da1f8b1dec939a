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
from dataclasses import dataclass
from itertools import zip_longest
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from callbacks.graph import Graph, Shape
from micronet.errors import first_line

if TYPE_CHECKING:  # onnx takes 0.4 s to import
    from onnx import TypeProto, ValueInfoProto

    from micronet.onnx_file import OnnxFile


@dataclass(frozen=True)
class _Input:
    """What the file says of an input.

    Args:
        name: its name.
        kind: number of its type in ONNX.
        sizes: **shape** of one image, None where it is open.
        batch: how many images the file was made for; None where it has no batch axis.
    """

    name: str
    kind: int
    sizes: tuple[int | None, ...]
    batch: int | None

    @property
    def wants(self) -> str:
        """What it takes, in words."""
        said = " x ".join("any" if n is None else str(n) for n in self.sizes) or "one number"
        if len(self.sizes) != 3:
            return said
        return f"{said} ({'height, width, channels' if self._channels_last else 'channels, height, width'})"

    @property
    def hint(self) -> str:
        """A size that it takes, as the command line has it."""
        if len(self.sizes) != 3:
            return "x".join(str(n or 224) for n in self.sizes) or "1"
        *rest, channels = self.sizes if self._channels_last else (*self.sizes[1:], self.sizes[0])
        return "x".join(map(str, (channels or 3, *(n or 224 for n in rest))))

    @property
    def _channels_last(self) -> bool:
        first, second, last = self.sizes
        return first not in (1, 3, 4) and last is not None and (last in (1, 3, 4) or first == second != last)

    def fit(self, given: Shape) -> Shape | None:
        """A size as it lies in the file, `(C, H, W)` turned round where channels are last; None where it doesn't fit.

        Args:
            given: the size.
        """
        ways = [given, (*given[1:], *given[:1])] if self.sizes else [()] if given == (1,) else [given]
        fits = (way for way in ways if len(way) == len(self.sizes))
        return next((way for way in fits if all(n in (None, m) for n, m in zip(self.sizes, way, strict=True))), None)


def _read_input(file: "OnnxFile", info: "ValueInfoProto", given: Shape | None) -> _Input:
    from onnx import TensorProto

    kind = info.type.tensor_type
    if not kind.HasField("shape") or kind.elem_type not in TensorProto.DataType.values():
        raise file.error(f"the input {info.name!r} has no shape or no type; export the file again")
    said = tuple(d.dim_value if d.dim_value > 0 else None for d in kind.shape.dim)  # some write -1 for what is open
    batched = len(said) in (2, 4, 5) or said[:1] == (None,)  # an image without a batch axis has three
    if given is not None and len(given) == 3 and said == (None,) * 3:
        batched = False
    return _Input(info.name, kind.elem_type, said[batched:], (said[0] or 1) if batched else None)


def _text(size: Shape) -> str:
    return "x".join(map(str, size))


def _sized(file: "OnnxFile", inputs: list[_Input], given: Sequence[Shape]) -> list[Shape]:
    """The size of every input, one given for each or none at all."""
    is_open = any(None in one.sizes for one in inputs)
    hint = f"such as {','.join(one.hint for one in inputs)}"
    if given and len(given) != len(inputs):
        takes = ", ".join(f"{one.name!r}: {one.wants}" for one in inputs)
        count = f"{len(inputs)} input{'s' * (len(inputs) > 1)}"
        told = f"--input-size gives {len(given)} size{'s' * (len(given) > 1)}, {','.join(map(_text, given))}"
        raise file.error(f"the network takes {count} ({takes}), but {told}; give one for each, {hint}")
    sizes = []
    for one, size in zip(inputs, given or (None,) * len(inputs), strict=True):
        if size is None and None in one.sizes:
            told = f"the input {one.name!r} leaves its size open; give --input-size for {one.wants}"
            raise file.error(f"{told}, {hint}")
        fitting = one.sizes if size is None else one.fit(size)
        if fitting is None:
            then = f"give --input-size, {hint}" if is_open else "leave --input-size away"
            raise file.error(f"the input {one.name!r} takes {one.wants}, not {_text(size)}; {then}")
        sizes.append(fitting)
    return sizes


def _inputs(file: "OnnxFile", given: Sequence[Shape]) -> tuple[dict[str, "TypeProto"], int]:
    """Shape and type of every input for one image, and how many images the file was made for at once."""
    from onnx import helper

    # Before IR 4, initializers were inputs.
    infos = [i for i in file.model.graph.input if i.name not in file.tensors and i.name not in file.sparse]
    inputs = [_read_input(file, info, size) for info, size in zip_longest(infos, given[: len(infos)])]
    if not inputs:
        raise file.error("the network takes no input; give a file with a network for images")
    found = {}
    for one, size in zip(inputs, _sized(file, inputs, given), strict=True):
        shape = size if one.batch is None else (1, *size)
        found[one.name] = helper.make_tensor_type_proto(one.kind, shape)
    return found, inputs[0].batch or 1


def _each(input_size: Sequence[int] | Sequence[Sequence[int]] | None) -> list[Shape]:
    """The sizes that are given: one alone is an input's, too."""
    if not input_size:
        return []
    one = not any(isinstance(part, Sequence) for part in input_size)
    return [tuple(size) for size in ([input_size] if one else input_size)]


def read_onnx(path: str | PathLike[str], input_size: Sequence[int] | Sequence[Sequence[int]] | None = None) -> Graph:
    """Read an ONNX file as a graph, for one image.

    Args:
        path: The file.
        input_size: **Shape** of one image, `(C, H, W)`, for a file that leaves it open; one for each input, in their
            order, where there are several.

    Raises:
        MicronetError: The file is none of ONNX's, is not whole, keeps data outside its folder, leaves its input's size
            open or takes another than is given, or decides what it runs by looking at the image.
    """
    from micronet.onnx_file import MALFORMED, open_onnx
    from micronet.onnx_reader import Reader
    from micronet.onnx_shapes import Shapes

    file = open_onnx(Path(fspath(path)))
    try:
        inputs, batch = _inputs(file, _each(input_size))
        return Reader(file, Shapes(file, inputs, batch)).graph()
    except MALFORMED as error:
        raise file.error(f"not a network as ONNX has them: {first_line(error)}; export it again") from error
