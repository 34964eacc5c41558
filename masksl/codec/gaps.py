"""Positions by the gaps between them, entropy-coded."""

import struct
from collections.abc import Iterator

import numpy as np
import torch

from masksl.codec.bits import BLOCK, pack_bits, packed_size, part_of, unpack_bits
from masksl.codec.coder import decode_plane, encode_plane
from masksl.codec.wire import FrameError, to_tensor

_GAPS = struct.Struct("<BHI")


def encode_gaps(positions: np.ndarray, count: int) -> bytes | None:
    """Code ascending positions by the gaps between them.

    The low bits of a gap, as good as evenly distributed, are packed; what is above has
    at most 256 values and is entropy-coded.

    Parameters
    ----------
    positions : numpy.ndarray
        int64, shape (k,), ascending, each less than ``count``.
    count : int
        Number of elements.

    Returns
    -------
    bytes | None
        None where gaps are too wide for it.
    """
    gaps = np.diff(positions, prepend=-1) - 1
    low = min(16, max(0, int(count / len(positions)).bit_length() - 3))
    low = max(low, int(gaps.max()).bit_length() - 8)
    if low > 16:
        return None
    high = (gaps >> low).astype(np.uint8)
    alphabet = int(high.max()) + 1
    coded = encode_plane(high, alphabet, (len(high),))
    rest = b""
    if low:
        bits = gaps & (2**low - 1)
        dtype = torch.uint8 if low <= 8 else torch.int32
        rest = pack_bits(torch.from_numpy(bits).to(dtype), low).numpy().tobytes()
    return _GAPS.pack(low, alphabet, len(coded)) + coded + rest


def gap_blocks(payload: memoryview, kept: int, count: int) -> Iterator[np.ndarray]:
    """Decode positions; the inverse of `encode_gaps`.

    Parameters
    ----------
    payload : memoryview
        What it returned.
    kept : int
        Number of positions.
    count : int
        Number of elements.

    Returns
    -------
    Iterator[numpy.ndarray]
        Blocks of positions, int64, ascending. Beside one block, a byte for each
        position and its packed lower bits are allocated.

    Raises
    ------
    FrameError
        If the positions are not as many, or not within the elements: before it
        returns.
    """
    if len(payload) < _GAPS.size:
        raise FrameError(f"coded gaps of {len(payload)} bytes have no header")
    low, alphabet, length = _GAPS.unpack_from(payload)
    rest = packed_size(kept, low) if 0 < low <= 16 else 0
    sound = low <= 16 and 1 <= alphabet <= 256
    if not sound or len(payload) != _GAPS.size + length + rest:
        raise FrameError(f"coded gaps with {low} low bits, {len(payload)} bytes")
    high = decode_plane(payload[_GAPS.size :][:length], alphabet, (kept,))
    packed = to_tensor(payload[_GAPS.size + length :], torch.uint8, "cpu")
    last = -1
    for block in _positions(high, packed, low):
        last = int(block[-1])
    if last >= count:
        raise FrameError(f"coded gaps reach {last} of {count} elements")
    return _positions(high, packed, low)


def _positions(
    high: np.ndarray, packed: torch.Tensor, low: int
) -> Iterator[np.ndarray]:
    """Yield blocks of positions by the upper and the packed lower bits of gaps."""
    last, kept = -1, len(high)
    for start in range(0, kept, BLOCK):
        span = slice(start, min(start + BLOCK, kept))
        gaps = high[span].astype(np.int64) << low
        if low:
            part = part_of(packed, kept, low, span)
            gaps |= unpack_bits(part, len(gaps), low).numpy()
        gaps += 1
        block = last + np.cumsum(gaps, out=gaps)
        last = int(block[-1])
        yield block
