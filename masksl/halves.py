"""The two halves of a cut network: forward, backward, step.

No bytes, no messages.
"""

import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from masksl.utils import MANY_CLIENTS, trim_heap

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class OptimizerConfig:
    """Stochastic gradient descent, the same on both sides.

    Parameters
    ----------
    lr : float
        Learning rate of the first round.
    momentum : float
        Heavy-ball momentum, from 0 to less than 1.
    weight_decay : float
        Added to every gradient times the weight.
    nesterov : bool
        Whether momentum is Nesterov's.
    """

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False

    def make(self, parameters: Sequence[torch.Tensor]) -> torch.optim.SGD:
        """Return an optimiser of these parameters."""
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate goes down from round to round.

    Parameters
    ----------
    name : str
        ``constant``; ``cosine`` to zero over all rounds; ``multistep``, times ``gamma``
        after each of ``milestones`` rounds; ``step``, times ``gamma`` every ``every``.
    milestones : tuple[int, ...]
        Completed rounds after which the rate goes down.
    gamma : float
        What it is multiplied with.
    every : int
        Rounds between two drops.
    """

    name: str = "constant"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    every: int = 30

    def factor(self, round_: int, rounds: int) -> float:
        """Return the rate of a round, counted from 1, as a share of the first one's."""
        done = round_ - 1
        match self.name:
            case "cosine":
                return (1 + math.cos(math.pi * done / rounds)) / 2
            case "multistep":
                return self.gamma ** sum(done >= stone for stone in self.milestones)
            case "step":
                return self.gamma ** (done // self.every)
        return 1.0


SCHEDULES = ("constant", "cosine", "multistep", "step")


PRECISIONS = ("float32", "tf32", "bfloat16")


@dataclass(frozen=True)
class ComputeConfig:
    """How the halves compute; weights, activations and gradients stay float32.

    Parameters
    ----------
    precision : str
        Of products: ``float32``; ``tf32``, 10 bits of mantissa, on CUDA alone;
        ``bfloat16``, PyTorch's autocast.
    channels_last : bool
        Whether images lie in memory with their channels last. Those of a step of more
        than `MANY_CLIENTS` clients do so on the CPU in any case: they are too many for
        its caches, and it computes faster then.
    compile : bool
        Whether the server half is compiled.
    """

    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False

    def laid_out(self, images: torch.Tensor) -> torch.Tensor:
        """Return a batch in the memory format of the halves."""
        if self.channels_last and images.dim() == 4:
            return images.contiguous(memory_format=torch.channels_last)
        return images

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context of a forward pass."""
        enabled = self.precision == "bfloat16"
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@contextmanager
def compute(
    threads: int,
    device: torch.device,
    seed: int,
    config: ComputeConfig = ComputeConfig(),
) -> Iterator[None]:
    """Set what a result depends on: threads, and a seeded fork of the generators.

    Parameters
    ----------
    threads : int
        Threads of the CPU kernels; some gradients depend on their number.
    device : torch.device
        Where the half is.
    seed : int
        Seed of what layers draw from PyTorch's global generator (dropout).
    config : ComputeConfig
        Its ``precision`` says whether CUDA may round to TF32.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    cuda = [device] if device.type == "cuda" else []
    kernels: tuple[Any, ...] = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    roundings = [kernel.fp32_precision for kernel in kernels]
    for kernel in kernels:
        kernel.fp32_precision = "tf32" if config.precision == "tf32" else "ieee"
    try:
        with torch.random.fork_rng(devices=cuda):
            torch.random.default_generator.manual_seed(seed)
            if cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)
        for kernel, rounding in zip(kernels, roundings, strict=True):
            kernel.fp32_precision = rounding


