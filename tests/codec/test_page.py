"""Frames and frame-sets decode as docs/frame.md says.

The decoder of `tests.codec.reference_frames` is written from the page alone.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masksl.compress import COMPRESSORS, decode, decode_set, encode_set, make
from tests.codec import reference_frames

CODES = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.float64: 4}
CODES |= {torch.bool: 5, torch.uint8: 6, torch.int64: 13, torch.int32: 11}
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

LOSSLESS = st.sampled_from(["none", "fast", "context", "auto"])
SCOPE = st.sampled_from(["tensor", "sample"])
VALUES = st.sampled_from(["float32", "bfloat16", "float16"])
KEPT = {
    "sparsity": st.sampled_from([0.0, 0.3, 0.8, 0.98]),
    "scope": SCOPE,
    "values": VALUES,
    "lossless": LOSSLESS,
}
OPTIONS: dict[str, dict[str, st.SearchStrategy]] = {
    "none": {"values": VALUES},
    "qu": {"bits": st.integers(1, 16), "lossless": LOSSLESS},
    "qq": {"bits": st.integers(2, 8), "lossless": LOSSLESS},
    "fp": {
        "exponent": st.integers(1, 5),
        "mantissa": st.integers(0, 3),
        "scale": st.sampled_from(["absmax", "none"]),
        "lossless": LOSSLESS,
    },
    "sp": KEPT | {"positions": st.sampled_from(["paper", "auto"])},
    "rt": KEPT | {"alpha": st.sampled_from([0.0, 0.4])},
    "ms": KEPT | {"bits": st.integers(1, 8)},
    "spsign": {
        "sparsity": st.sampled_from([0.0, 0.3, 0.8, 0.98]),
        "magnitudes": st.sampled_from([1, 2, 4]),
        "layout": st.sampled_from(["auto", "none"]),
    },
    "sign": {"magnitude": st.sampled_from(["none", "mean"]), "lossless": LOSSLESS},
    "qsgd": {"levels": st.integers(1, 127), "lossless": LOSSLESS},
    "drive": {"block": st.integers(3, 8)},
    "ec": {
        "step": st.sampled_from([0.004, 0.1, 1.0]),
        "context": st.sampled_from(["spatial", "none"]),
        "rounding": st.sampled_from(["nearest", "stochastic"]),
    },
}


@st.composite
def compressors(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """Draw a compressor of floating tensors with all of its options."""
    name = draw(st.sampled_from(sorted(OPTIONS)))
    return name, {key: draw(value) for key, value in OPTIONS[name].items()}


def tensors(shape: list[int], dtype: torch.dtype, kind: str, seed: int) -> torch.Tensor:
    """Return a tensor of values that all floating types can hold."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator)
    if kind != "signed":
        tensor = tensor.relu() if kind == "relu" else tensor.relu().round()
    return tensor.to(dtype)


def check(found: torch.Tensor, by_page: Any, exact: bool) -> None:
    """Compare a decoded tensor with that of the page, to the bit where it is exact."""
    expected = torch.tensor(by_page.tolist(), dtype=torch.float64).view(found.shape)
    if exact:
        assert torch.equal(found.double(), expected)
    else:
        assert torch.allclose(found.double(), expected, rtol=1e-12, atol=1e-300)


def test_every_compressor_is_on_the_page() -> None:
    assert set(OPTIONS) | {"mask"} == set(COMPRESSORS)


@settings(deadline=None)
@given(
    case=compressors(),
    shape=st.lists(st.integers(1, 7), max_size=4),
    dtype=st.sampled_from(FLOATS),
    kind=st.sampled_from(["signed", "relu", "mostly zero"]),
    seed=st.integers(0, 2**32),
)
def test_frames_are_those_of_the_page(
    case: tuple[str, dict[str, Any]],
    shape: list[int],
    dtype: torch.dtype,
    kind: str,
    seed: int,
) -> None:
    name, options = case
    tensor = tensors(shape, dtype, kind, seed)
    frame = make(name, **options).encode(tensor, seed=seed)
    # The inverse of the normal distribution is no exact function.
    exact = name != "qq" or dtype not in (torch.float32, torch.float64)
    found, by_page = decode(frame), reference_frames.frame(frame)
    if name == "qq" and dtype == torch.float32:
        assert torch.allclose(found, torch.tensor(by_page.tolist()), rtol=2e-7)
    else:
        check(found, by_page, exact)


@settings(deadline=None)
@given(
    case=compressors(),
    joined=st.booleans(),
    scaled=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**32),
)
def test_frame_sets_are_those_of_the_page(
    case: tuple[str, dict[str, Any]],
    joined: bool,
    scaled: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    name, options = case
    own = {
        "weight": tensors([3, 2, 4], dtype, "signed", seed),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "steps": torch.tensor(7),
        "bias": tensors([5], dtype, "signed", seed + 1),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(3, dtype=torch.uint8),
    }
    data = encode_set(own, make(name, **options), joined=joined, scaled=scaled)
    like = [(CODES[each.dtype], tuple(each.shape)) for each in own.values()]
    by_page = reference_frames.frame_set(data, like)
    for found, expected in zip(decode_set(data, own).values(), by_page, strict=True):
        if name == "qq":
            values = torch.tensor(expected.tolist(), dtype=found.dtype)
            assert torch.allclose(
                found.double(), values.view(found.shape).double(), rtol=1e-2
            )
        else:
            check(found, expected, True)


@pytest.mark.parametrize("compressed", [False, True])
def test_sets_of_exact_tensors_are_those_of_the_page(compressed: bool) -> None:
    own = {
        "a": torch.randn(3, 3),
        "b": torch.arange(4),
        "c": torch.tensor(True),
        "d": torch.randn(2).double(),
    }
    data = encode_set(own, make("none") if compressed else None)
    like = [(CODES[each.dtype], tuple(each.shape)) for each in own.values()]
    for tensor, expected in zip(
        own.values(), reference_frames.frame_set(data, like), strict=True
    ):
        check(tensor, expected, True)
