"""The compressors: a float tensor to a frame, and back.

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
`register`.
"""

import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from decimal import ROUND_FLOOR, Decimal
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from masksl import wire
from masksl.wire import MAX_ELEMENTS, FrameError

__all__ = [
    "COMPRESSORS",
    "Compressor",
    "FrameError",
    "NotFiniteError",
    "decode",
    "make",
    "options_of",
    "register",
]


class NotFiniteError(ValueError):
    """A tensor with values that are not finite; the text names who met them."""


Packed = tuple[bytes, Sequence[torch.Tensor]]

Class = TypeVar("Class", bound="type[Compressor]")

# Every registered compressor by its name.
COMPRESSORS: dict[str, type["Compressor"]] = {}

_HALF = (torch.float16, torch.bfloat16)


class Compressor(ABC):
    """Turns a float tensor into a frame; `decode` turns any frame back.

    A compressor is immutable and holds no state between calls. Its options are the
    fields of its dataclass; wrong values raise ``ValueError`` when it is made.
    """

    name: ClassVar[str]
    """Name in `make`, in the configuration and in the frame; 1 to 8 ASCII bytes."""

    def encode(
        self, tensor: torch.Tensor, *, seed: int = 0, training: bool = True
    ) -> bytes:
        """Encode a tensor.

        Parameters
        ----------
        tensor : torch.Tensor
            float16, bfloat16, float32 or float64, of any shape and memory format, not
            empty, all values finite. Elements are taken in row-major order.
        seed : int
            Seed of whatever the compressor draws; the same seed gives the same bytes.
        training : bool
            False in evaluation, which some compressors treat otherwise.

        Returns
        -------
        bytes
            The frame. What is sent is ``len(frame)`` bytes, header included.

        Raises
        ------
        TypeError
            If the tensor is not of a floating type named above.
        ValueError
            If it is empty; as `NotFiniteError` if it has values that are not finite.
            The message names the compressor and counts them.
        """
        if tensor.dtype not in wire.DTYPE_CODES:
            raise TypeError(
                f"{self.name}: dtype {tensor.dtype} cannot be encoded, "
                f"expected one of {', '.join(map(str, wire.DTYPE_CODES))}"
            )
        if tensor.numel() == 0:
            raise ValueError(f"{self.name}: tensor of shape {tuple(tensor.shape)}")
        flat = wire.flatten(tensor)
        _check_finite(flat, self.name)
        params, parts = self.pack(flat, seed=seed, training=training)
        header = wire.Header(self.name, tensor.dtype, tuple(tensor.shape), params)
        return wire.assemble(header, parts)

    @abstractmethod
    def pack(self, flat: torch.Tensor, *, seed: int, training: bool) -> Packed:
        """Compress the elements of a tensor.

        Parameters
        ----------
        flat : torch.Tensor
            Shape (d,), contiguous, finite, of a floating type.
        seed : int
            Seed of whatever is drawn.
        training : bool
            False in evaluation.

        Returns
        -------
        tuple[bytes, Sequence[torch.Tensor]]
            What the decoder needs to know (at most 20 bytes keep the header within 64)
            and the payload in order, one-dimensional tensors on the device of ``flat``.
        """

    @classmethod
    @abstractmethod
    def unpack(
        cls, header: wire.Header, payload: memoryview, device: torch.device | str
    ) -> torch.Tensor:
        """Undo `pack`.

        Parameters
        ----------
        header : wire.Header
            Header of the frame, its dtype, shape and parameters.
        payload : memoryview
            Payload of the frame; its length is yet to be checked.
        device : torch.device | str
            Where the elements go.

        Returns
        -------
        torch.Tensor
            Shape (d,), of any floating type; `decode` converts it to the header's.

        Raises
        ------
        FrameError
            If the payload is at odds with the header, before anything is allocated.
        """


def register(cls: Class) -> Class:
    """Class decorator that makes a compressor known to `make` and `decode`."""
    name = cls.name
    if not (name.isascii() and 1 <= len(name) <= 8):
        raise ValueError(f"compressor name {name!r} is not 1 to 8 ASCII characters")
    if COMPRESSORS.setdefault(name, cls).__qualname__ != cls.__qualname__:
        raise ValueError(f"compressor name {name!r} is taken by {COMPRESSORS[name]}")
    COMPRESSORS[name] = cls
    return cls


