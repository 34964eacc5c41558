"""The client side of a method, and what every method's client has."""

import os
import platform
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from torch import nn

from masksl import model
from masksl.compress import Compressor, FrameError, NotFiniteError
from masksl.dataset import (
    Dataset,
    DatasetConfig,
    DatasetError,
    batches,
    load,
    partition,
    shards,
)
from masksl.methods import method_config, method_of
from masksl.methods.network import initial_units
from masksl.runtime import messages
from masksl.runtime.compressors import compressor_of, warm_up
from masksl.settings import (
    RunConfig,
    Section,
    Settings,
    ThreadsConfig,
    Value,
    import_plugins,
    read,
)
from masksl.training.compute import ComputeConfig, resolve_device
from masksl.training.network import LocalNetwork
from masksl.training.optimizer import STEP, OptimizerConfig
from masksl.training.schedule import Rates, ScheduleConfig
from masksl.training.tensors import Tensors, tensors_of
from masksl.utils import Stopwatch, derive_seed

MODEL = "model"

Handler = Callable[["Client", RecordDict], RecordDict]

# Errors of a handler that end the run, see `Client.survives`. Others leave the client
# out.
FATAL = (DatasetError, FrameError, NotFiniteError)


@dataclass(frozen=True)
class ClientMethod:
    """The client side of a method.

    Parameters
    ----------
    module : Callable[[Settings, list[nn.Module]], nn.Module]
        Returns the client's part of a network, given the settings and all units.
    handlers : Mapping[str, Callable[[Client, RecordDict], RecordDict]]
        By message type, the function that answers a message.
    own_state : Callable[[Settings], Collection[str]]
        Returns the names of the state that only the client knows under these settings.
        It changes only in training exchanges of rounds in which the client takes part.
        If there are none, clients are not asked for their state.
    """

    module: Callable[[Settings, model.Units], nn.Module]
    handlers: Mapping[str, Handler]
    own_state: Callable[[Settings], Collection[str]] = lambda settings: ()


class Place(NamedTuple):
    """A step of a run."""

    round: int
    step: int


class _Shuffled(NamedTuple):
    """The shuffled samples of a client in one pass, and the bounds of its batches."""

    round: int
    epoch: int
    order: torch.Tensor
    bounds: list[tuple[int, int]]


@dataclass
class _Caches:
    """What the clients of a process need not compute again; it changes no result."""

    shuffled: dict[int, _Shuffled] = field(default_factory=dict)
    received: tuple[ArrayRecord, Tensors] | None = None  # the last decoded model
    method: Any = None  # what the method itself keeps


@dataclass(frozen=True)
class Setup:
    """What all clients of a run share, made once in a process."""

    settings: Settings
    run: RunConfig
    config: Section
    method: ClientMethod
    threads: int
    dataset: DatasetConfig
    compressor: Compressor
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    compute: ComputeConfig
    module: nn.Module
    initial: Tensors
    device: torch.device
    caches: _Caches

    @classmethod
    def of(cls, settings: Settings) -> "Setup":
        """Return the setup of settings, the same object for the same settings."""
        return _setup(tuple(sorted(settings.items())))

    def rates(self, round_: int, rounds: int) -> Rates:
        """Return the learning rates of a round, of so many rounds."""
        return Rates(self.schedule, self.optimizer.lr, round_, rounds)


@lru_cache(maxsize=2)
def _setup(items: tuple[tuple[str, Value], ...]) -> Setup:
    settings = dict(items)
    import_plugins(settings)
    run = RunConfig.of(settings)
    dataset = read(DatasetConfig, settings, "dataset")
    device = resolve_device(run.client_device)
    method: ClientMethod = method_of(settings).client_side
    module = method.module(settings, initial_units(settings)).to(device)
    warm_up(settings)
    return Setup(
        settings=settings,
        run=run,
        config=method_config(settings),
        method=method,
        threads=read(ThreadsConfig, settings, "threads").client,
        dataset=dataset,
        compressor=compressor_of(settings, "compressor"),
        optimizer=read(OptimizerConfig, settings, "optimizer"),
        schedule=read(ScheduleConfig, settings, "schedule"),
        compute=read(ComputeConfig, settings, "compute"),
        module=module,
        initial=tensors_of(module),
        device=device,
        caches=_Caches(),
    )


