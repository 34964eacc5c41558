"""The frame-set: several tensors that travel together, as one piece of bytes.

A frame-set has one header and one checksum for all of its tensors. Names, dtypes and
shapes are not sent: the receiver has tensors like them. `masksl.codec.set_wire` holds
the layout.
"""

import hashlib
import math
import struct
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from masksl.codec import planes, set_wire, wire
from masksl.codec.base import Compressor, sparse_class_of
from masksl.codec.planes import Bounds, NotFiniteError
from masksl.codec.set_wire import Named
from masksl.codec.wire import Buffer, FrameError

__all__ = [
    "decode_set",
    "decode_set_exact",
    "decode_set_sparse",
    "encode_set",
]

_LITTLE = 3  # a tensor hardly varies whose root mean square is as many deviations

# --- encoding -------------------------------------------------------------------------


def encode_set(
    tensors: Named,
    compressor: Compressor | None = None,
    *,
    exact: Collection[str] = (),
    joined: bool = False,
    scaled: bool = False,
    seed: int = 0,
    training: bool = True,
) -> bytes:
    """Encode tensors by name as one frame-set.

    Parameters
    ----------
    tensors : Mapping[str, Tensor]
        float16, bfloat16, float32, float64, bool or integers, of any shape, empty ones
        too. Names are not sent; the receiver needs tensors of the same order.
    compressor : Compressor | None
        Compresses the tensors of the types that it takes, ``Compressor.dtypes``: by
        default the floating ones. All others are sent exactly, as are empty ones. None
        sends every tensor exactly, bit for bit, whatever its values; ``exact``,
        ``joined`` and ``scaled`` then change nothing.
    exact : Collection[str]
        Names of tensors that are sent exactly as well.
    joined : bool
        Whether the compressor gets all of its tensors as one flat tensor, in order, and
        not one after another.
    scaled : bool
        Whether each compressed tensor is divided by its standard deviation before, and
        multiplied by it after; by its root mean square, where that is more than three
        times as large. This scale is sent in float32, float64 for float64 tensors, and
        is 1 where it is 0, not finite, or too small for the quotients' type.
    seed : int
        Seed of random draws. Tensor i of ``tensors``, from 0 on, draws with half of the
        little-endian number that is the 8-byte BLAKE2b of the text ``seed/i``; joined
        tensors draw with the seed itself.
    training : bool
        False in evaluation; some compressors then behave differently.

    Returns
    -------
    bytes
        The frame-set, assembled by one copy.

    Raises
    ------
    TypeError
        If one is no tensor, not dense, without values, or of another type.
    ValueError
        If a name of ``exact`` is not among the tensors, or tensors of several dtypes
        are to be joined; as `NotFiniteError` if a tensor that is compressed has values
        that are not finite. The message names the tensor.
    """
    if unknown := [name for name in exact if name not in tensors]:
        raise ValueError(f"exact={unknown[0]!r}: must be one of the tensors' names")
    for key, tensor in tensors.items():
        wire.check_dense(tensor, f"tensor {key}")
    mode, name, flags, table = set_wire.EXACT, "", 0, b""
    coded: list[str] = []
    parts: list[wire.Part] = []
    if compressor is not None:
        mode = set_wire.JOINED if joined else set_wire.EACH
        name, flags = compressor.name, set_wire.SCALED if scaled else 0
        coded = [
            key
            for key, tensor in tensors.items()
            if set_wire.can_be_coded(tensor, type(compressor)) and key not in exact
        ]
        packer = _Packer(compressor, tensors, coded, seed, training)
        table, parts = packer.pack(joined, scaled)
    return set_wire.assemble(
        *(tensors, coded),
        mode=mode,
        flags=flags,
        name=name,
        table=table,
        parts=parts,
    )


