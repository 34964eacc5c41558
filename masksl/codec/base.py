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
    "class_of",
    "decode",
    "decode_sparse",
    "has_positions",
    "kept_positions",
    "make",
    "options_of",
    "register",
    "sparse_class_of",
]

Shape = tuple[int, ...]
Device: TypeAlias = torch.device | str
Packed = tuple[bytes, Sequence[wire.Part]]
Sparse = tuple[Tensor, Tensor]

# What a compressor encodes unless it says otherwise.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Class = TypeVar("Class", bound="type[Compressor]")

# Every registered compressor by its name.
COMPRESSORS: dict[str, type["Compressor"]] = {}


class Compressor(ABC):
    """Encodes tensors as frames; `decode` decodes any frame.

    A compressor is immutable and holds no state between calls. Its options are the
    fields of its dataclass; wrong values raise ``ValueError`` when it is made.
    """

    name: ClassVar[str]
    """Name in `make`, in the configuration and in the frame; 1 to 8 ASCII bytes."""

    dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOATS
    """Types of the tensors that it encodes; floating ones, and bool for masks."""

    keeps_positions: ClassVar[bool] = False
    """Whether frames hold the positions of kept elements; see `unpack_sparse`."""

    takes_reference: ClassVar[bool] = False
    """Whether `pack` and `unpack` take a tensor ``reference`` that both sides hold."""

    def encode(
        self,
        tensor: Tensor,
        *,
        seed: int = 0,
        training: bool = True,
        reference: Tensor | None = None,
    ) -> bytes:
        """Encode a tensor.

        Parameters
        ----------
        tensor : Tensor
            Of one of its ``dtypes`` (by default the four floating types), of any shape
            and memory format, not empty, all values finite. Elements are taken in
            row-major order.
        seed : int
            Seed of random draws; the same seed gives the same bytes.
        training : bool
            False in evaluation; some compressors then behave differently.
        reference : Tensor | None
            A tensor that the decoder holds, too, for compressors that take one.

        Returns
        -------
        bytes
            The frame; its length counts the header.

        Raises
        ------
        TypeError
            If it is no tensor, not dense, without values, or not of a type named above.
        ValueError
            If it is empty, or the compressor takes no reference; as `NotFiniteError` if
            it has values that are not finite. The message names the compressor and
            counts them.
        """
        wire.check_dense(tensor, self.name)
        if tensor.dtype not in self.dtypes:
            raise TypeError(
                f"{self.name}: dtype {tensor.dtype} cannot be encoded, "
                f"expected one of {', '.join(map(str, self.dtypes))}"
            )
        if tensor.numel() == 0:
            raise ValueError(
                f"{self.name}: tensor of shape {tuple(tensor.shape)} is empty, "
                "it must have at least one element"
            )
        flat = wire.flatten(tensor)
        bounds = planes.finite_bounds(flat, self.name)
        shape = tuple(tensor.shape)
        offered = self.offered(reference)
        params, parts = self.pack(
            flat, shape, bounds, seed=seed, training=training, **offered
        )
        header = Header(self.name, tensor.dtype, shape, params)
        return wire.assemble(header, parts)

    def warm_up(self) -> None:
        """Encode and decode a small tensor, so that later none waits for a first use.

        Entropy coding is compiled at its first use, once on a machine, and loaded at
        its first use in a process.
        """
        dtype = torch.float32 if torch.float32 in self.dtypes else self.dtypes[0]
        decode(self.encode((torch.arange(64) % 3).to(dtype).view(1, 1, 8, 8)))

    @classmethod
    def offered(cls, reference: Tensor | None) -> dict[str, Any]:
        """Return the arguments by which `pack` and `unpack` get a reference."""
        if cls.takes_reference:
            return {"reference": reference}
        if reference is not None:
            raise ValueError(f"{cls.name}: takes no reference")
        return {}

    @abstractmethod
    def pack(
        self, flat: Tensor, shape: Shape, bounds: Bounds, *, seed: int, training: bool
    ) -> Packed:
        """Compress the elements of a tensor.

        Parameters
        ----------
        flat : Tensor
            Shape (d,), contiguous, finite, of one of its ``dtypes``.
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
            Shape (d,), of any type; `decode` converts it to the header's.

        Raises
        ------
        FrameError
            If the payload does not match the header, before anything is allocated.
        """

    @classmethod
    def unpack_sparse(
        cls, header: Header, payload: memoryview, device: Device
    ) -> Sparse:
        """Return the positions of kept elements and their values.

        Only compressors with ``keeps_positions`` have it. The tensor is not allocated.

        Parameters
        ----------
        header, payload, device
            See `unpack`.

        Returns
        -------
        tuple[Tensor, Tensor]
            int64, shape (k,), ascending positions in the flat tensor, row-major; and
            values, shape (k,), of any type: `decode_sparse` converts it to the
            header's. All other elements are zero.

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
    reference: Tensor | None = None,
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
    reference : Tensor | None
        The tensor that the frame was coded by, if it was.

    Returns
    -------
    Tensor
        Contiguous, with the shape and dtype of the tensor that was encoded.

    Raises
    ------
    FrameError
        If the frame is cut short, altered, of another version, of an unknown
        compressor, too large, inconsistent, or coded by another reference.
    ValueError
        If there is a reference for a compressor that takes none.
    """
    header, payload = wire.parse(frame, max_elements=max_elements)
    compressor = class_of(header.compressor, header.dtype)
    offered = compressor.offered(reference)
    flat = compressor.unpack(header, payload, device, **offered)
    return flat.to(header.dtype).view(header.shape)


