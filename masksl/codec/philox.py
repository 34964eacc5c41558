"""A counter-based random generator: Philox 4x32 with ten rounds.

Every word is a function of a seed, a stream and its index, in integer arithmetic alone.
So two sides that share a seed draw the same words on any machine, and each can draw any
part of them. Floating-point draws are left out on purpose: these may differ between
processors.

References
----------
Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

import numpy as np

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85  # what the two words of the key grow by in a round
_ROUNDS = 10
_BLOCKS = 2**13  # blocks of four words that are drawn together, to stay in the cache
_LOW = np.uint64(0xFFFF_FFFF)
_HALF = np.uint64(32)


def words(seed: int, stream: int, count: int, *, start: int = 0) -> np.ndarray:
    """Draw words of 32 random bits.

    Word i is word i % 4 of the block with the key ``seed`` and the counter
    (i // 4, ``stream``); both are 64 bits of the key and of each half of the counter,
    lower word first.

    Parameters
    ----------
    seed, stream : int
        From 0 to less than 2**64. Different streams of a seed are independent.
    count : int
        Number of words.
    start : int
        Index of the first word, from 0 to less than 2**63.

    Returns
    -------
    numpy.ndarray
        uint32, shape (count,).

    Raises
    ------
    ValueError
        If an argument is out of its range.
    """
    for name, value in (("seed", seed), ("stream", stream)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name}={value!r}: must be from 0 to less than 2**64")
    for name, value in (("count", count), ("start", start)):
        if not 0 <= value < 2**63:
            raise ValueError(f"{name}={value!r}: must be from 0 to less than 2**63")
    first, last = start // 4, -(-(start + count) // 4)
    drawn = np.empty((last - first, 4), np.uint32)
    for begin in range(first, last, _BLOCKS):
        end = min(begin + _BLOCKS, last)
        index = np.arange(begin, end, dtype=np.uint64)
        drawn[begin - first : end - first] = _blocks(seed, stream, index)
    return drawn.reshape(-1)[start % 4 :][:count]


def integers(
    seed: int, stream: int, count: int, bound: int, *, start: int = 0
) -> np.ndarray:
    """Draw whole numbers from 0 to less than a bound.

    Number i is ``word_i * bound >> 32``. The probability of each number is 1 / bound
    to within 2**-32.

    Parameters
    ----------
    seed, stream, count, start
        See `words`.
    bound : int
        1 to 2**32.

    Returns
    -------
    numpy.ndarray
        uint32, shape (count,).
    """
    if not 1 <= bound <= 2**32:
        raise ValueError(f"bound={bound!r}: must be from 1 to 2**32")
    drawn = words(seed, stream, count, start=start).astype(np.uint64)
    drawn *= np.uint64(bound)
    drawn >>= _HALF
    return drawn.astype(np.uint32)


def bits(seed: int, stream: int, count: int) -> np.ndarray:
    """Draw random bits: bit i is bit i % 32 of word i // 32, the lowest first.

    Parameters
    ----------
    seed, stream, count
        See `words`; ``count`` bits.

    Returns
    -------
    numpy.ndarray
        uint8, shape (count,): zeros and ones.
    """
    packed = words(seed, stream, -(-count // 32)).astype("<u4").view(np.uint8)
    return np.unpackbits(packed, bitorder="little", count=count)


def sample(seed: int, stream: int, count: int, population: int) -> np.ndarray:
    """Draw different whole numbers from 0 to less than a bound, all sets equally
    likely.

    Where at most a quarter is drawn, numbers are drawn by `integers`, one after the
    other, and those that came before are left out. Otherwise number i has the key
    ``word_i``, and the numbers of the least keys are drawn, of equal keys the lesser
    numbers. Both are uniform to within 2**-32.

    Parameters
    ----------
    seed, stream
        See `words`.
    count : int
        How many, at most ``population``.
    population : int
        The bound, less than 2**32.

    Returns
    -------
    numpy.ndarray
        int64, shape (count,), ascending.
    """
    if not 0 <= count <= population < 2**32:
        raise ValueError(
            f"count={count!r}: must be from 0 to population={population!r}, "
            "which is less than 2**32"
        )
    if 4 * count > population:
        keys = words(seed, stream, population).astype(np.uint64) << _HALF
        keys |= np.arange(population, dtype=np.uint64)
        if count < population:
            keys = np.partition(keys, count - 1)[:count]
        return np.sort((keys & _LOW).astype(np.int64))
    if not count:
        return np.zeros(0, np.int64)
    drawn = count + count // 4 + 16
    while True:
        numbers = integers(seed, stream, drawn, population)
        different, first = np.unique(numbers, return_index=True)
        if len(different) >= count:
            earliest = np.argsort(first, kind="stable")[:count]
            return np.sort(different[earliest].astype(np.int64))
        drawn *= 2


def _blocks(seed: int, stream: int, index: np.ndarray) -> np.ndarray:
    """Return blocks of four words, uint32, shape (n, 4), for their indices, uint64."""
    key = [seed & 0xFFFF_FFFF, seed >> 32]
    one, two = index & _LOW, index >> _HALF
    three, four = (
        np.full_like(index, half) for half in (stream & 0xFFFF_FFFF, stream >> 32)
    )
    for _ in range(_ROUNDS):
        left, right = one * _MULTIPLIERS[0], three * _MULTIPLIERS[1]
        one = (right >> _HALF) ^ two ^ np.uint64(key[0])
        three = (left >> _HALF) ^ four ^ np.uint64(key[1])
        two, four = right & _LOW, left & _LOW
        key = [(k + w) & 0xFFFF_FFFF for k, w in zip(key, _WEYL, strict=True)]
    return np.stack([one, two, three, four], axis=1).astype(np.uint32)
