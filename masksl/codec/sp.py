"""Sparsification: a few elements are kept, by magnitude or at random."""

import struct
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from masksl.codec import planes, positions, topk, wire
from masksl.codec.base import (
    Bounds,
    Compressor,
    Device,
    Header,
    Packed,
    Shape,
    Sparse,
)
from masksl.codec.options import check_choice, check_number, check_sparsity


@dataclass(frozen=True)
class Sparsification(Compressor):
    """SP: the elements of largest magnitude, all others zero.

    Parameters
    ----------
    sparsity : float
        Share of the elements that is dropped, at least 0, less than 1;
        ``k = floor((1 - sparsity) d)``, at least 1. Of equal magnitudes the lower
        index is kept.
    scope : str
        ``tensor`` keeps k of all d elements, ``sample`` k of each sample's.
    values : str
        Type of sent values: ``float32`` is the tensor's own, ``bfloat16`` and
        ``float16`` take 16 bits.
    positions : str
        ``paper``: a bit an element or 32 bits a kept element, whichever is smaller;
        ``auto``: the gaps between kept elements, entropy-coded, where that is smaller.
    lossless : str
        Stage over the bitmap: ``none``, ``fast``, ``context`` or ``auto``.

    References
    ----------
    Top-k sparsification as compared with in the MS paper (ECAI 2024), section 5; there
    by value, here by magnitude, which is the same after a ReLU.
    """

    name: ClassVar[str] = "sp"
    keeps_positions: ClassVar[bool] = True
    sparsity: float = 0.95875
    scope: str = "tensor"
    values: str = "float32"
    positions: str = "paper"
    lossless: str = "none"

    _PARAMS: ClassVar[struct.Struct] = struct.Struct("<QBBB")

    def __post_init__(self) -> None:
        """Check the options."""
        check_sparsity(self.sparsity)
        check_choice("scope", self.scope, planes.SCOPES)
        check_choice("values", self.values, planes.VALUES)
        check_choice("positions", self.positions, ("paper", "auto"))
        check_choice("lossless", self.lossless, planes.LOSSLESS)

    def kept(self, count: int) -> int:
        """Return the number of elements that are kept of so many."""
        return topk.kept(self.sparsity, count)

    def select(self, magnitude: Tensor, k: int, *, seed: int, training: bool) -> Tensor:
        """Return the positions of the k elements that are kept of every row."""
        del seed, training
        return topk.largest(magnitude, k)

    def pack(
        self, flat: Tensor, shape: Shape, bounds: Bounds, *, seed: int, training: bool
    ) -> Packed:
        """Compress the elements of a tensor, see `Compressor.pack`."""
        rows = planes.rows(shape, self.scope)
        k = self.kept(flat.numel() // rows)
        magnitude = planes.working(flat).abs().view(rows, -1)
        chosen = self.select(magnitude, k, seed=seed, training=training)
        kept = len(chosen) // rows
        values = planes.narrow(flat[chosen], self.values, bounds, self.name)
        form, coded = positions.write_positions(
            chosen, shape, self.lossless, gaps=self.positions == "auto"
        )
        scope, dtype = planes.SCOPES.index(self.scope), wire.DTYPE_CODES[values.dtype]
        return self._PARAMS.pack(kept, scope, dtype, form), [values, coded]

    @classmethod
    def unpack(cls, header: Header, payload: memoryview, device: Device) -> Tensor:
        """Decompress the elements of a tensor, see `Compressor.unpack`."""
        sent, dtype, coded, form = cls._parts(header, payload)
        values = planes.Values(header, sent, dtype, device)
        return positions.place(header, coded, form, values, device)

    @classmethod
    def unpack_sparse(
        cls, header: Header, payload: memoryview, device: Device
    ) -> Sparse:
        """Return kept positions and their values, in the type in which they came."""
        sent, dtype, coded, form = cls._parts(header, payload)
        kept = len(sent) // dtype.itemsize
        chosen = positions.read_positions(header, coded, kept, form, device)
        return chosen, planes.read_values(header, sent, dtype, device)

    @classmethod
    def _parts(
        cls, header: Header, payload: memoryview
    ) -> tuple[memoryview, torch.dtype, memoryview, int]:
        """Return the values, their type, the positions and their form."""
        kept, scope, code, form = header.unpack_params(cls._PARAMS)
        kept *= planes.check_kept(header, kept, scope)
        dtype = planes.value_dtype(header, code)
        sent, coded = planes.split(header, payload, kept * dtype.itemsize)
        return sent, dtype, coded, form


@dataclass(frozen=True)
class RandomizedSparsification(Sparsification):
    """RT: like `sp`, but each kept element may be drawn from outside the k largest.

    k elements are drawn without replacement; an element of the k largest has the
    weight ``(1 - alpha) / k``, any other ``alpha / (d - k)``.

    Parameters
    ----------
    alpha : float
        Weight of everything outside the k largest, at least 0, less than 1; with 0 it
        is `sp`.
    evaluation : str
        ``topk``, the k largest in evaluation, as in its own paper; ``random``, drawn
        there too, as the MS paper's comparison does.

    References
    ----------
    Zheng et al., "Reducing Communication for Split Learning by Randomized Top-k
    Sparsification", IJCAI 2023 (per sample there: ``scope=sample``); the MS paper's
    comparison selects per tensor.
    """

    name: ClassVar[str] = "rt"
    alpha: float = 0.1
    evaluation: str = "topk"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_number("alpha", self.alpha, 0, 1)
        check_choice("evaluation", self.evaluation, ("topk", "random"))

    def select(self, magnitude: Tensor, k: int, *, seed: int, training: bool) -> Tensor:
        """Draw the positions of the k elements that are kept of every row."""
        if not training and self.evaluation == "topk":
            return topk.largest(magnitude, k)
        generator = torch.Generator(magnitude.device).manual_seed(seed)
        return topk.draw(magnitude, k, self.alpha, generator)
