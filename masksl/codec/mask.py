"""Masks: a bit for every element, packed or entropy-coded."""

import math
import struct
import zlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from masksl.codec import wire
from masksl.codec.base import (
    Bounds,
    Compressor,
    Device,
    FrameError,
    Header,
    Packed,
    Shape,
)
from masksl.codec.bits import BLOCK, pack_bits, packed_size, unpack_bits
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
        packed = packed_size(len(flat), 1)
        if self.code == "auto":
            host = mask.cpu().numpy()
            choices = [_Choice.of(_ONE, host, _ALL)]
            if reference is not None:
                levels = _levels(reference, len(flat))
                choices.append(_Choice.of(_LEVELS, host, levels))
            best = min(choices, key=lambda choice: choice.size)
            if best.size < packed:
                coded = best.counts + encode_mask(host, best.levels, best.ones)
                if len(coded) < packed:
                    return self._PARAMS.pack(best.form, best.checksum), [coded]
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
        if checksum and form != _LEVELS:
            raise FrameError(f"mask frame of form {form} declares a reference")
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


@dataclass(frozen=True)
class _Choice:
    """A way to code a mask.

    Parameters
    ----------
    form : int
        Its form.
    levels : numpy.ndarray
        uint16, shape (d,), or (0,) for one level.
    ones : numpy.ndarray
        int64: the ones of each level.
    counts : bytes
        These as they are sent.
    size : float
        About how many bytes it takes.
    """

    form: int
    levels: np.ndarray
    ones: np.ndarray
    counts: bytes
    size: float

    @classmethod
    def of(cls, form: int, mask: np.ndarray, levels: np.ndarray) -> "_Choice":
        """Return the way to code a mask by levels."""
        ones = np.array([np.count_nonzero(mask)])
        if levels.size:
            number = int(levels.max()) + 1
            ones = np.zeros(number, np.int64)
            for start in range(0, len(mask), BLOCK):
                part = slice(start, start + BLOCK)
                ones += np.bincount(levels[part][mask[part] != 0], minlength=number)
        total = elements_of(levels, len(ones), len(mask))
        ways = sum(
            math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
            for n, k in zip(total.tolist(), ones.tolist(), strict=True)
        )
        counts = b"".join(_varint(int(n)) for n in ones[total > 0])
        return cls(form, levels, ones, counts, ways / math.log(256) + len(counts))

    @property
    def checksum(self) -> int:
        """Checksum of the levels, 0 without a reference."""
        return zlib.crc32(self.levels.data) if self.form == _LEVELS else 0


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
        if payload[place] < 128 and not (place and payload[place] == 0):
            return number, payload[place + 1 :]
    raise FrameError("mask frame has a count that is cut short or too long")
