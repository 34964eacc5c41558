"""The entropy coder: lossless, compiled as in plain Python, and what it refuses."""

# pylint: disable=protected-access

import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import hypothesis
import numba
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from masksl.codec import coder, kernels, wire
from masksl.codec.gaps import encode_gaps, gap_blocks
from masksl.codec.wire import FrameError
from masksl.compress import decode, make
from tests.codec import reference_decoder
from tests.conftest import ROOT

Shape = tuple[int, ...]
NO_LEVELS = np.zeros(0, np.uint16)


def plainloops() -> ModuleType:
    """Return the loops as plain Python: their file, loaded without Numba's compiler."""
    spec = importlib.util.spec_from_file_location("plain_kernels", kernels.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(numba.config, "DISABLE_JIT", True):
        spec.loader.exec_module(module)
    return module


PLAIN = plainloops()


@contextmanager
def plain() -> Iterator[None]:
    """Let the coder run in plain Python."""
    with mock.patch.object(coder, "loops", lambda: PLAIN):
        yield


def drawn(count: int, alphabet: int, skew: float, seed: int) -> np.ndarray:
    """Return symbols, most of them small where ``skew`` is."""
    rng = np.random.default_rng(seed)
    large = rng.exponential(skew, count)
    return np.minimum(large, alphabet - 1).astype(np.uint8)


def test_the_plain_loops_are_not_compiled() -> None:
    assert hasattr(kernels.put_plane, "stats")
    assert not hasattr(PLAIN.put_plane, "stats")
    assert not hasattr(PLAIN._put, "py_func")


def smooth(shape: Shape, seed: int = 0, signed: bool = False) -> torch.Tensor:
    """Return maps whose neighbours are alike, as activations are; after a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).view(1, 1, 3, 3) / 6
    maps = noise.view(-1, 1, *shape[-2:])
    maps = torch.nn.functional.conv2d(maps, kernel, padding=1).view(shape)
    return maps if signed else maps.relu()


# --- planes come back -----------------------------------------------------------------


def check_plane(symbols: np.ndarray, alphabet: int, shape: Shape) -> bytes:
    """Encode and decode, compiled and plain, each what the other wrote."""
    coded = coder.encode_plane(symbols, alphabet, shape)
    found = coder.decode_plane(memoryview(coded), alphabet, shape)
    assert found.dtype == np.uint8 and np.array_equal(found, symbols)
    with plain():
        assert coder.encode_plane(symbols, alphabet, shape) == coded
        again = coder.decode_plane(memoryview(coded), alphabet, shape)
    assert np.array_equal(again, symbols)
    return coded


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=5).map(tuple),
    alphabet=st.one_of(st.integers(1, 16), st.integers(1, 256)),
    skew=st.sampled_from([0.02, 0.3, 1.0, 3.0, 12.0, 80.0]),
    seed=st.integers(0, 2**32),
)
def test_planes_come_back(shape: Shape, alphabet: int, skew: float, seed: int) -> None:
    """In both kinds of loops, and by a decoder written from docs/coding.md alone."""
    symbols = drawn(math.prod(shape), alphabet, skew, seed)
    coded = check_plane(symbols, alphabet, shape)
    assert reference_decoder.plane(coded, alphabet, shape) == symbols.tolist()


@pytest.mark.parametrize("symbol", [0, 1, 11, 12, 13, 255])
@pytest.mark.parametrize("alphabet", [1, 2, 12, 13, 14, 256])
def test_constant_planes_are_a_few_bytes(symbol: int, alphabet: int) -> None:
    for shape in ((), (300,), (2, 3, 10, 10)):
        symbols = np.full(math.prod(shape), min(symbol, alphabet - 1), np.uint8)
        coded = check_plane(symbols, alphabet, shape)
        assert reference_decoder.plane(coded, alphabet, shape) == symbols.tolist()
        assert len(coded) < 24 + 60 * (symbol > 12)


@pytest.mark.parametrize("unary", [0, 1, 5, 12])
@pytest.mark.parametrize("channels", [2, 40])
def test_every_number_of_unary_decisions_comes_back(unary: int, channels: int) -> None:
    """With contexts of every channel, and where there are too many for it."""
    shape = (2, channels, 9, 11)
    apart = coder._maps(shape, unary)[-1]
    assert apart == (0 if 50 * unary * channels > math.prod(shape) else 25 * unary)
    symbols = drawn(math.prod(shape), 200, 4.0, unary)
    coded = coder._encoded(symbols, 200, shape, unary)
    assert coded[0] == unary
    found = coder.decode_plane(memoryview(coded), 200, shape)
    assert np.array_equal(found, symbols)
    assert reference_decoder.plane(coded, 200, shape) == symbols.tolist()
    with plain():
        assert coder._encoded(symbols, 200, shape, unary) == coded


def test_channels_have_contexts_of_their_own_where_they_are_large() -> None:
    """By the page: two channels, u = 1: from 100 elements on."""
    assert coder._maps((2, 2, 5, 5), 1)[-1] == 25
    assert coder._maps((1, 2, 9, 5), 1)[-1] == 0
    for shape in ((2, 2, 5, 5), (1, 2, 9, 5)):
        symbols = drawn(math.prod(shape), 2, 1.0, 3)
        coded = check_plane(symbols, 2, shape)
        assert reference_decoder.plane(coded, 2, shape) == symbols.tolist()


SIZES: list[Shape] = [
    *((1,), (2,), (17,), (1, 1), (31, 33), (3, 7, 19), (5, 3, 26, 26)),
    (2, 2, 3, 40, 50),
    (10**6,),
    (10, 10, 100, 100),
]


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("skew", [0.3, 30.0])
def test_planes_of_every_size_come_back(shape: Shape, skew: float) -> None:
    count = math.prod(shape)
    symbols = drawn(count, 256, skew, 1)
    symbols[count // 3 : count // 2] = 0  # contexts that no other symbol comes to
    if count < 10**5:
        check_plane(symbols, 256, shape)
        return
    coded = coder.encode_plane(symbols, 256, shape)
    assert np.array_equal(coder.decode_plane(memoryview(coded), 256, shape), symbols)


@pytest.mark.parametrize("shape", [(9000,), (3, 60, 50)])
@pytest.mark.parametrize("unary", [0, 12])
def test_probabilities_are_updated_until_their_limits(shape: Shape, unary: int) -> None:
    """More than 1023 times in one context, by the page."""
    symbols = drawn(9000, 256, 2.0 if unary else 20.0, 5) + unary
    coded = coder._encoded(symbols, 256, shape, unary)
    assert reference_decoder.plane(coded, 256, shape) == symbols.tolist()


@pytest.mark.slow
def test_a_million_symbols_in_plain_python() -> None:
    shape = (10, 10, 100, 100)
    coded = check_plane(drawn(10**6, 256, 0.3, 1), 256, shape)
    assert coded[0] == 12


# --- masks come back ------------------------------------------------------------------


def check_mask(mask: np.ndarray, levels: np.ndarray) -> bytes:
    """Encode and decode a mask, compiled and plain."""
    number = int(levels.max()) + 1 if len(levels) else 1
    at = levels[mask > 0] if len(levels) else np.zeros(int(mask.sum()), np.uint16)
    ones = np.bincount(at, minlength=number)
    before = ones.copy()
    coded = coder.encode_mask(mask, levels, ones)
    found = coder.decode_mask(memoryview(coded), levels, ones, len(mask))
    assert np.array_equal(found, mask)
    with plain():
        assert coder.encode_mask(mask, levels, ones) == coded
        again = coder.decode_mask(memoryview(coded), levels, ones, len(mask))
    assert np.array_equal(again, mask)
    assert np.array_equal(ones, before)
    return coded


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(
    count=st.integers(1, 900),
    share=st.sampled_from([0.0, 0.001, 0.1, 0.5, 0.9, 0.999, 1.0]),
    number=st.sampled_from([0, 1, 2, 11, 65536]),
    seed=st.integers(0, 2**32),
)
def test_masks_come_back(count: int, share: float, number: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, number, count).astype(np.uint16) if number else NO_LEVELS
    mask = (rng.random(count) < share).astype(np.uint8)
    check_mask(mask, levels)


@pytest.mark.parametrize("count", [10**5, 2**24])
@pytest.mark.parametrize("ones", [1, 2, 40])
@pytest.mark.parametrize("place", [0.0, 1e-4, 0.3, 1.0])
def test_ones_rarer_than_a_word_tells_come_back(
    count: int, ones: int, place: float
) -> None:
    """Six of more than 16 bits each, then a zero, and so on."""
    steps = np.arange(ones) + np.arange(ones) // 6
    mask = np.zeros(count, np.uint8)
    mask[int(place * (count - 1 - steps[-1])) + steps] = 1
    number = np.array([ones])
    for each, k in ((mask, number), (1 - mask, count - number)):
        coded = coder.encode_mask(each, NO_LEVELS, k)
        found = coder.decode_mask(memoryview(coded), NO_LEVELS, k, count)
        assert np.array_equal(found, each)
        rounded = count**2 / 2**40  # bits that the rounding of shares may cost
        assert 8 * len(coded) <= math.log2(math.comb(count, ones)) + 16 + rounded


def test_rare_ones_come_back_in_plain_python() -> None:
    """Where two words leave the interval at once, as the page has it."""
    mask = np.zeros(400_000, np.uint8)
    mask[[1000, 1001, 1002, 1004]] = 1
    coded = check_mask(mask, NO_LEVELS)
    levels = [0] * len(mask)
    count = bytes([4])
    assert reference_decoder.coded_mask(count + coded, levels) == mask.tolist()


# --- the interval ---------------------------------------------------------------------


class Exact:
    """The same interval with a low end of as many bits as it takes."""

    def __init__(self) -> None:
        self.low, self.size, self.shifts = 0, 2**48, 0

    def put(self, bit: bool, share: int) -> None:
        if bit:
            self.size = share
        else:
            self.low, self.size = self.low + share, self.size - share
        while self.size < 2**32:
            self.low, self.size = self.low << 16, self.size << 16
            self.shifts += 1


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("steps", [100, 1000, 20_000])
def test_carries_run_through_all_words(up: bool, steps: int) -> None:
    """An interval that holds one half until a last decision is below or above it.

    Until then the words are 7FFF FFFF ...; above, the carry makes them 8000 0000 ...
    """
    rng = np.random.default_rng(steps)
    exact, out = Exact(), np.zeros(steps + 16, np.uint16)
    low, size, count = 0, PLAIN.WHOLE, 0
    for _ in range(steps):
        share = (size >> 16) * int(rng.integers(16, 65521))
        half = 1 << (47 + 16 * exact.shifts)
        bit = exact.low + share > half
        exact.put(bit, share)
        low, size, count = PLAIN._put(low, size, count, out, bit, share)
    assert count > steps // 32
    assert out[:count].tolist() == [0x7FFF, *[0xFFFF] * (count - 1)]
    # Now to one side of the half, and on until every carry has been made.
    half = 1 << (47 + 16 * exact.shifts)
    share = half - exact.low
    exact.put(not up, share)
    low, size, count = PLAIN._put(low, size, count, out, not up, share)
    for _ in range(8):
        share = (size >> 16) << 8
        exact.put(True, share)
        low, size, count = PLAIN._put(low, size, count, out, True, share)
    coded = coder._finished(out, count, low, size)
    assert (exact.size, exact.shifts) == (size, count)
    digits = 2 * (exact.shifts + 3)
    assert exact.low < 1 << (8 * digits)
    number = int.from_bytes(coded.ljust(digits, b"\0"), "big")
    assert exact.low <= number < exact.low + exact.size
    assert coded[0] == (0x80 if up else 0x7F)
    assert set(coded[1 : 2 * (count - 4)]) <= {0x00 if up else 0xFF}


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("words", [4, 300])
def test_carries_come_back_in_masks(words: int, carry: bool) -> None:
    """What decodes a payload just above or below one half encodes to its words."""
    count = 12 * 16 * words
    payload, ones = near_half(words, carry), np.array([count // 7 * 3])
    mask = coder.decode_mask(memoryview(payload), NO_LEVELS, ones, count)
    coded = coder.encode_mask(mask, NO_LEVELS, ones)
    assert coded[: 2 * words - 4] == payload[: 2 * words - 4]
    found = coder.decode_mask(memoryview(coded), NO_LEVELS, ones, count)
    assert np.array_equal(found, mask)


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("unary", [1, 3, 12])
def test_carries_come_back_in_planes(unary: int, carry: bool) -> None:
    """Likewise; its symbols are soon the same, so that a word takes very many."""
    words, shape = 8, (2**21,)
    payload = near_half(words, carry)
    start = bytes([unary])
    symbols = coder.decode_plane(memoryview(start + payload), unary + 1, shape)
    coded = coder._encoded(symbols, unary + 1, shape, unary)
    assert coded[: 2 * words - 3] == start + payload[: 2 * words - 4]
    found = coder.decode_plane(memoryview(coded), unary + 1, shape)
    assert np.array_equal(found, symbols)


def near_half(words: int, above: bool) -> bytes:
    """Return the bytes of a number just above or below one half."""
    if above:
        return b"\x80" + bytes(2 * words - 2) + b"\1"
    return b"\x7f" + b"\xff" * (2 * words - 1)


@hypothesis.given(
    low=st.integers(0, 2**48 - 1),
    size=st.integers(2**32, 2**48),
    words=st.lists(st.sampled_from([0, 1, 0x8000, 0xFFFF]), max_size=5),
)
def test_the_shortest_number_of_the_interval_is_written(
    low: int, size: int, words: list[int]
) -> None:
    out = np.array(words, np.uint16)
    whole = 1 << (16 * len(words) + 48)
    start = (int.from_bytes(out.astype(">u2").tobytes(), "big") << 48) + low
    hypothesis.assume(start + size <= whole)
    coded = coder._finished(out, len(words), low, size)
    number = int.from_bytes(coded.ljust(2 * len(words) + 6, b"\0"), "big")
    assert start <= number < start + size
    assert not coded.endswith(b"\0")
    step = (number & -number) << 1 if number else whole
    assert -(-start // step) * step >= start + size or not number


def test_symbols_on_the_side_of_zero_take_no_bytes() -> None:
    """The low end stays zero, and zeros at the end are not sent."""
    ones = np.ones(5000, np.uint8)
    for shape in ((5000,), (2, 25, 10, 10)):
        coded = coder.encode_plane(ones, 2, shape)
        assert coded == b"\1"
        assert coder.decode_plane(memoryview(coded), 2, shape).tolist() == [1] * 5000
    assert coder.encode_mask(ones, NO_LEVELS, np.array([5000])) == b""
    first = np.repeat(np.array([1, 0], np.uint8), 500)
    assert coder.encode_mask(first, NO_LEVELS, np.array([500])) == b""


@pytest.mark.parametrize("shape", [(1000, 256), (10, 100, 16, 16)])
def test_a_small_part_is_encoded_for_comparison(
    shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, sizes = coder._encoded, []

    def counting(symbols: np.ndarray, alphabet: int, own: Shape, unary: int) -> bytes:
        sizes.append(len(symbols))
        assert math.prod(own) == len(symbols) and own[-1] == shape[-1]
        return encoded(symbols, alphabet, own, unary)

    monkeypatch.setattr(coder, "_encoded", counting)
    symbols = drawn(256_000, 256, 3, 0)
    coder.encode_plane(symbols, 256, shape)
    assert sizes == [8192, 4096, 8192, 4096, 256_000]


def test_planes_that_need_more_room_than_was_made_get_it() -> None:
    rng = np.random.default_rng(0)
    symbols = rng.integers(0, 256, 50_000).astype(np.uint8)
    arguments = coder._arguments(0, 256, (50_000,))
    out = np.empty(len(symbols) // 2 + 64, np.uint16)
    assert kernels.put_plane(symbols, *arguments, out)[2] == -1
    coded = coder.encode_plane(symbols, 256, (50_000,))
    found = coder.decode_plane(memoryview(coded), 256, (50_000,))
    assert np.array_equal(found, symbols)
    assert 50_000 < len(coded) < 1.06 * 50_000


def test_loops_stop_where_the_room_ends() -> None:
    """No word is written beyond it: what follows stays as it was."""
    symbols = np.random.default_rng(0).integers(0, 256, 3000).astype(np.uint8)
    bits = symbols & 1
    for room in (0, 1, 32, 33, 100):
        for loops in (kernels, PLAIN):
            guarded = np.full(room + 64, 7, np.uint16)
            arguments = coder._arguments(12, 256, (3000,))
            put = loops.put_plane(symbols, *arguments, guarded[:room])
            assert put[2] == -1 and set(guarded[room:]) == {7}
            total, ones = np.array([3000]), np.array([int(bits.sum())])
            put = loops.put_mask(bits, NO_LEVELS, total, ones, guarded[:room])
            assert put[2] == -1 and set(guarded[room:]) == {7}


# --- gaps and lossless stages ---------------------------------------------------------


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.1, 0.3])
def test_gaps_cost_what_random_positions_must(share: float) -> None:
    """All of a frame beside its header and its values, at the size of the paper."""
    count, rng = 256 * 64 * 16 * 16, np.random.default_rng(0)
    positions = np.flatnonzero(rng.random(count) < share)
    p = len(positions) / count
    sparsity = 1 - (len(positions) + 0.5) / count
    bound = -count * (p * np.log2(p) + (1 - p) * np.log2(1 - p))
    tensor = torch.zeros(256, 64, 16, 16)
    tensor.view(-1)[torch.from_numpy(positions)] = 1.0
    for name in ("sp", "rt"):
        compressor = make(name, sparsity=sparsity, positions="auto")
        frame = compressor.encode(tensor, training=False)
        assert torch.equal(decode(frame), tensor)
        coded = len(frame) - (44 + 11) - 4 * len(positions)
        assert 0.99 * bound < 8 * coded < 1.02 * bound


def test_gaps_of_every_size() -> None:
    for positions in ([0], [999_999], [0, 999_999], list(range(50)), [7, 8, 500_000]):
        array = np.array(positions)
        coded = encode_gaps(array, 1_000_000)
        assert coded is not None
        decoded = np.concatenate(
            [*gap_blocks(memoryview(coded), len(array), 1_000_000)]
        )
        assert decoded.tolist() == positions
        assert reference_decoder.gaps(coded, len(array)) == positions
    assert encode_gaps(np.array([2**27]), 2**28) is None


@hypothesis.settings(deadline=None)
@hypothesis.given(
    st.sets(st.integers(0, 2**18), min_size=1, max_size=80), st.integers(1, 2**22)
)
def test_gaps_are_those_of_the_page(chosen: set[int], more: int) -> None:
    positions = np.array(sorted(chosen))
    count = int(positions[-1]) + more
    coded = encode_gaps(positions, count)
    assert coded is not None
    decoded = np.concatenate([*gap_blocks(memoryview(coded), len(positions), count)])
    assert np.array_equal(decoded, positions)
    assert reference_decoder.gaps(coded, len(positions)) == positions.tolist()


def test_broken_gaps_are_refused() -> None:
    positions = np.arange(0, 40_000, 400)
    coded = encode_gaps(positions, 40_000)
    assert coded is not None and coded[0] > 0
    for broken, message in (
        (coded[:6], "of 6 bytes have no header"),
        (b"\x11" + coded[1:], "with 17 low bits"),
        (coded[:1] + b"\0\0" + coded[3:], "coded gaps with"),
        (coded[:1] + b"\1\1" + coded[3:], "coded gaps with"),
        (coded + b"\1", "coded gaps with"),
        (coded[:-1], "coded gaps with"),
    ):
        with pytest.raises(FrameError, match=message):
            gap_blocks(memoryview(broken), 100, 40_000)
    with pytest.raises(FrameError, match="reach 39600 of 39600 elements"):
        gap_blocks(memoryview(coded), 100, 39_600)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ms", {"sparsity": 0.95}),
        ("qu", {"bits": 3}),
        ("qq", {"bits": 3}),
        ("fp", {}),
        ("sp", {"sparsity": 0.95}),
    ],
)
@pytest.mark.parametrize("lossless", ["fast", "context", "auto"])
def test_lossless_stages_change_the_size_alone(
    name: str, options: Any, lossless: str
) -> None:
    for tensor in (smooth((8, 12, 10, 10)), torch.randn(3, 50)):
        plain_frame = make(name, **options).encode(tensor)
        staged = make(name, **options, lossless=lossless).encode(tensor)
        assert torch.equal(decode(staged), decode(plain_frame))
        assert len(staged) <= len(plain_frame)
    if lossless != "fast":
        tensor = smooth((8, 12, 10, 10))
        plain_frame, staged = (
            make(name, **options, lossless=how).encode(tensor)
            for how in ("none", lossless)
        )
        assert len(staged) < 0.8 * len(plain_frame)


def test_auto_is_the_smallest() -> None:
    tensor = smooth((8, 12, 10, 10))
    sizes = {
        how: len(make("ms", lossless=how).encode(tensor))
        for how in ("none", "fast", "context", "auto")
    }
    assert sizes["auto"] == min(sizes.values())


# --- what is refused ------------------------------------------------------------------


def test_broken_planes_are_refused() -> None:
    shape = (4, 3, 8, 8)
    symbols = drawn(math.prod(shape), 4, 1.0, 0)
    coded = coder.encode_plane(symbols, 4, shape)
    assert coded[0] == 3
    for broken, message in (
        (b"", "coded plane of 0 bytes has no valid header"),
        (b"\4" + coded[1:], "has no valid header"),
        (coded + b"\0", "ends in a byte of zero"),
        (coded + bytes(7), "ends in a byte of zero"),
        (coded[:1] + b"\0", "ends in a byte of zero"),
        (coded + b"\0\0\0\0\0\0\1", "goes on after its last symbol"),
    ):
        with pytest.raises(FrameError, match=message):
            coder.decode_plane(memoryview(broken), 4, shape)
    for alphabet, most in ((256, 12), (13, 12), (12, 11), (1, 0)):
        with pytest.raises(FrameError, match="has no valid header"):
            coder.decode_plane(memoryview(bytes([most + 1])), alphabet, shape)


def test_every_word_must_be_used() -> None:
    """At most two words are read beyond those that decisions call for."""
    symbols = np.random.default_rng(0).integers(0, 2, 4000).astype(np.uint8)
    coded = coder.encode_plane(symbols, 2, (4000,))
    words = -(-(len(coded) - 1) // 2)
    longer = memoryview(coded.ljust(1 + 2 * words, b"\0") + b"\0\0\0\0\0\1")
    for loops in (kernels, PLAIN):
        with mock.patch.object(coder, "loops", lambda loops=loops: loops):
            with pytest.raises(FrameError, match="goes on after its last symbol"):
                coder.decode_plane(longer, 2, (4000,))


@pytest.mark.parametrize("alphabet", [5, 30, 199])
def test_symbols_must_be_in_the_alphabet(alphabet: int) -> None:
    symbols = np.array([0, 1, 2, 199, 3], np.uint8)
    coded = coder._encoded(symbols, 256, (5,), 2)
    message = f"symbols beyond its {alphabet}$"
    with pytest.raises(FrameError, match=message):
        coder.decode_plane(memoryview(coded), alphabet, (5,))
    with plain(), pytest.raises(FrameError, match=message):
        coder.decode_plane(memoryview(coded), alphabet, (5,))
    coder.decode_plane(memoryview(coded), 200, (5,))


@pytest.mark.parametrize("unary", [0, 3, 12])
def test_symbols_beyond_a_byte_are_refused(unary: int) -> None:
    """Bytes of zero make every decision a one: an escape of the value 511."""
    for loops in (kernels, PLAIN):
        with mock.patch.object(coder, "loops", lambda loops=loops: loops):
            with pytest.raises(FrameError, match="symbols beyond its 256"):
                coder.decode_plane(memoryview(bytes([unary])), 256, (4, 4))


def test_broken_masks_are_refused() -> None:
    mask = np.random.default_rng(0).integers(0, 2, 500).astype(np.uint8)
    ones = np.array([int(mask.sum())])
    coded = coder.encode_mask(mask, NO_LEVELS, ones)
    with pytest.raises(FrameError, match="ends in a byte of zero"):
        coder.decode_mask(memoryview(coded + b"\0"), NO_LEVELS, ones, 500)
    with pytest.raises(FrameError, match="goes on after its last symbol"):
        longer = memoryview(coded + b"\1" * 8)
        coder.decode_mask(longer, NO_LEVELS, ones, 500)
    with pytest.raises(FrameError, match="declares 501 ones among 500 elements"):
        coder.decode_mask(memoryview(coded), NO_LEVELS, np.array([501]), 500)


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(
    payload=st.binary(max_size=120),
    shape=st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple),
    alphabet=st.integers(1, 256),
)
def test_any_bytes_are_a_plane_or_refused(
    payload: bytes, shape: Shape, alphabet: int
) -> None:
    """Compiled and plain agree; no word is read that is not there."""
    results = []
    for loops in (kernels, PLAIN):
        with mock.patch.object(coder, "loops", lambda loops=loops: loops):
            try:
                found = coder.decode_plane(memoryview(payload), alphabet, shape)
            except FrameError as error:
                results.append(str(error))
                continue
            assert found.shape == (math.prod(shape),) and found.max() < alphabet
            results.append(found.tolist())
    assert results[0] == results[1]


def test_forms_of_an_earlier_version_are_refused() -> None:
    tensor = torch.randn(4, 3, 16, 16)
    for name, options, place, form in (
        ("qu", {"bits": 3, "lossless": "context"}, 1, 2),
        ("sp", {"sparsity": 0.99, "positions": "auto"}, 10, 17),
    ):
        header, payload = wire.parse(make(name, **options).encode(tensor))
        params = bytearray(header.params)
        assert params[place] in (3, 18)
        params[place] = form
        old = wire.Header(name, header.dtype, header.shape, bytes(params))
        frame = wire.assemble(old, [bytes(payload)])
        with pytest.raises(FrameError) as caught:
            decode(frame)
        assert str(caught.value) == (
            f"{name} frame has a part of form {form}, of an earlier version"
        )


def test_frames_of_too_many_elements_are_refused_before_they_are_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A byte may claim maps of any size; who knows how many to expect says so."""
    params = make("ec")._PARAMS.pack(3, 1, 0, 0, 1, 0)  # type: ignore[attr-defined]
    header = wire.Header("ec", torch.float32, (1, 1, 8192, 8192), params)
    frame = wire.assemble(header, [bytes(4), b"\0"])
    assert len(frame) < 80
    monkeypatch.setattr(coder, "loops", lambda: pytest.fail("a loop is run"))
    with pytest.raises(FrameError, match="declares 67108864 elements, not 1 to 65536"):
        decode(frame, max_elements=2**16)


# --- compiled once --------------------------------------------------------------------

FIRST_USE = """
import logging, sys
logging.basicConfig(format="%(message)s", stream=sys.stdout)
from masksl.compress import make
make("ec").warm_up()
"""


@pytest.mark.slow
def test_the_loops_are_compiled_once_and_a_line_says_so(tmp_path: Path) -> None:
    compiled, loaded, plain_ = (
        subprocess.run(
            [sys.executable, "-c", FIRST_USE],
            cwd=ROOT,
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), **more},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for more in ({}, {}, {"NUMBA_DISABLE_JIT": "1"})
    )
    assert re.fullmatch(r"entropy coding was compiled in \d+\.\d s, once\n", compiled)
    assert loaded == ""
    assert plain_ == "entropy coding runs as plain Python, which is very slow\n"


@pytest.mark.slow
def test_without_a_place_to_keep_them_the_loops_are_compiled(tmp_path: Path) -> None:
    """In a package that cannot be written to, and without a home."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "masksl", tmp_path / "masksl", ignore=ignore)
    (tmp_path / "masksl/codec/__pycache__").touch()
    homeless = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null"}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **homeless},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("s, for this process alone: set NUMBA_CACHE_DIR\n")


def test_a_compressor_that_codes_nothing_loads_no_compiler() -> None:
    code = "import sys; from masksl.compress import make; make('ms').warm_up(); "
    code += "sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
