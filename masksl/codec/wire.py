"""The frame: header, checksum, bit packing, and the checks on what comes in.

A frame is the encoded form of one tensor. All numbers are little-endian; the layout
(version 1) is

======  ====  ==========================================================
offset  size  field
======  ====  ==========================================================
0       4     magic, ``MSKL``
4       1     version, 1
5       1     dtype: 1 float16, 2 bfloat16, 3 float32, 4 float64
6       1     number of dimensions n
7       1     length p of the compressor's parameters
8       8     name of the compressor, ASCII, filled up with NUL bytes
16      4     CRC-32 of the whole frame without these four bytes
20      8     length of the payload
28      4 n   shape, one unsigned 32-bit number a dimension
28+4n   p     parameters of the compressor
28+4n+p       payload
======  ====  ==========================================================

What parameters and payload hold is up to the compressor; ``docs/frame.md`` lists it.
"""

import math
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError(
        "masksl.codec.wire packs symbols in place: little-endian hosts only"
    )

MAGIC = b"MSKL"
VERSION = 1
DTYPES = {1: torch.float16, 2: torch.bfloat16, 3: torch.float32, 4: torch.float64}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_ELEMENTS = 2**28

# All bits of the exponent: set in infinities and NaN alone.
_EXPONENTS: dict[torch.dtype, np.uint16 | np.uint32 | np.uint64] = {
    torch.float16: np.uint16(0x7C00),
    torch.bfloat16: np.uint16(0x7F80),
    torch.float32: np.uint32(0x7F80_0000),
    torch.float64: np.uint64(0x7FF0_0000_0000_0000),
}

Buffer = bytes | bytearray | memoryview
Part: TypeAlias = torch.Tensor | bytes

_FIXED = struct.Struct("<4sBBBB8sIQ")
_CHECKSUM = slice(16, 20)
# Symbols of so many bits fill a byte; those of one byte, a byte each, are a word.
_WHOLE = {1: torch.int64, 2: torch.int32, 4: torch.int16}
_CHUNK = 2**17  # symbols looked at together: 128 KiB, a whole number of bytes packed


class FrameError(ValueError):
    """A frame that is cut short, altered, foreign or at odds with itself."""


@dataclass(frozen=True)
class Header:
    """What a frame says of itself.

    Parameters
    ----------
    compressor : str
        Registered name, one to eight ASCII characters.
    dtype : torch.dtype
        Floating type of the tensor that was encoded.
    shape : tuple[int, ...]
        Its shape; no dimension is zero.
    params : bytes
        The compressor's own fields, at most 255 bytes.
    """

    compressor: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    params: bytes

    @property
    def elements(self) -> int:
        """Number of elements, 1 for a scalar."""
        return math.prod(self.shape)

    def unpack_params(self, layout: struct.Struct) -> tuple:
        """Return the parameters by ``layout``; `FrameError` where the length is off."""
        if len(self.params) != layout.size:
            raise FrameError(
                f"{self.compressor} frame has {len(self.params)} bytes of parameters, "
                f"expected {layout.size}"
            )
        return layout.unpack(self.params)


def assemble(header: Header, parts: Sequence[Part]) -> bytes:
    """Return the frame of a header and its payload.

    Parameters
    ----------
    header : Header
        What the frame says of itself.
    parts : Sequence[torch.Tensor | bytes]
        Payload in order: bytes, and one-dimensional tensors on any device.

    Returns
    -------
    bytes
        The frame, copied together once.
    """
    payload = to_host(parts)
    size = sum(part.nbytes for part in payload)
    fields = bytearray(
        _FIXED.pack(
            MAGIC,
            VERSION,
            DTYPE_CODES[header.dtype],
            len(header.shape),
            len(header.params),
            header.compressor.encode("ascii"),
            0,
            size,
        )
    )
    fields += struct.pack(f"<{len(header.shape)}I", *header.shape) + header.params
    checksum = _checksum(memoryview(fields))
    for part in payload:
        checksum = zlib.crc32(part, checksum)
    fields[_CHECKSUM] = struct.pack("<I", checksum)
    return b"".join([fields, *payload])


