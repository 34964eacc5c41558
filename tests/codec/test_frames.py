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
from tests.codec import reference_frames
from tests.codec.test_sizes import plane_of
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
    ("spsign", {"sparsity": 0.9}),
    ("spsign", {"sparsity": 0.9, "magnitudes": 4, "layout": "none"}),
    ("sign", {}),
    ("sign", {"magnitude": "mean", "lossless": "context"}),
    ("qsgd", {"levels": 3}),
    ("qsgd", {"lossless": "none"}),
    ("drive", {}),
    ("drive", {"block": 5}),
    ("ec", {}),
    ("ec", {"error": 0.1, "context": "none"}),
    ("ec", {"step": 0.01}),
    ("ec", {"step": 2.0, "rounding": "stochastic"}),
    ("mask", {}),
    ("mask", {"code": "packed"}),
    ("mask", {"code": "auto"}),  # by a reference
]
TRIES = 4000  # altered frames of a case
GRID = (torch.arange(24).view(2, 3, 4) * 5 % 17 - 8).float() / 4
# Maps, and a mask and its reference, large enough for coded parts to be the smallest.
MAPS = (torch.arange(384).view(2, 3, 8, 8) // 5 * 7 % 40 // 3).float() ** 2
BEFORE = torch.arange(384) * 37 % 101 < 20
MASK = BEFORE ^ (torch.arange(384) % 90 == 7)

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
    ("spsign", "sparsity=0.75,magnitudes=4"): (
        "4d534b4c0103030b73707369676e0000fa918d9e16000000000000000200000003000000"
        "0400000006000000000000000400000000e03f0000004000000040000000404334008904"
        "12"
    ),
    ("sign", "magnitude=mean"): (
        "4d534b4c010303097369676e000000005c8c86b703000000000000000200000003000000"
        "0400000000000000000000f13fb3c926"
    ),
    ("qsgd", "levels=3,lossless=none"): (
        "4d534b4c0103030a71736764000000002d7d95df09000000000000000200000003000000"
        "0400000003006c4e7900852a1840120244480008111021"
    ),
    ("drive", "block=4"): (
        "4d534b4c01030309647269766500000032cbb4fb0b000000000000000200000003000000"
        "04000000040000000000000000721cc73ff304b53fe452fa"
    ),
    ("ec", "step=0.5,deadzone=0.55"): (
        "4d534b4c010303146563000000000000caa376dd17000000000000000200000003000000"
        "0400000003040001000000000800000014000000000000000000203f0000a03f0000f03f"
        "03176250f6a252b8d3d404"
    ),
}

# Frames with coded parts, of MAPS and of MASK, by the form of the part.
CODED = {
    ("ms", "sparsity=0.97,lossless=context", 3): (
        "4d534b4c0103040d6d730000000000001cceef4752000000000000000200000003000000"
        "08000000080000000b000000000000000200000303000010430000294300002943000029"
        "430000294300002943000029430000294300002943000029430000294303c7f06d3122ec"
        "813ea58361a8987d4dd4d249ffd6a7c9163bda778fb3685b8f333a59e0f9ac"
    ),
    ("sp", "sparsity=0.97,positions=auto", 18): (
        "4d534b4c0103040b7370000000000000b7c12b8c3d000000000000000200000003000000"
        "08000000080000000b000000000000000003120000104300002943000029430000294300"
        "002943000029430000294300002943000029430000294300002943031900050000000021"
        "fe1ce02f000c0000"
    ),
    ("spsign", "sparsity=0.97,layout=none", 18): (
        "4d534b4c0103040b73707369676e000062921ce81c000000000000000200000003000000"
        "08000000080000000b000000000000000200120000104300002943a8aa2a031900050000"
        "000021fe1ce02f000c0000"
    ),
    ("ec", "step=0.5,deadzone=0.55", 3): (
        "4d534b4c010304146563000000000000279bfb0871000000000000000200000003000000"
        "08000000080000000308000000000000510000000000000000000000000060405555c941"
        "00004442a38b92420000c8420000f242000010430000294307c0fc92c457001121a52229"
        "54f5791d04e3c743e7a2776db78f951ed846fce2eb21af2a8a25e2329b2a4fce134a540f"
        "dabe024654d1a33693a2c3a0e260052779ce1ea6d1128a899a6ca9aa754eb68560"
    ),
    ("ec", "step=0.5,deadzone=0.55,context=none", 4): (
        "4d534b4c0103041465630000000000007fd663ff77000000000000000200000003000000"
        "08000000080000000408000000000000570000000000000000000000000060405555c941"
        "00004442a38b92420000c8420000f242000010430000294300c169e095b6929d58b0e5d2"
        "1c649c09dce1f74a7695845fc168cdf0f0f98c10a1b4ee02f8561b54910c044c56fa9938"
        "e6a681bbbee1bdf3db6e58897cf342f77925eafcedf23dd5f823470f697caa7f3f9cac37"
        "6cd7bf"
    ),
    ("mask", "code=packed", 0): (
        "4d534b4c010501056d61736b000000008fdbe4d430000000000000008001000000000000"
        "0089484002121290808404242023010948404202129090800c2424200109484840021232"
        "90808404242001090948c04202"
    ),
    ("mask", "", 1): (
        "4d534b4c010501056d61736b00000000fb6e83cc24000000000000008001000001000000"
        "0051183549ce9e3bf93da9a58eac3ffd852ab0493ffb411cd685c38dc9097c44e92061a4"
        "15"
    ),
    ("mask", "", 2): (
        "4d534b4c010501056d61736b000000009db11372070000000000000080010000022fc228"
        "37054c16d34b3c20"
    ),
}
PLACES = {
    "ms": 12,
    "sp": 10,
    "spsign": 10,
    "ec": 0,
    "mask": 0,
}  # of the form in the parameters


