"""The contract of compressors: encode, decode, and the registry."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor

from masksl.codec import planes, wire
from masksl.codec.planes import Bounds, NotFiniteError
from masksl.codec.wire import MAX_ELEMENTS, FrameError, Header

__all__ = [
    "COMPRESSORS",
    "Bounds",
    "Compressor",
    "Device",
    "FrameError",
    "Header",
    "NotFiniteError",
    "Packed",
    "Shape",
    "decode",
    "has_positions",
    "kept_positions",
    "make",
    "options_of",
    "register",
]

Shape = tuple[int, ...]
Device: TypeAlias = torch.device | str
Packed = tuple[bytes, Sequence[wire.Part]]

Class = TypeVar("Class", bound="type[Compressor]")

# Every registered compressor by its name.
COMPRESSORS: dict[str, type["Compressor"]] = {}


class Compressor(ABC):
    """Encodes float tensors as frames; `decode` decodes any frame.

    A compressor is immutable and holds no state between calls. Its options are the
    fields of its dataclass; wrong values raise ``ValueError`` when it is made.
    """

    name: ClassVar[str]
    """Name in `make`, in the configuration and in the frame; 1 to 8 ASCII bytes."""

    keeps_positions: ClassVar[bool] = False
    """Whether frames hold the positions of kept elements; see `unpack_positions`."""

    def encode(self, tensor: Tensor, *, seed: int = 0, training: bool = True) -> bytes:
        """Encode a tensor.

        Parameters
        ----------
        tensor : Tensor
            float16, bfloat16, float32 or float64, of any shape and memory format, not
            empty, all values finite. Elements are taken in row-major order.
        seed : int
            Seed of random draws; the same seed gives the same bytes.
        training : bool
            False in evaluation; some compressors then behave differently.

        Returns
        -------
        bytes
            The frame; its length counts the header.

        Raises
        ------
        TypeError
            If the tensor is not of a floating type named above.
        ValueError
            If it is empty; as `NotFiniteError` if it has values that are not finite.
            The message names the compressor and counts them.
        """
        if tensor.dtype not in wire.DTYPE_CODES:
            raise TypeError(
                f"{self.name}: dtype {tensor.dtype} cannot be encoded, "
                f"expected one of {', '.join(map(str, wire.DTYPE_CODES))}"
            )
        if tensor.numel() == 0:
            raise ValueError(f"{self.name}: tensor of shape {tuple(tensor.shape)}")
        flat = wire.flatten(tensor)
        bounds = planes.finite_bounds(flat, self.name)
        shape = tuple(tensor.shape)
        params, parts = self.pack(flat, shape, bounds, seed=seed, training=training)
        header = Header(self.name, tensor.dtype, shape, params)
        return wire.assemble(header, parts)

    @abstractmethod
    def pack(
        self, flat: Tensor, shape: Shape, bounds: Bounds, *, seed: int, training: bool
    ) -> Packed:
        """Compress the elements of a tensor.

        Parameters
        ----------
        flat : Tensor
            Shape (d,), contiguous, finite, of a floating type.
        shape : Shape
            Shape of the tensor.
        bounds : Bounds
            The least and the largest element.
        seed : int
            Seed of random draws.
        training : bool
            False in evaluation.

        Returns
        -------
        tuple[bytes, Sequence[Tensor | bytes]]
            Parameters for the decoder (at most 20 bytes keep the header within 64), and
            the payload in order: bytes, or one-dimensional tensors.
        """

    @classmethod
    @abstractmethod
    def unpack(cls, header: Header, payload: memoryview, device: Device) -> Tensor:
        """Decompress the elements of a tensor; the inverse of `pack`.

        Parameters
        ----------
        header : Header
            Header of the frame, its dtype, shape and parameters.
        payload : memoryview
            Payload of the frame, of unchecked length.
        device : Device
            Device of the elements.

        Returns
        -------
        Tensor
            Shape (d,), of any floating type; `decode` converts it to the header's.

        Raises
        ------
        FrameError
            If the payload does not match the header, before anything is allocated.
        """

    @classmethod
    def unpack_positions(
        cls, header: Header, payload: memoryview, device: Device
    ) -> tuple[Tensor, memoryview, torch.dtype]:
        """Return the positions of kept elements, the bytes and type of their values.

        Only compressors with ``keeps_positions`` have it.

        Parameters
        ----------
        header, payload, device
            See `unpack`.

        Returns
        -------
        tuple[Tensor, memoryview, torch.dtype]
            int64, shape (k,), ascending; the rest of the payload; the values' type.

        Raises
        ------
        FrameError
            If the payload does not match the header, or there are no positions.
        """
        del payload, device
        raise FrameError(f"{header.compressor} frame has no positions")


def register(cls: Class) -> Class:
    """Register a compressor class for `make` and `decode`; a class decorator."""
    name = cls.name
    if not (name.isascii() and 1 <= len(name) <= 8):
        raise ValueError(f"compressor name {name!r} is not 1 to 8 ASCII characters")
    if COMPRESSORS.setdefault(name, cls).__qualname__ != cls.__qualname__:
        raise ValueError(f"compressor name {name!r} is taken by {COMPRESSORS[name]}")
    COMPRESSORS[name] = cls
    return cls


def make(name: str, **options: Any) -> Compressor:
    """Return the compressor of a name.

    Parameters
    ----------
    name : str
        A key of `COMPRESSORS`.
    **options : Any
        Its options; those left out take their defaults.

    Returns
    -------
    Compressor
        Ready to encode.

    Raises
    ------
    ValueError
        If the name or an option is unknown or an option's value is not allowed.
    """
    if name not in COMPRESSORS:
        raise ValueError(f"name={name!r}: must be one of {', '.join(COMPRESSORS)}")
    known = options_of(name)
    for option, value in options.items():
        if option not in known:
            allowed = ", ".join(known) or "none at all"
            raise ValueError(f"{option}={value!r}: {name} has the options {allowed}")
    return COMPRESSORS[name](**options)


def options_of(name: str) -> list[str]:
    """Return the names of a compressor's options."""
    return [field.name for field in fields(COMPRESSORS[name])]  # type: ignore[arg-type]


