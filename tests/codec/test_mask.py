"""The compressor `mask`: exact in every mode, and as short as the entropy allows."""

import math
import struct
import zlib
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from masksl.codec import wire
from masksl.compress import FrameError, decode, make
from tests.codec import reference_decoder

COUNT = 10**6
PACKED, ONE, LEVELS = range(3)
WHOLE = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]


def form_of(frame: bytes) -> int:
    return struct.unpack("<BI", wire.parse(frame)[0].params)[0]


def flipped(mask: torch.Tensor, share: float) -> torch.Tensor:
    return mask ^ (torch.rand(mask.shape) < share)


def entropy(mask: torch.Tensor, levels: torch.Tensor) -> float:
    """Return the empirical entropy of a mask given its levels, in bits."""
    total = torch.bincount(levels.flatten().int())
    ones = torch.bincount(levels[mask].flatten().int(), minlength=len(total))
    bits = 0.0
    for n, k in zip(total.tolist(), ones.tolist(), strict=True):
        for part in (k, n - k):
            bits -= part * math.log2(part / n) if part else 0
    return bits


def check(mask: torch.Tensor, reference: torch.Tensor | None = None) -> bytes:
    """Encode and decode a mask, with the package and by the page; return its frame."""
    frame = make("mask").encode(mask, reference=reference)
    decoded = decode(frame, reference=reference)
    assert decoded.dtype == torch.bool and torch.equal(decoded, mask)
    if mask.numel() < 10**4:
        levels = () if reference is None else reference.int().flatten().tolist()
        by_page = reference_decoder.mask_frame(frame, levels)
        assert by_page == mask.int().flatten().tolist()
    packed = make("mask", code="packed").encode(mask, reference=reference)
    assert form_of(packed) == PACKED
    assert len(packed) == 28 + 4 * mask.ndim + 5 + math.ceil(mask.numel() / 8)
    assert torch.equal(decode(packed, reference=reference), mask)
    assert len(frame) <= len(packed)
    return frame


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(
    shape=st.lists(st.integers(1, 7), min_size=0, max_size=4).map(tuple),
    share=st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.95, 1.0]),
    kind=st.sampled_from(["none", "mask", "same", "levels", "many", "apart"]),
    layout=st.sampled_from(["plain", "transposed", "strided"]),
    seed=st.integers(0, 2**32),
)
def test_every_mask_comes_back(
    shape: tuple[int, ...], share: float, kind: str, layout: str, seed: int
) -> None:
    torch.manual_seed(seed)
    mask = torch.rand(shape) < share
    reference = {
        "none": None,
        "mask": flipped(mask, 0.05),
        "same": mask.clone(),
        "levels": torch.randint(0, 11, shape),
        "many": torch.randint(0, 2**16, shape),
        "apart": torch.randint(0, 2, shape) * 65535,  # those between are empty
    }[kind]
    if layout == "transposed":
        mask = mask.permute(list(range(mask.ndim))[::-1])
        if reference is not None:
            reference = reference.permute(list(range(mask.ndim))[::-1])
    elif layout == "strided" and mask.ndim:
        mask = torch.stack([mask, ~mask], -1)[..., 0]
    check(mask, reference)


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (70_000,), (3, 5, 100)])
def test_constant_masks_are_a_count(value: bool, shape: tuple[int, ...]) -> None:
    mask = torch.full(shape, value)
    frame = check(mask)
    size = len(frame) - 28 - 4 * len(shape) - 5
    ones = int(mask.sum())
    assert size == min(
        math.ceil(mask.numel() / 8), max(1, math.ceil(ones.bit_length() / 7))
    )
    check(mask, mask)


def test_a_reference_that_tells_all_costs_its_counts() -> None:
    mask = torch.rand(5000) < 0.3
    for reference in (mask, ~mask, mask.to(torch.int64) * 3):
        frame = check(mask, reference)
        assert form_of(frame) == LEVELS
        assert len(frame) == 28 + 4 + 5 + 1 + 2  # counts of 0, and of about 1500


@pytest.mark.parametrize("dtype", [torch.bool, *WHOLE, *UNSIGNED])
def test_references_of_every_type_are_alike(dtype: torch.dtype) -> None:
    levels = torch.randint(0, 2 if dtype == torch.bool else 100, (40, 50))
    mask = torch.rand(40, 50) < levels / levels.max()
    reference = levels.to(dtype)
    frame = make("mask").encode(mask, reference=reference)
    assert form_of(frame) == LEVELS
    assert frame == make("mask").encode(mask, reference=levels)
    assert frame == make("mask").encode(mask, reference=levels.flatten())
    for other in (reference, reference.T.contiguous().T, levels):
        assert torch.equal(decode(frame, reference=other), mask)


def test_levels_are_at_most_65535() -> None:
    mask = torch.arange(3000) % 3 == 0
    frame = check(mask, torch.where(mask, 65535, 0))
    assert form_of(frame) == LEVELS
    for reference, message in (
        (torch.full((3000,), 65536), "reference from 65536 to 65536: must be 0 to"),
        (torch.arange(-1, 2999), "reference from -1 to 2998: must be 0 to 65535"),
        (torch.rand(3000), "of torch.float32: must be 3000 whole numbers or bools"),
        (torch.zeros(2999, dtype=torch.int8), "reference of 2999 elements"),
    ):
        with pytest.raises(ValueError, match=message):
            make("mask").encode(mask, reference=reference)
        with pytest.raises(ValueError):
            decode(frame, reference=reference)


# --- as short as the entropy ----------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_length_is_the_entropy(share: float) -> None:
    mask = torch.rand(COUNT) < share
    frame = check(mask)
    bound = entropy(mask, torch.zeros(COUNT))
    assert 0.999 * bound < 8 * len(frame) < 1.01 * bound
    assert form_of(frame) == (PACKED if share == 0.5 else ONE)


