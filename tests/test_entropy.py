"""Entropy coding: lossless, as short as the entropy allows, and what it refuses."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masksl import entropy, wire
from masksl.compress import decode, make
from masksl.wire import FrameError


def smooth(shape: tuple[int, ...], seed: int = 0, signed: bool = False) -> torch.Tensor:
    """Return maps whose neighbours are alike, as activations are; after a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).view(1, 1, 3, 3) / 6
    maps = noise.view(-1, 1, *shape[-2:])
    maps = torch.nn.functional.conv2d(maps, kernel, padding=1).view(shape)
    return maps if signed else maps.relu()


@settings(deadline=None, max_examples=150)
@given(
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=5).map(tuple),
    alphabet=st.integers(1, 256),
    skew=st.floats(0.05, 3),
    seed=st.integers(0, 2**32),
)
def test_planes_come_back(
    shape: tuple[int, ...], alphabet: int, skew: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape, dtype=int))
    symbols = np.minimum(rng.exponential(skew, count), alphabet - 1).astype(np.uint8)
    coded = entropy.encode_plane(entropy.Plane(symbols, alphabet, shape))
    decoded = entropy.decode_plane(memoryview(coded), alphabet, shape)
    assert np.array_equal(decoded, symbols)


@pytest.mark.parametrize("context", [entropy.NONE, entropy.COARSE, entropy.FINE])
@pytest.mark.parametrize("groups", [1, 3])
def test_every_kind_of_plan_comes_back(context: int, groups: int) -> None:
    shape = (5, 6, 7, 9)
    symbols = (smooth(shape) * 2).clamp(max=7).to(torch.uint8).numpy().ravel()
    count = groups if context != entropy.NONE else 1
    assigned = (np.arange(6) % count).astype(np.uint8)
    links = (np.arange(entropy._NEIGHBOURS[context] * count) % 5).astype(np.uint8)
    codes = np.full((5, 8), 40, np.uint8)
    plan = entropy.Plan(context, assigned, (1, 2, 3, 1, 2), links, codes, 0, 0)
    coded = entropy.encode_plane(entropy.Plane(symbols, 8, shape), plan)
    assert np.array_equal(entropy.decode_plane(memoryview(coded), 8, shape), symbols)


def order_0(symbols: np.ndarray) -> float:
    """Return the empirical entropy of symbols in bits, all of them together."""
    counts = np.bincount(symbols)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum() * len(symbols))


@pytest.mark.parametrize("kind", ["half-normal", "exponential", "uniform", "maps"])
def test_length_is_the_entropy(kind: str) -> None:
    """Within 3 % of order 0 with one table, 5 % of the conditional one with many."""
    generator = torch.Generator().manual_seed(0)
    shape = (16, 16, 16, 16)
    drawn = {
        "half-normal": torch.randn(shape, generator=generator).abs(),
        "exponential": torch.empty(shape).exponential_(generator=generator),
        "uniform": torch.rand(shape, generator=generator),
        "maps": smooth(shape),
    }[kind]
    frame = make("ec", error=0.25, context="none").encode(drawn)
    header, payload = wire.parse(frame)
    alphabet = header.params[0]
    plane = memoryview(payload)[4 * alphabet :]
    symbols = entropy.decode_plane(plane, alphabet, shape)
    side = 8 * (len(frame) - len(plane)) + 8 * (entropy._HEADER.size + alphabet + 20)
    assert 8 * len(frame) <= 1.03 * order_0(symbols) + side
    plan = entropy.make_plan(entropy.Plane(symbols, alphabet, shape))
    coded = entropy.encode_plane(entropy.Plane(symbols, alphabet, shape), plan)
    assert 8 * len(coded) <= 1.05 * plan.bits + 1.3 * plan.side_bits + 400
    if kind == "maps":
        assert plan.context != entropy.NONE
        assert plan.bits < 0.9 * order_0(symbols)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.1])
def test_gaps_cost_what_random_positions_must(share: float) -> None:
    count = 1_000_000
    rng = np.random.default_rng(0)
    positions = np.flatnonzero(rng.random(count) < share)
    coded = entropy.encode_gaps(positions, count)
    assert coded is not None
    decoded = entropy.decode_gaps(memoryview(coded), len(positions), count)
    assert np.array_equal(decoded, positions)
    p = len(positions) / count
    bound = -count * (p * np.log2(p) + (1 - p) * np.log2(1 - p))
    assert bound * 0.99 < 8 * len(coded) < 1.03 * bound + 8 * 100


def test_gaps_of_every_size() -> None:
    for positions in ([0], [999_999], [0, 999_999], list(range(50)), [7, 8, 500_000]):
        array = np.array(positions)
        coded = entropy.encode_gaps(array, 1_000_000)
        assert coded is not None
        decoded = entropy.decode_gaps(memoryview(coded), len(array), 1_000_000)
        assert decoded.tolist() == positions
    assert entropy.encode_gaps(np.array([2**27]), 2**28) is None


