"""Flower ClientApp: messages to and from a `ClientHalf`."""

import math
import os
import platform
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from masksl import model
from masksl.compress import (
    Compressor,
    FrameError,
    NotFiniteError,
    decode,
    kept_positions,
    make,
)
from masksl.dataset import (
    DATASETS,
    Dataset,
    DatasetConfig,
    DatasetError,
    batches,
    load,
    partition,
    shards,
)
from masksl.halves import (
    ClientHalf,
    ComputeConfig,
    OptimizerConfig,
    Tensors,
    resolve_device,
)
from masksl.runtime import messages
from masksl.settings import (
    RunConfig,
    Settings,
    Value,
    import_plugins,
    parse,
    section,
)
from masksl.utils import Stopwatch, derive_seed

app = ClientApp()

Handler = Callable[["Client", RecordDict], RecordDict]

_HALF = "half"
_MOMENTUM = "momentum"
_SENT = "sent"  # the frame of a step whose gradient comes at its positions alone


@dataclass(frozen=True)
class _Place:
    """Where in a run a graph belongs."""

    round: int
    step: int


@dataclass
class _Graphs:
    """Graphs between forward and backward, of one step of one run: a cache.

    A backward that does not find its own rebuilds it from the state.
    """

    step: tuple[int, _Place] | None = None
    halves: dict[int, ClientHalf] = field(default_factory=dict)


@dataclass
class _Received:
    """The last half that came, decoded: clients that get the same share it."""

    record: ArrayRecord | None = None
    tensors: Tensors = field(default_factory=dict)


_graphs = _Graphs()
_received = _Received()


@dataclass(frozen=True)
class Setup:
    """What all clients of a run have in common, made once in a process."""

    run: RunConfig
    threads: int
    graphs: float
    dataset: DatasetConfig
    compressor: Compressor
    optimizer: OptimizerConfig
    compute: ComputeConfig
    module: nn.Module
    initial: Tensors
    device: torch.device

    @classmethod
    def of(cls, settings: Settings) -> "Setup":
        """Return the setup of the settings, the one made before where there is."""
        return _setup(tuple(sorted(settings.items())))


@lru_cache(maxsize=2)
def _setup(items: tuple[tuple[str, Value], ...]) -> Setup:
    settings = dict(items)
    import_plugins(settings)
    run = RunConfig.of(settings)
    dataset = DatasetConfig(**section(settings, "dataset"))
    spec = DATASETS[dataset.name]
    name, seed = str(settings["model.name"]), derive_seed(run.seed, "model")
    device = resolve_device(run.client_device)
    units = model.build(name, spec.classes, spec.channels, seed=seed)
    cut = model.resolve_cut(name, run.cut)
    module = model.split(units, cut)[0].to(device)
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return Setup(
        run=run,
        threads=int(settings["threads.client"]),
        graphs=parse(settings.get("engine.clients_in_flight", "null")) or math.inf,
        dataset=dataset,
        compressor=make(**section(settings, "compressor")),
        optimizer=OptimizerConfig(**section(settings, "optimizer")),
        compute=ComputeConfig(**section(settings, "compute")),
        module=module,
        initial={name: tensor.detach() for name, tensor in tensors.items()},
        device=device,
    )


