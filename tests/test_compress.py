"""The compressors: identities, bounds, exact sizes, special tensors."""

import math
import subprocess
import sys
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masksl.codec import wire
from masksl.codec.bits import unpack_bits
from masksl.compress import (
    COMPRESSORS,
    FloatQuantization,
    FrameError,
    NotFiniteError,
    decode,
    encode_set,
    kept_positions,
    make,
)

# The method's worked example (figure 1 of the paper): 4x4, k = 4, 2 bits.
EXAMPLE = torch.tensor(
    [
        [2.2, 0.8, 1.2, 0.4],
        [1.8, 0.2, 3.1, 2.0],
        [2.1, 0.2, 1.1, 1.7],
        [0.3, 2.8, 1.4, 0.9],
    ]
)
ALL: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("qu", {"bits": 3}),
    ("qu", {"bits": 11}),
    ("qu", {"bits": 4, "rounding": "stochastic"}),
    ("qu", {"bits": 2, "lossless": "context"}),
    ("qu", {"bits": 12, "lossless": "auto"}),
    ("qq", {"bits": 3}),
    ("qq", {"bits": 5, "lossless": "context"}),
    ("fp", {"exponent": 2, "mantissa": 1}),
    ("fp", {"exponent": 4, "mantissa": 3, "lossless": "auto"}),
    ("fp", {"exponent": 3, "mantissa": 2, "scale": "none"}),
    ("fp", {"exponent": 5, "mantissa": 1, "scale": "none"}),
    ("sp", {"sparsity": 0.9}),
    ("sp", {"sparsity": 0.99}),
    ("sp", {"sparsity": 0.9, "positions": "auto", "lossless": "auto"}),
    ("sp", {"sparsity": 0.9, "scope": "sample", "lossless": "context"}),
    ("rt", {"sparsity": 0.9, "alpha": 0.2}),
    ("rt", {"sparsity": 0.9, "alpha": 0.2, "scope": "sample", "positions": "auto"}),
    ("ms", {"sparsity": 0.9, "bits": 2}),
    ("ms", {"sparsity": 0.9, "bits": 3, "rounding": "floor"}),
    ("ms", {"sparsity": 0.9, "bits": 2, "scope": "sample", "lossless": "fast"}),
    ("ms", {"sparsity": 0.9, "bits": 2, "lossless": "auto"}),
    ("spsign", {"sparsity": 0.9}),
    ("spsign", {"sparsity": 0.95, "magnitudes": 4, "layout": "none"}),
    ("sign", {"magnitude": "mean"}),
    ("qsgd", {"levels": 4}),
    ("drive", {"block": 6}),
    ("ec", {}),
    ("ec", {"step": 0.5, "deadzone": 0.6}),
    ("ec", {"bits": 3.0}),
    ("ec", {"error": 0.05, "context": "none"}),
    ("ec", {"step": 2.0, "rounding": "stochastic"}),
]
# Masks are bool tensors, with tests of their own in `tests.codec.test_mask`.
FLOATING = [name for name in COMPRESSORS if name != "mask"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
KINDS = [
    *("normal", "relu", "ties", "zero", "constant", "sparse"),
    *("negative", "outlier", "tiny"),
]


def payload_of(frame: bytes) -> bytes:
    return bytes(wire.parse(frame)[1])


# --- the paper's example and acceptance checks ----------------------------------------


@pytest.mark.parametrize(
    ("rounding", "symbols", "error"),
    [
        ("floor", [3, 1, 1, 0, 2, 0, 3, 2, 3, 0, 1, 2, 0, 3, 2, 1], 1.183),
        ("nearest", [3, 1, 2, 1, 2, 0, 3, 2, 3, 0, 2, 2, 0, 3, 2, 1], 1.025),
    ],
)
def test_worked_example(rounding: str, symbols: list[int], error: float) -> None:
    frame = make("ms", sparsity=0.75, bits=2, rounding=rounding).encode(EXAMPLE)
    payload = payload_of(frame)
    assert len(payload) == 20
    values = torch.frombuffer(bytearray(payload[:16]), dtype=torch.float32)
    assert torch.equal(values, torch.tensor([2.2, 3.1, 2.1, 2.8]))
    packed = torch.tensor(list(payload[16:]), dtype=torch.uint8)
    assert unpack_bits(packed, 16, 2).tolist() == symbols
    assert (decode(frame) - EXAMPLE).norm().item() == pytest.approx(error, abs=5e-4)


def test_worked_example_top_4() -> None:
    decoded = decode(make("sp", sparsity=0.75).encode(EXAMPLE))
    assert (decoded - EXAMPLE).norm().item() == pytest.approx(4.064, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "options", "bits", "rate"),
    [
        ("ms", {"sparsity": 0.99, "bits": 2}, 2.32, 0.9275),
        ("sp", {"sparsity": 0.95875}, 2.32, 0.9275),
        ("qu", {"bits": 3}, 3.0, 0.90625),
        ("none", {}, 32.0, 0.0),
    ],
)
def test_size_is_that_of_the_paper(
    name: str, options: dict[str, Any], bits: float, rate: float
) -> None:
    activation = torch.relu(torch.randn(256, 64, 16, 16))
    frame = make(name, **options).encode(activation)
    information = bits * activation.numel() / 8
    assert information - 64 < len(frame) <= information + 64
    assert 1 - len(frame) / (4 * activation.numel()) == pytest.approx(rate, abs=1e-5)


