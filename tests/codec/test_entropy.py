"""Entropy coding: lossless, as short as the entropy allows, and what it refuses."""

import struct
from pathlib import Path
from typing import Any

import constriction
import hypothesis
import numpy as np
import pytest
import torch
import zstandard
from hypothesis import strategies as st
from torch import nn

from masksl import dataset, model
from masksl.codec import entropy, wire
from masksl.codec.wire import FrameError
from masksl.compress import decode, make
from tests.codec.test_sizes import before_plane, fields_of


def smooth(shape: tuple[int, ...], seed: int = 0, signed: bool = False) -> torch.Tensor:
    """Return maps whose neighbours are alike, as activations are; after a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).view(1, 1, 3, 3) / 6
    maps = noise.view(-1, 1, *shape[-2:])
    maps = torch.nn.functional.conv2d(maps, kernel, padding=1).view(shape)
    return maps if signed else maps.relu()


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(
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


def conditional(contexts: np.ndarray, symbols: np.ndarray) -> float:
    """Return the empirical entropy of symbols given their contexts, in bits."""
    joint = np.bincount(256 * contexts + symbols)
    alike = np.bincount(contexts)
    of_context, of_cell = alike[alike > 0], joint[joint > 0]
    sums = [float((n * np.log2(n)).sum()) for n in (of_context, of_cell)]
    return sums[0] - sums[1]


def contexts_of(
    part: bytes, symbols: np.ndarray, shape: tuple[int, ...]
) -> tuple[np.ndarray, int]:
    """Return the context of every symbol by what a coded plane says, and its words.

    Written out from the layout: 36 left + 9 above + 3 above left + above right, or 4
    left + above, and so many for each group of channels.
    """
    kind, groups, _, *bounds, length = struct.unpack_from("<BBB5BI", part)
    words = part[12 + length :]
    if kind == entropy.NONE:
        return np.zeros(len(symbols), int), len(words)
    side = zstandard.ZstdDecompressor().decompress(part[12:][:length])
    group = np.zeros(shape[1], int)
    if groups > 1:
        group = np.frombuffer(side[: shape[1]], np.uint8).astype(int)
    maps = np.pad(symbols.reshape(shape).astype(int), ((0, 0), (0, 0), (1, 0), (1, 1)))
    four, three = (
        (maps[..., None] >= np.array(least)).sum(-1)
        for least in (bounds[:3], bounds[3:])
    )
    for edges in (four, three):
        edges[:, :, 0] = edges[:, :, :, 0] = edges[:, :, :, -1] = 0
    context = 4 * four[:, :, 1:, :-2] + four[:, :, :-1, 1:-1]
    if kind == entropy.FINE:
        corners = 3 * three[:, :, :-1, :-2] + three[:, :, :-1, 2:]
        context = 9 * context + corners
    context += (144 if kind == entropy.FINE else 16) * group[:, None, None]
    return context.ravel(), len(words)


def check_lengths(tensor: torch.Tensor, error: float) -> dict[str, int]:
    """Hold frames of `ec` against the entropy of their symbols; return their sizes."""
    shape, sizes = tuple(tensor.shape), {}
    for context, share in (("none", 1.03), ("spatial", 1.05)):
        frame = make("ec", error=error, context=context).encode(tensor)
        header, payload = wire.parse(frame)
        alphabet, *_, length, signs = fields_of(header)
        part = bytes(payload[before_plane(header) :][:length])
        symbols = entropy.decode_plane(memoryview(part), alphabet, shape)
        contexts, words = contexts_of(part, symbols, shape)
        assert context == "spatial" or not contexts.any()
        side = 8 * (len(frame) - words)  # all but the coder's words
        bound = conditional(contexts, symbols)
        assert 0.999 * bound < 8 * words + 64  # rare bytes are rounded up
        assert 8 * len(frame) <= share * bound + side
        assert side - signs < 0.02 * 8 * len(frame)
        assert bound <= conditional(np.zeros_like(contexts), symbols)
        sizes[context] = len(frame)
    return sizes


@pytest.mark.parametrize("kind", ["half-normal", "exponential", "uniform", "maps"])
@pytest.mark.parametrize("error", [0.05, 0.25])
def test_length_is_the_entropy(kind: str, error: float) -> None:
    """Within 3 % of order 0 with one table, 5 % of the conditional one with many."""
    shape = (64, 16, 16, 16)
    drawn = {
        "half-normal": torch.randn(shape).abs(),
        "exponential": torch.empty(shape).exponential_(),
        "uniform": torch.rand(shape),
        "maps": smooth(shape),
    }[kind]
    sizes = check_lengths(drawn, error)
    if kind == "maps":
        assert sizes["spatial"] < 0.9 * sizes["none"]
    else:
        assert sizes["spatial"] == sizes["none"]
        check_lengths(drawn * torch.randn(shape).sign(), error)


@pytest.fixture(scope="module")
def real_activation(data_root: Path) -> torch.Tensor:
    """Return the activation of 256 CIFAR-10 images after some steps on others."""
    data = dataset.load(dataset.DatasetConfig(name="cifar10", root=str(data_root)))
    network = nn.Sequential(*model.build("small_cnn", 10, 3, seed=0)).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for start in range(256, 256 + 20 * 64, 64):
        images, labels = data.train_batch(torch.arange(start, start + 64), generator)
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, _ = data.train_batch(torch.arange(256), generator)
    return network[0](images).detach()


@pytest.mark.parametrize("error", [0.05, 0.25])
def test_length_is_the_entropy_of_real_activations(
    real_activation: torch.Tensor, error: float
) -> None:
    sizes = check_lengths(real_activation, error)
    assert sizes["spatial"] < 0.8 * sizes["none"]


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.1])
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
        assert 0.99 * bound < 8 * coded < 1.03 * bound


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


@pytest.mark.parametrize("target", [0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 16.0])
@pytest.mark.parametrize("signed", [False, True])
def test_ec_keeps_to_its_budget(target: float, signed: bool) -> None:
    noise = torch.randn(64, 4096)
    for tensor in (
        smooth((32, 16, 16, 16), signed=signed),
        noise if signed else noise.abs(),
        smooth((32, 16, 16, 16), signed=signed) ** 5,  # most are far below the largest
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
    with pytest.raises(FrameError, match="ends in a word of zeros"):
        entropy.decode_plane(memoryview(coded + b"\0\0\0\0"), 4, shape)
    packed = entropy.deflate(memoryview(bytes(1000)))
    with pytest.raises(FrameError, match="does not hold 999 bytes"):
        entropy.inflate(memoryview(packed), 999)


def test_symbols_must_be_in_the_table() -> None:
    """A packed byte may say of a symbol that it is above all that the table has."""
    codes = np.array([24, 24, 30, 255, 255], np.uint8)
    packed = zstandard.ZstdCompressor().compress(b"\0" + codes.tobytes())
    head = entropy._HEADER.pack(0, 1, 1, *(1, 2, 3, 1, 2), len(packed))
    model = entropy._packed_model(entropy._weights(codes[None])[0], 2)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(np.array([0b00011011, 0b01010101], np.int32), model)
    coded = head + packed + coder.get_compressed().astype("<u4").tobytes()
    with pytest.raises(FrameError, match="symbols that its table does not"):
        entropy.decode_plane(memoryview(coded), 5, (8,))


def test_a_bomb_is_not_inflated() -> None:
    frame = make("ms", sparsity=0.5, lossless="fast").encode(torch.ones(64, 64))
    header, payload = wire.parse(frame)
    bomb = entropy.deflate(memoryview(bytes(2**26)))
    values = bytes(payload[: 4 * 2048])
    parts = [values, bomb]
    crafted = wire.assemble(header, parts)
    with pytest.raises(FrameError, match="does not hold 1024 bytes"):
        decode(crafted)
