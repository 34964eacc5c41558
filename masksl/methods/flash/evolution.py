"""Prune and regrow: how a mask changes while a client trains."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from masksl.codec import philox, topk
from masksl.methods.flash.layers import Layers
from masksl.training.tensors import Tensors

_MOST_SPREADS = 1000  # of growth for which layers have no room
_MOST_GROWN = 0.99  # share of the inactive weights of a layer that may become active
_FEW = 0.2  # share of inactive weights below which a layer is not cut by more than it


class Change(NamedTuple):
    """One adjustment of a mask.

    Parameters
    ----------
    cut : numpy.ndarray
        bool: of the active weights, in order, those that are cut.
    grown : list[int]
        How many inactive weights of each layer become active then.
    """

    cut: np.ndarray
    grown: list[int]


@dataclass(frozen=True)
class Growth:
    """Draws which weights become active, at client and server alike.

    Parameters
    ----------
    layers : Layers
        The maskable weights.
    seed : Callable[[int], int]
        Seed of an adjustment, by its number within a participation, from 0 on.
    """

    layers: Layers
    seed: Callable[[int], int]

    def apply(self, mask: np.ndarray, change: Change, number: int) -> None:
        """Adjust a mask, bool, shape (n,), in place.

        Every inactive weight of a layer, those that were just cut among them, becomes
        active with the same probability. Layer l draws with the stream l of
        `philox.sample`.
        """
        mask[np.flatnonzero(mask)[change.cut]] = False
        seed = self.seed(number)
        for layer, part in enumerate(self.layers.parts(mask)):
            if change.grown[layer]:
                inactive = np.flatnonzero(~part)
                drawn = philox.sample(seed, layer, change.grown[layer], len(inactive))
                part[inactive[drawn]] = True

    def repeat(self, mask: np.ndarray, changes: Sequence[Change]) -> np.ndarray:
        """Return a mask after some adjustments."""
        mask = mask.copy()
        for number, change in enumerate(changes):
            self.apply(mask, change, number)
        return mask


@dataclass(frozen=True)
class Plan:
    """When a mask is adjusted in the training of one client, and how much is cut.

    Parameters
    ----------
    batches : int
        Mini-batches of a pass, B.
    epochs : int
        Passes.
    rate : float
        Share that would be cut at the start; it falls to 0 at the end.
    """

    batches: int
    epochs: int
    rate: float

    def rate_after(self, step: int) -> float:
        """Return the share that is cut after a step, from 0 on; 0 without adjustment.

        One pass has one adjustment, after the mini-batch floor(B / 2), counted from 0.
        Several have one after each pass but the last.
        """
        done, all_ = step + 1, self.batches * self.epochs
        if self.epochs == 1:
            due = step == self.batches // 2
        else:
            due = done % self.batches == 0 and done < all_
        return self.rate * (1 - done / all_) if due else 0.0


@dataclass
class Evolution:
    """A mask that is adjusted while weights are trained under it.

    Parameters
    ----------
    mask : torch.Tensor
        bool, shape (n,), on the device of the weights; changed in place.
    target : int
        How many weights it should keep.
    growth : Growth
        Draws which weights become active.

    Attributes
    ----------
    changes : list[Change]
        The adjustments so far.
    """

    mask: torch.Tensor
    target: int
    growth: Growth
    changes: list[Change] = field(default_factory=list)
    _correction: float = 0.0
    _errors: list[int] = field(default_factory=list)

    def adjust(self, weights: Mapping[str, torch.Tensor], rate: float) -> None:
        """Cut the smallest weights of each layer, then make others active, at value 0.

        As many become active as are cut, more of them in layers of large weights.

        Parameters
        ----------
        weights : Mapping[str, torch.Tensor]
            The weights by name, contiguous; those that are cut become 0 in place.
        rate : float
            Share of the active weights of a layer that is cut.
        """
        layers = self.growth.layers
        flats = [weights[name].detach().view(-1) for name in layers.shapes]
        masks = self.mask.split(layers.sizes)
        values = [topk.masked(*pair).abs() for pair in zip(flats, masks, strict=True)]
        active = [len(own) for own in values]
        shares = _shares(values)
        cut = [
            math.ceil(_rate(rate, share, 1 - kept / size, len(shares)) * kept)
            for share, kept, size in zip(shares, active, layers.sizes, strict=True)
        ]
        room = [
            size - kept + own
            for size, kept, own in zip(layers.sizes, active, cut, strict=True)
        ]
        grown = spread(shares, max(0.0, sum(cut) + self._correction), room)
        smallest = [_smallest(own, k) for own, k in zip(values, cut, strict=True)]
        for flat, mask, flags in zip(flats, masks, smallest, strict=True):
            flat[topk.positions(mask)[flags]] = 0.0
        change = Change(torch.cat(smallest).cpu().numpy(), grown)
        adjusted = self.mask.cpu().numpy().copy()
        self.growth.apply(adjusted, change, len(self.changes))
        self.mask.copy_(torch.from_numpy(adjusted))
        self.changes.append(change)
        self._remember(self.target - sum(active) + sum(cut) - sum(grown))

    def _remember(self, error: int) -> None:
        """Correct the next growth by how far the mask is from its target."""
        self._errors.append(error)
        mean = sum(self._errors) / len(self._errors)
        self._correction = 0.25 * self._correction + 0.75 * error + mean


@dataclass
class UnderMask:
    """Keeps weights under a mask while they are trained.

    Parameters
    ----------
    tensors : dict[str, torch.Tensor]
        Parameters and buffers by name; weights are masked in place.
    evolution : Evolution
        The mask.
    plan : Plan
        When it changes.
    """

    tensors: Tensors
    evolution: Evolution
    plan: Plan
    _factors: Tensors = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Prepare the factors of the weights."""
        self._renew()

    def after(self, step: int) -> None:
        """Mask the weights after a step, and adjust the mask where it is due."""
        with torch.no_grad():
            for name, factor in self._factors.items():
                self.tensors[name].mul_(factor)
            if rate := self.plan.rate_after(step):
                self.evolution.adjust(self.tensors, rate)
                self._renew()

    def _renew(self) -> None:
        mask, layers = self.evolution.mask, self.evolution.growth.layers
        self._factors = {} if mask.all() else layers.named(mask.float())


