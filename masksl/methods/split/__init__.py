"""Split learning: activations go up and gradients come down in every mini-batch."""

from typing import ClassVar, Literal

from pydantic import Field

from masksl.settings import Section


class SplitConfig(Section):
    """Configuration of split learning.

    Parameters
    ----------
    name : str
        ``split``.
    cut : int | str
        Units that the client keeps, or the name of a cut of the network.
    client_sync : str
        How client halves are kept together: ``step``, one optimiser steps one half
        with averaged gradients; ``round``, halves are averaged after each round;
        ``never``.
    gradient_positions : str
        Positions at which a gradient is sent: ``all``, or ``kept``, those that the
        frame of its activation kept.
    traffic : str
        Preset that the compressors of all three slots come from, unless they are given.
    """

    top_level: ClassVar[tuple[str, ...]] = (
        *("cut", "client_sync", "gradient_positions", "traffic"),
    )

    name: Literal["split"] = Field("split", description="split")
    cut: int | str = Field("shallow", description="a number of units or a named cut")
    client_sync: Literal["step", "round", "never"] = Field(
        "step", description="one of step, round, never"
    )
    gradient_positions: Literal["all", "kept"] = Field(
        "all", description="one of all, kept"
    )
    traffic: Literal["exact", "paper", "compact"] = Field(
        "compact", description="one of exact, paper, compact"
    )
