"""The probabilities with which weights are kept, as the votes that they follow from.

All clients and the server hold them as whole numbers, so that they agree bit for bit:
for each weight the index of a level, and for all levels one table.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
import torch

from masksl.codec import philox
from masksl.compress import FrameError
from masksl.training.tensors import Tensors

MOST_VOTES = (1 << 16) - 1
SCALE = 1 << 16  # thresholds are probabilities in units of its inverse
_QUANTILES = 1 << 10  # levels at the start
_POOLED = 64  # levels that a mask is coded by, at most
_SMOOTHING = 100  # a vote counts 99 and 1 of so many, for and against


@dataclass(frozen=True)
class Theta:
    """The probabilities of all weights.

    Parameters
    ----------
    index : numpy.ndarray
        uint16, shape (d,): the level of each weight. After a vote the number of ones.
    voters : int
        Votes that were counted; 0 at the start.
    table : numpy.ndarray
        float64, shape (levels,): the probability of each level, ascending.
    """

    index: np.ndarray
    voters: int
    table: np.ndarray

    @classmethod
    def initial(cls, count: int, seed: int, start: str) -> "Theta":
        """Return the probabilities at the start.

        Parameters
        ----------
        count : int
            Number of weights.
        seed : int
            Seed of the draw.
        start : str
            ``normal``: the scores are normal, at 1,024 quantiles of equal probability;
            ``zero``: all are zero.
        """
        if start == "zero":
            return cls(np.zeros(count, np.uint16), 0, np.array([0.5]))
        words = philox.words(seed, 0, count)
        index = (words >> np.uint32(22)).astype(np.uint16)
        return cls(index, 0, _quantiles())

    @classmethod
    def of_votes(cls, ones: np.ndarray, voters: int) -> "Theta":
        """Return the probabilities after a vote.

        A vote for a weight adds .99 to its ones and .01 to its zeros, a vote against it
        the opposite: theta = (V + 98 n) / (100 V).

        Parameters
        ----------
        ones : numpy.ndarray
            Votes for each weight, shape (d,), 0 to ``voters``.
        voters : int
            Number of votes, V.

        Raises
        ------
        FrameError
            If it is not from 1 to 65535.
        """
        if not 0 < voters <= MOST_VOTES:
            raise FrameError(
                f"{voters} votes: must be 1 to {MOST_VOTES}, set method.reset_every"
            )
        levels = np.arange(voters + 1)
        table = (voters + (_SMOOTHING - 2) * levels) / (_SMOOTHING * voters)
        return cls(ones.astype(np.uint16), voters, table)

    def after(self, votes: np.ndarray, voters: int, *, anew: bool) -> "Theta":
        """Return the probabilities after further votes.

        Parameters
        ----------
        votes : numpy.ndarray
            Votes for each weight, shape (d,), 0 to ``voters``.
        voters : int
            Number of clients that voted, at least 1.
        anew : bool
            Whether the votes before are forgotten.
        """
        if anew or not self.voters:
            return self.of_votes(votes, voters)
        return self.of_votes(self.index + votes, self.voters + voters)

    @cached_property
    def _thresholds(self) -> np.ndarray:
        """The threshold of each level, int32, from whole numbers alone."""
        if not self.voters:  # no quantile is nearly half way between two numbers
            return np.rint(self.table * SCALE).astype(np.int32)
        share = self.voters + (_SMOOTHING - 2) * np.arange(self.voters + 1)
        return (share * SCALE // (_SMOOTHING * self.voters)).astype(np.int32)

    @cached_property
    def thresholds(self) -> np.ndarray:
        """65536 times the probabilities, rounded; int32, shape (d,)."""
        return self._thresholds[self.index]

    @property
    def probabilities(self) -> np.ndarray:
        """The probabilities, float32, shape (d,)."""
        return self.table.astype(np.float32)[self.index]

    @property
    def scores(self) -> np.ndarray:
        """Log-odds of the probabilities, float32, shape (d,)."""
        odds = np.log(self.table) - np.log1p(-self.table)
        return odds.astype(np.float32)[self.index]

    def tensors(self) -> Tensors:
        """Return them as ``index``, int16 for uint16, and ``voters``."""
        index = torch.from_numpy(self.index.view(np.int16))
        return {"index": index, "voters": torch.tensor(self.voters)}

    @classmethod
    def of_tensors(cls, tensors: Tensors) -> "Theta":
        """Return those after a vote, of what `tensors` returned."""
        index = tensors["index"].cpu().numpy().view(np.uint16)
        return cls.of_votes(index, int(tensors["voters"]))

    @property
    def levels(self) -> np.ndarray:
        """Level of each weight, uint16, shape (d,), neighbours pooled to at most 64."""
        number = len(self.table)
        if number <= _POOLED:
            return self.index
        pooled = np.arange(number) * _POOLED // number
        return pooled.astype(np.uint16)[self.index]


def _quantiles() -> np.ndarray:
    """Return the probabilities at the quantiles of normal scores, float64."""
    normal = NormalDist()
    middles = ((i + 0.5) / _QUANTILES for i in range(_QUANTILES))
    return np.array([1 / (1 + math.exp(-normal.inv_cdf(p))) for p in middles])