class ClientHalf:
    """The first units of a network with weights of one client.

    The module is a skeleton that many clients share; weights, buffers and momentum
    are tensors of this half alone, so that many halves can wait for their gradients
    at the same time.

    Parameters
    ----------
    module : nn.Sequential
        The units, on the device of the tensors.
    tensors : dict[str, torch.Tensor]
        Every parameter and buffer of the module by its name. They are changed in
        place: parameters by `step`, buffers by `forward`.
    momentum : dict[str, torch.Tensor]
        Momentum by the parameter's name; empty before the first step.
    threads : int
        Threads of the CPU kernels.
    config : ComputeConfig
        How it computes; ``compile`` is the server half's alone.
    """

    def __init__(
        self,
        module: nn.Module,
        tensors: Tensors,
        momentum: Tensors,
        threads: int,
        config: ComputeConfig = ComputeConfig(),
    ) -> None:
        self._module = module
        self._config = config
        self._names = [name for name, _ in module.named_parameters()]
        for name in self._names:
            tensors[name].requires_grad_(True)
        self.tensors = tensors
        self.momentum = momentum
        self._threads = threads
        self._device = next(iter(tensors.values())).device
        self._activation: torch.Tensor | None = None

    @property
    def buffers(self) -> Tensors:
        """Buffers (BatchNorm statistics) by name."""
        names = set(self._names)
        return {name: t for name, t in self.tensors.items() if name not in names}

    def forward(self, images: torch.Tensor, *, seed: int) -> torch.Tensor:
        """Return the activation of a mini-batch and keep its graph for `backward`.

        Parameters
        ----------
        images : torch.Tensor
            float32, shape (B, C, H, W).
        seed : int
            Seed of dropout.

        Returns
        -------
        torch.Tensor
            The activation at the cut, detached.
        """
        self._module.train()
        with self._compute(seed):
            self._activation = self._run(images)
        return self._activation.detach()

    def _run(self, images: torch.Tensor) -> torch.Tensor:
        images = self._config.laid_out(images)
        with self._config.autocast(self._device):
            activation = functional_call(self._module, self.tensors, (images,))
        return activation.float()

    def _compute(self, seed: int = 0) -> AbstractContextManager[None]:
        return compute(self._threads, self._device, seed, self._config)

    def backward(
        self, gradient: torch.Tensor, positions: torch.Tensor | None = None
    ) -> Tensors:
        """Return the gradient of every parameter and let the graph go.

        Parameters
        ----------
        gradient : torch.Tensor
            Loss gradient with respect to the activation as the server decoded it. It
            is applied to the activation as it was: the compressor counts as identity.
        positions : torch.Tensor | None
            int64, shape (k,): the elements of the flat activation, row-major, that the
            gradient, then of shape (k,), is given at; at all others it is zero.

        Raises
        ------
        ValueError
            If its shape is not that of the activation, or of the positions.
        """
        activation, self._activation = self._activation, None
        if activation is None:
            raise RuntimeError("backward without a forward before it")
        expected = activation.shape if positions is None else positions.shape
        if gradient.shape != expected:
            raise ValueError(
                f"gradient of shape {tuple(gradient.shape)} for an activation of shape "
                f"{tuple(activation.shape)}, expected {tuple(expected)}"
            )
        if positions is not None:
            given, gradient = gradient, gradient.new_zeros(activation.shape)
            gradient.view(-1)[positions] = given
        parameters = [self.tensors[name] for name in self._names]
        with self._compute():
            gradients = torch.autograd.grad(activation, parameters, gradient)
        return dict(zip(self._names, gradients, strict=True))

    def step(self, gradients: Tensors, config: OptimizerConfig, lr: float) -> None:
        """Take one optimiser step.

        Parameters
        ----------
        gradients : dict[str, torch.Tensor]
            What `backward` returned.
        config : OptimizerConfig
            The optimiser; its momentum stays with this half.
        lr : float
            Learning rate of this round.
        """
        with self._compute():
            apply_gradients(self.tensors, gradients, self.momentum, config, lr)

    def evaluate(self, images: torch.Tensor) -> torch.Tensor:
        """Return the activation of images in evaluation mode; nothing changes."""
        self._module.eval()
        with torch.no_grad(), self._compute():
            return self._run(images)


@dataclass(frozen=True)
class Step:
    """What became of one step of the server half.

    Parameters
    ----------
    loss : float
        Mean cross-entropy over all samples of the step.
    gradients : list[torch.Tensor]
        For each activation the gradient of its own client's mean loss.
    """

    loss: float
    gradients: list[torch.Tensor]


@dataclass(frozen=True)
class Score:
    """Sums over test images.

    Parameters
    ----------
    samples : int
        Number of images.
    loss : float
        Sum of their cross-entropies.
    top1, top5 : int
        How many have their label in the first one, the first five.
    """

    samples: int = 0
    loss: float = 0.0
    top1: int = 0
    top5: int = 0

    def __add__(self, other: "Score") -> "Score":
        """Return the sums over both."""
        return Score(
            self.samples + other.samples,
            self.loss + other.loss,
            self.top1 + other.top1,
            self.top5 + other.top5,
        )


