"""DRIVE: the signs of a random rotation, and a scale for each block."""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from masksl.codec import philox, planes, wire
from masksl.codec.base import (
    Bounds,
    Compressor,
    Device,
    FrameError,
    Header,
    Packed,
    Shape,
)
from masksl.codec.bits import BLOCK, pack_bits, unpack_bits
from masksl.codec.options import check_whole

_LEAST = 3  # log2 of the smallest block: a byte of signs


@dataclass(frozen=True)
class RotatedSigns(Compressor):
    """DRIVE: one bit an element after a randomised Hadamard transform.

    The tensor is cut into blocks of a power of two. Each is multiplied by random signs
    and by a Hadamard matrix, which spreads it evenly; the signs of the result are sent,
    and a scale that makes the estimate's component along the block exact. The last
    block, filled up with zeros, is the smallest that holds the rest.

    Parameters
    ----------
    block : int
        log2 of the elements of a block, 3 to 17.

    References
    ----------
    Vargaftik et al., "DRIVE: One-bit Distributed Mean Estimation", NeurIPS 2021.
    """

    name: ClassVar[str] = "drive"
    block: int = 14

    _PARAMS: ClassVar[struct.Struct] = struct.Struct("<BQ")

    def __post_init__(self) -> None:
        """Check the options."""
        check_whole("block", self.block, _LEAST, 17)

    def pack(
        self, flat: Tensor, shape: Shape, bounds: Bounds, *, seed: int, training: bool
    ) -> Packed:
        """Compress the elements of a tensor, see `Compressor.pack`."""
        del shape, training
        largest = max(map(abs, bounds))
        scales: list[float] = []
        signs = []
        for part in _parts(len(flat), self.block):
            rows = flat.new_zeros(part.rows * part.size, dtype=torch.float64)
            own = flat[part.start : part.start + part.rows * part.size]
            rows[: len(own)] = own.double() / (largest or 1.0)
            rows = rows.view(part.rows, part.size)
            squares = planes.sums(rows.square())
            turned = _hadamard(rows * _random_signs(seed, part, flat.device))
            sums = planes.sums(turned.abs())
            pairs = zip(squares, sums, strict=True)
            scales += [largest * (q / s) if s else 0.0 for q, s in pairs]
            signs.append(pack_bits((turned < 0).view(-1).to(torch.uint8), 1))
        most = torch.finfo(planes.working_dtype(flat.dtype)).max
        limited = torch.tensor(scales, dtype=torch.float64).clamp(max=most)
        sent = limited.to(planes.working_dtype(flat.dtype))
        return self._PARAMS.pack(self.block, seed), [sent, *signs]

    @classmethod
    def unpack(cls, header: Header, payload: memoryview, device: Device) -> Tensor:
        """Decompress the elements of a tensor, see `Compressor.unpack`."""
        block, seed = header.unpack_params(cls._PARAMS)
        if not _LEAST <= block <= 17:
            raise FrameError(f"drive frame declares blocks of 2**{block}")
        parts = list(_parts(header.elements, block))
        dtype = planes.working_dtype(header.dtype)
        number = sum(part.rows for part in parts)
        bits = sum(part.rows * part.size // 8 for part in parts)
        wire.check_payload(header, payload, number * dtype.itemsize + bits)
        sent, signs = planes.split(header, payload, number * dtype.itemsize)
        scales = planes.read_values(header, sent, dtype, device)
        if bool((scales < 0).any()):
            raise FrameError("drive frame holds negative scales")
        packed = wire.to_tensor(signs, torch.uint8, device)
        most = torch.finfo(header.dtype).max
        flat = torch.empty(header.elements, dtype=header.dtype, device=device)
        row = place = 0
        for part in parts:
            count = part.rows * part.size
            bit = unpack_bits(packed[place : place + count // 8], count, 1)
            rows = (1 - 2 * bit.double()).view(part.rows, part.size)
            turned = _hadamard(rows)  # of whole numbers: no sum is rounded
            turned *= scales[row : row + part.rows, None].double()
            turned *= _random_signs(seed, part, flat.device)
            own = flat[part.start : part.start + count]
            own.copy_(turned.view(-1)[: len(own)].clamp_(-most, most).to(dtype))
            row, place = row + part.rows, place + count // 8
        return flat


class _Part(NamedTuple):
    """Blocks of one size that are worked on together.

    Parameters
    ----------
    start : int
        First element.
    rows, size : int
        Number of blocks, and elements of a block.
    """

    start: int
    rows: int
    size: int


def _parts(count: int, block: int) -> Iterator[_Part]:
    """Yield the blocks of so many elements, some at a time to save memory."""
    size = 2**block
    whole, rest = divmod(count, size)
    step = max(1, BLOCK // size)
    for first in range(0, whole, step):
        yield _Part(first * size, min(step, whole - first), size)
    if rest:
        least = max(_LEAST, math.ceil(math.log2(rest)))
        yield _Part(whole * size, 1, 2**least)


def _random_signs(seed: int, part: _Part, device: torch.device) -> Tensor:
    """Return random signs, 1 or -1, float64, shape (rows, size).

    Element i of the tensor has bit i of stream 0 of the generator.
    """
    stop = part.start + part.rows * part.size
    first = part.start // 32  # blocks begin at a multiple of eight
    words = philox.words(seed, 0, -(-stop // 32) - first, start=first)
    bits = np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little")
    own = bits[part.start - 32 * first :][: part.rows * part.size]
    signs = 1 - 2 * torch.from_numpy(own).to(torch.float64)
    return wire.to_device(signs.view(part.rows, part.size), device)


def _hadamard(rows: Tensor) -> Tensor:
    """Return the orthonormal Hadamard transform of every row, which is its own inverse.

    Parameters
    ----------
    rows : Tensor
        Shape (n, 2**b).
    """
    number, size = rows.shape
    width = 1
    while width < size:
        pairs = rows.view(number, -1, 2, width)
        one, other = pairs[:, :, 0], pairs[:, :, 1]
        rows = torch.stack([one + other, one - other], 2)
        width *= 2
    return rows.view(number, size) * (1 / math.sqrt(size))
