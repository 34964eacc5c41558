"""The weights of the server, the past that a threshold needs, and earlier versions."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from masksl.methods.sasg.vectors import squared_norm


class Past(NamedTuple):
    """A step of w: its squared norm, and the learning rate that it was made with."""

    square: float
    rate: float


@dataclass
class Weights:
    """The weights w of the server.

    Parameters
    ----------
    flat : torch.Tensor
        The current version, float32, shape (d,).
    previous : torch.Tensor
        The version before, the same one at first.
    version : int
        Number of the current version, from 0; the number of the next iteration.
    history : list[Past]
        The last steps, the latest one last.
    references : dict[int, torch.Tensor]
        Earlier versions that workers refer to, by number.
    """

    flat: torch.Tensor
    previous: torch.Tensor
    version: int = 0
    history: list[Past] = field(default_factory=list)
    references: dict[int, torch.Tensor] = field(default_factory=dict)

    def refer(self, used: Collection[int]) -> None:
        """Keep the versions of some numbers, forget all others.

        The current version may be one of them, all others must be known.
        """
        known = self.references | {self.version: self.flat}
        self.references = {number: known[number] for number in sorted(used)}

    def subtract(self, total: torch.Tensor, rate: float, history: int) -> bool:
        """Make the next version; return whether the step was finite.

        Parameters
        ----------
        total : torch.Tensor
            The step, float32, shape (d,).
        rate : float
            The learning rate that it was made with.
        history : int
            Number of steps that are remembered.
        """
        square = squared_norm(total)
        self.previous, self.flat = self.flat, self.flat - total
        self.version += 1
        self.history = [*self.history, Past(square, rate)][-history:]
        return math.isfinite(square)
