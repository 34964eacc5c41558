"""Stochastic gradient descent and the schedules of its learning rate."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from masksl.training.tensors import Tensors

SCHEDULES = ("constant", "cosine", "multistep", "step")


class OptimizerConfig(
    BaseModel, frozen=True, strict=True, extra="forbid", allow_inf_nan=False
):
    """Stochastic gradient descent, the same for all parts of a network.

    Parameters
    ----------
    lr : float
        Learning rate of the first round.
    momentum : float
        Heavy-ball momentum.
    weight_decay : float
        Factor of the weight that is added to its gradient.
    nesterov : bool
        Whether momentum is Nesterov's.
    """

    lr: float = Field(
        0.1, gt=0, le=1e30, description="a number greater than 0 and at most 1e30"
    )
    momentum: float = Field(
        0.9, ge=0, lt=1, description="a number from 0 to less than 1"
    )
    weight_decay: float = Field(5e-4, ge=0, description="a number from 0 on")
    nesterov: bool = Field(False, description="true or false")

    @field_validator("nesterov")
    @classmethod
    def _needs_momentum(cls, nesterov: bool, info: ValidationInfo) -> bool:
        if nesterov and info.data.get("momentum") == 0:
            raise PydanticCustomError("allowed", "false without momentum")
        return nesterov

    def make(self, parameters: Sequence[torch.Tensor]) -> torch.optim.SGD:
        """Return an optimiser of these parameters."""
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )


class ScheduleConfig(
    BaseModel, frozen=True, strict=True, extra="forbid", allow_inf_nan=False
):
    """How the learning rate changes from round to round.

    Parameters
    ----------
    name : str
        ``constant``; ``cosine`` to zero over all rounds; ``multistep``, times ``gamma``
        after each of ``milestones`` rounds; ``step``, times ``gamma`` every ``every``.
    milestones : tuple[int, ...]
        Completed rounds after which the rate drops.
    gamma : float
        Factor of a drop.
    every : int
        Rounds between two drops.
    """

    name: Literal[SCHEDULES] = Field(  # type: ignore[valid-type]
        "constant", description=f"one of {', '.join(SCHEDULES)}"
    )
    milestones: tuple[int, ...] = Field(
        (), description="a list of ascending whole numbers"
    )
    gamma: float = Field(
        0.1, gt=0, le=1, description="a number greater than 0 and at most 1"
    )
    every: int = Field(30, ge=1, description="a whole number from 1 on")

    @field_validator("milestones")
    @classmethod
    def _ascend(cls, milestones: tuple[int, ...]) -> tuple[int, ...]:
        if list(milestones) != sorted(set(milestones)):
            raise ValueError("not ascending")
        return milestones

    @property
    def depends_on_rounds(self) -> bool:
        """Whether the rate of a round depends on the number of all rounds."""
        return self.name == "cosine"

    def factor(self, round_: int, rounds: int) -> float:
        """Return the rate of a round, counted from 1, over that of the first one."""
        done = round_ - 1
        match self.name:
            case "cosine":
                return (1 + math.cos(math.pi * done / rounds)) / 2
            case "multistep":
                return self.gamma ** sum(done >= stone for stone in self.milestones)
            case "step":
                return self.gamma ** (done // self.every)
        return 1.0


def apply_gradients(
    tensors: Tensors,
    gradients: Tensors,
    momentum: Tensors,
    config: OptimizerConfig,
    lr: float,
) -> None:
    """Take one optimiser step on tensors that live outside a module.

    Parameters
    ----------
    tensors : dict[str, torch.Tensor]
        Parameters, changed in place. Tensors without a gradient are left alone.
    gradients : dict[str, torch.Tensor]
        A gradient for each parameter.
    momentum : dict[str, torch.Tensor]
        Momentum by the parameter's name, filled and changed in place.
    config : OptimizerConfig
        The optimiser.
    lr : float
        Learning rate of this round.
    """
    parameters = [tensors[name] for name in gradients]
    optimizer = config.make(parameters)
    optimizer.param_groups[0]["lr"] = lr
    for name, parameter in zip(gradients, parameters, strict=True):
        parameter.grad = gradients[name]
        if name in momentum:
            optimizer.state[parameter]["momentum_buffer"] = momentum[name]
    optimizer.step()
    for name, parameter in zip(gradients, parameters, strict=True):
        parameter.grad = None
        if config.momentum:
            momentum[name] = optimizer.state[parameter]["momentum_buffer"]