class ServerHalf:
    """The last units of a network and their optimiser.

    Parameters
    ----------
    module : nn.Sequential
        The units, on the device where they are to be trained.
    config : OptimizerConfig
        The optimiser.
    threads : int
        Threads of the CPU kernels.
    compute_config : ComputeConfig
        How it computes.
    """

    def __init__(
        self,
        module: nn.Module,
        config: OptimizerConfig,
        threads: int,
        compute_config: ComputeConfig = ComputeConfig(),
    ) -> None:
        if compute_config.channels_last:  # typed without memory_format alone
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module = module
        self._forward = torch.compile(module) if compute_config.compile else module
        self._optimizer = config.make(list(module.parameters()))
        self._threads = threads
        self._config = compute_config
        self.device = next(module.parameters()).device

    def step(
        self,
        activations: list[torch.Tensor],
        labels: Sequence[torch.Tensor],
        *,
        lr: float,
        seed: int,
    ) -> Step:
        """Train on one global mini-batch.

        Parameters
        ----------
        activations : list[torch.Tensor]
            Decoded activation of each client, shape (n_i, ...). The list is emptied, so
            that their memory is free during the step.
        labels : Sequence[torch.Tensor]
            int64 labels of each client, shape (n_i,).
        lr : float
            Learning rate of this round.
        seed : int
            Seed of dropout.

        Returns
        -------
        Step
            The loss, and a gradient for each client: its slice of the gradient of the
            mean over all n samples, times n / n_i.
        """
        self.module.train()
        sizes = [len(activation) for activation in activations]
        crowded = len(sizes) > MANY_CLIENTS
        beyond_caches = crowded and self.device.type == "cpu"
        config = ComputeConfig(channels_last=True) if beyond_caches else self._config
        batch = config.laid_out(torch.cat(activations)).requires_grad_(True)  # (n, ...)
        activations.clear()
        if crowded:
            trim_heap()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        with self._compute(seed):
            logits = self._run(batch)
            loss = functional.cross_entropy(logits, torch.cat(list(labels)))
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
        assert batch.grad is not None
        slices = list(batch.grad.split(sizes))
        for part, size in zip(slices, sizes, strict=True):
            if size != len(batch):
                part.mul_(len(batch) / size)
        return Step(loss.item(), slices)

    def _run(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the logits of a batch of activations."""
        batch = self._config.laid_out(batch)
        with self._config.autocast(self.device):
            return self._forward(batch).float()

    def _compute(self, seed: int = 0) -> AbstractContextManager[None]:
        return compute(self._threads, self.device, seed, self._config)

    def state(self) -> tuple[Tensors, Tensors]:
        """Return copies of its parameters and buffers, and of its momentum, by name."""
        tensors = {n: t.detach().clone() for n, t in self.module.state_dict().items()}
        momentum = {}
        for name, parameter in self.module.named_parameters():
            kept = self._optimizer.state.get(parameter, {}).get("momentum_buffer")
            if kept is not None:
                momentum[name] = kept.clone()
        return tensors, momentum

    def load(self, tensors: Tensors, momentum: Tensors) -> None:
        """Take what `state` returned, on any device; it is copied."""
        self.module.load_state_dict(tensors)
        self._optimizer.state.clear()
        for name, parameter in self.module.named_parameters():
            if name in momentum:
                kept = momentum[name].to(parameter.device, copy=True)
                self._optimizer.state[parameter]["momentum_buffer"] = kept

    def evaluate(self, activation: torch.Tensor, labels: torch.Tensor) -> Score:
        """Score a batch of decoded activations against its labels."""
        self.module.eval()
        with torch.no_grad(), self._compute():
            logits = self._run(activation)  # (n, classes)
            loss = functional.cross_entropy(logits, labels, reduction="sum")
            best = logits.topk(min(5, logits.shape[1])).indices  # (n, 5)
            hits = best == labels[:, None]
            return Score(
                len(labels), loss.item(), int(hits[:, :1].sum()), int(hits.sum())
            )


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
        Parameters, changed in place; others are left alone.
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


def average(halves: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[int]):
    """Average tensors by name over clients.

    Parameters
    ----------
    halves : Sequence[Mapping[str, torch.Tensor]]
        For each client its tensors (weights, gradients, buffers), all of one shape.
    weights : Sequence[int]
        Samples of each client.

    Returns
    -------
    dict[str, torch.Tensor]
        Floating tensors averaged by weight; of integer ones (BatchNorm's
        ``num_batches_tracked``) the maximum. The average of one client is that
        client's tensors themselves, untouched.
    """
    if len(halves) == 1:
        return dict(halves[0])
    total = sum(weights)
    averaged: Tensors = {}
    for name, first in halves[0].items():
        tensors = [half[name] for half in halves]
        if first.is_floating_point():
            mean = torch.zeros_like(first)
            for tensor, weight in zip(tensors, weights, strict=True):
                mean.add_(tensor, alpha=weight / total)
            averaged[name] = mean
        else:
            averaged[name] = torch.stack(tensors).amax(dim=0)
    return averaged


def resolve_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is CUDA where there is, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def describe(device: torch.device) -> str:
    """Return in words what computes there."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"
