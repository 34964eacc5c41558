"""Scalar quantisers: what they do to a tensor, and which dead zone and step to take."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

_TRIES = 8  # at a budget
_CLOSE = 0.004  # relative, near enough to it
_BLOCK = 2**20  # elements that are worked on together, so that they stay in the cache


def to_symbols(
    magnitude: torch.Tensor, level: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return what a function makes of flat magnitudes, cut off to uint8.

    Parameters
    ----------
    magnitude : torch.Tensor
        Shape (d,).
    level : Callable[[torch.Tensor], torch.Tensor]
        Element by element; 0 to less than 256.
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

    By a number that is none, GPUs multiply with its reciprocal, which rounds otherwise.
    What is beyond the type becomes infinite.
    """
    exact = torch.full((), value, dtype=torch.float64, device=like.device)
    return exact.to(like.dtype)


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

    LAST: ClassVar[int] = 255  # symbol of what is sent exactly

    def symbols(self, magnitude: torch.Tensor) -> torch.Tensor:
        """Return the symbol of every magnitude, uint8."""

        def level(part: torch.Tensor) -> torch.Tensor:
            steps = part / number(self.step, part)
            return steps.add_(1 - self.deadzone).clamp_(max=self.LAST)

        return to_symbols(magnitude, level)

    @property
    def bounds(self) -> np.ndarray:
        """Least magnitude of every symbol but the first, float64, shape (255,)."""
        return self.step * (np.arange(self.LAST) + self.deadzone)


class Sample:
    """Some magnitudes of a tensor, to measure quantisers by.

    Parameters
    ----------
    magnitude : torch.Tensor
        Shape (d,), not negative.
    size : int
        About how many of them to take, spread over the tensor.
    signed : bool
        Whether what is quantised has signs.
    """

    def __init__(self, magnitude: torch.Tensor, size: int, signed: bool) -> None:
        stride = max(1, magnitude.numel() // size)
        while math.gcd(stride, magnitude.numel()) > 1:  # no column again and again
            stride += 1
        self._ascending = np.sort(magnitude[::stride].cpu().numpy()).astype(np.float64)
        self._unit = float(self._ascending[-1]) or 1.0
        self._ascending /= self._unit
        self._signed = signed
        sums = np.cumsum(self._ascending), np.cumsum(self._ascending**2)
        self._sums, self._squares = (np.concatenate([[0], each]) for each in sums)

    def _edges(self, quantizer: Quantizer) -> np.ndarray:
        """Return where symbols begin and end among the values, shape (257,)."""
        edges = np.searchsorted(self._ascending, quantizer.bounds / self._unit)
        return np.concatenate([[0], edges, [len(self._ascending)]])

    def error(self, quantizer: Quantizer) -> float:
        """Return the relative error of a quantiser with centroids."""
        edges = self._edges(quantizer)
        squares = np.diff(self._squares[edges])
        counts = np.maximum(np.diff(edges), 1)
        lost = squares - np.diff(self._sums[edges]) ** 2 / counts
        if self._signed:
            lost[0] = squares[0]
        lost[Quantizer.LAST] = 0
        total = squares.sum()
        return math.sqrt(max(lost.sum(), 0) / total) if total else 0.0

    def bits(self, quantizer: Quantizer) -> float:
        """Return the bits an element: entropy of the symbols, signs, exact values."""
        share = np.diff(self._edges(quantizer)) / len(self._ascending)
        used = share[share > 0]
        signs = 1 - float(share[0]) if self._signed else 0.0
        exact = 32 * float(share[Quantizer.LAST])
        return float(-(used * np.log2(used)).sum()) + signs + exact


@dataclass(frozen=True)
class Aim:
    """What steers a quantiser: one of a step, a budget and an error, and a dead zone.

    Parameters
    ----------
    step : float | None
        Width of a step in standard deviations of the tensor.
    bits : float | None
        Bits an element.
    error : float | None
        Relative error; 0.25 where none of the three is given.
    deadzone : float | None
        Width of symbol 0 in steps; None takes the best by a sample.
    """

    step: float | None
    bits: float | None
    error: float | None
    deadzone: float | None


def steer(
    work: torch.Tensor,
    magnitude: torch.Tensor,
    largest: float,
    aim: Aim,
    cost: Callable[[Quantizer], float],
) -> Quantizer:
    """Return the quantiser that an aim asks for.

    Parameters
    ----------
    work : torch.Tensor
        float32 or float64, shape (d,): what is quantised.
    magnitude : torch.Tensor
        Its magnitudes; the same tensor where it has no negative values.
    largest : float
        The largest of them.
    aim : Aim
        What is asked for.
    cost : Callable[[Quantizer], float]
        What a quantiser costs, in bits an element; asked where a budget steers.
    """
    largest = largest or 1.0
    least = torch.finfo(work.dtype).tiny
    bounds = math.log(largest * 1e-12), math.log(largest * 4)
    error = 0.25 if aim.error is None else aim.error
    sample = Sample(magnitude, 2**17, magnitude is not work)
    width = None
    if aim.step is not None:
        spread = work.std(correction=0).item() if work.numel() > 1 else 0.0
        width = aim.step * (spread or largest)
    deadzone = aim.deadzone
    if deadzone is None:
        deadzone = best_deadzone(sample, width, error, bounds)

    def at(step: float) -> Quantizer:
        return Quantizer(max(step, least), deadzone)

    if width is not None:
        return at(width)
    if aim.bits is not None:
        return meet_bits(aim.bits, at, sample, bounds, cost)
    return at(search(lambda step: sample.error(at(step)), error, bounds, True))


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
    for _ in range(16):
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
    """Return the quantiser that costs so many bits.

    The entropy of a sample, which is found quickly, tells the step; what it is off by
    is measured a few times.

    Parameters
    ----------
    target : float
        Bits an element.
    at : Callable[[float], Quantizer]
        The quantiser of a step.
    sample : Sample
        Some of the magnitudes.
    bounds : tuple[float, float]
        Logarithms of the least and the largest step.
    cost : Callable[[Quantizer], float]
        What a quantiser really costs, in bits an element.
    """
    aim, slope = math.log(target), 1.0
    found: list[tuple[float, float, Quantizer]] = []  # off by, aim
    for _ in range(_TRIES):
        step = search(lambda w: sample.bits(at(w)), math.exp(aim), bounds, False)
        off = math.log(cost(at(step)) / target)
        found.append((off, aim, at(step)))
        if abs(off) < _CLOSE:
            break
        if len(found) > 1 and found[-2][1] != aim:
            slope = (off - found[-2][0]) / (aim - found[-2][1])
        aim -= off / min(max(slope, 0.5), 4.0)
    return min(found, key=lambda each: abs(each[0]))[2]
