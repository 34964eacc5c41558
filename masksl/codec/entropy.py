"""Entropy coding of symbol planes: neighbours predict each other.

A plane is one small symbol for every element of a tensor. If the tensor holds maps (the
last two dimensions at least 2x2), the probability table of a symbol is chosen by its
four causal neighbours (left, above, above left, above right) and by the group of its
channel; otherwise one table serves all. Similar contexts share a table. The coded plane
holds tables, groups and everything else that the decoder needs.

The context of a symbol is 36 left + 9 above + 3 above left + above right, in neighbour
classes: four classes for left and above, three for the corners, 0 beyond the edge. The
coarse context leaves the corners out: 4 left + above.

Symbols are coded along skewed diagonals (column + 2 row): the neighbours of a whole
diagonal of every map in the batch are decoded before it, so it is coded at once, sorted
by context. With a single table, bytes of packed symbols of b bits are coded. The symbol
2**b - 1 then means itself or any above it; these are told apart after the last byte. b
is the first of 8, 4, 2, 1 with the least b / 8 + share of symbols from 2**b - 1 on, by
the table. The coder is constriction's asymmetric numeral system.

A coded plane, little-endian, is

======  ====  ==========================================================
size    type  field
======  ====  ==========================================================
1       u8    context: 0 none, 1 left and above, 2 all four neighbours
1       u8    number of channel groups
1       u8    number of tables
3, 2    u8    least symbols of neighbour classes 1, 2, 3; of classes 1, 2
4       u32   length of the tables
        zstd  with more than one group, the group of every channel; for every group
              and context, its table; the tables, a byte a symbol: the weight of
              code c is 2**(24 - c / 16), rounded, that of 255 is 0
        u32s  the coder's words, the last of them not zero
======  ====  ==========================================================
"""

import math
import struct
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import constriction
import numpy as np
import torch
import zstandard

from masksl.codec.bits import pack_bits, packed_size, unpack_bits
from masksl.codec.wire import FrameError, to_tensor

NONE, COARSE, FINE = 0, 1, 2  # contexts of a plane
_NEIGHBOURS = {NONE: 1, COARSE: 16, FINE: 144}
_HEADER = struct.Struct("<BBB3B2BI")
_UNIT = 16  # steps of the probability code per factor of two
_TABLE_BITS = 6.0  # about what an entry of a table costs, compressed
_LINK_BITS = 5.0  # about what naming the table of a context costs, likewise
_GROUPS = (1, 2, 4, 8)
_TABLES = 64  # at most
_FEWER_TABLES = (8, 24)
_FEW = 32  # symbols; so many are counted one after the other
_WEIGHT_OF_CODE = np.rint(2.0 ** (24 - np.arange(256) / _UNIT)).astype(np.int64)
_WEIGHT_OF_CODE[255] = 0


@dataclass(frozen=True)
class Plan:
    """The contexts, groups and tables of a plane, and their estimated cost.

    Parameters
    ----------
    context : int
        `NONE`, `COARSE` or `FINE`.
    groups : numpy.ndarray
        uint8, shape (C,): the group of every channel.
    bounds : tuple[int, ...]
        Least symbols of the neighbour classes 1, 2, 3 of four, and 1, 2 of three.
    links : numpy.ndarray
        uint8, shape (groups x contexts,): the table of each.
    codes : numpy.ndarray
        uint8, shape (tables, alphabet): the tables as they are sent.
    bits : float
        Empirical entropy of the symbols given their contexts, in bits.
    side_bits : float
        About what the tables take.
    """

    context: int
    groups: np.ndarray
    bounds: tuple[int, ...]
    links: np.ndarray
    codes: np.ndarray
    bits: float
    side_bits: float

    @property
    def total(self) -> float:
        """Estimated size in bits."""
        return self.bits + self.side_bits

    def narrowed(self, contexts: np.ndarray) -> np.ndarray:
        """Return fine contexts as this plan has them."""
        return contexts // np.uint8(9) if self.context == COARSE else contexts

    def offset(self, maps: "_Maps") -> np.ndarray:
        """Return the first table of every map's channel, uint16, shape (B C,)."""
        first = self.groups.astype(np.uint16) * _NEIGHBOURS[self.context]
        return np.tile(first, maps.batch)


