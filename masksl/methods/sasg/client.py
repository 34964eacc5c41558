"""The client side of SASG: a worker."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from flwr.app import RecordDict
from torch import nn

from masksl.compress import Compressor, FrameError, NotFiniteError
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
from masksl.methods.sasg.vectors import Layout, Vector, squared_norm, total_of
from masksl.runtime import messages
from masksl.runtime.compressors import EXACT
from masksl.settings import Settings
from masksl.training.network import LocalNetwork
from masksl.training.tensors import Tensors, copies

# Groups of a worker's state. Those of one tensor have it under the name `FLAT`.
WEIGHTS = "weights"  # w, which the workers of a process share
REFERENCE = "reference"  # w as it was at the last upload, likewise
MEMORY = "memory"  # what compression has lost so far
SKIPS = "skips"  # number of skipped iterations, from the last upload on
BUFFER_STATE = "buffers"  # BatchNorm statistics by name
OWN = "own"  # under `relay`: its upload of the last iteration
VECTORS = "vectors"  # under `relay`: the last uploads of all workers, see `join`
FLAT = "flat"


class _Step(NamedTuple):
    """A step of w that a relay brought, for the other workers of the process."""

    run_id: int
    iteration: int
    before: torch.Tensor
    after: torch.Tensor
    vectors: Tensors


@dataclass
class _Shared:
    """What the workers of a process share under one configuration.

    It changes no result: whoever lacks a part of it computes it again.
    """

    layout: Layout
    compressor: Compressor
    initial: torch.Tensor
    received: tuple[object, torch.Tensor] | None = None  # a record, what it decodes to
    uploads: dict[int, tuple[bytes, Vector]] = field(default_factory=dict)
    step: _Step | None = None


def gradient(client: Client, content: RecordDict) -> RecordDict:
    """Answer `train.gradient`: upload what the gradient makes of w, or skip."""
    config, shared, state = _config(client), _shared(client), client.state
    place = messages.place_of(content)
    with client.watch("codec"):
        weights = _receive(client, content, place["iteration"] - 1)
        threshold = threshold_of(content)
    with client.watch("compute"):
        pass_ = _Pass(client, content)
        loss, fresh, buffers = pass_.gradient(weights)
        skips = _skips(client)
        skipped = False
        if threshold is not None and skips <= config.delay:
            _, before, _ = pass_.gradient(state[REFERENCE][FLAT])
            skipped = squared_norm(fresh - before) <= threshold
    if buffers:
        state[BUFFER_STATE] = buffers
    reply = RecordDict()
    if skipped:
        reply[SKIP] = skip_record()
        _set_skips(client, skips + 1)
    else:
        with client.watch("codec"):
            data = _upload(client, content, place["lr"] * fresh)
        reply[UPDATE] = messages.set_record(data, 4 * shared.layout.elements)
        if config.rule:
            state[REFERENCE] = {FLAT: weights}
            _set_skips(client, int(threshold is not None))
    reply[messages.METRICS] = client.metrics(loss=loss, samples=pass_.samples)
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

    def gradient(self, weights: torch.Tensor) -> tuple[float, torch.Tensor, Tensors]:
        """Return the loss, its gradient (d,), and the buffers after the pass.

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
        )
        if gradients is None:
            raise NotFiniteError("loss not finite")
        return loss, layout.flat(gradients), network.buffers


# --- what goes up ---------------------------------------------------------------------


def _upload(client: Client, content: RecordDict, change: torch.Tensor) -> bytes:
    """Encode a change of w, and remember what the encoding loses."""
    config, shared, state = _config(client), _shared(client), client.state
    layout = shared.layout
    if config.is_sparse and MEMORY in state:
        change = change + state[MEMORY][FLAT]
    seed = client.seed("compress", place_of(content))
    data = layout.encode(change, shared.compressor, seed=seed)
    if config.is_sparse:
        vector = layout.decode_vector(data, shared.compressor)
        state[MEMORY] = {FLAT: vector.taken_from(change)}
        if config.way_down == "relay":
            shared.uploads[client.number] = data, vector
            state[OWN] = {"values": vector.values}
            if vector.positions is not None:
                state[OWN] = {"positions": vector.positions, "values": vector.values}
    return data


