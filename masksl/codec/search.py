"""Steps at which a monotone function meets a target."""

import math
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

AIM = 0.995  # share of a target that is aimed at
TINY = 1e-300  # least number that a logarithm is taken of

_LEAST = 0.99  # share of a target that is good enough
_PRECISION = 5e-4  # of the logarithm of a step
_SECANTS = 8  # of a search, before it halves
_FLAT = 1e-3  # slope below which a secant says nothing


def search(
    measure: Callable[[float], float],
    target: float,
    bounds: tuple[float, float],
    rising: bool,
) -> float:
    """Find the step at which a monotone function meets a target.

    It ends within 0.05 % of the target, or where the interval that is left is as
    narrow. A secant through both ends of it gives the next step; while only one end is
    known, a measure proportional to the step (or to its inverse) does. An end that
    stays twice counts half (the Illinois rule). After some steps the interval is
    halved.

    Parameters
    ----------
    measure : Callable[[float], float]
        The function of the step.
    target : float
        Not negative.
    bounds : tuple[float, float]
        Logarithms of the least and the largest step.
    rising : bool
        Whether the measure rises with the step.
    """
    low, high = bounds
    below = above = math.nan  # logarithms of measure over target, at both ends
    place, before, tries = (low + high) / 2, 0.0, 0
    while high - low > _PRECISION:
        level = math.log(max(measure(math.exp(place)), TINY) / max(target, TINY))
        level = level if rising else -level
        if 0 < abs(level) <= _PRECISION:  # equal ones may go on beyond, as errors of 0
            return math.exp(place)
        again = level * before > 0
        if level > 0:
            high, above, below = place, level, below / 2 if again else below
        else:
            low, below, above = place, level, above / 2 if again else above
        before, tries = level, tries + 1
        if math.isnan(below + above):
            place -= level
        else:
            place = (low * above - high * below) / (above - below)
        if tries > _SECANTS or not low < place < high:
            place = (low + high) / 2
    return math.exp(low if rising else high)


def approach(
    measured: Callable[[float], tuple[float, T]],
    expected: Callable[[float], float],
    target: float,
    start: float,
    bounds: tuple[float, float],
    rising: bool,
) -> T:
    """Find a step whose measure is from 99 to 100 % of a target.

    The secant through the last two measures, or at first the slope of ``expected``,
    gives the next step. Every third step halves the interval that is left.

    Parameters
    ----------
    measured : Callable[[float], tuple[float, T]]
        Returns the measure of a step, and what was computed for it.
    expected : Callable[[float], float]
        Approximates the measure.
    target : float
        Positive. It is never exceeded if one of the steps that are tried does not.
    start : float
        The first step.
    bounds : tuple[float, float]
        Logarithms of the least and the largest step.
    rising : bool
        Whether the measure rises with the step.

    Returns
    -------
    T
        What was computed for the step with the largest measure that is not above the
        target.
    """
    safe, beyond = bounds if rising else bounds[::-1]
    place, slope = math.log(max(start, TINY)), _slope(expected, start, rising)
    before, before_level, tries = 0.0, 0.0, 0
    best_value, best = -1.0, None
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
        level, tries = math.log(max(value, TINY)), tries + 1
        if tries > 1 and place != before:
            secant = (level - before_level) / (place - before)
            usable = math.isfinite(secant) and abs(secant) > _FLAT
            slope = secant if usable and (secant > 0) == rising else slope
        before, before_level = place, level
        place += (math.log(AIM * target) - level) / slope
        if tries % 3 == 0 or not min(safe, beyond) < place < max(safe, beyond):
            place = (safe + beyond) / 2
    if best is None:  # the safest step of all
        best = measured(math.exp(bounds[0] if rising else bounds[1]))[1]
    return best


def _slope(expected: Callable[[float], float], step: float, rising: bool) -> float:
    """Return the slope of a function of the step, of logarithms of both."""
    wider = 1.05
    values = [math.log(max(expected(step * by), TINY)) for by in (1 / wider, wider)]
    slope = (values[1] - values[0]) / (2 * math.log(wider))
    return max(slope, 0.2) if rising else min(slope, -0.2)