class Plane:
    """Symbols of a tensor, and cached values that coding them needs repeatedly.

    Parameters
    ----------
    symbols : numpy.ndarray
        uint8, shape (d,), row-major, all less than ``alphabet``.
    alphabet : int
        Number of different symbols, 1 to 256.
    shape : tuple[int, ...]
        Shape of the tensor that they belong to, of d elements.
    """

    def __init__(
        self, symbols: np.ndarray, alphabet: int, shape: tuple[int, ...]
    ) -> None:
        self.symbols = symbols
        self.alphabet = alphabet
        self.maps = _Maps.of(shape)
        self._bounds: tuple[int, ...] = ()
        self._contexts = np.empty(0, np.uint8)  # by these bounds

    @cached_property
    def counts(self) -> np.ndarray:
        """Number of occurrences of each symbol, int64, shape (alphabet,)."""
        if self.alphabet > _FEW:
            return np.bincount(self.symbols, minlength=self.alphabet)
        found = [np.count_nonzero(self.symbols == s) for s in range(self.alphabet)]
        return np.array(found)

    @cached_property
    def rows(self) -> np.ndarray:
        """Symbols as (H W, B C): a row is one position in all maps."""
        return _transposed(self.symbols.reshape(-1, self.maps.height * self.maps.width))

    def contexts(self, bounds: tuple[int, ...]) -> np.ndarray:
        """Return the fine context of every symbol, uint8, in rows."""
        if self._bounds != bounds:
            self._contexts = _contexts(self.rows, self.maps, bounds)
            self._bounds = bounds
        return self._contexts


