"""SPSIGN: signs, few magnitudes, and positions coded by their neighbours."""

import itertools
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from masksl.codec import wire
from masksl.codec.spsign import lloyd, picture_of
from masksl.compress import FrameError, decode, decode_sparse, make
from tests.codec import reference_frames
from tests.codec.test_wire import reseal


def weights(units: int, channels: int, side: int) -> torch.Tensor:
    """Return updates that are large where the pictures are bright, in their middle."""
    axis = torch.linspace(-2, 2, side)
    bright = torch.exp(-(axis[:, None] ** 2) - axis**2)
    bright = bright.repeat(channels, 1, 1).view(-1)
    return torch.randn(units, channels * side * side) * bright * torch.rand(units, 1)


def squared(values: np.ndarray, number: int) -> float:
    centroids, nearest = lloyd(values, number)
    return float(((centroids[nearest] - values) ** 2).sum())


@given(
    values=st.lists(st.floats(0, 1e6), min_size=1, max_size=60),
    number=st.sampled_from([1, 2, 4]),
)
def test_each_value_has_the_nearest_magnitude(values: list[float], number: int) -> None:
    given = np.array(values)
    centroids, nearest = lloyd(given, number)
    assert len(centroids) == number and np.all(np.diff(centroids) >= 0)
    distances = np.abs(centroids[:, None] - given)
    assert np.all(
        distances[nearest, range(len(given))] <= distances.min(0) * (1 + 1e-9)
    )
    assert abs(centroids[nearest].mean() - given.mean()) <= 1e-9 * given.max() + 1e-12
    order = np.random.default_rng(0).permutation(len(given))
    again, _ = lloyd(given[order], number)
    assert np.array_equal(again, centroids)  # of equal values, in any order


def test_two_magnitudes_are_as_good_as_any_division() -> None:
    """For kept elements as they come: above a threshold, few of them large."""
    for seed in range(20):
        generator = np.random.default_rng(seed)
        values = 1 + generator.exponential(0.2, 400)
        ascending = np.sort(values)
        best = min(
            sum(((part - part.mean()) ** 2).sum() for part in np.split(ascending, [i]))
            for i in range(1, 400)
        )
        assert squared(values, 2) <= best * 1.02
        assert squared(values, 4) < squared(values, 2) < squared(values, 1)


@pytest.mark.parametrize(
    ("shape", "picture"),
    [
        ((5, 784), (5, 1, 28, 28)),
        ((5, 3072), (5, 3, 32, 32)),
        ((5, 64), (5, 1, 8, 8)),
        ((5, 49), None),
        ((5, 65), None),
        ((784,), None),
        ((5, 1, 28, 28), None),
    ],
)
def test_which_weights_belong_to_pictures(
    shape: tuple[int, ...], picture: tuple[int, ...] | None
) -> None:
    assert picture_of(shape) == picture


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 16)])
def test_positions_by_the_picture_are_smaller(channels: int, side: int) -> None:
    tensor = weights(200, channels, side)
    frames = {
        layout: make("spsign", sparsity=0.97, layout=layout).encode(tensor)
        for layout in ("auto", "none")
    }
    assert len(frames["auto"]) < 0.95 * len(frames["none"])
    header, _ = wire.parse(frames["auto"])
    assert struct.unpack("<QBBB", header.params)[2] == 1
    tensors = {layout: decode(frame) for layout, frame in frames.items()}
    assert torch.equal(tensors["auto"], tensors["none"])
    by_page = reference_frames.frame(frames["auto"])
    assert torch.equal(torch.tensor(by_page.tolist()), tensors["auto"])
    positions, values = decode_sparse(frames["auto"])
    assert torch.equal(tensors["auto"].view(-1)[positions], values)
    assert len(positions) == int(tensor.numel() * 3 / 100)


def test_frames_without_a_picture_are_refused_as_one() -> None:
    frame = bytearray(make("spsign", sparsity=0.9).encode(torch.randn(5, 65)))
    start = len(frame) - len(wire.parse(bytes(frame))[1]) - 11
    for place, value in ((9, 1), (9, 2), (8, 3), (8, 0)):
        crafted = bytearray(frame)
        crafted[start + place] = value
        with pytest.raises(FrameError, match="magnitudes, picture"):
            decode(reseal(crafted))


@pytest.mark.parametrize("magnitudes", [1, 2, 4])
def test_negative_magnitudes_are_refused(magnitudes: int) -> None:
    frame = make("spsign", sparsity=0.9, magnitudes=magnitudes).encode(torch.randn(50))
    header, payload = wire.parse(frame)
    for wrong in (-1.0, float("inf"), float("nan")):
        crafted = [struct.pack("<f", wrong) + bytes(payload[4:])]
        with pytest.raises(FrameError):
            decode(wire.assemble(header, crafted))


def test_signs_and_magnitudes_by_hand() -> None:
    tensor = torch.tensor([0.1, -3.0, 5.0, 0.0, -5.2, 3.2, 0.2, 0.1, -0.1, 0.0])
    frame = make("spsign", sparsity=0.6, magnitudes=2).encode(tensor)
    expected = torch.zeros(10)
    expected[[1, 2, 4, 5]] = torch.tensor([-3.1, 5.1, -5.1, 3.1])
    torch.testing.assert_close(decode(frame), expected)
    # header 28 + 4 + 11, two magnitudes, four symbols of two bits, a bitmap of ten
    assert len(frame) == 43 + 8 + 1 + 2


@pytest.mark.parametrize("magnitudes", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_magnitudes_at_the_ends_of_a_type(magnitudes: int, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    compressor = make("spsign", sparsity=0, magnitudes=magnitudes)
    for value in (most, -most, torch.finfo(dtype).smallest_normal, 0.0):
        tensor = torch.full((100,), value, dtype=dtype)
        assert torch.equal(decode(compressor.encode(tensor)), tensor), value


@pytest.mark.parametrize("magnitudes", [0, 3, 8, True, 2.5])
def test_other_numbers_of_magnitudes_are_refused(magnitudes: object) -> None:
    with pytest.raises(ValueError, match="must be one of 1, 2, 4"):
        make("spsign", magnitudes=magnitudes)


def test_every_option_gives_a_frame() -> None:
    for sparsity, magnitudes, layout in itertools.product(
        (0.0, 0.5, 0.999), (1, 2, 4), ("auto", "none")
    ):
        options = {"sparsity": sparsity, "magnitudes": magnitudes, "layout": layout}
        tensor = torch.randn(30, 64)
        kept = decode(make("spsign", **options).encode(tensor)).count_nonzero()
        assert kept == max(1, int((1 - sparsity) * 1920 + 1e-9))