def parse(
    frame: Buffer, *, max_elements: int = MAX_ELEMENTS
) -> tuple[Header, memoryview]:
    """Take a frame apart without copying it.

    Parameters
    ----------
    frame : bytes-like
        One whole frame.
    max_elements : int
        Frames that declare more elements are refused.

    Returns
    -------
    tuple[Header, memoryview]
        The header and a view of the payload.

    Raises
    ------
    FrameError
        If anything is wrong with the frame; nothing has been allocated by then.
    """
    view = memoryview(frame).cast("B")
    if len(view) < _FIXED.size:
        raise FrameError(
            f"frame of {len(view)} bytes is shorter than a header ({_FIXED.size})"
        )
    magic, version, dtype, ndim, params, name, checksum, size = _FIXED.unpack_from(view)
    if magic != MAGIC:
        raise FrameError(f"not a frame: it begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise FrameError(f"frame of version {version}, this is version {VERSION}")
    start = _FIXED.size + 4 * ndim + params
    if len(view) != start + size:
        raise FrameError(f"frame of {len(view)} bytes declares {start + size}")
    if zlib.crc32(view[start:], _checksum(view[:start])) != checksum:
        raise FrameError("checksum does not match: the frame has been altered")
    if dtype not in DTYPES:
        raise FrameError(f"frame declares the unknown dtype code {dtype}")
    shape = struct.unpack_from(f"<{ndim}I", view, _FIXED.size)
    elements = math.prod(shape)
    if not 0 < elements <= max_elements:
        raise FrameError(f"frame declares {elements} elements, not 1 to {max_elements}")
    text = bytes(name).rstrip(b"\0")
    if not text.isascii():
        raise FrameError(f"frame names the compressor {text!r}, not an ASCII name")
    header = Header(
        text.decode("ascii"), DTYPES[dtype], shape, bytes(view[start - params : start])
    )
    return header, view[start:]


def declared_elements(frame: Buffer) -> int:
    """Return the elements that a frame declares, its checksum unchecked."""
    view = memoryview(frame).cast("B")
    if len(view) < _FIXED.size or len(view) < _FIXED.size + 4 * view[6]:
        raise FrameError(f"frame of {len(view)} bytes is shorter than its header")
    return math.prod(struct.unpack_from(f"<{view[6]}I", view, _FIXED.size))


def check_payload(header: Header, payload: memoryview, expected: int) -> None:
    """Raise `FrameError` unless the payload is ``expected`` bytes long."""
    if len(payload) != expected:
        raise FrameError(
            f"{header.compressor} frame has a payload of {len(payload)} bytes, "
            f"its header implies {expected}"
        )


def flatten(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements in row-major order, shape (d,), with stride 1.

    A tensor of one element counts as contiguous whatever its stride, and could then not
    be viewed as bytes.
    """
    flat = tensor.detach().contiguous().view(-1)
    if flat.stride(0) != 1:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat


def to_host(parts: Sequence[Part]) -> list[memoryview]:
    """Return the bytes of parts of a payload.

    What is on a GPU is joined there and crosses together: one wait.
    """
    flat = [
        flatten(part).view(torch.uint8) if isinstance(part, torch.Tensor) else part
        for part in parts
    ]
    away = {
        i: part
        for i, part in enumerate(flat)
        if isinstance(part, torch.Tensor) and part.device.type != "cpu"
    }
    if away:
        joined = torch.cat(list(away.values())).cpu()
        here = joined.split([part.numel() for part in away.values()])
        for i, part in zip(away, here, strict=True):
            flat[i] = part
    return [
        memoryview(part if isinstance(part, bytes) else part.numpy()) for part in flat
    ]


def to_tensor(
    payload: memoryview, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """Copy payload bytes into a tensor.

    Parameters
    ----------
    payload : memoryview
        Whole number of elements of ``dtype``.
    dtype : torch.dtype
        Type of the elements.
    device : torch.device | str
        Where the tensor goes.

    Returns
    -------
    torch.Tensor
        One-dimensional, owning its memory. A GPU may still be copying it; what is done
        with it there waits, the host need not.
    """
    if not payload:
        return torch.empty(0, dtype=dtype, device=device)
    pinned = torch.device(device).type == "cuda"
    host = torch.empty(len(payload), dtype=torch.uint8, pin_memory=pinned)
    np.copyto(host.numpy(), np.frombuffer(payload, dtype=np.uint8))
    return host.to(device, non_blocking=True).view(dtype)


def to_device(host: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return a tensor of the host on a device, without waiting for a GPU."""
    if torch.device(device).type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that ``count`` symbols of ``bits`` bits take (1 to 16)."""
    if bits <= 8:
        return (count * bits + 7) // 8
    return count + packed_size(count, bits - 8)


def pack_bits(symbols: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack symbols densely, the first in the lowest bits.

    Eight neighbours become ``bits`` bytes; the last byte is filled up with zeros.
    Symbols of more than eight bits travel as a plane of low bytes and, after it, a
    plane of what is above.

    Parameters
    ----------
    symbols : torch.Tensor
        Shape (n,), uint8 for up to eight bits, else int32; values below 2**bits.
    bits : int
        1 to 16.

    Returns
    -------
    torch.Tensor
        uint8, shape (packed_size(n, bits),), on the device of ``symbols``.
    """
    if bits > 8:
        low = (symbols & 0xFF).to(torch.uint8)
        high = (symbols >> 8).to(torch.uint8)
        return torch.cat([low, pack_bits(high, bits - 8)])
    if bits == 8:
        return symbols
    count = symbols.numel()
    if count % 8:
        symbols = torch.nn.functional.pad(symbols, (0, -count % 8))
    if bits in _WHOLE:  # a word of as many symbols as fill a byte ends up in that byte
        words = symbols.view(_WHOLE[bits])
        width = 8
        while width < 64 // bits:
            words = words | words >> (width - bits * width // 8)
            width *= 2
        return words.to(torch.uint8)[: packed_size(count, bits)]
    words = symbols.view(torch.int64)
    for width in (8, 16, 32):  # bits used of each `width`; of each pair, side by side
        used = bits * width // 8
        low = _fields(used, 2 * width)
        words = words & low | words >> (width - used) & low << used
    packed = words.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)
    return packed[: packed_size(count, bits)]


def unpack_bits(packed: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """Undo `pack_bits`.

    Parameters
    ----------
    packed : torch.Tensor
        uint8, shape (packed_size(count, bits),).
    count : int
        Number of symbols.
    bits : int
        1 to 16.

    Returns
    -------
    torch.Tensor
        Shape (count,), uint8 for up to eight bits, else int32.
    """
    if bits > 8:
        high = unpack_bits(packed[count:], count, bits - 8).to(torch.int32)
        return high << 8 | packed[:count]
    if bits == 8:
        return packed
    if bits in _WHOLE and packed.device.type == "cpu":
        spread = _spread_table(bits)[packed.numpy()]
        return torch.from_numpy(spread.view(np.uint8))[:count]
    groups = (count + 7) // 8
    octets = packed.new_zeros((groups, 8))
    whole = packed.numel() // bits
    octets[:whole, :bits] = packed[: whole * bits].view(whole, bits)
    if whole < groups:
        octets[whole, : packed.numel() - whole * bits] = packed[whole * bits :]
    words = octets.view(torch.int64).view(-1)
    for width in (32, 16, 8):
        used = bits * width // 8
        low = _fields(used, 2 * width)
        words = words & low | words << (width - used) & low << width
    return words.view(torch.uint8)[:count]


def look_up(
    packed: torch.Tensor, levels: torch.Tensor, count: int, bits: int
) -> torch.Tensor:
    """Return the level of every packed symbol.

    Parameters
    ----------
    packed : torch.Tensor
        uint8, shape (packed_size(count, bits),).
    levels : torch.Tensor
        Shape (2**bits,), of any type, on the device of ``packed``.
    count : int
        Number of symbols.
    bits : int
        1 to 16.

    Returns
    -------
    torch.Tensor
        Shape (count,), of the type of ``levels``.
    """
    if bits in _WHOLE and packed.device.type == "cpu":
        # All levels of a byte at once: a table of 256 entries, copied from whole.
        each = _spread_table(bits).view(np.uint8).reshape(256, 8 // bits)
        entries = levels.numpy()[each]
        whole = np.dtype((np.void, entries.strides[0]))
        table = entries.view(whole).ravel()
        found = np.take(table, packed.numpy()).view(entries.dtype)
        return torch.from_numpy(found)[:count]
    symbols = unpack_bits(packed, count, bits)
    return levels.index_select(0, symbols.to(torch.int32))


def count_symbols(payload: memoryview, count: int, bits: int, symbol: int) -> int:
    """Count a symbol among packed ones, a little at a time.

    Parameters
    ----------
    payload : memoryview
        ``packed_size(count, bits)`` bytes.
    count : int
        Number of symbols packed.
    bits : int
        1 to 8.
    symbol : int
        The symbol to count.

    Returns
    -------
    int
        How often it occurs; under 1 MiB is allocated.
    """
    found = done = 0
    if bits in (1, 2, 4, 8) and symbol == 2**bits - 1:  # all bits of a field are one
        done = count * bits // 64 * 64 // bits
        for words in _pieces(payload[: done * bits // 8]):
            ones = words.copy()
            for shift in (1, 2, 4)[: bits.bit_length() - 1]:
                ones &= ones >> np.uint64(shift)
            ones &= np.uint64(_fields(1, bits))
            found += int(np.bitwise_count(ones).sum())
    for start in range(done, count, _CHUNK):
        size = min(_CHUNK, count - start)
        part = payload[start * bits // 8 :][: packed_size(size, bits)]
        symbols = unpack_bits(to_tensor(part, torch.uint8, "cpu"), size, bits)
        found += int((symbols == symbol).sum())
    return found


def all_finite(payload: memoryview, dtype: torch.dtype) -> bool:
    """Return whether all values of a payload are finite, a little at a time."""
    exponent = _EXPONENTS[dtype]
    return all(
        bool(((part & exponent) != exponent).all())
        for part in chunks(payload, exponent.dtype.str)
    )


def chunks(payload: memoryview, dtype: str) -> Iterator[np.ndarray]:
    """Yield the payload in pieces of at most 128 KiB, each overlapping by one element.

    Parameters
    ----------
    payload : memoryview
        Whole number of elements.
    dtype : str
        NumPy type of the elements.

    Yields
    ------
    numpy.ndarray
        A read-only view; it begins with the last element of the piece before.
    """
    array = np.frombuffer(payload, dtype=dtype)
    step = _CHUNK // array.itemsize
    for start in range(0, len(array), step):
        yield array[max(start - 1, 0) : start + step]


def _pieces(payload: memoryview) -> Iterator[np.ndarray]:
    """Yield the payload as 64-bit words, 128 KiB at a time."""
    words = np.frombuffer(payload, "<u8") if payload else np.empty(0, np.uint64)
    for start in range(0, len(words), _CHUNK // 8):
        yield words[start : start + _CHUNK // 8]


@lru_cache(maxsize=4)
def _spread_table(bits: int) -> np.ndarray:
    """Return for every packed byte its 8 / bits symbols, a byte each, as one word."""
    count = 8 // bits
    packed = np.arange(256)[:, None]
    symbols = packed >> (bits * np.arange(count)) & (2**bits - 1)
    return symbols.astype(np.uint8).view(f"<u{count}").ravel()


def _checksum(fields: memoryview) -> int:
    """Return the checksum of a header, which leaves out the checksum itself."""
    before = zlib.crc32(fields[: _CHECKSUM.start])
    return zlib.crc32(fields[_CHECKSUM.stop :], before)


def _fields(used: int, width: int) -> int:
    """Return the low ``used`` of every ``width`` of 64 bits."""
    return sum(((1 << used) - 1) << start for start in range(0, 64, width))
