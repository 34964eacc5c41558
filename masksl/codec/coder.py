"""Entropy coding: an adaptive binary arithmetic coder for symbols and for masks.

A **plane** is a small symbol for every element of a tensor. A symbol s is encoded as
decisions: is it greater than 0, greater than 1, and so on, up to ``unary`` of them.
What is beyond follows as an escape. The probability of a decision is the mean of two,
each adapted to the bits that it met. The context of the first is the classes of the
four neighbours that are known already (left, above, above left, above right), that of
the second the channel and coarser classes of the left and the upper neighbour. No
tables are sent: the decoder adapts as the encoder did.

A **mask** is a bit for every element. The number of ones is sent; then every bit is
encoded by the share of ones among those that are left. An integer ``reference`` gives
the elements levels, and every level has its own number of ones.

``docs/coding.md`` describes both to the bit. The inner loops are compiled once by
Numba, which takes some seconds, and kept on disk; see
`masksl.codec.base.Compressor.warm_up`.
"""

import logging
import math
import time
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType

import numpy as np

from masksl.codec.bits import BLOCK
from masksl.codec.wire import FrameError

_log = logging.getLogger(__name__)

_UNARY = 12  # decisions of a symbol, before its escape
# Means of symbols: below, neighbours always tell something; above, unary is too slow.
_SMALL, _LARGE = 1.5, 10.0
_PART = 4096  # symbols that are encoded for comparison
_MORE = 1.05  # what neighbours save grows with what has been learned
# Least symbols of the neighbour classes from 1 on.
_SIDES = (1, 2, 3, 5, 9)  # left and above, first context
_CORNERS = (1, 2, 4)
_COARSE = (1, 2, 3, 6)  # left and above, second context
_FIRST, _SECOND = 6 * 6 * 4 * 4, 5 * 5  # number of contexts
_NOTHING = np.frombuffer(b"\0", np.uint8)[:0]  # of the type of received bytes


def encode_plane(symbols: np.ndarray, alphabet: int, shape: tuple[int, ...]) -> bytes:
    """Encode a plane.

    Parameters
    ----------
    symbols : numpy.ndarray
        uint8, shape (d,), row-major, all less than ``alphabet``.
    alphabet : int
        Number of different symbols, 1 to 256.
    shape : tuple[int, ...]
        Shape of the tensor, of d elements.

    Returns
    -------
    bytes
        The coded plane: a byte with the number of unary decisions, then the coder's
        bytes. `decode_plane` needs the alphabet and the shape again.
    """
    return _encoded(symbols, alphabet, shape, _unary(symbols, alphabet, shape))


