"""The half of one client: how it is received, stepped, and sent."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from flwr.app import ArrayRecord, RecordDict

from masksl.compress import Compressor, decode_set
from masksl.methods.client import MODEL, Client, Place, place_of
from masksl.methods.split import SplitConfig
from masksl.methods.split.coding import (
    RATE,
    REMAINDER,
    SHARED,
    ChangeCoder,
    apply,
    digest_of_half,
)
from masksl.methods.split.messages import BUFFER, OPTIMIZER, UPDATE
from masksl.runtime import messages
from masksl.runtime.compressors import EXACT, compressor_of
from masksl.settings import Settings, read
from masksl.training.network import LocalNetwork
from masksl.training.optimizer import STEP, OptimizerConfig
from masksl.training.tensors import Tensors, copies, group, grouped

BUFFERS = "half.buffers"
"""Group of a client's own buffers, if its half is stepped with all others."""

AVERAGED = "half.averaged"
"""Group of the averaged buffers that an evaluation takes, likewise."""


class ClientHalf(Protocol):
    """The half of one client while it answers one message."""

    def receive(self, content: RecordDict) -> None:
        """Bring the half up to date with what a message has."""

    def network(self, *, evaluated: bool = False) -> LocalNetwork:
        """Return the half with its tensors; buffers, which a pass changes, are copies.

        Parameters
        ----------
        evaluated : bool
            Whether it is for an evaluation.
        """

    def joins(self, reply: RecordDict) -> None:
        """Add to the first reply of a round what its copy is compared by."""

    def trained(
        self, network: LocalNetwork, gradients: Tensors, content: RecordDict
    ) -> RecordDict:
        """Step the half or not, and return what goes up.

        Parameters
        ----------
        network : LocalNetwork
            The half after its backward pass.
        gradients : dict[str, torch.Tensor]
            Gradients of its parameters.
        content : RecordDict
            The message with the place of the step.
        """


def half_of(client: Client) -> ClientHalf:
    """Return the half of a client."""
    sync = _sync(client)
    if sync == "never" or _compressor(client.setup.settings) == EXACT:
        return ExactHalf(client, sync)
    return SteppedHalf(client) if sync == "step" else AveragedHalf(client)


def own_state(settings: Settings) -> Collection[str]:
    """Return the names of what only the client knows."""
    sync = settings["client_sync"]
    coded = sync != "never" and _compressor(settings) != EXACT
    if sync == "step":  # the half and its optimiser are the server's
        return (REMAINDER, BUFFERS) if coded else ()
    names = list(read(OptimizerConfig, settings, "optimizer").states)
    if sync == "never":
        return [*names, MODEL]
    return [*names, REMAINDER] if coded else names


def _compressor(settings: Settings) -> Compressor:
    return compressor_of(settings, "model_compressor")


def _sync(client: Client) -> str:
    config = client.setup.config
    assert isinstance(config, SplitConfig)
    return config.client_sync


@dataclass(frozen=True)
class ExactHalf:
    """A half that travels exactly, or not at all.

    Parameters
    ----------
    client : Client
        The client.
    sync : str
        ``client_sync``. Under ``step`` the clients of a process share the tensors.
    """

    client: Client
    sync: str

    def receive(self, content: RecordDict) -> None:
        """Take the half of a message, if it has one."""
        self.client.receive(content, shared=self.sync == "step")

    def network(self, *, evaluated: bool = False) -> LocalNetwork:
        """Return the half."""
        del evaluated
        return self.client.network(shared=self.sync == "step")

    def joins(self, reply: RecordDict) -> None:
        """Add nothing."""

    def trained(
        self, network: LocalNetwork, gradients: Tensors, content: RecordDict
    ) -> RecordDict:
        """Send gradients up, or step the half and send it up at the end of a round."""
        client, place = self.client, messages.place_of(content)
        sent: Tensors | None = None
        if self.sync == "step":
            sent = gradients | network.buffers
            client.state.pop(MODEL, None)  # the next message brings a new one
        else:
            with client.watch("compute"):
                network.step(gradients, client.setup.optimizer, place["lr"])
            client.remember(network)
            if self.sync == "round" and place["last"]:
                sent = network.tensors
        reply = RecordDict()
        if sent is not None:
            with client.watch("codec"):
                reply[messages.MODEL] = messages.model_record(sent)
        return reply


