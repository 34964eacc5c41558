"""The inner loops of quantisers and of entropy coding, compiled by Numba.

`masksl.codec.coder` documents the format. All arithmetic of coding is on integers of
less than 63 bits, so every machine writes and reads the same bytes. Where Numba is not
installed or ``NUMBA_DISABLE_JIT`` is set, the functions run as plain Python, about a
thousand times slower.

An encoder's ``low``, ``size`` and ``count`` are the interval [low, low + size) and the
number of words in ``out``; a decoder's ``code`` is the position in the interval.
"""

import numpy as np

from masksl.codec.jit import compiled, inlined

WHOLE = 1 << 48  # size of the whole interval
LEAST = 1 << 32  # below this size, a word of 16 bits leaves the interval
FULL = 32  # words of room that a symbol needs at most
ESCAPE = 8 + 512  # probabilities of an escape of one magnitude: of its length, its bits
MAGNITUDES = 9
_BELOW_ONE = 1 - 2**-53  # the largest float64 below one

# A probability, of a one, is a number of 32 bits: the upper 22 are the probability,
# the lower ten how often it was updated. 0 is a probability that was never updated.
EVEN = 1 << 31
# Number of updates after which a probability adapts at a constant rate.
_LIMIT = 127  # of contexts
_LIMIT_ESCAPE = 1023
# What an update moves, in 2**-16 of the distance, by the number of updates before.
RATES = np.array([round(65536 / (n + 1.6)) for n in range(1024)])


# --- the coder ------------------------------------------------------------------------


@inlined
def _put(low, size, count, out, bit, share):
    """Narrow the interval by a bit; a one takes ``share`` of the size."""
    if bit:
        size = share
    else:
        low += share
        size -= share
    while size < LEAST:  # more than once for shares of less than 2**-16 alone
        if low >= WHOLE:  # carry into the words before
            last = count - 1
            while out[last] == 65535:
                out[last] = 0
                last -= 1
            out[last] += 1
            low -= WHOLE
        out[count] = low >> 32
        count += 1
        low = (low & (LEAST - 1)) << 16
        size <<= 16
    return low, size, count


@inlined
def _take(code, size, count, data, share):
    """Decode a bit; a one takes ``share`` of the size."""
    bit = code < share
    if bit:
        size = share
    else:
        code -= share
        size -= share
    while size < LEAST:
        code = code << 16 | _word(data, count)
        count += 1
        size <<= 16
    return bit, code, size, count


@inlined
def _word(data, count):
    """Return a word of two bytes, the higher first.

    After the last byte, zeros follow without end.
    """
    word = 0
    if 2 * count < len(data):
        word = np.int64(data[2 * count]) << 8
    if 2 * count + 1 < len(data):
        word |= np.int64(data[2 * count + 1])
    return word


@inlined
def _first(data):
    """Return the first three words as one number."""
    return _word(data, 0) << 32 | _word(data, 1) << 16 | _word(data, 2)


@inlined
def _mean(state, other):
    """Return the mean of two probabilities in 2**-16, neither zero nor one."""
    return min(max(((state >> 10) + (other >> 10)) >> 7, 16), 65520)


@inlined
def _updated(state, bit, rates, limit):
    """Return a probability after a bit."""
    updates = state & 1023
    probability = state >> 10
    if bit:
        probability += ((4194303 - probability) * rates[np.uintp(updates)]) >> 16
    else:
        probability -= (probability * rates[np.uintp(updates)]) >> 16
    return probability << 10 | min(updates + 1, limit)


# --- planes ---------------------------------------------------------------------------


@inlined
def _states(first, second, novel, one, two, step):
    """Return the two probabilities of a decision.

    One that was never updated is taken from a wider context: the second from the first,
    the first from those that were new before it.
    """
    state = np.int64(first[one])
    if state == 0:
        state = novel[step] & ~1023
    other = np.int64(second[two])
    if other == 0:
        other = state & ~1023
    return state, other


@inlined
def _escape_table(left, up):
    """Return where the probabilities of an escape begin: by the mean of neighbours."""
    mean = (left + up) >> 1
    bits = 0
    while mean:
        mean >>= 1
        bits += 1
    return bits * ESCAPE


@compiled
def _put_escape(low, size, count, out, table, start, value, rates):
    """Encode a value from 1 to 256: its length in unary, then its lower bits."""
    length = 0
    while value >> (length + 1):
        length += 1
    for step in range(min(length + 1, 8)):
        bit = step < length
        state = table[start + step]
        share = (size >> 16) * _mean(state, state)
        low, size, count = _put(low, size, count, out, bit, share)
        table[start + step] = _updated(state, bit, rates, _LIMIT_ESCAPE)
    start += 8 + (1 << length)
    for left in range(length - 1, -1, -1):
        bit = value >> left & 1
        at = start + (value >> (left + 1))
        state = table[at]
        share = (size >> 16) * _mean(state, state)
        low, size, count = _put(low, size, count, out, bit, share)
        table[at] = _updated(state, bit, rates, _LIMIT_ESCAPE)
    return low, size, count


