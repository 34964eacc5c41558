"""Scalar quantisers with a dead zone: applied, measured, and chosen for a target.

A quantiser is chosen in two steps. A sample of the tensor gives a dead zone and a first
step. Then the whole tensor is quantised, which gives the true error or size, and the
step is corrected until it meets the target.
"""

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np

from masksl.codec.coder import loops

T = TypeVar("T")

DEADZONES = (0.55, 0.7, 0.85, 1.0)
"""Widths of symbol 0 in steps among which one is chosen."""

_PRECISION = 5e-4  # of the logarithm of a step
_MOST = 709.0  # logarithm of about the largest float64
_TINY = 1e-300
_SAMPLE = 2**14  # elements that a first step is found by
_AIM, _LEAST = 0.995, 0.99  # shares of a target: what is aimed at, what is good enough
_SECANTS, _NEAR, _STRIDE = 8, 1e-3, 4.0  # of an estimate, in logarithms
_FLATTEST = 1e-3  # slope below which a secant says nothing
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
        Relative error of what is decoded, with all rounding.
    """

    symbols: np.ndarray
    counts: np.ndarray
    centroids: np.ndarray
    error: float

    def bits(self, signed: bool) -> float:
        """Return the entropy in bits an element, with signs and exact values."""
        share = self.counts / len(self.symbols)
        used = share[share > 0]
        signs = 1 - float(share[0]) if signed else 0.0
        exact = 32 * float(share[Quantizer.LAST :].sum())
        return float(-(used * np.log2(used)).sum()) + signs + exact


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

    def sample(self) -> "Elements":
        """Return about 2**14 of the elements, spread over the tensor."""
        stride = max(1, self.work.size // _SAMPLE)
        while math.gcd(stride, self.work.size) > 1:  # not the same column of every map
            stride += 1
        some = copy(self)
        some.work = np.ascontiguousarray(self.work[::stride])
        return some

    def quantized(self, quantizer: Quantizer) -> Quantized:
        """Return the elements under a quantiser."""
        kind = self.work.dtype.type
        symbols = np.empty(self.work.size, np.uint8)
        counts = np.zeros(1024, np.int64)
        sums, squares = np.zeros(1024), np.zeros(1024)
        limits = np.finfo(kind)
        step = min(max(quantizer.step, float(limits.tiny)), float(limits.max))
        numbers = kind(step), kind(1 - quantizer.deadzone), kind(Quantizer.LAST)
        middles = quantizer.middles
        loops().quantize(
            self.work, *numbers, np.tile(middles, 4), symbols, counts, sums, squares
        )
        tables = [each.reshape(4, 256).sum(0) for each in (counts, sums, squares)]
        size = int(np.flatnonzero(tables[0])[-1]) + 1
        return self._summed(symbols, middles, *(each[:size] for each in tables))

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

    Returns
    -------
    tuple[Quantized, T]
        The chosen one, and what ``finish`` returned for it.
    """
    middle = math.log(elements.largest or 1.0)
    bounds = middle - 12 * math.log(10), min(middle + math.log(4), _MOST)
    error = 0.25 if target.error is None else target.error
    sample, width = elements.sample(), None
    if target.step is not None:
        spread = float(np.std(elements.work, dtype=np.float64))
        width = target.step * (spread or elements.largest or 1.0)
    elif not elements.largest:
        width = 1.0  # any step does
    start = width or math.exp(bounds[1]) / 64
    deadzone = target.deadzone
    if deadzone is None:
        deadzone, start = best_deadzone(sample, width, error, start)
    zone = deadzone

    def quantized(step: float) -> Quantized:
        return elements.quantized(Quantizer(step, zone))

    if width is not None:
        chosen = quantized(width)
        return chosen, finish(chosen)[1]
    if target.bits is None:

        def measured_error(step: float) -> tuple[float, Quantized]:
            result = quantized(step)
            return result.error, result

        chosen = approach(measured_error, error, start, bounds, 1.0)
        return chosen, finish(chosen)[1]

    def measured_bits(step: float) -> tuple[float, tuple[Quantized, T]]:
        result = quantized(step)
        taken, encoded = finish(result)
        return taken, (result, encoded)

    def expected_bits(step: float) -> float:
        return sample.quantized(Quantizer(step, zone)).bits(sample.signed)

    start, slope = estimate(expected_bits, target.bits, start, -0.5)
    return approach(measured_bits, target.bits, start, bounds, slope)


