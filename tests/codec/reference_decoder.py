"""A decoder of entropy-coded parts in plain Python, from docs/coding.md.

It shares no code with the package, and does not check what it reads. Numbers are
Python's own, so that nothing can overflow.
"""

import math
import struct
import zlib
from collections.abc import Sequence

A, B, C = (1, 2, 3, 5, 9), (1, 2, 4), (1, 2, 3, 6)
Probability = list[int]  # p and n


class Coder:
    """The binary arithmetic coder, decoding."""

    def __init__(self, data: bytes) -> None:
        self._words = [
            int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big")
            for at in range(0, len(data), 2)
        ]
        self._next = 0
        self.size, self.code = 2**48, 0
        for _ in range(3):
            self.code = self.code * 2**16 + self._word()

    def _word(self) -> int:
        at, self._next = self._next, self._next + 1
        return self._words[at] if at < len(self._words) else 0

    def decide(self, share: int) -> int:
        """Return a decision by its share."""
        assert 0 < share < self.size
        if self.code < share:
            bit, self.size = 1, share
        else:
            bit, self.size = 0, self.size - share
            self.code -= share
        while self.size < 2**32:
            self.size *= 2**16
            self.code = self.code * 2**16 + self._word()
        return bit

    def left(self) -> int:
        """Return how many words have not been read."""
        return max(0, len(self._words) - self._next)


