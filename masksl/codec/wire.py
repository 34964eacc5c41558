"""The frame: header, checksum, and the checks of received frames.

A frame is the encoded form of one tensor. All numbers are little-endian; the layout
(version 1) is

======  ====  ==========================================================
offset  size  field
======  ====  ==========================================================
0       4     magic, ``MSKL``
4       1     version, 1
5       1     dtype: 1 float16, 2 bfloat16, 3 float32, 4 float64, 5 bool
6       1     number of dimensions n
7       1     length p of the compressor's parameters
8       8     name of the compressor, ASCII, filled up with NUL bytes
16      4     CRC-32 of the whole frame without these four bytes
20      8     length of the payload
28      4 n   shape, one unsigned 32-bit number a dimension
28+4n   p     parameters of the compressor
28+4n+p       payload
======  ====  ==========================================================

Parameters and payload belong to the compressor; ``docs/frame.md`` lists them.
"""

import math
import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError(
        "masksl.codec.wire packs symbols in place: little-endian hosts only"
    )

MAGIC = b"MSKL"
VERSION = 1
DTYPES = {
    1: torch.float16,
    2: torch.bfloat16,
    3: torch.float32,
    4: torch.float64,
    5: torch.bool,
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_ELEMENTS = 2**28

Buffer = bytes | bytearray | memoryview
Part: TypeAlias = torch.Tensor | bytes

_FIXED = struct.Struct("<4sBBBB8sIQ")
_CHECKSUM = slice(16, 20)


class FrameError(ValueError):
    """A frame that is cut short, altered, of another version or inconsistent."""


@dataclass(frozen=True)
class Header:
    """Header of a frame.

    Parameters
    ----------
    compressor : str
        Registered name, one to eight ASCII characters.
    dtype : torch.dtype
        Type of the tensor that was encoded, one of `DTYPES`.
    shape : tuple[int, ...]
        Its shape; no dimension is zero.
    params : bytes
        The compressor's own fields, at most 255 bytes.
    """

    compressor: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    params: bytes

    @property
    def elements(self) -> int:
        """Number of elements, 1 for a scalar."""
        return math.prod(self.shape)

    def unpack_params(self, layout: struct.Struct) -> tuple:
        """Return the parameters by ``layout``; `FrameError` if the length differs."""
        if len(self.params) != layout.size:
            raise FrameError(
                f"{self.compressor} frame has {len(self.params)} bytes of parameters, "
                f"expected {layout.size}"
            )
        return layout.unpack(self.params)


def assemble(header: Header, parts: Sequence[Part]) -> bytes:
    """Return the frame of a header and its payload.

    Parameters
    ----------
    header : Header
        Header of the frame.
    parts : Sequence[torch.Tensor | bytes]
        Payload in order: bytes, and one-dimensional tensors on any device.

    Returns
    -------
    bytes
        The frame, assembled by one copy.
    """
    payload = to_host(parts)
    size = sum(part.nbytes for part in payload)
    fields = bytearray(
        _FIXED.pack(
            MAGIC,
            VERSION,
            DTYPE_CODES[header.dtype],
            len(header.shape),
            len(header.params),
            header.compressor.encode("ascii"),
            0,
            size,
        )
    )
    fields += struct.pack(f"<{len(header.shape)}I", *header.shape) + header.params
    checksum = _checksum(memoryview(fields))
    for part in payload:
        checksum = zlib.crc32(part, checksum)
    fields[_CHECKSUM] = struct.pack("<I", checksum)
    return b"".join([fields, *payload])


def parse(
    frame: Buffer, *, max_elements: int = MAX_ELEMENTS
) -> tuple[Header, memoryview]:
    """Parse a frame without copying it.

    Parameters
    ----------
    frame : bytes-like
        One whole frame.
    max_elements : int
        Frames that declare more elements are refused.

    Returns
    -------
    tuple[Header, memoryview]
        The header and a view of the payload.

    Raises
    ------
    FrameError
        If anything is wrong with the frame; nothing is allocated before.
    """
    view = memoryview(frame).cast("B")
    if len(view) < _FIXED.size:
        raise FrameError(
            f"frame of {len(view)} bytes is shorter than a header ({_FIXED.size})"
        )
    magic, version, dtype, ndim, params, name, checksum, size = _FIXED.unpack_from(view)
    if magic != MAGIC:
        raise FrameError(f"not a frame: it begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise FrameError(f"frame of version {version}, this is version {VERSION}")
    start = _FIXED.size + 4 * ndim + params
    if len(view) != start + size:
        raise FrameError(f"frame of {len(view)} bytes declares {start + size}")
    if zlib.crc32(view[start:], _checksum(view[:start])) != checksum:
        raise FrameError("checksum does not match: the frame has been altered")
    if dtype not in DTYPES:
        raise FrameError(f"frame declares the unknown dtype code {dtype}")
    shape = struct.unpack_from(f"<{ndim}I", view, _FIXED.size)
    elements = math.prod(shape)
    if not 0 < elements <= max_elements:
        raise FrameError(f"frame declares {elements} elements, not 1 to {max_elements}")
    own = bytes(view[start - params : start])
    return Header(name_of(name), DTYPES[dtype], shape, own), view[start:]


class Reader:
    """Reads bytes in order; `FrameError` where there are too few or too many.

    Parameters
    ----------
    view : memoryview
        The bytes.
    what : str
        What they are, for error lines.
    """

    def __init__(self, view: memoryview, what: str) -> None:
        self._view, self._what = view, what

    def take(self, size: int) -> memoryview:
        """Return the next bytes."""
        if size > len(self._view):
            raise FrameError(
                f"{self._what} is cut short: {size} bytes expected, "
                f"{len(self._view)} left"
            )
        taken, self._view = self._view[:size], self._view[size:]
        return taken

    def numbers(self, layout: struct.Struct) -> tuple[int, ...]:
        """Return the next numbers."""
        return layout.unpack(self.take(layout.size))

    def rest(self) -> memoryview:
        """Return all bytes that are left."""
        return self.take(len(self._view))

    def end(self) -> None:
        """Check that no byte is left."""
        if len(self._view):
            raise FrameError(f"{self._what} with {len(self._view)} bytes too many")


def name_of(field: bytes) -> str:
    """Return the compressor's name that a field of eight bytes holds."""
    text = field.rstrip(b"\0")
    if not text.isascii():
        raise FrameError(f"frame names the compressor {text!r}, not an ASCII name")
    return text.decode("ascii")


def declared_elements(frame: Buffer) -> int:
    """Return the declared number of elements of a frame, without its checksum."""
    view = memoryview(frame).cast("B")
    if len(view) < _FIXED.size or len(view) < _FIXED.size + 4 * view[6]:
        raise FrameError(f"frame of {len(view)} bytes is shorter than its header")
    return math.prod(struct.unpack_from(f"<{view[6]}I", view, _FIXED.size))


def check_payload(header: Header, payload: memoryview, expected: int) -> None:
    """Raise `FrameError` unless the payload is ``expected`` bytes long."""
    if len(payload) != expected:
        raise FrameError(
            f"{header.compressor} frame has a payload of {len(payload)} bytes, "
            f"its header implies {expected}"
        )


def check_dense(tensor: object, name: str) -> None:
    """Raise `TypeError` unless it is a dense tensor with values; ``name`` begins it."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: {type(tensor).__name__}: must be a torch.Tensor")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        kind = "quantized" if tensor.is_quantized else kind
        raise TypeError(f"{name}: {kind} tensor: must be a dense one, torch.strided")
    if tensor.is_meta:
        raise TypeError(f"{name}: tensor on device meta: must have values")


def flatten(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements in row-major order, shape (d,), with stride 1.

    PyTorch counts a tensor of one element as contiguous with any stride. With another
    stride than 1 it could not be viewed as bytes.
    """
    flat = tensor.detach().contiguous().view(-1)
    if flat.stride(0) != 1:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat


def to_host(parts: Sequence[Part]) -> list[memoryview]:
    """Return the bytes of parts of a payload.

    Parts on a GPU are joined there and copied together: one synchronisation.
    """
    flat = [
        flatten(part).view(torch.uint8) if isinstance(part, torch.Tensor) else part
        for part in parts
    ]
    remote = {
        i: part
        for i, part in enumerate(flat)
        if isinstance(part, torch.Tensor) and part.device.type != "cpu"
    }
    if remote:
        joined = torch.cat(list(remote.values())).cpu()
        local = joined.split([part.numel() for part in remote.values()])
        for i, part in zip(remote, local, strict=True):
            flat[i] = part
    return [
        memoryview(part if isinstance(part, bytes) else part.numpy()) for part in flat
    ]


def to_tensor(
    payload: memoryview, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """Copy payload bytes into a tensor.

    Parameters
    ----------
    payload : memoryview
        Whole number of elements of ``dtype``.
    dtype : torch.dtype
        Type of the elements.
    device : torch.device | str
        Device of the tensor.

    Returns
    -------
    torch.Tensor
        One-dimensional, owning its memory. The copy to a GPU is asynchronous: kernels
        on the same stream run after it, and the host does not synchronise.
    """
    if not payload:
        return torch.empty(0, dtype=dtype, device=device)
    pinned = torch.device(device).type == "cuda"
    host = torch.empty(len(payload), dtype=torch.uint8, pin_memory=pinned)
    np.copyto(host.numpy(), np.frombuffer(payload, dtype=np.uint8))
    return host.to(device, non_blocking=True).view(dtype)


def to_device(host: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy a tensor of the host to a device, without synchronising."""
    if torch.device(device).type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _checksum(fields: memoryview) -> int:
    """Return the checksum of a header, which leaves out the checksum itself."""
    before = zlib.crc32(fields[: _CHECKSUM.start])
    return zlib.crc32(fields[_CHECKSUM.stop :], before)