@dataclass
class _Packer:
    """Compresses tensors of a frame-set.

    Parameters
    ----------
    compressor : Compressor
        The compressor.
    tensors : Mapping[str, Tensor]
        All tensors of the set.
    coded : Sequence[str]
        Names of those that are compressed, in order.
    seed : int
        Seed of the set.
    training : bool
        See `encode_set`.
    """

    compressor: Compressor
    tensors: Named
    coded: Sequence[str]
    seed: int
    training: bool

    def pack(self, joined: bool, scaled: bool) -> tuple[bytes, list[wire.Part]]:
        """Return all between the header and the payloads, and the payloads."""
        flats = [wire.flatten(self.tensors[name]) for name in self.coded]
        dtypes = {str(flat.dtype) for flat in flats}
        if joined and len(dtypes) > 1:
            raise ValueError(
                f"joined=True: tensors of {' and '.join(sorted(dtypes))}, "
                "must be of one dtype"
            )
        fields = [set_wire.marks(self.tensors, self.coded)]
        bounds = self._bounds(flats)
        if scaled:
            scales = self._scales(flats, bounds)
            flats = [_divide(*pair) for pair in zip(flats, scales, strict=True)]
            bounds = self._bounds(flats)
            fields += [
                struct.pack(set_wire.scale_format(flat.dtype), scale)
                for flat, scale in zip(flats, scales, strict=True)
            ]
        payloads: list[wire.Part] = []
        for params, parts in self._entries(flats, bounds, joined):
            fields.append(set_wire.ENTRY.pack(len(params), _size(parts)) + params)
            payloads += parts
        return b"".join(fields), payloads

    def _bounds(self, flats: Sequence[Tensor]) -> list[Bounds]:
        """Return the least and the largest element of each tensor.

        A GPU is waited for once.
        """
        found = _to_floats([bound for flat in flats for bound in flat.aminmax()])
        bounds = list(zip(found[::2], found[1::2], strict=True))
        for name, flat, own in zip(self.coded, flats, bounds, strict=True):
            if not all(map(math.isfinite, own)):
                with _naming(name):
                    planes.finite_bounds(flat, self.compressor.name)
        return bounds

    def _scales(self, flats: Sequence[Tensor], bounds: Sequence[Bounds]) -> list[float]:
        """Return what each tensor is divided by, 1 where it is of no use.

        Divided by its deviation alone, a tensor that hardly varies around its mean
        would be larger than all that it is joined with.
        """
        for name, flat in zip(self.coded, flats, strict=True):
            if not flat.is_floating_point():
                raise ValueError(f"scaled=True: tensor {name} is {flat.dtype}")
        works = [planes.working(flat) for flat in flats]
        found = [[work.std(correction=0), work.mean()] for work in works]
        numbers = _to_floats(list(chain.from_iterable(found)))
        scales = []
        for flat, own, scale, mean in zip(
            flats, bounds, numbers[::2], numbers[1::2], strict=True
        ):
            whole = math.hypot(scale, mean)
            if _LITTLE * scale < whole < math.inf:
                scale = whole
            most = torch.finfo(flat.dtype).max
            usable = scale > 0 and math.isfinite(scale)
            if not usable or max(map(abs, own)) / scale > most:
                scale = 1.0
            scales.append(scale)
        return scales

    def _entries(
        self, flats: Sequence[Tensor], bounds: Sequence[Bounds], joined: bool
    ) -> Iterator[tuple[bytes, Sequence[wire.Part]]]:
        """Yield parameters and payload of each tensor, or of the joined one."""
        if joined and flats:
            lows, highs = zip(*bounds, strict=True)
            whole = torch.cat(list(flats))
            shape = (whole.numel(),)
            yield self._entry(whole, shape, (min(lows), max(highs)), self.seed)
        elif not joined:
            places = {name: i for i, name in enumerate(self.tensors)}
            for name, flat, own in zip(self.coded, flats, bounds, strict=True):
                shape = tuple(self.tensors[name].shape)
                seed = _seed(self.seed, places[name])
                with _naming(name):
                    entry = self._entry(flat, shape, own, seed)
                yield entry

    def _entry(
        self, flat: Tensor, shape: tuple[int, ...], bounds: Bounds, seed: int
    ) -> tuple[bytes, Sequence[wire.Part]]:
        return self.compressor.pack(
            flat, shape, bounds, seed=seed, training=self.training
        )


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Name the tensor in a `NotFiniteError`."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"tensor {name}: {error}") from None


