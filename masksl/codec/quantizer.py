"""Scalar quantisers with a dead zone: applied, measured, and chosen for a target.

A quantiser is chosen in two steps. A sample of the tensor gives a dead zone and a first
step. Then the whole tensor is quantised, which gives the true error or size, and the
step is corrected until it meets the target.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np

from masksl.codec.coder import loops
from masksl.codec.search import AIM, TINY, approach, search

T = TypeVar("T")

DEFAULT_ERROR = 0.25  # relative error, where nothing else is asked for

_MOST = 709.0  # logarithm of about the largest float64
_SAMPLE = 2**17  # elements that a first step is found by
_COMFORT = 60  # binary exponents of largest elements that are computed with as they are


@dataclass(frozen=True)
class Quantizer:
    """Steps of one width behind a dead zone."""

    step: float
    deadzone: float

    LAST: ClassVar[int] = 255  # symbol of elements that are sent exactly

    @property
    def bounds(self) -> np.ndarray:
        """Least magnitude of every symbol but the first, float64, shape (255,)."""
        with np.errstate(over="ignore"):  # infinite where no magnitude is
            return self.step * (np.arange(self.LAST) + self.deadzone)

    @property
    def middles(self) -> np.ndarray:
        """Middle of every symbol's magnitudes, float64, shape (256,).

        It is 0 for the first and for the last.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            middles = self.step * (np.arange(256) + (self.deadzone - 0.5))
        middles[0] = middles[self.LAST] = 0
        return middles


@dataclass(frozen=True)
class Quantized:
    """The elements of a tensor under a quantiser.

    Parameters
    ----------
    symbols : numpy.ndarray
        uint8, shape (d,).
    counts : numpy.ndarray
        int64, shape (n,): occurrences of each symbol, up to the last that occurs.
    centroids : numpy.ndarray
        Magnitudes that symbols are decoded as, of the type of the computation, shape
        (n,). Those of the last symbol, and of the first of a signed tensor, are 0.
    error : float
        Relative error of what is decoded, with all rounding; NaN if it was not asked
        for.
    """

    symbols: np.ndarray
    counts: np.ndarray
    centroids: np.ndarray
    error: float = math.nan


