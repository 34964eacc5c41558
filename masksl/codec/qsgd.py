"""QSGD: levels of the norm, rounded at random."""

import math
import struct
from dataclasses import dataclass
from typing import ClassVar

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
from masksl.codec.options import check_choice, check_whole


@dataclass(frozen=True)
class StochasticQuantization(Compressor):
    """QSGD: each magnitude becomes one of a few shares of the tensor's norm.

    A magnitude is rounded up or down at random, such that its expectation is the
    magnitude. Of a large tensor nearly all become zero, so a stage that codes symbols
    by their frequency is the default.

    Parameters
    ----------
    levels : int
        1 to 127, shares beside zero: 1/levels, 2/levels, to 1.
    lossless : str
        Stage over the symbols: ``none``, ``fast``, ``context`` or ``auto``.

    References
    ----------
    Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and
    Encoding", NeurIPS 2017.
    """

    name: ClassVar[str] = "qsgd"
    levels: int = 6
    lossless: str = "context"

    _PARAMS: ClassVar[struct.Struct] = struct.Struct("<BBd")

    def __post_init__(self) -> None:
        """Check the options."""
        check_whole("levels", self.levels, 1, 127)
        check_choice("lossless", self.lossless, planes.LOSSLESS)

    def pack(
        self, flat: Tensor, shape: Shape, bounds: Bounds, *, seed: int, training: bool
    ) -> Packed:
        """Compress the elements of a tensor, see `Compressor.pack`."""
        del training
        work = planes.working(flat)
        largest = max(map(abs, bounds))
        scaled = work.double() / (largest or 1.0)
        root = math.sqrt(planes.sums(scaled.square().view(1, -1))[0])
        norm = min(largest * root, torch.finfo(torch.float64).max)
        generator = torch.Generator(flat.device).manual_seed(seed)
        drawn = torch.rand(len(flat), generator=generator, device=flat.device)
        shares = scaled.abs() * (self.levels / (root or 1.0))
        level = (shares + drawn).floor_().clamp_(max=self.levels).to(torch.uint8)
        symbols = torch.where(level > 0, 2 * level - (work > 0).to(torch.uint8), level)
        form, plane = planes.write_plane(symbols, self.bits, shape, self.lossless)
        return self._PARAMS.pack(self.levels, form, norm), [plane]

    @property
    def bits(self) -> int:
        """Bits of a symbol."""
        return _bits(self.levels)

    @classmethod
    def unpack(cls, header: Header, payload: memoryview, device: Device) -> Tensor:
        """Decompress the elements of a tensor, see `Compressor.unpack`."""
        levels, form, norm = header.unpack_params(cls._PARAMS)
        if not (1 <= levels <= 127 and math.isfinite(norm) and norm >= 0):
            raise FrameError(f"qsgd frame declares {levels} levels, norm {norm}")
        symbols = torch.arange(2 ** _bits(levels))
        shares = ((symbols + 1) // 2).clamp(max=levels).double() / levels
        values = torch.where(symbols % 2 == 1, shares, -shares) * norm
        values += 0.0  # no zero has a sign
        most = torch.finfo(header.dtype).max
        values = values.clamp(-most, most).to(planes.working_dtype(header.dtype))
        every = wire.to_device(values, device)
        return planes.read_plane(header, payload, _bits(levels), form, lambda: every)


def _bits(levels: int) -> int:
    """Return the bits of a symbol: zero, and each level with both signs."""
    return (2 * levels).bit_length()