# --- halves whose changes travel compressed -------------------------------------------


class _Applied(NamedTuple):
    """A change of the shared half, for the other clients of the process.

    Parameters
    ----------
    record : ArrayRecord
        The record that brought it.
    before : dict[str, torch.Tensor]
        Parameters before it, and what the optimiser remembered, by ``group/name``.
    after : dict[str, torch.Tensor]
        The parameters after it.
    states : dict[str, dict[str, torch.Tensor]]
        What the optimiser remembers after it.
    buffers : dict[str, torch.Tensor]
        The buffers that came with it.
    """

    record: ArrayRecord
    before: Tensors
    after: Tensors
    states: dict[str, Tensors]
    buffers: Tensors


@dataclass
class _Cache:
    """What the clients of a process need not compute again; it changes no result."""

    coder: ChangeCoder
    last: _Applied | None = None


@dataclass(frozen=True)
class _CodedHalf:
    """What both kinds of halves have whose changes travel compressed."""

    client: Client

    @property
    def own(self) -> Tensors:
        """The parameters that the client shares with all others."""
        state, initial = self.client.state, self.client.setup.initial
        own = state[SHARED] if SHARED in state else initial
        return {name: own[name] for name in self._names}

    @property
    def states(self) -> dict[str, Tensors]:
        """What the shared optimiser remembers."""
        return {}

    @property
    def optimizer(self) -> OptimizerConfig | None:
        """The optimiser that changes are the gradients of, None if differences."""
        return None

    @property
    def _names(self) -> list[str]:
        return [name for name, _ in self.client.setup.module.named_parameters()]

    @property
    def _initial_buffers(self) -> Tensors:
        names = set(self._names)
        return {n: t for n, t in self.client.setup.initial.items() if n not in names}

    @property
    def _cache(self) -> _Cache:
        setup = self.client.setup
        if setup.caches.method is None:
            setup.caches.method = _Cache(ChangeCoder(_compressor(setup.settings)))
        cache: _Cache = setup.caches.method
        return cache

    def joins(self, reply: RecordDict) -> None:
        """Add the digest of the shared half."""
        digest = digest_of_half(self.own, self.states)
        reply[messages.DIGEST] = messages.digest_record(digest)

    def _applied(self, content: RecordDict, buffers: Tensors) -> _Applied | None:
        """Return the change of a message, None if it has none.

        Parameters
        ----------
        content : RecordDict
            Content of the message.
        buffers : dict[str, torch.Tensor]
            Buffers like those that come with a change.
        """
        record = messages.arrays_of(content, UPDATE)
        if record is None:
            return None
        before = grouped({SHARED: self.own} | self.states)
        found = self._cache.last
        if found is None or found.record is not record or not _same(found, before):
            own = self.own
            sent = decode_set(messages.set_of(content, UPDATE), own | buffers)
            changes = {name: sent[name] for name in own}
            rate = float(messages.place_of(content)[RATE])
            after, states = apply(own, changes, self.states, self.optimizer, rate)
            came = {name: sent[name] for name in buffers}
            found = _Applied(record, before, after, states, came)
            self._cache.last = found
        return found

    def _sent(
        self, change: Tensors, buffers: Tensors, place: Place, dense: int
    ) -> RecordDict:
        """Encode a change, remember what it loses, and return what goes up."""
        client = self.client
        with client.watch("codec"):
            remainder = client.state.get(REMAINDER, {})
            seed = client.seed("compress.model", place)
            coded = self._cache.coder.encode(change, remainder, buffers, seed=seed)
            client.state[REMAINDER] = coded.remainder
            return RecordDict({UPDATE: messages.set_record(coded.data, dense)})


def _same(found: _Applied, before: Tensors) -> bool:
    """Return whether a change was applied to the same tensors."""
    return found.before.keys() == before.keys() and all(
        own is before[name] or torch.equal(own, before[name])
        for name, own in found.before.items()
    )


