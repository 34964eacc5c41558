"""The counter-based generator: published vectors, and what two sides rely on."""

import numpy as np
import pytest

from masksl.codec import philox

# Counter, key and block of Philox 4x32-10, from the Random123 distribution.
VECTORS = [
    ("00000000" * 4, "00000000" * 2, "6627e8d5e169c58dbc57ac4c9b00dbd8"),
    ("ffffffff" * 4, "ffffffff" * 2, "408f276d41c83b0ea20bc7c66d5451fd"),
    (
        "243f6a8885a308d313198a2e03707344",
        "a4093822299f31d0",
        "d16cfe0994fdcceb5001e42024126ea1",
    ),
]


def numbers(text: str) -> list[int]:
    """Return the words of a hexadecimal text."""
    return [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]


@pytest.mark.parametrize(("counter", "key", "block"), VECTORS)
def test_published_vectors(counter: str, key: str, block: str) -> None:
    low, high, stream_low, stream_high = numbers(counter)
    seed_low, seed_high = numbers(key)
    index = np.array([low | high << 32], np.uint64)
    drawn = philox._blocks(
        seed_low | seed_high << 32, stream_low | stream_high << 32, index
    )
    assert drawn.tolist() == [numbers(block)]
    if low | high << 32 < 2**61:
        begin = 4 * (low | high << 32)
        args = seed_low | seed_high << 32, stream_low | stream_high << 32
        assert philox.words(*args, 4, start=begin).tolist() == numbers(block)


def test_any_part_is_the_same_words() -> None:
    whole = philox.words(7, 3, 70_000)
    for start, count in ((0, 0), (0, 1), (1, 4), (3, 7), (32_767, 5), (69_999, 1)):
        part = philox.words(7, 3, count, start=start)
        assert part.dtype == np.uint32
        assert np.array_equal(part, whole[start : start + count])


def test_seeds_and_streams_differ() -> None:
    drawn = {
        philox.words(seed, stream, 4).tobytes()
        for seed in (0, 1, 2**32, 2**64 - 1)
        for stream in (0, 1, 2**32, 2**64 - 1)
    }
    assert len(drawn) == 16


@pytest.mark.parametrize("bound", [1, 2, 3, 10, 1000, 2**31 + 1, 2**32])
def test_integers_are_within_their_bound_and_uniform(bound: int) -> None:
    drawn = philox.integers(11, 0, 200_000, bound)
    exact = [(int(word) * bound) >> 32 for word in philox.words(11, 0, 1000)]
    assert drawn[:1000].tolist() == exact
    assert int(drawn.max()) < bound
    cells = min(bound, 10)
    found = np.bincount(drawn.astype(np.float64) * cells // bound == 0, minlength=2)[1]
    share = (
        len({n for n in range(bound) if n * cells // bound == 0}) / bound
        if (bound <= 1000)
        else 1 / cells
    )
    deviation = np.sqrt(share * (1 - share) / len(drawn))
    assert abs(found / len(drawn) - share) <= 5 * deviation


def test_bits_are_those_of_the_words() -> None:
    word = int(philox.words(5, 9, 3)[2])
    drawn = philox.bits(5, 9, 90)
    assert drawn[64:].tolist() == [word >> place & 1 for place in range(26)]
    assert abs(philox.bits(5, 9, 10**6).mean() - 0.5) < 0.0025
    assert philox.bits(5, 9, 0).size == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((-1, 0, 1), r"seed=-1: must be from 0 to less than 2\*\*64"),
        ((0, 2**64, 1), r"stream=18446744073709551616: must be from 0"),
        ((0, 0, -1), r"count=-1: must be from 0"),
    ],
)
def test_arguments_out_of_range(arguments: tuple[int, int, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        philox.words(*arguments)
    with pytest.raises(ValueError, match=r"bound=0: must be from 1 to 2\*\*32"):
        philox.integers(0, 0, 1, 0)


@pytest.mark.parametrize(
    ("count", "population"),
    [(0, 0), (0, 9), (1, 1), (3, 100), (25, 100), (26, 100), (99, 100), (100, 100)],
)
def test_samples_are_different_numbers_in_order(count: int, population: int) -> None:
    drawn = philox.sample(5, 2, count, population)
    assert drawn.dtype == np.int64 and len(set(drawn.tolist())) == count
    assert sorted(drawn.tolist()) == drawn.tolist()
    assert all(0 <= number < population for number in drawn)
    assert np.array_equal(drawn, philox.sample(5, 2, count, population))


@pytest.mark.parametrize("count", [2, 5])  # drawn one by one, and by keys
def test_samples_are_uniform(count: int) -> None:
    hits = np.zeros(16)
    for seed in range(4000):
        hits[philox.sample(seed, 0, count, 16)] += 1
    share = count / 16
    deviation = (4000 * share * (1 - share)) ** 0.5
    assert np.all(np.abs(hits - 4000 * share) < 4.5 * deviation)


def test_samples_are_those_of_the_words() -> None:
    numbers = philox.integers(7, 1, 40, 1000).tolist()
    first = list(dict.fromkeys(numbers))[:20]
    assert philox.sample(7, 1, 20, 1000).tolist() == sorted(first)
    keys = philox.words(7, 1, 30)
    least = sorted(range(30), key=lambda i: (keys[i], i))[:20]
    assert philox.sample(7, 1, 20, 30).tolist() == sorted(least)
    with pytest.raises(ValueError, match="count=4: must be from 0 to population=3"):
        philox.sample(7, 1, 4, 3)