def encode_plane(plane: Plane, plan: Plan | None = None) -> bytes:
    """Code a plane.

    Parameters
    ----------
    plane : Plane
        The symbols.
    plan : Plan | None
        What `make_plan` returned for it; made anew where it is None.

    Returns
    -------
    bytes
        The coded plane; `decode_plane` needs its alphabet and shape again.
    """
    plan = plan or make_plan(plane)
    coder = constriction.stream.stack.AnsCoder()
    if plan.context == NONE:
        _encode_packed(coder, plane.symbols, _weights(plan.codes)[0])
    else:
        _encode_maps(coder, plane, plan)
    count = int(plan.groups.max()) + 1
    sent = [plan.groups] if count > 1 else []
    side = b"".join(part.tobytes() for part in (*sent, plan.links, plan.codes))
    packed = zstandard.ZstdCompressor(level=9).compress(side)
    counts = count, len(plan.codes)
    header = _HEADER.pack(plan.context, *counts, *plan.bounds, len(packed))
    return header + packed + coder.get_compressed().astype("<u4").tobytes()


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
        If the plane is at odds with itself.
    """
    maps = _Maps.of(shape)
    plan, words = _read_header(payload, alphabet, maps)
    coder = constriction.stream.stack.AnsCoder(words)
    if plan.context == NONE:
        decoded = _decode_packed(coder, math.prod(shape), _weights(plan.codes)[0])
    else:
        decoded = _decode_maps(coder, plan, maps)
    if not coder.is_empty():
        raise FrameError("coded plane goes on after its last symbol")
    return decoded


def make_plan(plane: Plane, *, spatial: bool = True) -> Plan:
    """Choose contexts, groups and tables by their estimated cost.

    Parameters
    ----------
    plane : Plane
        The symbols.
    spatial : bool
        Whether neighbours may choose the tables.

    Returns
    -------
    Plan
        The cheapest; nothing has been coded.
    """
    maps, counts, alphabet = plane.maps, plane.counts, plane.alphabet
    bounds = (*_class_bounds(counts, 4), *_class_bounds(counts, 3))
    groups = np.zeros(maps.channels, np.uint8)
    best = _plan(NONE, groups, bounds, counts[None].astype(np.float64))
    if not (spatial and maps.height > 1 and maps.width > 1):
        return best
    # Tables for few symbols cost more than they save: one group for all channels.
    size = _NEIGHBOURS[FINE] * alphabet
    many = maps.channels * size > 4 * plane.symbols.size
    channels = 1 if many else maps.channels
    channel = np.arange(maps.channels, dtype=np.int32) % channels * size
    cells = plane.contexts(bounds) * np.int32(alphabet)
    cells += np.tile(channel, maps.batch)
    cells += plane.rows
    flat = torch.from_numpy(cells.ravel())  # PyTorch counts faster than NumPy
    joint = torch.bincount(flat, minlength=channels * size).numpy()
    joint = joint.reshape((channels, 144, alphabet)).astype(np.float64)
    coarse = joint.reshape((channels, 16, 9, alphabet)).sum(2)
    for context, tables in ((COARSE, coarse), (FINE, joint)):
        so_far = math.inf
        for count in _GROUPS:
            plan = _grouped(context, tables, min(count, channels), bounds)
            if plan.total >= so_far:
                break  # more groups would not pay either
            if channels == 1:
                plan = replace(plan, groups=groups)
            so_far = plan.total
            best = min(best, plan, key=lambda p: p.total)
    if best.context != NONE:
        best = _with_fewer_tables(best, coarse if best.context == COARSE else joint)
    return best


def _with_fewer_tables(plan: Plan, counts: np.ndarray) -> Plan:
    """Return the plan with as many tables as pay, for counts by channel."""
    groups = plan.groups[: len(counts)]  # one, if channels were not distinguished
    merged = _sum_by(groups, counts, int(groups.max()) + 1)
    flat = merged.reshape(-1, counts.shape[2])
    for tables in _FEWER_TABLES:
        fewer = _plan(plan.context, plan.groups, plan.bounds, flat, tables)
        plan = min(plan, fewer, key=lambda p: p.total)
    return plan


# --- contexts and tables --------------------------------------------------------------


@dataclass(frozen=True)
class _Maps:
    """A tensor seen as maps: (B, C, H, W), and the order in which these are coded."""

    batch: int
    channels: int
    height: int
    width: int
    positions: np.ndarray  # (H W,) flat positions, diagonal by diagonal
    diagonals: tuple[tuple[int, int], ...]  # bounds in positions

    @staticmethod
    @lru_cache(maxsize=64)
    def of(shape: tuple[int, ...]) -> "_Maps":
        """Return the maps of a shape; fewer than three dimensions are one row."""
        if len(shape) < 3:
            return _Maps(1, 1, 1, math.prod(shape), np.empty(0, np.int64), ())
        batch, (channels, height, width) = math.prod(shape[:-3]), shape[-3:]
        y, x = np.divmod(np.arange(height * width), width)
        diagonal = x + 2 * y
        positions = np.argsort(diagonal, kind="stable")
        sizes = np.bincount(diagonal)
        ends = np.cumsum(sizes)
        bounds = tuple(
            (int(end - size), int(end))
            for end, size in zip(ends, sizes, strict=True)
            if size
        )
        return _Maps(batch, channels, height, width, positions, bounds)


def _transposed(rows: np.ndarray) -> np.ndarray:
    """Return the transpose, contiguous; PyTorch moves it faster than NumPy."""
    return torch.from_numpy(rows).t().contiguous().numpy()


def _class_bounds(counts: np.ndarray, classes: int) -> list[int]:
    """Split symbols into classes of about the same mass; return their least symbols.

    A symbol that is frequent by itself has a class to itself; the others share the rest
    evenly.
    """
    bounds, start = [], 0
    for left in range(classes, 1, -1):
        rest = counts[start:]
        share = np.cumsum(rest) >= rest.sum() / left
        start = min(start + int(share.argmax()) + 1, len(counts) - 1)
        bounds.append(start)
    return bounds


def _classes(bounds: tuple[int, ...]) -> np.ndarray:
    """Return the neighbour classes of every symbol, uint8, shape (256,).

    The lower two bits are the class of four, the upper two that of three.
    """
    symbols = np.arange(256)[:, None]
    four = (symbols >= np.array(bounds[:3])).sum(1, dtype=np.uint8)
    three = (symbols >= np.array(bounds[3:])).sum(1, dtype=np.uint8)
    return four | three << 2


def _context_of(
    left: np.ndarray, above: np.ndarray, corners: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Return the fine context, 0 to 143, of elements from their neighbours' classes."""
    context = (left & 3) * np.uint8(36)
    context += (above & 3) * np.uint8(9)
    context += (corners[0] >> 2) * np.uint8(3)
    context += corners[1] >> 2
    return context


def _contexts(rows: np.ndarray, maps: "_Maps", bounds: tuple[int, ...]) -> np.ndarray:
    """Return the fine context of every symbol, uint8, in rows as they are."""
    height, width = maps.height, maps.width
    padded = np.zeros((height + 1, width + 2, rows.shape[1]), np.uint8)
    padded[1:, 1:-1] = _classes(bounds)[rows].reshape(height, width, -1)
    corners = padded[:-1, :-2], padded[:-1, 2:]
    return _context_of(padded[1:, :-2], padded[:-1, 1:-1], corners).reshape(rows.shape)


