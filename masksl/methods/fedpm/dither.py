"""Numbers that a client and the server draw alike, and what they tell of a mask.

The client keeps weight j if its number is less than its own probability. The server
knows the number, and the probability that training began with. Only where these two are
close is the bit in doubt. All arithmetic is on whole numbers, so both sides agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from masksl.codec import philox
from masksl.methods.fedpm.theta import SCALE

_UNIT = 256  # distances are in units of its inverse
# Distances from the threshold, as differences of log-odds, that part the 32 bins.
_BOUNDS = (0.02, 0.06, 0.12, 0.2, 0.3, 0.42, 0.55, 0.7, 0.9, 1.1, 1.4, 1.75, 2.25, 3, 4)
_NEAR = 102  # .4: numbers this close to the threshold are counted
_MOST = 3  # of them, at most


def _bin_table() -> np.ndarray:
    """Return the bin of every distance from -1025 to 1025 units, uint8."""
    outer = [round(_UNIT * bound) for bound in _BOUNDS]
    bounds = [-bound for bound in reversed(outer)] + [0] + outer
    every = np.arange(-outer[-1] - 1, outer[-1] + 2)
    return np.searchsorted(bounds, every, side="right").astype(np.uint8)


_BINS = _bin_table()
_REACH = len(_BINS) // 2


def numbers(seed: int, round_: int, client: int, count: int) -> np.ndarray:
    """Draw the numbers of a client in a round, evenly from 0 to 65535.

    Those of two clients, or of two rounds, are independent.

    Returns
    -------
    numpy.ndarray
        uint16, shape (count,).
    """
    words = philox.words(seed, round_ << 32 | client, -(-count // 2))
    return words.astype("<u4", copy=False).view("<u2")[:count]


def distances(drawn: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return how far numbers are above thresholds, about in log-odds.

    Parameters
    ----------
    drawn : numpy.ndarray
        uint16, shape (d,).
    thresholds : numpy.ndarray
        int32, shape (d,), 65536 times probabilities.

    Returns
    -------
    numpy.ndarray
        int64, shape (d,): in units of 1/256; negative where a number is below.
    """
    wide = thresholds.astype(np.int64)
    slope = np.maximum(1, wide * (SCALE - wide) >> 16)
    return (drawn.astype(np.int64) - wide) * _UNIT // slope


def bins(drawn: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return the bin of each distance, uint8, shape (d,), 0 to 31; see `distances`."""
    far = distances(drawn, thresholds)
    return _BINS[np.clip(far, -_REACH, _REACH) + _REACH]


@dataclass(frozen=True)
class Prediction:
    """A prediction of the sum of a round's masks, by the numbers of its voters.

    Parameters
    ----------
    ones : numpy.ndarray
        int32, shape (d,): the sum if nobody's probabilities had changed.
    contexts : numpy.ndarray
        uint8, shape (d,), 0 to 15: how many numbers were close to the threshold, above
        it and below, up to three each.
    """

    ones: np.ndarray
    contexts: np.ndarray

    @classmethod
    def of(
        cls, seed: int, round_: int, voters: Sequence[int], thresholds: np.ndarray
    ) -> "Prediction":
        """Predict the sum of a round's masks by the thresholds that it began with."""
        count = len(thresholds)
        ones, above, below = (np.zeros(count, np.int32) for _ in range(3))
        for client in voters:
            far = distances(numbers(seed, round_, client, count), thresholds)
            ones += far < 0
            above += (far >= 0) & (far < _NEAR)
            below += (far > -_NEAR) & (far < 0)
        np.minimum(above, _MOST, out=above)
        np.minimum(below, _MOST, out=below)
        return cls(ones, (above * (_MOST + 1) + below).astype(np.uint8))
