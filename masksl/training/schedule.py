"""Schedules of the learning rate."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

SCHEDULES = ("constant", "cosine", "multistep", "step", "exponential", "onecycle")

# Of the one-cycle policy: the highest rate over the first, and the first over the last.
_FIRST, _LAST = 25.0, 1e4


class ScheduleConfig(
    BaseModel, frozen=True, strict=True, extra="forbid", allow_inf_nan=False
):
    """How the learning rate changes from round to round, or from step to step.

    Parameters
    ----------
    name : str
        ``constant``; ``cosine`` to zero over all rounds; ``multistep``, times ``gamma``
        after each of ``milestones`` rounds; ``step``, times ``gamma`` every ``every``;
        ``exponential``, times ``gamma`` over ``every`` rounds, by an equal factor in
        each of them; ``onecycle``, which changes in every step of a client: from a 25th
        up to the rate in the share ``peak`` of all steps, then down to almost zero,
        both along a half cosine (Smith and Topin, 2017; as
        ``torch.optim.lr_scheduler.OneCycleLR`` without momentum).
    milestones : tuple[int, ...]
        Completed rounds after which the rate drops.
    gamma : float
        Factor of a drop; in ``exponential`` that of ``every`` rounds.
    every : int
        Rounds between two drops of ``step``; rounds in which ``exponential`` falls to
        ``gamma`` times its rate.
    peak : float
        Share of all steps after which ``onecycle`` is at its highest.
    warmup : float
        Rounds in which the rate rises in equal steps to that of the schedule; not
        with ``onecycle``, which has its own.
    """

    name: Literal[SCHEDULES] = Field(  # type: ignore[valid-type]
        "constant", description=f"one of {', '.join(SCHEDULES)}"
    )
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="a list of ascending whole numbers from 1 on"
    )
    gamma: float = Field(
        0.1, gt=0, le=1, description="a number greater than 0 and at most 1"
    )
    every: int = Field(30, ge=1, description="a whole number from 1 on")
    peak: float = Field(
        0.3, gt=0, lt=1, description="a number greater than 0 and less than 1"
    )
    warmup: float = Field(0.0, ge=0, le=1e6, description="a number from 0 to 1e6")

    @field_validator("milestones")
    @classmethod
    def _ascend(cls, milestones: tuple[int, ...]) -> tuple[int, ...]:
        if list(milestones) != sorted(set(milestones)):
            raise ValueError("not ascending")
        return milestones

    @field_validator("warmup")
    @classmethod
    def _needs_another(cls, warmup: float, info: ValidationInfo) -> float:
        if warmup and info.data.get("name") == "onecycle":
            raise PydanticCustomError("allowed", "0 with schedule.name onecycle")
        return warmup

    @property
    def depends_on_rounds(self) -> bool:
        """Whether the rate of a round depends on the number of all rounds."""
        return self.name in ("cosine", "onecycle")

    def factor(self, done: int, rounds: int) -> float:
        """Return the rate after some rounds over that of the first one."""
        match self.name:
            case "cosine":
                return (1 + math.cos(math.pi * done / rounds)) / 2
            case "multistep":
                return self.gamma ** sum(done >= stone for stone in self.milestones)
            case "step":
                return self.gamma ** (done // self.every)
            case "exponential":
                return self.gamma ** (done / self.every)
        return 1.0

    def one_cycle(self, lr: float, number: int, steps: int) -> float:
        """Return the rate of step ``number``, from 0 on, of all ``steps``.

        It is rounded as in PyTorch.
        """
        first, top = lr / _FIRST, float(self.peak * steps) - 1
        if number <= top:
            return _half_cosine(first, lr, number / top if top else 1.0)
        return _half_cosine(lr, first / _LAST, (number - top) / (steps - 1 - top))


@dataclass(frozen=True)
class Rates:
    """The learning rates of a round.

    Parameters
    ----------
    schedule : ScheduleConfig
        How they change.
    lr : float
        ``optimizer.lr``: the rate of the first round, the highest of ``onecycle``.
    round : int
        Number of the round, from 1.
    rounds : int
        Number of all rounds.
    """

    schedule: ScheduleConfig
    lr: float
    round: int
    rounds: int

    def at(self, step: int, steps: int) -> float:
        """Return the rate of a step, from 0 on, of all steps of the round."""
        schedule, done = self.schedule, self.round - 1
        if schedule.name == "onecycle":
            number, all_ = done * steps + step, self.rounds * steps
            return schedule.one_cycle(self.lr, number, all_)
        rate = self.lr * schedule.factor(done, self.rounds)
        passed = done + (step + 1) / steps
        warm = passed < schedule.warmup
        return rate * (passed / schedule.warmup) if warm else rate


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2.0 * (math.cos(math.pi * share) + 1)
