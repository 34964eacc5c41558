"""The parameters of a network as one vector, and the vectors that workers upload."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from masksl.compress import (
    Compressor,
    FrameError,
    NotFiniteError,
    decode_set,
    decode_set_sparse,
    encode_set,
    has_positions,
)
from masksl.methods.sasg.selection import joined_selection, keeping
from masksl.runtime.compressors import EXACT
from masksl.training.flat import FlatParameters
from masksl.training.tensors import Tensors, all_finite

_ALL = "parameters"  # the whole vector as one tensor
_BLOCK = 2**14  # elements that are squared together: 128 KiB in float64


class Vector(NamedTuple):
    """What a worker uploaded, as the receiver has it.

    Parameters
    ----------
    positions : torch.Tensor | None
        int64, shape (k,): ascending positions among all d parameters. None if it has
        all of them.
    values : torch.Tensor
        float32, shape (k,) or (d,).
    """

    positions: torch.Tensor | None
    values: torch.Tensor

    @property
    def all_positions(self) -> torch.Tensor:
        """Positions of the values, also if it has all of them."""
        if self.positions is not None:
            return self.positions
        return torch.arange(len(self.values), device=self.values.device)

    def add_to(self, total: torch.Tensor) -> None:
        """Add it to a dense vector, float32, shape (d,)."""
        if self.positions is None:
            total.add_(self.values)
        else:  # no position comes twice, so the order of additions is fixed
            total.index_add_(0, self.positions, self.values)

    def take_from(self, total: torch.Tensor) -> None:
        """Subtract it from a dense vector, float32, shape (d,)."""
        Vector(self.positions, -self.values).add_to(total)


class Layout(FlatParameters):
    """How the parameters of a network lie in one vector, and how it is sent."""

    @classmethod
    def of(cls, module: nn.Module) -> "Layout":
        """Return the layout of a network's parameters."""
        named = dict(module.named_parameters())
        device = next(iter(named.values())).device
        return cls({name: p.shape for name, p in named.items()}, device)

    def scaled(self, tensors: Mapping[str, torch.Tensor], rate: float) -> torch.Tensor:
        """Return the vector of tensors by name, multiplied by a number."""
        flat = torch.empty(self.elements, device=self.device)
        for name, own in self.named(flat).items():
            torch.mul(tensors[name], rate, out=own)
        return flat

    def zeros(self) -> torch.Tensor:
        """Return a vector of zeros, float32, shape (d,)."""
        return torch.zeros(self.elements, device=self.device)

    # --- what is sent -----------------------------------------------------------------

    def encode(self, flat: torch.Tensor, compressor: Compressor, *, seed: int) -> bytes:
        """Encode a vector as one frame-set.

        A compressor works tensor by tensor.

        Raises
        ------
        NotFiniteError
            If it has values that are not finite.
        """
        if compressor == EXACT:
            if not all_finite(flat):
                raise NotFiniteError("values not finite")
            return encode_set({_ALL: flat})
        joined = joined_selection(compressor, self.sizes)
        if joined is not None:
            return encode_set({_ALL: flat}, joined)
        return encode_set(self.named(flat), compressor, seed=seed)

    def compress(
        self, flat: torch.Tensor, compressor: Compressor, *, seed: int
    ) -> tuple[bytes, Vector]:
        """Encode a vector; return also what `decode_vector` makes of it.

        Raises
        ------
        NotFiniteError
            If it has values that are not finite.
        """
        joined = joined_selection(compressor, self.sizes)
        if joined is None or joined.values != "float32":
            data = self.encode(flat, compressor, seed=seed)
            return data, self.decode_vector(data, compressor)
        magnitude = flat.abs().view(1, -1)  # what is kept goes exactly: no decoding
        chosen = joined.select(magnitude, 0, seed=seed, training=True)
        data = encode_set({_ALL: flat}, keeping(joined, chosen))
        return data, Vector(chosen, flat[chosen])

    def decode(self, data: bytes, compressor: Compressor) -> torch.Tensor:
        """Decode what `encode` returned to a vector, float32, shape (d,).

        Raises
        ------
        FrameError
            If the frame-set is broken.
        """
        like = self._like(compressor)
        found = decode_set(data, like)
        return found[_ALL] if _ALL in like else self.flat(found)

    def decode_vector(self, data: bytes, compressor: Compressor) -> Vector:
        """Decode an upload.

        Where the compressor keeps no positions, those of nonzero elements are taken.

        Raises
        ------
        FrameError
            If the frame-set is broken, or has values that are not finite.
        """
        if compressor == EXACT:
            vector = Vector(None, self.decode(data, compressor))
        elif has_positions(compressor.name):
            vector = self._sparse(data, compressor)
        else:
            flat = self.decode(data, compressor)
            positions = flat.nonzero().view(-1)
            vector = Vector(positions, flat[positions])
        if not all_finite(vector.values):
            raise FrameError("update not finite")
        return vector

    def _sparse(self, data: bytes, compressor: Compressor) -> Vector:
        like = self._like(compressor)
        found = decode_set_sparse(data, like)
        if found.keys() != like.keys():
            raise FrameError("update without all parameters")
        if _ALL in found:
            return Vector(*found[_ALL])
        positions, values, start = [], [], 0
        for (own, kept), size in zip(found.values(), self.sizes, strict=True):
            positions.append(own + start)
            values.append(kept)
            start += size
        return Vector(torch.cat(positions), torch.cat(values))

    def _like(self, compressor: Compressor) -> Tensors:
        """Return tensors of the dtype and shapes that are sent, without memory."""
        one = torch.empty((), device=self.device)
        if compressor == EXACT or joined_selection(compressor, self.sizes) is not None:
            return {_ALL: one.expand(self.elements)}
        return {name: one.expand(shape) for name, shape in self.shapes.items()}


