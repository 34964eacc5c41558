"""The compressors: float tensors to frames, and back.

>>> import torch
>>> from masksl.compress import decode, make
>>> activation = torch.relu(torch.randn(256, 64, 16, 16))
>>> frame = make("ms", sparsity=0.99, bits=2).encode(activation)
>>> round(8 * len(frame) / activation.numel(), 2)
2.32
>>> decode(frame).shape
torch.Size([256, 64, 16, 16])

A compressor of your own is one class: derive from `Compressor`, give it a name and
options (fields of a frozen dataclass), write `pack` and `unpack`, and decorate it with
`register`. `masksl.codec.base` documents the contract.
"""

import struct
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from masksl.codec import planes, scalar, wire
from masksl.codec.base import (
    COMPRESSORS,
    Bounds,
    Compressor,
    Device,
    FrameError,
    Header,
    NotFiniteError,
    Packed,
    Shape,
    decode,
    decode_sparse,
    has_positions,
    kept_positions,
    make,
    options_of,
    register,
)
from masksl.codec.bits import pack_bits
from masksl.codec.drive import RotatedSigns
from masksl.codec.ec import EntropyCodedQuantization
from masksl.codec.mask import Mask
from masksl.codec.ms import MaskSparsification
from masksl.codec.options import check_choice, check_number, check_whole
from masksl.codec.qsgd import StochasticQuantization
from masksl.codec.sets import (
    decode_set,
    decode_set_exact,
    decode_set_sparse,
    encode_set,
)
from masksl.codec.sign import Sign
from masksl.codec.sp import RandomizedSparsification, Sparsification
from masksl.codec.spsign import SignSparsification

__all__ = [
    "COMPRESSORS",
    "Compressor",
    "EntropyCodedQuantization",
    "FrameError",
    "Mask",
    "MaskSparsification",
    "NotFiniteError",
    "RandomizedSparsification",
    "SignSparsification",
    "Sparsification",
    "decode",
    "decode_set",
    "decode_set_exact",
    "decode_set_sparse",
    "decode_sparse",
    "encode_set",
    "has_positions",
    "kept_positions",
    "make",
    "options_of",
    "register",
]


# --- no compression -------------------------------------------------------------------


@register
@dataclass(frozen=True)
class Identity(Compressor):
    """No compression: the values as they are, or in a shorter floating type.

    Parameters
    ----------
    values : str
        ``float32`` sends values in the tensor's own type, so that nothing is lost
        (float64 keeps 64 bits, 16-bit types keep 16); ``float16`` and ``bfloat16``
        narrow them to 16 bits.
    """

    name: ClassVar[str] = "none"
    values: str = "float32"

    _PARAMS: ClassVar[struct.Struct] = struct.Struct("<B")

    def __post_init__(self) -> None:
        check_choice("values", self.values, planes.VALUES)

    def pack(
        self, flat: Tensor, shape: Shape, bounds: Bounds, *, seed: int, training: bool
    ) -> Packed:
        flat = planes.narrow(flat, self.values, bounds, self.name)
        return self._PARAMS.pack(wire.DTYPE_CODES[flat.dtype]), [flat]

    @classmethod
    def unpack(cls, header: Header, payload: memoryview, device: Device) -> Tensor:
        (code,) = header.unpack_params(cls._PARAMS)
        dtype = planes.value_dtype(header, code)
        wire.check_payload(header, payload, header.elements * dtype.itemsize)
        return planes.read_values(header, payload, dtype, device)


# --- quantisers: every element a level ------------------------------------------------


