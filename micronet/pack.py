"""Writing packed files: each array of the ledger in as many bytes as its bits take, checked before the file is kept.

`unpack.py` says what the file is, and reads it. Without coding, the file less its header has exactly as many bytes as
the ledger's arrays have bits, each array rounded up to whole bytes.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save as serialise
from torch import Tensor, nn

from callbacks.fake_quantize import along, quantised_layers
from callbacks.ledger import Array
from callbacks.saving import plain, whole_or_absent
from micronet.bits import pack_bits
from micronet.bundle import Bundle, load, save, structure_of
from micronet.deployed import Deployed, deploy
from micronet.entropy import Encoder
from micronet.errors import MicronetError
from micronet.pack_gate import Likeness, noise, require_like
from micronet.packed_arrays import CODED
from micronet.unpack import FORMAT, VERSION, Packed, digest, read

FLOAT = 32


@dataclass(frozen=True, kw_only=True)
class Packing:
    """A packed file that was written, read again and kept.

    Args:
        path: the file.
        packed: what was read.
        deployed: the network that it holds.
        claim_bytes: what the ledger's arrays take, each in whole bytes, at the file's widths.
        likeness: how it compares with the network that was packed.
    """

    path: Path
    packed: Packed
    deployed: Deployed
    claim_bytes: int
    likeness: Likeness


def claim(arrays: list[Array], float_bits: int) -> int:
    """Bytes of arrays: the sum of `ceil(bits / 8)` over them, mask and kept values of a sparse one together.

    Args:
        arrays: of a ledger.
        float_bits: width of the numbers that are no codes.
    """
    return sum(-(-int(array.stored(_width(array, float_bits))[0]) // 8) for array in arrays)


def pack(
    bundle: Bundle,
    path: str | Path,
    *,
    float16: bool = False,
    coded: bool = False,
    factory: Callable[..., nn.Module] | None = None,
) -> Packing:
    """Write a bundle as a packed file.

    Args:
        bundle: the network; it stays as it is.
        path: the file; one that is there is replaced, once all is written and checked.
        float16: whether numbers that are no codes are rounded to 16 bits.
        coded: whether masks and codes are entropy-coded: no bytes are claimed then.
        factory: the function that `bundle.factory` names, where that is not micronet's, torchvision's or timm's.

    Raises:
        MicronetError: the network can't be deployed or saved; numbers are beyond what 16 bits hold; read again, the
            file is not what was to be written, or does not answer as the network that was packed.
    """
    deployed, float_bits = deploy(bundle), 16 if float16 else FLOAT
    if float16:
        _round(deployed)
    writer = _Writer(deployed, float_bits, Encoder() if coded else None)
    text = _text(bundle, deployed, writer, float_bits, factory, path)
    metadata = {"micronet": text, "sha256": digest(text, writer.tensors)}
    claimed = claim(list(deployed.ledger.arrays), float_bits)
    with whole_or_absent(path) as beside:
        beside.write_bytes(_in_order(serialise(writer.tensors, metadata)))
        with _named(beside, path):
            packed = read(beside, factory=factory)
        _require_same(packed.bundle, deployed.bundle, path)
        try:
            likeness = require_like(packed.bundle, bundle, float_bits)
        except MicronetError as error:
            raise MicronetError(f"{path}: {error}") from error
        if not coded and packed.data_bytes != claimed:
            raise MicronetError(
                f"{path}: holds {packed.data_bytes:,} bytes of arrays, the ledger says {claimed:,}: nothing was kept"
            )
    return Packing(path=Path(path), packed=packed, deployed=deployed, claim_bytes=claimed, likeness=likeness)


def _text(
    bundle: Bundle, deployed: Deployed, writer: "_Writer", float_bits: int, factory: Any, path: str | Path
) -> str:
    """What a file says of its network and of how to read it, as JSON."""
    fields = {
        "format": FORMAT,
        "version": VERSION,
        "factory": bundle.factory,
        "kwargs": bundle.kwargs,
        **structure_of(deployed.bundle, factory),
        "classes": [str(name) for name in bundle.classes],
        "input_size": [int(n) for n in bundle.input_size],
        "mean": [float(x) for x in bundle.mean],
        "std": [float(x) for x in bundle.std],
        "history": bundle.history,
        "provenance": bundle.provenance,
        "float_bits": float_bits,
        "tied": deployed.tied,
        "unread": list(deployed.unread),
        **writer.fields,
    }
    try:
        return json.dumps(plain(fields), separators=(",", ":"), ensure_ascii=False)
    except TypeError as error:
        raise MicronetError(f"{path}: its history or provenance holds what JSON can't: {error}") from error


def unpack(packed: Packed, path: str | Path, *, factory: Callable[..., nn.Module] | None = None) -> None:
    """Write the network of a packed file as a `model.pth`.

    Args:
        packed: the packed file, as `read` gives it.
        path: the file; one that is there is replaced, once all is written and checked.
        factory: the function that the bundle names, where that is not micronet's, torchvision's or timm's.

    Raises:
        MicronetError: read again, the file is not what was to be written.
    """
    with whole_or_absent(path) as beside:
        save(packed.bundle, beside, factory=factory)
        with _named(beside, path):
            found = load(beside, factory=factory)
        _require_same(found, packed.bundle, path)


def _in_order(file: bytes) -> bytes:
    """The bytes of a safetensors file with its metadata in order: safetensors writes it in another one each time.

    Source: safetensors' format: eight bytes that say how long the header is, the header, which is JSON and padded with
    spaces to a multiple of eight bytes, the tensors.
    """
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[end:]


@contextmanager
def _named(beside: Path, path: str | Path) -> Iterator[None]:
    """Have what is said of a file that is not yet in its place be said of that place."""
    try:
        yield
    except MicronetError as error:
        said = str(error).replace(str(beside), str(path))
        raise MicronetError(f"{said}; so it is when read again: nothing was kept") from error


def _width(array: Array, float_bits: int) -> int:
    return float_bits if array.bits == FLOAT else array.bits


@torch.no_grad()
def _round(deployed: Deployed) -> None:
    """Round all numbers that are no codes to 16 bits, in place."""
    state, layers = deployed.bundle.model.state_dict(keep_vars=True), quantised_layers(deployed.bundle.model)
    codes = {name: layer.codes() for name, layer in layers.items()}
    for name, array in deployed.stored():
        if array.bits == FLOAT:
            half = state[name].half()
            if not torch.equal(half.isfinite(), state[name].isfinite()):
                raise MicronetError(f"{name} holds numbers beyond 65,504, the largest of 16 bits: pack it in float32")
            if state[name].any() and not half.any():
                raise MicronetError(f"{name} holds numbers below 6e-8 alone, which 16 bits make 0: pack it in float32")
            state[name].copy_(half)
    for name, layer in layers.items():
        layer.weight.copy_(codes[name].float() * along(layer.weight_scale, layer.weight))
        if not torch.equal(layer.codes(), codes[name]) or layer.act_scale == 0:
            raise MicronetError(f"{name}: its step sizes are too small for 16 bits: pack it in float32")


class _Writer:
    """Makes the tensors of a file, and the fields that say how to read them."""

    def __init__(self, deployed: Deployed, float_bits: int, encoder: Encoder | None) -> None:
        self.masks, self.encoder = deployed.bundle.masks, encoder
        self.dtype = np.dtype("<f2" if float_bits == 16 else "<f4")
        self.tensors: dict[str, np.ndarray] = {}
        self.fields: dict[str, Any] = {"sparse": [], "kept": [], "codes": {}, "coded": []}
        self.state = deployed.bundle.model.state_dict()
        self.codes = {
            f"{name}.weight" if name else "weight": layer.codes().numpy()
            for name, layer in quantised_layers(deployed.bundle.model).items()
        }
        for name, array in deployed.stored():
            self.put(name, array)
        if self.fields["coded"]:
            self.tensors[CODED] = encoder.data()
            self.fields["decoded"] = encoder.digest()

    def put(self, name: str, array: Array) -> None:
        """Enter one array."""
        mask = None
        if name in self.masks:
            sparse = array.stored(array.bits)[1] < 1
            self.fields["sparse" if sparse else "kept"].append(name)
            mask = self.masks[name].numpy() if sparse else None
        if array.bits < FLOAT:
            self.fields["codes"][name] = array.bits
            self.put_codes(name, self.codes[name], mask, array.bits)
        else:
            self.put_numbers(name, self.state[name].numpy().astype(self.dtype), mask)

    def put_codes(self, name: str, codes: np.ndarray, mask: np.ndarray | None, bits: int) -> None:
        codes = (codes if mask is None else codes[mask]).reshape(-1)
        if self.encoder is not None and self.encoder.add(mask, codes.astype(np.uint8) & ((1 << bits) - 1), bits):
            self.fields["coded"].append(name)
        else:
            self.tensors[name] = pack_bits(codes, bits, mask)

    def put_numbers(self, name: str, values: np.ndarray, mask: np.ndarray | None) -> None:
        if mask is None:
            self.tensors[name] = values
        elif self.encoder is not None and self.encoder.add(mask, None):
            self.fields["coded"].append(name)
            self.tensors[name] = values[mask]
        else:
            bits = np.packbits(mask, bitorder="little")
            self.tensors[name] = np.concatenate([bits, values[mask].view(np.uint8)])


@torch.no_grad()
def _require_same(found: Bundle, wanted: Bundle, path: str | Path) -> None:
    """What was read again must be what was to be written, bit for bit: state, masks, and what the network answers."""
    state, right = found.model.state_dict(), wanted.model.state_dict()
    wrong = [name for name in right if name not in state or not _same(state[name], right[name])]
    none = torch.empty(0)
    wrong += [name for name, mask in wanted.masks.items() if not torch.equal(mask, found.masks.get(name, none))]
    answers = [bundle.model(noise(bundle)) for bundle in (found, wanted)]
    if wrong or len(found.masks) != len(wanted.masks) or not _same(*answers):
        what = wrong[0] if wrong else "what the network answers"
        raise MicronetError(f"{path}: read again, {what} is not what it was: nothing was kept")


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
