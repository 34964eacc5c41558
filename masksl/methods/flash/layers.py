"""Which weights of a network have a mask, and how many of each layer are kept."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import nn

from masksl.codec import philox
from masksl.methods.flash import FlashConfig
from masksl.training.flat import FlatParameters
from masksl.training.tensors import Tensors


class NetworkError(ValueError):
    """A network in which no weight can have a mask."""


@dataclass(frozen=True)
class Layers(FlatParameters):
    """The maskable weights of a network, as one vector, and what has no mask.

    A mask is a bool vector of all of them.

    Parameters
    ----------
    shapes : dict[str, torch.Size]
        Shapes of the maskable weights by name, in order: n weights in L layers.
    device : torch.device
        Device of the vectors.
    rest : tuple[str, ...]
        Names of all other floating parameters and buffers.
    """

    rest: tuple[str, ...]

    @classmethod
    def of(cls, module: nn.Module, config: FlashConfig) -> Self:
        """Find the maskable weights: of convolutions and linear layers but the last.

        Parameters
        ----------
        module : nn.Module
            The network.
        config : FlashConfig
            Says whether the first layer and convolutions of 1x1 are among them.

        Raises
        ------
        NetworkError
            If there are none.
        """
        found = [
            (f"{name}.weight", layer.weight)
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Conv2d | nn.Linear)
        ]
        found = found[0 if config.mask_first else 1 : -1]
        shapes = {
            name: weight.shape
            for name, weight in found
            if config.mask_shortcuts or not _is_pointwise(weight)
        }
        if not shapes:
            raise NetworkError("no layer before the last one can have a mask")
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        rest = tuple(
            name
            for name, tensor in tensors.items()
            if name not in shapes and tensor.is_floating_point()
        )
        return cls(shapes, next(module.parameters()).device, rest)

    @cached_property
    def numbers(self) -> np.ndarray:
        """The layer of each weight, from 0 on, uint16, shape (n,)."""
        return np.repeat(np.arange(len(self.sizes), dtype=np.uint16), self.sizes)

    def counts(self, mask: np.ndarray) -> list[int]:
        """Return how many weights of each layer a mask keeps."""
        return [int(np.count_nonzero(part)) for part in self.parts(mask)]

    def parts(self, flat: np.ndarray) -> list[np.ndarray]:
        """Return the views of a vector by layer."""
        return np.split(flat, np.cumsum(self.sizes)[:-1])

    def kept(self, density: float) -> int:
        """Return how many of all weights a density stands for."""
        return max(1, round(density * self.elements))

    def split(self, flat: torch.Tensor, counts: Sequence[int]) -> Tensors:
        """Return the kept weights of each layer by name, given those of all layers.

        Parameters
        ----------
        flat : torch.Tensor
            Shape (k,): kept weights of all layers, in order.
        counts : Sequence[int]
            How many there are of each layer.
        """
        return dict(zip(self.shapes, flat.split(list(counts)), strict=True))


def allot(shares: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Divide a number of kept weights among layers.

    A layer that would get more than it has gets all it has, and the others get what is
    left over. Fractions go to the layers of the largest remainders.

    Parameters
    ----------
    shares : Sequence[float]
        What each layer gets is proportional to its share, not negative.
    sizes : Sequence[int]
        Weights of each layer.
    total : int
        At most the sum of the sizes.

    Returns
    -------
    list[int]
        Kept weights of each layer; their sum is ``total``.
    """
    quotas = [0.0] * len(sizes)
    open_ = set(range(len(sizes)))
    left = float(total)
    while open_:
        own = {i: shares[i] for i in open_}
        if not sum(own.values()) > 0:
            own = {i: float(sizes[i]) for i in open_}
        scale = left / sum(own.values()) if left > 0 else 0.0
        quotas = [own[i] * scale if i in own else quotas[i] for i in range(len(sizes))]
        full = {i for i in open_ if quotas[i] >= sizes[i]}
        if not full:
            break
        for i in full:
            quotas[i] = float(sizes[i])
        left -= sum(sizes[i] for i in full)
        open_ -= full
    counts = [min(math.floor(q), n) for q, n in zip(quotas, sizes, strict=True)]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (counts[i] - quotas[i], i))
    missing = total - sum(counts)
    while missing > 0:
        for i in by_remainder:
            if missing > 0 and counts[i] < sizes[i]:
                counts[i] += 1
                missing -= 1
    return counts


def draw(seed: int, counts: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
    """Draw a mask that keeps exactly so many weights of each layer.

    Layer l draws with the stream l of `philox.sample`, so that whoever has the seed and
    the counts has the mask.

    Returns
    -------
    numpy.ndarray
        bool, shape (n,).
    """
    mask = np.zeros(sum(sizes), bool)
    start = 0
    for layer, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        mask[start + philox.sample(seed, layer, count, size)] = True
        start += size
    return mask


def _is_pointwise(weight: torch.Tensor) -> bool:
    return weight.dim() == 4 and weight.shape[2:] == (1, 1)