@register
@dataclass(frozen=True)
class UniformQuantization(Compressor):
    """QU: 2**bits evenly spaced levels from the minimum to the maximum of the tensor.

    Level i is ``lo + i (hi - lo) / (2**bits - 1)``, so that both ends are exact. With
    nearest rounding no element is off by more than half a level.

    Parameters
    ----------
    bits : int
        1 to 16, bits an element.
    rounding : str
        ``nearest``, or ``stochastic``, which is right in the mean.
    lossless : str
        Stage over the codes: ``none``, ``fast``, ``context`` or ``auto``.

    References
    ----------
    Uniform quantisation as compared with in the MS paper (ECAI 2024), section 5.
    """

    name: ClassVar[str] = "qu"
    bits: int = 3
    rounding: str = "nearest"
    lossless: str = "none"

    _PARAMS: ClassVar[struct.Struct] = struct.Struct("<BBdd")

    def __post_init__(self) -> None:
        check_whole("bits", self.bits, 1, 16)
        check_choice("rounding", self.rounding, ("nearest", "stochastic"))
        check_choice("lossless", self.lossless, planes.LOSSLESS)

    def pack(
        self, flat: Tensor, shape: Shape, bounds: Bounds, *, seed: int, training: bool
    ) -> Packed:
        work = planes.working(flat)
        lo, hi = bounds
        top = 2**self.bits - 1
        # Half of everything where the range itself would overflow.
        scale = 1.0 if hi - lo <= torch.finfo(work.dtype).max else 0.5
        position = (work * scale - lo * scale) if scale != 1 else work - lo
        span = hi * scale - lo * scale
        if span > 0:
            position.div_(scalar.number(span, work)).mul_(top)
        if self.rounding == "stochastic":
            generator = torch.Generator(work.device).manual_seed(seed)
            position.add_(torch.empty_like(position).uniform_(generator=generator))
            position.floor_()
        else:
            position.round_()
        position.clamp_(0, top)
        symbols = position.to(torch.uint8 if self.bits <= 8 else torch.int32)
        del position  # as large as the tensor
        form, plane = planes.write_plane(symbols, self.bits, shape, self.lossless)
        return self._PARAMS.pack(self.bits, form, lo, hi), [plane]

    @classmethod
    def unpack(cls, header: Header, payload: memoryview, device: Device) -> Tensor:
        bits, form, lo, hi = header.unpack_params(cls._PARAMS)
        most = torch.finfo(header.dtype).max
        if not (1 <= bits <= 16 and -most <= lo <= hi <= most):
            raise FrameError(f"qu frame declares {bits} bits from {lo} to {hi}")

        def levels() -> Tensor:
            share = np.arange(2**bits) / (2**bits - 1)
            every = torch.from_numpy(lo * (1 - share) + hi * share)
            every = every.to(planes.working_dtype(header.dtype))
            return wire.to_device(every, device)

        return planes.read_plane(header, payload, bits, form, levels)


@register
@dataclass(frozen=True)
class QuantileQuantization(Compressor):
    """QQ: levels at the quantiles of a normal distribution, scaled to the maximum.

    2**(bits - 1) positive levels, zero, and one negative level less.

    Parameters
    ----------
    bits : int
        2 to 8, bits an element.
    offset : float
        Probability of the outermost quantile, from 0.5 to less than 1.
    lossless : str
        Stage over the codes: ``none``, ``fast``, ``context`` or ``auto``.

    References
    ----------
    The normal-float levels that the extended code of the MS paper compares with.
    """

    name: ClassVar[str] = "qq"
    bits: int = 3
    offset: float = 0.99
    lossless: str = "none"

    _PARAMS: ClassVar[struct.Struct] = struct.Struct("<BBdd")

    def __post_init__(self) -> None:
        check_whole("bits", self.bits, 2, 8)
        check_number("offset", self.offset, 0.51, 1)
        check_choice("lossless", self.lossless, planes.LOSSLESS)

    @staticmethod
    def levels(bits: int, offset: float, scale: float) -> Tensor:
        """Return the 2**bits levels, float64, ascending."""
        probability = torch.linspace(
            offset, 0.5, 2 ** (bits - 1) + 1, dtype=torch.float64
        )
        positive = torch.special.ndtri(probability[:-1])
        negative = -torch.special.ndtri(
            torch.linspace(offset, 0.5, 2 ** (bits - 1), dtype=torch.float64)[:-1]
        )
        ascending = torch.cat([negative, torch.zeros(1).double(), positive.flip(0)])
        return ascending / positive[0] * scale

    def pack(
        self, flat: Tensor, shape: Shape, bounds: Bounds, *, seed: int, training: bool
    ) -> Packed:
        work = planes.working(flat)
        scale = max(map(abs, bounds))
        levels = self.levels(self.bits, self.offset, scale)
        symbols = scalar.nearest(work, wire.to_device(levels, work.device))
        form, plane = planes.write_plane(symbols, self.bits, shape, self.lossless)
        return self._PARAMS.pack(self.bits, form, self.offset, scale), [plane]

    @classmethod
    def unpack(cls, header: Header, payload: memoryview, device: Device) -> Tensor:
        bits, form, offset, scale = header.unpack_params(cls._PARAMS)
        most = torch.finfo(header.dtype).max
        if not (2 <= bits <= 8 and 0.5 < offset < 1 and 0 <= scale <= most):
            raise FrameError(f"qq frame declares {bits} bits, {offset}, scale {scale}")
        dtype = planes.working_dtype(header.dtype)
        levels = wire.to_device(cls.levels(bits, offset, scale).to(dtype), device)
        return planes.read_plane(header, payload, bits, form, lambda: levels)


