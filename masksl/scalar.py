"""Scalar quantisers: what they do to a tensor, and which dead zone and step to take."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch


def nearest(work: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest of ascending levels, uint8, for each element.

    Parameters
    ----------
    work : torch.Tensor
        float32 or float64, shape (d,).
    levels : torch.Tensor
        float64, at most 256, on the CPU.
    """
    middles = (levels[1:] / 2 + levels[:-1] / 2).to(work)
    return torch.bucketize(work, middles, out_int32=True).to(torch.uint8)


@dataclass(frozen=True)
class Quantizer:
    """Steps of one width behind a dead zone."""

    step: float
    deadzone: float

    LAST: ClassVar[int] = 255  # symbol of what is sent exactly

    def symbols(self, magnitude: torch.Tensor) -> torch.Tensor:
        """Return the symbol of every magnitude, uint8."""
        level = (magnitude / self.step).add_(1 - self.deadzone)
        return level.clamp_(max=self.LAST).to(torch.uint8)


@dataclass(frozen=True)
class Sample:
    """Some magnitudes of a tensor, to measure quantisers by."""

    values: torch.Tensor  # float64, on the CPU, the largest is 1
    unit: float  # what they were divided by
    signed: bool

    @classmethod
    def of(cls, magnitude: torch.Tensor, size: int, signed: bool) -> "Sample":
        """Take about so many elements, spread over the tensor."""
        stride = max(1, magnitude.numel() // size)
        while math.gcd(stride, magnitude.numel()) > 1:  # no column again and again
            stride += 1
        values = magnitude[::stride].double().cpu()
        unit = values.amax().item() or 1.0
        return cls(values / unit, unit, signed)

    def first(self, size: int) -> "Sample":
        """Return a smaller sample."""
        stride = max(1, self.values.numel() // size)
        return Sample(self.values[::stride].contiguous(), self.unit, self.signed)

    def symbols(self, quantizer: Quantizer) -> np.ndarray:
        """Return the symbols of the sample."""
        scaled = Quantizer(quantizer.step / self.unit, quantizer.deadzone)
        return scaled.symbols(self.values).numpy()

    def error(self, quantizer: Quantizer) -> float:
        """Return the relative error of a quantiser with centroids."""
        plane = self.symbols(quantizer)
        values = self.values.numpy()
        counts = np.bincount(plane, minlength=256)
        sums = np.bincount(plane, values, minlength=256)
        squares = np.bincount(plane, values**2, minlength=256)
        lost = squares - sums**2 / np.maximum(counts, 1)
        if self.signed:
            lost[0] = squares[0]
        total, lost[Quantizer.LAST] = squares.sum(), 0
        return math.sqrt(max(lost.sum(), 0) / total) if total else 0.0

    def bits(self, quantizer: Quantizer) -> float:
        """Return the bits an element: entropy of the symbols, and signs."""
        counts = np.bincount(self.symbols(quantizer))
        share = counts[counts > 0] / counts.sum()
        signs = 1 - counts[0] / counts.sum() if self.signed else 0.0
        return float(-(share * np.log2(share)).sum()) + signs


def best_deadzone(
    sample: Sample, step: float | None, target: float, bounds: tuple[float, float]
) -> float:
    """Return the dead zone that needs the fewest bits for the same error.

    The error is ``target``, or what a step with the narrowest dead zone gives.
    """
    if step is not None:
        target = sample.error(Quantizer(step, 0.55))
    best = (math.inf, 0.55)
    for deadzone in (0.55, 0.7, 0.85, 1.0):

        def error(width: float, zone: float = deadzone) -> float:
            return sample.error(Quantizer(width, zone))

        width = search(error, target, bounds, True)
        best = min(best, (sample.bits(Quantizer(width, deadzone)), deadzone))
    return best[1]


def search(
    measure: Callable[[float], float],
    target: float,
    bounds: tuple[float, float],
    rising: bool,
) -> float:
    """Return where a monotone function of a step meets a target, by bisection.

    ``bounds`` are logarithms of the step.
    """
    low, high = bounds
    for _ in range(14):
        middle = (low + high) / 2
        if (measure(math.exp(middle)) > target) == rising:
            high = middle
        else:
            low = middle
    return math.exp(low if rising else high)


def some_samples(
    magnitude: torch.Tensor, shape: tuple[int, ...], size: int
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return samples spread over the batch, about ``size`` elements, and their shape.

    What is no batch of maps comes back whole.
    """
    if len(shape) < 4:
        return magnitude, shape
    rows = shape[0]
    some = max(1, min(rows, rows * size // magnitude.numel()))
    spread = torch.arange(some, device=magnitude.device) * rows // some
    return magnitude.view(rows, -1)[spread].view(-1), (some, *shape[1:])
