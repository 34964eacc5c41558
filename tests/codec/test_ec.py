"""The compressor `ec`: lengths, budgets and errors of its frames."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from masksl import dataset, model
from masksl.codec import coder, wire
from masksl.compress import FrameError, decode, make
from tests.codec.test_coder import smooth
from tests.codec.test_sizes import before_plane, fields_of

# A frame of an earlier version, of its coded planes and parameters.
EARLIER = bytes.fromhex(
    "4d534b4c010303136563000000000000dc8aee1031000000000000000200000003000000"
    "04000000040001000000002200000014000000000000000000203f0000a03f0000f03f00"
    "010102030302030e00000028b52ffd200529000000292019201d25d14b9786b946d3d404"
)


def check_lengths(tensor: torch.Tensor, error: float) -> dict[str, float]:
    """Return the length of coded planes by their entropy, of order 0.

    As one row it is at most 2 % more.
    """
    shape, lengths = tuple(tensor.shape), {}
    for context in ("none", "spatial"):
        frame = make("ec", error=error, context=context).encode(tensor)
        header, payload = wire.parse(frame)
        form, alphabet, *_, length, signs = fields_of(header)
        assert form == (4 if context == "none" else 3)
        part = payload[before_plane(header) :][:length]
        by = (tensor.numel(),) if context == "none" else shape
        counts = np.bincount(coder.decode_plane(part, alphabet, by))
        shares = counts[counts > 0] / tensor.numel()
        bound = -tensor.numel() * float((shares * np.log2(shares)).sum())
        lengths[context] = 8 * length / bound
        assert 8 * (len(frame) - length) - signs < 0.02 * 8 * len(frame)
        assert 0.99 * error <= relative_error(frame, tensor) <= error
    assert lengths["none"] < 1.02
    return lengths


@pytest.mark.parametrize("kind", ["half-normal", "exponential", "uniform"])
@pytest.mark.parametrize("error", [0.05, 0.25])
def test_length_is_the_entropy(kind: str, error: float) -> None:
    shape = (64, 16, 16, 16)
    drawn = {
        "half-normal": torch.randn(shape).abs(),
        "exponential": torch.empty(shape).exponential_(),
        "uniform": torch.rand(shape),
    }[kind]
    for tensor in (drawn, drawn * torch.randn(shape).sign()):
        for length in check_lengths(tensor, error).values():
            assert 0.998 < length < 1.02


@pytest.mark.parametrize("error", [0.05, 0.25])
def test_maps_are_shorter_than_their_entropy(error: float) -> None:
    lengths = check_lengths(smooth((64, 16, 16, 16)), error)
    assert lengths["spatial"] < 0.9 and lengths["spatial"] < 0.95 * lengths["none"]


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
def test_real_activations_are_shorter_than_their_entropy(
    real_activation: torch.Tensor, error: float
) -> None:
    lengths = check_lengths(real_activation, error)
    assert lengths["spatial"] < 0.8 and lengths["spatial"] < 0.85 * lengths["none"]


@pytest.mark.parametrize("target", [0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 16.0])
@pytest.mark.parametrize("signed", [False, True])
def test_payloads_take_99_to_100_percent_of_a_budget(
    target: float, signed: bool
) -> None:
    noise = torch.randn(64, 4096)
    for tensor in (
        smooth((32, 16, 16, 16), signed=signed),
        noise if signed else noise.abs(),
        smooth((32, 16, 16, 16), signed=signed) ** 5,  # most are far below the largest
    ):
        taken = payload_bits(make("ec", bits=target).encode(tensor)) / tensor.numel()
        assert 0.99 * target <= taken <= target


@pytest.mark.parametrize("bits", [0.01, 0.2, 1.0, 3.0, 10.0])
@pytest.mark.parametrize(
    "shape", [(1,), (3,), (50,), (1000,), (2, 3, 5, 7), (4, 16, 32, 32)]
)
def test_no_budget_is_exceeded(bits: float, shape: tuple[int, ...]) -> None:
    """It is by what a single symbol for all elements takes, if by anything."""
    for tensor in (torch.randn(shape), heavy_tailed(shape).relu(), torch.ones(shape)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            frame = make("ec", bits=bits).encode(tensor.to(dtype))
            header, payload = wire.parse(frame)
            fits = 8 * len(payload) <= bits * tensor.numel()
            assert fits or len(payload) - before_plane(header) <= 1


def payload_bits(frame: bytes) -> int:
    """Return the bits of the payload of a frame."""
    return 8 * len(wire.parse(frame)[1])


def heavy_tailed(shape: tuple[int, ...]) -> torch.Tensor:
    """Return values of Student's t with two degrees of freedom: no finite variance."""
    return torch.randn(shape) / torch.empty(shape).exponential_().sqrt()