@compiled
def _take_escape(code, size, count, data, table, start, rates):
    """Undo `_put_escape`; the value may be up to 511."""
    length = 0
    while length < 8:
        state = table[start + length]
        share = (size >> 16) * _mean(state, state)
        bit, code, size, count = _take(code, size, count, data, share)
        table[start + length] = _updated(state, bit, rates, _LIMIT_ESCAPE)
        if not bit:
            break
        length += 1
    start += 8 + (1 << length)
    value = 1
    for _ in range(length):
        state = table[start + value]
        share = (size >> 16) * _mean(state, state)
        bit, code, size, count = _take(code, size, count, data, share)
        table[start + value] = _updated(state, bit, rates, _LIMIT_ESCAPE)
        value = 2 * value + bit
    return value, code, size, count


@compiled
def put_plane(symbols, maps, unary, escapes, offsets, models, out):
    """Encode the symbols of maps.

    Parameters
    ----------
    symbols : numpy.ndarray
        uint8, shape (d,).
    maps : tuple[int, int, int, int, int]
        Batch, channels, height, width; how far apart the second contexts of two
        channels are, 0 where all share theirs.
    unary : int
        Decisions of a symbol before its escape.
    escapes : bool
        Whether there are symbols beyond ``unary``.
    offsets : numpy.ndarray
        int64, shape (6, 256): what a symbol adds to the first context as neighbour on
        the left, above, above left, above right; to the second on the left, above.
    models : tuple[numpy.ndarray, ...]
        Probabilities of first contexts, of second ones, of those that are new, of
        escapes; `RATES`; a row of symbols, for the one above.
    out : numpy.ndarray
        uint16; where the words go.

    Returns
    -------
    tuple[int, int, int]
        Low end and size of the interval, number of words; -1 if ``out`` is full.
    """
    # pylint: disable=too-many-locals
    batch, channels, height, width, apart = maps
    first, second, novel, escape, rates, above = models
    low, size, count, position = 0, WHOLE, 0, 0
    for plane in range(batch * channels):
        base = plane % channels * apart
        above[:] = 0
        for _ in range(height):
            left, corner, up = np.int64(0), np.int64(0), np.int64(above[1])
            for x in range(width):
                if count + FULL > len(out):
                    return low, size, -1
                right = np.int64(above[x + 2])
                one = offsets[0, left] + offsets[1, up]
                one += offsets[2, corner] + offsets[3, right]
                two = base + offsets[4, left] + offsets[5, up]
                symbol = np.int64(symbols[position])
                position += 1
                for step in range(min(symbol + 1, unary)):
                    bit = symbol > step
                    at, by = np.uintp(one + step), np.uintp(two + step)
                    state, other = _states(first, second, novel, at, by, step)
                    share = (size >> 16) * _mean(state, other)
                    low, size, count = _put(low, size, count, out, bit, share)
                    if state & 1023 == 0:
                        novel[step] = _updated(novel[step], bit, rates, _LIMIT)
                    first[at] = _updated(state, bit, rates, _LIMIT)
                    second[by] = _updated(other, bit, rates, _LIMIT)
                if escapes and symbol >= unary:
                    start = _escape_table(left, up)
                    value = symbol - unary + 1
                    low, size, count = _put_escape(
                        low, size, count, out, escape, start, value, rates
                    )
                above[x] = left
                left, corner, up = symbol, up, right
            above[width] = left
    return low, size, count


@compiled
def take_plane(symbols, maps, unary, escapes, offsets, models, data):
    """Decode the symbols of maps; the inverse of `put_plane`.

    Parameters
    ----------
    symbols : numpy.ndarray
        uint8, shape (d,); filled.
    maps, unary, escapes, offsets, models
        See `put_plane`.
    data : numpy.ndarray
        uint8; the words as bytes, the higher byte of each first.

    Returns
    -------
    int
        Number of words read, with those beyond the end; -1 if a symbol is beyond 255.
    """
    # pylint: disable=too-many-locals
    batch, channels, height, width, apart = maps
    first, second, novel, escape, rates, above = models
    code, size, count = _first(data), WHOLE, 3
    position = 0
    for plane in range(batch * channels):
        base = plane % channels * apart
        above[:] = 0
        for _ in range(height):
            left, corner, up = np.int64(0), np.int64(0), np.int64(above[1])
            for x in range(width):
                right = np.int64(above[x + 2])
                one = offsets[0, left] + offsets[1, up]
                one += offsets[2, corner] + offsets[3, right]
                two = base + offsets[4, left] + offsets[5, up]
                symbol = 0
                while symbol < unary:
                    at, by = np.uintp(one + symbol), np.uintp(two + symbol)
                    state, other = _states(first, second, novel, at, by, symbol)
                    share = (size >> 16) * _mean(state, other)
                    bit, code, size, count = _take(code, size, count, data, share)
                    if state & 1023 == 0:
                        novel[symbol] = _updated(novel[symbol], bit, rates, _LIMIT)
                    first[at] = _updated(state, bit, rates, _LIMIT)
                    second[by] = _updated(other, bit, rates, _LIMIT)
                    if not bit:
                        break
                    symbol += 1
                if escapes and symbol == unary:
                    start = _escape_table(left, up)
                    value, code, size, count = _take_escape(
                        code, size, count, data, escape, start, rates
                    )
                    symbol += value - 1
                    if symbol > 255:
                        return -1
                symbols[position] = symbol
                position += 1
                above[x] = left
                left, corner, up = np.int64(symbol), up, right
            above[width] = left
    return count


