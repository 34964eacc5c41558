"""Parts of payloads: values, signs, and planes of symbols.

A plane holds one small symbol for every element. It is encoded bit-packed, or by a
lossless stage if that is smaller. `masksl.codec.positions` encodes positions.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import zstandard

from masksl.codec import coder, wire
from masksl.codec.bits import (
    all_finite,
    count_symbols,
    look_up,
    pack_bits,
    packed_size,
    part_of,
    spans,
    unpack_bits,
)
from masksl.codec.wire import FrameError

Bounds = tuple[float, float]  # least and largest element of a tensor

VALUES = ("float32", "bfloat16", "float16")
LOSSLESS = ("none", "fast", "context", "auto")

_HALF = (torch.float16, torch.bfloat16)
_RAW, _FAST, _CODED = 0, 1, 3  # forms of a plane of symbols
_EARLIER = (2, 17)  # forms of coded planes and gaps that were given up


class NotFiniteError(ValueError):
    """A tensor with values that are not finite; the text names who met them."""


def finite_bounds(flat: torch.Tensor, name: str) -> Bounds:
    """Return the least and the largest element; raise `NotFiniteError` unless finite.

    Both are copied to the host together: one synchronisation on a GPU.
    """
    lo, hi = torch.stack(flat.aminmax()).tolist()
    if not (math.isfinite(lo) and math.isfinite(hi)):
        bad = flat.numel() - int(torch.isfinite(flat).sum())
        raise NotFiniteError(f"{name}: {bad} of {flat.numel()} values are not finite")
    return lo, hi


def working(flat: torch.Tensor) -> torch.Tensor:
    """Convert the elements to the type of the computation."""
    return flat.float() if flat.dtype in _HALF else flat


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of the computation: float32, or float64 for float64."""
    return torch.float32 if dtype in _HALF else dtype


def sums(parts: torch.Tensor) -> list[float]:
    """Return the sum of every row, float64, shape (n, m).

    On the CPU NumPy adds up: the order of PyTorch's sums depends on the number of
    threads.
    """
    if parts.device.type == "cpu":
        return [float(row.sum()) for row in parts.numpy()]
    return parts.sum(1).tolist()


def narrow(values: torch.Tensor, to: str, bounds: Bounds, name: str) -> torch.Tensor:
    """Convert values to the type that they are sent in.

    ``float32`` keeps the tensor's own type, so that nothing is lost. Values are checked
    only if ``bounds`` exceed the range of the type.
    """
    if to == "float32" or values.dtype in _HALF:
        return values
    narrowed = values.to(getattr(torch, to))
    if max(map(abs, bounds)) > torch.finfo(narrowed.dtype).max:
        lost = values.numel() - int(torch.isfinite(narrowed).sum())
        if lost:
            raise NotFiniteError(
                f"{name}: {lost} of {values.numel()} values are out of the range of "
                f"{to}"
            )
    return narrowed


def value_dtype(header: wire.Header, code: int) -> torch.dtype:
    """Return the type of sent values, the tensor's own or a narrower one."""
    dtype = wire.DTYPES.get(code)
    narrowed = dtype in _HALF and header.dtype not in _HALF
    if dtype is None or not (dtype == header.dtype or narrowed):
        raise FrameError(
            f"{header.compressor} frame holds values of dtype code {code} "
            f"for {header.dtype}"
        )
    return dtype


def read_values(
    header: wire.Header,
    payload: memoryview,
    dtype: torch.dtype,
    device: torch.device | str,
) -> torch.Tensor:
    """Return values of the payload; they must be finite."""
    _check_finite(header, payload, dtype)
    return wire.to_tensor(payload, dtype, device)