def best_deadzone(
    sample: Elements, step: float | None, error: float, start: float
) -> tuple[float, float]:
    """Return the dead zone with the fewest bits at the same error, and its step.

    The error is ``error``, or that of ``step`` with the narrowest dead zone. The search
    begins at the step ``start``.
    """
    if step is not None:
        error = sample.quantized(Quantizer(step, DEADZONES[0])).error
    best = (math.inf, DEADZONES[0], start)
    for deadzone in DEADZONES:

        def measured(width: float, zone: float = deadzone) -> float:
            return sample.quantized(Quantizer(width, zone)).error

        start, _ = estimate(measured, error, start, 1.0)
        result = sample.quantized(Quantizer(start, deadzone))
        best = min(best, (result.bits(sample.signed), deadzone, start))
    return best[1:]


def estimate(
    measure: Callable[[float], float], target: float, start: float, slope: float
) -> tuple[float, float]:
    """Estimate the step at which a measure meets a target, by a few secants.

    Parameters
    ----------
    measure : Callable[[float], float]
        Measures a step, on a sample.
    target : float
        What is aimed at is a little less.
    start : float
        The first step, positive.
    slope : float
        A first slope of the measure by the step, of logarithms of both.

    Returns
    -------
    tuple[float, float]
        The step, of another measure where no step is near the target, and the slope.
    """
    aim, place, before = math.log(max(_AIM * target, _TINY)), math.log(start), None
    for _ in range(_SECANTS):
        level = math.log(max(measure(math.exp(place)), _TINY))
        if abs(level - aim) < _NEAR:
            break
        before, slope = (place, level), _secant(before, (place, level), slope)
        place += min(max((aim - level) / slope, -_STRIDE), _STRIDE)
    return math.exp(min(place, _MOST)), slope


def approach(
    measured: Callable[[float], tuple[float, T]],
    target: float,
    start: float,
    bounds: tuple[float, float],
    slope: float,
) -> T:
    """Find a step whose measure is from 99 to 100 % of a target.

    The secant through the last two measures gives the next step. Every third step
    halves the interval that is left.

    Parameters
    ----------
    measured : Callable[[float], tuple[float, T]]
        Returns the measure of a step, and what was computed for it.
    target : float
        Positive. It is never exceeded if one of the steps that are tried does not.
    start : float
        The first step.
    bounds : tuple[float, float]
        Logarithms of the least and the largest step.
    slope : float
        A first slope of the measure by the step, of logarithms of both. Its sign is
        that of all slopes.

    Returns
    -------
    T
        What was computed for the step with the largest measure that is not above the
        target.
    """
    safe, beyond = sure = bounds if slope > 0 else bounds[::-1]
    aim, place, tries = math.log(_AIM * target), math.log(max(start, _TINY)), 0
    before, best_value, best = None, -1.0, None
    while abs(beyond - safe) > _PRECISION:
        value, result = measured(math.exp(place))
        if value > target:
            beyond = place
        else:
            safe = place
            if value > best_value:
                best_value, best = value, result
            if value >= _LEAST * target:
                break
        point, tries = (place, math.log(max(value, _TINY))), tries + 1
        before, slope = point, _secant(before, point, slope)
        place += (aim - point[1]) / slope
        if tries % 3 == 0 or not min(safe, beyond) < place < max(safe, beyond):
            place = (safe + beyond) / 2
    if best is None:  # the safest step of all
        best = measured(math.exp(sure[0]))[1]
    return best


def _secant(
    before: tuple[float, float] | None, point: tuple[float, float], slope: float
) -> float:
    """Return the slope through two points, or the one given if they say nothing."""
    if before is None or before[0] == point[0]:
        return slope
    secant = (point[1] - before[1]) / (point[0] - before[0])
    usable = math.isfinite(secant) and _FLATTEST < abs(secant)
    return secant if usable and (secant > 0) == (slope > 0) else slope
