"""Frame-sets: exact and compressed tensors together, their layout and their checks."""

import hashlib
import random
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import xxhash
from torch import Tensor

from masksl.codec import wire
from masksl.compress import (
    COMPRESSORS,
    Compressor,
    FrameError,
    NotFiniteError,
    decode,
    decode_set,
    decode_set_exact,
    decode_set_sparse,
    decode_sparse,
    encode_set,
    make,
    register,
)
from tests.codec.test_frames import memory
from tests.test_device import Crossings, FakeTensorMode
from tests.test_device import waits as waits  # a fixture

HEADER = struct.Struct("<4sBBBBQII8s")
DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
    *(torch.uint8, torch.int8, torch.uint16, torch.int16),
    *(torch.uint32, torch.int32, torch.uint64, torch.int64),
]  # in the order of their codes

Named = Mapping[str, Tensor]

MODES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("sp", {"sparsity": 0.6}, {}),
    ("sp", {"sparsity": 0.6, "positions": "auto"}, {"joined": True}),
    ("rt", {"sparsity": 0.6, "alpha": 0.3}, {"scaled": True}),
    ("ms", {"sparsity": 0.9}, {"joined": True, "scaled": True}),
    ("qu", {"bits": 8}, {"scaled": True}),
    ("none", {"values": "float16"}, {"joined": True}),
]


