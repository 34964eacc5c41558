"""Broken frames are refused, golden frames stay as they are."""

import random
import re
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from masksl.codec import wire
from masksl.compress import (
    COMPRESSORS,
    FrameError,
    decode,
    has_positions,
    kept_positions,
    make,
)
from tests.codec.test_wire import reseal

CASES = [
    ("none", {}),
    ("none", {"values": "bfloat16"}),
    ("qu", {"bits": 3}),
    ("qu", {"bits": 9}),
    ("sp", {"sparsity": 0.9}),
    ("sp", {"sparsity": 0.98}),
    ("ms", {"sparsity": 0.9, "bits": 2}),
    ("ms", {"sparsity": 0.9, "bits": 3}),
    ("ms", {"sparsity": 0.9, "scope": "sample", "lossless": "context"}),
    ("ms", {"sparsity": 0.9, "values": "float16", "lossless": "fast"}),
    ("qu", {"bits": 3, "lossless": "context"}),
    ("qq", {"bits": 3}),
    ("fp", {"exponent": 2, "mantissa": 1}),
    ("sp", {"sparsity": 0.98, "positions": "auto"}),
    ("rt", {"sparsity": 0.9, "positions": "auto", "lossless": "auto"}),
    ("qu", {"bits": 4, "lossless": "fast"}),
    ("qq", {"bits": 3, "lossless": "context"}),
    ("qq", {"bits": 3, "lossless": "fast"}),
    ("fp", {"exponent": 3, "mantissa": 2, "lossless": "context"}),
    ("fp", {"exponent": 3, "mantissa": 2, "lossless": "fast"}),
    ("sp", {"sparsity": 0.9, "lossless": "context"}),
    ("sp", {"sparsity": 0.9, "lossless": "fast"}),
    ("ec", {}),
    ("ec", {"error": 0.1, "context": "none"}),
    ("ec", {"step": 0.01}),
]
GRID = (torch.arange(24).view(2, 3, 4) * 5 % 17 - 8).float() / 4

# Frames of GRID: hexadecimal, header and payload. They hold the layout of version 1.
GOLDEN = {
    ("none", ""): (
        "4d534b4c010303016e6f6e6500000000d305175360000000000000000200000003000000"
        "0400000003000000c0000040bf0000003f0000e03f0000a0bf000000000000a03f0000e0"
        "bf000000bf0000403f00000040000080bf0000803e0000c03f0000c0bf000080be000080"
        "3f000000c0000040bf0000003f0000e03f0000a0bf000000000000a03f"
    ),
    ("qu", "bits=3"): (
        "4d534b4c0103031271750000000000004d5b70ff09000000000000000200000003000000"
        "04000000030000000000000000c00000000000000040101f1aeb456785f8d0"
    ),
    ("qu", "bits=10"): (
        "4d534b4c01030312717500000000000094e8f5821e000000000000000200000003000000"
        "040000000a0000000000000000c0000000000000004000407fbfc0003f4080bfff003f7f"
        "80c0ff00407fbfc0003fe438794e92e3"
    ),
    ("sp", "sparsity=0.75"): (
        "4d534b4c0103030b73700000000000003a18b6641b000000000000000200000003000000"
        "040000000600000000000000000300000000c00000e03f0000e0bf00000040000000c000"
        "00e03f890412"
    ),
    ("sp", "sparsity=0.96"): (
        "4d534b4c0103030b7370000000000000d5d3453e07000000000000000200000003000000"
        "040000000100000000000000000300000000c0010000"
    ),
    ("ms", "sparsity=0.75,bits=2"): (
        "4d534b4c0103030d6d73000000000000881af82121000000000000000200000003000000"
        "0400000006000000000000000201000300000000c00000e03f0000e0bf00000040000000"
        "c00000e03f93c926d7e2b5285e8b"
    ),
    ("ms", "sparsity=0.5,bits=5"): (
        "4d534b4c0103030d6d73000000000000bddc323742000000000000000200000003000000"
        "040000000c000000000000000501000300000000c00000e03f0000a0bf0000a03f0000e0"
        "bf000000400000c03f0000c0bf000000c00000e03f0000a0bf0000a03f93c9267fb2ffc1"
        "ff6cfe6cfe37f94ff63ff8"
    ),
    ("qq", "bits=3"): (
        "4d534b4c010303127171000000000000e7e2b08909000000000000000200000003000000"
        "040000000300ae47e17a14aeef3f0000000000000040489f19eac34346facc"
    ),
    ("fp", "exponent=3,mantissa=2"): (
        "4d534b4c0103030c6670000000000000a07a2c0412000000000000000200000003000000"
        "0400000003020100922449922449b23f93c9263f5fcf01f737ff3d7b9ffbe7eb39e0"
    ),
    ("rt", "sparsity=0.75"): (
        "4d534b4c0103030b7274000000000000c69c50c81b000000000000000200000003000000"
        "0400000006000000000000000003000000e03f0000e0bf00000040000000c00000e03f00"
        "000000880452"
    ),
    ("ec", "step=0.5,deadzone=0.55"): (
        "4d534b4c010303136563000000000000dc8aee1031000000000000000200000003000000"
        "04000000040001000000002200000014000000000000000000203f0000a03f0000f03f00"
        "010102030302030e00000028b52ffd200529000000292019201d25d14b9786b946d3d404"
    ),
}


