"""The client side of SASG: a worker."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from flwr.app import RecordDict
from torch import nn

from masksl.compress import Compressor, NotFiniteError
from masksl.methods.client import Client, ClientMethod, place_of
from masksl.methods.sasg import SasgConfig
from masksl.methods.sasg.messages import (
    BUFFER,
    BUFFERS,
    SENDERS,
    SKIP,
    TRAIN,
    UPDATE,
    relayed,
    skip_record,
    threshold_of,
)
from masksl.methods.sasg.selection import NONZERO
from masksl.methods.sasg.vectors import (
    Layout,
    Vector,
    join,
    split,
    squared_norm,
    total_of,
)
from masksl.runtime import messages
from masksl.runtime.compressors import EXACT
from masksl.settings import Settings
from masksl.training.factors import Trace
from masksl.training.network import LocalNetwork
from masksl.training.tensors import Tensors, copies, digest

# Groups of a worker's state. Those of one tensor have it under the name `FLAT`.
WEIGHTS = "weights"  # w, which the workers of a process share
REFERENCE = "reference"  # w as it was at the last upload, likewise
MEMORY = "memory"  # what compression has lost so far
SKIPS = "skips"  # number of skipped iterations, from the last upload on
BUFFER_STATE = "buffers"  # BatchNorm statistics by name
OWN = "own"  # under `relay`: its upload of the last iteration, a frame-set
VECTORS = "vectors"  # under `relay`: the last uploads of all workers, see `join`
FLAT, FRAME = "flat", "frame"


class _Step(NamedTuple):
    """A step of w that a relay brought, for the other workers of the process.

    Parameters
    ----------
    frames : dict[int, bytes]
        The new uploads that made it, by worker.
    before, after : torch.Tensor
        w before and after it.
    vectors : dict[str, torch.Tensor]
        The last uploads of all workers after it, see `join`.
    """

    frames: dict[int, bytes]
    before: torch.Tensor
    after: torch.Tensor
    vectors: Tensors


class _Moved(NamedTuple):
    """A step of w that a sum brought, for the other workers of the process.

    Parameters
    ----------
    record : object
        The record with the sum.
    before, after : torch.Tensor
        w before and after it.
    """

    record: object
    before: torch.Tensor
    after: torch.Tensor


@dataclass
class _Shared:
    """What the workers of a process share under one configuration.

    It changes no result: whoever lacks a part of it computes it again.
    """

    layout: Layout
    compressor: Compressor
    initial: torch.Tensor
    model: tuple[object, torch.Tensor] | None = None  # a record, what it decodes to
    moved: _Moved | None = None
    uploads: dict[int, tuple[bytes, Vector]] = field(default_factory=dict)
    step: _Step | None = None

    def vector(self, number: int, data: bytes) -> Vector:
        """Decode the upload of a worker, unless it is the one decoded last."""
        known = self.uploads.get(number)
        if known is None or known[0] != data:
            known = data, self.layout.decode_vector(data, self.compressor)
            self.uploads[number] = known
        return known[1]


def gradient(client: Client, content: RecordDict) -> RecordDict:
    """Answer `train.gradient`: upload what the gradient makes of w, or skip."""
    config, shared, state = _config(client), _shared(client), client.state
    place = messages.place_of(content)
    with client.watch("codec"):
        weights = _receive(client, content)
        threshold = threshold_of(content)
    with client.watch("compute"):
        pass_, skips = _Pass(client, content), _skips(client)
        skipped = False
        if threshold is None or skips > config.delay:
            fresh = pass_.gradient(weights, None)
        else:
            fresh = pass_.gradient(weights, Trace())
            skipped = pass_.distance(fresh, state[REFERENCE][FLAT]) <= threshold
    if fresh.buffers:
        state[BUFFER_STATE] = fresh.buffers
    reply = RecordDict()
    if place["step"] == 0:
        reply[messages.DIGEST] = messages.digest_record(digest([weights]))
    if skipped:
        reply[SKIP] = skip_record()
        _set_skips(client, skips + 1)
    else:
        with client.watch("codec"):
            data = _upload(client, content, place["lr"], fresh.tensors)
        reply[UPDATE] = messages.set_record(data, 4 * shared.layout.elements)
        if config.rule:
            state[REFERENCE] = {FLAT: weights}
            _set_skips(client, int(threshold is not None))
    reply[messages.METRICS] = client.metrics(loss=fresh.loss, samples=pass_.samples)
    return reply


def send_buffers(client: Client, content: RecordDict) -> RecordDict:
    """Answer `evaluate.buffers`: the worker's BatchNorm statistics."""
    del content
    reply = RecordDict({BUFFER: messages.model_record(_buffers(client))})
    reply[messages.METRICS] = client.metrics()
    return reply