def share_of(size: int, first: Probability, second: Probability) -> int:
    """Return the share of a decision of two probabilities."""
    m = min(max((first[0] + second[0]) // 2**7, 16), 65520)
    return size // 2**16 * m


def update(probability: Probability, bit: int, most: int) -> None:
    """Update a probability after a decision."""
    p, n = probability
    r = math.floor(65536 / (n + 1.6) + 0.5)
    p = p + (2**22 - 1 - p) * r // 2**16 if bit else p - p * r // 2**16
    probability[:] = p, min(n + 1, most)


def klass(symbol: int, bounds: Sequence[int]) -> int:
    """Return how many bounds a symbol reaches."""
    return sum(symbol >= bound for bound in bounds)


class Plane:
    """A coded plane, while it is decoded."""

    def __init__(self, data: bytes, alphabet: int, shape: Sequence[int]) -> None:
        self._unary, self._alphabet = data[0], alphabet
        self._coder = Coder(data[1:])
        self._first: dict[object, Probability] = {}
        self._second: dict[object, Probability] = {}
        self._escapes: dict[object, Probability] = {}
        self._new = [[2**21, 0] for _ in range(self._unary)]
        lead = [1] * (3 - len(shape)) + list(shape)
        self._height, self._width = lead[-2:]
        self._channels = lead[-3]
        self._maps = math.prod(lead[:-2])
        few = 50 * self._unary * self._channels > math.prod(shape)
        self._own = 1 if few else self._channels

    def symbols(self) -> list[int]:
        """Return the symbols, row-major; all words must be read by then."""
        found: list[int] = []
        for number in range(self._maps):
            found += self._map(number % self._channels % self._own)
        assert self._coder.left() == 0
        return found

    def _map(self, channel: int) -> list[int]:
        known: dict[tuple[int, int], int] = {}
        for y in range(self._height):
            for x in range(self._width):
                left, above, *corners = (
                    known.get(at, 0)
                    for at in ((y, x - 1), (y - 1, x), (y - 1, x - 1), (y - 1, x + 1))
                )
                first = klass(left, A), klass(above, A), *(klass(c, B) for c in corners)
                second = channel, klass(left, C), klass(above, C)
                symbol = self._ones(first, second)
                if symbol == self._unary < self._alphabet - 1:
                    symbol += self._escape(left, above) - 1
                assert symbol < self._alphabet
                known[y, x] = symbol
        return list(known.values())

    def _ones(self, one: tuple[int, ...], two: tuple[int, ...]) -> int:
        for s in range(self._unary):
            first = self._first.setdefault((one, s), [0, 0])
            second = self._second.setdefault((two, s), [0, 0])
            new = self._new[s] if first[1] == 0 else None
            if new:
                first[0] = new[0]
            if second[1] == 0:
                second[0] = first[0]
            bit = self._coder.decide(share_of(self._coder.size, first, second))
            for probability in (first, second, new):
                if probability:
                    update(probability, bit, 127)
            if not bit:
                return s
        return self._unary

    def _escape(self, left: int, above: int) -> int:
        table, length, v = ((left + above) // 2).bit_length(), 0, 1
        while length < 8 and self._decision((table, "length", length)):
            length += 1
        for _ in range(length):
            v = 2 * v + self._decision((table, length, v))
        return v

    def _decision(self, which: object) -> int:
        probability = self._escapes.setdefault(which, [2**21, 0])
        bit = self._coder.decide(share_of(self._coder.size, probability, probability))
        update(probability, bit, 1023)
        return bit


def plane(data: bytes, alphabet: int, shape: Sequence[int]) -> list[int]:
    """Return the symbols of a coded plane."""
    return Plane(data, alphabet, shape).symbols()


def bits_of(data: bytes, bits: int, count: int) -> list[int]:
    """Return packed symbols of up to 16 bits."""
    if bits > 8:
        upper = bits_of(data[count:], bits - 8, count)
        return [low + 256 * high for low, high in zip(data, upper, strict=False)]
    number = int.from_bytes(data, "little")
    return [number >> (bits * i) & (2**bits - 1) for i in range(count)]


def gaps(data: bytes, kept: int) -> list[int]:
    """Return the positions of kept elements."""
    low, alphabet, length = struct.unpack_from("<BHI", data)
    high = plane(data[7 : 7 + length], alphabet, (kept,))
    rest = bits_of(data[7 + length :], low, kept) if low else [0] * kept
    positions, after = [], 0
    for upper, lower in zip(high, rest, strict=True):
        after += (upper << low) + lower + 1
        positions.append(after - 1)
    return positions


def coded_mask(data: bytes, levels: Sequence[int]) -> list[int]:
    """Return a coded mask by the level of each element, all 0 without a reference."""
    total = {level: levels.count(level) for level in sorted(set(levels))}
    ones = {}
    for level in total:
        ones[level], place = 0, 1
        while True:
            byte, data = data[0], data[1:]
            ones[level] += byte % 128 * place
            place *= 128
            if byte < 128:
                break
    coder, mask = Coder(data), []
    for level in levels:
        k, n = ones[level], total[level]
        bit = int(k == n) if k in (0, n) else coder.decide(coder.size // n * k)
        mask.append(bit)
        ones[level] -= bit
        total[level] -= 1
    assert coder.left() == 0
    return mask


def frame_parts(frame: bytes) -> tuple[str, int, tuple[int, ...], bytes, bytes]:
    """Return compressor, code of the dtype, shape, parameters and payload."""
    dtype, dims, length = struct.unpack_from("<BBB", frame, 5)
    name = frame[8:16].rstrip(b"\0").decode()
    shape = struct.unpack_from(f"<{dims}I", frame, 28)
    start = 28 + 4 * dims
    return name, dtype, shape, frame[start:][:length], frame[start + length :]


def mask_frame(frame: bytes, reference: Sequence[int] = ()) -> list[int]:
    """Return the elements of a frame of `mask`."""
    name, dtype, shape, params, payload = frame_parts(frame)
    assert (name, dtype) == ("mask", 5)
    form, checksum = struct.unpack("<BI", params)
    count = math.prod(shape)
    if form == 0:
        return bits_of(payload, 1, count)
    levels = list(reference) if form == 2 else [0] * count
    if form == 2:
        assert checksum == zlib.crc32(struct.pack(f"<{count}H", *levels))
    return coded_mask(payload, levels)


def ec_symbols(
    data: bytes, alphabet: int, shape: tuple[int, ...], form: int
) -> list[int]:
    """Return the symbols of `ec`: by the tensor's shape, as one row, or of blocks."""
    if form >= 5:
        batch, channels, height, width = shape
        shape = 16, batch, channels, height // 4, width // 4
    return plane(data, alphabet, (math.prod(shape),) if form == 4 else shape)
