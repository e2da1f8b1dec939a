"""The arrays of a packed file, decoded: numbers, masks and codes as the tensors of a state dict."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from callbacks.fake_quantize import along
from micronet.bits import unpack_bits, unpack_mask
from micronet.entropy import Decoder
from micronet.errors import MicronetError

CODED = "__coded__"  # the tensor that holds what was entropy-coded


class PackedArrays:
    """Reads the arrays of a file, each in the shape that the network has for it.

    Args:
        content: what the file's header says.
        tensors: the file's, by name.
        shapes: of the network's tensors, by name.
    """

    def __init__(
        self, content: Mapping[str, Any], tensors: dict[str, np.ndarray], shapes: Mapping[str, torch.Size]
    ) -> None:
        self.content, self.tensors, self.shapes = content, tensors, shapes
        self.sparse, self.codes, self.coded = set(content["sparse"]), content["codes"], content["coded"]
        self.dtype = np.dtype("<f2" if content["float_bits"] == 16 else "<f4")
        self.state: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}

    def read(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The state dict, and the masks.

        Raises:
            ValueError: an array is not what the header says.
            MicronetError: the arrays are not those of the network.
        """
        tied, unread = self.content["tied"], set(self.content["unread"])
        own = [name for name in self.shapes if name not in tied and name not in unread]
        self.require_all(own, {*tied, *unread})
        streamed = self.stream()
        # Scales come before the codes that they belong to.
        for name in sorted(own, key=self.codes.__contains__):
            self.put(name, *streamed.get(name, (None, None)))
        for name in self.content["kept"]:
            if name not in self.state:
                raise ValueError(f"there is no {name} to keep whole")
            self.masks[name] = torch.ones(self.shapes[name], dtype=torch.bool)
        for name in unread:
            self.state[name] = torch.zeros(self.shapes[name])
        for name, other in tied.items():
            if other not in self.state or self.shapes[name] != self.shapes[other]:
                raise ValueError(f"{name} is no other name of {other}")
            self.state[name] = self.state[other]
        return self.state, self.masks

    def require_all(self, own: Iterable[str], others: set[str]) -> None:
        """Every tensor of the network is in the file once, and nothing else is."""
        own, packed = set(own), set(self.tensors) - {CODED}
        whole = {name for name in self.coded if name in self.codes}  # nothing of them is left beside the stream
        if len(set(self.coded)) < len(self.coded) or (CODED in self.tensors) != bool(self.coded):
            raise ValueError("what is coded is not what it says")
        if not (self.sparse | set(self.codes) | set(self.coded)) <= own or not others <= set(self.shapes):
            raise MicronetError("it names arrays that its network does not have")
        missing, surplus = sorted(own - whole - packed), sorted(packed - (own - whole))
        if missing or surplus:
            raise MicronetError(
                f"its arrays don't fit its network ({len(missing)} missing, {len(surplus)} surplus, such as "
                f"{(missing + surplus)[0][:80]})"
            )

    def stream(self) -> dict[str, tuple[np.ndarray | None, np.ndarray | None]]:
        """Mask and codes of each array that was coded."""
        if not self.coded:
            return {}
        decoder, found = Decoder(self.tensors[CODED]), {}
        for name in self.coded:
            shape = self.shapes[name]
            mask = decoder.mask(shape) if name in self.sparse else None
            kept = shape.numel() if mask is None else int(mask.sum())
            codes = decoder.codes(kept, self.codes[name]) if name in self.codes else None
            found[name] = mask, codes
        if self.content.get("decoded", decoder.digest()) != decoder.digest():
            raise MicronetError(
                "its masks and codes are decoded to others than were written: another version of the package "
                "constriction wrote it, or it is damaged; install that version, or make it again"
            )
        return found

    def put(self, name: str, mask: np.ndarray | None, codes: np.ndarray | None) -> None:
        """Read one array, of which the stream may have held the mask, or all."""
        shape, bits, data = tuple(self.shapes[name]), self.codes.get(name), self.tensors.get(name)
        lead = 0  # bits of a mask that are in front of its values
        if name in self.sparse:
            if mask is None:
                lead = self.shapes[name].numel()
                mask = unpack_mask(_bytes(name, data), lead).reshape(shape)
            self.masks[name] = torch.from_numpy(mask)
        kept = int(mask.sum()) if mask is not None else self.shapes[name].numel()
        if bits is None:
            values = self.numbers(name, data, shape if mask is None else (kept,), lead)
        elif codes is None:
            values = unpack_bits(_bytes(name, data), bits, kept, signed=True, mask=lead).astype(np.float32)
        else:
            values = codes.astype(np.int16)
            values = (values - ((values >> bits - 1) << bits)).astype(np.float32)
        if mask is not None:
            whole = np.zeros(shape, np.float32)
            whole[mask] = values
            values = whole
        tensor = torch.from_numpy(values.reshape(shape))
        self.state[name] = tensor if bits is None else tensor * along(self.scale(name), tensor)

    def numbers(self, name: str, data: np.ndarray, shape: tuple[int, ...], lead: int) -> np.ndarray:
        """Numbers as float32, behind a mask or alone."""
        if lead:
            data, front = _bytes(name, data), -(-lead // 8)
            if lead % 8 and data[front - 1] >> lead % 8:
                raise ValueError(f"{name}: bits are left over behind its mask")
            if data.size - front != shape[0] * self.dtype.itemsize:
                raise ValueError(f"{name}: its mask keeps {shape[0]:,} numbers, and it does not hold so many")
            data = np.frombuffer(data[front:].tobytes(), self.dtype)
        if data.dtype != self.dtype or data.shape != shape:
            raise ValueError(f"{name} is {data.dtype} of {data.shape}, not {self.dtype} of {shape}")
        return data.astype(np.float32)

    def scale(self, name: str) -> Tensor:
        """The scales of a weight's rows."""
        scale = self.state.get(f"{name.removesuffix('weight')}weight_scale")
        if scale is None or scale.shape != self.shapes[name][:1]:
            raise ValueError(f"{name} is held as codes without a scale for each row")
        return scale


def _bytes(name: str, data: np.ndarray) -> np.ndarray:
    if data.dtype != np.uint8 or data.ndim != 1:
        raise ValueError(f"{name} is {data.dtype} of {data.shape}, not a string of bits")
    return data