@pytest.mark.parametrize(
    ("sparsity", "form"), [(0.968, "bitmap"), (0.96875, "bitmap"), (0.969, "index")]
)
def test_positions_cross_over_at_96_875_percent(sparsity: float, form: str) -> None:
    kept = math.floor(round((1 - sparsity) * 32_000, 6))
    frame = make("sp", sparsity=sparsity).encode(torch.randn(32_000))
    positions = {"bitmap": 4000, "index": 4 * kept}[form]
    assert len(payload_of(frame)) == 4 * kept + positions


def test_mask_of_one_bit_is_plain_top_k() -> None:
    tensor = torch.randn(50, 40)
    masked = decode(make("ms", sparsity=0.9, bits=1).encode(tensor))
    assert torch.equal(masked, decode(make("sp", sparsity=0.9).encode(tensor)))


def test_random_top_k_without_chance_is_top_k() -> None:
    for tensor in (torch.randn(50, 40), torch.randn(4, 5, 6, 7).relu()):
        for scope in ("tensor", "sample"):
            options = {"sparsity": 0.9, "scope": scope}
            top = decode(make("sp", **options).encode(tensor))
            drawn = make("rt", **options, alpha=0).encode(tensor, seed=3)
            assert torch.equal(decode(drawn), top)


def test_random_top_k_draws_by_its_weights() -> None:
    """The share of draws from outside the k largest, against the definition."""
    tensor, k, draws = torch.arange(1.0, 21), 4, 4000
    compressor = make("rt", sparsity=0.8, alpha=0.3)
    kept = torch.zeros(20)
    for seed in range(draws):
        kept += decode(compressor.encode(tensor, seed=seed)) != 0
    weights = [0.3 / 16] * 16 + [0.7 / 4] * 4
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(
        torch.tensor(weights).expand(draws, 20), k, False, generator=generator
    )
    expected = torch.bincount(drawn.ravel(), minlength=20)
    assert int(kept.sum()) == draws * k
    for part in (slice(0, 16), slice(16, 20)):
        share = float(kept[part].sum()) / (draws * k)
        assert share == pytest.approx(
            float(expected[part].sum()) / (draws * k), abs=0.02
        )
    # All of a part are alike.
    assert float(kept[:16].std()) < 0.2 * float(kept[:16].mean())
    assert float(kept[16:].std()) < 0.05 * float(kept[16:].mean())


def test_random_top_k_draws_beyond_2_to_the_24() -> None:
    count = 2**24 + 1001
    tensor = torch.ones(count)
    tensor[-1000:] = 2.0
    frame = make("rt", sparsity=0.99, alpha=0.5).encode(tensor, seed=1)
    decoded = decode(frame)
    kept = round(count / 100 - 0.5)
    assert int((decoded != 0).sum()) == kept
    # The 1,000 largest are among the k largest, which half of the weight is on.
    assert int((decoded[2**24 :] == 2).sum()) > 300
    assert int((decoded[: 2**23] != 0).sum()) == pytest.approx(kept / 2, rel=0.5)


