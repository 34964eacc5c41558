"""EC: a quantiser whose symbols are entropy-coded."""

import math
import struct
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from masksl.codec import dct, planes, positions, topk, wire
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
from masksl.codec.quantizer import (
    DEFAULT_ERROR,
    Elements,
    Quantized,
    Quantizer,
    Target,
    choose,
)

# Form of the coded plane by ``context``: of the tensor's shape, or of one row.
_FORMS = {"spatial": 3, "none": 4}
# Forms of coefficients: of any tensor, and of one without negative elements.
_SIGNED_MAPS, _POSITIVE_MAPS = 5, 6
_COMPARED = 5  # one of so many samples shows how alike neighbours are
_TRIED = 26  # one of so many shows whether coefficients are smaller
_SMOOTH = 0.7  # correlation of neighbours below which they never are
_COARSE = 0.2  # error below which they never are
_ZONE = 0.85  # dead zone of the trial
_MOST = 2.0**48  # magnitude beyond which sums of squares might leave the type


@dataclass(frozen=True)
class EntropyCodedQuantization(Compressor):
    """EC: a scalar quantiser with a dead zone whose symbols are entropy-coded.

    Symbol 0 is a magnitude below ``deadzone`` steps, the next ones a step each. A
    symbol is decoded as the mean (centroid) of its magnitudes. If the tensor has
    negative values, symbol 0 is decoded as zero, and the others cost a sign bit.
    Elements beyond the last of 255 symbols are sent exactly. `masksl.codec.coder` codes
    the symbols.

    Under ``error``, smooth maps, (B, C, H, W), are coded as the coefficients of
    `masksl.codec.dct` where a trial on some samples shows that these take fewer bits.
    The error that is kept to is that of the decoded tensor. Coefficients have signs; of
    a tensor without negative values, their means have none.

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
            check_number("deadzone", self.deadzone, 0.5, 1, inclusive=True)
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
        if self._takes_coefficients(flat.dtype, work, shape, bounds):
            packed = self._pack_coefficients(work, shape, bounds[0] < 0, self.deadzone)
            if packed is not None:
                return packed
        return self._pack_elements(flat, work, shape, bounds, seed, self.deadzone)

    # pylint: disable-next=too-many-arguments,too-many-positional-arguments
    def _pack_elements(
        self,
        flat: Tensor,
        work: np.ndarray,
        shape: Shape,
        bounds: Bounds,
        seed: int,
        deadzone: float | None,
    ) -> Packed:
        """Compress a tensor by its elements."""
        signed = bounds[0] < 0

        def rounded(magnitudes: np.ndarray) -> np.ndarray:
            return torch.from_numpy(magnitudes).to(flat.dtype).double().numpy()

        elements = Elements(work, signed, max(map(abs, bounds)), rounded)
        by = _shape(shape, self.context == "none")
        finish = partial(_encode_symbols, flat=flat, shape=by, signed=signed)
        if self.step is not None and self.rounding == "stochastic":
            generator = torch.Generator().manual_seed(seed)
            maps = maps_of(shape)
            drawn = torch.rand(maps[0], generator=generator, dtype=torch.float64)
            most = torch.finfo(flat.dtype).max
            quantized = elements.rounded_at_random(self.step, most, maps, drawn.numpy())
            _, (lengths, parts) = finish(quantized)
        else:
            target = Target(self.step, self.bits, self.error, deadzone)
            quantized, (lengths, parts) = choose(elements, target, finish)
        alphabet = len(quantized.counts)
        form = _FORMS[self.context]
        return self._PARAMS.pack(form, alphabet, signed, *lengths), parts

    def _takes_coefficients(
        self, dtype: torch.dtype, work: np.ndarray, shape: Shape, bounds: Bounds
    ) -> bool:
        """Return whether coefficients of maps take fewer bits than elements."""
        if (
            (self.step, self.bits, self.context) != (None, None, "spatial")
            or (self.error or DEFAULT_ERROR) < _COARSE
            or not _can_be_transformed(dtype, shape)
            or not 1 / _MOST < max(map(abs, bounds)) < _MOST
        ):
            return False
        samples = work.reshape(shape)
        if not dct.correlation(samples[::_COMPARED]) >= _SMOOTH:
            return False
        some = samples[::_TRIED]
        part, zone = some.flatten(), self.deadzone or _ZONE
        inside = float(part.min()), float(part.max())
        by_coefficients = self._pack_coefficients(part, some.shape, bounds[0] < 0, zone)
        if by_coefficients is None:
            return False
        tensor = torch.from_numpy(part)
        by_elements = self._pack_elements(tensor, part, some.shape, inside, 0, zone)
        taken, most = (
            sum(map(len, wire.to_host(parts)))
            for _, parts in (by_coefficients, by_elements)
        )
        return taken < most

    def _pack_coefficients(
        self, work: np.ndarray, shape: Shape, signed: bool, deadzone: float | None
    ) -> Packed | None:
        """Compress a tensor as the coefficients of its maps, see `dct.forward`.

        Return None if one of them would have to be sent exactly.
        """
        coefficients = dct.forward(work, shape)
        largest = max(float(coefficients.max()), -float(coefficients.min()))
        elements = Elements(coefficients, True, largest, lambda values: values)

        def error(quantized: Quantized) -> float:
            parts = quantized.symbols, quantized.centroids, work
            return dct.error(coefficients, *parts, shape, not signed)

        finish = partial(
            _encode_symbols,
            flat=torch.from_numpy(coefficients),
            shape=dct.coefficients_shape(shape),
            signed=True,
            positive=0 if signed else len(work) // dct.BANDS,
        )
        target = Target(None, None, self.error, deadzone)
        quantized, (lengths, parts) = choose(elements, target, finish, error)
        if len(quantized.counts) > Quantizer.LAST:
            return None
        form = _SIGNED_MAPS if signed else _POSITIVE_MAPS
        return self._PARAMS.pack(form, len(quantized.counts), 1, *lengths), parts

    @classmethod
    def unpack(cls, header: Header, payload: memoryview, device: Device) -> Tensor:
        """Decompress the elements of a tensor, see `Compressor.unpack`."""
        form, alphabet, signed, outliers, length, count = header.unpack_params(
            cls._PARAMS
        )
        maps = form in (_SIGNED_MAPS, _POSITIVE_MAPS)
        known = form in _FORMS.values() and signed <= 1
        if maps:
            known = signed == 1 and alphabet <= Quantizer.LAST
            known = known and _can_be_transformed(header.dtype, header.shape)
        if not known or not 1 <= alphabet <= 256:
            raise FrameError(
                f"ec frame declares form {form}, {alphabet} symbols, signs {signed}"
            )
        if outliers > (0 if maps else header.elements) or count > header.elements:
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
        place = torch.device("cpu") if maps else device
        centroids = planes.read_values(header, sent, dtype, place)
        if bool((centroids.abs() > torch.finfo(header.dtype).max).any()):
            raise FrameError(f"ec frame holds centroids that no {header.dtype} can be")
        table = torch.zeros(256, dtype=dtype, device=place)
        table[first : first + regular] = centroids
        if maps:
            positive = form == _POSITIVE_MAPS
            elements = _decode_coefficients(
                header, coded, alphabet, table, signs, count, positive
            )
            return wire.to_device(elements, device)
        by = _shape(header.shape, form == _FORMS["none"])
        plane = decode_plane(coded, alphabet, by)
        last = int(np.count_nonzero(plane == Quantizer.LAST))
        planes.check_marked(header, last, outliers)
        symbols = wire.to_device(torch.from_numpy(plane), device)
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


def _can_be_transformed(dtype: torch.dtype, shape: Shape) -> bool:
    """Return whether a tensor can have coefficients."""
    return dtype in (torch.float32, torch.float64) and dct.fits(shape)


# pylint: disable-next=too-many-arguments,too-many-positional-arguments
def _decode_coefficients(
    header: Header,
    coded: memoryview,
    alphabet: int,
    levels: Tensor,
    signs: memoryview,
    count: int,
    positive: bool,
) -> Tensor:
    """Decode the elements of a coded plane of coefficients, on the CPU."""
    most = dct.LARGEST * torch.finfo(header.dtype).max
    if float(levels.abs().max()) > most:
        raise FrameError("ec frame holds coefficients of elements that are not finite")
    plane = decode_plane(coded, alphabet, dct.coefficients_shape(header.shape))
    skipped = plane.size // dct.BANDS if positive else 0
    planes.check_marked(header, int(np.count_nonzero(plane[skipped:])), count)
    bits = np.frombuffer(signs.toreadonly(), np.uint8)
    flat = dct.decode(plane, levels.numpy(), bits, header.shape, positive)
    return torch.from_numpy(flat)


def _encode_symbols(
    quantized: Quantized,
    *,
    flat: Tensor,
    shape: Shape,
    signed: bool,
    positive: int = 0,
) -> tuple[float, tuple[tuple[int, int, int], list[wire.Part]]]:
    """Encode symbols; return the bits an element, the lengths and the payload.

    Parameters
    ----------
    quantized : Quantized
        The symbols.
    flat : Tensor
        What they are of, shape (d,).
    shape : Shape
        Shape that the plane is coded by.
    signed : bool
        Whether there are signs.
    positive : int
        Elements at the beginning that have none nevertheless.
    """
    symbols = quantized.symbols
    coded = encode_plane(symbols, len(quantized.counts), shape)
    centroids = torch.from_numpy(quantized.centroids[int(signed) : Quantizer.LAST])
    outliers = flat[:0].cpu()
    if len(quantized.counts) > Quantizer.LAST:
        last = topk.positions(torch.from_numpy(symbols == Quantizer.LAST))
        outliers = flat[last.to(flat.device)].cpu()
    negative = 0
    parts: list[wire.Part] = [centroids, outliers, coded]
    if signed:
        nonzero = torch.from_numpy(symbols[positive:] > 0)
        below = topk.masked((flat[positive:] < 0).cpu(), nonzero)
        if negative := below.numel():
            parts.append(pack_bits(below.view(torch.uint8), 1))
    size = sum(len(each) for each in wire.to_host(parts))
    lengths = outliers.numel(), len(coded), negative
    return 8 * size / len(symbols), (lengths, parts)