@register
@dataclass(frozen=True)
class FloatQuantization(Compressor):
    """FP: small floats, with a sign only where the tensor has negative values.

    A code is an exponent and a mantissa; the exponent 0 holds zero and the sub-normal
    numbers, and no code is spent on infinities or NaN.

    Parameters
    ----------
    exponent : int
        Bits of the exponent, 1 to 5.
    mantissa : int
        Bits of the mantissa, 0 to 7; at most 8 with the exponent.
    scale : str
        ``absmax`` scales the largest code to the largest magnitude of the tensor;
        ``none`` takes the bias 2**(exponent - 1) - 1, and what is larger than the
        largest code becomes that code.
    lossless : str
        Stage over the codes: ``none``, ``fast``, ``context`` or ``auto``.

    References
    ----------
    The small floats that the extended code of the MS paper compares with.
    """

    name: ClassVar[str] = "fp"
    exponent: int = 2
    mantissa: int = 1
    scale: str = "absmax"
    lossless: str = "none"

    _PARAMS: ClassVar[struct.Struct] = struct.Struct("<BBBBd")

    def __post_init__(self) -> None:
        check_whole("exponent", self.exponent, 1, 5)
        check_whole("mantissa", self.mantissa, 0, min(7, 8 - self.exponent))
        check_choice("scale", self.scale, ("absmax", "none"))
        check_choice("lossless", self.lossless, planes.LOSSLESS)

    @staticmethod
    def levels(exponent: int, mantissa: int) -> Tensor:
        """Return the numbers of all codes without sign, float64, ascending."""
        codes = torch.arange(2 ** (exponent + mantissa))
        power = codes >> mantissa
        fraction = (codes & (2**mantissa - 1)).double() / 2**mantissa
        bias = 2 ** (exponent - 1) - 1
        normal = (1 + fraction) * 2.0 ** (power - bias)
        return torch.where(power > 0, normal, fraction * 2.0 ** (1 - bias))

    @staticmethod
    def largest(exponent: int, mantissa: int) -> float:
        """Return the number of the last code."""
        return (2 - 0.5**mantissa) * 2.0 ** (2 ** (exponent - 1))

    def pack(
        self, flat: Tensor, shape: Shape, bounds: Bounds, *, seed: int, training: bool
    ) -> Packed:
        work = planes.working(flat)
        lo, hi = bounds
        levels = self.levels(self.exponent, self.mantissa)
        largest = self.largest(self.exponent, self.mantissa)
        factor = max(-lo, hi) / largest if self.scale == "absmax" else 1.0
        signed = lo < 0
        magnitude = work.abs() if signed else work
        levels = wire.to_device(levels * factor, work.device)
        symbols = scalar.nearest(magnitude, levels)
        bits = self.exponent + self.mantissa
        form, plane = planes.write_plane(symbols, bits, shape, self.lossless)
        parts = [pack_bits((work < 0).view(torch.uint8), 1)] if signed else []
        params = self.exponent, self.mantissa, signed, form, factor
        return self._PARAMS.pack(*params), [*parts, plane]

    @classmethod
    def unpack(cls, header: Header, payload: memoryview, device: Device) -> Tensor:
        exponent, mantissa, signed, form, factor = header.unpack_params(cls._PARAMS)
        if not 1 <= exponent <= 5 or exponent + mantissa > 8 or signed > 1:
            raise FrameError(f"fp frame declares {exponent} + {mantissa} bits")
        largest = factor * cls.largest(exponent, mantissa)
        most = max(torch.finfo(header.dtype).max, 1.0)
        if not (factor == 1 or 0 <= largest <= most * (1 + 1e-9)):
            raise FrameError(f"fp frame declares the scale {factor}")
        levels = (cls.levels(exponent, mantissa) * factor).clamp_(max=most)
        signs, plane = planes.split(header, payload, planes.sign_bytes(header, signed))
        levels = levels.to(planes.working_dtype(header.dtype))
        levels = wire.to_device(levels, device)
        bits = exponent + mantissa
        flat = planes.read_plane(header, plane, bits, form, lambda: levels)
        if signed:
            planes.apply_signs(flat, signs)
        return flat


# --- those in files of their own ------------------------------------------------------

register(Sparsification)
register(RandomizedSparsification)
register(MaskSparsification)
register(EntropyCodedQuantization)
register(Mask)
register(SignSparsification)
register(Sign)
register(StochasticQuantization)
register(RotatedSigns)
