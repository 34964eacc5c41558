"""Bit packing: symbols of 1 to 16 bits, and checks of packed values."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from masksl.codec import wire

# All bits of the exponent: set in infinities and NaN alone.
_EXPONENTS: dict[torch.dtype, np.uint16 | np.uint32 | np.uint64] = {
    torch.float16: np.uint16(0x7C00),
    torch.bfloat16: np.uint16(0x7F80),
    torch.float32: np.uint32(0x7F80_0000),
    torch.float64: np.uint64(0x7FF0_0000_0000_0000),
}

# Symbols of so many bits fill a byte; those of one byte, a byte each, are a word.
_WHOLE = {1: torch.int64, 2: torch.int32, 4: torch.int16}
BLOCK = 2**17  # elements that are worked on together, to save memory
_CHUNK = 2**17  # symbols looked at together: 128 KiB, a whole number of bytes packed


def packed_size(count: int, bits: int) -> int:
    """Return the size in bytes of ``count`` symbols of ``bits`` bits (1 to 16)."""
    if bits <= 8:
        return (count * bits + 7) // 8
    return count + packed_size(count, bits - 8)


def pack_bits(symbols: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack symbols densely, the first in the lowest bits.

    Eight neighbours become ``bits`` bytes; the last byte is filled up with zeros.
    Symbols of more than eight bits are encoded as a plane of low bytes, followed by a
    plane of the higher bits.

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


def part_of(packed: torch.Tensor, count: int, bits: int, span: slice) -> torch.Tensor:
    """Return packed symbols of a span, packed.

    Parameters
    ----------
    packed : torch.Tensor
        uint8, shape (packed_size(count, bits),).
    count : int
        Number of symbols.
    bits : int
        1 to 16.
    span : slice
        The first symbol, a multiple of eight, and the one after the last.

    Returns
    -------
    torch.Tensor
        uint8: a view for up to eight bits.
    """
    if bits > 8:
        high = part_of(packed[count:], count, bits - 8, span)
        return torch.cat([packed[span], high])
    return packed[span.start * bits // 8 : (span.stop * bits + 7) // 8]


def spans(flat: torch.Tensor) -> Iterator[slice]:
    """Yield the spans of elements that are worked on together.

    On the CPU they are blocks, to save memory; on a GPU, where each would be waited
    for, all elements are one.
    """
    step = BLOCK if flat.device.type == "cpu" else max(1, len(flat))
    for start in range(0, len(flat), step):
        yield slice(start, min(start + step, len(flat)))


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
    out = levels.new_empty(count)
    for span in spans(out):
        part = out[span]
        symbols = unpack_bits(part_of(packed, count, bits, span), len(part), bits)
        torch.index_select(levels, 0, symbols.to(torch.int32), out=part)
    return out


def count_symbols(payload: memoryview, count: int, bits: int, symbol: int) -> int:
    """Count a symbol among packed ones, in small pieces.

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
        Number of occurrences; less than 1 MiB is allocated.
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
        symbols = unpack_bits(wire.to_tensor(part, torch.uint8, "cpu"), size, bits)
        found += int((symbols == symbol).sum())
    return found


def all_finite(payload: memoryview, dtype: torch.dtype) -> bool:
    """Return whether all values of a payload are finite, in small pieces."""
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
        A read-only view that begins with the last element of the previous piece.
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
    """Return the 8 / bits symbols of every packed byte, a byte each, as one word."""
    count = 8 // bits
    packed = np.arange(256)[:, None]
    symbols = packed >> (bits * np.arange(count)) & (2**bits - 1)
    return symbols.astype(np.uint8).view(f"<u{count}").ravel()


def _fields(used: int, width: int) -> int:
    """Return the low ``used`` of every ``width`` of 64 bits."""
    return sum(((1 << used) - 1) << start for start in range(0, 64, width))