def decode_sparse(
    frame: wire.Buffer,
    *,
    device: Device = "cpu",
    max_elements: int = MAX_ELEMENTS,
) -> Sparse:
    """Decode the kept elements of a frame, without allocating the tensor.

    Parameters
    ----------
    frame, device, max_elements
        See `decode`.

    Returns
    -------
    tuple[Tensor, Tensor]
        int64, shape (k,): ascending positions in the flat tensor, row-major; and the
        values there, shape (k,), zeros among them included, of the type of the tensor
        that was encoded. All other elements are zero.

    Raises
    ------
    FrameError
        As `decode`, and if the frame's compressor has no positions.
    """
    header, payload = wire.parse(frame, max_elements=max_elements)
    compressor = sparse_class_of(header.compressor, header.dtype)
    positions, values = compressor.unpack_sparse(header, payload, device)
    return positions, values.to(header.dtype)


def kept_positions(
    frame: wire.Buffer,
    *,
    device: Device = "cpu",
    max_elements: int = MAX_ELEMENTS,
) -> Tensor:
    """Return the positions of the kept elements of a frame, see `decode_sparse`."""
    return decode_sparse(frame, device=device, max_elements=max_elements)[0]


def has_positions(name: str) -> bool:
    """Return whether frames of a compressor hold positions of kept elements."""
    return name in COMPRESSORS and COMPRESSORS[name].keeps_positions


def class_of(name: str, dtype: torch.dtype | None = None) -> type[Compressor]:
    """Return the class that decodes what a frame or frame-set names.

    Raises
    ------
    FrameError
        If it is unknown, or encodes no tensors of the type.
    """
    if name not in COMPRESSORS:
        raise FrameError(
            f"frame of the unknown compressor {name!r}, "
            f"known are {', '.join(COMPRESSORS)}"
        )
    compressor = COMPRESSORS[name]
    if dtype is not None and dtype not in compressor.dtypes:
        raise FrameError(
            f"{name} frame of {dtype}, expected one of "
            f"{', '.join(map(str, compressor.dtypes))}"
        )
    return compressor


def sparse_class_of(name: str, dtype: torch.dtype | None = None) -> type[Compressor]:
    """Return the class likewise; `FrameError` also if it keeps no positions."""
    compressor = class_of(name, dtype)
    if not compressor.keeps_positions:
        raise FrameError(f"{name} frame has no positions")
    return compressor
