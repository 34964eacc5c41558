"""SIGN: one bit an element."""

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
from masksl.codec.options import check_choice


@dataclass(frozen=True)
class Sign(Compressor):
    """SIGN: the sign of every element, which stands for one magnitude.

    An element that is zero gets a random sign, so that many such signs cancel out.

    Parameters
    ----------
    magnitude : str
        ``none``: every sign stands for 1; ``mean``: for the mean of all magnitudes.
    lossless : str
        Stage over the signs: ``none``, ``fast``, ``context`` or ``auto``.

    References
    ----------
    Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems", ICML
    2018.
    """

    name: ClassVar[str] = "sign"
    magnitude: str = "none"
    lossless: str = "none"

    _PARAMS: ClassVar[struct.Struct] = struct.Struct("<Bd")

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("magnitude", self.magnitude, ("none", "mean"))
        check_choice("lossless", self.lossless, planes.LOSSLESS)

    def pack(
        self, flat: Tensor, shape: Shape, bounds: Bounds, *, seed: int, training: bool
    ) -> Packed:
        """Compress the elements of a tensor, see `Compressor.pack`."""
        del training
        negative = flat < 0
        zeros = (flat == 0).nonzero().view(-1)
        if len(zeros):
            generator = torch.Generator(flat.device).manual_seed(seed)
            drawn = torch.rand(len(zeros), generator=generator, device=flat.device)
            negative[zeros] = drawn < 0.5
        magnitude = 1.0
        if self.magnitude == "mean":
            largest = max(map(abs, bounds))
            parts = flat.double() / largest if largest else flat.double()
            magnitude = planes.sums(parts.abs().view(1, -1))[0] / len(flat) * largest
        symbols = negative.to(torch.uint8)
        form, plane = planes.write_plane(symbols, 1, shape, self.lossless)
        return self._PARAMS.pack(form, magnitude), [plane]

    @classmethod
    def unpack(cls, header: Header, payload: memoryview, device: Device) -> Tensor:
        """Decompress the elements of a tensor, see `Compressor.unpack`."""
        form, magnitude = header.unpack_params(cls._PARAMS)
        most = torch.finfo(header.dtype).max
        if not (math.isfinite(magnitude) and 0 <= magnitude <= most):
            raise FrameError(f"sign frame declares the magnitude {magnitude}")
        pair = torch.tensor([magnitude, -magnitude], dtype=torch.float64)
        pair = pair.to(planes.working_dtype(header.dtype))
        levels = wire.to_device(pair, device)
        return planes.read_plane(header, payload, 1, form, lambda: levels)
