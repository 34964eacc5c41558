"""The inner loops of `masksl.codec.dct`, compiled by Numba.

Blocks of 4 x 4 are transformed in strips: up to `STRIP` of a row of blocks together, so
that each part of memory is read once and processors compute several at a time.

``factors`` are the three of the transform. ``room``, shape (16, STRIP), keeps a strip:
a row for each element or each coefficient of a block, a column for each block, some of
which may be left over from before. Both have the type of the elements, float32 or
float64, and so has every sum and product.
"""

import numpy as np

from masksl.codec.jit import compiled, inlined

STRIP = 16


@inlined
def _analysed(a, b, c, d, factors):
    """Return the four coefficients of four elements."""
    outer, inner, far, near = a + d, b + c, a - d, b - c
    half, long, short = factors[0], factors[1], factors[2]
    return (
        half * (outer + inner),
        long * far + short * near,
        half * (outer - inner),
        short * far - long * near,
    )


@inlined
def _composed(a, b, c, d, factors):
    """Return the four elements of four coefficients."""
    half, long, short = factors[0], factors[1], factors[2]
    outer, inner = half * (a + c), half * (a - c)
    far, near = long * b + short * d, short * b - long * d
    return outer + far, inner + near, inner - near, outer - far


@compiled
def _analyse_strip(room, factors):
    """Transform the blocks of a strip, in place: columns, then rows."""
    for at in range(4):
        for i in range(STRIP):
            a, b, c, d = _analysed(
                room[at, i], room[at + 4, i], room[at + 8, i], room[at + 12, i], factors
            )
            room[at, i], room[at + 4, i] = a, b
            room[at + 8, i], room[at + 12, i] = c, d
    for at in range(0, 16, 4):
        for i in range(STRIP):
            a, b, c, d = _analysed(
                room[at, i], room[at + 1, i], room[at + 2, i], room[at + 3, i], factors
            )
            room[at, i], room[at + 1, i] = a, b
            room[at + 2, i], room[at + 3, i] = c, d


@compiled
def _compose_strip(room, factors):
    """Undo `_analyse_strip`."""
    for at in range(0, 16, 4):
        for i in range(STRIP):
            a, b, c, d = _composed(
                room[at, i], room[at + 1, i], room[at + 2, i], room[at + 3, i], factors
            )
            room[at, i], room[at + 1, i] = a, b
            room[at + 2, i], room[at + 3, i] = c, d
    for at in range(4):
        for i in range(STRIP):
            a, b, c, d = _composed(
                room[at, i], room[at + 4, i], room[at + 8, i], room[at + 12, i], factors
            )
            room[at, i], room[at + 4, i] = a, b
            room[at + 8, i], room[at + 12, i] = c, d


@compiled
def analyse(flat, rows, width, factors, room, out):
    """Transform blocks.

    Parameters
    ----------
    flat : numpy.ndarray
        The elements of ``rows`` rows of ``width``, both multiples of four.
    rows, width : int
        See there.
    factors, room
        See above.
    out : numpy.ndarray
        Filled with the coefficients by frequency.
    """
    apart, block = flat.size // 16, 0
    for top in range(0, rows, 4):
        for left in range(0, width, 4 * STRIP):
            count = min(STRIP, (width - left) // 4)
            for y in range(4):
                start = (top + y) * width + left
                for i in range(count):
                    for x in range(4):
                        room[4 * y + x, i] = flat[start + 4 * i + x]
            _analyse_strip(room, factors)
            for band in range(16):
                start = band * apart + block
                for i in range(count):
                    out[start + i] = room[band, i]
            block += count


@compiled
def _decoded(room, band, symbols, levels, signs, start, count, at):
    """Fill a row with coefficients; return the number of signs before the next one."""
    for i in range(count):
        symbol = symbols[start + i]
        level = levels[symbol]
        if symbol and at >= 0:
            if signs[at >> 3] >> (at & 7) & 1:
                level = -level
            at += 1
        room[band, i] = level
    return at


@compiled
def compose(symbols, levels, signs, counts, rows, width, factors, room, out):
    """Decode symbols of coefficients, and undo `analyse`.

    Parameters
    ----------
    symbols : numpy.ndarray
        uint8, shape (d,), by frequency.
    levels : numpy.ndarray
        Magnitude of each symbol.
    signs : numpy.ndarray
        uint8: a bit for each symbol but 0, the first in the lowest bit.
    counts : numpy.ndarray
        int64, shape (16,): signs before those of each frequency; counted up. If the
        first is -1, frequency 0 has none, and elements below 0 become 0.
    rows, width, factors, room
        See `analyse`.
    out : numpy.ndarray
        Filled with the elements.
    """
    # pylint: disable=too-many-locals
    apart, block, positive = symbols.size // 16, 0, counts[0] < 0
    for top in range(0, rows, 4):
        for left in range(0, width, 4 * STRIP):
            count = min(STRIP, (width - left) // 4)
            for band in range(16):
                start = band * apart + block
                counts[band] = _decoded(
                    room, band, symbols, levels, signs, start, count, counts[band]
                )
            _compose_strip(room, factors)
            if positive:
                _clamp(room, factors[0])
            for y in range(4):
                start = (top + y) * width + left
                for i in range(count):
                    for x in range(4):
                        out[start + 4 * i + x] = room[4 * y + x, i]
            block += count


@compiled
def _levels_of(room, band, flat, symbols, levels, start, count):
    """Fill a row with what coefficients are decoded as."""
    for i in range(count):
        room[band, i] = np.copysign(levels[symbols[start + i]], flat[start + i])


@compiled
def _clamp(room, half):
    """Set what is below 0 to 0, by sums and products that are exact."""
    for at in range(16):
        for i in range(STRIP):
            element = room[at, i]
            room[at, i] = half * (element + abs(element))


@compiled
def _distance(room, first, exact, start, count):
    """Return the squares of the distance and of the norm of a row of elements."""
    lost = whole = 0.0
    for x in range(4):
        for i in range(count):
            element = np.float64(exact[start + 4 * i + x])
            away = np.float64(room[first + x, i]) - element
            lost += away * away
            whole += element * element
    return lost, whole


@compiled
def distance(flat, symbols, levels, rows, width, factors, positive, room, exact):
    """Return the square of the distance of what is decoded from a tensor.

    The second number is the square of the norm of the tensor.

    Parameters
    ----------
    flat, symbols : numpy.ndarray
        Coefficients, and uint8, their symbols, shape (d,).
    levels : numpy.ndarray
        Magnitude of each symbol.
    rows, width, factors, room
        See `analyse`.
    positive : bool
        Whether elements below 0 become 0.
    exact : numpy.ndarray
        The elements, shape (d,).
    """
    # pylint: disable=too-many-locals
    apart, block, lost, whole = flat.size // 16, 0, 0.0, 0.0
    for top in range(0, rows, 4):
        for left in range(0, width, 4 * STRIP):
            count = min(STRIP, (width - left) // 4)
            for band in range(16):
                start = band * apart + block
                _levels_of(room, band, flat, symbols, levels, start, count)
            _compose_strip(room, factors)
            if positive:
                _clamp(room, factors[0])
            for y in range(4):
                start = (top + y) * width + left
                own, norm = _distance(room, 4 * y, exact, start, count)
                lost += own
                whole += norm
            block += count
    return lost, whole