# --- what compressors make of it ------------------------------------------------------


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
        plain = make(name, **options).encode(tensor)
        staged = make(name, **options, lossless=lossless).encode(tensor)
        assert torch.equal(decode(staged), decode(plain))
        assert len(staged) <= len(plain)
    if lossless != "fast":
        tensor = smooth((8, 12, 10, 10))
        plain, staged = (
            make(name, **options, lossless=how).encode(tensor)
            for how in ("none", lossless)
        )
        assert len(staged) < 0.8 * len(plain)


def test_auto_is_the_smallest() -> None:
    tensor = smooth((8, 12, 10, 10))
    sizes = {
        how: len(make("ms", lossless=how).encode(tensor))
        for how in ("none", "fast", "context", "auto")
    }
    assert sizes["auto"] == min(sizes.values())


@pytest.mark.parametrize("target", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("signed", [False, True])
def test_ec_keeps_to_its_budget(target: float, signed: bool) -> None:
    noise = torch.randn(64, 4096)
    for tensor in (
        smooth((32, 16, 16, 16), signed=signed),
        noise if signed else noise.abs(),
    ):
        frame = make("ec", bits=target).encode(tensor)
        assert 8 * len(frame) / tensor.numel() == pytest.approx(target, rel=0.03)


@pytest.mark.parametrize("target", [0.05, 0.25, 0.5])
@pytest.mark.parametrize("signed", [False, True])
def test_ec_keeps_to_its_error(target: float, signed: bool) -> None:
    noise = torch.randn(64, 4096)
    for tensor in (
        smooth((32, 16, 16, 16), signed=signed),
        noise if signed else noise.abs(),
    ):
        decoded = decode(make("ec", error=target).encode(tensor))
        error = float((decoded - tensor).norm() / tensor.norm())
        assert error == pytest.approx(target, rel=0.03)


def test_one_huge_value_does_ec_no_harm() -> None:
    tensor = smooth((16, 16, 16, 16))
    spoiled = tensor.clone()
    spoiled[3, 3, 3, 3] = 1e6
    plain = make("ec", step=0.5).encode(tensor)
    step = 0.5 * float(tensor.std()) / float(spoiled.std())
    frame = make("ec", step=max(step, 1e-4)).encode(spoiled)
    decoded = decode(frame)
    assert decoded[3, 3, 3, 3] == 1e6
    rest = spoiled.clone()
    decoded[3, 3, 3, 3] = rest[3, 3, 3, 3] = 0
    assert (decoded - rest).norm() / rest.norm() < 0.3
    assert len(frame) < 1.5 * len(plain)


def test_context_pays_on_maps_alone() -> None:
    maps, noise = smooth((32, 16, 16, 16)), torch.randn(32, 16, 16, 16).abs()
    for tensor, least in ((maps, 0.5), (noise, 0.99)):
        with_, without = (
            len(make("ec", error=0.2, context=context).encode(tensor))
            for context in ("spatial", "none")
        )
        assert with_ <= without
        assert (with_ < 0.85 * without) == (least < 0.9)


# --- what is refused ------------------------------------------------------------------


def test_broken_planes_are_refused() -> None:
    shape = (4, 3, 8, 8)
    symbols = (smooth(shape) * 2).clamp(max=3).to(torch.uint8).numpy().ravel()
    coded = entropy.encode_plane(entropy.Plane(symbols, 4, shape))
    with pytest.raises(FrameError, match="no header"):
        entropy.decode_plane(memoryview(coded[:5]), 4, shape)
    with pytest.raises(FrameError, match="unknown context"):
        entropy.decode_plane(memoryview(b"\7" + coded[1:]), 4, shape)
    with pytest.raises(FrameError, match="bytes of words"):
        entropy.decode_plane(memoryview(coded[:-1]), 4, shape)
    with pytest.raises(FrameError, match="goes on after its last symbol"):
        entropy.decode_plane(memoryview(coded + b"\1\0\0\0"), 4, shape)
    packed = entropy.deflate(memoryview(bytes(1000)))
    with pytest.raises(FrameError, match="does not hold 999 bytes"):
        entropy.inflate(memoryview(packed), 999)


def test_a_bomb_is_not_inflated() -> None:
    frame = make("ms", sparsity=0.5, lossless="fast").encode(torch.ones(64, 64))
    header, payload = wire.parse(frame)
    bomb = entropy.deflate(memoryview(bytes(2**26)))
    values = bytes(payload[: 4 * 2048])
    parts = [values, bomb]
    crafted = wire.assemble(header, parts)
    with pytest.raises(FrameError, match="does not hold 1024 bytes"):
        decode(crafted)