@dataclass(frozen=True)
class AveragedHalf(_CodedHalf):
    """A half that steps by itself; differences travel once a round, and buffers."""

    def receive(self, content: RecordDict) -> None:
        """Begin anew from the shared half, if a message changes it."""
        client = self.client
        with client.watch("codec"):
            whole = messages.model_of(content, client.setup.initial)
            if whole is None:
                moved = self._applied(content, self._initial_buffers)
                if moved is None:
                    return
                whole = moved.after | moved.buffers
            client.state[SHARED] = {name: whole[name] for name in self._names}
            client.state[MODEL] = copies(whole)

    def network(self, *, evaluated: bool = False) -> LocalNetwork:
        """Return the half."""
        del evaluated
        return self.client.network()

    def trained(
        self, network: LocalNetwork, gradients: Tensors, content: RecordDict
    ) -> RecordDict:
        """Step the half; at the end of a round send up how it has changed."""
        client, place = self.client, messages.place_of(content)
        with client.watch("compute"):
            network.step(gradients, client.setup.optimizer, place["lr"])
        client.remember(network)
        if not place["last"]:
            return RecordDict()
        own = {n: network.tensors[n].detach() - t for n, t in self.own.items()}
        dense = messages.dense_bytes(network.tensors)
        return self._sent(own, network.buffers, place_of(content), dense)


@dataclass(frozen=True)
class SteppedHalf(_CodedHalf):
    """A half that all clients and the server step alike; gradients travel.

    Buffers are the client's own. They travel for evaluations alone.
    """

    @property
    def states(self) -> dict[str, Tensors]:
        """What the shared optimiser remembers."""
        names, state = self.optimizer.states, self.client.state
        return {name: state[name] for name in names if name in state}

    @property
    def optimizer(self) -> OptimizerConfig:
        """The optimiser of all."""
        return self.client.setup.optimizer

    def receive(self, content: RecordDict) -> None:
        """Step the half by what a message has, or take it in full."""
        client, state = self.client, self.client.state
        with client.watch("codec"):
            own = messages.model_of(content, self.own)
            moved = self._applied(content, {}) if own is None else None
            if moved is not None:
                own, states = moved.after, moved.states
            else:
                states = self._remembered(content)
            averaged = messages.model_of(content, self._initial_buffers, BUFFER)
        if own is not None:
            state[SHARED] = own
            for name in self.optimizer.states:
                state.pop(name, None)
            for name, tensors in states.items():
                state[name] = tensors
        if averaged is not None:
            state[AVERAGED] = averaged

    def _remembered(self, content: RecordDict) -> dict[str, Tensors]:
        """Return what the optimiser remembers, of a message with the half in full."""
        like: dict[str, Tensors] = {}
        for name in self.optimizer.states:
            scalar = {n: torch.tensor(0.0) for n in self._names}
            like[name] = scalar if name == STEP else self.own
        found = messages.model_of(content, grouped(like), OPTIMIZER)
        return {} if found is None else {name: group(found, name) for name in like}

    def network(self, *, evaluated: bool = False) -> LocalNetwork:
        """Return the half, with averaged buffers for an evaluation."""
        setup, state = self.client.setup, self.client.state
        buffers: Mapping[str, torch.Tensor] = state.get(BUFFERS, self._initial_buffers)
        if evaluated:
            buffers = state.get(AVERAGED, buffers)
        tensors = {n: tensor.detach() for n, tensor in self.own.items()}
        tensors |= copies(buffers)
        return LocalNetwork(setup.module, tensors, {}, setup.threads, setup.compute)

    def trained(
        self, network: LocalNetwork, gradients: Tensors, content: RecordDict
    ) -> RecordDict:
        """Send the gradients up; the step comes with the next message."""
        if network.buffers:
            self.client.state[BUFFERS] = network.buffers
        dense = messages.dense_bytes(gradients)
        return self._sent(gradients, {}, place_of(content), dense)

    def send_buffers(self) -> RecordDict:
        """Return the client's own buffers."""
        initial = self._initial_buffers
        own = self.client.state.get(BUFFERS, initial)
        buffers = {name: own[name] for name in initial}  # as restored, in any order
        return RecordDict({BUFFER: messages.model_record(buffers)})
