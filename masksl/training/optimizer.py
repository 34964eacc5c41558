"""SGD and Adam on named tensors."""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from masksl.training.tensors import Tensors

OPTIMIZERS = ("sgd", "adam")
# Groups of what is remembered of parameters; numbers of steps have no dimensions.
MOMENTUM, MEAN, SQUARE, STEP = "momentum", "adam.mean", "adam.square", "adam.step"

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
    def states(self) -> tuple[str, ...]:
        """Names of the groups of what it remembers of each parameter."""
        if self.name == "adam":
            return (MEAN, SQUARE, STEP)
        return (MOMENTUM,) if self.momentum else ()


def apply_gradients(
    tensors: Tensors,
    gradients: Tensors,
    state: dict[str, Tensors],
    config: OptimizerConfig,
    lr: float,
) -> None:
    """Take one optimiser step, as `torch.optim.SGD` and `torch.optim.Adam` do.

    Parameters
    ----------
    tensors : dict[str, torch.Tensor]
        Parameters, changed in place. Tensors without a gradient are left alone.
    gradients : dict[str, torch.Tensor]
        A gradient for each parameter.
    state : dict[str, dict[str, torch.Tensor]]
        What the optimiser remembers, by the parameter's name in groups named as in
        `OptimizerConfig.states`. Filled and changed in place. A parameter that is
        missing starts anew.
    config : OptimizerConfig
        The optimiser.
    lr : float
        Learning rate of this step.
    """
    parameters = {name: tensors[name] for name in gradients}
    for group in config.states:
        state.setdefault(group, {})
    # PyTorch's functions, without its classes: these load its compiler, which takes
    # nearly as long as PyTorch itself.
    with torch.no_grad():
        step = _adam if config.name == "adam" else _sgd
        step(parameters, gradients, state, config, lr)


def _sgd(
    parameters: Tensors,
    gradients: Tensors,
    state: dict[str, Tensors],
    config: OptimizerConfig,
    lr: float,
) -> None:
    momentum = state.get(MOMENTUM, {})
    buffers = [momentum.get(name) for name in parameters]
    sgd(
        list(parameters.values()),
        list(gradients.values()),
        buffers,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        lr=lr,
        dampening=0,
        nesterov=config.nesterov,
        maximize=False,
    )
    if config.momentum:  # the first step makes the buffers
        made = zip(parameters, buffers, strict=True)
        momentum.update({name: buffer for name, buffer in made if buffer is not None})


def _adam(
    parameters: Tensors,
    gradients: Tensors,
    state: dict[str, Tensors],
    config: OptimizerConfig,
    lr: float,
) -> None:
    for name, parameter in parameters.items():
        if name not in state[STEP]:
            state[MEAN][name] = torch.zeros_like(parameter)
            state[SQUARE][name] = torch.zeros_like(parameter)
            state[STEP][name] = torch.tensor(0.0)
        # PyTorch reads the number of steps on the CPU.
        state[STEP][name] = state[STEP][name].cpu()
    adam(
        list(parameters.values()),
        list(gradients.values()),
        *([state[group][name] for name in parameters] for group in (MEAN, SQUARE)),
        [],
        [state[STEP][name] for name in parameters],
        amsgrad=False,
        beta1=config.betas[0],
        beta2=config.betas[1],
        lr=lr,
        weight_decay=config.weight_decay,
        eps=config.eps,
        maximize=False,
    )


# --- the same on every processor ------------------------------------------------------


def stepped(
    tensors: Tensors,
    gradients: Tensors,
    state: Mapping[str, Tensors],
    config: OptimizerConfig,
    lr: float,
) -> tuple[Tensors, dict[str, Tensors]]:
    """Take the step of `apply_gradients` so that every processor rounds alike.

    It computes on the CPU, each product and each sum by itself: a processor that fuses
    the two rounds once and not twice. Copies of a network that take the same steps on
    different machines then stay equal bit for bit.

    Parameters
    ----------
    tensors, gradients, state, config, lr
        See `apply_gradients`. They are not changed.

    Returns
    -------
    tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]
        The new parameters, those with a gradient alone, and the new state. Both are on
        the devices of the old parameters; numbers of steps are on the CPU.
    """
    step = _adam_alone if config.name == "adam" else _sgd_alone
    parameters: Tensors = {}
    states: dict[str, Tensors] = {group: {} for group in config.states}
    with torch.no_grad():
        for name, gradient in gradients.items():
            parameter = tensors[name].detach()
            own = {g: state[g][name].cpu() for g in states if name in state.get(g, {})}
            gradient = gradient.cpu()
            if config.weight_decay:
                gradient = gradient + parameter.cpu() * config.weight_decay
            change, own = step(gradient, own, config)
            new = parameter.cpu() - change * lr
            parameters[name] = new.to(parameter.device)
            for group, tensor in own.items():
                device = "cpu" if group == STEP else parameter.device
                states[group][name] = tensor.to(device)
    return parameters, states


def _sgd_alone(
    gradient: torch.Tensor, state: Tensors, config: OptimizerConfig
) -> tuple[torch.Tensor, Tensors]:
    """Return the direction of SGD, and what is remembered."""
    if not config.momentum:
        return gradient, {}
    if MOMENTUM in state:
        momentum = state[MOMENTUM] * config.momentum
        momentum += gradient
    else:  # as PyTorch: the first gradient is taken whole
        momentum = gradient.clone()
    if config.nesterov:
        return gradient + momentum * config.momentum, {MOMENTUM: momentum}
    return momentum, {MOMENTUM: momentum}


def _adam_alone(
    gradient: torch.Tensor, state: Tensors, config: OptimizerConfig
) -> tuple[torch.Tensor, Tensors]:
    """Return the direction of Adam, and what is remembered."""
    zeros = torch.zeros_like(gradient)
    steps = state.get(STEP, torch.tensor(0.0)) + 1
    (beta, beta_square), number = config.betas, int(steps)
    mean = state.get(MEAN, zeros) * beta
    mean += gradient * (1 - beta)
    square = state.get(SQUARE, zeros) * beta_square
    square += (gradient * gradient) * (1 - beta_square)
    root = square.sqrt() / math.sqrt(1 - beta_square**number)
    direction = mean / (1 - beta**number)
    direction /= root + config.eps
    return direction, {MEAN: mean, SQUARE: square, STEP: steps}
