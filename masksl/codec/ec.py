"""EC: a quantiser whose symbols are entropy-coded."""

import math
import struct
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from masksl.codec import planes, positions, scalar, topk, wire
from masksl.codec.base import (
    Bounds,
    Compressor,
    Device,
    FrameError,
    Header,
    Packed,
    Shape,
)
from masksl.codec.bits import pack_bits, packed_size, spans, unpack_bits
from masksl.codec.coder import decode_plane, encode_plane
from masksl.codec.options import check_choice, check_number

# Form of the coded plane by ``context``: of the tensor's shape, or of one row.
_FORMS = {"spatial": 3, "none": 4}


@dataclass(frozen=True)
class EntropyCodedQuantization(Compressor):
    """EC: a scalar quantiser with a dead zone whose symbols are entropy-coded.

    Symbol 0 is a magnitude below ``deadzone`` steps, the next ones a step each. A
    symbol is decoded as the mean (centroid) of its magnitudes. If the tensor has
    negative values, symbol 0 is decoded as zero, and the others cost a sign bit.
    Elements beyond the last of 255 symbols are sent exactly. `masksl.codec.coder` codes
    the symbols.

    Parameters
    ----------
    step : float | None
        Width of a step in standard deviations of the tensor.
    bits : float | None
        Budget, in bits an element: the step is searched so that frames keep to it.
    error : float | None
        Target of the relative error (2-norm of the difference over that of the
        tensor), likewise. At most one of the three is given; 0.25 if none is.
    deadzone : float | None
        Width of symbol 0 in steps, 0.5 to 1; None chooses, on a sample, the width with
        the fewest bits at its error.
    context : str
        ``spatial`` codes symbols by their neighbours in the tensor's maps. ``none``
        codes them as one row, where at most the one on the left matters.
    """

    name: ClassVar[str] = "ec"
    step: float | None = None
    bits: float | None = None
    error: float | None = None
    deadzone: float | None = None
    context: str = "spatial"

    _PARAMS: ClassVar[struct.Struct] = struct.Struct("<BHBIIQ")

    def __post_init__(self) -> None:
        """Check the options."""
        given = [
            (option, value)
            for option in ("step", "bits", "error")
            if (value := getattr(self, option)) is not None
        ]
        if len(given) > 1:
            (option, value), (other, _), *_ = given
            raise ValueError(f"{option}={value!r}: must be null where {other} is given")
        for option, value in given:
            check_number(option, value, 1e-4, 1 if option == "error" else 32)
        if self.deadzone is not None:
            check_number("deadzone", self.deadzone, 0.5, 1 + 1e-9)
        check_choice("context", self.context, ("spatial", "none"))

    def pack(
        self, flat: Tensor, shape: Shape, bounds: Bounds, *, seed: int, training: bool
    ) -> Packed:
        """Compress the elements of a tensor, see `Compressor.pack`."""
        work = planes.working(flat)
        signed = bounds[0] < 0
        magnitude = work.abs() if signed else work

        def cost(quantizer: scalar.Quantizer) -> float:
            return self._bits_of(quantizer, magnitude, shape, signed)

        target = scalar.Target(self.step, self.bits, self.error, self.deadzone)
        largest = max(map(abs, bounds))
        quantizer = scalar.choose_quantizer(work, magnitude, largest, target, cost)
        symbols = quantizer.symbols(magnitude)
        host = symbols.cpu().numpy()
        counts = np.trim_zeros(scalar.occurrences(host), "b")
        centroids = self._centroids(host, counts, magnitude, signed)
        outliers = flat[topk.positions(symbols == scalar.Quantizer.LAST)]
        coded = self._coded(host, len(counts), shape)
        parts: list[wire.Part] = [centroids, outliers, coded]
        signs = 0
        if signed:
            negative = topk.masked(work < 0, symbols > 0)
            if signs := negative.numel():
                parts.append(pack_bits(negative.view(torch.uint8), 1))
        lengths = outliers.numel(), len(coded), signs
        form = _FORMS[self.context]
        return self._PARAMS.pack(form, len(counts), signed, *lengths), parts

    @classmethod
    def unpack(cls, header: Header, payload: memoryview, device: Device) -> Tensor:
        """Decompress the elements of a tensor, see `Compressor.unpack`."""
        form, alphabet, signed, outliers, length, count = header.unpack_params(
            cls._PARAMS
        )
        if form not in _FORMS.values() or not 1 <= alphabet <= 256 or signed > 1:
            raise FrameError(
                f"ec frame declares form {form}, {alphabet} symbols, signs {signed}"
            )
        if max(outliers, count) > header.elements:
            raise FrameError(
                f"ec frame declares {outliers} exact values, {count} signs"
            )
        dtype = planes.working_dtype(header.dtype)
        first = 1 if signed else 0
        regular = min(alphabet, scalar.Quantizer.LAST) - first
        sizes = (
            regular * dtype.itemsize,
            outliers * header.dtype.itemsize,
            length,
        )
        wire.check_payload(header, payload, sum(sizes) + packed_size(count, 1))
        sent, exact, coded, signs = planes.split(header, payload, *sizes)
        centroids = planes.read_values(header, sent, dtype, device)
        if bool((centroids.abs() > torch.finfo(header.dtype).max).any()):
            raise FrameError(f"ec frame holds centroids that no {header.dtype} can be")
        row = form == _FORMS["none"]
        plane = decode_plane(coded, alphabet, _shape(header.shape, row))
        last = int(np.count_nonzero(plane == scalar.Quantizer.LAST))
        planes.check_marked(header, last, outliers)
        symbols = wire.to_device(torch.from_numpy(plane), device)
        table = torch.zeros(256, dtype=dtype, device=device)
        table[first : first + regular] = centroids
        flat = planes.levels_of(symbols, table.to(header.dtype))
        if signed:
            cls._apply_signs(header, flat, symbols, signs, count)
        if outliers:
            values = planes.Values(header, exact, header.dtype, device)
            positions.fill(flat, symbols == scalar.Quantizer.LAST, values)
        return flat

    @staticmethod
    def _apply_signs(
        header: Header, flat: Tensor, symbols: Tensor, signs: memoryview, count: int
    ) -> None:
        """Negate elements in place: a bit for each symbol that is not 0."""
        planes.check_marked(header, int(symbols.count_nonzero()), count)
        packed = wire.to_tensor(signs, torch.uint8, flat.device)
        negative = unpack_bits(packed, count, 1).view(torch.bool)
        for span in spans(flat):
            part, nonzero = flat[span], symbols[span] > 0
            number = int(nonzero.count_nonzero()) if len(part) < len(flat) else count
            turned = torch.zeros_like(nonzero)
            turned.masked_scatter_(nonzero, negative[:number])
            negative = negative[number:]
            part.copy_(torch.where(turned, -part, part))

    def _coded(self, symbols: np.ndarray, alphabet: int, shape: Shape) -> bytes:
        shape = _shape(shape, self.context == "none")
        return encode_plane(symbols, alphabet, shape)

    @staticmethod
    def _centroids(
        symbols: np.ndarray, counts: np.ndarray, magnitude: Tensor, signed: bool
    ) -> Tensor:
        """Return the mean magnitude of every symbol that is not sent exactly."""
        sums = scalar.sums_by(symbols, magnitude, len(counts))
        means = sums / np.maximum(counts, 1)
        most = torch.finfo(magnitude.dtype).max
        chosen = torch.from_numpy(means[int(signed) : scalar.Quantizer.LAST])
        return chosen.clamp_(max=most).to(magnitude.dtype)

    def _bits_of(
        self,
        quantizer: scalar.Quantizer,
        magnitude: Tensor,
        shape: Shape,
        signed: bool,
    ) -> float:
        """Return the bits an element of the payload."""
        symbols = quantizer.symbols(magnitude).cpu().numpy()
        counts = np.trim_zeros(scalar.occurrences(symbols), "b")
        coded = 8 * len(self._coded(symbols, len(counts), shape))
        signs = len(symbols) - int(counts[0]) if signed else 0
        exact = 32 * int(counts[scalar.Quantizer.LAST :].sum())
        return (coded + 32 * len(counts) + signs + exact) / len(symbols)


def _shape(shape: Shape, row: bool) -> Shape:
    """Return the shape by which a plane is coded: the tensor's, or one row."""
    return (math.prod(shape),) if row else shape
