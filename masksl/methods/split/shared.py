"""The client half of all clients, as the server keeps it if it travels compressed."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from flwr.app import ArrayRecord, RecordDict

from masksl.compress import decode_set
from masksl.methods.global_model import GlobalModel
from masksl.methods.split.coding import (
    RATE,
    REMAINDER,
    SHARED,
    ChangeCoder,
    apply,
    digest_of_half,
)
from masksl.methods.split.messages import OPTIMIZER, UPDATE
from masksl.runtime import messages
from masksl.runtime.clients import ClientInfo
from masksl.training.optimizer import OptimizerConfig
from masksl.training.tensors import Tensors, copies, grouped

_CHANGE, _BYTES = "change", "bytes"


@dataclass
class SharedHalf(GlobalModel):
    """The client half of all clients, as the server keeps it; it travels exactly.

    Parameters
    ----------
    optimizer : OptimizerConfig | None
        Given if clients send gradients (``client_sync=step``). None if they send halves
        (``round``).
    """

    optimizer: OptimizerConfig | None = field(kw_only=True)

    @property
    def own(self) -> Tensors:
        """The parameters by name."""
        return {name: self.tensors[name] for name in self.parameters}

    @property
    def buffers(self) -> Tensors:
        """The buffers by name."""
        own = self.own
        return {n: tensor for n, tensor in self.tensors.items() if n not in own}

    def equals(self, content: RecordDict) -> bool:
        """Return whether the first reply of a round shows that a copy is equal."""
        del content
        return True

    def change_of(self, content: RecordDict) -> Tensors | None:
        """Decode what a client sent up, None if it sent nothing.

        Raises
        ------
        FrameError
            If the frame-set is broken.
        """
        return messages.model_of(content, self.tensors)

    def move(self, mean: Tensors, *, rate: float, seed: int) -> None:
        """Move by the average of what clients sent up.

        Parameters
        ----------
        mean : dict[str, torch.Tensor]
            What `change_of` returned, averaged.
        rate : float
            The learning rate.
        seed : int
            Seed of random draws.
        """
        del seed
        if self.optimizer is None:
            self.replace(mean)
        else:
            self.step(mean, self.optimizer, rate)

    @property
    def keeps_buffers_apart(self) -> bool:
        """Whether buffers are the clients' own, and travel for evaluations alone."""
        return False

    def client_records(self) -> Mapping[str, ArrayRecord]:
        """Return the state of a client that has this version, as far as it is
        shared."""
        return {messages.MODEL: self.record()}


@dataclass
class CodedHalf(SharedHalf):
    """A client half whose changes travel compressed.

    The server applies what the clients decode, so that all copies stay equal bit for
    bit. A client that has the version before gets the change. Any other gets the half
    in full. Under ``client_sync=step`` changes are gradients, and every copy takes the
    step. Under ``round`` they are differences.

    Parameters
    ----------
    coder : ChangeCoder
        Codes the changes.
    """

    coder: ChangeCoder = field(kw_only=True)
    remainder: Tensors = field(default_factory=dict, init=False)
    _change: tuple[bytes, float] | None = field(default=None, init=False)  # and rate
    _changed: tuple[int, ArrayRecord] | None = field(default=None, init=False)

    def equals(self, content: RecordDict) -> bool:
        """Return whether the first reply of a round shows that a copy is equal.

        Processors may differ in what both sides draw from the seed.
        """
        own = digest_of_half(self.own, self.optimizer_state)
        return messages.digest_of(content) == own

    # --- what comes up ----------------------------------------------------------------

    def change_of(self, content: RecordDict) -> Tensors | None:
        """Decode what a client sent up, None if it sent nothing."""
        if messages.arrays_of(content, UPDATE) is None:
            return None
        return decode_set(messages.set_of(content, UPDATE), self._sent_like)

    @property
    def _sent_like(self) -> Tensors:
        """Tensors like those that travel: buffers go with differences alone."""
        return self.tensors if self.optimizer is None else self.own

    def move(self, mean: Tensors, *, rate: float, seed: int) -> None:
        """Code the average of what clients sent up, and apply what it decodes to.

        Raises
        ------
        NotFiniteError
            If it has values that are not finite.
        """
        change = {name: mean[name] for name in self.parameters}
        buffers = {name: t for name, t in mean.items() if name not in change}
        coded = self.coder.encode(change, self.remainder, buffers, seed=seed)
        sent = {name: coded.sent[name] for name in change}
        own, self.optimizer_state = apply(
            self.own, sent, self.optimizer_state, self.optimizer, rate
        )
        self.tensors = self.tensors | own | {name: coded.sent[name] for name in buffers}
        self.remainder, self._change = coded.remainder, (coded.data, rate)
        self.version += 1

    # --- what comes down --------------------------------------------------------------

    def attach(self, content: RecordDict, client: ClientInfo) -> None:
        """Add to a message what its client needs to have this version."""
        if client.version == self.version:
            return
        if self._change is not None and client.version == self.version - 1:
            content[UPDATE] = self._change_record()
            messages.add_to_place(content, {RATE: self._change[1]})
        else:
            content[messages.MODEL] = self.record()
            if self.optimizer_state:
                states = {
                    name: {key: state[key] for key in self.parameters}
                    for name, state in self.optimizer_state.items()
                }
                content[OPTIMIZER] = messages.model_record(grouped(states))
        client.version = self.version

    def record(self) -> ArrayRecord:
        """Encode what a client gets in full; buffers only if they come with changes."""
        return messages.model_record(self._sent_like)

    def _change_record(self) -> ArrayRecord:
        """Return the record of the last change, the same one for all clients."""
        assert self._change is not None
        if self._changed is None or self._changed[0] != self.version:
            dense = messages.dense_bytes(self._sent_like)
            self._changed = self.version, messages.set_record(self._change[0], dense)
        return self._changed[1]

    @property
    def keeps_buffers_apart(self) -> bool:
        """Whether buffers are the clients' own, and travel for evaluations alone."""
        return self.optimizer is not None and bool(self.buffers)

    # --- state ------------------------------------------------------------------------

    def state(self, name: str = "model") -> dict[str, Tensors]:
        """Return copies of all tensors by group, with what the last change lost."""
        groups = super().state(name) | {f"{name}.{REMAINDER}": copies(self.remainder)}
        if self._change is not None:
            data, rate = self._change
            groups[f"{name}.{_CHANGE}"] = {
                _BYTES: torch.from_numpy(np.frombuffer(data, np.uint8).copy()),
                RATE: torch.tensor(rate, dtype=torch.float64),
            }
        return groups

    def load(self, tensors: Tensors, version: int, name: str = "model") -> None:
        """Load copies of what `state` returned."""
        super().load(tensors, version, name)
        self.remainder = self.optimizer_state.pop(REMAINDER, {})
        change = self.optimizer_state.pop(_CHANGE, None)
        self._change = self._changed = None
        if change is not None:
            data = change[_BYTES].cpu().numpy().tobytes()
            self._change = data, float(change[RATE])

    def client_records(self) -> Mapping[str, ArrayRecord]:
        """Return the state of a client that has this version, as far as it is
        shared."""
        groups = {SHARED: self.own} | self.optimizer_state
        if self.optimizer is None:
            groups[messages.MODEL] = self.tensors
        return {
            messages.STATE + name: messages.state_record(tensors)
            for name, tensors in groups.items()
        }