class Elements:
    """The elements of a tensor, to be quantised.

    Parameters
    ----------
    work : numpy.ndarray
        float32 or float64, shape (d,), contiguous, finite.
    signed : bool
        Whether some are negative.
    largest : float
        The largest magnitude.
    rounded : Callable[[numpy.ndarray], numpy.ndarray]
        Rounds float64 magnitudes to the type of the tensor, and returns float64.
    """

    def __init__(
        self,
        work: np.ndarray,
        signed: bool,
        largest: float,
        rounded: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        # Near the ends of the type's range, steps and squares would leave it. A power
        # of two changes no digit.
        exponent = math.frexp(largest)[1]
        self._exponent = exponent if abs(exponent) > _COMFORT else 0
        if self._exponent:
            work = np.ldexp(work, -self._exponent)
        self.work, self.signed, self._rounded = work, signed, rounded
        self.largest = math.ldexp(largest, -self._exponent)

    def quantized(self, quantizer: Quantizer) -> Quantized:
        """Return the elements under a quantiser."""
        kind = self.work.dtype.type
        symbols = np.empty(self.work.size, np.uint8)
        counts = np.zeros(1024, np.int64)
        sums, squares = np.zeros(1024), np.zeros(1024)
        step = max(quantizer.step, float(np.finfo(kind).tiny))
        numbers = kind(step), kind(1 - quantizer.deadzone), kind(Quantizer.LAST)
        middles = quantizer.middles
        loops().quantize(
            self.work, *numbers, np.tile(middles, 4), symbols, counts, sums, squares
        )
        tables = [each.reshape(4, 256).sum(0) for each in (counts, sums, squares)]
        size = int(np.flatnonzero(tables[0])[-1]) + 1
        return self._summed(symbols, middles, *(each[:size] for each in tables))

    def rounded_at_random(
        self, step: float, most: float, maps: tuple[int, int, int], drawn: np.ndarray
    ) -> Quantized:
        """Return the elements rounded to multiples of a step without bias.

        `masksl.codec.kernels.round_at_random` describes how. An element that could
        become more than the last symbol but one, or more than the tensor's type holds,
        is sent exactly.

        Parameters
        ----------
        step : float
            Width of a step in standard deviations of the elements.
        most : float
            The largest number of the type of the tensor.
        maps : tuple[int, int, int]
            Number of maps, their height and their width.
        drawn : numpy.ndarray
            float64, shape (maps,): a number from 0 to less than 1 for each map.
        """
        width = step * self.spread
        highest = float(np.ldexp(most, -self._exponent)) / width
        highest = math.floor(min(highest, Quantizer.LAST - 1))
        symbols = np.empty(self.work.size, np.uint8)
        loops().round_at_random(self.work, maps, width, float(highest), drawn, symbols)
        counts = np.bincount(symbols)
        multiples = np.where(
            np.arange(len(counts)) <= highest, np.arange(len(counts)), 0
        )
        centroids = np.ldexp(width * multiples, self._exponent)
        return Quantized(symbols, counts, centroids.astype(self.work.dtype))

    @property
    def spread(self) -> float:
        """Their standard deviation, else the largest magnitude, else 1."""
        deviation = float(np.std(self.work, dtype=np.float64))
        return deviation or self.largest or 1.0

    def _summed(
        self,
        symbols: np.ndarray,
        middles: np.ndarray,
        counts: np.ndarray,
        sums: np.ndarray,
        squares: np.ndarray,
    ) -> Quantized:
        """Return the result by the sums of each symbol.

        ``sums`` and ``squares`` are of the elements' distances from the middles. So
        they have all digits, however small the error is.
        """
        middles = middles[: len(counts)]
        energy = squares + 2 * middles * sums + counts * middles**2
        away = sums / np.maximum(counts, 1)
        exact = np.ldexp(middles + away, self._exponent)
        if self.signed:
            exact[0] = 0
        exact[Quantizer.LAST :] = 0
        most = np.finfo(self.work.dtype).max
        centroids = np.minimum(exact, most).astype(self.work.dtype)
        away = np.ldexp(self._rounded(centroids.astype(float)), -self._exponent)
        away -= middles
        lost = squares - 2 * away * sums + counts * away**2
        lost[Quantizer.LAST :] = 0
        total = energy.sum()
        error = math.sqrt(max(lost.sum(), 0) / total) if total else 0.0
        return Quantized(symbols, counts, centroids, error)


class Sample:
    """A sample of the magnitudes of a tensor, to measure quantisers by.

    Parameters
    ----------
    elements : Elements
        The elements; about 2**17 of them, spread over the tensor, are taken.
    """

    def __init__(self, elements: Elements) -> None:
        work = elements.work
        stride = max(1, work.size // _SAMPLE)
        while math.gcd(stride, work.size) > 1:  # not the same column of every map
            stride += 1
        ascending = np.sort(np.abs(work[::stride]))
        self._size = len(ascending)
        self._zeros = int(np.searchsorted(ascending, 0, "right"))
        self._ascending = ascending[self._zeros :]
        self._signed = elements.signed
        self._sums, self._squares = (
            np.concatenate([[0], np.cumsum(each, dtype=np.float64)])
            for each in (self._ascending, np.square(self._ascending, dtype=np.float64))
        )

    def _edges(self, quantizer: Quantizer) -> np.ndarray:
        """Return where symbols begin and end among the values, shape (257,).

        Values that are zero are left out of them.
        """
        bounds = quantizer.bounds.clip(max=float(np.finfo(self._ascending.dtype).max))
        edges = np.searchsorted(self._ascending, bounds.astype(self._ascending.dtype))
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


def choose(
    elements: Elements,
    target: Target,
    finish: Callable[[Quantized], tuple[float, T]],
    error_of: Callable[[Quantized], float] | None = None,
) -> tuple[Quantized, T]:
    """Quantise elements so that they meet a target.

    Parameters
    ----------
    elements : Elements
        The elements.
    target : Target
        What must be met. A budget and an error are never exceeded if any step of the
        quantiser allows it, and used to 99 % if one does.
    finish : Callable[[Quantized], tuple[float, T]]
        Encodes symbols; returns the bits an element, and what was encoded.
    error_of : Callable[[Quantized], float] | None
        Returns the error that must meet the target; None takes that of the elements.

    Returns
    -------
    tuple[Quantized, T]
        The chosen one, and what ``finish`` returned for it.
    """
    middle = math.log(elements.largest or 1.0)
    bounds = middle - 12 * math.log(10), min(middle + math.log(4), _MOST)
    error = DEFAULT_ERROR if target.error is None else target.error
    sample, width = Sample(elements), None
    if target.step is not None:
        width = target.step * elements.spread
    elif not elements.largest:
        width = 1.0  # any step does
    deadzone, found = target.deadzone, None
    if deadzone is None:
        deadzone, found = best_deadzone(sample, width, AIM * error, bounds)
    zone = deadzone

    def at(step: float) -> Quantizer:
        return Quantizer(step, zone)

    if width is not None:
        quantized = elements.quantized(at(width))
        return quantized, finish(quantized)[1]
    if target.bits is not None:
        return _meet_bits(target.bits, elements, sample, at, bounds, finish)

    def measured(step: float) -> tuple[float, Quantized]:
        quantized = elements.quantized(at(step))
        own = quantized.error if error_of is None else error_of(quantized)
        return own, quantized

    def expected(step: float) -> float:
        return sample.error(at(step))

    start = found or search(expected, AIM * error, bounds, True)
    quantized = approach(measured, expected, error, start, bounds, True)
    return quantized, finish(quantized)[1]


def _meet_bits(
    bits: float,
    elements: Elements,
    sample: Sample,
    at: Callable[[float], Quantizer],
    bounds: tuple[float, float],
    finish: Callable[[Quantized], tuple[float, T]],
) -> tuple[Quantized, T]:
    """Quantise elements within a budget, see `choose`."""

    def measured(step: float) -> tuple[float, tuple[Quantized, T]]:
        quantized = elements.quantized(at(step))
        taken, encoded = finish(quantized)
        return taken, (quantized, encoded)

    def expected(step: float) -> float:
        return sample.bits(at(step))

    start = search(expected, AIM * bits, bounds, False)
    return approach(measured, expected, bits, start, bounds, False)


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
        near = math.log(max(width, TINY))
        bounds = near - math.log(4), min(near + math.log(4), _MOST)
        best = min(best, (sample.bits(Quantizer(width, deadzone)), deadzone, width))
    return best[1:]
