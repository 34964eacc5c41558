"""FedPM: masks over random weights that are never trained."""

from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from masksl.settings import Section

CODES = ("global", "layer", "theta", "dither")
_DOWN = ("auto", "full", "previous", "dither")


class FedPmConfig(Section):
    """Configuration of FedPM.

    Parameters
    ----------
    name : str
        ``fedpm``.
    local_epochs : int
        Passes of a client over its data in a round.
    constant : float
        Magnitude of the frozen weights times the square root of the layer's fan-in.
    start : str
        Scores at the start: ``normal``, drawn from a normal distribution; or ``zero``,
        so that every weight is kept with probability 1/2.
    estimator : str
        What stands for the derivative of a mask by its probability: ``probability``,
        the probability itself, as published; or ``identity``, 1.
    keep_moments : bool
        Whether a client keeps what its optimiser remembers from round to round.
    reset_every : int
        Rounds whose votes are counted together; 0 counts all votes of the run.
    reset_first : int
        Rounds at the beginning of which each counts its own votes alone.
    code : str
        What a mask is coded by: ``global``, the share of ones; ``layer``, that of each
        parameter; ``theta``, that of each probability which the server broadcast;
        ``dither``, numbers that server and client draw alike, with which the client
        draws its mask.
    down : str
        How votes are coded: ``full``, all of them by their own shares; ``previous``, by
        the votes before; ``dither``, by the numbers of ``code=dither``; ``auto``:
        ``dither`` where that is possible, else ``previous``. Clients that have missed
        votes get all, as with ``full``.
    """

    unused_slots: ClassVar[tuple[str, ...]] = (
        "compressor",
        "gradient_compressor",
        "model_compressor",
    )

    name: str = Field("fedpm", description="fedpm")
    local_epochs: int = Field(3, ge=1, description="a whole number from 1 on")
    constant: float = Field(
        2.718281828459045,
        gt=0,
        le=1e6,
        description="a number greater than 0 and at most 1e6",
    )
    start: Literal["normal", "zero"] = Field(
        "normal", description="one of normal, zero"
    )
    estimator: Literal["probability", "identity"] = Field(
        "probability", description="one of probability, identity"
    )
    keep_moments: bool = Field(False, description="true or false")
    reset_every: int = Field(
        1, ge=0, le=1_000_000, description="a whole number from 0 to 1000000"
    )
    reset_first: int = Field(
        0, ge=0, le=1_000_000, description="a whole number from 0 to 1000000"
    )
    code: Literal[CODES] = Field(  # type: ignore[valid-type]
        "theta", description=f"one of {', '.join(CODES)}"
    )
    down: Literal[_DOWN] = Field(  # type: ignore[valid-type]
        "auto", description=f"one of {', '.join(_DOWN)}"
    )

    @field_validator("down")
    @classmethod
    def _needs_dither(cls, down: str, info: ValidationInfo) -> str:
        if down == "dither" and info.data.get("code") != "dither":
            raise PydanticCustomError("allowed", "dither with code=dither alone")
        return down

    @property
    def way_down(self) -> str:
        """How votes are coded: ``full``, ``previous`` or ``dither``."""
        if self.down == "auto":
            return "dither" if self.code == "dither" else "previous"
        return self.down

    def begins_anew(self, round_: int) -> bool:
        """Return whether the votes of a round, from 1 on, are counted without others.

        Votes before it are forgotten then.
        """
        later = round_ - self.reset_first
        if later <= 0:
            return True
        return self.reset_every > 0 and (later - 1) % self.reset_every == 0