def two_values(count: int) -> torch.Tensor:
    """Return zeros but for two elements, which a sample is not likely to have."""
    tensor = torch.zeros(4, count // 4)
    tensor[1, 77], tensor[3, 1234] = 3, 1
    return tensor


def relative_error(frame: bytes, tensor: torch.Tensor) -> float:
    """Return the relative error of what a frame decodes to, in float64."""
    exact, unit = tensor.double(), tensor.double().abs().max()
    difference = (decode(frame).double() - exact) / unit
    return float(difference.norm() / (exact / unit).norm())


TENSORS = {
    "maps": lambda: smooth((32, 16, 16, 16)),
    "signed maps": lambda: smooth((32, 16, 16, 16), signed=True),
    "noise": lambda: torch.randn(64, 4096),
    "half-normal": lambda: torch.randn(64, 4096).abs(),
    "heavy-tailed": lambda: heavy_tailed((2**18,)),
    "heavy-tailed, relu": lambda: heavy_tailed((2**18,)).relu(),
    "fifth power": lambda: torch.randn(2**18).relu() ** 5,
    "subnormal": lambda: 1e-42 * torch.randn(2**18),
    "huge": lambda: 6e37 * torch.randn(2**18),
    "subnormal, float64": lambda: 1e-318 * torch.randn(2**18).double(),
    "huge, float64": lambda: 3e307 * torch.randn(2**18).double(),
}


@pytest.mark.parametrize("kind", list(TENSORS))
def test_errors_are_99_to_100_percent_of_those_asked_for(kind: str) -> None:
    tensor = TENSORS[kind]()
    for target in (0.4, 0.25, 0.05, 0.001):
        found = relative_error(make("ec", error=target).encode(tensor), tensor)
        assert 0.99 * target <= found <= target


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errors_of_short_types_are_within_a_percent(dtype: torch.dtype) -> None:
    """Their own rounding is part of the error."""
    for tensor in (torch.randn(2**18), torch.randn(2**18).relu() / 1000):
        tensor = tensor.to(dtype)
        for target in (0.5, 0.25, 0.05):
            found = relative_error(make("ec", error=target).encode(tensor), tensor)
            assert 0.99 * target <= found <= 1.01 * target


@pytest.mark.parametrize("target", [0.9, 0.25, 0.001])
def test_two_values_among_millions_are_kept(target: float) -> None:
    tensor = two_values(2**22)
    assert relative_error(make("ec", error=target).encode(tensor), tensor) <= target


@pytest.mark.parametrize("shape", [(), (1,), (2,), (5,), (3, 3)])
def test_small_tensors_keep_to_their_error(shape: tuple[int, ...]) -> None:
    for tensor in (torch.randn(shape), -torch.rand(shape), torch.full(shape, 3.3)):
        for target in (0.9, 0.25, 0.001):
            frame = make("ec", error=target).encode(tensor)
            assert relative_error(frame, tensor) <= target
    zeros = torch.zeros(shape)
    assert torch.equal(decode(make("ec").encode(zeros)), zeros)


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
    for tensor, most in ((maps, 0.85), (noise, 1.02)):
        with_, without = (
            len(make("ec", error=0.2, context=context).encode(tensor))
            for context in ("spatial", "none")
        )
        assert with_ < most * without


# --- what is refused ------------------------------------------------------------------


def test_frames_of_an_earlier_version_are_refused() -> None:
    with pytest.raises(FrameError) as caught:
        decode(EARLIER)
    assert str(caught.value) == "ec frame has 19 bytes of parameters, expected 20"


@pytest.mark.parametrize("form", [0, 1, 2, 5, 16])
def test_unknown_forms_are_refused(form: int) -> None:
    header, payload = wire.parse(make("ec").encode(torch.randn(50)))
    params = bytes([form]) + header.params[1:]
    broken = wire.Header("ec", header.dtype, header.shape, params)
    with pytest.raises(FrameError, match=f"^ec frame declares form {form}, "):
        decode(wire.assemble(broken, [bytes(payload)]))


def test_counts_must_be_those_of_the_symbols() -> None:
    """Exact values and signs are as many as the symbols call for."""
    tensor = torch.randn(400)
    header, payload = wire.parse(make("ec", step=0.004).encode(tensor))
    form, alphabet, signed, exact, length, signs = fields_of(header)
    assert alphabet == 256 and exact > 0 and signs > 0
    layout = "<BHBIIQ"
    start, end = 4 * 254, len(payload) - (signs + 7) // 8
    fewer = bytes(payload[: start + 4 * (exact - 1)]) + bytes(
        payload[start + 4 * exact :]
    )
    cut = bytes(payload[:end]) + bytes((signs - 8 + 7) // 8)
    for fields, body, message in (
        ((form, 256, 1, exact - 1, length, signs), fewer, "keeps .* but marks"),
        ((form, 256, 1, exact, length, signs - 8), cut, "keeps .* but marks"),
        ((form, 256, 2, exact, length, signs), bytes(payload), "signs 2"),
        ((form, 257, 1, exact, length, signs), bytes(payload), "257 symbols"),
        ((form, 256, 1, 401, length, signs), bytes(payload), "401 exact values"),
        ((form, 256, 1, exact, length + 1, signs), bytes(payload), "implies"),
    ):
        params = struct.pack(layout, *fields)
        broken = wire.Header("ec", header.dtype, header.shape, params)
        with pytest.raises(FrameError, match=message):
            decode(wire.assemble(broken, [body]))


# --- stochastic rounding --------------------------------------------------------------


def check_unbiased(draws: int, shape: tuple[int, ...], spread: float) -> None:
    """Compare means over seeds with the elements, in standard errors.

    The share of 4,096 normal numbers beyond 3 is .0027, with a deviation of .0008.
    """
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, generator=generator)
    compressor = make("ec", step=4.0, rounding="stochastic")
    total = torch.zeros(shape, dtype=torch.float64)
    for seed in range(draws):
        total += decode(compressor.encode(tensor, seed=seed))
    step = 4 * float(tensor.double().std(correction=0))
    part = (tensor.double().abs() / step).frac()
    deviation = step * (part * (1 - part)).sqrt()
    z = (total / draws - tensor) / (deviation / draws**0.5)
    share = float((z.abs() > 3).double().mean())
    assert abs(share - 0.0027) <= 4 * (0.0027 / 4096) ** 0.5
    assert abs(float(z.mean())) <= 4 / 4096**0.5
    assert float(z.std()) == pytest.approx(1, abs=spread)


def test_stochastic_rounding_is_unbiased() -> None:
    check_unbiased(400, (4096,), 0.05)
    check_unbiased(400, (16, 16, 16), 0.1)  # elements of a map depend on each other


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4096,), (16, 16, 16)])
def test_stochastic_rounding_is_unbiased_over_many_draws(shape: Any) -> None:
    check_unbiased(10_000, shape, 0.05)


