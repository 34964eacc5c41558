"""A network, or a part of one, with tensors of its own."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from masksl.training.compute import FLOAT32, ComputeConfig, compute
from masksl.training.factors import Trace
from masksl.training.optimizer import OptimizerConfig, apply_gradients
from masksl.training.score import mean_loss
from masksl.training.tensors import Tensors


class _Given(torch.autograd.Function):  # pylint: disable=abstract-method
    """A scalar whose gradient with respect to a tensor is given.

    If `torch.autograd.grad` is given one itself, it loads SymPy, a tenth of the start
    of a process.
    """

    @staticmethod
    # pylint: disable-next=arguments-differ
    def forward(ctx: Any, output: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Return zero, and keep the gradient."""
        ctx.save_for_backward(gradient)
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient that was given."""
        (gradient,) = ctx.saved_tensors
        return gradient, None


class LocalNetwork:
    """A part of a network with the weights of one client.

    The module is a skeleton that many clients share. Weights, buffers and what the
    optimiser remembers are tensors of this object alone, so that many of them can be
    between forward and backward at the same time.

    Parameters
    ----------
    module : nn.Module
        The layers, on the device of the tensors.
    tensors : dict[str, torch.Tensor]
        Every parameter and buffer of the module by its name. They are changed in
        place: parameters by `step`, buffers by `forward`.
    optimizer_state : dict[str, dict[str, torch.Tensor]]
        What the optimiser remembers, see `apply_gradients`; empty before the first
        step. Changed in place by `step`.
    threads : int
        Threads of the CPU kernels.
    config : ComputeConfig
        How it computes; ``compile`` is ignored.
    """

    def __init__(
        self,
        module: nn.Module,
        tensors: Tensors,
        optimizer_state: dict[str, Tensors],
        threads: int,
        config: ComputeConfig = FLOAT32,
    ) -> None:
        self._module = module
        self._config = config
        self._names = [name for name, _ in module.named_parameters()]
        for name in self._names:
            tensors[name].requires_grad_(True)
        self.tensors = tensors
        self.optimizer_state = optimizer_state
        self._threads = threads
        self._device = next(iter(tensors.values())).device
        self._output: torch.Tensor | None = None

    @property
    def buffers(self) -> Tensors:
        """Buffers (BatchNorm statistics) by name."""
        names = set(self._names)
        return {name: t for name, t in self.tensors.items() if name not in names}

    def forward(self, images: torch.Tensor, *, seed: int) -> torch.Tensor:
        """Return the output for a mini-batch and keep its graph for `backward`.

        Parameters
        ----------
        images : torch.Tensor
            float32, shape (B, C, H, W).
        seed : int
            Seed of dropout.

        Returns
        -------
        torch.Tensor
            float32, detached: the activation at the cut, or logits.
        """
        self._module.train()
        with self._compute(seed):
            self._output = self._run(images)
        return self._output.detach()

    @property
    def output_shape(self) -> torch.Size:
        """Shape of the output whose graph is kept, of no elements without one."""
        return torch.Size([0]) if self._output is None else self._output.shape

    def computing(self) -> AbstractContextManager[None]:
        """Return the context of other computations on its tensors."""
        return self._compute()

    def _run(self, images: torch.Tensor) -> torch.Tensor:
        images = self._config.laid_out(images)
        with self._config.autocast(self._device):
            output = functional_call(self._module, self.tensors, (images,))
        return output.float()

    def _compute(self, seed: int = 0) -> AbstractContextManager[None]:
        return compute(self._threads, self._device, seed, self._config)

    def backward(
        self, gradient: torch.Tensor, positions: torch.Tensor | None = None
    ) -> Tensors:
        """Return the gradient of every parameter and free the graph.

        Parameters
        ----------
        gradient : torch.Tensor
            Loss gradient with respect to the output.
        positions : torch.Tensor | None
            int64, shape (k,): positions in the flat output, row-major, of the elements
            of the gradient, then of shape (k,). At all others it is zero.

        Raises
        ------
        ValueError
            If its shape is not that of the output, or of the positions.
        """
        output, self._output = self._output, None
        if output is None:
            raise RuntimeError("backward without a forward before it")
        expected = output.shape if positions is None else positions.shape
        if gradient.shape != expected:
            raise ValueError(
                f"gradient of shape {tuple(gradient.shape)} for an activation of shape "
                f"{tuple(output.shape)}, expected {tuple(expected)}"
            )
        if positions is not None:
            given, gradient = gradient, gradient.new_zeros(output.shape)
            gradient.view(-1)[positions] = given
        parameters = [self.tensors[name] for name in self._names]
        with self._compute():
            scalar = _Given.apply(output, gradient)  # type: ignore[no-untyped-call]
            gradients = torch.autograd.grad(scalar, parameters)
        return dict(zip(self._names, gradients, strict=True))

    def step(self, gradients: Tensors, config: OptimizerConfig, lr: float) -> None:
        """Take one optimiser step.

        Parameters
        ----------
        gradients : dict[str, torch.Tensor]
            What `backward` returned.
        config : OptimizerConfig
            The optimiser. What it remembers stays with this network.
        lr : float
            Learning rate of this round.
        """
        with self._compute():
            state = self.optimizer_state
            apply_gradients(self.tensors, gradients, state, config, lr)

    def train(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        config: OptimizerConfig,
        *,
        lr: float,
        seed: int,
        correct: Callable[[Tensors], None] | None = None,
    ) -> float:
        """Take one optimiser step of a whole network on the mean loss of a mini-batch.

        Parameters
        ----------
        images : torch.Tensor
            float32, shape (B, C, H, W).
        labels : torch.Tensor
            int64, shape (B,).
        config : OptimizerConfig
            The optimiser.
        lr : float
            Learning rate of this round.
        seed : int
            Seed of dropout.
        correct : Callable[[dict[str, torch.Tensor]], None] | None
            Changes the gradients in place before the step.

        Returns
        -------
        float
            The mean cross-entropy before the step. If it is not finite, there is no
            step.
        """
        loss, gradients = self.gradients(
            images, labels, smoothing=config.label_smoothing, seed=seed
        )
        if gradients is not None:
            if correct is not None:
                with torch.no_grad(), self._compute():
                    correct(gradients)
            self.step(gradients, config, lr)
        return loss

    def gradients(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        smoothing: float,
        seed: int,
        trace: Trace | None = None,
    ) -> tuple[float, Tensors | None]:
        """Return the mean loss of a mini-batch on a whole network, and its gradients.

        Parameters
        ----------
        images : torch.Tensor
            float32, shape (B, C, H, W).
        labels : torch.Tensor
            int64, shape (B,).
        smoothing : float
            `OptimizerConfig.label_smoothing`.
        seed : int
            Seed of dropout.
        trace : Trace | None
            Takes the factors of linear layers, if given.

        Returns
        -------
        tuple[float, dict[str, torch.Tensor] | None]
            The mean cross-entropy; the gradient by name of every parameter that the
            trace does not replace, None if the loss is not finite.
        """
        self._module.train()
        with self._compute(seed):
            with nullcontext() if trace is None else trace.forward(self._module):
                loss = mean_loss(self._run(images), labels, smoothing)
            value = loss.item()
            if not math.isfinite(value):
                return value, None
            names = self._names
            if trace is None:
                found = torch.autograd.grad(loss, [self.tensors[n] for n in names])
            else:
                names = [name for name in names if not trace.replaces(name)]
                wanted = [*(self.tensors[name] for name in names), *trace.edges]
                found = torch.autograd.grad(loss, wanted)
                trace.backward(found[len(names) :])
        return value, dict(zip(names, found, strict=False))

    def evaluate(self, images: torch.Tensor) -> torch.Tensor:
        """Return the output for images in evaluation mode; nothing changes."""
        self._module.eval()
        with torch.no_grad(), self._compute():
            return self._run(images)