def own_state(settings: Settings) -> Sequence[str]:
    """Return the names of what only the worker knows."""
    if settings["method.upload"] == "sparse":
        return (MEMORY, BUFFER_STATE)
    return (BUFFER_STATE,)


CLIENT = ClientMethod(
    lambda settings, units: nn.Sequential(*units),
    {TRAIN: gradient, BUFFERS: send_buffers},
    own_state,
)


# --- gradients ------------------------------------------------------------------------


class _Gradient(NamedTuple):
    """What a pass computed.

    Parameters
    ----------
    loss : float
        The mean loss of the mini-batch.
    tensors : dict[str, torch.Tensor]
        Its gradient by name, without what a trace replaces.
    buffers : dict[str, torch.Tensor]
        The buffers after the pass.
    trace : Trace | None
        Factors of the gradient.
    """

    loss: float
    tensors: Tensors
    buffers: Tensors
    trace: Trace | None


class _Pass:
    """Gradients of the mean loss of one mini-batch, at any weights.

    Every pass begins with the worker's buffers as they are now.

    Parameters
    ----------
    client : Client
        The worker.
    content : RecordDict
        The message that names the mini-batch.
    """

    def __init__(self, client: Client, content: RecordDict) -> None:
        self._client = client
        self._place = place_of(content)
        self._batch = client.train_batch(self._place)

    @property
    def samples(self) -> int:
        """Samples of the mini-batch."""
        return len(self._batch[1])

    def gradient(self, weights: torch.Tensor, trace: Trace | None) -> _Gradient:
        """Compute the gradient at some weights, and trace it if asked to.

        Raises
        ------
        NotFiniteError
            If the loss is not finite.
        """
        client, setup = self._client, self._client.setup
        layout = _shared(client).layout
        tensors = layout.named(weights.detach()) | copies(_buffers(client))
        network = LocalNetwork(setup.module, tensors, {}, setup.threads, setup.compute)
        loss, gradients = network.gradients(
            *self._batch,
            smoothing=setup.optimizer.label_smoothing,
            seed=client.seed("dropout.client", self._place),
            trace=trace,
        )
        if gradients is None:
            raise NotFiniteError("loss not finite")
        return _Gradient(loss, gradients, network.buffers, trace)

    def distance(self, gradient_: _Gradient, weights: torch.Tensor) -> float:
        """Return the squared distance of a gradient from that at other weights.

        In float64 over all parameters; of linear layers by their factors where these
        are smaller.
        """
        other = self.gradient(weights, Trace(gradient_.trace))
        assert other.trace is not None
        return other.trace.distance + sum(
            squared_norm(own.reshape(-1), gradient_.tensors[name].reshape(-1))
            for name, own in other.tensors.items()
        )


# --- what goes up ---------------------------------------------------------------------


