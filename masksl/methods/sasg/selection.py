"""Which elements of a vector of all parameters are sent."""

from dataclasses import dataclass, field, fields
from functools import lru_cache

import torch

from masksl.compress import Compressor, Sparsification


class _Nonzero(Sparsification):
    """Keeps the elements that are not zero, however many; its frames are those of sp.

    The first element is kept where there is none.
    """

    def select(
        self, magnitude: torch.Tensor, k: int, *, seed: int, training: bool
    ) -> torch.Tensor:
        """Return the positions of the elements that are not zero."""
        del k, seed, training
        found = magnitude.view(-1).nonzero().view(-1)
        return found if len(found) else found.new_zeros(1)


NONZERO = _Nonzero(positions="auto")
"""Sends the elements that are not zero, exactly."""


@dataclass(frozen=True)
class _Largest(Sparsification):
    """Keeps the largest elements of each part of a vector; its frames are those of sp.

    Parameters
    ----------
    sizes : tuple[int, ...]
        Number of elements of each part.
    """

    sizes: tuple[int, ...] = ()

    def select(
        self, magnitude: torch.Tensor, k: int, *, seed: int, training: bool
    ) -> torch.Tensor:
        """Return the positions of the largest elements of each part."""
        chosen, start = [], 0
        for part in magnitude.split(self.sizes, dim=1):
            k = self.kept(part.numel())
            own = super().select(part, k, seed=seed, training=training)
            chosen.append(own + start)
            start += part.numel()
        return torch.cat(chosen)


@dataclass(frozen=True)
class _Chosen(Sparsification):
    """Keeps given elements of a vector; its frames are those of sp.

    Parameters
    ----------
    chosen : torch.Tensor
        int64, shape (k,): their positions, ascending.
    """

    chosen: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def select(
        self, magnitude: torch.Tensor, k: int, *, seed: int, training: bool
    ) -> torch.Tensor:
        """Return the positions."""
        del magnitude, k, seed, training
        return self.chosen


def keeping(selection: Sparsification, chosen: torch.Tensor) -> Sparsification:
    """Return what sends as a selection does, of elements that it chose before."""
    own = {f.name: getattr(selection, f.name) for f in fields(Sparsification)}
    return _Chosen(**own, chosen=chosen)


@lru_cache(maxsize=8)
def joined_selection(
    compressor: Compressor, sizes: tuple[int, ...]
) -> Sparsification | None:
    """Return what encodes a vector as one tensor, and keeps what a compressor keeps.

    It takes less time and fewer bytes than a part for each tensor. None if there is
    nothing of that kind: a stage over positions, for example, needs the tensors'
    shapes.

    Parameters
    ----------
    compressor : Compressor
        Keeps elements of each tensor.
    sizes : tuple[int, ...]
        Number of elements of each tensor.
    """
    if isinstance(compressor, _Nonzero):
        return compressor
    if not isinstance(compressor, Sparsification) or compressor.name != "sp":
        return None  # what inherits selects otherwise
    if (compressor.scope, compressor.lossless) != ("tensor", "none"):
        return None
    own = {f.name: getattr(compressor, f.name) for f in fields(compressor)}
    return _Largest(**own, sizes=sizes)
