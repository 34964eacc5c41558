"""SPSIGN: of the largest elements the sign and one of few magnitudes.

With error feedback an element is sent soon after it is large enough, so that those that
are sent are nearly equal in magnitude.
"""

import math
import struct
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from masksl.codec import planes, positions, topk, wire
from masksl.codec.base import (
    Bounds,
    Compressor,
    Device,
    FrameError,
    Header,
    Packed,
    Shape,
    Sparse,
)
from masksl.codec.bits import look_up, pack_bits, packed_size, part_of
from masksl.codec.options import check_choice, check_sparsity

MAGNITUDES = (1, 2, 4)
_PASSES = 50  # of Lloyd's algorithm at most; two or three are usual


@dataclass(frozen=True)
class SignSparsification(Compressor):
    """SPSIGN: the largest elements as a sign and a magnitude, all others zero.

    The magnitudes are those of Lloyd's algorithm, which lowers the squared error of the
    kept elements step by step. Zeros among the kept elements get a magnitude, too.

    Parameters
    ----------
    sparsity : float
        Share of the elements that is dropped, at least 0, less than 1;
        ``k = floor((1 - sparsity) d)``, at least 1. Of equal magnitudes the lower
        index is kept.
    magnitudes : int
        Number of magnitudes: 1, 2 or 4.
    layout : str
        ``auto``: positions are coded by gaps or indices, or by their neighbours where
        that is smaller: in the kernels of a convolution, and in the pictures that a
        linear layer sees, if these are squares of one or three channels. ``none``: by
        gaps or indices.

    References
    ----------
    Lloyd, "Least squares quantization in PCM", IEEE Transactions on Information
    Theory, 1982.
    """

    name: ClassVar[str] = "spsign"
    keeps_positions: ClassVar[bool] = True
    sparsity: float = 0.99
    magnitudes: int = 2
    layout: str = "auto"

    _PARAMS: ClassVar[struct.Struct] = struct.Struct("<QBBB")

    def __post_init__(self) -> None:
        """Check the options."""
        check_sparsity(self.sparsity)
        if self.magnitudes not in MAGNITUDES or isinstance(self.magnitudes, bool):
            raise ValueError(f"magnitudes={self.magnitudes!r}: must be one of 1, 2, 4")
        check_choice("layout", self.layout, ("auto", "none"))

    def pack(
        self, flat: Tensor, shape: Shape, bounds: Bounds, *, seed: int, training: bool
    ) -> Packed:
        """Compress the elements of a tensor, see `Compressor.pack`."""
        work = planes.working(flat)
        kept = topk.kept(self.sparsity, flat.numel())
        chosen = topk.largest(work.abs().view(1, -1), kept)
        values = work[chosen].cpu().numpy()
        centroids, nearest = lloyd(np.abs(values).astype(np.float64), self.magnitudes)
        symbols = (2 * nearest + np.signbit(values)).astype(np.uint8)
        sent = torch.from_numpy(centroids).to(work.dtype)
        packed = pack_bits(torch.from_numpy(symbols), _bits(self.magnitudes))
        picture, form, coded = self._positions(chosen, shape)
        params = self._PARAMS.pack(kept, self.magnitudes, picture, form)
        return params, [sent, packed, coded]

    def _positions(self, chosen: Tensor, shape: Shape) -> tuple[int, int, wire.Part]:
        """Return the smallest form of the positions: picture or not, form, bytes."""
        picture = picture_of(shape) if self.layout == "auto" else None
        by = picture or shape
        maps = self.layout == "auto" and len(by) == 4
        lossless = "context" if maps else "none"
        form, coded = positions.write_positions(chosen, by, lossless, gaps=True)
        return int(picture is not None), form, coded

    @classmethod
    def unpack(cls, header: Header, payload: memoryview, device: Device) -> Tensor:
        """Decompress the elements of a tensor, see `Compressor.unpack`."""
        header, values, coded, form = cls._parts(header, payload, device)
        return positions.place(header, coded, form, values, device)

    @classmethod
    def unpack_sparse(
        cls, header: Header, payload: memoryview, device: Device
    ) -> Sparse:
        """Return kept positions and their values, see `Compressor.unpack_sparse`."""
        header, values, coded, form = cls._parts(header, payload, device)
        count = values.count
        chosen = positions.read_positions(header, coded, count, form, device)
        return chosen, values.part(0, count)

    @classmethod
    def _parts(
        cls, header: Header, payload: memoryview, device: Device
    ) -> tuple[Header, "_Values", memoryview, int]:
        """Return the header by which positions are coded, values, positions, form."""
        kept, number, picture, form = header.unpack_params(cls._PARAMS)
        planes.check_kept(header, kept, 0)
        by = picture_of(header.shape) if picture == 1 else header.shape
        if number not in MAGNITUDES or picture > 1 or by is None:
            raise FrameError(
                f"spsign frame declares {number} magnitudes, picture {picture}"
            )
        dtype = planes.working_dtype(header.dtype)
        sizes = number * dtype.itemsize, packed_size(kept, _bits(number))
        sent, symbols, coded = planes.split(header, payload, *sizes)
        centroids = planes.read_values(header, sent, dtype, "cpu")
        most = torch.finfo(header.dtype).max
        if not bool(((centroids >= 0) & (centroids <= most)).all()):
            raise FrameError(f"spsign frame holds magnitudes that no {header.dtype} is")
        values = _Values(header, centroids, symbols, kept, device)
        return replace(header, shape=by), values, coded, form