def make(name: str, **options: Any) -> Compressor:
    """Return the compressor of a name.

    Parameters
    ----------
    name : str
        A key of `COMPRESSORS`.
    **options : Any
        Its options; those left out take their defaults.

    Returns
    -------
    Compressor
        Ready to encode.

    Raises
    ------
    ValueError
        If the name or an option is unknown or an option's value is not allowed.
    """
    if name not in COMPRESSORS:
        raise ValueError(f"name={name!r}: must be one of {', '.join(COMPRESSORS)}")
    known = options_of(name)
    for option, value in options.items():
        if option not in known:
            allowed = ", ".join(known) or "none at all"
            raise ValueError(f"{option}={value!r}: {name} has the options {allowed}")
    return COMPRESSORS[name](**options)


def options_of(name: str) -> list[str]:
    """Return the names of a compressor's options."""
    return [field.name for field in fields(COMPRESSORS[name])]  # type: ignore[arg-type]


def decode(
    frame: wire.Buffer,
    *,
    device: torch.device | str = "cpu",
    max_elements: int = MAX_ELEMENTS,
) -> torch.Tensor:
    """Decode a frame of any compressor.

    Parameters
    ----------
    frame : bytes-like
        One whole frame.
    device : torch.device | str
        Where the tensor goes; only packed bytes cross to it.
    max_elements : int
        Frames that declare more elements are refused.

    Returns
    -------
    torch.Tensor
        Contiguous, with the shape and dtype of the tensor that was encoded.

    Raises
    ------
    FrameError
        If the frame is cut short, altered, of another version, of an unknown
        compressor, too large, or at odds with itself.
    """
    header, payload = wire.parse(frame, max_elements=max_elements)
    if header.compressor not in COMPRESSORS:
        raise FrameError(
            f"frame of the unknown compressor {header.compressor!r}, "
            f"known are {', '.join(COMPRESSORS)}"
        )
    flat = COMPRESSORS[header.compressor].unpack(header, payload, device)
    return flat.to(header.dtype).view(header.shape)


# --- what the compressors share -------------------------------------------------------


def _check_finite(flat: torch.Tensor, name: str) -> None:
    # A sum is finite only if every term is; it is far cheaper than looking at each.
    # Large finite values can overflow it, so that only the slow count decides.
    total = flat.sum(dtype=torch.float64 if flat.dtype == torch.float64 else None)
    if not torch.isfinite(total):
        bad = flat.numel() - int(torch.isfinite(flat).sum())
        if bad:
            raise NotFiniteError(
                f"{name}: {bad} of {flat.numel()} values are not finite"
            )


def _working(flat: torch.Tensor) -> torch.Tensor:
    """Return the elements in the type that is computed with."""
    return flat.float() if flat.dtype in _HALF else flat


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALF else dtype


def _kept(sparsity: float, count: int) -> int:
    """Return k = floor((1 - sparsity) * count), at least 1, in decimal arithmetic."""
    kept = (1 - Decimal(str(sparsity))) * count
    return max(1, int(kept.to_integral_value(ROUND_FLOOR)))


def _kth_largest(magnitude: torch.Tensor, k: int) -> torch.Tensor:
    """Return the k-th largest element, shape ().

    A sample gives a threshold below which it cannot well lie; the exact choice is then
    made among the few elements above. Where fewer than k are, all are looked at.
    """
    stride = magnitude.numel() // 2**15
    if stride > 1 and 8 * k < magnitude.numel():
        sample = magnitude[::stride]
        expected = k / stride
        rank = int(expected + 4 * expected**0.5) + 4
        guess = sample.topk(min(rank, sample.numel())).values[-1]
        candidates = magnitude[magnitude >= guess]
        if candidates.numel() >= k:
            magnitude = candidates
    return magnitude.topk(k, sorted=False).values.amin()