@pytest.mark.parametrize("shape", [(3, 4, 9, 7), (5, 12, 1), (40, 25), (600,)])
def test_errors_of_neighbours_cancel(shape: tuple[int, ...]) -> None:
    """The error of a sum along the path through a map is always less than a step."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(2)).double()
    decoded = decode(make("ec", step=3.0, rounding="stochastic").encode(tensor, seed=5))
    maps = ((decoded - tensor) / (3 * tensor.std(correction=0))).numpy()
    rows = maps.reshape(coder.maps_of(shape)).copy()
    rows[:, 1::2] = rows[:, 1::2, ::-1]
    sums = rows.reshape(len(rows), -1).cumsum(1)
    sums = np.concatenate([np.zeros((len(sums), 1)), sums], 1)
    assert (np.ptp(sums, axis=1) < 1 + 1e-9).all()
    assert np.square(maps).mean() > 0.1


def test_stochastic_rounding_gives_multiples_of_the_step() -> None:
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(2, 8, 16, 16, generator=generator)
    compressor = make("ec", step=0.5, rounding="stochastic")
    frame = compressor.encode(tensor, seed=3)
    assert frame == compressor.encode(tensor, seed=3)
    assert frame != compressor.encode(tensor, seed=4)
    steps = decode(frame).double() / (0.5 * float(tensor.double().std(correction=0)))
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    below = (tensor.double() / (0.5 * float(tensor.double().std(correction=0)))).abs()
    assert bool(((steps.abs().round() - below.floor()) * 2 - 1).abs().eq(1).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_what_has_no_multiple_of_the_step_is_exact(dtype: torch.dtype) -> None:
    """More than 254 steps, or a multiple that the type does not hold."""
    most = torch.finfo(dtype).max
    tensor = torch.full((4003,), 1e-3, dtype=dtype)
    tensor[-3:] = torch.tensor([most, -most, most], dtype=dtype)
    decoded = decode(make("ec", step=1.0, rounding="stochastic").encode(tensor))
    assert decoded[-3:].tolist() == [most, -most, most]
    spread = torch.linspace(-1, 1, 2001, dtype=torch.float64).to(dtype)
    decoded = decode(make("ec", step=0.001, rounding="stochastic").encode(spread))
    far = spread.double().abs() / (0.001 * spread.double().std(correction=0)) >= 254
    assert 100 < int(far.sum()) < 2001 and torch.equal(decoded[far], spread[far])
