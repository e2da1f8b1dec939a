"""A network that was trained with quantised layers, as an ONNX file of its codes, kept as an int8 file is.

By default onnxruntime computes it with integers: codes are stored in 8 bits, and what lies between the layers becomes
8 bits, too (`callbacks/integer_kernels.py`). With `int4` codes of 4 bits and fewer are stored in 4: a smaller file,
whose convolutions onnxruntime computes in float. The committed ResNet-20 at 4 bits, first and last layer 8, one image,
one thread of an AMD EPYC with AVX512-VNNI, ms of CPU time, medians of interleaved runs: 310,346 bytes and 0.42 ms; with
`int4` 165,874 and 1.94; the float network 1,097,041 and 0.78. The former agrees with the network on 966 of 1,000 images
(897 right, 900 before), the latter on all.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from callbacks.fake_quantize import quantised_layers
from callbacks.integer_kernels import integer_kernels
from callbacks.onnx_export import export_onnx, normalising
from callbacks.onnx_run import Kernels, kernels
from callbacks.quantize import chosen_images
from micronet.data import Data
from micronet.deploy import Kept, check_zeros, described, keep
from micronet.errors import MicronetError, first_line
from micronet.gate_images import normalised, real_images, scaled
from micronet.model_source import ModelSource, open_model
from micronet.parity import AGREEMENT, MOST_LOST
from micronet.rules import official
from micronet.score import tally

if TYPE_CHECKING:
    from callbacks.ledger import Ledger

IMAGES, SEED = 512, 0  # training images that the ranges between layers are measured on, as `quantize` takes them
FALLBACK = 1000  # training images to compare on, where validation images are the test images


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a ledger says of weights.

    Args:
        widths: how many layers have weights of each width, in bits.
        words: storage of all arrays, in words of 32 bits.
        sparse: how many layers it takes for sparse: a bit for each weight, and the codes of those that are not zero.
    """

    widths: Mapping[int, int]
    words: float
    sparse: int


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file of a quantised network that passed the gate.

    Args:
        kept: the file.
        int4: whether codes of 4 bits and fewer are stored in 4.
        kernels: what onnxruntime computes its layers with.
        before: what the network's own ledger says.
        after: what the file's says.
    """

    kept: Kept
    int4: bool
    kernels: Kernels
    before: Stored
    after: Stored


def export_quantised(
    source: ModelSource,
    path: str | Path,
    data: Data,
    *,
    int4: bool = False,
    normalise: bool = False,
    number: int | None = None,
    floor: float | None = None,
) -> Exported:
    """Write a network with quantised layers as an ONNX file, for any number of images at a time.

    Args:
        source: the network with its weights, in eval mode, on the CPU.
        path: the file; one that is there is replaced once the new one has passed.
        data: its image sets, normalised as it is to see them; the test images are not looked at.
        int4: whether codes of 4 bits and fewer are stored in 4, not in 8.
        normalise: whether the graph itself normalises, so that it takes RGB in [0, 1].
        number: how many images to compare on; None for all validation images.
        floor: least share of the images on which both have to name the same class, in [0, 1]; None for `AGREEMENT`,
            while at most `MOST_LOST` points of top-1 are lost.

    Raises:
        MicronetError: no layer is quantised; it can't be exported; the file does not answer as the network does.
    """
    path = Path(path)
    if not quantised_layers(source.module):
        raise MicronetError(f"{source.name}: none of its layers is quantised")
    how: dict[str, Any] = {"int4": int4}
    try:
        proto = export_onnx(source.module, data.input_size, int4=int4)
        if not int4:
            places = chosen_images(len(data.train), IMAGES, SEED)
            proto = integer_kernels(proto, normalised(scaled(data.train.images[places]), data))
            how |= {"images": len(places), "calibrate": "train", "seed": SEED}
        if normalise:
            normalising(proto, data.mean, data.std)
    except ValueError as error:  # ExportError and TraceError are
        raise MicronetError(f"{source.name}: {first_line(error)}") from error
    check_zeros(proto, source.masks or {}, source.name)
    images = real_images(data, number or (FALLBACK if data.valid_is_test else len(data.valid)))
    kept = keep(
        proto,
        path,
        source=source.module,
        images=images,
        meta=described(source, data, normalise=normalise, made={"quantised": how}),
        floor=AGREEMENT if floor is None else floor,
        tolerance=None,
        most_lost=MOST_LOST if floor is None else None,
    )
    ledgers = source.ledger(allow_unknown=True), open_model(path).ledger(allow_unknown=True)
    before, after = map(_stored, ledgers)
    return Exported(kept=kept, int4=int4, kernels=kernels(proto), before=before, after=after)


def _stored(ledger: "Ledger") -> Stored:
    weights = [array for array in ledger.arrays if array.role == "weight"]
    widths = Counter(array.bits for array in weights)
    sparse = sum(array.stored(array.bits)[1] < 1 for array in weights)
    return Stored(widths=dict(sorted(widths.items())), words=tally("", ledger, official).storage, sparse=sparse)