@dataclass(frozen=True)
class Client:
    """One client while it answers one message.

    What it must remember lies in its context; what can be made again from the settings
    is shared with the other clients of the process.
    """

    setup: Setup
    context: Context
    number: int
    watch: Stopwatch = field(default_factory=Stopwatch)

    @classmethod
    def of(cls, context: Context) -> "Client":
        """Return the client of a context that has met its settings."""
        told: Any = context.state.config_records[messages.SETTINGS]
        settings = dict(told)
        if "dataset-root" in context.node_config:  # its data are on its own machine
            settings["dataset.root"] = context.node_config["dataset-root"]
        return cls(Setup.of(settings), context, _number(context))

    @property
    def run(self) -> RunConfig:
        """The run that it takes part in."""
        return self.setup.run

    def seed(self, purpose: str, place: _Place) -> int:
        """Return the seed of one purpose at one place of the run."""
        return derive_seed(
            self.run.seed,
            purpose,
            client=self.number,
            round=place.round,
            step=place.step,
        )

    def train_part(self) -> torch.Tensor:
        """Return the indices of its training samples."""
        run = self.run
        return partition(self.setup.dataset, run.clients, run.seed)[self.number]

    def test_part(self) -> torch.Tensor:
        """Return the indices of its share of the test set."""
        samples = len(self.data().test.labels)
        return shards(samples, self.run.clients, self.run.seed)[self.number]

    def data(self) -> Dataset:
        """Return the data set, which all clients of the process share."""
        return load(self.setup.dataset, str(self.setup.device))

    def train_batch(self, place: _Place) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the augmented mini-batch of a step."""
        part = self.train_part()
        shuffle = replace(place, step=0)
        generator = torch.Generator().manual_seed(self.seed("shuffle", shuffle))
        order = part[torch.randperm(len(part), generator=generator)]
        start, end = batches(len(part), self.run.batch_size)[place.step]
        generator = torch.Generator().manual_seed(self.seed("augment", place))
        return self.data().train_batch(order[start:end], generator)

    def test_batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a batch of its share of the test set."""
        size = self.run.eval_batch_size
        return self.data().test_batch(self.test_part()[step * size :][:size])

    def receive(self, content: RecordDict) -> None:
        """Take the half that came with a message, if one did.

        Where every client steps a half of its own, it gets copies of the parameters.
        """
        with self.watch("codec"):
            tensors = _decoded_model(content, self.setup.initial)
        if tensors is not None:
            self.context.state[_HALF] = messages.state_record(self._own(tensors))

    def half(self) -> ClientHalf:
        """Return its half as its state has it, the initial one where it has none.

        Its buffers, which a forward pass changes, are copies, so that the pass can be
        done again from the state.
        """
        state, device = self.context.state.array_records, self.setup.device
        if _HALF in state:
            tensors = messages.state_tensors(state[_HALF], device)
        else:
            tensors = self._own(self.setup.initial)
        momentum = messages.state_tensors(state.get(_MOMENTUM, {}), device)
        setup = self.setup
        half = ClientHalf(setup.module, tensors, momentum, setup.threads, setup.compute)
        tensors |= {name: buffer.clone() for name, buffer in half.buffers.items()}
        return half

    def _own(self, tensors: Tensors) -> Tensors:
        """Return tensors that this client may change, under ``step`` none."""
        if self.run.client_sync == "step":
            return dict(tensors)
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def remember(self, half: ClientHalf) -> None:
        """Put a half into the state."""
        self.context.state[_HALF] = messages.state_record(half.tensors)
        if half.momentum:
            self.context.state[_MOMENTUM] = messages.state_record(half.momentum)

    def save(self) -> RecordDict:
        """Return what only this client knows of its half."""
        state, saved = self.context.state.array_records, RecordDict()
        kept = {messages.MOMENTUM: _MOMENTUM}
        if self.run.client_sync == "never":
            kept[messages.MODEL] = _HALF
        for kind, name in kept.items():
            if name in state:
                tensors = messages.state_tensors(state[name], self.setup.device)
                saved[kind] = messages.model_record(tensors)
        return saved

    def restore(self, content: RecordDict) -> None:
        """Take back what `save` returned, and the half."""
        self.receive(content)
        names = {name for name, _ in self.setup.module.named_parameters()}
        like = {name: t for name, t in self.setup.initial.items() if name in names}
        momentum = messages.model_of(content, like, messages.MOMENTUM)
        if momentum is not None:
            self.context.state[_MOMENTUM] = messages.state_record(momentum)

    def figures(self, **more: Any) -> MetricRecord:
        """Return measurements: who worked, and for how long on what."""
        told = {f"{part}_seconds": s for part, s in self.watch.seconds.items()}
        return MetricRecord({"worker": _worker()} | told | more)

    def forget(self) -> None:
        """Drop the half from the state: the next message brings a new one."""
        self.context.state.pop(_HALF, None)

    def kept(self) -> torch.Tensor | None:
        """Return where its gradient comes, None if it comes whole."""
        if self.run.gradient_positions == "all":
            return None
        frame = messages.frame_of(self.context.state, _SENT)
        return kept_positions(frame, device=self.setup.device)

    def run_forward(
        self, half: ClientHalf, place: _Place
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the activation and the labels of a step."""
        images, labels = self.train_batch(place)
        seed = self.seed("dropout.client", place)
        return half.forward(images, seed=seed), labels

    def keep_graph(self, half: ClientHalf, place: _Place) -> None:
        """Cache a graph; all clients move together, so those of other steps go.

        Beyond as many as may be in flight in a process none is kept.
        """
        step = (self.context.run_id, place)
        if _graphs.step != step:
            _graphs.step, _graphs.halves = step, {}
        if len(_graphs.halves) < self.setup.graphs:
            _graphs.halves[self.number] = half

    def take_graph(self, place: _Place) -> ClientHalf | None:
        """Return the half whose graph belongs to a step, None if it is not here."""
        if _graphs.step != (self.context.run_id, place):
            return None
        return _graphs.halves.pop(self.number, None)


def forward(client: Client, content: RecordDict) -> RecordDict:
    """Answer `train.forward`: the activation of the next mini-batch."""
    place = _place(content)
    client.receive(content)
    with client.watch("half"):
        half = client.half()
        activation, labels = client.run_forward(half, place)
    client.keep_graph(half, place)
    with client.watch("codec"):
        frame = client.setup.compressor.encode(
            activation, seed=client.seed("compress", place), training=True
        )
    if client.run.gradient_positions == "kept":
        client.context.state[_SENT] = messages.frame_record(frame)
    reply = _activation(client, frame, labels)
    more = {}
    if place.step == 0:
        decoded = decode(frame, device=activation.device)
        more["relative_error"] = relative_error(activation, decoded)
    reply[messages.FIGURES] = client.figures(**more)
    return reply


def backward(client: Client, content: RecordDict) -> RecordDict:
    """Answer `train.backward`: back-propagate, and step or hand over."""
    place = _place(content)
    with client.watch("codec"):
        frame = messages.frame_of(content, messages.GRADIENT)
        gradient = decode(frame, device=client.setup.device)
        kept = client.kept()
    with client.watch("half"):
        half = client.take_graph(place)
        rebuilt = half is None
        if half is None:
            half = client.half()
            client.run_forward(half, place)
        gradients = half.backward(gradient, kept)
    reply = RecordDict()
    told: Mapping[str, Any] = content.config_records[messages.PLACE]
    if client.run.client_sync == "step":
        handed: Tensors | None = gradients | half.buffers
        client.forget()
    else:
        with client.watch("half"):
            half.step(gradients, client.setup.optimizer, told["lr"])
        client.remember(half)
        over = client.run.client_sync == "round" and told["last"]
        handed = half.tensors if over else None
    if handed is not None:
        with client.watch("codec"):
            reply[messages.MODEL] = messages.model_record(handed)
    reply[messages.FIGURES] = client.figures(rebuilt=int(rebuilt))
    return reply


def evaluate(client: Client, content: RecordDict) -> RecordDict:
    """Answer `evaluate.forward`: the activation of a batch of test images."""
    place = _place(content)
    client.receive(content)
    with client.watch("half"):
        images, labels = client.test_batch(place.step)
        activation = client.half().evaluate(images)
    with client.watch("codec"):
        frame = client.setup.compressor.encode(
            activation, seed=client.seed("compress.test", place), training=False
        )
    reply = _activation(client, frame, labels)
    reply[messages.FIGURES] = client.figures()
    return reply


def save(client: Client, content: RecordDict) -> RecordDict:
    """Answer `query.save`: what must be kept for this client."""
    del content
    return client.save()


@app.query("hello")
def on_hello(message: Message, context: Context) -> Message:
    """Take the settings; tell the partition and how much data it has.

    The client begins anew; what was kept for it may come with the settings.
    """
    context.state.clear()
    context.state[messages.SETTINGS] = message.content[messages.SETTINGS]
    figures: dict[str, Any] = {"partition": _number(context)}
    client = Client.of(context)
    if client.number < client.run.clients:
        try:
            train, test = len(client.train_part()), len(client.test_part())
            client.restore(message.content)
        except (DatasetError, FrameError) as error:
            return Message(messages.failure(error), reply_to=message)
        figures["train_samples"] = train
        figures["train_steps"] = len(batches(train, client.run.batch_size))
        figures["test_steps"] = -(-test // client.run.eval_batch_size)
    content = RecordDict({messages.FIGURES: MetricRecord(figures)})
    return Message(content, reply_to=message)


@app.query("save")
def on_save(message: Message, context: Context) -> Message:
    """See `save`."""
    return _answer(save, message, context)


@app.train("forward")
def on_forward(message: Message, context: Context) -> Message:
    """See `forward`."""
    return _answer(forward, message, context)


@app.train("backward")
def on_backward(message: Message, context: Context) -> Message:
    """See `backward`."""
    return _answer(backward, message, context)


@app.evaluate("forward")
def on_evaluate(message: Message, context: Context) -> Message:
    """See `evaluate`."""
    return _answer(evaluate, message, context)


def relative_error(tensor: torch.Tensor, decoded: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of the tensor, 0 for zeros."""
    norm = float(tensor.double().norm())
    return float((decoded.double() - tensor.double()).norm()) / norm if norm else 0.0


def _answer(handler: Handler, message: Message, context: Context) -> Message:
    """Answer a message; what must end the run goes back as the reason."""
    try:
        content = handler(Client.of(context), message.content)
    except (FrameError, NotFiniteError) as error:
        content = messages.failure(error)
    return Message(content, reply_to=message)


@lru_cache(maxsize=1)
def _worker() -> int:
    """Return what tells this process from others, on any machine."""
    return zlib.crc32(f"{platform.node()}/{os.getpid()}".encode())


def _decoded_model(content: RecordDict, like: Tensors) -> Tensors | None:
    """Return the half of a message; do not change it, other clients have it too."""
    record = content.array_records.get(messages.MODEL)
    if record is None:
        return None
    if record is not _received.record:
        _received.tensors = messages.model_of(content, like) or {}
        _received.record = record
    return _received.tensors


def _activation(client: Client, frame: bytes, labels: torch.Tensor) -> RecordDict:
    classes = DATASETS[client.setup.dataset.name].classes
    return RecordDict(
        {
            messages.ACTIVATION: messages.frame_record(frame),
            messages.LABEL: messages.label_record(labels, classes),
        }
    )


def _place(content: RecordDict) -> _Place:
    told: Mapping[str, Any] = content.config_records[messages.PLACE]
    return _Place(told["round"], told["step"])


def _number(context: Context) -> int:
    """Return the partition of the node, 0-based."""
    return int(context.node_config["partition-id"])