def _upload(
    client: Client, content: RecordDict, rate: float, gradient_: Tensors
) -> bytes:
    """Encode a change of w, and remember what the encoding loses."""
    config, shared, state = _config(client), _shared(client), client.state
    layout = shared.layout
    change = layout.scaled(gradient_, rate)
    if config.is_sparse and MEMORY in state:
        change += state[MEMORY][FLAT]
    seed = client.seed("compress", place_of(content))
    if not config.is_sparse:
        return layout.encode(change, shared.compressor, seed=seed)
    data, vector = layout.compress(change, shared.compressor, seed=seed)
    vector.take_from(change)
    state[MEMORY] = {FLAT: change}
    if config.way_down == "relay":
        shared.uploads[client.number] = data, vector
        frame = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        state[OWN] = {FRAME: frame}
    return data


# --- what comes down ------------------------------------------------------------------


def _receive(client: Client, content: RecordDict) -> torch.Tensor:
    """Bring w up to date with what a message has; return it."""
    shared, state = _shared(client), client.state
    weights = state[WEIGHTS][FLAT] if WEIGHTS in state else shared.initial
    before = weights
    if SENDERS in content:
        weights = _relay(client, content, weights)
    elif UPDATE in content:
        weights = _moved(client, content, weights)
    if messages.MODEL in content:
        weights = _model(client, content)
    if weights is not before:
        state[WEIGHTS] = {FLAT: weights}
    return weights


def _model(client: Client, content: RecordDict) -> torch.Tensor:
    """Return the w of a message, which is decoded once in a process."""
    shared, record = _shared(client), content[messages.MODEL]
    if shared.model is None or shared.model[0] is not record:
        data = messages.set_of(content)
        shared.model = record, shared.layout.decode(data, EXACT)
    return shared.model[1]


def _moved(client: Client, content: RecordDict, weights: torch.Tensor) -> torch.Tensor:
    """Return w after an iteration whose sum came, computed once in a process."""
    shared, record = _shared(client), content[UPDATE]
    step = shared.moved
    if step is None or step.record is not record or not _same(step.before, weights):
        data = messages.set_of(content, UPDATE)
        after = weights.clone()
        shared.layout.decode_vector(data, NONZERO).take_from(after)
        step = shared.moved = _Moved(record, weights, after)
    return step.after


def _relay(client: Client, content: RecordDict, weights: torch.Tensor) -> torch.Tensor:
    """Return w after an iteration whose new uploads came; remember all uploads."""
    shared, state = _shared(client), client.state
    frames = relayed(content, client.run.clients)
    if OWN in state:
        frames[client.number] = state[OWN][FRAME].numpy().tobytes()
    step = shared.step
    if step is None or step.frames != frames or not _same(step.before, weights):
        vectors = split(state.get(VECTORS, {}), client.run.clients, weights.device)
        for number, data in frames.items():
            vectors[number] = shared.vector(number, data)
        after = weights - total_of(vectors, shared.layout)
        step = shared.step = _Step(frames, weights, after, join(vectors))
    state.pop(OWN, None)
    state[VECTORS] = step.vectors
    return step.after


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or torch.equal(one, other)


# --- state ----------------------------------------------------------------------------


def _skips(client: Client) -> int:
    state = client.state
    return int(state[SKIPS]["number"]) if SKIPS in state else 0


def _set_skips(client: Client, number: int) -> None:
    client.state[SKIPS] = {"number": torch.tensor(number)}


def _buffers(client: Client) -> Tensors:
    """Return the worker's buffers in the network's order, {} if it has none."""
    shapes, initial = _shared(client).layout.shapes, client.setup.initial
    names = [name for name in initial if name not in shapes]
    own = client.state.get(BUFFER_STATE, initial)
    return {name: own[name] for name in names}


def _config(client: Client) -> SasgConfig:
    config = client.setup.config
    assert isinstance(config, SasgConfig)
    return config


def _shared(client: Client) -> _Shared:
    """Return what the workers of the process share."""
    caches, setup = client.setup.caches, client.setup
    if caches.method is None:
        layout = Layout.of(setup.module)
        sparse = _config(client).is_sparse
        compressor = setup.compressor if sparse else EXACT
        caches.method = _Shared(layout, compressor, layout.flat(setup.initial))
    shared: _Shared = caches.method
    return shared