def bits_of(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor, row-major."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def every_dtype() -> dict[str, Tensor]:
    """Return tensors of every dtype: random bits, NaN among them, many shapes."""
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for i, dtype in enumerate(DTYPES):
        shape = ((5, 3), (), (0, 4), (7,))[i % 4]
        size = torch.Size(shape).numel() * dtype.itemsize
        most = 2 if dtype == torch.bool else 256
        bits = torch.randint(most, (size,), generator=generator, dtype=torch.uint8)
        tensors[str(dtype)] = bits.view(dtype).view(shape)
    tensors["nan"] = torch.tensor([[0x7FC0_0001, -1], [0x7F80_0000, 3]])
    tensors["nan"] = tensors["nan"].int().view(torch.float32).t()
    tensors["images"] = torch.randn(2, 3, 4, 5, generator=generator)
    tensors["images"] = tensors["images"].to(memory_format=torch.channels_last)
    tensors["flag"] = torch.tensor(True)
    tensors["empty"] = torch.empty(0)
    return tensors


def model(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return floating tensors, a statistic that is sent exactly, a counter, a flag."""
    generator = torch.Generator().manual_seed(3)
    return {
        "flag": torch.tensor([True, False, True]),
        "w": torch.randn(4, 3, 5, generator=generator).to(dtype),
        "b": (torch.randn(11, generator=generator) * 100 - 3).to(dtype),
        "none": torch.empty(0, 2, dtype=dtype),
        "mean": torch.randn(6, generator=generator).to(dtype),
        "n": torch.tensor(5),
        "s": torch.tensor(-0.3).to(dtype),
    }


def reseal(data: bytes | bytearray) -> bytes:
    """Return a frame-set with the checksum that its bytes call for."""
    checksum = xxhash.xxh3_64_intdigest(bytes(data[:8]) + bytes(data[16:]))
    return bytes(data[:8]) + struct.pack("<Q", checksum) + bytes(data[16:])


def altered(data: bytes, at: int, new: bytes) -> bytes:
    """Return a frame-set with other bytes at a place, and the right checksum."""
    return reseal(data[:at] + new + data[at + len(new) :])


# --- exact tensors --------------------------------------------------------------------


def test_exact_tensors_come_back_bit_for_bit() -> None:
    sent = every_dtype()
    data = encode_set(sent)
    assert len(data) == 32 + sum(tensor.nbytes for tensor in sent.values())
    like = {name: torch.zeros_like(tensor) for name, tensor in sent.items()}
    received = decode_set(data, like)
    assert list(received) == list(sent)
    for name, tensor in sent.items():
        own = received[name]
        assert (own.dtype, own.shape) == (tensor.dtype, tensor.shape), name
        assert own.is_contiguous() and bits_of(own) == bits_of(tensor), name
    assert decode_set(encode_set({}), {}) == {}
    renamed = {f"other {name}": tensor for name, tensor in like.items()}
    assert bits_of(decode_set(data, renamed)["other nan"]) == bits_of(sent["nan"])
    assert encode_set(sent, joined=True, scaled=True, exact=["nan"]) == data


def test_tensors_share_memory_and_nothing_else() -> None:
    sent = {f"t{i}": torch.randn(i + 1) for i in range(20)}
    sent["n"] = torch.tensor(3)
    received = decode_set(encode_set(sent), sent)
    assert len({t.untyped_storage().data_ptr() for t in received.values()}) == 1
    assert all(tensor.data_ptr() % 64 == 0 for tensor in received.values())
    # A tensor that the graph needs does not change when another one does.
    weight = received["t3"].requires_grad_(True)
    loss = (weight * received["t4"][:4]).pow(2).sum()
    received["t5"].add_(1)
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(gradient, 2 * sent["t3"] * sent["t4"][:4] ** 2)
    assert torch.equal(received["t6"], sent["t6"])


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match="tensor z: dtype torch.complex64"):
        encode_set({"z": torch.zeros(2, dtype=torch.complex64)})


# --- the layout -----------------------------------------------------------------------


def read_documented(data: bytes, like: Named) -> dict[str, Tensor]:
    """Decode a frame-set by docs/frame.md alone, payloads as the frames they are of."""
    magic, version, mode, flags, zero, checksum, number, structure, name = (
        HEADER.unpack_from(data)
    )
    assert (magic, version, zero, number) == (b"MSKS", 1, 0, len(like))
    assert checksum == xxhash.xxh3_64_intdigest(data[:8] + data[16:])
    fields = b""
    for tensor in like.values():
        code, shape = DTYPES.index(tensor.dtype) + 1, tensor.shape
        fields += struct.pack(f"<BB{len(shape)}Q", code, len(shape), *shape)
    assert structure == zlib.crc32(fields)
    at = 32

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        assert at <= len(data)
        return data[at - size : at]

    coded: list[str] = []
    tensors: dict[str, Tensor] = {}
    if mode:
        marks = int.from_bytes(take((number + 7) // 8), "little")
        coded = [own for i, own in enumerate(like) if marks >> i & 1]
    scales = {}
    for own in coded if flags else ():
        layout = "<d" if like[own].dtype == torch.float64 else "<f"
        (scales[own],) = struct.unpack(layout, take(struct.calcsize(layout)))
    groups = [coded] if mode == 2 and coded else [[own] for own in coded]
    table = []
    for _ in groups:
        params, payload = struct.unpack("<BQ", take(9))
        table.append((take(params), payload))
    for (params, payload), members in zip(table, groups, strict=True):
        first = like[members[0]]
        shape = tuple(first.shape)
        if mode == 2:
            shape = (sum(like[own].numel() for own in members),)
        compressor = name.rstrip(b"\0").decode()
        header = wire.Header(compressor, first.dtype, shape, params)
        whole = decode(wire.assemble(header, [take(payload)])).view(-1)
        for own in members:
            part, whole = whole.split(
                [like[own].numel(), len(whole) - like[own].numel()]
            )
            if own in scales:
                half = part.dtype in (torch.float16, torch.bfloat16)
                most = torch.finfo(part.dtype).max
                product = (part.float() if half else part) * scales[own]
                part = product.clamp(-most, most).to(part.dtype)
            tensors[own] = part.view(like[own].shape)
    rest = [own for own in like if own not in coded]
    for size in (8, 4, 2, 1):
        for own in rest:
            if like[own].itemsize == size:
                part = bytearray(take(like[own].nbytes))
                flat = torch.frombuffer(part, dtype=torch.uint8) if part else None
                flat = torch.empty(0, dtype=torch.uint8) if flat is None else flat
                tensors[own] = flat.view(like[own].dtype).view(like[own].shape)
    assert at == len(data)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", [*MODES, None], ids=str)
def test_layout_is_the_documented_one(case: Any, dtype: torch.dtype) -> None:
    if case is None:
        sent = every_dtype()
        data = encode_set(sent)
    else:
        sent = model(dtype)
        compressor = make(case[0], **case[1])
        data = encode_set(sent, compressor, exact=["mean"], seed=4, **case[2])
    documented, received = read_documented(data, sent), decode_set(data, sent)
    assert list(received) == list(sent)
    for name, tensor in sent.items():
        assert received[name].shape == tensor.shape
        assert received[name].dtype == tensor.dtype
        assert bits_of(documented[name]) == bits_of(received[name]), name


# Frame-sets of two tensors, hexadecimal. They hold the layout of version 1.
GRID = (torch.arange(24).view(2, 3, 4) * 5 % 17 - 8).float() / 4
PAIRS = torch.tensor([[3.0, -3], [-3, 3], [-3, 3]])
GOLDEN: dict[str, tuple[dict[str, Any], str]] = {
    "exact": (
        {},
        (
            "4d534b53010000000e2098fb9e6cada7020000003715b372000000000000000007000000"
            "00000000000000c0000040bf0000003f0000e03f0000a0bf000000000000a03f0000e0bf"
            "000000bf0000403f00000040000080bf0000803e0000c03f0000c0bf000080be0000803f"
            "000000c0000040bf0000003f0000e03f0000a0bf000000000000a03f"
        ),
    ),
    "each": (
        {"compressor": make("sp", sparsity=0.75)},
        (
            "4d534b530101000017d55b19ae87a822020000003715b3727370000000000000010b1b00"
            "0000000000000600000000000000000300000000c00000e03f0000e0bf00000040000000"
            "c00000e03f8904120700000000000000"
        ),
    ),
    "joined": (
        {"compressor": make("sp", sparsity=0.96), "joined": True},
        (
            "4d534b53010200009c604cedae67ecb0020000003715b3727370000000000000010b0700"
            "0000000000000100000000000000000300000000c00100000700000000000000"
        ),
    ),
    "scaled": (
        {"compressor": make("qu", bits=1), "scaled": True},
        (
            "4d534b53010101008b2da981a372edb202000000a4a3158f717500000000000001000040"
            "401201000000000000000100000000000000f0bf000000000000f03f2907000000000000"
            "00"
        ),
    ),
}


@pytest.mark.parametrize("name", list(GOLDEN))
def test_golden_frame_sets(name: str) -> None:
    sent = {"grid": PAIRS if name == "scaled" else GRID, "n": torch.tensor(7)}
    options, golden = GOLDEN[name]
    assert encode_set(sent, **options).hex() == golden
    received = decode_set(bytes.fromhex(golden), sent)
    assert int(received["n"]) == 7
    kept = received["grid"] != 0
    assert torch.equal(received["grid"][kept], sent["grid"][kept])
    assert int(kept.sum()) == {"exact": 22, "each": 6, "joined": 1, "scaled": 6}[name]


# --- compressed tensors ---------------------------------------------------------------


def seed_of(seed: int, place: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


def test_tensor_by_tensor_is_a_frame_of_each() -> None:
    sent, compressor = model(), make("rt", sparsity=0.6, alpha=0.4)
    data = encode_set(sent, compressor, exact=["mean"], seed=9)
    received = decode_set(data, sent)
    coded = {"w": 1, "b": 2, "s": 6}  # their places
    for name, place in coded.items():
        frame = compressor.encode(sent[name], seed=seed_of(9, place))
        assert torch.equal(received[name], decode(frame)), name
    for name in sent.keys() - coded.keys():
        assert torch.equal(received[name], sent[name]), name
    assert data == encode_set(sent, compressor, exact=["mean"], seed=9)
    assert data != encode_set(sent, compressor, exact=["mean"], seed=10)
    tops = encode_set(sent, compressor, exact=["mean"], training=False)
    frame = make("sp", sparsity=0.6).encode(sent["w"])
    assert torch.equal(decode_set(tops, sent)["w"], decode(frame))


def test_joined_tensors_are_one_frame() -> None:
    sent, compressor = model(), make("rt", sparsity=0.6, alpha=0.4)
    data = encode_set(sent, compressor, exact=["mean"], joined=True, seed=9)
    received = decode_set(data, sent)
    flat = torch.cat([sent["w"].view(-1), sent["b"], sent["s"].view(1)])
    frame = compressor.encode(flat, seed=9)
    decoded = torch.cat([received[name].view(-1) for name in ("w", "b", "s")])
    assert torch.equal(decoded, decode(frame))
    with pytest.raises(ValueError, match="of torch.float16 and torch.float32, must"):
        encode_set(sent | {"h": torch.ones(2).half()}, compressor, joined=True)


def test_scales_are_standard_deviations() -> None:
    wide, flat = torch.randn(1000) * 50 + 3, torch.full((9,), 2.5)
    far = torch.randn(100) + 8
    sent = {"wide": wide, "flat": flat, "one": torch.tensor(-4.0), "far": far}
    sent["zero"] = torch.zeros(5)
    data = encode_set(sent, make("none", values="bfloat16"), scaled=True)
    scales = struct.unpack_from("<5f", data, 33)
    assert scales[0] == pytest.approx(float(wide.double().std(correction=0)), rel=1e-5)
    root = float(far.double().square().mean().sqrt())  # more than three deviations
    assert scales[1:] == (2.5, 4.0, pytest.approx(root, rel=1e-5), 1.0)
    received = decode_set(data, sent)
    expected = (wide / scales[0]).bfloat16().float() * scales[0]
    assert torch.equal(received["wide"], expected)
    assert torch.equal(received["flat"], flat)
    # Joined top-k by the tensors' own measure: all of one tensor's elements are larger.
    small = {"large": torch.randn(500) * 1e3, "small": torch.randn(500)}
    sparse = make("sp", sparsity=0.9)
    kept = {
        scaled: decode_set_sparse(
            encode_set(small, sparse, joined=True, scaled=scaled), small
        )["small"][0].numel()
        for scaled in (False, True)
    }
    assert kept[False] == 0 and 20 < kept[True] < 80


def test_a_tensor_that_hardly_varies_leaves_room_for_those_joined_with_it() -> None:
    generator = torch.Generator().manual_seed(3)
    sent = {
        "normal": torch.randn(4000, generator=generator) * 1e-3,
        "shifted": 1 + 0.02 * torch.randn(64, generator=generator),
        "small": torch.tensor([1e-3, 1.0001e-3]),
        "one": torch.tensor([1e-5]),
    }
    data = encode_set(sent, make("ec", error=0.25), joined=True, scaled=True)
    received = decode_set(data, sent)
    for name, tensor in sent.items():
        error = (received[name] - tensor).norm() / tensor.norm()
        assert error < 0.3, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_scales_never_leave_the_range_of_the_type(dtype: torch.dtype) -> None:
    most, least = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    ones = torch.ones(10_000, dtype=dtype)
    ones[0] += torch.finfo(dtype).eps
    cases = {
        "most": torch.tensor([most, -most, most / 3], dtype=dtype),
        "least": torch.tensor([least, -least, 0], dtype=dtype),
        "ones": ones,
    }
    for name, tensor in cases.items():
        data = encode_set({"t": tensor}, make("none"), scaled=True)
        received = decode_set(data, {"t": tensor})["t"]
        assert bool(received.isfinite().all()), name
        torch.testing.assert_close(received, tensor, msg=name)


def test_what_a_compressor_takes_says_its_class() -> None:
    """By default floating tensors; bool goes through those that say so."""
    sent = model()
    with pytest.raises(TypeError, match="none: dtype torch.bool cannot be encoded"):
        make("none").encode(sent["flag"])
    frame = make("none").encode(torch.ones(3))
    crafted = bytearray(frame[:5] + b"\5" + frame[6:])
    crafted[16:20] = struct.pack("<I", zlib.crc32(crafted[:16] + crafted[20:]))
    with pytest.raises(FrameError, match="none frame of torch.bool, expected one of"):
        decode(crafted)
    with added(Flags):
        flags = make("flags")
        frame = flags.encode(sent["flag"])
        assert frame[5] == 5 and torch.equal(decode(frame), sent["flag"])
        with pytest.raises(TypeError, match="flags: dtype torch.float32"):
            flags.encode(sent["w"])
        data = encode_set(sent, flags)
        assert data[32] == 0b1
        assert all(
            torch.equal(decode_set(data, sent)[name], sent[name]) for name in sent
        )
        with pytest.raises(ValueError, match="scaled=True: tensor flag is torch.bool"):
            encode_set(sent, flags, scaled=True)


@dataclass(frozen=True)
class Flags(Compressor):
    """A byte for every element, the other way round."""

    name: ClassVar[str] = "flags"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bool,)

    def pack(self, flat: Tensor, *args: Any, **rest: Any) -> Any:
        return b"", [(~flat).view(torch.uint8)]

    @classmethod
    def unpack(cls, header: Any, payload: memoryview, device: Any) -> Tensor:
        return wire.to_tensor(payload, torch.uint8, device) == 0


class added:  # pylint: disable=invalid-name
    """Registers a compressor for a while."""

    def __init__(self, cls: type[Compressor]) -> None:
        self.cls = register(cls)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        del COMPRESSORS[self.cls.name]


def test_errors_name_the_tensor() -> None:
    sent = model()
    with pytest.raises(
        ValueError, match="exact='v': must be one of the tensors' names"
    ):
        encode_set(sent, make("sp"), exact=["v"])
    sent["b"][3:5] = torch.inf
    every: list[dict[str, Any]] = [{}, {"joined": True}, {"scaled": True}]
    for options in every:
        with pytest.raises(NotFiniteError) as caught:
            encode_set(sent, make("qu"), **options)
        assert str(caught.value) == "tensor b: qu: 2 of 11 values are not finite"
    encode_set(sent, make("qu"), exact=["b"])
    encode_set(sent)
    large = {"w": torch.ones(2), "v": torch.full((3,), 1e6)}
    with pytest.raises(
        NotFiniteError, match="tensor v: none: 3 of 3 values are out of"
    ):
        encode_set(large, make("none", values="float16"))


# --- positions ------------------------------------------------------------------------


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("sparsity", [0.0, 0.6, 0.95, 0.999])
def test_kept_elements_are_those_of_the_tensors(
    joined: bool, scaled: bool, dtype: torch.dtype, sparsity: float
) -> None:
    sent = model(dtype)
    compressor = make("sp", sparsity=sparsity)
    data = encode_set(sent, compressor, exact=["mean"], joined=joined, scaled=scaled)
    whole = decode_set(data, sent)
    sparse, exact = decode_set_sparse(data, sent), decode_set_exact(data, sent)
    assert list(sparse) == ["w", "b", "s"]
    assert list(exact) == ["flag", "none", "mean", "n"]
    kept = 0
    for name, (positions, values) in sparse.items():
        scattered = sent[name].new_zeros(sent[name].numel())
        assert positions.dtype == torch.int64 and values.dtype == dtype
        assert bool((positions[1:] > positions[:-1]).all())
        scattered[positions] = values
        assert torch.equal(scattered.view(sent[name].shape), whole[name])
        kept += positions.numel()
    if joined:
        assert kept == max(1, round((1 - sparsity) * 72 - 0.499))
    for name, tensor in exact.items():
        assert torch.equal(tensor, sent[name])


def test_sets_without_positions_are_refused() -> None:
    sent = model()
    with pytest.raises(FrameError, match="exact tensors has no positions"):
        decode_set_sparse(encode_set(sent), sent)
    with pytest.raises(FrameError, match="ms frame has no positions"):
        decode_set_sparse(encode_set(sent, make("ms")), sent)
    nothing = {"n": torch.tensor(3)}
    for joined in (False, True):
        data = encode_set(nothing, make("sp"), joined=joined)
        assert decode_set_sparse(data, nothing) == {}
        assert int(decode_set(data, nothing)["n"]) == 3
    assert decode_sparse(make("sp").encode(torch.ones(5)))[0].numel() == 1


# --- what is refused ------------------------------------------------------------------


def sets() -> Iterator[tuple[bytes, Named]]:
    """Yield frame-sets of every mode, and what they are of."""
    sent = model()
    yield encode_set(sent), sent
    for name, options, more in MODES:
        yield encode_set(sent, make(name, **options), exact=["mean"], **more), sent


def test_every_truncation_and_alteration_is_refused() -> None:
    rng = random.Random(0)
    for data, like in sets():
        for length in range(len(data)):
            with pytest.raises(FrameError):
                decode_set(data[:length], like)
        with pytest.raises(FrameError, match="altered"):
            decode_set(data + b"\0", like)
        for at in range(len(data)):
            changed = bytearray(data)
            changed[at] ^= rng.randrange(1, 256)
            with pytest.raises(FrameError):
                decode_set(changed, like)


def test_crafted_sets_are_refused_or_whole() -> None:
    """Alterations with the right checksum: no other error, no wrong shape."""
    rng, refused, whole = random.Random(1), 0, 0
    for data, like in sets():
        for _ in range(1500):
            crafted = bytearray(data)
            for _ in range(rng.randrange(1, 3)):
                at = (
                    rng.randrange(4, len(data))
                    if rng.random() < 0.3
                    else rng.choice([5, 6, *range(32, min(len(data), 90))])
                )
                crafted[at] = rng.randrange(256)
            if rng.random() < 0.2:
                crafted = crafted[: rng.randrange(32, len(data))]
            try:
                received = decode_set(reseal(crafted), like)
            except FrameError:
                refused += 1
                continue
            whole += 1
            for name, tensor in like.items():
                assert received[name].shape == tensor.shape
                assert received[name].dtype == tensor.dtype
    assert refused > 3000 and whole > 500


@pytest.mark.parametrize(
    ("at", "new", "reason"),
    [
        (0, b"MSKL", "not a frame-set"),
        (4, b"\2", "version 2"),
        (5, b"\3", "mode 3"),
        (6, b"\2", "flags 2"),
        (7, b"\1", "mode 1"),
        (16, b"\6", "of 6 tensors, expected 7"),
        (20, b"\0\0", "other dtypes or shapes"),
        (24, b"\xff", "ASCII"),
        (24, b"xx", "unknown compressor 'xx'"),
        (32, b"\xff", "marks more tensors"),
        (32, b"\x01", "tensor flag compressed by sp: torch.bool of 3 elements"),
        (32, b"\x08", "tensor none compressed by sp: torch.float32 of 0 elements"),
        (33, struct.pack("<f", 0), "scale 0.0 of tensor w"),
        (33, struct.pack("<f", -1), "scale -1.0 of tensor w"),
        (33, struct.pack("<f", torch.inf), "scale inf of tensor w"),
        (45, b"\xff", "frame-set"),
        (46, struct.pack("<Q", 2**60), "cut short: 1152921504606846976 bytes expected"),
    ],
)
def test_reasons(at: int, new: bytes, reason: str) -> None:
    sent = model()
    data = encode_set(sent, make("sp", sparsity=0.5), exact=["mean"], scaled=True)
    with pytest.raises(FrameError, match=reason):
        decode_set(altered(data, at, new), sent)


def test_more_reasons() -> None:
    sent = {"flag": torch.tensor([True, False])}
    data = encode_set(sent)
    with pytest.raises(FrameError, match="bytes that no bool of flag can be"):
        decode_set(altered(data, 33, b"\2"), sent)
    with pytest.raises(FrameError, match="names a compressor, 'sp'"):
        decode_set(altered(data, 24, b"sp"), sent)
    with pytest.raises(FrameError, match="3 bytes of exact tensors, expected 2"):
        decode_set(reseal(data + b"\0"), sent)
    two = {"w": torch.ones(2), "v": torch.ones(3).double()}
    data = encode_set(two, make("none"))
    with pytest.raises(FrameError, match="joins tensors of several dtypes"):
        decode_set(altered(data, 5, b"\2"), two)
    with pytest.raises(FrameError, match="shorter than a header"):
        decode_set(b"MSKS", two)


@pytest.mark.parametrize(
    "like",
    [
        {"w": torch.ones(3, 2), "n": torch.tensor(1)},
        {"w": torch.ones(6), "n": torch.tensor(1)},
        {"w": torch.ones(2, 3).int(), "n": torch.tensor(1)},
        {"w": torch.ones(2, 3), "n": torch.tensor([1])},
        {"n": torch.tensor(1), "w": torch.ones(2, 3)},
    ],
)
def test_other_structures_are_refused(like: Named) -> None:
    data = encode_set({"w": torch.ones(2, 3), "n": torch.tensor(1)})
    with pytest.raises(FrameError, match="of other dtypes or shapes than expected"):
        decode_set(data, like)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mode", [None, {}, {"joined": True}], ids=str)
def test_refusal_allocates_next_to_nothing(mode: dict[str, Any] | None) -> None:
    sent = {"w": torch.randn(2**20), "v": torch.randn(2**20)}
    if mode is None:
        data, broken = encode_set(sent), []
    else:
        data = encode_set(sent, make("sp", sparsity=0.99), **mode)
        broken = [altered(data, 34, struct.pack("<Q", 2**50))]
        at = 42 if mode else 42 + 20  # the number of elements that are kept
        broken += [altered(data, 42, struct.pack("<Q", 2**19))]
        assert struct.unpack_from("<Q", data, 42)[0] in (2**20 // 100, 2**21 // 100), at
    broken += [data[:-1], reseal(data[:-1]), reseal(data + b"\0")]
    for each in broken:
        before = memory("VmRSS", reset_peak=True)
        with pytest.raises(FrameError):
            decode_set(each, sent)
        assert memory("VmHWM") - before < 2**20


# --- devices --------------------------------------------------------------------------


def test_a_set_crosses_once(waits: list[str]) -> None:  # noqa: F811
    """To the host and to the device in one piece, as in the tests of frames."""
    shapes = {"w": (4, 5), "v": (7,), "n": ()}
    real = {name: torch.rand(shape) for name, shape in shapes.items()}
    data = encode_set(real)
    with FakeTensorMode(), Crossings(waits):
        like = {name: torch.empty(s, device="cuda") for name, s in shapes.items()}
        encoded = encode_set(like)
        assert waits == ["cuda to cpu"]
        waits.clear()
        received = decode_set(data, like)
    assert len(encoded) == len(data)
    assert all(tensor.is_cuda for tensor in received.values())
    assert not waits


def test_scales_of_masks_are_refused() -> None:
    """No encoder writes them."""
    like = {"mask": torch.tensor([True, False, True])}
    data = bytearray(encode_set(like, make("mask")))
    data[6] = 1
    data[33:33] = struct.pack("<f", 2.0)
    data[8:16] = bytes(8)
    data[8:16] = struct.pack("<Q", xxhash.xxh3_64_intdigest(data[:8] + data[16:]))
    with pytest.raises(FrameError, match="scales tensor mask of torch.bool"):
        decode_set(bytes(data), like)