def _plan(
    context: int,
    groups: np.ndarray,
    bounds: tuple[int, ...],
    counts: np.ndarray,
    tables: int = _TABLES,
) -> Plan:
    """Return the plan for the counts of contexts, shape (contexts, alphabet)."""
    links = _link(counts, tables)
    merged = _sum_by(links, counts, int(links.max()) + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = -np.log2(merged / merged.sum(1, keepdims=True))  # inf for unseen ones
    seen = merged > 0
    bits = float((merged[seen] * cost[seen]).sum())
    codes = np.full(merged.shape, 255, np.uint8)
    codes[seen] = np.minimum(np.rint(_UNIT * cost[seen]), 254)
    side = _TABLE_BITS * int(seen.sum()) + _LINK_BITS * (len(links) - 1)
    side += 8 * (len(groups) * bool(groups.max()) + 25)
    return Plan(context, groups, bounds, links, codes, bits, side)


def _sum_by(labels: np.ndarray, counts: np.ndarray, number: int) -> np.ndarray:
    """Return the sums of rows of one label, float64, shape (number, ...)."""
    flat = torch.from_numpy(counts.reshape(len(labels), -1))
    sums = torch.zeros(number, flat.shape[1], dtype=torch.float64)
    sums.index_add_(0, torch.from_numpy(labels.astype(np.int64)), flat)
    return sums.numpy().reshape(number, *counts.shape[1:])


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the matrix product, on PyTorch's threads."""
    return (torch.from_numpy(left) @ torch.from_numpy(right)).numpy()


def _link(counts: np.ndarray, tables: int) -> np.ndarray:
    """Merge the tables of similar contexts; deterministic.

    Parameters
    ----------
    counts : numpy.ndarray
        Shape (contexts, alphabet).
    tables : int
        At most so many tables.

    Returns
    -------
    numpy.ndarray
        uint8, shape (contexts,): the table of each, numbered without gaps.
    """
    contexts, alphabet = counts.shape
    if contexts <= tables:
        return np.arange(contexts, dtype=np.uint8)
    mass = counts.sum(1)
    mean = (counts * np.arange(alphabet)).sum(1) / np.maximum(mass, 1)
    order = np.argsort(mean, kind="stable")
    half = mass + mass.sum() / contexts  # by mass and by number
    rank = np.cumsum(half[order])
    links = np.empty(contexts, np.uint8)
    links[order] = np.minimum(rank * tables / rank[-1], tables - 1)
    for _ in range(5):
        merged = _sum_by(links, counts, tables) + 0.05
        lengths = -np.log2(merged / merged.sum(1, keepdims=True))
        nearest = _product(counts, lengths.T).argmin(1).astype(np.uint8)
        if np.array_equal(nearest, links):
            break
        links = nearest
    return np.unique(links, return_inverse=True)[1].astype(np.uint8)


def _grouped(
    context: int, tables: np.ndarray, count: int, bounds: tuple[int, ...]
) -> Plan:
    """Return the plan with channels in at most so many groups."""
    groups = _cluster(tables, count)
    merged = _sum_by(groups, tables, int(groups.max()) + 1)
    return _plan(context, groups, bounds, merged.reshape(-1, tables.shape[2]))


def _cluster(tables: np.ndarray, count: int) -> np.ndarray:
    """Group channels with similar symbols, by code length; deterministic.

    Parameters
    ----------
    tables : numpy.ndarray
        Counts, shape (C, contexts, alphabet).
    count : int
        Number of groups.
    """
    channels, _, alphabet = tables.shape
    mean = (tables.sum(1) * np.arange(alphabet)).sum(1)
    groups = np.empty(channels, np.uint8)
    groups[np.argsort(mean, kind="stable")] = np.arange(channels) * count // channels
    if count == 1:
        return groups
    flat = tables.reshape(channels, -1).astype(np.float64)
    for _ in range(6):
        merged = _sum_by(groups, tables, count) + 0.1
        lengths = -np.log2(merged / merged.sum(2, keepdims=True)).reshape(count, -1)
        nearest = _product(flat, lengths.T).argmin(1).astype(np.uint8)
        if np.array_equal(nearest, groups):
            break
        groups = nearest
    return np.unique(groups, return_inverse=True)[1].astype(np.uint8)


def _weights(codes: np.ndarray) -> np.ndarray:
    """Return the weights of tables as they are sent, int64, of at least two symbols.

    Whole numbers, so that every machine makes the same model of them.
    """
    weights = _WEIGHT_OF_CODE[codes]
    if codes.shape[1] == 1:  # the coder requires at least two symbols
        weights = np.pad(weights, ((0, 0), (0, 1)))
    weights[weights.sum(1) == 0, 0] = 1
    return weights


def _model(weights: np.ndarray):
    """Return the coder's model of symbols with these weights."""
    share = (weights / weights.sum()).astype(np.float32)
    return constriction.stream.model.Categorical(share, perfect=False)


def _read_header(
    payload: memoryview, alphabet: int, maps: _Maps
) -> tuple[Plan, np.ndarray]:
    """Return the plan of a coded plane and the coder's words."""
    if len(payload) < _HEADER.size:
        raise FrameError(f"coded plane of {len(payload)} bytes has no header")
    context, count, tables, *bounds, length = _HEADER.unpack_from(payload)
    words = len(payload) - _HEADER.size - length
    if context not in _NEIGHBOURS or context != NONE and not maps.diagonals:
        raise FrameError(f"coded plane has the unknown context {context}")
    if not 1 <= count <= max(_GROUPS) or words < 0 or words % 4:
        raise FrameError(f"coded plane has {count} groups, {words} bytes of words")
    sent = maps.channels if count > 1 else 0
    links = count * _NEIGHBOURS[context]
    size = sent + links + tables * alphabet
    side = np.frombuffer(inflate(payload[_HEADER.size :][:length], size), np.uint8)
    groups = np.zeros(maps.channels, np.uint8)
    groups[:sent] = side[:sent]
    linked = side[sent : sent + links]
    if groups.max() >= count or linked.max() >= tables:
        raise FrameError("coded plane names groups or tables that it does not have")
    codes = side[sent + links :].reshape(tables, alphabet)
    plan = Plan(context, groups, tuple(bounds), linked, codes, 0, 0)
    coded = np.frombuffer(payload[_HEADER.size + length :], "<u4")
    if words and not coded[-1]:
        raise FrameError("coded plane ends in a word of zeros, which no coder writes")
    return plan, coded


def deflate(data: memoryview) -> bytes:
    """Compress bytes, quickly."""
    return zstandard.ZstdCompressor(level=1).compress(data)


def inflate(data: memoryview, size: int) -> bytes:
    """Decompress the output of `deflate`; `FrameError` unless it has ``size`` bytes."""
    try:
        if zstandard.frame_content_size(data) != size:
            raise FrameError(f"compressed part does not hold {size} bytes")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
    except zstandard.ZstdError as error:
        raise FrameError(f"compressed part is broken: {error}") from error


# --- gaps -----------------------------------------------------------------------------

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
    coded = encode_plane(Plane(high, alphabet, (len(high),)))
    rest = b""
    if low:
        bits = gaps & (2**low - 1)
        dtype = torch.uint8 if low <= 8 else torch.int32
        rest = pack_bits(torch.from_numpy(bits).to(dtype), low).numpy().tobytes()
    return _GAPS.pack(low, alphabet, len(coded)) + coded + rest


def decode_gaps(payload: memoryview, kept: int, count: int) -> np.ndarray:
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
    numpy.ndarray
        int64, shape (kept,).

    Raises
    ------
    FrameError
        If the positions are not as many, or not within the elements.
    """
    if len(payload) < _GAPS.size:
        raise FrameError(f"coded gaps of {len(payload)} bytes have no header")
    low, alphabet, length = _GAPS.unpack_from(payload)
    rest = packed_size(kept, low) if 0 < low <= 16 else 0
    sound = low <= 16 and 1 <= alphabet <= 256
    if not sound or len(payload) != _GAPS.size + length + rest:
        raise FrameError(f"coded gaps with {low} low bits, {len(payload)} bytes")
    coded = payload[_GAPS.size :][:length]
    gaps = decode_plane(coded, alphabet, (kept,)).astype(np.int64) << low
    if low:
        packed = to_tensor(payload[_GAPS.size + length :], torch.uint8, "cpu")
        gaps |= unpack_bits(packed, kept, low).numpy()
    positions = np.cumsum(gaps + 1) - 1
    if positions[-1] >= count:
        raise FrameError(f"coded gaps reach {positions[-1]} of {count} elements")
    return positions


# --- one table for all ----------------------------------------------------------------


def _packing(weights: np.ndarray) -> int:
    """Return the bits of packed symbols with the fewest steps of the coder."""
    total = weights.sum()
    steps = {b: b / 8 + weights[2**b - 1 :].sum() / total for b in (8, 4, 2, 1)}
    return min(steps, key=lambda bits: steps[bits])


def _packed_model(weights: np.ndarray, bits: int):
    """Return the model of a byte of packed symbols, which are independent."""
    last = 2**bits - 1
    share = np.zeros(last + 1)
    share[: min(last, len(weights))] = weights[:last] / weights.sum()
    share[last] = weights[last:].sum() / weights.sum()
    byte, product = np.arange(256), np.ones(256)
    for start in range(0, 8, bits):
        product = product * share[byte >> start & last]
    return constriction.stream.model.Categorical(
        product.astype(np.float32), perfect=False
    )


def _encode_packed(coder, symbols: np.ndarray, weights: np.ndarray) -> None:
    """Code all symbols by one table."""
    bits = _packing(weights)
    last = 2**bits - 1
    beyond = symbols[symbols >= last]
    if beyond.size and len(weights) > last + 1:
        coder.encode_reverse((beyond - last).astype(np.int32), _model(weights[last:]))
    low = torch.from_numpy(np.minimum(symbols, last))
    packed = pack_bits(low, bits).numpy().astype(np.int32)
    coder.encode_reverse(packed, _packed_model(weights, bits))


def _decode_packed(coder, count: int, weights: np.ndarray) -> np.ndarray:
    """Undo `_encode_packed`: uint8, shape (count,)."""
    bits = _packing(weights)
    last = 2**bits - 1
    packed = coder.decode(_packed_model(weights, bits), packed_size(count, bits))
    symbols = unpack_bits(torch.from_numpy(packed.astype(np.uint8)), count, bits)
    decoded = symbols.numpy()
    beyond = np.flatnonzero(decoded == last)
    if beyond.size and len(weights) > last + 1:
        if not weights[last:].any():
            raise FrameError("coded plane holds symbols that its table does not")
        above = coder.decode(_model(weights[last:]), len(beyond))
        decoded[beyond] = above + last
    return decoded


# --- diagonals ------------------------------------------------------------------------


def _encode_sorted(coder, rows: np.ndarray, keys: np.ndarray, models: list) -> None:
    """Code the symbols of a diagonal, last context first."""
    flat = keys.ravel()
    order = np.argsort(flat, kind="stable")
    symbols = rows.ravel()[order].astype(np.int32)
    counts = np.bincount(flat)
    end = len(symbols)
    for key in np.flatnonzero(counts)[::-1].tolist():
        start = end - int(counts[key])
        coder.encode_reverse(symbols[start:end], models[key])
        end = start


def _decode_sorted(coder, keys: np.ndarray, models: list) -> np.ndarray:
    """Return the symbols of a diagonal, in the shape of its contexts."""
    flat = keys.ravel()
    order = np.argsort(flat, kind="stable")
    counts = np.bincount(flat)
    used = np.flatnonzero(counts)
    parts = [
        coder.decode(models[key], count)
        for key, count in zip(used.tolist(), counts[used].tolist(), strict=True)
    ]
    symbols = np.empty(len(flat), np.uint8)
    symbols[order] = np.concatenate(parts)
    return symbols.reshape(keys.shape)


def _encode_maps(coder, plane: Plane, plan: Plan) -> None:
    """Code the symbols of maps, last diagonal first."""
    models = [_model(weights) for weights in _weights(plan.codes)]
    contexts, offset = plane.contexts(plan.bounds), plan.offset(plane.maps)
    for start, end in reversed(plane.maps.diagonals):
        chosen = plane.maps.positions[start:end]
        tables = plan.links[plan.narrowed(contexts[chosen]) + offset]
        _encode_sorted(coder, plane.rows[chosen], tables, models)


def _decode_maps(coder, plan: Plan, maps: _Maps) -> np.ndarray:
    """Undo `_encode_maps`: uint8, shape (d,)."""
    models = [_model(weights) for weights in _weights(plan.codes)]
    classes = _classes(plan.bounds)
    width, offset = maps.width, plan.offset(maps)
    count = maps.batch * maps.channels
    # Classes with a margin: a row above, a column on either side.
    padded = np.zeros((maps.height + 1, width + 2, count), np.uint8)
    decoded = np.empty((maps.height * width, count), np.uint8)
    for start, end in maps.diagonals:
        positions = maps.positions[start:end]
        y, x = np.divmod(positions, width)
        corners = padded[y, x], padded[y, x + 2]
        contexts = _context_of(padded[y + 1, x], padded[y, x + 1], corners)
        tables = plan.links[plan.narrowed(contexts) + offset]
        symbols = _decode_sorted(coder, tables, models)
        decoded[positions] = symbols
        padded[y + 1, x + 1] = classes[symbols]
    return _transposed(decoded).ravel()