def _size(parts: Sequence[wire.Part]) -> int:
    return sum(len(p) if isinstance(p, bytes) else p.nbytes for p in parts)


def _seed(seed: int, place: int) -> int:
    """Return the seed of the tensor at a place: 63 bits."""
    digest = hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _to_floats(numbers: Sequence[Tensor]) -> list[float]:
    """Return tensors of one element as numbers: a GPU is waited for once."""
    if not numbers:
        return []
    return torch.stack([number.double() for number in numbers]).tolist()


def _divide(flat: Tensor, scale: float) -> Tensor:
    return (planes.working(flat) / scale).to(flat.dtype)


# --- decoding -------------------------------------------------------------------------


def decode_set(data: Buffer, like: Named) -> dict[str, Tensor]:
    """Decode a frame-set.

    Parameters
    ----------
    data : bytes-like
        One whole frame-set.
    like : Mapping[str, Tensor]
        Tensors by name with the dtypes and shapes of those that were encoded, in the
        same order.

    Returns
    -------
    dict[str, Tensor]
        The tensors, with names, order and devices of ``like``. The exact ones of a
        device share memory, into which they are copied once. Each begins at a multiple
        of 64 bytes; changing one in place does not concern the others.

    Raises
    ------
    FrameError
        If the frame-set is cut short, altered, of another version, of an unknown
        compressor, of other tensors than ``like``, or inconsistent. Nothing larger than
        those is allocated.
    """
    parsed = set_wire.parse(data, like)
    tensors = set_wire.read_exact(parsed, like)
    for header, payload, members in parsed.entries:
        assert parsed.compressor is not None
        device = like[members[0]].device
        flat = parsed.compressor.unpack(header, payload, device).to(header.dtype)
        sizes = [like[name].numel() for name in members]
        for name, part in zip(members, flat.split(sizes), strict=True):
            whole = _multiply(part, parsed.scales.get(name))
            tensors[name] = whole.to(like[name].device).view(like[name].shape).data
    return {name: tensors[name] for name in like}


def decode_set_sparse(data: Buffer, like: Named) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the kept elements of every compressed tensor of a frame-set.

    Parameters
    ----------
    data, like
        See `decode_set`.

    Returns
    -------
    dict[str, tuple[Tensor, Tensor]]
        By name in the order of ``like``: int64, shape (k,), ascending positions in the
        flat tensor; and their values, shape (k,), of its dtype. Where tensors were
        joined, k may be 0. Those sent exactly are left out, see `decode_set_exact`.

    Raises
    ------
    FrameError
        As `decode_set`, and if the set has no compressor or one without positions.
    """
    parsed = set_wire.parse(data, like)
    if parsed.compressor is None:
        raise FrameError("frame-set of exact tensors has no positions")
    compressor = sparse_class_of(parsed.compressor.name)
    found = {}
    for header, payload, members in parsed.entries:
        device = like[members[0]].device
        positions, values = compressor.unpack_sparse(header, payload, device)
        values = values.to(header.dtype)
        starts = np.cumsum([0, *(like[name].numel() for name in members)])
        cuts = [0, positions.numel()]
        if len(members) > 1:
            inner = wire.to_device(torch.from_numpy(starts[1:-1]), device)
            cuts[1:1] = torch.searchsorted(positions, inner).tolist()
        for i, name in enumerate(members):
            part = slice(cuts[i], cuts[i + 1])
            own, kept = positions[part] - int(starts[i]), values[part]
            kept = _multiply(kept, parsed.scales.get(name))
            found[name] = own.to(like[name].device), kept.to(like[name].device)
    return found


def decode_set_exact(data: Buffer, like: Named) -> dict[str, Tensor]:
    """Return the tensors of a frame-set that were sent exactly, see `decode_set`."""
    return set_wire.read_exact(set_wire.parse(data, like), like)


def _multiply(values: Tensor, scale: float | None) -> Tensor:
    """Undo `_divide`; what rounding puts beyond the type's range is its largest."""
    if scale is None:
        return values
    most = torch.finfo(values.dtype).max
    return (planes.working(values) * scale).clamp_(-most, most).to(values.dtype)
