"""The layout of frame-sets: header, checksum, and the checks of received ones.

A frame-set has one header and one checksum for all of its tensors. Names, dtypes and
shapes are not sent: the receiver has tensors like them. All numbers are little-endian;
the layout (version 1) is

======  ====  ==========================================================
offset  size  field
======  ====  ==========================================================
0       4     magic, ``MSKS``
4       1     version, 1
5       1     mode: 0 all exact, 1 tensor by tensor, 2 joined
6       1     flags: 1 scaled
7       1     zero
8       8     XXH3-64 of the whole frame-set without these eight bytes
16      4     number of tensors
20      4     CRC-32 of the structure: dtypes and shapes in order
24      8     name of the compressor, ASCII, filled up with NUL bytes
32            which are compressed, scales, table, payloads: not in mode 0
..            exact tensors
======  ====  ==========================================================

``docs/frame.md`` describes every part. `masksl.codec.sets` encodes and decodes.
"""

import math
import struct
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash
from torch import Tensor

from masksl.codec import wire
from masksl.codec.base import Compressor, class_of
from masksl.codec.wire import Buffer, FrameError, Header

MAGIC = b"MSKS"
VERSION = 1
EXACT, EACH, JOINED = range(3)  # modes
SCALED = 1  # flag
ENTRY = struct.Struct("<BQ")  # of the table: bytes of parameters, of payload

_FIXED = struct.Struct("<4sBBBBQII8s")
_CHECKSUM = slice(8, 16)

# Kernels may round otherwise where tensors lie at other places of a cache line.
_ALIGNMENT = 64

