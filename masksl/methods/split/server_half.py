"""The server half of a cut network: forward, backward, step."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from masksl.training.compute import FLOAT32, ComputeConfig, compute
from masksl.training.optimizer import OptimizerConfig, apply_gradients
from masksl.training.score import Score, mean_loss, score
from masksl.training.tensors import Tensors, copies
from masksl.utils import MANY_CLIENTS, trim_heap


class ServerHalf:
    """The last units of a network and their optimiser.

    A training step is `forward`, then `backward`.

    Parameters
    ----------
    module : nn.Sequential
        The units, on the device of their training.
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
        compute_config: ComputeConfig = FLOAT32,
    ) -> None:
        if compute_config.channels_last:  # typed without memory_format alone
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module = module
        self._call = torch.compile(module) if compute_config.compile else module
        self._parameters = dict(module.named_parameters())
        self._optimizer = config
        self._optimizer_state: dict[str, Tensors] = {}
        self._threads = threads
        self._config = compute_config
        self.device = next(module.parameters()).device
        self._batch: torch.Tensor | None = None
        self._logits: torch.Tensor | None = None
        self._sizes: list[int] = []

    def forward(self, activations: list[torch.Tensor], *, seed: int) -> torch.Tensor:
        """Return the logits of one global mini-batch and keep the graph.

        Parameters
        ----------
        activations : list[torch.Tensor]
            Decoded activation of each client, shape (n_i, ...). The list is emptied, so
            that their memory is free during the step.
        seed : int
            Seed of dropout.

        Returns
        -------
        torch.Tensor
            float32, shape (n, classes), detached.
        """
        self.module.train()
        self._sizes = [len(activation) for activation in activations]
        many = len(activations) > MANY_CLIENTS
        config = self._config
        if many and self.device.type == "cpu":
            # The batch exceeds the caches of the CPU, and this layout is faster then.
            config = ComputeConfig(channels_last=True)
        batch = config.laid_out(torch.cat(activations)).requires_grad_(True)  # (n, ...)
        activations.clear()
        if many:
            trim_heap()
        with self._compute(seed):
            self._logits = self._run(batch)
        self._batch = batch
        return self._logits.detach()

    def backward(
        self, labels: torch.Tensor, *, lr: float
    ) -> tuple[float, list[torch.Tensor]]:
        """Take an optimiser step on the mean loss of the last forward pass.

        Parameters
        ----------
        labels : torch.Tensor
            int64, shape (n,), on the device of this half.
        lr : float
            Learning rate of this round.

        Returns
        -------
        tuple[float, list[torch.Tensor]]
            The mean cross-entropy over all n samples, and the gradient of each client:
            its slice of the gradient of that mean, times n / n_i.
        """
        batch, logits = self._batch, self._logits
        if batch is None or logits is None:
            raise RuntimeError("backward without a forward before it")
        self._batch = self._logits = None
        parameters, state = self._parameters, self._optimizer_state
        with self._compute():
            loss = mean_loss(logits, labels, self._optimizer.label_smoothing)
            gradient, *own = torch.autograd.grad(loss, [batch, *parameters.values()])
            gradients = dict(zip(parameters, own, strict=True))
            apply_gradients(parameters, gradients, state, self._optimizer, lr)
        slices = list(gradient.split(self._sizes))
        for part, size in zip(slices, self._sizes, strict=True):
            if size != len(batch):
                part.mul_(len(batch) / size)
        return loss.item(), slices

    def step(
        self,
        activations: list[torch.Tensor],
        labels: Sequence[torch.Tensor],
        *,
        lr: float,
        seed: int,
    ) -> tuple[float, list[torch.Tensor]]:
        """Train on one global mini-batch: `forward`, then `backward`."""
        self.forward(activations, seed=seed)
        return self.backward(torch.cat(list(labels)), lr=lr)

    def _run(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the logits of a batch of activations."""
        batch = self._config.laid_out(batch)
        with self._config.autocast(self.device):
            return self._call(batch).float()

    def _compute(self, seed: int = 0) -> AbstractContextManager[None]:
        return compute(self._threads, self.device, seed, self._config)

    def state(self) -> tuple[Tensors, dict[str, Tensors]]:
        """Return copies of its parameters and buffers, and of what its optimiser
        remembers, by name."""
        state = self._optimizer_state
        groups = {name: copies(state.get(name, {})) for name in self._optimizer.states}
        return copies(self.module.state_dict()), groups

    def load(self, tensors: Tensors, state: Mapping[str, Tensors]) -> None:
        """Load copies of what `state` returned, from any device."""
        self.module.load_state_dict(tensors)
        self._optimizer_state = {
            group: {name: t.to(self.device, copy=True) for name, t in members.items()}
            for group, members in state.items()
        }

    def evaluate(self, activation: torch.Tensor, labels: torch.Tensor) -> Score:
        """Score a batch of decoded activations against its labels."""
        self.module.eval()
        with torch.no_grad(), self._compute():
            return score(self._run(activation), labels)
