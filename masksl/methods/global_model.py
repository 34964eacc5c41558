"""A model that the server keeps for all clients."""

from dataclasses import dataclass, field

import torch
from flwr.app import ArrayRecord, RecordDict

from masksl.runtime import messages
from masksl.runtime.clients import ClientInfo
from masksl.training.optimizer import OptimizerConfig, apply_gradients
from masksl.training.tensors import Tensors, copies, group


@dataclass
class GlobalModel:
    """A model that the server keeps for all clients.

    Parameters
    ----------
    tensors : dict[str, torch.Tensor]
        Parameters and buffers by name.
    parameters : list[str]
        Names of the parameters.
    optimizer_state : dict[str, dict[str, torch.Tensor]]
        By name, e.g. ``momentum``, a tensor for each parameter.
    version : int
        Increases whenever the tensors change. Clients begin with version 0.
    """

    tensors: Tensors
    parameters: list[str]
    optimizer_state: dict[str, Tensors] = field(
        default_factory=lambda: {"momentum": {}}
    )
    version: int = 0
    _encoded: tuple[int, ArrayRecord] | None = None

    def record(self) -> ArrayRecord:
        """Encode the model, once a version."""
        if self._encoded is None or self._encoded[0] != self.version:
            self._encoded = self.version, messages.model_record(self.tensors)
        return self._encoded[1]

    def attach(self, content: RecordDict, client: ClientInfo) -> None:
        """Add the model to a message unless the client has this version."""
        if client.version != self.version:
            content[messages.MODEL] = self.record()
            client.version = self.version

    def step(self, gradients: Tensors, config: OptimizerConfig, lr: float) -> None:
        """Take one optimiser step; the version increases.

        Parameters
        ----------
        gradients : dict[str, torch.Tensor]
            A gradient for each parameter. Buffers may be among them; these replace the
            model's.
        config : OptimizerConfig
            The optimiser.
        lr : float
            Learning rate of this round.
        """
        rest = dict(gradients)
        own = {name: rest.pop(name) for name in self.parameters}
        self.tensors |= rest
        momentum = self.optimizer_state["momentum"]
        apply_gradients(self.tensors, own, momentum, config, lr)
        self.version += 1

    def replace(self, tensors: Tensors) -> None:
        """Replace all tensors; the version increases."""
        self.tensors = tensors
        self.version += 1

    def state(self, name: str = "model") -> dict[str, Tensors]:
        """Return copies of all tensors by group: ``name`` and ``name.<state>``."""
        states = {f"{name}.{key}": copies(t) for key, t in self.optimizer_state.items()}
        return {name: copies(self.tensors)} | states

    def load(self, tensors: Tensors, version: int, name: str = "model") -> None:
        """Load copies of what `state` returned, named ``group/name``."""
        loaded = group(tensors, name)
        self.tensors = {
            key: loaded[key].to(tensor.device, copy=True)
            for key, tensor in self.tensors.items()
        }
        device = next(iter(self.tensors.values())).device
        for key in self.optimizer_state:
            members = group(tensors, f"{name}.{key}")
            self.optimizer_state[key] = _on(device, members)
        self.version = version
        self._encoded = None


def _on(device: torch.device, tensors: Tensors) -> Tensors:
    return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