# Exact tensors have these codes in the structure; floating types those of frames.
_DTYPES = wire.DTYPES | {
    6: torch.uint8,
    7: torch.int8,
    8: torch.uint16,
    9: torch.int16,
    10: torch.uint32,
    11: torch.int32,
    12: torch.uint64,
    13: torch.int64,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

Named = Mapping[str, Tensor]


def assemble(
    tensors: Named,
    coded: Sequence[str],
    *,
    mode: int,
    flags: int,
    name: str,
    table: bytes,
    parts: Sequence[wire.Part],
) -> bytes:
    """Return a frame-set, assembled by one copy.

    Parameters
    ----------
    tensors : Mapping[str, Tensor]
        All of its tensors.
    coded : Sequence[str]
        Names of those that are compressed, in order.
    mode, flags : int
        See the layout.
    name : str
        Name of the compressor, empty without one.
    table : bytes
        All between the header and the payloads.
    parts : Sequence[Tensor | bytes]
        The payloads.
    """
    exact = [tensors[key] for key in exact_order(tensors, coded)]
    payload = wire.to_host([*parts, *exact])
    number, text = len(tensors), name.encode("ascii")
    fields = bytearray(
        _FIXED.pack(
            *(MAGIC, VERSION, mode, flags, 0, 0, number, structure(tensors), text)
        )
    )
    fields += table
    fields[_CHECKSUM] = struct.pack("<Q", _checksum(memoryview(fields), payload))
    return b"".join([fields, *payload])


@dataclass
class Parsed:
    """A frame-set that has passed its checks, as views of its bytes.

    Attributes
    ----------
    compressor : type[Compressor] | None
        Class of the compressor.
    coded : Sequence[str]
        Names of the compressed tensors, in order.
    entries : list[tuple[Header, memoryview, Sequence[str]]]
        Of every tensor that went through the compressor: header of its frame, payload,
        names of the tensors that it consists of.
    scales : dict[str, float]
        Scale by name, {} if there are none.
    exact : memoryview
        The exact tensors.
    """

    compressor: type[Compressor] | None
    coded: Sequence[str] = ()
    entries: list[tuple[Header, memoryview, Sequence[str]]] = field(
        default_factory=list
    )
    scales: dict[str, float] = field(default_factory=dict)
    exact: memoryview = memoryview(b"")


def parse(data: Buffer, like: Named) -> Parsed:
    """Check a frame-set; return its parts."""
    view = memoryview(data).cast("B")
    if len(view) < _FIXED.size:
        raise FrameError(
            f"frame-set of {len(view)} bytes is shorter than a header ({_FIXED.size})"
        )
    magic, version, mode, flags, zero, checksum, number, crc, text = _FIXED.unpack_from(
        view
    )
    if magic != MAGIC:
        raise FrameError(f"not a frame-set: it begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise FrameError(f"frame-set of version {version}, this is version {VERSION}")
    if _checksum(view) != checksum:
        raise FrameError("checksum does not match: the frame-set has been altered")
    if number != len(like):
        raise FrameError(f"frame-set of {number} tensors, expected {len(like)}")
    if crc != structure(like):
        raise FrameError("frame-set of tensors of other dtypes or shapes than expected")
    known = (0,) if mode == EXACT else (0, SCALED)
    if mode > JOINED or flags not in known or zero:
        raise FrameError(f"frame-set declares the mode {mode} and the flags {flags}")
    reader = wire.Reader(view[_FIXED.size :], "frame-set")
    name = wire.name_of(text)
    if mode == EXACT:
        if name:
            raise FrameError(f"frame-set of exact tensors names a compressor, {name!r}")
        parsed = Parsed(None)
    else:
        parsed = _parse_coded(reader, name, like, mode == JOINED, flags == SCALED)
    parsed.exact = reader.rest()
    sizes = sum(like[key].nbytes for key in exact_order(like, parsed.coded))
    if len(parsed.exact) != sizes:
        raise FrameError(
            f"frame-set has {len(parsed.exact)} bytes of exact tensors, "
            f"expected {sizes}"
        )
    return parsed


def _parse_coded(
    reader: wire.Reader, name: str, like: Named, joined: bool, scaled: bool
) -> Parsed:
    """Read everything that only frame-sets with a compressor have."""
    compressor = class_of(name)
    coded = _marked(reader.take((len(like) + 7) // 8), like)
    for key in coded:
        if not can_be_coded(like[key], compressor):
            raise FrameError(
                f"frame-set has tensor {key} compressed by {name}: "
                f"{like[key].dtype} of {like[key].numel()} elements"
            )
    parsed = Parsed(compressor, coded)
    if scaled:
        for key in coded:
            if not like[key].is_floating_point():
                raise FrameError(f"frame-set scales tensor {key} of {like[key].dtype}")
            layout = scale_format(like[key].dtype)
            (scale,) = struct.unpack(layout, reader.take(struct.calcsize(layout)))
            if not (scale > 0 and math.isfinite(scale)):
                raise FrameError(
                    f"frame-set declares the scale {scale} of tensor {key}"
                )
            parsed.scales[key] = scale
    groups = [coded] if joined and coded else [[key] for key in coded]
    if joined and len({like[key].dtype for key in coded}) > 1:
        raise FrameError("frame-set joins tensors of several dtypes")
    headers, lengths = [], []
    for members in groups:
        params, length = ENTRY.unpack(reader.take(ENTRY.size))
        first = like[members[0]]
        shape = tuple(first.shape)
        if joined:
            shape = (sum(like[key].numel() for key in members),)
        headers.append(Header(name, first.dtype, shape, bytes(reader.take(params))))
        lengths.append(length)
    parsed.entries = [
        (header, reader.take(length), members)
        for header, length, members in zip(headers, lengths, groups, strict=True)
    ]
    return parsed


def read_exact(parsed: Parsed, like: Named) -> dict[str, Tensor]:
    """Copy the exact tensors to their devices, once; return views by name."""
    names = exact_order(like, parsed.coded)
    ends = np.cumsum([0, *(like[name].nbytes for name in names)]).tolist()
    sources = dict(zip(names, ends, strict=False))
    payload = np.frombuffer(parsed.exact, np.uint8) if parsed.exact else np.empty(0)
    tensors = {}
    for device in {like[name].device for name in names}:
        own = [name for name in names if like[name].device == device]
        padded = [-(-like[name].nbytes // _ALIGNMENT) * _ALIGNMENT for name in own]
        host = torch.empty(
            sum(padded), dtype=torch.uint8, pin_memory=device.type == "cuda"
        )
        target, start = host.numpy(), 0
        places = {}
        for name, room in zip(own, padded, strict=True):
            size, source = like[name].nbytes, sources[name]
            part = payload[source : source + size]
            if like[name].dtype == torch.bool and size and part.max() > 1:
                raise FrameError(f"frame-set holds bytes that no bool of {name} can be")
            target[start : start + size] = part
            places[name] = slice(start, start + size)
            start += room
        buffer = host.to(device, non_blocking=True)
        for name, place in places.items():
            flat = buffer[place].view(like[name].dtype)
            # Views count changes in place together, and autograd refuses to go back
            # through a tensor that has changed; `data` counts for itself.
            tensors[name] = flat.view(like[name].shape).data
    return {name: tensors[name] for name in like if name in tensors}


def structure(tensors: Named) -> int:
    """Return the CRC-32 of dtypes and shapes in order."""
    fields = []
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODES:
            raise TypeError(
                f"tensor {name}: dtype {tensor.dtype} cannot be encoded, "
                f"expected one of {', '.join(map(str, _CODES))}"
            )
        code, shape = _CODES[tensor.dtype], tensor.shape
        fields.append(struct.pack(f"<BB{len(shape)}Q", code, len(shape), *shape))
    return zlib.crc32(b"".join(fields))


def _checksum(fields: memoryview, payload: Sequence[memoryview] = ()) -> int:
    """Return the checksum of a frame-set, which leaves out the checksum itself."""
    checksum = xxhash.xxh3_64(fields[: _CHECKSUM.start])
    checksum.update(fields[_CHECKSUM.stop :])
    for part in payload:
        checksum.update(part)
    return checksum.intdigest()


def can_be_coded(tensor: Tensor, compressor: type[Compressor]) -> bool:
    """Return whether a compressor takes a tensor; all others are sent exactly."""
    return tensor.dtype in compressor.dtypes and tensor.numel() > 0


def exact_order(tensors: Named, coded: Collection[str]) -> list[str]:
    """Return the names of the exact tensors: larger elements first, else in order.

    Each then begins at a multiple of the size of its elements.
    """
    left_out = set(coded)
    names = [name for name in tensors if name not in left_out]
    return sorted(names, key=lambda name: -tensors[name].itemsize)


def marks(tensors: Named, coded: Collection[str]) -> bytes:
    """Return a bit for each tensor, 1 if it is compressed, the first one lowest."""
    chosen = set(coded)
    bits = sum((name in chosen) << i for i, name in enumerate(tensors))
    return bits.to_bytes((len(tensors) + 7) // 8, "little")


def _marked(sent: memoryview, tensors: Named) -> list[str]:
    """Undo `marks`."""
    bits = int.from_bytes(sent, "little")
    if bits >> len(tensors):
        raise FrameError("frame-set marks more tensors than it has")
    return [name for i, name in enumerate(tensors) if bits >> i & 1]


def scale_format(dtype: torch.dtype) -> str:
    """Return how the scale of a tensor is sent."""
    return "<d" if dtype == torch.float64 else "<f"