@pytest.mark.parametrize("name", ["sp", "rt", "ms"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keeping_everything_is_lossless(name: str, dtype: torch.dtype) -> None:
    tensor = torch.randn(30, 7).to(dtype)
    assert torch.equal(decode(make(name, sparsity=0).encode(tensor)), tensor)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rounding", ["nearest", "floor"])
@pytest.mark.parametrize("signed", [False, True])
def test_error_of_ms_is_bounded(bits: int, rounding: str, signed: bool) -> None:
    tensor = torch.randn(20_000)
    tensor = tensor if signed else tensor.relu()
    frame = make("ms", sparsity=0.98, bits=bits, rounding=rounding).encode(tensor)
    decoded, magnitude = decode(frame), tensor.abs()
    smallest = magnitude.topk(400).values.amin()
    kept = magnitude >= smallest
    assert torch.equal(decoded[kept], tensor[kept])
    level = smallest / (2**bits - 1)
    error = (decoded - tensor).abs()
    last = magnitude > smallest - level / 2
    bound = torch.where(last | (rounding == "floor"), level, level / 2)
    assert bool((error[~kept] <= bound[~kept] * (1 + 1e-4)).all())


@pytest.mark.parametrize("bits", [1, 3, 8, 12, 16])
def test_error_of_qu_is_half_a_level(bits: int) -> None:
    tensor = torch.randn(10_000)
    decoded = decode(make("qu", bits=bits).encode(tensor))
    level = (tensor.max() - tensor.min()) / (2**bits - 1)
    assert float((decoded - tensor).abs().max()) <= float(level) * 0.5 + 1e-6
    assert decoded.min() == tensor.min()
    assert decoded.max() == tensor.max()


def test_stochastic_rounding_is_right_in_the_mean() -> None:
    tensor = torch.rand(200)
    compressor = make("qu", bits=2, rounding="stochastic")
    draws = [decode(compressor.encode(tensor, seed=seed)) for seed in range(2000)]
    level = float(tensor.max() - tensor.min()) / 3
    mean_error = (torch.stack(draws).mean(0) - tensor).abs().max()
    assert float(mean_error) < 6 * level / 2 / math.sqrt(2000)


def test_narrow_values_are_those_of_the_type() -> None:
    tensor = torch.randn(100)
    for values in ("float16", "bfloat16"):
        frame = make("none", values=values).encode(tensor)
        assert len(payload_of(frame)) == 200
        narrowed = tensor.to(getattr(torch, values)).float()
        assert torch.equal(decode(frame), narrowed)
    with pytest.raises(NotFiniteError, match="1 of 2 values are out of the range"):
        make("none", values="float16").encode(torch.tensor([1.0, 1e6]))


def test_real_activations_have_the_measured_error(data_root: Any) -> None:
    from masksl import dataset, model  # pylint: disable=import-outside-toplevel

    data = dataset.load(dataset.DatasetConfig(name="cifar10", root=str(data_root)))
    images, _ = data.train_batch(torch.arange(256), torch.Generator())
    units = model.build("small_cnn", 10, 3, seed=0)
    activation = units[0](images).detach()
    errors = {}
    for rounding in ("nearest", "floor"):
        frame = make("ms", rounding=rounding).encode(activation)
        assert len(frame) * 8 / activation.numel() == pytest.approx(2.32, abs=1e-3)
        errors[rounding] = float((decode(frame) - activation).norm())
    assert errors["nearest"] < errors["floor"] < float(activation.norm())


# --- what holds for all ---------------------------------------------------------------

shapes = st.lists(st.integers(1, 9), min_size=0, max_size=5).map(tuple)


TENSORS = given(
    case=st.sampled_from(ALL),
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    layout=st.sampled_from(["plain", "transposed", "strided"]),
    seed=st.integers(0, 2**32),
)


def comes_back_right(
    case: tuple[str, dict[str, Any]],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    kind: str,
    layout: str,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = special(kind, shape, generator).to(dtype)
    if layout == "transposed":
        tensor = tensor.permute(list(range(tensor.ndim))[::-1])
    elif layout == "strided" and tensor.ndim:
        tensor = torch.stack([tensor, -tensor], dim=-1)[..., 0]
    compressor = make(case[0], **case[1])
    state = torch.random.get_rng_state()
    frame = compressor.encode(tensor, seed=seed)
    assert isinstance(frame, bytes)
    assert frame == compressor.encode(tensor.clone(), seed=seed)
    decoded = decode(frame)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (decoded.shape, decoded.dtype) == (tensor.shape, tensor.dtype)
    check_against_plain_loop(case, tensor.reshape(-1).tolist(), decoded)


@settings(deadline=None, max_examples=100)
@TENSORS
def test_every_tensor_comes_back_right(**drawn: Any) -> None:
    comes_back_right(**drawn)


@pytest.mark.slow
@settings(deadline=None, max_examples=1000)
@TENSORS
def test_every_tensor_of_many_comes_back_right(**drawn: Any) -> None:
    comes_back_right(**drawn)


def special(
    kind: str, shape: tuple[int, ...], generator: torch.Generator
) -> torch.Tensor:
    normal = torch.randn(shape, generator=generator)
    match kind:
        case "relu":
            return normal.relu()
        case "ties":
            return normal.round()
        case "zero":
            return torch.zeros(shape)
        case "constant":
            return torch.full(shape, -1.5)
        case "sparse":
            return normal * (torch.rand(shape, generator=generator) < 0.05)
        case "negative":
            return -normal.abs()
        case "outlier":
            return torch.where(normal == normal.max(), 3e4, normal)
        case "tiny":  # at the edge of float16's range, below its normal numbers
            return normal * 1e-6
    return normal


def check_against_plain_loop(
    case: tuple[str, dict[str, Any]], x: list[float], decoded: torch.Tensor
) -> None:
    """Compare with the definition, written out over single numbers."""
    name, options = case
    got = decoded.reshape(-1).double().tolist()
    info = torch.finfo(decoded.dtype)
    eps, least = max(float(info.eps), 1.2e-7), float(info.smallest_normal * info.eps)
    largest = max(map(abs, x))
    if name == "none":
        assert got == x
    elif name in ("sp", "rt", "ms"):
        rows = (
            decoded.shape[0] if options.get("scope") == "sample" and decoded.ndim else 1
        )
        size = len(x) // rows
        for start in range(0, len(x), size):
            check_row(
                case, x[start : start + size], got[start : start + size], eps, least
            )
    elif name == "spsign":
        check_signs(options, x, got, 4 * eps * largest + least)
    elif name in ("sign", "qsgd", "drive"):
        check_scales(case, x, got, 8 * eps, least)
    elif name == "ec":
        bound = 0.0
        if "step" in options:
            deviation = float(torch.tensor(x, dtype=torch.float64).std(correction=0))
            bound = options["step"] * (deviation or largest)
        above = bound if "rounding" in options else 0.0  # rounded up
        assert max(map(abs, got)) <= (largest + above) * (1 + 4 * eps) + least
        if "step" in options and len(x) > 1:
            assert all(
                abs(a - b) <= bound + 8 * eps * largest + least
                for a, b in zip(got, x, strict=True)
            )
    else:
        levels = levels_of(case, x)
        reach = 2 if options.get("rounding") == "stochastic" else 1
        slack = 16 * eps * largest + least
        for a, b in zip(got, x, strict=True):
            nearest = min(abs(level - b) for level in levels)
            gap = max(nearest, levels_gap(levels, b)) if reach == 2 else nearest
            assert abs(a - b) <= gap + slack


def check_scales(
    case: tuple[str, dict[str, Any]],
    x: list[float],
    got: list[float],
    eps: float,
    least: float,
) -> None:
    """Compare with magnitudes of the whole tensor: mean, norm, or projection."""
    name, options = case
    squares = math.fsum(value * value for value in x)
    if name == "sign":
        mean = math.fsum(map(abs, x)) / len(x)
        for a, b in zip(got, x, strict=True):
            assert abs(abs(a) - mean) <= eps * mean + least
            assert a * b >= 0
    elif name == "qsgd":
        unit = math.sqrt(squares) / options["levels"]
        for a, b in zip(got, x, strict=True):
            slack = eps * math.sqrt(squares) + least
            assert abs(a - b) <= unit + slack  # one of the levels around it
            level = round(a / (unit or 1)) * unit
            assert abs(a - level) <= 0.02 * unit + least
    else:
        inner = math.fsum(a * b for a, b in zip(got, x, strict=True))
        slack = eps * math.fsum(abs(a * b) for a, b in zip(got, x, strict=True))
        assert abs(inner - squares) <= 4 * slack + len(x) * least * max(map(abs, x))


def levels_gap(levels: list[float], value: float) -> float:
    """Return the distance between the two levels around a value."""
    below = max((level for level in levels if level <= value), default=levels[0])
    above = min((level for level in levels if level >= value), default=levels[-1])
    return above - below


def levels_of(case: tuple[str, dict[str, Any]], x: list[float]) -> list[float]:
    """Return every number that an element can come back as."""
    name, options = case
    largest = max(map(abs, x))
    if name == "qu":
        top = 2 ** options["bits"] - 1
        return [min(x) + i * (max(x) - min(x)) / top for i in range(top + 1)]
    if name == "qq":
        normal, half = NormalDist(), 2 ** (options["bits"] - 1)
        positive = [0.99 - i * 0.49 / half for i in range(half)]
        negative = [0.99 - i * 0.49 / (half - 1) for i in range(half - 1)]
        unit = largest / normal.inv_cdf(0.99)
        levels = [normal.inv_cdf(p) * unit for p in positive]
        return sorted([*levels, 0.0, *(-normal.inv_cdf(p) * unit for p in negative)])
    bias = 2 ** (options["exponent"] - 1) - 1
    steps = 2 ** options["mantissa"]
    numbers = [m / steps * 2.0 ** (1 - bias) for m in range(steps)]
    for power in range(1, 2 ** options["exponent"]):
        numbers += [(1 + m / steps) * 2.0 ** (power - bias) for m in range(steps)]
    if options.get("scale") != "none":
        numbers = [number * largest / max(numbers) for number in numbers]
    return sorted({sign * number for number in numbers for sign in (-1, 1)})


def check_signs(
    options: dict[str, Any], x: list[float], got: list[float], slack: float
) -> None:
    """The largest k become one of few magnitudes, the nearest; all others zero."""
    k = max(1, math.floor(round((1 - options["sparsity"]) * len(x), 9)))
    order = sorted(range(len(x)), key=lambda i: (-abs(x[i]), i))[:k]
    assert all(got[i] == 0 for i in set(range(len(x))) - set(order))
    levels = {abs(got[i]) for i in order}
    assert len(levels) <= options.get("magnitudes", 2)
    for i in order:
        off = abs(abs(got[i]) - abs(x[i]))
        assert off <= min(abs(level - abs(x[i])) for level in levels) + slack
        assert got[i] == 0 or math.copysign(1, got[i]) == math.copysign(1, x[i])
    mean = sum(abs(x[i]) for i in order) / k
    assert abs(sum(abs(got[i]) for i in order) / k - mean) <= slack


def check_row(
    case: tuple[str, dict[str, Any]],
    x: list[float],
    got: list[float],
    eps: float,
    least: float,
) -> None:
    """Check a row of which k elements are kept.

    ``least`` is the smallest number of the type: below its normal numbers rounding is
    absolute.
    """
    name, options = case
    count = len(x)
    kept = max(1, count * round(100 - 100 * options["sparsity"]) // 100)
    if name == "rt":
        wrong = [(a, b) for a, b in zip(got, x, strict=True) if a not in (0, b)]
        assert not wrong
        assert sum(a != 0 for a in got) <= kept
        return
    order = sorted(range(count), key=lambda i: (-abs(x[i]), i))[:kept]
    smallest = abs(x[order[-1]])
    bits = options.get("bits", 1)
    for i, (a, b) in enumerate(zip(got, x, strict=True)):
        if i in order:
            assert a == b
        elif smallest == 0:
            assert a == 0
        else:
            level = smallest / (2**bits - 1)
            assert a == 0 or (a > 0) == (b > 0)
            assert abs(a) <= (2**bits - 2) * level * (1 + 2 * eps) + least
            if bits > 1:
                bound = level * (1 + 1e-5) + 8 * eps * abs(b) + least
                assert abs(a - b) <= bound


@pytest.mark.parametrize("case", ALL, ids=str)
def test_devices_and_memory_formats(case: tuple[str, Any], device: str) -> None:
    tensor = torch.randn(4, 8, 5, 5).to(device)
    compressor = make(case[0], **case[1])
    frame = compressor.encode(tensor)
    assert frame == compressor.encode(tensor.to(memory_format=torch.channels_last))
    decoded = decode(frame, device=device)
    assert decoded.device.type == device
    assert torch.equal(decoded.cpu(), decode(frame))


@pytest.mark.parametrize("case", ALL, ids=str)
def test_large_selection_is_exact(case: tuple[str, Any]) -> None:
    """Big enough for the threshold from a sample; ties and rows of zeros included."""
    tensor = (torch.randn(300_000) * 4).round() / 4
    tensor[::7] = 0
    if case[0] in ("sp", "ms") and "scope" not in case[1]:
        kept = round((1 - case[1]["sparsity"]) * 300_000)
        order = torch.sort(tensor.abs(), descending=True, stable=True).indices[:kept]
        decoded = decode(make(case[0], **case[1]).encode(tensor))
        assert torch.equal(decoded[order], tensor[order])
        if case[0] == "sp":
            assert int((decoded != 0).sum()) == int((tensor[order] != 0).sum())


@pytest.mark.parametrize("name", ["sp", "rt"])
@pytest.mark.parametrize("scope", ["tensor", "sample"])
@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.9},
        {"sparsity": 0.99},
        {"sparsity": 0.9, "positions": "auto"},
        {"sparsity": 0.9, "lossless": "context"},
        {"sparsity": 0.9, "lossless": "fast", "values": "float16"},
    ],
)
def test_frames_tell_what_they_kept(name: str, scope: str, options: Any) -> None:
    """By definition: the k largest, those that are zero too."""
    tensor = torch.randn(8, 5, 10, 10).relu()
    tensor[:, :, 1:] = 0  # about 5 % differ from zero
    frame = make(name, **options, scope=scope).encode(tensor, training=False)
    rows = tensor.view(8 if scope == "sample" else 1, -1)
    k = round(rows.shape[1] * (1 - options["sparsity"]))
    order = torch.sort(rows, descending=True, stable=True).indices[:, :k]
    order += torch.arange(len(rows))[:, None] * rows.shape[1]
    assert torch.equal(kept_positions(frame), order.sort().values.view(-1))


def test_what_is_drawn_is_what_is_told() -> None:
    tensor = torch.rand(4000) + 1
    frame = make("rt", sparsity=0.9, alpha=0.3).encode(tensor, seed=5)
    assert torch.equal(kept_positions(frame), decode(frame).nonzero().view(-1))


@pytest.mark.parametrize("name", ["none", "qu", "qq", "fp", "ms", "ec"])
def test_other_frames_have_no_positions(name: str) -> None:
    with pytest.raises(FrameError, match=f"{name} frame has no positions"):
        kept_positions(make(name).encode(torch.rand(50)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("none", {}),
        ("none", {"values": "bfloat16"}),
        ("qu", {"bits": 3}),
        ("qu", {"bits": 9}),
        ("qq", {"bits": 4}),
        ("fp", {"exponent": 3, "mantissa": 2}),
        ("fp", {"exponent": 3, "mantissa": 2, "scale": "none"}),
        ("sp", {"sparsity": 0.9}),
        ("sp", {"sparsity": 0.9, "scope": "sample", "values": "float16"}),
        ("rt", {"sparsity": 0.9}),
        ("ms", {"sparsity": 0.9}),
        ("ms", {"sparsity": 0.9, "bits": 4, "scope": "sample"}),
    ],
)
def test_decoding_then_encoding_changes_nothing_more(name: str, options: Any) -> None:
    compressor = make(name, **options)
    for tensor in (torch.randn(50, 10), torch.randn(50, 10).relu()):
        once = decode(compressor.encode(tensor, training=False))
        assert torch.equal(decode(compressor.encode(once, training=False)), once)


@pytest.mark.parametrize(
    ("name", "options"),
    [("qu", {"rounding": "stochastic"}), ("rt", {"sparsity": 0.9, "alpha": 0.3})],
)
def test_seeds_matter_to_what_is_drawn_alone(name: str, options: Any) -> None:
    tensor, compressor = torch.randn(500), make(name, **options)
    frames = {compressor.encode(tensor, seed=seed) for seed in (1, 2, 2, 3)}
    assert len(frames) == 3
    plain = make("ms").encode(tensor, seed=1)
    assert plain == make("ms").encode(tensor, seed=2)


def test_counts_are_decimal() -> None:
    for sparsity, count, kept in [(0.9, 100, 10), (0.99, 4_194_304, 41_943)]:
        frame = make("ms", sparsity=sparsity).encode(torch.rand(count))
        assert len(payload_of(frame)) == 4 * kept + count // 4


def test_extreme_values() -> None:
    for dtype in (torch.float32, torch.float64):
        info = torch.finfo(dtype)
        tensor = torch.tensor(
            [info.min, -1.0, 0, info.tiny, 1.0, info.max], dtype=dtype
        )
        for name, options in ALL:
            decoded = decode(make(name, **options).encode(tensor))
            assert bool(torch.isfinite(decoded).all()), (name, decoded)
            kept = name == "none" or name in ("sp", "ms") and tensor.ndim
            assert not kept or decoded.abs().max() == info.max
        tiny = torch.tensor([0.0, info.tiny / 4, info.tiny / 2, info.tiny], dtype=dtype)
        decoded = decode(make("qu", bits=8).encode(tiny))
        assert float((decoded - tiny).abs().max()) <= info.tiny / 255


@pytest.mark.parametrize(("name", "options"), [("qsgd", {"levels": 2}), ("drive", {})])
def test_errors_cancel_out(name: str, options: dict[str, Any]) -> None:
    """Many draws of the same tensor have it as their mean."""
    tensor = torch.randn(1000)
    compressor = make(name, **options)
    draws = torch.stack(
        [decode(compressor.encode(tensor, seed=seed)) for seed in range(400)]
    )
    error = (draws.mean(0) - tensor).norm() / tensor.norm()
    one = (draws - tensor).norm(dim=1).mean() / tensor.norm()
    assert error < 1.3 * one / 20


def test_signs_of_zeros_cancel_out() -> None:
    draws = [decode(make("sign").encode(torch.zeros(1000), seed=s)) for s in (1, 2)]
    assert all(abs(float(draw.sum())) < 4 * 1000**0.5 for draw in draws)
    assert abs(float((draws[0] * draws[1]).sum())) < 4 * 1000**0.5


# --- what is refused ------------------------------------------------------------------


def not_dense() -> list[tuple[object, str]]:
    """Return what is no dense tensor, and what is said of it."""
    plain = torch.randn(4, 4)
    return [
        (plain.to_sparse(), "torch.sparse_coo tensor: must be a dense one"),
        (plain.to_sparse_csr(), "torch.sparse_csr tensor: must be a dense one"),
        (plain.to_mkldnn(), "torch._mkldnn tensor: must be a dense one"),
        (
            torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
            "quantized tensor: must be a dense one",
        ),
        (torch.nested.nested_tensor([plain]), "nested tensor: must be a dense one"),
        (torch.empty(3, device="meta"), "tensor on device meta: must have values"),
        ([1.0, 2.0], "list: must be a torch.Tensor"),
        (np.ones(3), "ndarray: must be a torch.Tensor"),
    ]


@pytest.mark.filterwarnings("ignore:.*(beta|prototype):UserWarning")
@pytest.mark.parametrize("name", [*FLOATING, "mask"])
def test_what_is_no_dense_tensor_is_refused(name: str) -> None:
    for bad, message in not_dense():
        with pytest.raises(TypeError, match=f"^{name}: {message}"):
            make(name).encode(bad)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=f"^tensor w: {message}"):
            encode_set({"w": bad}, make(name))  # type: ignore[dict-item]