def _topk_mask(magnitude: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mark the k largest elements, of equal ones those of lower index.

    Returns
    -------
    tuple[torch.Tensor, torch.Tensor]
        bool, shape (d,), exactly k of them true; and the smallest kept, shape ().
    """
    smallest = _kth_largest(magnitude, k)
    mask = magnitude >= smallest
    surplus = int(mask.sum()) - k
    if surplus:
        ties = (magnitude == smallest).nonzero().view(-1)
        mask[ties[-surplus:]] = False
    return mask, smallest


def _check_kept(header: wire.Header, kept: int) -> None:
    if not 1 <= kept <= header.elements:
        raise FrameError(
            f"{header.compressor} frame keeps {kept} of {header.elements} elements"
        )


def _read_values(
    header: wire.Header, payload: memoryview, device: torch.device | str
) -> torch.Tensor:
    """Return values that travelled in the header's dtype; they must be finite."""
    values = wire.to_tensor(payload, header.dtype, device)
    if not bool(torch.isfinite(values).all()):
        raise FrameError(f"{header.compressor} frame holds values that are not finite")
    return values


def _check_sparsity(sparsity: float) -> None:
    number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    if not (number and 0 <= sparsity < 1):
        raise ValueError(f"sparsity={sparsity!r}: must be at least 0 and less than 1")


def _check_bits(bits: int, most: int) -> None:
    whole = isinstance(bits, int) and not isinstance(bits, bool)
    if not (whole and 1 <= bits <= most):
        raise ValueError(f"bits={bits!r}: must be a whole number from 1 to {most}")


def _check_choice(option: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{option}={value!r}: must be one of {', '.join(allowed)}")


# --- the compressors ------------------------------------------------------------------


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
        _check_choice("values", self.values, ("float32", "float16", "bfloat16"))

    def pack(self, flat: torch.Tensor, *, seed: int, training: bool) -> Packed:
        if self.values != "float32" and flat.dtype not in _HALF:
            narrow = flat.to(getattr(torch, self.values))
            lost = flat.numel() - int(torch.isfinite(narrow).sum())
            if lost:
                raise NotFiniteError(
                    f"{self.name}: {lost} of {flat.numel()} values "
                    f"are out of the range of {self.values}"
                )
            flat = narrow
        return self._PARAMS.pack(wire.DTYPE_CODES[flat.dtype]), [flat]

    @classmethod
    def unpack(
        cls, header: wire.Header, payload: memoryview, device: torch.device | str
    ) -> torch.Tensor:
        (code,) = header.unpack_params(cls._PARAMS)
        dtype = wire.DTYPES.get(code)
        narrowed = dtype in _HALF and header.dtype not in _HALF
        if dtype is None or not (dtype == header.dtype or narrowed):
            raise FrameError(
                f"none frame holds values of dtype code {code} for {header.dtype}"
            )
        wire.check_payload(header, payload, header.elements * dtype.itemsize)
        values = wire.Header(header.compressor, dtype, header.shape, b"")
        return _read_values(values, payload, device)


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

    References
    ----------
    Uniform quantisation as compared with in the MS paper (ECAI 2024), section 5.
    """

    name: ClassVar[str] = "qu"
    bits: int = 3
    rounding: str = "nearest"

    _PARAMS: ClassVar[struct.Struct] = struct.Struct("<Bdd")

    def __post_init__(self) -> None:
        _check_bits(self.bits, 16)
        _check_choice("rounding", self.rounding, ("nearest", "stochastic"))

    def pack(self, flat: torch.Tensor, *, seed: int, training: bool) -> Packed:
        work = _working(flat)
        lo, hi = (bound.item() for bound in work.aminmax())
        top = 2**self.bits - 1
        # Half of everything where the range itself would overflow.
        scale = 1.0 if hi - lo <= torch.finfo(work.dtype).max else 0.5
        position = (work * scale - lo * scale) if scale != 1 else work - lo
        span = hi * scale - lo * scale
        if span > 0:
            position.div_(span).mul_(top)
        if self.rounding == "stochastic":
            generator = torch.Generator(work.device).manual_seed(seed)
            noise = torch.empty_like(position).uniform_(generator=generator)
            position.add_(noise).floor_()
        else:
            position.round_()
        position.clamp_(0, top)
        symbols = position.to(torch.uint8 if self.bits <= 8 else torch.int32)
        return self._PARAMS.pack(self.bits, lo, hi), [
            wire.pack_bits(symbols, self.bits)
        ]

    @classmethod
    def unpack(
        cls, header: wire.Header, payload: memoryview, device: torch.device | str
    ) -> torch.Tensor:
        bits, lo, hi = header.unpack_params(cls._PARAMS)
        most = torch.finfo(header.dtype).max
        if not (1 <= bits <= 16 and -most <= lo <= hi <= most):
            raise FrameError(f"qu frame declares {bits} bits from {lo} to {hi}")
        wire.check_payload(header, payload, wire.packed_size(header.elements, bits))
        share = np.arange(2**bits) / (2**bits - 1)
        levels = torch.from_numpy(lo * (1 - share) + hi * share)
        levels = levels.to(device, _working_dtype(header.dtype))
        packed = wire.to_tensor(payload, torch.uint8, device)
        symbols = wire.unpack_bits(packed, header.elements, bits)
        return levels.index_select(0, symbols.to(torch.int32))


@register
@dataclass(frozen=True)
class Sparsification(Compressor):
    """SP: the elements of largest magnitude, all others zero.

    Positions travel as a bitmap or as 32-bit indices, whichever is smaller: a bit an
    element, or 32 bits a kept element. Values travel in the tensor's own type.

    Parameters
    ----------
    sparsity : float
        Share of the elements of the tensor that is dropped, at least 0, less than 1;
        ``k = floor((1 - sparsity) d)``, at least 1. Of equal magnitudes the lower
        index is kept.

    References
    ----------
    Top-k sparsification as compared with in the MS paper (ECAI 2024), section 5; there
    by value, here by magnitude, which is the same after a ReLU.
    """

    name: ClassVar[str] = "sp"
    sparsity: float = 0.95875

    _PARAMS: ClassVar[struct.Struct] = struct.Struct("<QB")
    _BITMAP: ClassVar[int] = 0
    _INDICES: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)

    def pack(self, flat: torch.Tensor, *, seed: int, training: bool) -> Packed:
        count = flat.numel()
        kept = _kept(self.sparsity, count)
        mask, _ = _topk_mask(_working(flat).abs(), kept)
        values = flat[mask]
        if 4 * kept < wire.packed_size(count, 1) and count <= 2**31:
            form, positions = self._INDICES, mask.nonzero().view(-1).to(torch.int32)
        else:
            form, positions = self._BITMAP, wire.pack_bits(mask.view(torch.uint8), 1)
        return self._PARAMS.pack(kept, form), [values, positions]

    @classmethod
    def unpack(
        cls, header: wire.Header, payload: memoryview, device: torch.device | str
    ) -> torch.Tensor:
        kept, form = header.unpack_params(cls._PARAMS)
        _check_kept(header, kept)
        if form not in (cls._BITMAP, cls._INDICES):
            raise FrameError(f"sp frame has positions of the unknown form {form}")
        bitmap = wire.packed_size(header.elements, 1)
        split = kept * header.dtype.itemsize
        size = 4 * kept if form == cls._INDICES else bitmap
        wire.check_payload(header, payload, split + size)
        positions = payload[split:]
        cls._check_positions(header, positions, kept, form)
        values = _read_values(header, payload[:split], device)
        flat = values.new_zeros(header.elements)
        if form == cls._INDICES:
            indices = wire.to_tensor(positions, torch.int32, device)
            return flat.index_copy_(0, indices.long(), values)
        packed = wire.to_tensor(positions, torch.uint8, device)
        mask = wire.unpack_bits(packed, header.elements, 1).view(torch.bool)
        return flat.masked_scatter_(mask, values)

    @classmethod
    def _check_positions(
        cls, header: wire.Header, positions: memoryview, kept: int, form: int
    ) -> None:
        if form == cls._BITMAP:
            marked = wire.count_symbols(positions, header.elements, 1, 1)
            if marked != kept:
                raise FrameError(f"sp frame keeps {kept} elements but marks {marked}")
            return
        for part in wire.chunks(positions, "<u4"):
            if part[-1] >= header.elements or np.any(part[1:] <= part[:-1]):
                raise FrameError(
                    "sp frame has indices that do not ascend "
                    f"within its {header.elements} elements"
                )


@register
@dataclass(frozen=True)
class MaskSparsification(Compressor):
    """MS: the largest elements exactly, all others by a mask of a few bits.

    With k elements kept, t the smallest of their magnitudes and ``L = 2**bits - 1``,
    a kept element has the mask symbol L and sends its value; any other has the symbol
    of its level, a multiple of t/L below t. It costs ``bits`` an element and the values
    of those kept, and a sign bit an element where the tensor has negative values.

    Parameters
    ----------
    sparsity : float
        Share of the elements of the tensor that is not kept, at least 0, less than 1;
        ``k = floor((1 - sparsity) d)``, at least 1. Of equal magnitudes the lower
        index is kept.
    bits : int
        1 to 8, bits of a mask symbol. With 1 bit it keeps and drops what `sp` does.
    rounding : str
        ``nearest`` level, as in the public code and the paper's figures, or ``floor``,
        as in its text. Symbols of elements not kept are at most L - 1 in both.

    References
    ----------
    "Mask-Encoded Sparsification: Mitigating Biased Gradients in
    Communication-Efficient Split Learning", ECAI 2024, algorithms 1 and 2.
    """

    name: ClassVar[str] = "ms"
    sparsity: float = 0.99
    bits: int = 2
    rounding: str = "nearest"

    _PARAMS: ClassVar[struct.Struct] = struct.Struct("<QBB")

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)
        _check_bits(self.bits, 8)
        _check_choice("rounding", self.rounding, ("nearest", "floor"))

    def pack(self, flat: torch.Tensor, *, seed: int, training: bool) -> Packed:
        work = _working(flat)
        kept = _kept(self.sparsity, flat.numel())
        signed = bool(work.amin() < 0)
        magnitude = work.abs() if signed else work
        mask, smallest = _topk_mask(magnitude, kept)
        top = 2**self.bits - 1
        if smallest > 0:
            level = (magnitude / smallest).mul_(top)
            level = level.round_() if self.rounding == "nearest" else level.floor_()
            symbols = level.clamp_(max=top - 1).to(torch.uint8)
        else:  # fewer than k elements differ from zero: all others are zero
            symbols = torch.zeros_like(mask, dtype=torch.uint8)
        symbols.masked_fill_(mask, top)
        parts = [flat[mask], wire.pack_bits(symbols, self.bits)]
        if signed:
            parts.append(wire.pack_bits((work < 0).view(torch.uint8), 1))
        return self._PARAMS.pack(kept, self.bits, signed), parts

    @classmethod
    def unpack(
        cls, header: wire.Header, payload: memoryview, device: torch.device | str
    ) -> torch.Tensor:
        kept, bits, signed = header.unpack_params(cls._PARAMS)
        _check_kept(header, kept)
        if not 1 <= bits <= 8 or signed > 1:
            raise FrameError(f"ms frame declares {bits} bits and sign form {signed}")
        count, top = header.elements, 2**bits - 1
        masks = kept * header.dtype.itemsize
        signs = masks + wire.packed_size(count, bits)
        end = signs + (wire.packed_size(count, 1) if signed else 0)
        wire.check_payload(header, payload, end)
        marked = wire.count_symbols(payload[masks:signs], count, bits, top)
        if marked != kept:
            raise FrameError(f"ms frame keeps {kept} elements but marks {marked}")
        values = _read_values(header, payload[:masks], device)
        packed = wire.to_tensor(payload[masks:signs], torch.uint8, device)
        symbols = wire.unpack_bits(packed, count, bits)
        work = _working(values)
        flat = symbols.to(work.dtype).mul_(work.abs().amin() / top)
        if signed:
            packed = wire.to_tensor(payload[signs:], torch.uint8, device)
            negative = wire.unpack_bits(packed, count, 1).view(torch.bool)
            flat = torch.where(negative, -flat, flat)
        return flat.to(header.dtype).masked_scatter_(symbols == top, values)
