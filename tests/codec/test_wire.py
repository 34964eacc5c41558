"""Bit packing, the header, and the layout that golden frames hold."""

import struct
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from masksl.codec import wire
from masksl.codec.bits import count_symbols, pack_bits, packed_size, unpack_bits
from masksl.compress import COMPRESSORS, decode, make


@given(
    bits=st.integers(1, 16),
    count=st.integers(1, 200),
    seed=st.integers(0, 2**32),
)
def test_packing_is_lossless_and_dense(bits: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.uint8 if bits <= 8 else torch.int32
    symbols = torch.randint(0, 2**bits, (count,), generator=generator).to(dtype)
    packed = pack_bits(symbols, bits)
    dense = (count * bits + 7) // 8
    split = count + (count * (bits - 8) + 7) // 8
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_size(count, bits) == min(dense, split)
    assert torch.equal(unpack_bits(packed, count, bits), symbols)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_one_little_endian_number(bits: int) -> None:
    symbols = [(7 * i + 3) % 2**bits for i in range(21)]
    number = sum(symbol << (bits * i) for i, symbol in enumerate(symbols))
    packed = pack_bits(torch.tensor(symbols, dtype=torch.uint8), bits)
    assert bytes(packed.tolist()) == number.to_bytes((21 * bits + 7) // 8, "little")


def test_counting_in_pieces_counts_all() -> None:
    symbols = torch.randint(0, 8, (300_001,), dtype=torch.uint8)
    packed = memoryview(pack_bits(symbols, 3).numpy())
    for symbol in (0, 7):
        found = count_symbols(packed, 300_001, 3, symbol)
        assert found == int((symbols == symbol).sum())


def test_header_is_the_documented_table() -> None:
    frame = make("ms", sparsity=0.5, bits=2).encode(torch.ones(2, 3, 1, 4))
    fields = struct.unpack_from("<4sBBBB8sIQ4I", frame)
    payload = 12 * 4 + 6
    assert fields[:6] == (b"MSKL", 1, 3, 4, 13, b"ms\0\0\0\0\0\0")
    assert fields[6] == zlib.crc32(frame[:16] + frame[20:])
    assert fields[7:] == (payload, 2, 3, 1, 4)
    assert struct.unpack_from("<QBBBBB", frame, 44) == (12, 2, 0, 0, 3, 0)
    assert len(frame) == 28 + 16 + 13 + payload


@pytest.mark.parametrize("name", list(COMPRESSORS))
def test_header_takes_at_most_64_bytes(name: str) -> None:
    tensor = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    if name == "mask":
        tensor = tensor > 1
    header, payload = wire.parse(frame := make(name).encode(tensor))
    assert len(frame) - len(payload) <= 64
    assert header.elements == wire.declared_elements(frame) == 120


def test_frames_of_foreign_versions_and_dtypes_are_refused() -> None:
    frame = make("none").encode(torch.ones(3))
    for offset, value, reason in [
        (0, 0, "not a frame"),
        (4, 2, "version 2"),
        (5, 9, "dtype code 9"),
        (8, 0xFF, "ASCII"),
        (8, ord("x"), "unknown compressor"),
    ]:
        altered = bytearray(frame)
        altered[offset] = value
        with pytest.raises(wire.FrameError, match=reason):
            decode(reseal(altered))
    with pytest.raises(wire.FrameError, match="3 elements, not 1 to 2"):
        decode(frame, max_elements=2)


def reseal(frame: bytearray) -> bytes:
    """Return a frame with the checksum that its bytes call for."""
    checksum = zlib.crc32(bytes(frame[:16]) + bytes(frame[20:]))
    frame[16:20] = struct.pack("<I", checksum)
    return bytes(frame)
