"""A model that the server keeps for all clients."""

from dataclasses import dataclass, field

import numpy as np
import torch
from flwr.app import ArrayRecord, RecordDict

from masksl.compress import Compressor, decode_set, encode_set
from masksl.runtime import messages
from masksl.runtime.clients import ClientInfo
from masksl.training.optimizer import OptimizerConfig, apply_gradients
from masksl.training.tensors import Tensors, copies, group

_SENT, _BYTES = "sent", "bytes"  # group and name of a compressed model in a state


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
        By name, e.g. ``momentum``, a tensor for each parameter; see `apply_gradients`.
    version : int
        Increases whenever the tensors change. Clients begin with version 0.
    compressor : Compressor | None
        Compresses the parameters of every version that `replace` makes, and the version
        is what the clients decode. None sends them exactly.
    """

    tensors: Tensors
    parameters: list[str]
    optimizer_state: dict[str, Tensors] = field(default_factory=dict)
    version: int = 0
    compressor: Compressor | None = None
    _encoded: tuple[int, ArrayRecord] | None = None
    _sent: bytes | None = None  # the current version, if it is compressed

    def record(self) -> ArrayRecord:
        """Encode the model, once a version."""
        if self._encoded is None or self._encoded[0] != self.version:
            if self._sent is None:
                record = messages.model_record(self.tensors)
            else:
                dense = messages.dense_bytes(self.tensors)
                record = messages.set_record(self._sent, dense)
            self._encoded = self.version, record
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
        apply_gradients(self.tensors, own, self.optimizer_state, config, lr)
        self.version += 1

    def replace(self, tensors: Tensors, *, seed: int = 0) -> None:
        """Replace all tensors; the version increases.

        With a compressor the model becomes at once what its frame-set decodes to, so
        that server and clients have the same tensors bit for bit, sent or not.

        Parameters
        ----------
        tensors : dict[str, torch.Tensor]
            The new tensors, in the order of the old ones.
        seed : int
            Seed of the compressor's draws.

        Raises
        ------
        NotFiniteError
            If values are to be compressed that are not finite.
        """
        if self.compressor is not None:
            exact = tensors.keys() - set(self.parameters)
            self._sent = encode_set(tensors, self.compressor, exact=exact, seed=seed)
            tensors = decode_set(self._sent, tensors)
        self.tensors = tensors
        self.version += 1

    def state(self, name: str = "model") -> dict[str, Tensors]:
        """Return copies of all tensors by group: ``name`` and ``name.<state>``.

        A compressed version is among them as it was sent, because encoding what was
        decoded need not give the same bytes.
        """
        states = {f"{name}.{key}": copies(t) for key, t in self.optimizer_state.items()}
        if self._sent is not None:
            sent = torch.from_numpy(np.frombuffer(self._sent, np.uint8).copy())
            states[f"{name}.{_SENT}"] = {_BYTES: sent}
        return {name: copies(self.tensors)} | states

    def load(self, tensors: Tensors, version: int, name: str = "model") -> None:
        """Load copies of what `state` returned, named ``group/name``."""
        loaded = group(tensors, name)
        self.tensors = {
            key: loaded[key].to(tensor.device, copy=True)
            for key, tensor in self.tensors.items()
        }
        device = next(iter(self.tensors.values())).device
        groups = {key.partition("/")[0] for key in tensors}
        states = {
            key.removeprefix(f"{name}."): _on(device, group(tensors, key))
            for key in sorted(groups)
            if key.startswith(f"{name}.")
        }
        sent = states.pop(_SENT, None)
        self._sent = None if sent is None else sent[_BYTES].cpu().numpy().tobytes()
        self.optimizer_state = states
        self.version = version
        self._encoded = None


def _on(device: torch.device, tensors: Tensors) -> Tensors:
    return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