class ClientState(MutableMapping[str, Tensors]):
    """The state of a client: tensors by name, in groups by name.

    The tensors are live: they become bytes only when Flower serialises the state.

    Parameters
    ----------
    records : RecordDict
        ``context.state``.
    device : torch.device
        Device of the tensors.
    """

    def __init__(self, records: RecordDict, device: torch.device) -> None:
        self._records = records
        self._device = device

    def __getitem__(self, name: str) -> Tensors:
        """Return the tensors of a group; `KeyError` if there is none."""
        record = messages.arrays_of(self._records, name)
        if record is None:
            raise KeyError(name)
        return messages.state_tensors(record, self._device)

    def __setitem__(self, name: str, tensors: Tensors) -> None:
        """Set a group; the tensors are held, not copied."""
        self._records[name] = messages.state_record(tensors)

    def __delitem__(self, name: str) -> None:
        """Remove a group."""
        del self._records[name]

    def __contains__(self, name: object) -> bool:
        """Return whether there is a group."""
        return messages.arrays_of(self._records, str(name)) is not None

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the groups."""
        return iter([name for name in self._records if name in self])

    def __len__(self) -> int:
        """Return the number of groups."""
        return len(list(iter(self)))


@dataclass(frozen=True)
class Client:
    """One client while it answers one message.

    What it must remember is in its context. What can be computed again from the
    settings is shared with the other clients of the process.
    """

    setup: Setup
    context: Context
    number: int
    watch: Stopwatch = field(default_factory=Stopwatch)

    @classmethod
    def of(cls, context: Context) -> "Client":
        """Return the client of a context that holds the settings."""
        record: Any = context.state[messages.SETTINGS]
        settings: Settings = dict(record)
        if "dataset-root" in context.node_config:  # its data are on its own machine
            settings["dataset.root"] = str(context.node_config["dataset-root"])
        return cls(Setup.of(settings), context, _number(context))

    @property
    def run(self) -> RunConfig:
        """The run-wide configuration."""
        return self.setup.run

    @property
    def state(self) -> ClientState:
        """Its state, as tensors by name in groups by name."""
        return ClientState(self.context.state, self.setup.device)

    def seed(self, purpose: str, place: Place) -> int:
        """Derive the seed of one purpose at one step of the run."""
        return derive_seed(
            self.run.seed,
            purpose,
            client=self.number,
            round=place.round,
            step=place.step,
        )

    # --- data -------------------------------------------------------------------------

    def data(self) -> Dataset:
        """Return the data set, which all clients of the process share."""
        return load(self.setup.dataset, str(self.setup.device))

    def train_part(self) -> torch.Tensor:
        """Return the indices of its training samples."""
        run = self.run
        return partition(self.setup.dataset, run.clients, run.seed)[self.number]

    def test_part(self) -> torch.Tensor:
        """Return the indices of its shard of the test set."""
        samples = len(self.data().test.labels)
        return shards(samples, self.run.clients, self.run.seed)[self.number]

    def train_steps(self) -> int:
        """Return the mini-batches of a pass over its training samples."""
        return len(batches(len(self.train_part()), self.run.batch_size))

    def train_batch(self, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the augmented mini-batch of a step: images and labels.

        Steps beyond a pass over its samples belong to further passes, which are
        shuffled anew.
        """
        epoch, step = divmod(place.step, self.train_steps())
        shuffled = self._shuffle(place.round, epoch)
        start, end = shuffled.bounds[step]
        generator = torch.Generator().manual_seed(self.seed("augment", place))
        return self.data().train_batch(shuffled.order[start:end], generator)

    def _shuffle(self, round_: int, epoch: int) -> _Shuffled:
        """Return its samples in the order of a pass of a round, drawn once."""
        cache = self.setup.caches.shuffled
        shuffled = cache.get(self.number)
        if shuffled is None or (shuffled.round, shuffled.epoch) != (round_, epoch):
            part = self.train_part()
            seed = self.seed("shuffle", Place(round_, epoch))
            generator = torch.Generator().manual_seed(seed)
            order = part[torch.randperm(len(part), generator=generator)]
            bounds = batches(len(part), self.run.batch_size)
            shuffled = _Shuffled(round_, epoch, order, bounds)
            cache[self.number] = shuffled
        return shuffled

    def test_batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a batch of its shard of the test set: images and labels."""
        size = self.run.eval_batch_size
        return self.data().test_batch(self.test_part()[step * size :][:size])

    # --- model ------------------------------------------------------------------------

    def receive(self, content: RecordDict, *, shared: bool = False) -> None:
        """Store the model of a message in the state, if the message has one.

        Parameters
        ----------
        content : RecordDict
            Content of the message.
        shared : bool
            Whether clients of this process share the tensors; they must not be stepped
            then. By default the client gets copies.
        """
        record = messages.arrays_of(content, messages.MODEL)
        if record is None:
            return
        caches = self.setup.caches
        with self.watch("codec"):
            if caches.received is None or caches.received[0] is not record:
                decoded = messages.model_of(content, self.setup.initial) or {}
                caches.received = record, decoded
        self.state[MODEL] = _own(caches.received[1], shared)

    def network(self, *, shared: bool = False) -> LocalNetwork:
        """Return its network with the tensors of its state, else the initial ones.

        Buffers, which a forward pass changes, are copies, so that the pass can be
        repeated from the state.

        Parameters
        ----------
        shared : bool
            Whether initial tensors are shared, see `receive`.
        """
        setup, state = self.setup, self.state
        if MODEL in state:
            tensors = state[MODEL]
        else:
            tensors = _own(setup.initial, shared)
        names = [name for name in setup.optimizer.states if name in state]
        optimizer_state = {name: state[name] for name in names}
        network = LocalNetwork(
            setup.module, tensors, optimizer_state, setup.threads, setup.compute
        )
        tensors |= {name: buffer.clone() for name, buffer in network.buffers.items()}
        return network

    def remember(self, network: LocalNetwork) -> None:
        """Store a network and what its optimiser remembers in the state."""
        self.state[MODEL] = network.tensors
        for name, tensors in network.optimizer_state.items():
            self.state[name] = tensors

    # --- messages ---------------------------------------------------------------------

    def greet(self, content: RecordDict) -> RecordDict:
        """Answer `query.hello`: partition and number of samples.

        What was saved for the client may come with the greeting.
        """
        metrics: dict[str, Any] = {"partition": self.number}
        if self.number < self.run.clients:
            try:
                metrics["train_samples"] = len(self.train_part())
                metrics["test_samples"] = len(self.test_part())
                self.restore(content)
            except (DatasetError, FrameError) as error:
                failure = messages.failure(error)
                failure[messages.METRICS] = self.metrics(partition=self.number)
                return failure
        return RecordDict({messages.METRICS: MetricRecord(metrics)})

    def save(self) -> RecordDict:
        """Answer `query.save`: the state that only this client knows."""
        names = self.setup.method.own_state(self.setup.settings)
        records = self.context.state
        return RecordDict({name: records[name] for name in names if name in records})

    def restore(self, content: RecordDict) -> None:
        """Restore the model and what `save` returned from a greeting."""
        self.receive(content)
        for name, record in content.array_records.items():
            if name.startswith(messages.STATE):
                tensors = messages.state_tensors(record, self.setup.device)
                own = _own(tensors, shared=False)
                group = name.removeprefix(messages.STATE)
                if group in (MODEL, *self.setup.optimizer.states):
                    _check_shapes(group, own, self.setup.initial)
                self.state[group] = own

    def survives(self, error: Exception) -> bool:
        """Return whether the run goes on without this client after a fatal error."""
        data = self.setup.dataset
        return isinstance(error, DatasetError) and data.unreadable == "leave_out"

    def metrics(self, **more: Any) -> MetricRecord:
        """Return measurements: the process, its seconds by activity, and others."""
        seconds = {f"{name}_seconds": s for name, s in self.watch.seconds.items()}
        return MetricRecord({messages.WORKER: _worker()} | seconds | more)


def place_of(content: RecordDict) -> Place:
    """Return round and step of a message."""
    place = messages.place_of(content)
    return Place(place["round"], place["step"])


def _check_shapes(group: str, tensors: Tensors, like: Tensors) -> None:
    """Raise `FrameError` unless tensors are of the network of the client."""
    for name, tensor in tensors.items():
        if name in like:
            expected = torch.Size() if group == STEP else like[name].shape
            if tensor.shape == expected:
                continue
        raise FrameError(
            f"saved {group} does not fit the network: {name} of shape "
            f"{tuple(tensor.shape)}"
        )


def _own(tensors: Tensors, shared: bool) -> Tensors:
    """Return the tensors themselves if they are shared, else copies."""
    if shared:
        return dict(tensors)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _number(context: Context) -> int:
    """Return the partition of the node, 0-based."""
    return int(context.node_config["partition-id"])


@lru_cache(maxsize=1)
def _worker() -> int:
    """Return a number that identifies this process among all machines."""
    return zlib.crc32(f"{platform.node()}/{os.getpid()}".encode())
