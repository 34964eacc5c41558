"""Scalar quantisers, and the choice of their step and dead zone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

_TRIES = 8  # quantisers that are tried to meet a budget
_CLOSE = 0.004  # relative tolerance of a budget
_PRECISION = 5e-4  # of the logarithm of a step
_MOST = 709.0  # logarithm of about the largest float64
_TINY = 1e-300
_BLOCK = 2**20  # elements of a block that fits the cache


def to_symbols(
    magnitude: torch.Tensor, level: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Apply a function to flat magnitudes and truncate the results to uint8.

    Parameters
    ----------
    magnitude : torch.Tensor
        Shape (d,).
    level : Callable[[torch.Tensor], torch.Tensor]
        Elementwise; its values are from 0 to less than 256.
    """
    if magnitude.device.type != "cpu":
        return level(magnitude).to(torch.uint8)
    symbols = torch.empty_like(magnitude, dtype=torch.uint8)
    parts = zip(magnitude.split(_BLOCK), symbols.split(_BLOCK), strict=True)
    for part, out in parts:
        out.copy_(level(part))
    return symbols


def number(value: float, like: torch.Tensor) -> torch.Tensor:
    """Return a number as a tensor to divide by, of the type and device of another.

    Dividing by a Python float lets CUDA multiply by the reciprocal, which rounds
    differently; dividing by a tensor does not. Values beyond the type become infinite.
    """
    exact = torch.full((), value, dtype=torch.float64, device=like.device)
    return exact.to(like.dtype)


def occurrences(symbols: np.ndarray) -> np.ndarray:
    """Return the number of occurrences of every symbol, int64, shape (256,)."""
    return torch.bincount(torch.from_numpy(symbols), minlength=256).numpy()


def sums_by(symbols: np.ndarray, magnitude: torch.Tensor, alphabet: int) -> np.ndarray:
    """Return the sum of the magnitudes of every symbol, float64, shape (alphabet,)."""
    sums = torch.zeros(alphabet, dtype=torch.float64)
    keys = torch.from_numpy(symbols)
    for key, part in zip(keys.split(_BLOCK), magnitude.split(_BLOCK), strict=True):
        sums += torch.bincount(key, part.cpu().double(), minlength=alphabet)
    return sums.numpy()


