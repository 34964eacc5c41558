"""The client half of all clients, as the server keeps it: exact, or compressed."""

from collections.abc import Callable, Mapping
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

_CHANGE, _BYTES, _BEFORE = "change", "bytes", "before."


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

    def client_records(self, client: ClientInfo) -> Mapping[str, ArrayRecord]:
        """Return the state of a client, as far as it is shared and it was current."""
        if client.version != self.version:
            return {}
        return {messages.MODEL: self.record()}


@dataclass
class CodedSharedHalf(SharedHalf):
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
    _before: dict[str, Tensors] = field(default_factory=dict, init=False)
    _records: dict[str, tuple[int, ArrayRecord]] = field(
        default_factory=dict, init=False
    )

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
        self._before = self._shared_state()
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
            data, rate = self._change
            content[UPDATE] = self._once(
                UPDATE, lambda: messages.set_record(data, self._dense)
            )
            messages.add_to_place(content, {RATE: rate})
        else:
            content[messages.MODEL] = self.record()
            if self.optimizer_state:
                content[OPTIMIZER] = self._once(OPTIMIZER, self._optimizer_record)
        client.version = self.version

    def record(self) -> ArrayRecord:
        """Encode what a client gets in full; buffers only if they come with changes."""
        return self._once(
            messages.MODEL, lambda: messages.model_record(self._sent_like)
        )

    def _optimizer_record(self) -> ArrayRecord:
        assert self.optimizer is not None
        states = {
            name: {key: self.optimizer_state[name][key] for key in self.parameters}
            for name in self.optimizer.states
        }
        return messages.model_record(grouped(states))

    @property
    def _dense(self) -> int:
        return messages.dense_bytes(self._sent_like)

    def _once(self, kind: str, make: Callable[[], ArrayRecord]) -> ArrayRecord:
        """Return the record of a kind, made once a version: the same for all
        clients."""
        known = self._records.get(kind)
        if known is None or known[0] != self.version:
            known = self._records[kind] = self.version, make()
        return known[1]

    @property
    def keeps_buffers_apart(self) -> bool:
        """Whether buffers are the clients' own, and travel for evaluations alone."""
        return self.optimizer is not None and bool(self.buffers)

    # --- state ------------------------------------------------------------------------

    def state(self, name: str = "model") -> dict[str, Tensors]:
        """Return copies of all tensors by group, with the last change and its past."""
        groups = super().state(name) | {f"{name}.{REMAINDER}": copies(self.remainder)}
        before = {f"{name}.{_BEFORE}{k}": copies(t) for k, t in self._before.items()}
        if self._change is not None:
            data, rate = self._change
            groups[f"{name}.{_CHANGE}"] = {
                _BYTES: torch.from_numpy(np.frombuffer(data, np.uint8).copy()),
                RATE: torch.tensor(rate, dtype=torch.float64),
            }
        return groups | before

    def load(self, tensors: Tensors, version: int, name: str = "model") -> None:
        """Load copies of what `state` returned."""
        super().load(tensors, version, name)
        found, self._records = self.optimizer_state, {}
        self.remainder, change = found.pop(REMAINDER, {}), found.pop(_CHANGE, None)
        earlier = [key for key in found if key.startswith(_BEFORE)]
        self._before = {key.removeprefix(_BEFORE): found.pop(key) for key in earlier}
        self._change = None
        if change is not None:
            data = change[_BYTES].cpu().numpy().tobytes()
            self._change = data, float(change[RATE])

    def client_records(self, client: ClientInfo) -> Mapping[str, ArrayRecord]:
        """Return the state of a client that has this version or the one before.

        One without test images gets the last change of a round in the next one.
        """
        groups: dict[str, Tensors] = {}
        if client.version == self.version:
            groups = self._shared_state()
            if self.optimizer is None:
                groups[messages.MODEL] = self.tensors
        elif client.version == self.version - 1:
            groups = self._before
        return {
            messages.STATE + name: messages.state_record(tensors)
            for name, tensors in groups.items()
        }

    def _shared_state(self) -> dict[str, Tensors]:
        """Return what every client holds, by the groups of its state."""
        return {SHARED: self.own} | self.optimizer_state
