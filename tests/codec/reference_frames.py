"""A decoder of frames and frame-sets in plain NumPy, from docs/frame.md alone.

It shares no code with the package and does not check what it reads. Coded parts are
decoded by `tests.codec.reference_decoder`. float32 stands for bfloat16, which NumPy
does not have: its elements are the same numbers.
"""

import math
import struct
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import zstandard

from tests.codec.reference_decoder import (
    bits_of,
    coded_mask,
    ec_symbols,
    frame_parts,
    gaps,
    plane,
)

BFLOAT16, FLOAT64 = 2, 4
TYPES = {1: "<f2", 3: "<f4", 4: "<f8", 5: "?", 6: "u1", 7: "i1"}
TYPES |= {8: "<u2", 9: "<i2", 10: "<u4", 11: "<i4", 12: "<u8", 13: "<i8"}
WIDTHS = {1: 2, 2: 2, 3: 4, 4: 8, 5: 1, 6: 1, 7: 1, 8: 2, 9: 2, 10: 4, 11: 4}
WIDTHS |= {12: 8, 13: 8}
Floats = np.ndarray


def frame(data: bytes, reference: Sequence[int] = ()) -> Floats:
    """Return the tensor of a frame."""
    name, dtype, shape, params, payload = frame_parts(data)
    return elements(name, dtype, shape, params, payload, reference).reshape(shape)


def elements(
    name: str,
    dtype: int,
    shape: tuple[int, ...],
    params: bytes,
    payload: bytes,
    reference: Sequence[int] = (),
) -> Floats:
    """Return the elements of a tensor by its fields."""
    if name == "none":
        return to_type(numbers(payload, params[0]), dtype)
    if name in ("qu", "qq"):
        bits, form, first, second = struct.unpack("<BBdd", params)
        symbols = read_plane(payload, bits, form, shape)
        if name == "qu":
            share = np.arange(2**bits) / (2**bits - 1)
            levels = first * (1 - share) + second * share
        else:
            levels = normal_levels(bits, first) * second
        return to_type(work(levels, dtype)[symbols], dtype)
    if name == "fp":
        return small_floats(dtype, shape, params, payload)
    if name in ("sp", "rt"):
        kept, scope, code, form = struct.unpack("<QBBB", params)
        kept *= rows_of(shape, scope)
        values, rest = payload[: kept * WIDTHS[code]], payload[kept * WIDTHS[code] :]
        found = np.zeros(math.prod(shape), to_type(np.zeros(1), dtype).dtype)
        found[positions(rest, kept, form, shape)] = to_type(
            numbers(values, code), dtype
        )
        return found
    if name == "spsign":
        return signs(dtype, shape, params, payload)
    if name == "sign":
        form, magnitude = struct.unpack("<Bd", params)
        symbols = read_plane(payload, 1, form, shape)
        return to_type(work(np.array([magnitude, -magnitude]), dtype)[symbols], dtype)
    if name == "qsgd":
        return shares(dtype, shape, params, payload)
    if name == "drive":
        return rotated(dtype, shape, params, payload)
    if name == "ms":
        return masked(dtype, shape, params, payload)
    if name == "ec":
        return quantised(dtype, shape, params, payload)
    form, _ = struct.unpack("<BI", params)
    if form == 0:
        return np.array(bits_of(payload, 1, math.prod(shape)), bool)
    levels = list(reference) if form == 2 else [0] * math.prod(shape)
    return np.array(coded_mask(payload, levels), bool)