def decode_plane(
    payload: memoryview, alphabet: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Decode a plane; the inverse of `encode_plane`.

    Parameters
    ----------
    payload : memoryview
        A coded plane, whole.
    alphabet : int
        As it was encoded with.
    shape : tuple[int, ...]
        Likewise.

    Returns
    -------
    numpy.ndarray
        uint8, shape (d,).

    Raises
    ------
    FrameError
        If the plane is at odds with itself. At most 4 bytes an element are allocated
        beside what is returned.
    """
    if not payload or payload[0] > min(_UNARY, alphabet - 1):
        raise FrameError(f"coded plane of {len(payload)} bytes has no valid header")
    data = _bytes(payload[1:])
    symbols = np.empty(math.prod(shape), np.uint8)
    arguments = _arguments(payload[0], alphabet, shape)
    count = loops().take_plane(symbols, *arguments, data)
    if count < 0 or int(symbols.max()) >= alphabet:
        raise FrameError(f"coded plane holds symbols beyond its {alphabet}")
    _check_end(count, data)
    return symbols


def encode_mask(mask: np.ndarray, levels: np.ndarray, ones: np.ndarray) -> bytes:
    """Encode a mask whose number of ones at every level the decoder knows.

    Parameters
    ----------
    mask : numpy.ndarray
        uint8, shape (d,): zeros and ones.
    levels : numpy.ndarray
        uint16, shape (d,): the level of each element; shape (0,) for one level.
    ones : numpy.ndarray
        int64, shape (levels,): the ones of each level.

    Returns
    -------
    bytes
        The coder's bytes.
    """

    def write(out: np.ndarray) -> tuple[int, int, int]:
        total = elements_of(levels, len(ones), len(mask))
        return loops().put_mask(mask, levels, total, ones.copy(), out)

    return _written(write, len(mask) // 16 + 64)


def decode_mask(
    payload: memoryview, levels: np.ndarray, ones: np.ndarray, count: int
) -> np.ndarray:
    """Decode a mask; the inverse of `encode_mask`.

    Parameters
    ----------
    payload : memoryview
        What it returned.
    levels, ones : numpy.ndarray
        As it was encoded with.
    count : int
        Number of elements.

    Returns
    -------
    numpy.ndarray
        uint8, shape (count,).

    Raises
    ------
    FrameError
        If there are more ones than elements, or bytes after the last element.
    """
    data = _bytes(payload)
    total = elements_of(levels, len(ones), count)
    if np.any(ones > total):
        level = int(np.argmax(ones > total))
        raise FrameError(
            f"mask declares {ones[level]} ones among {total[level]} elements"
        )
    mask = np.empty(count, np.uint8)
    read = loops().take_mask(mask, levels, total, ones.copy(), data)
    _check_end(read, data)
    return mask


def elements_of(levels: np.ndarray, number: int, count: int) -> np.ndarray:
    """Return the number of elements of every level, int64, shape (number,).

    Parameters
    ----------
    levels : numpy.ndarray
        uint16, shape (count,): the level of each element; shape (0,) for one level.
    number, count : int
        Number of levels, and of elements.
    """
    if not levels.size:
        return np.array([count])
    total = np.zeros(number, np.int64)
    for start in range(0, count, BLOCK):  # NumPy converts what it counts to int64
        total += np.bincount(levels[start : start + BLOCK], minlength=number)
    return total


def maps_of(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the number of a tensor's maps, their height and their width.

    A map is the last two dimensions. Two dimensions are one map, fewer are one row.
    """
    if len(shape) < 3:
        rows = shape[0] if len(shape) == 2 else 1
        return 1, rows, math.prod(shape) // rows
    return math.prod(shape[:-2]), shape[-2], shape[-1]


@lru_cache(maxsize=1)
def loops() -> ModuleType:
    """Import the compiled loops, and run each once with every type."""
    start = time.perf_counter()
    # pylint: disable-next=import-outside-toplevel
    from masksl.codec import kernels, kernels_dct

    symbols, bits = np.zeros(4, np.uint8), np.zeros(1, np.uint8)
    out, levels = np.zeros(2 * kernels.FULL, np.uint16), np.zeros(0, np.uint16)
    one = np.ones(1, np.int64)
    arguments = _arguments(1, 2, (4,))
    kernels.put_plane(symbols, *arguments, out)
    kernels.take_plane(symbols, *arguments, _NOTHING)
    kernels.put_mask(bits, levels, one.copy(), 0 * one, out)
    kernels.take_mask(bits, levels, one.copy(), 0 * one, _NOTHING)
    tables = np.zeros(1024, np.int64), np.zeros(1024), np.zeros(1024)
    for kind in (np.float32, np.float64):
        numbers = kind(1), kind(0), kind(255)
        kernels.quantize(np.zeros(1, kind), *numbers, tables[1], bits, *tables)
        kernels.round_at_random(
            np.zeros(4, kind), (1, 2, 2), 1.0, 1.0, tables[1], symbols
        )
        block, room = np.zeros(16, kind), np.zeros((16, kernels_dct.STRIP), kind)
        kernels_dct.analyse(block, 4, 4, block[:3], room, block.copy())
        zeros, counts = np.zeros(16, np.uint8), np.zeros(16, np.int64)
        lists = zeros, block, _NOTHING, counts
        kernels_dct.compose(*lists, 4, 4, block[:3], room, block.copy())
        blocks = 4, 4, block[:3], True, room
        kernels_dct.distance(block, zeros, block, *blocks, block)
    if not hasattr(kernels.put_plane, "stats"):
        _log.warning("entropy coding runs as plain Python, which is very slow")
    elif kernels.put_plane.stats.cache_misses:
        kept = kernels.put_plane.stats.cache_path is not None
        where = "once" if kept else "for this process alone: set NUMBA_CACHE_DIR"
        seconds = time.perf_counter() - start
        _log.warning("entropy coding was compiled in %.1f s, %s", seconds, where)
    return kernels


# --- planes ---------------------------------------------------------------------------


def _encoded(
    symbols: np.ndarray, alphabet: int, shape: tuple[int, ...], unary: int
) -> bytes:
    """Encode a plane with a number of unary decisions."""

    def write(out: np.ndarray) -> tuple[int, int, int]:
        arguments = _arguments(unary, alphabet, shape)
        return loops().put_plane(symbols, *arguments, out)

    return bytes([unary]) + _written(write, len(symbols) // 2 + 64)


def _unary(symbols: np.ndarray, alphabet: int, shape: tuple[int, ...]) -> int:
    """Return the number of unary decisions, 0 where neighbours tell little.

    Large symbols are encoded both ways in a part of the plane, to compare.
    """
    unary = min(_UNARY, alphabet - 1)
    if unary <= 1:
        return unary
    mean = symbols[:: max(1, len(symbols) // 4096)].mean()
    if len(shape) < 2 or mean > _LARGE:
        return 0
    if mean < _SMALL:
        return unary
    # A part is some whole maps or, of two dimensions, rows.
    unit = shape[-1:] if len(shape) == 2 else (1, *shape[-2:])
    size = math.prod(unit)
    part = -(-_PART // size) * size
    if len(symbols) < 4 * part:
        parts = [symbols]
    else:  # what the second half of the part takes, when the first has been learned
        parts = [symbols[: 2 * part], symbols[:part]]
    taken = []
    for choice in (unary, 0):
        whole, *learned = (
            len(_encoded(each, alphabet, (len(each) // size, *unit), choice))
            for each in parts
        )
        taken.append(whole - sum(learned))
    return unary if taken[0] <= _MORE * taken[1] else 0


def _maps(shape: tuple[int, ...], unary: int) -> tuple[int, int, int, int, int]:
    """Return batch, channels, height and width, and how far apart second contexts are.

    Channels share contexts where these would be more than half as many as elements.
    """
    maps, height, width = maps_of(shape)
    if len(shape) < 3:
        return 1, 1, height, width, 0
    apart = _SECOND * unary
    many = 2 * shape[-3] * apart > math.prod(shape)
    return maps // shape[-3], shape[-3], height, width, 0 if many else apart


@lru_cache(maxsize=64)
def _offsets(unary: int) -> np.ndarray:
    """Return what a symbol adds to contexts as a neighbour, int64, shape (6, 256)."""
    symbols = np.arange(256)
    sides = np.searchsorted(_SIDES, symbols, "right")
    corners = np.searchsorted(_CORNERS, symbols, "right")
    coarse = np.searchsorted(_COARSE, symbols, "right")
    added = 96 * sides, 16 * sides, 4 * corners, corners, 5 * coarse, coarse
    return np.stack(added) * unary


def _arguments(unary: int, alphabet: int, shape: tuple[int, ...]) -> tuple:
    """Return the arguments of the loops over planes, with new models."""
    # pylint: disable-next=import-outside-toplevel
    from masksl.codec import kernels

    maps = _maps(shape, unary)
    escapes = unary < alphabet - 1
    models = (
        np.zeros(_FIRST * unary, np.uint32),
        np.zeros((maps[1] if maps[4] else 1) * _SECOND * unary, np.uint32),
        np.full(unary, kernels.EVEN, np.int64),
        np.full(kernels.MAGNITUDES * kernels.ESCAPE * escapes, kernels.EVEN, np.int64),
        kernels.RATES,
        np.zeros(maps[3] + 2, np.uint8),
    )
    return maps, unary, escapes, _offsets(unary), models


# --- bytes of the coder ---------------------------------------------------------------


def _written(write: Callable[[np.ndarray], tuple[int, int, int]], room: int) -> bytes:
    """Return what a loop writes, as bytes without zeros at the end.

    Parameters
    ----------
    write : Callable[[numpy.ndarray], tuple[int, int, int]]
        Writes words; returns the low end and the size of the last interval and the
        number of words, -1 if there are too few.
    room : int
        Number of words that are likely to be enough.
    """
    out = np.empty(room, np.uint16)
    low, size, count = map(int, write(out))
    return _written(write, 4 * room) if count < 0 else _finished(out, count, low, size)


def _finished(out: np.ndarray, count: int, low: int, size: int) -> bytes:
    """Return the bytes of words and of the shortest number in the last interval."""
    for bits in range(48, -1, -1):
        last = -(-low >> bits) << bits
        if last < low + size:
            break
    head = out[:count].astype(">u2").tobytes()
    number = (int.from_bytes(head, "big") << 48) + last
    return number.to_bytes(len(head) + 6, "big").rstrip(b"\0")


def _bytes(payload: memoryview) -> np.ndarray:
    """Return the coder's bytes, not copied; `FrameError` if they end in zero."""
    if payload and not payload[-1]:
        raise FrameError("coded part ends in a byte of zero, which no coder writes")
    return np.frombuffer(payload.toreadonly(), np.uint8) if payload else _NOTHING


def _check_end(count: int, data: np.ndarray) -> None:
    """Raise `FrameError` unless all words have been read."""
    if 2 * count < len(data):
        raise FrameError("coded part goes on after its last symbol")