class Values:
    """Values of a payload, read in parts to save memory.

    Parameters
    ----------
    header : wire.Header
        Header of the frame.
    payload : memoryview
        The values alone, whole.
    dtype : torch.dtype
        Their type in the payload.
    device : torch.device | str
        Device that they are read to.

    Raises
    ------
    FrameError
        If one of them is not finite.
    """

    def __init__(
        self,
        header: wire.Header,
        payload: memoryview,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        _check_finite(header, payload, dtype)
        self._payload, self._sent = payload, dtype
        self._dtype, self.device = header.dtype, device
        self.count = len(payload) // dtype.itemsize

    def part(self, start: int, stop: int) -> torch.Tensor:
        """Return values, shape (stop - start,), of the type of the frame's tensor."""
        size = self._sent.itemsize
        part = self._payload[size * start : size * stop]
        return wire.to_tensor(part, self._sent, self.device).to(self._dtype)


def _check_finite(header: wire.Header, payload: memoryview, dtype: torch.dtype) -> None:
    if not all_finite(payload, dtype):
        raise FrameError(f"{header.compressor} frame holds values that are not finite")


def sign_bytes(header: wire.Header, signed: int) -> int:
    """Return the size in bytes of one sign bit an element, 0 without signs."""
    return packed_size(header.elements, 1) if signed else 0


def apply_signs(flat: torch.Tensor, signs: memoryview) -> None:
    """Negate elements in place, by a bit each."""
    packed = wire.to_tensor(signs, torch.uint8, flat.device)
    for span in spans(flat):
        negate(flat[span], packed, span)


def negate(part: torch.Tensor, packed: torch.Tensor, span: slice) -> None:
    """Negate the elements of a span in place, by a bit each.

    Parameters
    ----------
    part : torch.Tensor
        The elements of the span.
    packed : torch.Tensor
        uint8: one bit for every element of the whole tensor.
    span : slice
        One of `spans`.
    """
    bits = part_of(packed, 8 * len(packed), 1, span)
    negative = unpack_bits(bits, len(part), 1).view(torch.bool)
    part.copy_(torch.where(negative, -part, part))


def write_plane(
    symbols: torch.Tensor, bits: int, shape: tuple[int, ...], lossless: str
) -> tuple[int, wire.Part]:
    """Encode a plane of symbols; return its form and its bytes.

    Parameters
    ----------
    symbols : torch.Tensor
        Shape (d,), uint8 for up to eight bits, else int32.
    bits : int
        1 to 16.
    shape : tuple[int, ...]
        Shape of the tensor.
    lossless : str
        ``none`` packs them; ``fast`` compresses what was packed, ``context`` codes
        symbols of up to eight bits by their neighbours, each if that is smaller;
        ``auto`` takes the smallest of all.
    """
    best: tuple[int, wire.Part] = _RAW, pack_bits(symbols, bits)
    size = packed_size(symbols.numel(), bits)
    if lossless in ("fast", "auto"):
        coded = zstandard.ZstdCompressor(level=1).compress(*wire.to_host([best[1]]))
        if len(coded) < size:
            best, size = (_FAST, coded), len(coded)
    if lossless in ("context", "auto") and bits <= 8:
        coded = coder.encode_plane(symbols.cpu().numpy(), 2**bits, shape)
        if len(coded) < size:
            best = _CODED, coded
    return best


def read_plane(
    header: wire.Header,
    payload: memoryview,
    bits: int,
    form: int,
    levels: Callable[[], torch.Tensor],
    marked: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Decode a plane of symbols and look up the level of each.

    Parameters
    ----------
    header : wire.Header
        Header of the frame.
    payload : memoryview
        The plane alone.
    bits, form : int
        Bits of a symbol, and the form of the plane.
    levels : Callable[[], torch.Tensor]
        Returns the level of each symbol: shape (2**bits,), of any type, on the device
        of the elements. Called after all checks.
    marked : tuple[int, int] | None
        A symbol, and its expected number of occurrences.

    Returns
    -------
    torch.Tensor
        Shape (d,), of the type and on the device of the levels.
    """
    count = header.elements
    size = packed_size(count, bits)
    if form == _CODED and bits <= 8:
        plane = coder.decode_plane(payload, 2**bits, header.shape)
        if marked is not None:
            found = int(np.count_nonzero(plane == marked[0]))
            check_marked(header, found, marked[1])
        return levels_of(torch.from_numpy(plane), levels())
    if form == _FAST:
        payload = memoryview(_inflated(payload, size))
    elif form != _RAW:
        raise _unknown_form(header, form)
    wire.check_payload(header, payload, size)
    if marked is not None:
        found = count_symbols(payload, count, bits, marked[0])
        check_marked(header, found, marked[1])
    each = levels()
    packed = wire.to_tensor(payload, torch.uint8, each.device)
    return look_up(packed, each, count, bits)


def levels_of(symbols: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the level of every symbol.

    Parameters
    ----------
    symbols : torch.Tensor
        uint8, shape (d,), on any device.
    levels : torch.Tensor
        Shape (n,), of any type; n is more than the largest symbol.

    Returns
    -------
    torch.Tensor
        Shape (d,), of the type and on the device of the levels.
    """
    symbols = symbols.to(levels.device)
    out = levels.new_empty(len(symbols))
    for span in spans(out):
        torch.index_select(levels, 0, symbols[span].int(), out=out[span])
    return out


def _inflated(data: memoryview, size: int) -> bytes:
    """Decompress a plane of form 1; `FrameError` unless it has ``size`` bytes."""
    try:
        if zstandard.frame_content_size(data) != size:
            raise FrameError(f"compressed part does not hold {size} bytes")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
    except zstandard.ZstdError as error:
        raise FrameError(f"compressed part is broken: {error}") from error


def _unknown_form(header: wire.Header, form: int) -> FrameError:
    """Return the error of a form that is not known, or not any more."""
    what = "of an earlier version" if form in _EARLIER else "which is not known"
    return FrameError(f"{header.compressor} frame has a part of form {form}, {what}")


SCOPES = ("tensor", "sample")
"""Where elements are selected: among all, or in each sample apart."""


def rows(shape: tuple[int, ...], scope: str) -> int:
    """Return the number of rows of a tensor; elements are selected in each row."""
    return shape[0] if scope == "sample" and shape else 1


def check_kept(header: wire.Header, kept: int, scope: int) -> int:
    """Check the number of kept elements of a row; return the number of rows."""
    if scope >= len(SCOPES):
        raise FrameError(f"{header.compressor} frame has the unknown scope {scope}")
    number = rows(header.shape, SCOPES[scope])
    if not 1 <= kept <= header.elements // number:
        raise FrameError(
            f"{header.compressor} frame keeps {kept} of {header.elements // number} "
            "elements"
        )
    return number


def check_marked(header: wire.Header, found: int, kept: int) -> None:
    """Raise `FrameError` unless the number of marked elements is that of kept ones."""
    if found != kept:
        raise FrameError(
            f"{header.compressor} frame keeps {kept} elements but marks {found}"
        )


def split(
    header: wire.Header, payload: memoryview, *sizes: int
) -> tuple[memoryview, ...]:
    """Split parts of known size off the front of the payload; the rest is last."""
    if len(payload) < sum(sizes):
        raise FrameError(
            f"{header.compressor} frame has a payload of {len(payload)} bytes, "
            f"its header implies {sum(sizes)} and more"
        )
    parts, start = [], 0
    for size in sizes:
        parts.append(payload[start : start + size])
        start += size
    return (*parts, payload[start:])