def sample() -> torch.Tensor:
    return torch.randn(7, 3, 5, 4, generator=torch.Generator().manual_seed(1))


def encoded(
    case: tuple[str, Any], tensor: torch.Tensor
) -> tuple[bytes, dict[str, torch.Tensor]]:
    """Return a frame of a case, and what `decode` takes beside it."""
    name, options = case
    if name != "mask":
        return make(name, **options).encode(tensor), {}
    given = {"reference": tensor > 1.3} if options == {"code": "auto"} else {}
    frame = make(name, **options).encode(tensor > 1.2, **given)
    form = wire.parse(frame)[0].params[0]
    assert form == (2 if given else int(not options))
    return frame, given


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_truncation_is_refused(case: tuple[str, Any]) -> None:
    frame, given = encoded(case, sample())
    for length in range(len(frame)):
        with pytest.raises(FrameError):
            decode(frame[:length], **given)
    with pytest.raises(FrameError, match="declares"):
        decode(frame + b"\0", **given)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_alteration_is_refused(case: tuple[str, Any]) -> None:
    frame, given = encoded(case, sample())
    rng = random.Random(0)
    for _ in range(TRIES):
        altered = bytearray(frame)
        altered[rng.randrange(len(frame))] ^= rng.randrange(1, 256)
        with pytest.raises(FrameError):
            decode(altered, **given)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_crafted_frames_are_refused_or_whole(case: tuple[str, Any]) -> None:
    """Alterations and truncations with the right checksum: no other error, no wrong
    shape."""
    frame, given = encoded(case, sample())
    start = len(frame) - len(wire.parse(frame)[1])
    rng = random.Random(1)
    refused = 0
    for _ in range(TRIES):
        altered = bytearray(frame)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(4, start if rng.random() < 0.8 else len(frame))
            altered[at] = rng.randrange(256)
        if rng.random() < 0.2:  # cut short as well, with the right length
            altered = altered[: rng.randrange(start, len(frame))]
            altered[20:28] = struct.pack("<Q", len(altered) - start)
        crafted = reseal(altered)
        try:
            decoded = decode(crafted, max_elements=2**20, **given)
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
    assert refused > 0.3 * TRIES


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_refusal_allocates_next_to_nothing(case: tuple[str, Any]) -> None:
    """Counts at odds with the payload and huge shapes fail before any allocation."""
    frame, given = encoded(case, torch.randn(16, 2**16))
    header, payload = wire.parse(frame)
    start = len(frame) - len(payload)
    shape = wire._FIXED.size
    crafted = []
    huge = bytearray(frame)
    huge[shape : shape + 4] = struct.pack("<I", 2**29)
    crafted.append(reseal(huge))
    short = bytearray(frame[:-1])
    short[20:28] = struct.pack("<Q", len(payload) - 1)
    if not ends_coded(header):  # there, zeros follow without end
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
            decode(broken, **given)
        assert memory("VmHWM") - before < 2**20


def ends_coded(header: wire.Header) -> bool:
    """Return whether a frame ends with the bytes of the coder."""
    match header.compressor:
        case "none" | "ec" | "drive":
            return False
        case "mask":
            return header.params[0] > 0
    return plane_of(header)[0] == 3


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
    found = re.search(rf"{figure}:\s+(\d+) kB", status)
    assert found is not None
    return 1024 * int(found[1])


def options_in(text: str) -> dict[str, Any]:
    """Return the options that a key of golden frames writes out."""
    options: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        key, value = pair.split("=")
        number = value.replace(".", "").isdigit()
        options[key] = float(value) if "." in value else int(value) if number else value
    return options


@pytest.mark.parametrize(("name", "options"), list(GOLDEN))
def test_golden_frames(name: str, options: str) -> None:
    golden = bytes.fromhex(GOLDEN[name, options])
    frame = make(name, **options_in(options)).encode(GRID)
    assert frame == golden
    assert decode(golden).shape == GRID.shape
    assert torch.equal(decode(golden), decode(frame))


@pytest.mark.parametrize(("name", "options", "form"), list(CODED))
def test_golden_frames_with_coded_parts(name: str, options: str, form: int) -> None:
    golden, given = bytes.fromhex(CODED[name, options, form]), options_in(options)
    compressor, tensor = make(name, **given), MASK if name == "mask" else MAPS
    reference = BEFORE if name == "mask" and form == 2 else None
    assert compressor.encode(tensor, reference=reference) == golden
    assert wire.parse(golden)[0].params[PLACES[name]] == form
    expected = MASK
    if name == "ec":
        expected = torch.tensor(reference_frames.frame(golden).tolist())
    elif name != "mask":
        expected = decode(make(name, sparsity=given["sparsity"]).encode(MAPS))
    assert torch.equal(decode(golden, reference=reference), expected)


def test_every_compressor_has_a_golden_frame() -> None:
    assert {name for name, *_ in (*GOLDEN, *CODED)} == set(COMPRESSORS)