def signs(dtype: int, shape: tuple[int, ...], params: bytes, payload: bytes) -> Floats:
    """Return the elements of `spsign`."""
    kept, number, picture, form = struct.unpack("<QBBB", params)
    code = FLOAT64 if dtype == FLOAT64 else 3
    size, bits = number * WIDTHS[code], {1: 1, 2: 2, 4: 3}[number]
    magnitudes = to_type(numbers(payload[:size], code), dtype)
    length = -(-kept * bits // 8)
    symbols = np.array(bits_of(payload[size : size + length], bits, kept))
    if picture:
        channels = 1 if math.isqrt(shape[1]) ** 2 == shape[1] else 3
        side = math.isqrt(shape[1] // channels)
        shape = shape[0], channels, side, side
    values = magnitudes[symbols // 2]
    found = np.zeros(math.prod(shape), magnitudes.dtype)
    chosen = positions(payload[size + length :], kept, form, shape)
    found[chosen] = np.where(symbols % 2, -values, values)
    return found


def shares(dtype: int, shape: tuple[int, ...], params: bytes, payload: bytes) -> Floats:
    """Return the elements of `qsgd`."""
    levels, form, norm = struct.unpack("<BBd", params)
    symbols = read_plane(payload, (2 * levels).bit_length(), form, shape)
    values = (symbols + 1) // 2 / levels * norm
    most = largest_of(dtype)
    values = np.minimum(values, most) * np.where(symbols % 2 == 1, 1, -1)
    return to_type(work(values, dtype) + 0, dtype)


def rotated(
    dtype: int, shape: tuple[int, ...], params: bytes, payload: bytes
) -> Floats:
    """Return the elements of `drive`, block by block, by a Hadamard matrix."""
    log, seed = struct.unpack("<BQ", params)
    count, size, most = math.prod(shape), 2**log, largest_of(dtype)
    blocks, width = -(-count // size), 8 if dtype == FLOAT64 else 4
    scales = np.frombuffer(payload[: blocks * width], f"<f{width}").astype(float)
    found, place = [], blocks * width
    for number in range(blocks):
        start = number * size
        own = min(size, count - start)
        wide = size if own == size else max(8, 2 ** math.ceil(math.log2(own)))
        bits = np.array(bits_of(payload[place : place + wide // 8], 1, wide))
        place += wide // 8
        matrix = np.array([[1.0]])
        while len(matrix) < wide:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        turned = matrix @ (1 - 2.0 * bits) * (1 / math.sqrt(wide)) * scales[number]
        drawn = philox_bits(seed, start, wide)
        found.append((turned * (1 - 2.0 * drawn))[:own])
    return to_type(work(np.clip(np.concatenate(found), -most, most), dtype), dtype)


def philox_bits(seed: int, start: int, count: int) -> np.ndarray:
    """Return bits of stream 0 of Philox 4x32-10 (docs/coding.md), one at a time."""
    found = []
    for place in range(start, start + count):
        word, bit = divmod(place, 32)
        counter, key = [word // 4, 0, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(10):
            left, right = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
            counter = [
                (right >> 32) ^ counter[1] ^ key[0],
                right & 0xFFFFFFFF,
                (left >> 32) ^ counter[3] ^ key[1],
                left & 0xFFFFFFFF,
            ]
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        found.append(counter[word % 4] >> bit & 1)
    return np.array(found)


def largest_of(dtype: int) -> float:
    """Return the largest number of a type."""
    if dtype == BFLOAT16:
        return float.fromhex("0x1.fep127")
    return float(np.finfo(TYPES[dtype]).max)


def numbers(data: bytes, code: int) -> Floats:
    """Return numbers of a type; bfloat16 is the upper half of float32."""
    if code == BFLOAT16:
        upper = np.frombuffer(data, "<u2").astype(np.uint32)
        return (upper << 16).view(np.float32)
    return np.frombuffer(data, TYPES[code])


def to_type(values: Floats, code: int) -> Floats:
    """Round numbers to a type."""
    if code != BFLOAT16:
        return values.astype(TYPES[code])
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    odd = bits >> np.uint64(16) & np.uint64(1)
    upper = (bits + np.uint64(0x7FFF) + odd) >> np.uint64(16) << np.uint64(16)
    return upper.astype(np.uint32).view(np.float32)


def work(values: Floats, code: int) -> Floats:
    """Round numbers to the type of the computation."""
    return values.astype(np.float64 if code == FLOAT64 else np.float32)


def read_plane(data: bytes, bits: int, form: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return the symbols of a plane."""
    if form == 3:
        return np.array(plane(data, 2**bits, shape))
    if form == 1:
        data = zstandard.ZstdDecompressor().decompress(data)
    return np.array(bits_of(data, bits, math.prod(shape)))


def normal_levels(bits: int, offset: float) -> Floats:
    """Return the levels of `qq` before they are scaled."""
    half, inverse = 2 ** (bits - 1), NormalDist().inv_cdf
    above = [inverse(offset + (0.5 - offset) * j / half) for j in range(half)]
    below = [
        -inverse(offset + (0.5 - offset) * j / (half - 1)) for j in range(half - 1)
    ]
    return np.array([*below, 0, *above[::-1]]) / inverse(offset)


def small_floats(
    dtype: int, shape: tuple[int, ...], params: bytes, payload: bytes
) -> Floats:
    """Return the elements of `fp`."""
    e, m, signed, form, scale = struct.unpack("<BBBBd", params)
    signs, rest = sign_bits(payload, shape, signed)
    code = np.arange(2 ** (e + m))
    exponent, fraction = code >> m, (code & 2**m - 1) / 2**m
    bias = 2 ** (e - 1) - 1
    normal = (1 + fraction) * 2.0 ** (exponent - bias)
    levels = np.where(exponent > 0, normal, fraction * 2.0 ** (1 - bias)) * scale
    largest = {1: 65504.0, 2: 3.3895313892515355e38, 3: float(np.finfo("f4").max)}
    levels = np.minimum(levels, largest.get(dtype, np.finfo("f8").max))
    found = work(levels, dtype)[read_plane(rest, e + m, form, shape)]
    return to_type(np.where(signs, -found, found), dtype)


def masked(dtype: int, shape: tuple[int, ...], params: bytes, payload: bytes) -> Floats:
    """Return the elements of `ms`."""
    kept, bits, signed, scope, code, form = struct.unpack("<QBBBBB", params)
    rows, last = rows_of(shape, scope), 2**bits - 1
    size = rows * kept * WIDTHS[code]
    values = numbers(payload[:size], code)
    signs, rest = sign_bits(payload[size:], shape, signed)
    symbols = read_plane(rest, bits, form, shape)
    smallest = work(np.abs(values), dtype).reshape(rows, kept).min(1, keepdims=True)
    level = smallest / work(np.array(last), dtype)
    found = (work(symbols, dtype).reshape(rows, -1) * level).reshape(-1)
    found = to_type(np.where(signs, -found, found), dtype)
    found[symbols == last] = to_type(values, dtype)
    return found


def quantised(
    dtype: int, shape: tuple[int, ...], params: bytes, payload: bytes
) -> Floats:
    """Return the elements of `ec`."""
    form, alphabet, signed, exact, length, negative = struct.unpack("<BHBIIQ", params)
    number = min(alphabet, 255) - signed
    size = number * (8 if dtype == FLOAT64 else 4)
    centroids = np.zeros(256, np.float64 if dtype == FLOAT64 else np.float32)
    centroids[signed : signed + number] = numbers(
        payload[:size], FLOAT64 if dtype == FLOAT64 else 3
    )
    values = numbers(payload[size:][: exact * WIDTHS[dtype]], dtype)
    rest = payload[size + exact * WIDTHS[dtype] :]
    symbols = np.array(ec_symbols(rest[:length], alphabet, shape, form))
    found = to_type(centroids, dtype)[symbols]
    if signed:
        turned, some = np.zeros(len(symbols), bool), symbols > 0
        if form == 6:
            some[: len(some) // 16] = False
        turned[some] = bits_of(rest[length:], 1, negative)
        found = np.where(turned, -found, found)
    found[symbols == 255] = values
    return found if form < 5 else of_blocks(found, shape, form == 6)


# cos(pi / 8) and cos(3 pi / 8) over the root of two, to the nearest float64.
LONG = float.fromhex("0x1.4e7ae9144f0fcp-1")
SHORT = float.fromhex("0x1.1517a7bdb3895p-2")


def of_blocks(found: Floats, shape: tuple[int, ...], positive: bool) -> Floats:
    """Return the elements of coefficients of blocks."""
    batch, channels, height, width = shape
    kind = found.dtype.type
    blocks = found.reshape((4, 4, batch, channels, height // 4, width // 4))
    half, long, short = kind(0.5), kind(LONG), kind(SHORT)
    for axis in (1, 0):  # across, then down
        a, b, c, d = np.moveaxis(blocks, axis, 0)
        p, q = half * (a + c), half * (a - c)
        f, n = long * b + short * d, short * b - long * d
        blocks = np.stack([p + f, q + n, q - n, p - f], axis)
    elements = blocks.transpose(2, 3, 4, 0, 5, 1).reshape(-1)
    return np.maximum(elements, 0) if positive else elements


def sign_bits(
    payload: bytes, shape: tuple[int, ...], signed: int
) -> tuple[np.ndarray, bytes]:
    """Return which elements are negative, and the rest of the payload."""
    d = math.prod(shape)
    if not signed:
        return np.zeros(d, bool), payload
    size = (d + 7) // 8
    return np.array(bits_of(payload[:size], 1, d), bool), payload[size:]


def rows_of(shape: tuple[int, ...], scope: int) -> int:
    """Return the number of rows."""
    return shape[0] if scope == 1 and shape else 1


def positions(
    data: bytes, kept: int, form: int, shape: tuple[int, ...]
) -> Sequence[int] | np.ndarray:
    """Return the positions of kept elements."""
    if form == 16:
        return np.frombuffer(data, "<u4")
    if form == 18:
        return gaps(data, kept)
    return np.flatnonzero(read_plane(data, 1, form, shape))


# --- frame-sets -----------------------------------------------------------------------


def frame_set(data: bytes, like: Sequence[tuple[int, tuple[int, ...]]]) -> list[Floats]:
    """Return the tensors of a frame-set by their dtypes and shapes."""
    mode, flags = data[5], data[6]
    name = data[24:32].rstrip(b"\0").decode()
    rest, marks = data[32:], [0] * len(like)
    scale_of: dict[int, float] = {}
    if mode:
        size = (len(like) + 7) // 8
        marks, rest = bits_of(rest[:size], 1, len(like)), rest[size:]
    chosen = [i for i, mark in enumerate(marks) if mark]
    if flags:
        for i in chosen:
            letter = "d" if like[i][0] == FLOAT64 else "f"
            (scale_of[i],) = struct.unpack_from("<" + letter, rest)
            rest = rest[struct.calcsize(letter) :]
    groups = [chosen] if mode == 2 and chosen else [[i] for i in chosen]
    table = []
    for _ in groups:
        params, size = struct.unpack_from("<BQ", rest)
        table.append((rest[9 : 9 + params], size))
        rest = rest[9 + params :]
    found: dict[int, Floats] = {}
    for members, (params, size) in zip(groups, table, strict=True):
        dtype = like[members[0]][0]
        counts = [math.prod(like[i][1]) for i in members]
        shape = (sum(counts),) if mode == 2 else like[members[0]][1]
        joined = elements(name, dtype, shape, params, rest[:size])
        rest = rest[size:]
        for i, part in zip(
            members, np.split(joined, np.cumsum(counts)[:-1]), strict=True
        ):
            found[i] = scaled(part, scale_of.get(i), dtype).reshape(like[i][1])
    exact = [i for i, mark in enumerate(marks) if not mark]
    for i in sorted(exact, key=lambda i: -WIDTHS[like[i][0]]):
        dtype, shape = like[i]
        size = math.prod(shape) * WIDTHS[dtype]
        found[i], rest = numbers(rest[:size], dtype).reshape(shape), rest[size:]
    assert not rest
    return [found[i] for i in range(len(like))]


def scaled(values: Floats, scale: float | None, dtype: int) -> Floats:
    """Return decoded elements times their scale."""
    if scale is None:
        return values
    largest = {1: 65504.0, 2: 3.3895313892515355e38, 3: float(np.finfo("f4").max)}
    most = largest.get(dtype, np.finfo("f8").max)
    kind: Any = np.float64 if dtype == FLOAT64 else np.float32
    with np.errstate(over="ignore"):
        product = values.astype(kind) * kind(scale)
    return to_type(np.clip(product, -kind(most), kind(most)), dtype)