def spread(shares: Sequence[float], budget: float, room: Sequence[int]) -> list[int]:
    """Divide growth among layers.

    A layer grows by at most 99 % of its room. What is beyond is spread evenly over all
    layers, again and again.

    Parameters
    ----------
    shares : Sequence[float]
        Share of each layer; their sum is 1.
    budget : float
        How many weights become active, before rounding up.
    room : Sequence[int]
        Inactive weights of each layer.

    Returns
    -------
    list[int]
        How many weights of each layer become active.
    """
    most = [_MOST_GROWN * own for own in room]
    wanted = [float(math.ceil(share * budget)) for share in shares]
    for _ in range(_MOST_SPREADS):
        clipped = [min(pair) for pair in zip(wanted, most, strict=True)]
        over = sum(wanted) - sum(clipped)
        wanted = clipped
        if over < 1e-6:
            break
        wanted = [own + over / len(wanted) for own in wanted]
    return [math.floor(min(pair)) for pair in zip(wanted, most, strict=True)]


def _shares(magnitudes: Sequence[torch.Tensor]) -> list[float]:
    """Return the mean magnitude of each layer, over the sum of these."""
    means = [
        float(own.mean(dtype=torch.float64)) if len(own) else 0.0 for own in magnitudes
    ]
    total = sum(means)
    return [mean / total if total else 1 / len(means) for mean in means]


def _rate(rate: float, share: float, inactive: float, layers: int) -> float:
    """Return the share of a layer that is cut; less where few weights are inactive."""
    if inactive < _FEW and share > 1 / layers:
        return min(rate, inactive)
    return rate


def _smallest(magnitudes: torch.Tensor, count: int) -> torch.Tensor:
    """Return a bool vector that is true for the smallest magnitudes, ties to the
    end."""
    flags = torch.ones(len(magnitudes), dtype=torch.bool, device=magnitudes.device)
    if count < len(magnitudes):
        flags[topk.largest(magnitudes.view(1, -1), len(magnitudes) - count)] = False
    return flags