# --- what comes down ------------------------------------------------------------------


def _receive(client: Client, content: RecordDict, iteration: int) -> torch.Tensor:
    """Bring w up to date with what a message has; return it.

    Parameters
    ----------
    client : Client
        The worker.
    content : RecordDict
        Content of the message.
    iteration : int
        The iteration whose uploads changed w.
    """
    shared, state = _shared(client), client.state
    weights = state[WEIGHTS][FLAT] if WEIGHTS in state else shared.initial
    records = content.array_records
    if messages.MODEL in records:
        weights = _decoded(client, content, messages.MODEL)
    elif SENDERS in records:
        weights = _relay(client, content, weights, iteration)
    elif UPDATE in records:
        weights = weights - _decoded(client, content, UPDATE)
    else:
        return weights
    state[WEIGHTS] = {FLAT: weights}
    return weights


def _decoded(client: Client, content: RecordDict, kind: str) -> torch.Tensor:
    """Return the vector of a record, which is decoded once in a process."""
    shared, record = _shared(client), content.array_records[kind]
    if shared.received is None or shared.received[0] is not record:
        data = messages.set_of(content, kind)
        shared.received = record, shared.layout.decode(data)
    return shared.received[1]


def _relay(
    client: Client, content: RecordDict, weights: torch.Tensor, iteration: int
) -> torch.Tensor:
    """Return w after an iteration whose new uploads came; remember all uploads."""
    shared, state = _shared(client), client.state
    run_id, step = client.context.run_id, shared.step
    known = step is not None and step[:2] == (run_id, iteration)
    if not (known and _same(step.before, weights)):  # type: ignore[union-attr]
        vectors = split(
            state.get(VECTORS, {}), client.run.clients, shared.layout.device
        )
        for number, data in relayed(content, client.run.clients).items():
            sent, vector = shared.uploads.get(number, (b"", None))
            if sent is not data or vector is None:
                vector = shared.layout.decode_vector(data, shared.compressor)
            vectors[number] = vector
        if OWN in state:
            own = state[OWN]
            vectors[client.number] = Vector(own.get("positions"), own["values"])
        after = weights - total_of(vectors, shared.layout)
        step = _Step(run_id, iteration, weights, after, join(vectors))
        shared.step = step
    assert step is not None
    state.pop(OWN, None)
    state[VECTORS] = step.vectors
    return step.after


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or torch.equal(one, other)


# --- state ----------------------------------------------------------------------------


def join(vectors: Sequence[Vector]) -> Tensors:
    """Return the uploads of all workers as three tensors.

    Returns
    -------
    dict[str, torch.Tensor]
        ``positions`` and ``values`` of all, one worker after the other, and the
        ``sizes``, int64, shape (M,).
    """
    sizes = torch.tensor([len(vector.values) for vector in vectors])
    positions = [_positions(vector) for vector in vectors]
    values = [vector.values for vector in vectors]
    joined = {"positions": torch.cat(positions), "values": torch.cat(values)}
    return joined | {"sizes": sizes}


def split(tensors: Tensors, workers: int, device: torch.device) -> list[Vector]:
    """Return the uploads of what `join` returned, empty ones of nothing."""
    if not tensors:
        none = torch.empty(0, dtype=torch.int64, device=device)
        return [Vector(none, none.float())] * workers
    sizes = tensors["sizes"].tolist()
    if len(sizes) != workers:
        raise FrameError(f"uploads of {len(sizes)} workers, expected {workers}")
    parts = tensors["positions"].split(sizes), tensors["values"].split(sizes)
    return [Vector(*pair) for pair in zip(*parts, strict=True)]


def _positions(vector: Vector) -> torch.Tensor:
    if vector.positions is not None:
        return vector.positions
    return torch.arange(len(vector.values), device=vector.values.device)


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
