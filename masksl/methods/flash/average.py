"""Averages of weights that not every client has, and the masks that follow."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from masksl.codec import topk
from masksl.methods.flash.layers import Layers
from masksl.training.tensors import Tensors, average


@dataclass
class Average:
    """The average of what clients send in a round.

    Clients count by their samples.

    Parameters
    ----------
    layers : Layers
        The maskable weights.
    by_mask : bool
        Whether a weight is averaged over those clients alone that have it (``fma``);
        else it counts as 0 at all others (``fedavg``).
    """

    layers: Layers
    by_mask: bool
    masks: dict[int, np.ndarray] = field(default_factory=dict)
    counts: list[list[int]] = field(default_factory=list)
    _samples: list[int] = field(default_factory=list)
    _rest: list[Tensors] = field(default_factory=list)
    _sum: torch.Tensor | None = None
    _weights: torch.Tensor | None = None

    def add(
        self,
        client: int,
        samples: int,
        mask: np.ndarray,
        kept: torch.Tensor,
        rest: Tensors,
    ) -> None:
        """Add the weights of a client.

        Parameters
        ----------
        client, samples : int
            Its number, and its samples.
        mask : numpy.ndarray
            bool, shape (n,).
        kept : torch.Tensor
            float32, shape (k,): the weights that the mask keeps.
        rest : dict[str, torch.Tensor]
            What has no mask.
        """
        shape, device = self.layers.elements, self.layers.device
        if self._sum is None or self._weights is None:
            self._sum = torch.zeros(shape, dtype=torch.float64, device=device)
            self._weights = torch.zeros_like(self._sum)
        at = torch.from_numpy(np.flatnonzero(mask)).to(device)
        self._sum[at] += kept.double() * samples
        self._weights[at] += samples
        self.masks[client] = mask
        self.counts.append(self.layers.counts(mask))
        self._samples.append(samples)
        self._rest.append(rest)

    def weights(self) -> torch.Tensor:
        """Return the average of the maskable weights, float32, shape (n,)."""
        assert self._sum is not None and self._weights is not None
        total = float(sum(self._samples))
        own = self._weights.clamp(min=1) if self.by_mask else total
        return (self._sum / own).float()

    def rest(self) -> Tensors:
        """Return the average of what has no mask."""
        return average(self._rest, self._samples, torch.float64)

    def mean_counts(self) -> list[float]:
        """Return how many weights of each layer the clients' masks keep, on average."""
        return np.mean(np.array(self.counts, np.float64), axis=0).tolist()

    def overlap(self) -> float:
        """Return the Jaccard index of two masks, averaged over all pairs of clients.

        It is 1 for one client alone.
        """
        masks = list(self.masks.values())
        if all(mask is masks[0] for mask in masks):
            return 1.0
        packed = [np.packbits(mask) for mask in masks]
        kept = [sum(counts) for counts in self.counts]
        indices = []
        for i, one in enumerate(packed):
            for j, other in enumerate(packed[:i]):
                both = int(np.bitwise_count(one & other).sum(dtype=np.int64))
                either = kept[i] + kept[j] - both
                indices.append(both / either if either else 1.0)
        return float(np.mean(indices))


def scaled_down(counts: Sequence[float], total: int) -> list[int]:
    """Return counts of layers that add up to at most a total, rounded down.

    Each is multiplied by the same factor, at most 1. If all were 0 then, the largest is
    1, because a mask keeps something.
    """
    factor = min(1.0, total / max(1.0, sum(counts)))
    scaled = [int(count * factor) for count in counts]
    if not any(scaled):
        scaled[max(range(len(counts)), key=lambda layer: counts[layer])] = 1
    return scaled


def largest(layers: Layers, weights: torch.Tensor, counts: Sequence[int]) -> np.ndarray:
    """Return the mask of the largest weights of each layer, of equal ones the first.

    Parameters
    ----------
    layers : Layers
        The maskable weights.
    weights : torch.Tensor
        Shape (n,).
    counts : Sequence[int]
        How many weights of each layer it keeps.

    Returns
    -------
    numpy.ndarray
        bool, shape (n,).
    """
    mask = torch.zeros(layers.elements, dtype=torch.bool, device=layers.device)
    parts = zip(
        weights.split(layers.sizes), mask.split(layers.sizes), counts, strict=True
    )
    for part, own, count in parts:
        if count:
            own[topk.largest(part.abs().view(1, -1), count)] = True
    return mask.cpu().numpy()
