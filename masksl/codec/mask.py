"""Masks: a bit for every element, packed or entropy-coded."""

import math
import struct
import zlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from masksl.codec import planes, wire
from masksl.codec.base import (
    Bounds,
    Compressor,
    Device,
    FrameError,
    Header,
    Packed,
    Shape,
)
from masksl.codec.bits import pack_bits, packed_size, unpack_bits
from masksl.codec.coder import decode_mask, elements_of, encode_mask
from masksl.codec.options import check_choice

_PACKED, _ONE, _LEVELS = range(3)  # forms
_ALL = np.zeros(0, np.uint16)  # levels of a mask without a reference: one level
_MOST = 2**16 - 1


@dataclass(frozen=True)
class Mask(Compressor):
    """MASK: a bool tensor, exactly.

    Without a reference all elements share one probability. The reference may be a mask
    that both sides hold, or a tensor of whole numbers from 0 to 65535, its levels: then
    elements of the same level share one. The ones of each level are counted and sent,
    so that no probability has to be learned. What is smallest is sent: coded by the
    reference, coded without it, or packed. ``docs/frame.md`` has the layout.

    Parameters
    ----------
    code : str
        ``auto``, the smallest; ``packed``, a bit an element.
    """

    name: ClassVar[str] = "mask"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bool,)
    takes_reference: ClassVar[bool] = True
    code: str = "auto"

    _PARAMS: ClassVar[struct.Struct] = struct.Struct("<BI")

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("code", self.code, ("auto", "packed"))

    # pylint: disable-next=too-many-arguments
    def pack(
        self,
        flat: Tensor,
        shape: Shape,
        bounds: Bounds,
        *,
        seed: int,
        training: bool,
        reference: Tensor | None = None,
    ) -> Packed:
        """Compress the elements of a tensor, see `Compressor.pack`."""
        mask = flat.view(torch.uint8)
        form, checksum, best = _PACKED, 0, _ALL
        size: float = packed_size(len(flat), 1)
        host, ones = np.empty(0, np.uint8), np.empty(0, np.int64)
        if self.code == "auto":
            host = mask.cpu().numpy()
            choices = [(_ONE, _ALL)]
            if reference is not None:
                choices.append((_LEVELS, _levels(reference, len(flat))))
            for choice, levels in choices:
                counted = _ones(host, levels)
                about = _size(elements_of(levels, len(counted), len(host)), counted)
                if about < size:
                    form, size, best, ones = choice, about, levels, counted
        if form == _LEVELS:
            checksum = zlib.crc32(best.data)
        if form != _PACKED:
            total = elements_of(best, len(ones), len(host))
            counts = b"".join(_varint(int(n)) for n in ones[total > 0])
            coded = counts + encode_mask(host, best, ones)
            if len(coded) < packed_size(len(flat), 1):
                return self._PARAMS.pack(form, checksum), [coded]
        return self._PARAMS.pack(_PACKED, 0), [pack_bits(mask, 1)]

    @classmethod
    def unpack(
        cls,
        header: Header,
        payload: memoryview,
        device: Device,
        reference: Tensor | None = None,
    ) -> Tensor:
        """Decompress the elements of a tensor, see `Compressor.unpack`."""
        form, checksum = header.unpack_params(cls._PARAMS)
        count = header.elements
        if header.dtype != torch.bool or form not in (_PACKED, _ONE, _LEVELS):
            raise FrameError(f"mask frame of {header.dtype} declares form {form}")
        if form == _PACKED:
            wire.check_payload(header, payload, packed_size(count, 1))
            packed = wire.to_tensor(payload, torch.uint8, device)
            return unpack_bits(packed, count, 1).view(torch.bool)
        levels = _ALL
        if form == _LEVELS:
            levels = cls._checked(reference, count, checksum)
        number = int(levels.max()) + 1 if levels.size else 1
        total = elements_of(levels, number, count)
        ones = np.zeros(number, np.int64)
        for level in np.flatnonzero(total):
            ones[level], payload = _read_varint(payload)
        mask = decode_mask(payload, levels, ones, count)
        return wire.to_device(torch.from_numpy(mask).view(torch.bool), device)

    @staticmethod
    def _checked(reference: Tensor | None, count: int, checksum: int) -> np.ndarray:
        """Return the levels of a reference; `FrameError` unless it is the right one."""
        if reference is None:
            raise FrameError("mask frame is coded by a reference, which is not given")
        if reference.numel() != count:
            raise FrameError(
                f"mask frame of {count} elements is coded by another reference "
                f"than the given one of {reference.numel()}"
            )
        levels = _levels(reference, count)
        if zlib.crc32(levels.data) != checksum:
            raise FrameError("mask frame is coded by another reference than given")
        return levels


def _levels(reference: Tensor, count: int) -> np.ndarray:
    """Return the levels of a reference, uint16, shape (count,)."""
    whole = not (reference.is_floating_point() or reference.is_complex())
    if not whole or reference.numel() != count:
        raise ValueError(
            f"reference of {reference.numel()} elements of {reference.dtype}: must be "
            f"{count} whole numbers or bools"
        )
    host = wire.flatten(reference).cpu()
    if host.dtype == torch.bool:
        host = host.view(torch.uint8)
    levels = host.numpy()
    least, most = int(levels.min()), int(levels.max())
    if least < 0 or most > _MOST:
        raise ValueError(f"reference from {least} to {most}: must be 0 to {_MOST}")
    return levels.astype("<u2")


def _ones(mask: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return the number of ones of every level, int64."""
    if not levels.size:
        return np.array([np.count_nonzero(mask)])
    number = int(levels.max()) + 1
    ones = np.zeros(number, np.int64)
    for start in range(0, len(mask), planes.BLOCK):
        part = slice(start, start + planes.BLOCK)
        ones += np.bincount(levels[part][mask[part] != 0], minlength=number)
    return ones


def _size(total: np.ndarray, ones: np.ndarray) -> float:
    """Return about how many bytes a mask takes, by its numbers of ones."""
    ways = sum(
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        for n, k in zip(total.tolist(), ones.tolist(), strict=True)
    )
    counts = sum(len(_varint(int(n))) for n in ones[total > 0])
    return ways / math.log(256) + counts


def _varint(number: int) -> bytes:
    """Return a whole number in bytes of seven bits, lowest first."""
    parts = bytearray()
    while number >= 128:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def _read_varint(payload: memoryview) -> tuple[int, memoryview]:
    """Return a number that `_varint` wrote and the bytes after it."""
    number = 0
    for place in range(5):
        if place >= len(payload):
            break
        number |= (payload[place] & 127) << (7 * place)
        if payload[place] < 128:
            return number, payload[place + 1 :]
    raise FrameError("mask frame has a count that is cut short or too long")