def nearest(work: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest of ascending levels, uint8, for each element.

    Parameters
    ----------
    work : torch.Tensor
        float32 or float64, shape (d,).
    levels : torch.Tensor
        float64, at most 256, on the device of ``work``.
    """
    middles = (levels[1:] / 2 + levels[:-1] / 2).to(work)
    return torch.bucketize(work, middles, out_int32=True).to(torch.uint8)


@dataclass(frozen=True)
class Quantizer:
    """Steps of one width behind a dead zone."""

    step: float
    deadzone: float

    LAST: ClassVar[int] = 255  # symbol of elements that are sent exactly

    def symbols(self, magnitude: torch.Tensor) -> torch.Tensor:
        """Return the symbol of every magnitude, uint8."""

        def level(part: torch.Tensor) -> torch.Tensor:
            steps = part / number(self.step, part)
            return steps.add_(1 - self.deadzone).clamp_(max=self.LAST)

        return to_symbols(magnitude, level)

    @property
    def bounds(self) -> np.ndarray:
        """Least magnitude of every symbol but the first, float64, shape (255,)."""
        with np.errstate(over="ignore"):  # infinite where no magnitude is
            return self.step * (np.arange(self.LAST) + self.deadzone)


class Sample:
    """A sample of the magnitudes of a tensor, to measure quantisers by.

    Parameters
    ----------
    magnitude : torch.Tensor
        Shape (d,), not negative.
    size : int
        Approximate size of the sample, spread over the tensor.
    signed : bool
        Whether the tensor has signs.
    """

    def __init__(self, magnitude: torch.Tensor, size: int, signed: bool) -> None:
        stride = max(1, magnitude.numel() // size)
        while (
            math.gcd(stride, magnitude.numel()) > 1
        ):  # otherwise it would sample the same columns
            stride += 1
        ascending = np.sort(magnitude[::stride].cpu().numpy())
        self._size = len(ascending)
        self._zeros = int(np.searchsorted(ascending, 0, "right"))
        ascending = ascending[self._zeros :]
        self._unit = float(ascending[-1]) if len(ascending) else 1.0
        self._ascending = ascending / ascending.dtype.type(self._unit)
        self._signed = signed
        self._sums, self._squares = (
            np.concatenate([[0], np.cumsum(each, dtype=np.float64)])
            for each in (self._ascending, np.square(self._ascending, dtype=np.float64))
        )

    def _edges(self, quantizer: Quantizer) -> np.ndarray:
        """Return where symbols begin and end among the values, shape (257,).

        Values that are zero are left out of them.
        """
        bounds = (quantizer.bounds / self._unit).clip(max=2)  # the largest value is 1
        bounds = bounds.astype(self._ascending.dtype)
        edges = np.searchsorted(self._ascending, bounds)
        return np.concatenate([[0], edges, [len(self._ascending)]])

    def _counts(self, edges: np.ndarray) -> np.ndarray:
        """Return the number of values of every symbol, shape (256,)."""
        counts = np.diff(edges)
        counts[0] += self._zeros
        return counts

    def error(self, quantizer: Quantizer) -> float:
        """Return the relative error of a quantiser with centroids."""
        edges = self._edges(quantizer)
        squares = np.diff(self._squares[edges])
        counts = np.maximum(self._counts(edges), 1)
        lost = squares - np.diff(self._sums[edges]) ** 2 / counts
        if self._signed:
            lost[0] = squares[0]
        lost[Quantizer.LAST] = 0
        total = squares.sum()
        return math.sqrt(max(lost.sum(), 0) / total) if total else 0.0

    def bits(self, quantizer: Quantizer) -> float:
        """Return the bits an element: entropy of the symbols, signs, exact values."""
        share = self._counts(self._edges(quantizer)) / self._size
        used = share[share > 0]
        signs = 1 - float(share[0]) if self._signed else 0.0
        exact = 32 * float(share[Quantizer.LAST])
        return float(-(used * np.log2(used)).sum()) + signs + exact


@dataclass(frozen=True)
class Target:
    """Target of a quantiser: one of a step, a budget and an error, and a dead zone.

    Parameters
    ----------
    step : float | None
        Width of a step in standard deviations of the tensor.
    bits : float | None
        Bits an element.
    error : float | None
        Relative error; 0.25 if none of the three is given.
    deadzone : float | None
        Width of symbol 0 in steps; None chooses the best on a sample.
    """

    step: float | None
    bits: float | None
    error: float | None
    deadzone: float | None


def choose_quantizer(
    work: torch.Tensor,
    magnitude: torch.Tensor,
    largest: float,
    target: Target,
    cost: Callable[[Quantizer], float],
) -> Quantizer:
    """Choose the quantiser that meets a target.

    Parameters
    ----------
    work : torch.Tensor
        float32 or float64, shape (d,): the elements.
    magnitude : torch.Tensor
        Their magnitudes; the same tensor if there are no negative values.
    largest : float
        The largest magnitude.
    target : Target
        What the quantiser must meet.
    cost : Callable[[Quantizer], float]
        Returns the cost of a quantiser in bits an element; called for a budget.
    """
    largest = largest or 1.0
    least = torch.finfo(work.dtype).tiny
    middle = math.log(largest)
    bounds = middle - 12 * math.log(10), min(middle + math.log(4), _MOST)
    error = 0.25 if target.error is None else target.error
    sample = Sample(magnitude, 2**17, magnitude is not work)
    width = None
    if target.step is not None:
        spread = work.std(correction=0).item() if work.numel() > 1 else 0.0
        width = target.step * (spread or largest)
    deadzone = target.deadzone
    if deadzone is None:
        deadzone, found = best_deadzone(sample, width, error, bounds)
        if width is None and target.bits is None:
            width = found

    def at(step: float) -> Quantizer:
        return Quantizer(max(step, least), deadzone)

    if width is not None:
        return at(width)
    if target.bits is not None:
        return meet_bits(target.bits, at, sample, bounds, cost)
    return at(search(lambda step: sample.error(at(step)), error, bounds, True))


def best_deadzone(
    sample: Sample, step: float | None, target: float, bounds: tuple[float, float]
) -> tuple[float, float]:
    """Return the dead zone with the fewest bits at the same error, and its step.

    The error is ``target``, or that of the step with the narrowest dead zone.
    """
    if step is not None:
        target = sample.error(Quantizer(step, 0.55))
    best = (math.inf, 0.55, 1.0)
    for deadzone in (0.55, 0.7, 0.85, 1.0):

        def error(width: float, zone: float = deadzone) -> float:
            return sample.error(Quantizer(width, zone))

        width = search(error, target, bounds, True)
        # The steps of other dead zones are less than four times as wide or narrow.
        near = math.log(max(width, _TINY))
        bounds = near - math.log(4), min(near + math.log(4), _MOST)
        best = min(best, (sample.bits(Quantizer(width, deadzone)), deadzone, width))
    return best[1:]


def search(
    measure: Callable[[float], float],
    target: float,
    bounds: tuple[float, float],
    rising: bool,
) -> float:
    """Find the step at which a monotone function meets a target, by bisection.

    ``bounds`` are logarithms of the step; it is found within 0.05 %.
    """
    low, high = bounds
    while high - low > _PRECISION:
        middle = (low + high) / 2
        if (measure(math.exp(middle)) > target) == rising:
            high = middle
        else:
            low = middle
    return math.exp(low if rising else high)


def meet_bits(
    target: float,
    at: Callable[[float], Quantizer],
    sample: Sample,
    bounds: tuple[float, float],
    cost: Callable[[Quantizer], float],
) -> Quantizer:
    """Return the quantiser that meets a budget.

    The entropy of a sample, which is fast to compute, gives a step. The deviation from
    the budget is measured a few times, and corrected.

    Parameters
    ----------
    target : float
        Bits an element.
    at : Callable[[float], Quantizer]
        The quantiser of a step.
    sample : Sample
        A sample of the magnitudes.
    bounds : tuple[float, float]
        Logarithms of the least and the largest step.
    cost : Callable[[Quantizer], float]
        Returns the true cost of a quantiser in bits an element.
    """
    aim, slope = math.log(target), 1.0
    tried: list[tuple[float, float, Quantizer]] = []  # deviation, aim
    for _ in range(_TRIES):
        step = search(lambda w: sample.bits(at(w)), math.exp(aim), bounds, False)
        off = math.log(cost(at(step)) / target)
        tried.append((off, aim, at(step)))
        if abs(off) < _CLOSE:
            break
        if len(tried) > 1 and tried[-2][1] != aim:
            slope = (off - tried[-2][0]) / (aim - tried[-2][1])
        aim -= off / min(max(slope, 0.5), 4.0)
    return min(tried, key=lambda each: abs(each[0]))[2]
