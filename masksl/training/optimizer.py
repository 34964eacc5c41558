"""SGD and Adam on named tensors."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from masksl.training.tensors import Tensors

OPTIMIZERS = ("sgd", "adam")
STEP = "adam.step"  # group of the numbers of steps, which have no dimensions
# PyTorch's names of what each optimiser remembers of a parameter, by ours.
_STATES: dict[str, dict[str, str]] = {
    "sgd": {"momentum": "momentum_buffer"},
    "adam": {"adam.mean": "exp_avg", "adam.square": "exp_avg_sq", STEP: "step"},
}

_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(
    BaseModel, frozen=True, strict=True, extra="forbid", allow_inf_nan=False
):
    """The optimiser, the same for all parts of a network.

    Parameters
    ----------
    name : str
        ``sgd``; or ``adam`` (Kingma and Ba, 2015), whose weight decay is that of `sgd`.
    lr : float
        Learning rate of the first round.
    momentum : float
        Heavy-ball momentum of ``sgd``.
    weight_decay : float
        Factor of the weight that is added to its gradient.
    nesterov : bool
        Whether momentum is Nesterov's; ``sgd`` alone.
    betas : tuple[float, float]
        Decay of the means of gradients and of their squares in ``adam``.
    eps : float
        Is added to the root of the mean of squares in ``adam``.
    label_smoothing : float
        Share of a label's weight that is spread evenly over all classes, in training
        (Szegedy et al., 2016).
    """

    name: Literal[OPTIMIZERS] = Field(  # type: ignore[valid-type]
        "sgd", description=f"one of {', '.join(OPTIMIZERS)}"
    )
    lr: float = Field(
        0.1, gt=0, le=1e30, description="a number greater than 0 and at most 1e30"
    )
    momentum: float = Field(
        0.9, ge=0, lt=1, description="a number from 0 to less than 1"
    )
    weight_decay: float = Field(
        5e-4, ge=0, le=1e30, description="a number from 0 to 1e30"
    )
    nesterov: bool = Field(False, description="true or false")
    betas: tuple[_Beta, _Beta] = Field(
        (0.9, 0.999), description="a list of two numbers from 0 to less than 1"
    )
    eps: float = Field(
        1e-8, gt=0, le=1e30, description="a number greater than 0 and at most 1e30"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="a number from 0 to less than 1"
    )

    @field_validator("nesterov")
    @classmethod
    def _needs_momentum(cls, nesterov: bool, info: ValidationInfo) -> bool:
        if nesterov and info.data.get("name") == "adam":
            raise PydanticCustomError("allowed", "false with optimizer.name adam")
        if nesterov and info.data.get("momentum") == 0:
            raise PydanticCustomError("allowed", "false without momentum")
        return nesterov

    @property
    def states(self) -> Mapping[str, str]:
        """PyTorch's name of each tensor of a parameter, by the name of its group."""
        if self.name == "sgd" and not self.momentum:
            return {}
        return _STATES[self.name]

    def make(self, parameters: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        """Return an optimiser of these parameters."""
        if self.name == "adam":
            return torch.optim.Adam(
                parameters,
                lr=self.lr,
                betas=self.betas,
                eps=self.eps,
                weight_decay=self.weight_decay,
            )
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )


def apply_gradients(
    tensors: Tensors,
    gradients: Tensors,
    state: dict[str, Tensors],
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
    state : dict[str, dict[str, torch.Tensor]]
        What the optimiser remembers, by the parameter's name in groups named as in
        `OptimizerConfig.states`. Filled and changed in place.
    config : OptimizerConfig
        The optimiser.
    lr : float
        Learning rate of this round.
    """
    parameters = {name: tensors[name] for name in gradients}
    optimizer = config.make(list(parameters.values()))
    optimizer.param_groups[0]["lr"] = lr
    load_state(optimizer, parameters, state, config)
    for name, parameter in parameters.items():
        parameter.grad = gradients[name]
    optimizer.step()
    for parameter in parameters.values():
        parameter.grad = None
    for key, members in state_of(optimizer, parameters, config).items():
        state.setdefault(key, {}).update(members)


def load_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.Tensor],
    state: Mapping[str, Tensors],
    config: OptimizerConfig,
) -> None:
    """Replace what an optimiser remembers of parameters by tensors, not copied.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        What `OptimizerConfig.make` returned for the parameters.
    parameters : Mapping[str, torch.Tensor]
        Its parameters by name.
    state : Mapping[str, dict[str, torch.Tensor]]
        As `state_of` returns it. A parameter that is missing starts anew.
    config : OptimizerConfig
        The optimiser.
    """
    for name, parameter in parameters.items():
        optimizer.state.pop(parameter, None)
        for key, torchs in config.states.items():
            tensor = state.get(key, {}).get(name)
            if tensor is not None:
                # PyTorch reads the number of steps on the CPU.
                optimizer.state[parameter][torchs] = (
                    tensor.cpu() if key == STEP else tensor
                )


def state_of(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.Tensor],
    config: OptimizerConfig,
) -> dict[str, Tensors]:
    """Return what an optimiser remembers of parameters, in groups, not copied.

    Parameters
    ----------
    optimizer, parameters, config
        See `load_state`.
    """
    state: dict[str, Tensors] = {key: {} for key in config.states}
    for key, torchs in config.states.items():
        for name, parameter in parameters.items():
            tensor = optimizer.state.get(parameter, {}).get(torchs)
            if tensor is not None:
                state[key][name] = tensor
    return state