def total_of(vectors: Sequence[Vector], layout: Layout) -> torch.Tensor:
    """Return the sum of all workers' vectors, added in the order of their numbers.

    The order makes it the same on the server and on every client.
    """
    total = layout.zeros()
    for vector in vectors:
        vector.add_to(total)
    return total


def squared_norm(flat: torch.Tensor, minus: torch.Tensor | None = None) -> float:
    """Return the squared norm of a vector, or of a difference, in float64.

    On the CPU NumPy adds up, on one thread: the order of PyTorch's sums depends on the
    number of threads.

    Parameters
    ----------
    flat : torch.Tensor
        float32, shape (d,).
    minus : torch.Tensor | None
        Subtracted from it in float32, if given.
    """
    if flat.device.type != "cpu":
        change = flat if minus is None else flat - minus
        return float(change.double().square().sum())
    total, elements = 0.0, flat.numpy()
    for start in range(0, len(elements), _BLOCK):
        block = elements[start : start + _BLOCK]
        if minus is not None:
            block = block - minus[start : start + _BLOCK].numpy()
        wide = block.astype(np.float64)
        total += float(np.square(wide, out=wide).sum())
    return total


def join(vectors: Sequence[Vector]) -> Tensors:
    """Return the uploads of all workers as three tensors.

    Returns
    -------
    dict[str, torch.Tensor]
        ``positions`` and ``values`` of all, one worker after the other, and the
        ``sizes``, int64, shape (M,).
    """
    sizes = torch.tensor([len(vector.values) for vector in vectors])
    positions = [vector.all_positions for vector in vectors]
    values = [vector.values for vector in vectors]
    joined = {"positions": torch.cat(positions), "values": torch.cat(values)}
    return joined | {"sizes": sizes}


def split(tensors: Tensors, workers: int, device: torch.device) -> list[Vector]:
    """Return the uploads of what `join` returned, empty ones of nothing.

    Raises
    ------
    FrameError
        If they are those of another number of workers.
    """
    if not tensors:
        none = torch.empty(0, dtype=torch.int64, device=device)
        return [Vector(none, none.float())] * workers
    sizes = tensors["sizes"].tolist()
    if len(sizes) != workers:
        raise FrameError(f"uploads of {len(sizes)} workers, expected {workers}")
    parts = tensors["positions"].split(sizes), tensors["values"].split(sizes)
    return [Vector(*pair) for pair in zip(*parts, strict=True)]