class _Values:
    """The values of kept elements, read in parts as `planes.Values` are."""

    # pylint: disable-next=too-many-arguments,too-many-positional-arguments
    def __init__(
        self,
        header: Header,
        centroids: Tensor,
        symbols: memoryview,
        count: int,
        device: Device,
    ) -> None:
        self._dtype = header.dtype
        levels = torch.stack([centroids, -centroids], 1).view(-1)
        self._levels = wire.to_device(levels, device)
        self._symbols, self._device = symbols, device
        self._bits = _bits(len(centroids))
        self.count = count

    @cached_property
    def _packed(self) -> Tensor:
        """Copy the symbols, once positions have been found to be readable."""
        return wire.to_tensor(self._symbols, torch.uint8, self._device)

    def part(self, start: int, stop: int) -> Tensor:
        """Return values, shape (stop - start,), of the type of the frame's tensor."""
        first = start // 8 * 8  # a whole number of bytes before it
        span = slice(first, stop)
        packed = part_of(self._packed, self.count, self._bits, span)
        found = look_up(packed, self._levels, stop - first, self._bits)
        return found[start - first :].to(self._dtype)


def lloyd(values: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the magnitudes that describe values, and which one describes each.

    Parameters
    ----------
    values : numpy.ndarray
        float64, shape (k,), not negative, at least one.
    number : int
        Number of magnitudes.

    Returns
    -------
    tuple[numpy.ndarray, numpy.ndarray]
        float64, shape (number,), ascending: means of neighbouring values. int64, shape
        (k,): the number of the nearest one, of two equally near ones the lower.
    """
    # Scaled by a power of two, which rounds nothing, so that sums do not overflow.
    scale = int(np.frexp(values.max())[1])
    values = np.ldexp(values, -scale)
    ascending = np.sort(values)
    sums = np.concatenate([[0.0], np.cumsum(ascending)])
    cuts = np.arange(number + 1) * len(values) // number
    centroids = _means(sums, cuts)
    for _ in range(_PASSES):
        before = cuts
        middles = centroids[:-1] / 2 + centroids[1:] / 2
        inner = np.searchsorted(ascending, middles, side="right")
        cuts = np.concatenate([[0], inner, [len(values)]])
        centroids = _means(sums, cuts)
        if np.array_equal(cuts, before):
            break
    middles = centroids[:-1] / 2 + centroids[1:] / 2
    nearest = np.searchsorted(middles, values, side="left")
    return np.ldexp(centroids, scale), nearest


def _means(sums: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """Return the mean of each part of ascending values; an empty one has the next.

    Rounding does not bring the means out of order.
    """
    sizes = np.diff(cuts)
    means = np.diff(sums[cuts]) / np.maximum(sizes, 1)
    for i in range(len(means) - 2, -1, -1):
        if not sizes[i]:
            means[i] = means[i + 1]
    return np.maximum.accumulate(means)


def picture_of(shape: Shape) -> Shape | None:
    """Return the shape of the weights of a linear layer on square pictures.

    Parameters
    ----------
    shape : tuple[int, ...]
        Shape of the weights: outputs, inputs.

    Returns
    -------
    tuple[int, ...] | None
        Outputs, channels (1 or 3), height, width. None if the inputs are no picture of
        8x8 or more.
    """
    if len(shape) == 2:
        for channels in (1, 3):
            side = math.isqrt(shape[1] // channels)
            if side >= 8 and channels * side * side == shape[1]:
                return shape[0], channels, side, side
    return None


def _bits(magnitudes: int) -> int:
    """Return the bits of a symbol: sign and number of the magnitude."""
    return magnitudes.bit_length()