def sample() -> torch.Tensor:
    return torch.randn(7, 3, 5, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_truncation_is_refused(case: tuple[str, Any]) -> None:
    frame = make(case[0], **case[1]).encode(sample())
    for length in range(len(frame)):
        with pytest.raises(FrameError):
            decode(frame[:length])
    with pytest.raises(FrameError, match="declares"):
        decode(frame + b"\0")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_alteration_is_refused(case: tuple[str, Any]) -> None:
    frame = make(case[0], **case[1]).encode(sample())
    rng = random.Random(0)
    for _ in range(10_000):
        altered = bytearray(frame)
        altered[rng.randrange(len(frame))] ^= rng.randrange(1, 256)
        with pytest.raises(FrameError):
            decode(altered)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_crafted_frames_are_refused_or_whole(case: tuple[str, Any]) -> None:
    """Alterations and truncations with the right checksum: no other error, no wrong
    shape."""
    frame = make(case[0], **case[1]).encode(sample())
    start = len(frame) - len(wire.parse(frame)[1])
    rng = random.Random(1)
    refused = 0
    for _ in range(10_000):
        altered = bytearray(frame)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(4, start if rng.random() < 0.8 else len(frame))
            altered[at] = rng.randrange(256)
        if rng.random() < 0.2:  # cut short as well, with the right length
            altered = altered[: rng.randrange(start, len(frame))]
            altered[20:28] = struct.pack("<Q", len(altered) - start)
        crafted = reseal(altered)
        try:
            decoded = decode(crafted, max_elements=2**20)
        except FrameError:
            refused += 1
        else:
            assert decoded.shape == wire.parse(crafted)[0].shape
            assert bool(torch.isfinite(decoded).all())
            if has_positions(wire.parse(crafted)[0].compressor):
                positions = kept_positions(crafted)
                dropped = torch.ones(decoded.numel(), dtype=torch.bool)
                dropped[positions] = False
                assert not decoded.view(-1)[dropped].any()
    assert refused > 3000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_refusal_allocates_next_to_nothing(case: tuple[str, Any]) -> None:
    """Counts at odds with the payload and huge shapes fail before any allocation."""
    frame = make(case[0], **case[1]).encode(torch.randn(2**20))
    header, payload = wire.parse(frame)
    start = len(frame) - len(payload)
    shape = wire._FIXED.size
    crafted = []
    huge = bytearray(frame)
    huge[shape : shape + 4] = struct.pack("<I", 2**29)
    crafted.append(reseal(huge))
    short = bytearray(frame[:-1])
    short[20:28] = struct.pack("<Q", len(payload) - 1)
    crafted.append(reseal(short))
    crafted.append(frame[:-1])
    altered = bytearray(frame)
    altered[start] ^= 1
    crafted.append(bytes(altered))
    if case in (("sp", {"sparsity": 0.9}), ("ms", {"sparsity": 0.9, "bits": 2})):
        for change in (-1, 1):  # with the payload cut or filled up to match
            kept = struct.unpack_from("<Q", header.params)[0] + change
            miscounted = bytearray(frame[: start - len(header.params)])
            miscounted += struct.pack("<Q", kept) + header.params[8:]
            miscounted += payload[4:] if change < 0 else b"\0" * 4 + bytes(payload)
            miscounted[20:28] = struct.pack("<Q", len(payload) + 4 * change)
            crafted.append(reseal(miscounted))
    for broken in crafted:
        before = memory("VmRSS", reset_peak=True)
        with pytest.raises(FrameError):
            decode(broken)
        assert memory("VmHWM") - before < 2**20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_centroids_must_fit_the_type(dtype: torch.dtype) -> None:
    """They travel in float32 and may be more than the tensor's type can hold."""
    frame = make("ec").encode(torch.rand(50).to(dtype))
    header, payload = wire.parse(frame)
    centroid = struct.pack("<f", 3.4e38 if dtype == torch.bfloat16 else 66000.0)
    crafted = wire.assemble(header, [centroid + bytes(payload[4:])])
    with pytest.raises(FrameError, match=f"centroids that no {dtype} can be"):
        decode(crafted)


def memory(figure: str, reset_peak: bool = False) -> int:
    """Return a figure of this process's memory in bytes."""
    if reset_peak:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.search(rf"{figure}:\s+(\d+) kB", status)[1])


@pytest.mark.parametrize(("name", "options"), list(GOLDEN))
def test_golden_frames(name: str, options: str) -> None:
    pairs = [pair.split("=") for pair in options.split(",") if pair]
    values = {key: float(v) if "." in v else int(v) for key, v in pairs}
    golden = bytes.fromhex(GOLDEN[name, options])
    assert make(name, **values).encode(GRID) == golden
    assert decode(golden).shape == GRID.shape
    assert torch.equal(decode(golden), decode(make(name, **values).encode(GRID)))


def test_every_compressor_has_a_golden_frame() -> None:
    assert {name for name, _ in GOLDEN} == set(COMPRESSORS)
