"""Flower ClientApp: messages to and from a `ClientHalf`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from masksl import messages, model, seeds
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
from masksl.halves import ClientHalf, OptimizerConfig, Tensors, resolve_device
from masksl.settings import RunConfig, Settings, Value, import_plugins, section

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


# Graphs between forward and backward by (run, client): a cache. A backward that does
# not find its own rebuilds it from the state.
_graphs: dict[tuple[int, int], tuple[_Place, ClientHalf]] = {}


@dataclass(frozen=True)
class Setup:
    """What all clients of a run have in common, made once in a process."""

    run: RunConfig
    threads: int
    dataset: DatasetConfig
    compressor: Compressor
    optimizer: OptimizerConfig
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
    name, seed = str(settings["model.name"]), seeds.derive(run.seed, "model")
    device = resolve_device(run.client_device)
    units = model.build(name, spec.classes, spec.channels, seed=seed)
    cut = model.resolve_cut(name, run.cut)
    module = model.split(units, cut)[0].to(device)
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return Setup(
        run=run,
        threads=int(settings["threads.client"]),
        dataset=dataset,
        compressor=make(**section(settings, "compressor")),
        optimizer=OptimizerConfig(**section(settings, "optimizer")),
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

    @classmethod
    def of(cls, context: Context) -> "Client":
        """Return the client of a context that has met its settings."""
        settings: Any = context.state.config_records[messages.SETTINGS]
        return cls(Setup.of(dict(settings)), context, _number(context))

    @property
    def run(self) -> RunConfig:
        """The run that it takes part in."""
        return self.setup.run

    def seed(self, purpose: str, place: _Place) -> int:
        """Return the seed of one purpose at one place of the run."""
        return seeds.derive(
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
        """Take the half that came with a message, if one did."""
        tensors = messages.model_of(content, self.setup.initial)
        if tensors is not None:
            self.context.state[_HALF] = messages.state_record(tensors)

    def half(self) -> ClientHalf:
        """Return its half as its state has it, the initial one where it has none."""
        state, device = self.context.state.array_records, self.setup.device
        if _HALF in state:
            tensors = messages.state_tensors(state[_HALF], device)
        else:
            tensors = {name: t.clone() for name, t in self.setup.initial.items()}
        momentum = messages.state_tensors(state.get(_MOMENTUM, {}), device)
        return ClientHalf(self.setup.module, tensors, momentum, self.setup.threads)

    def remember(self, half: ClientHalf, *, before_forward: bool = False) -> None:
        """Put a half into the state.

        Before a forward pass the buffers that it will change are put there as copies,
        so that the pass can be done again from the state.
        """
        tensors = half.tensors
        if before_forward:
            copies = {name: buffer.clone() for name, buffer in half.buffers.items()}
            tensors = tensors | copies
        self.context.state[_HALF] = messages.state_record(tensors)
        if half.momentum:
            self.context.state[_MOMENTUM] = messages.state_record(half.momentum)

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
        """Cache a graph; all clients move together, so those of other steps go."""
        for key, (kept, _) in list(_graphs.items()):
            if key[0] != self.context.run_id or kept != place:
                del _graphs[key]
        _graphs[self.context.run_id, self.number] = place, half

    def take_graph(self, place: _Place) -> ClientHalf | None:
        """Return the half whose graph belongs to a step, None if it is not here."""
        kept, half = _graphs.pop((self.context.run_id, self.number), (None, None))
        return half if kept == place else None


def forward(client: Client, content: RecordDict) -> RecordDict:
    """Answer `train.forward`: the activation of the next mini-batch."""
    place = _place(content)
    client.receive(content)
    half = client.half()
    client.remember(half, before_forward=True)
    activation, labels = client.run_forward(half, place)
    client.keep_graph(half, place)
    frame = client.setup.compressor.encode(
        activation, seed=client.seed("compress", place), training=True
    )
    if client.run.gradient_positions == "kept":
        client.context.state[_SENT] = messages.frame_record(frame)
    reply = _activation(client, frame, labels)
    if place.step == 0:
        error = relative_error(activation, decode(frame, device=activation.device))
        reply[messages.FIGURES] = MetricRecord({"relative_error": error})
    return reply


def backward(client: Client, content: RecordDict) -> RecordDict:
    """Answer `train.backward`: back-propagate, and step or hand over."""
    place = _place(content)
    half = client.take_graph(place)
    rebuilt = half is None
    if half is None:
        half = client.half()
        client.run_forward(half, place)
    frame = messages.frame_of(content, messages.GRADIENT)
    gradient = decode(frame, device=client.setup.device)
    gradients = half.backward(gradient, client.kept())
    reply = RecordDict({messages.FIGURES: MetricRecord({"rebuilt": int(rebuilt)})})
    if client.run.client_sync == "step":
        reply[messages.MODEL] = messages.model_record(gradients | half.buffers)
        client.forget()
        return reply
    told: Mapping[str, Any] = content.config_records[messages.PLACE]
    half.step(gradients, client.setup.optimizer, told["lr"])
    client.remember(half)
    if client.run.client_sync == "round" and told["last"]:
        reply[messages.MODEL] = messages.model_record(half.tensors)
    return reply


def evaluate(client: Client, content: RecordDict) -> RecordDict:
    """Answer `evaluate.forward`: the activation of a batch of test images."""
    place = _place(content)
    client.receive(content)
    images, labels = client.test_batch(place.step)
    activation = client.half().evaluate(images)
    frame = client.setup.compressor.encode(
        activation, seed=client.seed("compress.test", place), training=False
    )
    return _activation(client, frame, labels)


@app.query("hello")
def on_hello(message: Message, context: Context) -> Message:
    """Take the settings; tell the partition and how much data it has."""
    context.state.clear()
    context.state[messages.SETTINGS] = message.content[messages.SETTINGS]
    figures: dict[str, Any] = {"partition": _number(context)}
    client = Client.of(context)
    if client.number < client.run.clients:
        try:
            train, test = len(client.train_part()), len(client.test_part())
        except DatasetError as error:
            return Message(messages.failure(error), reply_to=message)
        figures["train_samples"] = train
        figures["train_steps"] = len(batches(train, client.run.batch_size))
        figures["test_steps"] = -(-test // client.run.eval_batch_size)
    content = RecordDict({messages.FIGURES: MetricRecord(figures)})
    return Message(content, reply_to=message)


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
