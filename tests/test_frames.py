"""Broken frames are refused, golden frames stay as they are."""

import random
import re
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from masksl import wire
from masksl.compress import FrameError, decode, make
from tests.test_wire import reseal

CASES = [
    ("none", {}),
    ("none", {"values": "bfloat16"}),
    ("qu", {"bits": 3}),
    ("qu", {"bits": 9}),
    ("sp", {"sparsity": 0.9}),
    ("sp", {"sparsity": 0.98}),
    ("ms", {"sparsity": 0.9, "bits": 2}),
    ("ms", {"sparsity": 0.9, "bits": 3}),
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
        "4d534b4c0103031171750000000000004efc239c09000000000000000200000003000000"
        "040000000300000000000000c00000000000000040101f1aeb456785f8d0"
    ),
    ("qu", "bits=10"): (
        "4d534b4c010303117175000000000000c5c246ae1e000000000000000200000003000000"
        "040000000a00000000000000c0000000000000004000407fbfc0003f4080bfff003f7f80"
        "c0ff00407fbfc0003fe438794e92e3"
    ),
    ("sp", "sparsity=0.75"): (
        "4d534b4c010303097370000000000000a755263d1b000000000000000200000003000000"
        "04000000060000000000000000000000c00000e03f0000e0bf00000040000000c00000e0"
        "3f890412"
    ),
    ("sp", "sparsity=0.96"): (
        "4d534b4c0103030973700000000000007838701307000000000000000200000003000000"
        "04000000010000000000000000000000c0010000"
    ),
    ("ms", "sparsity=0.75,bits=2"): (
        "4d534b4c0103030a6d73000000000000019697f021000000000000000200000003000000"
        "0400000006000000000000000201000000c00000e03f0000e0bf00000040000000c00000"
        "e03fd7e2b5285e8b93c926"
    ),
    ("ms", "sparsity=0.5,bits=5"): (
        "4d534b4c0103030a6d730000000000003ee7cd9942000000000000000200000003000000"
        "040000000c000000000000000501000000c00000e03f0000a0bf0000a03f0000e0bf0000"
        "00400000c03f0000c0bf000000c00000e03f0000a0bf0000a03f7fb2ffc1ff6cfe6cfe37"
        "f94ff63ff893c926"
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
    """Alterations with the right checksum: no other error, no wrong shape."""
    frame = make(case[0], **case[1]).encode(sample())
    start = len(frame) - len(wire.parse(frame)[1])
    rng = random.Random(1)
    refused = 0
    for _ in range(3_000):
        altered = bytearray(frame)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(4, start if rng.random() < 0.8 else len(frame))
            altered[at] = rng.randrange(256)
        crafted = reseal(altered)
        try:
            decoded = decode(crafted, max_elements=2**20)
        except FrameError:
            refused += 1
        else:
            assert decoded.shape == wire.parse(crafted)[0].shape
            assert bool(torch.isfinite(decoded).all())
    assert refused > 1000


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
    if case[0] == "ms" or case[1].get("sparsity") == 0.9:
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
    assert {name for name, _ in GOLDEN} == {"none", "qu", "sp", "ms"}