@pytest.mark.parametrize("name", FLOATING)
def test_bad_tensors_are_refused(name: str) -> None:
    compressor = make(name)
    with pytest.raises(ValueError) as caught:
        compressor.encode(torch.empty(0, 3))
    assert str(caught.value) == (
        f"{name}: tensor of shape (0, 3) is empty, it must have at least one element"
    )
    with pytest.raises(TypeError, match=f"{name}: dtype torch.int64"):
        compressor.encode(torch.arange(3))
    bad = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 2.0])
    with pytest.raises(NotFiniteError, match=f"{name}: 3 of 5 values are not finite"):
        compressor.encode(bad)
    large = torch.full((4,), torch.finfo(torch.float32).max)  # its sum is infinite
    largest = float(decode(compressor.encode(large)).amax())
    assert math.isfinite(largest)
    assert largest == float(large[0]) or name in ("sign", "qsgd", "drive")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("zip", {}, "name='zip': must be one of none, qu, qq, fp, sp, rt, ms, ec, m"),
        ("ms", {"ratio": 0.9}, "ratio=0.9: ms has the options sparsity, bits"),
        ("ms", {"sparsity": 1.5}, "sparsity=1.5: must be at least 0 and less than 1"),
        ("ms", {"sparsity": 1}, "sparsity=1: must be"),
        ("ms", {"sparsity": "x"}, "sparsity='x': must be"),
        ("ms", {"bits": 0}, "bits=0: must be a whole number from 1 to 8"),
        ("ms", {"bits": 2.5}, "bits=2.5: must be"),
        ("ms", {"rounding": "up"}, "rounding='up': must be one of nearest, floor"),
        ("qu", {"bits": 17}, "bits=17: must be a whole number from 1 to 16"),
        ("sp", {"sparsity": -0.1}, "sparsity=-0.1: must be"),
        ("qq", {"bits": 1}, "bits=1: must be a whole number from 2 to 8"),
        ("fp", {"exponent": 4, "mantissa": 5}, "mantissa=5: must be a whole number"),
        ("rt", {"alpha": 1}, "alpha=1: must be a number from 0 to less than 1"),
        ("sp", {"scope": "row"}, "scope='row': must be one of tensor, sample"),
        ("sp", {"positions": "x"}, "positions='x': must be one of paper, auto"),
        ("ms", {"lossless": "x"}, "lossless='x': must be one of none, fast"),
        ("ec", {"bits": 1.0, "error": 0.2}, "bits=1.0: must be null where error"),
        ("ec", {"error": 1.5}, "error=1.5: must be a number"),
        ("ec", {"context": "x"}, "context='x': must be one of spatial, none"),
        ("ec", {"rounding": "up"}, "rounding='up': must be one of nearest, stochastic"),
        (
            "ec",
            {"rounding": "stochastic"},
            "step=None: must be a number from 0.0001 to",
        ),
        (
            *("ec", {"rounding": "stochastic", "error": 0.2}),
            "error=0.2: must be null with rounding=stochastic",
        ),
        (
            *("ec", {"rounding": "stochastic", "step": 4.0, "deadzone": 0.6}),
            "deadzone=0.6: must be null with rounding=stochastic",
        ),
        ("mask", {"code": "x"}, "code='x': must be one of auto, packed"),
        ("mask", {"bits": 1}, "bits=1: mask has the options code"),
        ("none", {"values": "int8"}, "values='int8': must be one of float32"),
    ],
)
def test_bad_options_are_named(name: str, options: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make(name, **options)
    assert str(caught.value).startswith(message)


def test_every_compressor_is_tested_here() -> None:
    assert {name for name, _ in ALL} == set(FLOATING)
    assert set(COMPRESSORS) - set(FLOATING) == {"mask"}


def test_importing_it_loads_no_framework() -> None:
    script = (
        "import sys, masksl.compress; "
        "print([m for m in ('flwr', 'ray', 'hydra') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("exponent", range(1, 6))
def test_the_largest_small_float_is_its_last_level(exponent: int) -> None:
    for mantissa in range(9 - exponent):
        levels = FloatQuantization.levels(exponent, mantissa)
        assert len(levels) == 2 ** (exponent + mantissa)
        assert FloatQuantization.largest(exponent, mantissa) == levels[-1]