# --- quantisers -----------------------------------------------------------------------


@compiled
def quantize(work, step, shift, last, middles, symbols, counts, sums, squares):
    """Quantise magnitudes, and add up what each symbol loses.

    Parameters
    ----------
    work : numpy.ndarray
        float32 or float64, shape (d,).
    step, shift, last : numpy.floating
        Of the type of ``work``: the symbol of x is |x| / step + shift, truncated, at
        most ``last``.
    middles : numpy.ndarray
        float64, shape (1024,): the magnitude that distances of each symbol are taken
        from, four times.
    symbols : numpy.ndarray
        uint8, shape (d,); filled.
    counts, sums, squares : numpy.ndarray
        int64, float64, float64, each of shape (1024,): occurrences of each symbol, sums
        of distances and of their squares. There are four tables, taken in turn, so that
        an addition need not wait for the one before.
    """
    for start in range(0, work.size, 1024):  # a block stays in the cache
        stop = min(start + 1024, work.size)
        for i in range(start, stop):
            symbols[i] = np.uint8(min(abs(work[i]) / step + shift, last))
        for i in range(start, stop):
            at = np.uintp((i & 3) << 8 | np.int64(symbols[i]))
            away = np.float64(abs(work[i])) - middles[at]
            counts[at] += 1
            sums[at] += away
            squares[at] += away * away


@compiled
def round_at_random(work, maps, width, highest, drawn, symbols):
    """Round numbers of steps up or down at random, without bias.

    One number is drawn for each map. The elements of the map are visited row by row, to
    the right and to the left in turn. The number is added to the first. The fraction
    that rounding down takes off is added to the next, and so on; elements with symbol
    255 are left out.
    Each of these fractions is uniform like the drawn number, so that no element has a
    bias. Errors of neighbours cancel in sums with like weights.

    Parameters
    ----------
    work : numpy.ndarray
        float32 or float64, shape (d,).
    maps : tuple[int, int, int]
        Number of maps, their height and their width.
    width : float
        Width of a step.
    highest : float
        Elements of that many steps or more get symbol 255.
    drawn : numpy.ndarray
        float64, shape (maps,): a number from 0 to less than 1 for each map.
    symbols : numpy.ndarray
        uint8, shape (d,); filled with magnitudes in steps.
    """
    number, height, across = maps
    for plane in range(number):
        rest = drawn[plane]
        for y in range(height):
            start = (plane * height + y) * across
            for x in range(across):
                i = start + (across - 1 - x if y & 1 else x)
                steps = np.float64(work[i]) / width
                if abs(steps) >= highest:
                    symbols[i] = 255
                    continue
                steps += rest
                down = np.floor(steps)
                # A tiny negative number plus one is one, which is not less than one.
                rest = min(steps - down, _BELOW_ONE)
                symbols[i] = np.uint8(abs(down))


# --- masks ----------------------------------------------------------------------------


@compiled
def put_mask(mask, levels, total, ones, out):
    """Encode a mask whose number of ones at every level is known.

    Parameters
    ----------
    mask : numpy.ndarray
        uint8, shape (d,): zeros and ones.
    levels : numpy.ndarray
        uint16, shape (d,): level of each element; or shape (0,), all of them level 0.
    total, ones : numpy.ndarray
        int64: elements and ones of each level; counted down to zero.
    out : numpy.ndarray
        uint16; where the words go.

    Returns
    -------
    tuple[int, int, int]
        Low end and size of the interval, number of words; -1 if ``out`` is full.
    """
    low, size, count = 0, WHOLE, 0
    level = 0
    for position in range(mask.size):
        if len(levels):
            level = np.int64(levels[position])
        bit = mask[position] != 0
        left, rest = ones[level], total[level]
        if 0 < left < rest:
            if count + FULL > len(out):
                return low, size, -1
            share = size // rest * left
            low, size, count = _put(low, size, count, out, bit, share)
        ones[level] = left - bit
        total[level] = rest - 1
    return low, size, count


@compiled
def take_mask(mask, levels, total, ones, data):
    """Decode a mask; the inverse of `put_mask`.

    Return the number of words read.
    """
    code, size, count = _first(data), WHOLE, 3
    level = 0
    for position in range(mask.size):
        if len(levels):
            level = np.int64(levels[position])
        left, rest = ones[level], total[level]
        bit = left > 0
        if 0 < left < rest:
            share = size // rest * left
            bit, code, size, count = _take(code, size, count, data, share)
        mask[position] = bit
        ones[level] = left - bit
        total[level] = rest - 1
    return count
