"""Masks as bytes and as state."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from masksl.codec import wire
from masksl.codec.wire import Buffer
from masksl.compress import FrameError, decode, make
from masksl.methods.flash.evolution import Change, Growth
from masksl.methods.flash.start import FIRST, Start
from masksl.training.tensors import Tensors

SAME, DRAWN, GIVEN, FULL, GROWN = range(5)  # forms

_HEADER = struct.Struct("<BI")  # form; version of the mask, or number of adjustments
_NUMBER = struct.Struct("<I")
_AUTO, _PACKED = make("mask"), make("mask", code="packed")


class Versioned(NamedTuple):
    """A mask and its number.

    Parameters
    ----------
    version : int
        `FIRST` is drawn from the seed and the weights of each layer that it keeps.
    mask : numpy.ndarray
        bool, shape (n,).
    """

    version: int
    mask: np.ndarray


@dataclass
class MaskCoding:
    """Turns masks into bytes and back.

    What comes down is the smallest of: a version that the receiver holds (``same``);
    for the first mask what it is drawn by (``drawn``); a mask coded by the one that the
    receiver holds (``given``); a mask coded by the densities of layers (``full``). What
    goes up can also be the adjustments of a mask that the receiver holds (``grown``):
    which of the active weights were cut, and how many became active in each layer; the
    receiver draws these itself.

    Parameters
    ----------
    start : Start
        What the run begins with.
    """

    start: Start
    _drawn: dict[bytes, np.ndarray] = field(default_factory=dict)

    # --- what comes down --------------------------------------------------------------

    def encode(self, new: Versioned, held: Versioned | None) -> bytes:
        """Encode a mask for a receiver that holds another, or None."""
        header = new.version
        if held is not None and held.version == new.version:
            return _HEADER.pack(SAME, header)
        if new.version == FIRST:
            return _HEADER.pack(DRAWN, header) + self._counts(new.mask)
        way, bodies = self.start.config.masks, {}
        if held is not None and way in ("auto", "given"):
            frame = self._frame(new.mask, self._given(held.mask))
            bodies[GIVEN] = _NUMBER.pack(held.version) + frame
        if not bodies or way == "auto":
            bodies[FULL] = self._frame(new.mask, self._levels)
        form = min(bodies, key=lambda form: len(bodies[form]))
        return _HEADER.pack(form, header) + bodies[form]

    def decode(self, data: bytes, held: Versioned | None) -> Versioned:
        """Decode a mask.

        Raises
        ------
        FrameError
            If it is broken, or was coded by another mask than the held one.
        """
        body = wire.Reader(memoryview(data), "mask")
        form, version = body.numbers(_HEADER)
        if form == SAME:
            body.end()
            return _by(version, held)
        if form == DRAWN:
            return Versioned(version, self._draw(body.rest()))
        if form == GIVEN:
            base = _by(body.numbers(_NUMBER)[0], held)
            return Versioned(version, _mask(body.rest(), self._given(base.mask)))
        if form == FULL:
            return Versioned(version, _mask(body.rest(), self._levels))
        raise FrameError(f"mask of form {form}")

    # --- what goes up -----------------------------------------------------------------

    def encode_changes(
        self, before: np.ndarray, changes: Sequence[Change], after: np.ndarray
    ) -> bytes:
        """Encode a mask that came about by adjustments of one that the receiver has.

        Parameters
        ----------
        before, after : numpy.ndarray
            bool, shape (n,): the two masks.
        changes : Sequence[Change]
            The adjustments.
        """
        if not changes:
            return _HEADER.pack(SAME, 0)
        way, bodies = self.start.config.masks, {}
        if way == "auto":
            bodies[GROWN] = self._adjustments(before, changes)
        if way == "given" or (way == "auto" and len(changes) > 1):
            bodies[GIVEN] = self._frame(after, self._given(before))
        if not bodies:
            bodies[FULL] = self._frame(after, self._levels)
        form = min(bodies, key=lambda form: len(bodies[form]))
        return _HEADER.pack(form, len(changes)) + bodies[form]

    def decode_changes(
        self, data: bytes, before: np.ndarray, growth: Growth
    ) -> np.ndarray:
        """Decode a mask that came about by adjustments of another.

        Raises
        ------
        FrameError
            If it is broken.
        """
        body = wire.Reader(memoryview(data), "mask")
        form, number = body.numbers(_HEADER)
        if form == SAME:
            body.end()
            return before
        if form == GROWN:
            most = max(1, self.start.config.local_epochs - 1)
            if number > most:
                raise FrameError(f"mask of {number} adjustments, expected up to {most}")
            mask = before.copy()
            for place in range(number):
                growth.apply(mask, self._adjustment(body, mask), place)
            body.end()
            return mask
        if form not in (GIVEN, FULL):
            raise FrameError(f"mask of form {form}")
        levels = self._given(before) if form == GIVEN else self._levels
        return _mask(body.rest(), levels)

    def _adjustments(self, before: np.ndarray, changes: Sequence[Change]) -> bytes:
        """Return adjustments as bytes: for each the cut weights, then the growth."""
        counts, parts = np.array(self.start.layers.counts(before)), []
        for change in changes:
            levels = _layers_of(counts)
            frame = self._frame(change.cut, levels)
            parts += [_NUMBER.pack(len(frame)), frame, pack_counts(change.grown)]
            counts += change.grown - _counted(levels[change.cut], len(counts))
        return b"".join(parts)

    def _adjustment(self, body: wire.Reader, mask: np.ndarray) -> Change:
        """Read one adjustment of a mask."""
        layers = self.start.layers
        counts = np.array(layers.counts(mask))
        levels = _layers_of(counts)
        cut = _mask(body.take(body.numbers(_NUMBER)[0]), levels)
        inactive = layers.sizes - counts + _counted(levels[cut], len(counts))
        return Change(cut, unpack_counts(body.take(4 * len(counts)), inactive.tolist()))

    # --- the first mask ---------------------------------------------------------------

    def _counts(self, mask: np.ndarray) -> bytes:
        return pack_counts(self.start.layers.counts(mask))

    def _draw(self, counts: Buffer) -> np.ndarray:
        """Return the first mask, drawn once."""
        key = bytes(counts)
        if key not in self._drawn:
            sizes = self.start.layers.sizes
            self._drawn = {key: self.start.mask(unpack_counts(key, sizes))}
        return self._drawn[key]

    # --- as state ---------------------------------------------------------------------

    def tensors(self, held: Versioned) -> Tensors:
        """Return a mask as tensors, the first one by what it is drawn by."""
        if held.version == FIRST:
            data = np.frombuffer(self._counts(held.mask), np.uint8)
        else:
            data = np.packbits(held.mask)
        version = torch.tensor(held.version)
        return {"version": version, "data": torch.from_numpy(data.copy())}

    def of_tensors(self, tensors: Tensors) -> Versioned:
        """Return the mask of `tensors`."""
        version, data = int(tensors["version"]), tensors["data"].cpu().numpy()
        if version == FIRST:
            return Versioned(version, self._draw(data.tobytes()))
        count = self.start.layers.elements
        return Versioned(version, np.unpackbits(data, count=count).view(bool))

    # --- frames -----------------------------------------------------------------------

    @property
    def _levels(self) -> np.ndarray:
        """The layer of each weight, by which a mask is coded without another."""
        return self.start.layers.numbers

    def _given(self, held: np.ndarray) -> np.ndarray:
        """Return what it is coded by if the receiver has another: its bit, too."""
        return 2 * self._levels + held

    def _frame(self, mask: np.ndarray, levels: np.ndarray) -> bytes:
        coder = _PACKED if self.start.config.masks == "packed" else _AUTO
        reference = torch.from_numpy(levels)
        return coder.encode(torch.from_numpy(mask), reference=reference)


def pack_counts(counts: Sequence[int]) -> bytes:
    """Return a number of weights for each layer as bytes, four for each."""
    return struct.pack(f"<{len(counts)}I", *counts)


def unpack_counts(data: Buffer, most: Sequence[int]) -> list[int]:
    """Return the numbers of `pack_counts`.

    Raises
    ------
    FrameError
        If there are not as many as layers, or one is above what its layer can have.
    """
    if len(data) != 4 * len(most):
        raise FrameError(f"counts of {len(data)} bytes, expected {4 * len(most)}")
    counts = list(struct.unpack(f"<{len(most)}I", data))
    for layer, (count, size) in enumerate(zip(counts, most, strict=True)):
        if count > size:
            raise FrameError(f"{count} weights of layer {layer}, which has {size}")
    return counts


def _by(version: int, held: Versioned | None) -> Versioned:
    """Return the held mask; `FrameError` unless it has that version."""
    if held is None or held.version != version:
        own = "none" if held is None else f"version {held.version}"
        raise FrameError(f"mask is coded by version {version}, but {own} is held")
    return held


def _mask(frame: Buffer, levels: np.ndarray) -> np.ndarray:
    """Decode a mask that was coded by levels."""
    count = len(levels)
    header, _ = wire.parse(frame, max_elements=count)
    if (header.compressor, header.shape) != (_AUTO.name, (count,)):
        raise FrameError(
            f"{header.compressor} frame of shape {tuple(header.shape)}, "
            f"expected one of {_AUTO.name}, shape ({count},)"
        )
    reference = torch.from_numpy(levels)
    return decode(frame, max_elements=count, reference=reference).numpy()


def _layers_of(counts: np.ndarray) -> np.ndarray:
    """Return the layer of each active weight, in order, uint16."""
    return np.repeat(np.arange(len(counts), dtype=np.uint16), counts)


def _counted(layers: np.ndarray, number: int) -> np.ndarray:
    """Return how often each layer occurs."""
    return np.bincount(layers, minlength=number)