def test_length_by_levels_is_the_conditional_entropy() -> None:
    levels = torch.randint(0, 11, (COUNT,), dtype=torch.int8)
    mask = torch.rand(COUNT) < levels / 10
    frame = check(mask, levels)
    bound = entropy(mask, levels)
    assert form_of(frame) == LEVELS
    assert 0.999 * bound < 8 * len(frame) < 1.01 * bound
    assert bound < 0.7 * COUNT


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_length_by_a_previous_mask_is_the_conditional_entropy(share: float) -> None:
    before = torch.rand(COUNT) < share
    mask = flipped(before, 0.01)
    frame = check(mask, before)
    bound = entropy(mask, before)
    assert form_of(frame) == LEVELS
    assert 0.999 * bound < 8 * len(frame) < 1.01 * bound
    assert len(frame) < 0.9 * len(make("mask").encode(mask))


def test_a_reference_that_tells_nothing_is_left_out() -> None:
    mask = torch.rand(50_000) < 0.1
    unrelated = torch.randint(0, 2**16, (50_000,))
    frame = make("mask").encode(mask, reference=unrelated)
    assert form_of(frame) == ONE
    assert frame == make("mask").encode(mask)
    assert torch.equal(decode(frame), mask)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 100, 99_999])
def test_masks_that_cannot_be_compressed_are_packed(count: int) -> None:
    mask = torch.arange(count) % 2 == 0
    mask = mask[torch.randperm(count)]
    for reference in (None, torch.randint(0, 2, (count,)), torch.arange(count) % 9999):
        frame = make("mask").encode(mask, reference=reference)
        assert len(frame) <= 28 + 4 + 5 + math.ceil(count / 8)
        assert torch.equal(decode(frame, reference=reference), mask)


# --- what is refused ------------------------------------------------------------------


def by_levels() -> tuple[torch.Tensor, torch.Tensor, bytes]:
    before = torch.rand(60, 70) < 0.4
    mask = flipped(before, 0.02)
    return mask, before, make("mask").encode(mask, reference=before)


def test_wrong_references_are_refused() -> None:
    _, before, frame = by_levels()
    other = before.clone()
    other[59, 69] ^= True
    for reference, message in (
        (None, "is coded by a reference, which is not given"),
        (other, "is coded by another reference than given"),
        (~before, "is coded by another reference than given"),
        (before.T, "is coded by another reference than given"),
        (before[:59], "of 4200 elements is coded by another reference"),
        (torch.zeros(0, dtype=torch.bool), "than the given one of 0"),
    ):
        with pytest.raises(FrameError, match=message):
            decode(frame, reference=reference)


def crafted(frame: bytes, payload: bytes, **changed: Any) -> bytes:
    """Return a frame with another payload, and with other fields of its header."""
    header, _ = wire.parse(frame)
    fields = {"dtype": header.dtype, "shape": header.shape, "params": header.params}
    return wire.assemble(wire.Header("mask", **(fields | changed)), [payload])


def test_broken_frames_are_refused() -> None:
    mask, before, frame = by_levels()
    payload = bytes(wire.parse(frame)[1])
    one = make("mask").encode(mask & before & (torch.rand(60, 70) < 0.1))
    assert (form_of(frame), form_of(one)) == (LEVELS, ONE)
    for broken, message in (
        (crafted(frame, b""), "count that is cut short"),
        (crafted(frame, b"\xff\xff"), "count that is cut short"),
        (crafted(one, b"\xff\xff\xff\xff\xff\1"), "cut short or too long"),
        (crafted(one, b"\xff\xff\x7f"), "declares 2097151 ones among 4200 elements"),
        (crafted(one, b"\x81\0"), "cut short or too long"),
        (crafted(one, b"\1", params=b"\1\1\0\0\0"), "form 1 declares a reference"),
        (crafted(frame, payload + b"\0"), "ends in a byte of zero"),
        (crafted(frame, payload + bytes(8) + b"\1"), "goes on after its last symbol"),
        (crafted(one, b"", params=b"\3\0\0\0\0"), "mask frame of torch.bool declares"),
        (crafted(one, b"", params=b"\1\0\0\0"), "4 bytes of parameters, expected 5"),
        (crafted(one, b"\0", params=b"\0\0\0\0\0"), "payload of 1 bytes"),
        (crafted(one, b"\0", dtype=torch.float32), "mask frame of torch.float32"),
    ):
        with pytest.raises(FrameError, match=message):
            decode(broken, reference=before)


def test_the_checksum_is_that_of_the_levels() -> None:
    _, before, frame = by_levels()
    levels = struct.pack("<4200H", *before.int().flatten().tolist())
    params = wire.parse(frame)[0].params
    assert params == struct.pack("<BI", LEVELS, zlib.crc32(levels))


def test_others_take_no_masks_and_no_reference() -> None:
    mask = torch.rand(50) < 0.5
    for name in ("none", "qu", "ms", "ec"):
        with pytest.raises(TypeError, match=f"{name}: dtype torch.bool"):
            make(name).encode(mask)
        with pytest.raises(ValueError, match=f"{name}: takes no reference"):
            make(name).encode(torch.rand(50), reference=mask)
        with pytest.raises(ValueError, match=f"{name}: takes no reference"):
            decode(make(name).encode(torch.rand(50)), reference=mask)
    with pytest.raises(TypeError, match="mask: dtype torch.float32"):
        make("mask").encode(torch.rand(50))
    with pytest.raises(ValueError, match="mask: tensor of shape"):
        make("mask").encode(mask[:0])
