"""Kept elements of a frame, without the tensor they are of."""

import struct
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from masksl.codec import wire
from masksl.compress import (
    COMPRESSORS,
    FrameError,
    decode,
    decode_sparse,
    has_positions,
    kept_positions,
    make,
)
from tests.codec.test_frames import memory

OPTIONS = {
    "sparsity": st.sampled_from([0.0, 0.3, 0.9, 0.98, 0.999]),
    "scope": st.sampled_from(["tensor", "sample"]),
    "values": st.sampled_from(["float32", "bfloat16", "float16"]),
    "positions": st.sampled_from(["paper", "auto"]),
    "lossless": st.sampled_from(["none", "fast", "context", "auto"]),
}
RANDOM = {
    "alpha": st.sampled_from([0.0, 0.2, 0.8]),
    "evaluation": st.sampled_from(["topk", "random"]),
}
SIGNS = {
    "sparsity": OPTIONS["sparsity"],
    "magnitudes": st.sampled_from([1, 2, 4]),
    "layout": st.sampled_from(["auto", "none"]),
}
KEEPING = [name for name in COMPRESSORS if has_positions(name)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """Draw a compressor with positions and all of its options."""
    name = draw(st.sampled_from(KEEPING))
    every = OPTIONS | (RANDOM if name == "rt" else {})
    if name == "spsign":
        every = SIGNS
    return name, {key: draw(value) for key, value in every.items()}


@given(
    case=cases(),
    dtype=st.sampled_from(
        [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    ),
    shape=st.lists(st.integers(1, 9), max_size=4),
    zeros=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_scattered_they_are_the_tensor(
    case: tuple[str, dict[str, Any]],
    dtype: torch.dtype,
    shape: list[int],
    zeros: bool,
    training: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator).to(dtype)
    if zeros:
        tensor = tensor.relu()
    name, options = case
    frame = make(name, **options).encode(tensor, seed=seed, training=training)
    positions, values = decode_sparse(frame, max_elements=tensor.numel())
    assert positions.dtype == torch.int64 and values.dtype == dtype
    assert positions.shape == values.shape == (positions.numel(),)
    assert bool((positions[1:] > positions[:-1]).all())
    scattered = tensor.new_zeros(tensor.numel()).index_copy_(0, positions, values)
    assert torch.equal(scattered.view(tensor.shape), decode(frame))
    assert torch.equal(kept_positions(frame), positions)


@pytest.mark.parametrize("name", [n for n in COMPRESSORS if n not in KEEPING])
def test_frames_without_positions_are_refused(name: str) -> None:
    dtype = COMPRESSORS[name].dtypes[-1]
    frame = make(name).encode((torch.rand(50) * 2).floor().to(dtype))
    for read in (decode_sparse, kept_positions):
        with pytest.raises(FrameError, match=f"{name} frame has no positions"):
            read(frame)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["sp", "rt"])
def test_errors_are_those_of_decode(name: str) -> None:
    frame = make(name, sparsity=0.6).encode(torch.randn(40))
    header, payload = wire.parse(frame)
    infinite = struct.pack("<f", torch.inf) + bytes(payload[4:])
    for broken in (
        frame[:-1],
        frame[:-1] + bytes([frame[-1] ^ 1]),
        wire.assemble(header, [infinite]),
        wire.assemble(header, [bytes(payload) + b"\0"]),
        wire.assemble(header, [bytes(payload[:-1]) + b"\xff"]),
    ):
        with pytest.raises(FrameError) as whole:
            decode(broken)
        with pytest.raises(FrameError) as sparse:
            decode_sparse(broken)
        assert str(sparse.value) == str(whole.value)
    with pytest.raises(FrameError, match="declares 40 elements, not 1 to 39"):
        decode_sparse(frame, max_elements=39)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("positions", ["paper", "auto"])
def test_the_tensor_is_not_allocated(positions: str) -> None:
    tensor = torch.zeros(2**24)
    tensor[:: 2**12] = torch.randn(2**12)
    frame = make("sp", sparsity=0.9999, positions=positions).encode(tensor)
    decode_sparse(frame)
    before = memory("VmRSS", reset_peak=True)
    kept, values = decode_sparse(frame)
    assert memory("VmHWM") - before < 2**21 < tensor.nbytes
    assert torch.equal(values, tensor[kept])


def test_a_plugin_decodes_by_one_method() -> None:
    """`unpack_sparse` alone gives positions to frames and frame-sets."""
    assert KEEPING == ["sp", "rt", "spsign"]
    for name in KEEPING:
        assert "unpack_sparse" in dir(COMPRESSORS[name])
