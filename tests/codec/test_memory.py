"""Memory that decoding takes beside its output, whole and crafted frames alike."""

import ctypes
import random
import struct
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from masksl.codec import wire
from masksl.compress import FrameError, decode, decode_sparse, make
from tests.codec.test_dct import by_coefficients
from tests.codec.test_frames import memory
from tests.conftest import run_alone

SHAPE = (64, 16, 64, 64)
ELEMENTS = 2**22
CONSTANT = 2**23  # bytes, of whatever size the tensor is


def check() -> None:
    """Decode coded frames; at most 4 bytes an element may be taken beside the output.

    Frames that claim a large tensor, with a payload that is a coded plane all the same,
    are refused before anything is allocated.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(SHAPE, generator=generator)
    levels = torch.randint(0, 11, SHAPE, generator=generator)
    mask = torch.rand(SHAPE, generator=generator) < levels / 10
    cases: dict[str, tuple[bytes, dict[str, torch.Tensor]]] = {
        "ec": (make("ec", error=0.2).encode(tensor.relu()), {}),
        "ec, signed": (make("ec", error=0.05).encode(tensor), {}),
        "ec, float64": (make("ec", error=0.2).encode(tensor.double()), {}),
        "ec, coefficients": (by_coefficients(0.2, tensor.relu()), {}),
        "ec, coefficients, float64": (by_coefficients(0.2, tensor.double()), {}),
        "ec, exact values": (make("ec", step=0.0101).encode(tensor), {}),
        "ec, one row": (make("ec", context="none").encode(tensor), {}),
        "ms": (make("ms", lossless="context").encode(tensor.relu()), {}),
        "qu": (make("qu", bits=5, lossless="context").encode(tensor), {}),
        "qu, 16 bits": (make("qu", bits=16).encode(tensor), {}),
        "fp, signed": (make("fp", exponent=4, mantissa=3).encode(tensor), {}),
        "fp, bfloat16": (make("fp").encode(tensor.bfloat16()), {}),
        "qq": (make("qq", bits=5).encode(tensor), {}),
        "ms, all kept": (make("ms", sparsity=0).encode(tensor), {}),
        "ms, a sample": (make("ms", sparsity=0.1, scope="sample").encode(tensor), {}),
        "ms, rows": (make("ms", scope="sample").encode(tensor.view(-1, 4)), {}),
        "ms, bfloat16": (
            make("ms", sparsity=0.1, lossless="context").encode(tensor.bfloat16()),
            {},
        ),
        "sp": (make("sp", sparsity=0.5).encode(tensor), {}),
        "sp, all kept": (make("sp", sparsity=0, values="bfloat16").encode(tensor), {}),
        "sp, gaps": (make("sp", sparsity=0.1, positions="auto").encode(tensor), {}),
        "sp, few gaps": (make("sp", sparsity=0.9, positions="auto").encode(tensor), {}),
        "sp, context": (
            make("sp", sparsity=0.1, lossless="context").encode(tensor),
            {},
        ),
        "sp, indices": (all_indices(tensor), {}),
        "rt": (make("rt", sparsity=0.2).encode(tensor), {}),
        "sign": (make("sign").encode(tensor), {}),
        "qsgd": (make("qsgd", levels=100).encode(tensor), {}),
        "drive": (make("drive").encode(tensor), {}),
        "drive, small blocks": (make("drive", block=4).encode(tensor), {}),
        "drive, bfloat16": (make("drive", block=17).encode(tensor.bfloat16()), {}),
        "spsign, all kept": (make("spsign", sparsity=0).encode(tensor), {}),
        "spsign": (make("spsign", sparsity=0.5, magnitudes=4).encode(tensor), {}),
        "mask": (make("mask").encode(mask), {}),
        "mask, levels": (
            make("mask").encode(mask, reference=levels),
            {"reference": levels},
        ),
    }
    for name, (frame, more) in cases.items():
        taken, output = growth(
            lambda f=frame, m=more: decode(f, max_elements=ELEMENTS, **m)  # type: ignore[misc]
        )
        assert taken <= output + 4 * ELEMENTS + CONSTANT, (name, taken, output)
    frame = make("sp", sparsity=0.99, positions="auto").encode(tensor)
    taken, _ = growth(lambda: decode_sparse(frame, max_elements=ELEMENTS)[1])
    assert taken <= 4 * ELEMENTS, taken  # 12 bytes and some for each that is kept
    frame = make("spsign", sparsity=0).encode(tensor)
    taken, _ = growth(lambda: decode_sparse(frame, max_elements=ELEMENTS)[1])
    assert taken <= (12 + 4) * ELEMENTS + CONSTANT, taken
    header, payload = wire.parse(frame)
    without = bytes(payload[: 8 + ELEMENTS // 4])  # two magnitudes, symbols of 2 bits
    check_refusal(wire.assemble(header, [without]), "of 0 bytes")
    check_crafted(cases["ec"][0])
    check_claims()
    check_mutated()


def all_indices(tensor: torch.Tensor) -> bytes:
    """Return an `sp` frame that keeps every element, each with its index."""
    count = tensor.numel()
    header, _ = wire.parse(make("sp", sparsity=0).encode(tensor))
    params = struct.pack("<QBBB", count, 0, wire.DTYPE_CODES[tensor.dtype], 16)
    indices = torch.arange(count, dtype=torch.int32)
    claim = wire.Header(header.compressor, header.dtype, header.shape, params)
    return wire.assemble(claim, [tensor.view(-1), indices])


def check_crafted(frame: bytes) -> None:
    """Claim a larger tensor with the payload of a frame, and with one cut short."""
    header, payload = wire.parse(frame)
    for shape in ((1, 1, 8192, 8192), (2**22 + 1,), (2**31 - 1, 2**31 - 1)):
        claim = wire.Header(header.compressor, header.dtype, shape, header.params)
        for part in (bytes(payload), bytes(payload[:9388])):
            check_refusal(wire.assemble(claim, [part]), "elements, not 1 to")


def check_claims() -> None:
    """Claim as many elements as are allowed, with parts that are too short for them.

    The lengths of all parts but coded planes follow from the header.
    """
    tensor = torch.randn(2, 3, 8, 8)
    for name, options in (
        ("none", {}),
        ("none", {"values": "bfloat16"}),
        ("qu", {}),
        ("qu", {"bits": 12, "lossless": "fast"}),
        ("qq", {}),
        ("fp", {}),
        ("sign", {}),
        ("qsgd", {"lossless": "none"}),
        ("drive", {}),
        ("sp", {}),
        ("sp", {"lossless": "fast"}),
        ("rt", {"scope": "sample"}),
        ("ms", {}),
        ("ms", {"scope": "sample", "lossless": "fast"}),
    ):
        frame = make(name, **options).encode(tensor)
        header, payload = wire.parse(frame)
        for shape in (SHAPE, (2, ELEMENTS // 2)):
            claim = wire.Header(header.compressor, header.dtype, shape, header.params)
            check_refusal(wire.assemble(claim, [bytes(payload)]), "")
    check_refusal(make("mask").encode(tensor > 0)[:-1], "declares")


def check_refusal(frame: bytes, message: str) -> None:
    """Check that a frame is refused, and that less than 1 MiB is taken for it."""
    with pytest.raises(FrameError, match=message):
        decode(frame, max_elements=ELEMENTS)  # what is loaded at first use
    ctypes.CDLL(None).malloc_trim(0)
    before = memory("VmRSS", reset_peak=True)
    with pytest.raises(FrameError, match=message):
        decode(frame, max_elements=ELEMENTS)
    assert memory("VmHWM") - before < 2**20, (frame[8:16], message)


def check_mutated() -> None:
    """Change bytes of frames that claim large tensors.

    Whatever they are, they are decoded or refused within what a frame may take.
    """
    rng, decoded = random.Random(0), 0
    frames = [
        make(name, **options).encode(tensor)
        for name, options in MUTATED
        for tensor in (torch.randn(2, 3, 8, 8), torch.randn(700).relu())
    ]
    for _ in range(300):
        header, payload = wire.parse(rng.choice(frames))
        part = bytearray(payload)
        for _ in range(rng.choice((0, 1, 1, 3))):
            part[rng.randrange(len(part))] = rng.randrange(256)
        elements = 2 ** rng.randrange(8, 21)
        shape = rng.choice(((elements,), (4, 4, 4, elements // 64)))
        claim = wire.Header(header.compressor, header.dtype, shape, header.params)
        frame = wire.assemble(claim, [bytes(part)])
        ctypes.CDLL(None).malloc_trim(0)
        before = memory("VmRSS", reset_peak=True)
        try:
            decode(frame, max_elements=elements)
            decoded += 1
        except FrameError:
            pass
        taken = memory("VmHWM") - before
        assert taken <= 8 * elements + CONSTANT, (header, taken)
    assert 10 < decoded < 290


MUTATED: list[tuple[str, dict[str, Any]]] = [
    ("sp", {"sparsity": 0.9, "positions": "auto"}),
    ("sp", {"sparsity": 0.5, "positions": "auto"}),
    ("sp", {"lossless": "context"}),
    ("ms", {"lossless": "context"}),
    ("spsign", {"sparsity": 0.9}),
    ("qu", {"lossless": "context"}),
    ("ec", {"error": 0.3}),
    ("ec", {"step": 0.01, "context": "none"}),
]


def growth(call: Callable[[], torch.Tensor]) -> tuple[int, int]:
    """Return the memory that a call takes at most, and the size of what it returns."""
    call()  # what is loaded and kept at first use
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again, unseen
    before = memory("VmRSS", reset_peak=True)
    output = call()
    taken = memory("VmHWM") - before
    assert taken >= output.nbytes  # otherwise nothing was measured
    return taken, output.nbytes


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process")
@pytest.mark.slow
def test_decoding_takes_at_most_four_bytes_an_element() -> None:
    run_alone("tests.codec.test_memory")


if __name__ == "__main__":
    check()
