"""EC: a quantiser whose symbols are entropy-coded."""

import math
import struct
from dataclasses import dataclass
from functools import partial
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
)
from masksl.codec.bits import pack_bits, packed_size, spans, unpack_bits
from masksl.codec.coder import decode_plane, encode_plane, maps_of
from masksl.codec.options import check_choice, check_number
from masksl.codec.quantizer import Elements, Quantized, Quantizer, Target, choose

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
        Budget, in bits an element. The payload of a frame never takes more, and 99 %
        of it if a step does. Where even one symbol for all elements takes more, as in
        tensors of a few elements, it is that.
    error : float | None
        Relative error (2-norm of the difference over that of the tensor) that decoded
        tensors never exceed; they have 99 % of it if a step does. At most one of the
        three is given; 0.25 if none is.
    deadzone : float | None
        Width of symbol 0 in steps, 0.5 to 1; None chooses, on a sample, the width with
        the fewest bits at its error.
    context : str
        ``spatial`` codes symbols by their neighbours in the tensor's maps. ``none``
        codes them as one row, where at most the one on the left matters.
    rounding : str
        ``nearest``; or ``stochastic``, without a dead zone: a magnitude is rounded up
        or down to a multiple of the step at random, such that its expectation is the
        magnitude. Errors then average out in sums, of which the gradient of a weight is
        one. It needs ``step``.
    """

    name: ClassVar[str] = "ec"
    step: float | None = None
    bits: float | None = None
    error: float | None = None
    deadzone: float | None = None
    context: str = "spatial"
    rounding: str = "nearest"

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
        check_choice("rounding", self.rounding, ("nearest", "stochastic"))
        if self.rounding == "stochastic":
            self._check_unbiased()

    def _check_unbiased(self) -> None:
        """Refuse what does not go with stochastic rounding."""
        for option in ("bits", "error", "deadzone"):
            if (value := getattr(self, option)) is not None:
                raise ValueError(
                    f"{option}={value!r}: must be null with rounding=stochastic"
                )
        if self.step is None:
            raise ValueError(
                "step=None: must be a number from 0.0001 to less than 32 with "
                "rounding=stochastic"
            )

    def pack(
        self, flat: Tensor, shape: Shape, bounds: Bounds, *, seed: int, training: bool
    ) -> Packed:
        """Compress the elements of a tensor, see `Compressor.pack`."""
        work = planes.working(flat).cpu().numpy()
        signed = bounds[0] < 0

        def rounded(magnitudes: np.ndarray) -> np.ndarray:
            return torch.from_numpy(magnitudes).to(flat.dtype).double().numpy()

        largest = max(map(abs, bounds))
        elements = Elements(work, signed, largest, rounded)
        finish = partial(self._finished, flat=flat, shape=shape, signed=signed)
        if self.step is not None and self.rounding == "stochastic":
            generator = torch.Generator().manual_seed(seed)
            maps = maps_of(shape)
            drawn = torch.rand(maps[0], generator=generator, dtype=torch.float64)
            most = torch.finfo(flat.dtype).max
            quantized = elements.rounded_at_random(self.step, most, maps, drawn.numpy())
            _, (lengths, parts) = finish(quantized)
        else:
            target = Target(self.step, self.bits, self.error, self.deadzone)
            quantized, (lengths, parts) = choose(elements, target, finish)
        alphabet = len(quantized.counts)
        form = _FORMS[self.context]
        return self._PARAMS.pack(form, alphabet, signed, *lengths), parts

    def _finished(
        self, quantized: Quantized, *, flat: Tensor, shape: Shape, signed: bool
    ) -> tuple[float, tuple[tuple[int, int, int], list[wire.Part]]]:
        """Encode symbols; return the bits an element, the lengths and the payload."""
        symbols = quantized.symbols
        by = _shape(shape, self.context == "none")
        coded = encode_plane(symbols, len(quantized.counts), by)
        centroids = torch.from_numpy(quantized.centroids[int(signed) : Quantizer.LAST])
        last = topk.positions(torch.from_numpy(symbols == Quantizer.LAST))
        outliers = flat[last.to(flat.device)].cpu()
        negative = 0
        parts: list[wire.Part] = [centroids, outliers, coded]
        if signed:
            below = topk.masked((flat < 0).cpu(), torch.from_numpy(symbols > 0))
            if negative := below.numel():
                parts.append(pack_bits(below.view(torch.uint8), 1))
        size = sum(len(each) for each in wire.to_host(parts))
        lengths = outliers.numel(), len(coded), negative
        return 8 * size / len(symbols), (lengths, parts)

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
        regular = min(alphabet, Quantizer.LAST) - first
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
        last = int(np.count_nonzero(plane == Quantizer.LAST))
        planes.check_marked(header, last, outliers)
        symbols = wire.to_device(torch.from_numpy(plane), device)
        table = torch.zeros(256, dtype=dtype, device=device)
        table[first : first + regular] = centroids
        flat = planes.levels_of(symbols, table.to(header.dtype))
        if signed:
            cls._apply_signs(header, flat, symbols, signs, count)
        if outliers:
            values = planes.Values(header, exact, header.dtype, device)
            positions.fill(flat, symbols == Quantizer.LAST, values)
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


def _shape(shape: Shape, row: bool) -> Shape:
    """Return the shape by which a plane is coded: the tensor's, or one row."""
    return (math.prod(shape),) if row else shape
