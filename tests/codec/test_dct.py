"""Coefficients of maps: the transform, and `ec` where they are smaller."""

import importlib.util
import math
import random
import struct
from typing import Any
from unittest import mock

import numba
import numpy as np
import pytest
import torch

from masksl.codec import dct, kernels_dct, wire
from masksl.codec.ec import EntropyCodedQuantization
from masksl.compress import FrameError, decode, make
from tests.codec import reference_frames
from tests.codec.test_coder import smooth
from tests.codec.test_sizes import fields_of

SHAPES = [(1, 1, 4, 4), (2, 3, 8, 12), (1, 2, 4, 64), (3, 1, 12, 68), (1, 1, 8, 132)]
KINDS = [np.float32, np.float64]


def pictures(shape: tuple[int, ...], signed: bool = False) -> torch.Tensor:
    """Return maps that are smoother still than `smooth`."""
    maps = smooth(shape, 0, signed).view(-1, 1, *shape[-2:])
    for _ in range(3):
        maps = torch.nn.functional.avg_pool2d(maps, 3, 1, 1)
    return maps.view(shape)


def by_matrix(maps: np.ndarray) -> np.ndarray:
    """Return the coefficients by the matrix of the DCT, in float64."""
    k, x = np.arange(4)[:, None], np.arange(4)
    matrix = np.cos((2 * x + 1) * k * np.pi / 8) * np.sqrt(np.where(k, 2, 1) / 4)
    batch, channels, height, width = maps.shape
    blocks = maps.reshape(batch, channels, height // 4, 4, width // 4, 4)
    found = np.einsum("uy,bchywx,vx->uvbchw", matrix, blocks, matrix, optimize=True)
    return found.reshape(-1)


# --- the transform --------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_orthonormal_transform(shape: tuple[int, ...], kind: Any) -> None:
    maps = np.random.default_rng(0).standard_normal(shape).astype(kind)
    found = dct.forward(maps.ravel(), shape)
    assert found.dtype == kind
    close = 1e-6 if kind is np.float32 else 1e-14
    assert np.allclose(
        found, by_matrix(maps.astype(np.float64)), rtol=0, atol=4 * close
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_undone(shape: tuple[int, ...], kind: Any) -> None:
    """Of whole numbers of quarters, which symbols hold exactly."""
    rng = np.random.default_rng(2)
    levels = (np.arange(256) / 4).astype(kind)
    symbols = rng.integers(0, 255, math.prod(shape)).astype(np.uint8)
    symbols *= rng.random(symbols.size) < 0.4
    for positive in (False, True):
        negative = rng.random(symbols.size) < 0.5
        skipped = symbols.size // 16 if positive else 0
        negative[:skipped] = False
        packed = np.packbits(
            negative[skipped:][symbols[skipped:] > 0], bitorder="little"
        )
        packed.flags.writeable = False
        found = dct.decode(symbols, levels, packed, shape, positive)
        coefficients = np.where(negative, -levels[symbols], levels[symbols])
        if not positive:
            again = dct.forward(found, shape)
            assert np.allclose(again, coefficients, rtol=0, atol=1e-4)
        exact = dct.decode(symbols, levels, packed, shape, False)
        error = dct.error(coefficients, symbols, levels, found, shape, positive)
        assert error == 0 and (positive or np.array_equal(exact, found))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_plain_python_are_equal_to_the_bit(kind: Any) -> None:
    spec = importlib.util.spec_from_file_location("plain_dct", kernels_dct.__file__)
    assert spec is not None and spec.loader is not None
    plain = importlib.util.module_from_spec(spec)
    with mock.patch.object(numba.config, "DISABLE_JIT", True):
        spec.loader.exec_module(plain)
    assert hasattr(kernels_dct.compose, "stats")
    assert not hasattr(plain.compose, "stats")
    shape = (2, 2, 8, 68)
    rng = np.random.default_rng(1)
    maps = rng.standard_normal(shape).astype(kind).ravel()
    symbols = rng.integers(0, 256, maps.size).astype(np.uint8)
    levels = rng.random(256).astype(kind)
    signs = np.frombuffer(rng.bytes(symbols.size // 8), np.uint8)
    results = []
    for loops in (kernels_dct, plain):
        with mock.patch.object(dct, "_loops", lambda loops=loops: loops):
            found = dct.forward(maps, shape)
            decoded = dct.decode(symbols, levels, signs, shape, True)
            error = dct.error(found, symbols, levels, maps, shape, True)
            results.append((found.tobytes(), decoded.tobytes(), error))
    assert results[0][:2] == results[1][:2]
    assert results[0][2] == pytest.approx(results[1][2], rel=1e-12)  # order of sums


def test_neighbours_that_are_alike_are_measured() -> None:
    ramp = np.ones((2, 3, 8, 8), np.float32)
    assert dct.correlation(ramp) == pytest.approx(7 / 8)
    stripes = ramp * np.where(np.arange(8) % 2, -1, 1).astype(np.float32)
    assert dct.correlation(stripes) == pytest.approx(-7 / 8)
    assert np.isnan(dct.correlation(0 * ramp))


# --- in frames of ec ------------------------------------------------------------------


def by_coefficients(error: float, tensor: torch.Tensor, **options: Any) -> bytes:
    """Encode a tensor as coefficients, whether they are smaller or not."""
    with mock.patch.object(
        EntropyCodedQuantization, "_takes_coefficients", return_value=True
    ):
        return make("ec", error=error, **options).encode(tensor)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("error", [0.3, 0.2])
def test_smooth_maps_are_coded_as_coefficients(
    error: float, dtype: torch.dtype, signed: bool
) -> None:
    """They take fewer bits, at an error that is kept to, and used."""
    tensor = pictures((26, 4, 32, 32), signed=signed).to(dtype)
    frame = make("ec", error=error).encode(tensor)
    assert fields_of(wire.parse(frame)[0])[0] == (5 if signed else 6)
    with mock.patch.object(
        EntropyCodedQuantization, "_takes_coefficients", return_value=False
    ):
        assert len(frame) < 0.8 * len(make("ec", error=error).encode(tensor))
    decoded = decode(frame)
    assert decoded.dtype == dtype
    found = float((decoded.double() - tensor.double()).norm() / tensor.double().norm())
    assert 0.99 * error <= found <= error
    assert signed or float(decoded.min()) >= 0


def test_maps_that_are_not_smooth_are_not() -> None:
    noise = torch.randn(26, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    smooth_ = pictures((26, 4, 32, 32))
    for tensor, options in (
        (noise, {"error": 0.4}),
        (smooth_, {"error": 0.1}),
        (smooth_, {"step": 1.0}),
        (smooth_, {"bits": 0.5}),
        (smooth_, {"error": 0.4, "context": "none"}),
        (smooth_.half(), {"error": 0.4}),
        (smooth_[..., :30], {"error": 0.4}),
        (smooth_.flatten(1), {"error": 0.4}),
        (2.0**49 * smooth_ / smooth_.max(), {"error": 0.4}),
        (0 * smooth_, {"error": 0.4}),
    ):
        frame = make("ec", **options).encode(tensor)
        assert fields_of(wire.parse(frame)[0])[0] in (3, 4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["signed", "relu", "mostly zero"])
@pytest.mark.parametrize("error", [0.9, 0.3, 0.02, 0.0002])
def test_any_maps_come_back_as_the_page_says(
    shape: tuple[int, ...], kind: str, error: float
) -> None:
    for dtype in (torch.float32, torch.float64):
        tensor = smooth(shape, 3, signed=kind == "signed")
        tensor = (tensor.round() if kind == "mostly zero" else tensor).to(dtype)
        tensor.view(-1)[0] = 0.7
        frame = by_coefficients(error, tensor)
        found = decode(frame)
        away = float((found.double() - tensor.double()).norm())
        assert away <= error * float(tensor.double().norm())
        expected = reference_frames.frame(frame)
        assert torch.equal(
            found, torch.tensor(expected.tolist(), dtype=dtype).view(shape)
        )


def test_a_golden_frame() -> None:
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    tensor = ((y - 2) * (x - 1) / 4).relu().view(1, 1, 8, 8)
    frame = by_coefficients(0.1, tensor)
    assert frame.hex() == GOLDEN
    assert (decode(frame) - tensor).norm() <= 0.1 * tensor.norm()


def test_broken_frames_are_refused() -> None:
    tensor = pictures((2, 2, 8, 8))
    header, payload = wire.parse(by_coefficients(0.01, tensor))
    fields = fields_of(header)
    for shape, own, message in (
        ((2, 2, 2, 32), (6, *fields[1:]), "declares form 6"),
        ((4, 8, 8), (5, *fields[1:]), "declares form 5"),
        ((2, 2, 8, 8), (5, *fields[1:]), "keeps .* but marks"),
        ((2, 2, 8, 8), (6, fields[1], 0, *fields[3:]), "declares form 6"),
        ((2, 2, 8, 8), (6, 256, *fields[2:]), "256 symbols"),
        ((2, 2, 8, 8), (*fields[:3], 1, *fields[4:]), "1 exact values"),
    ):
        params = struct.pack("<BHBIIQ", *own)
        other = wire.Header("ec", header.dtype, shape, params)
        frame = wire.assemble(other, [bytes(payload)])
        with pytest.raises(FrameError, match=message):
            decode(frame)
    half = wire.Header("ec", torch.float16, header.shape, header.params)
    with pytest.raises(FrameError, match="declares form 6"):
        decode(wire.assemble(half, [bytes(payload)]))
    size = 4 * (fields[1] - 1)
    most = float(np.finfo(np.float32).max)
    for level in (most / 15, most / 16):
        body = struct.pack("<f", level) * (size // 4) + bytes(payload[size:])
        frame = wire.assemble(header, [body])
        if level < most / 15.5:
            assert bool(decode(frame).isfinite().all())
            continue
        with pytest.raises(FrameError, match="elements that are not finite"):
            decode(frame)


def test_tensors_that_need_exact_coefficients_have_none() -> None:
    """An element that is far larger than all others together is 16 of them."""
    tensor = 1e-3 * pictures((2, 2, 64, 64))
    tensor[0, 0, 0, 0] = 1
    frame = by_coefficients(0.001, tensor)
    assert fields_of(wire.parse(frame)[0])[0] == 3
    assert (decode(frame) - tensor).norm() <= 0.001 * tensor.norm()


def test_altered_frames_decode_to_finite_tensors_or_are_refused() -> None:
    tensor = pictures((2, 2, 8, 8))
    header, payload = wire.parse(by_coefficients(0.05, tensor))
    generator = random.Random(0)
    decoded = 0
    for _ in range(2000):
        params, body = bytearray(header.params), bytearray(payload)
        part = generator.choice((params, body, body))
        part[generator.randrange(len(part))] ^= 1 << generator.randrange(8)
        altered = wire.Header("ec", header.dtype, header.shape, bytes(params))
        try:
            found = decode(wire.assemble(altered, [bytes(body)]))
        except FrameError:
            continue
        assert found.shape == tensor.shape and bool(found.isfinite().all())
        decoded += 1
    assert 100 < decoded < 1900


GOLDEN = (
    "4d534b4c01030414656300000000000015de0d4d3b000000000000000100000001000000"
    "0800000008000000060d0001000000000a0000000700000000000000f994953f2e522c40"
    "40cf79408497a040fe9bd040fdb9f840ff6b1041fe7a2441fe893841fe984c41fea76041"
    "00007c410c8c6300a7ef3d8d58840f"
)
