"""The votes of a round as they come down, and the probabilities that follow."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from masksl.methods.fedpm import FedPmConfig
from masksl.methods.fedpm.dither import Prediction
from masksl.methods.fedpm.theta import Theta
from masksl.methods.fedpm.votes import decode_votes, encode_votes

_CONTEXT_BITS = 10  # of votes that are coded by the votes before


@dataclass(frozen=True)
class Ballot:
    """The votes of a round, encoded.

    Parameters
    ----------
    round : int
        The round.
    voters : tuple[int, ...]
        Numbers of the clients that voted, at least one.
    frames : tuple[bytes, ...]
        The sum of their masks, see `encode_votes`.
    """

    round: int
    voters: tuple[int, ...]
    frames: tuple[bytes, ...]

    @classmethod
    def of(
        cls,
        votes: np.ndarray,
        round_: int,
        voters: Sequence[int],
        theta: Theta,
        rule: "Rule",
    ) -> "Ballot":
        """Encode the votes of a round that began with some probabilities."""
        expected, contexts = rule.expected(theta, round_, voters)
        residual = (votes - expected) % (len(voters) + 1)
        frames = encode_votes(residual, len(voters), contexts)
        return cls(round_, tuple(voters), tuple(frames))

    def theta(self, before: Theta, rule: "Rule") -> Theta:
        """Return the probabilities after it, given those that the round began with.

        Raises
        ------
        FrameError
            If a frame is broken, or was encoded by other probabilities.
        """
        most, count = len(self.voters), len(before.index)
        expected, contexts = rule.expected(before, self.round, self.voters)
        residual = decode_votes(self.frames, count, most, contexts)
        votes = (residual + expected) % (most + 1)
        return rule.count(before, votes, most, self.round)


@dataclass(frozen=True)
class Rule:
    """How votes are counted and coded, the same for server and clients.

    Parameters
    ----------
    config : FedPmConfig
        Configuration of the method.
    seed : int
        Seed of the numbers of ``code=dither``.
    """

    config: FedPmConfig
    seed: int

    def count(self, theta: Theta, votes: np.ndarray, voters: int, round_: int) -> Theta:
        """Return the probabilities after the votes of a round."""
        return theta.after(votes, voters, anew=self.config.begins_anew(round_))

    def expected(
        self, theta: Theta, round_: int, voters: Sequence[int]
    ) -> tuple[np.ndarray | int, np.ndarray | None]:
        """Return what both sides know of the votes of a round.

        Returns
        -------
        tuple[numpy.ndarray | int, numpy.ndarray | None]
            The votes that are expected, of which the difference is sent, modulo one
            more than the voters; and contexts, None if there are none.
        """
        way = self.config.way_down
        if way == "dither":
            predicted = Prediction.of(self.seed, round_, voters, theta.thresholds)
            return predicted.ones, predicted.contexts
        if way == "full" or len(voters).bit_length() > _CONTEXT_BITS:
            return 0, None
        return 0, theta.levels