def decode(
    frame: wire.Buffer,
    *,
    device: Device = "cpu",
    max_elements: int = MAX_ELEMENTS,
) -> Tensor:
    """Decode a frame of any compressor.

    Parameters
    ----------
    frame : bytes-like
        One whole frame.
    device : Device
        Device of the tensor; only packed bytes are copied to it.
    max_elements : int
        Frames that declare more elements are refused.

    Returns
    -------
    Tensor
        Contiguous, with the shape and dtype of the tensor that was encoded.

    Raises
    ------
    FrameError
        If the frame is cut short, altered, of another version, of an unknown
        compressor, too large, or inconsistent.
    """
    header, payload = wire.parse(frame, max_elements=max_elements)
    if header.compressor not in COMPRESSORS:
        raise FrameError(
            f"frame of the unknown compressor {header.compressor!r}, "
            f"known are {', '.join(COMPRESSORS)}"
        )
    flat = COMPRESSORS[header.compressor].unpack(header, payload, device)
    return flat.to(header.dtype).view(header.shape)


def kept_positions(
    frame: wire.Buffer,
    *,
    device: Device = "cpu",
    max_elements: int = MAX_ELEMENTS,
) -> Tensor:
    """Return the positions of the kept elements of a frame, zeros included.

    Parameters
    ----------
    frame, device, max_elements
        See `decode`.

    Returns
    -------
    Tensor
        int64, shape (k,): ascending positions in the flat tensor, row-major.

    Raises
    ------
    FrameError
        As `decode`, and if the frame's compressor has no positions.
    """
    header, payload = wire.parse(frame, max_elements=max_elements)
    if not has_positions(header.compressor):
        raise FrameError(f"{header.compressor} frame has no positions")
    return COMPRESSORS[header.compressor].unpack_positions(header, payload, device)[0]


def has_positions(name: str) -> bool:
    """Return whether frames of a compressor hold positions of kept elements."""
    return name in COMPRESSORS and COMPRESSORS[name].keeps_positions
