"""SplitLearning: what is asked of the clients and what becomes of their answers."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from masksl import messages, seeds
from masksl.compress import (
    Compressor,
    FrameError,
    NotFiniteError,
    decode,
    kept_positions,
)
from masksl.halves import (
    OptimizerConfig,
    ScheduleConfig,
    Score,
    ServerHalf,
    Tensors,
    apply_gradients,
    average,
)
from masksl.ledger import Entry, Ledger, compression_factor
from masksl.messages import RunError
from masksl.settings import RunConfig, Settings

TRAINING = "training"
EVALUATION = "evaluation"


@dataclass
class ClientInfo:
    """What the server knows of a client.

    Parameters
    ----------
    number : int
        Its partition.
    node_id : int
        Flower's id of its node, random in every run.
    train_samples, train_steps, test_steps : int
        Its training samples, the steps that they make, the test batches of its shard.
    version : int
        Which version of the shared client half it has; 0 is the initial one.
    """

    number: int
    node_id: int
    train_samples: int
    train_steps: int
    test_steps: int
    version: int = 0


@dataclass
class SharedHalf:
    """The one client half that `client_sync` step and round keep.

    Parameters
    ----------
    tensors : dict[str, torch.Tensor]
        Parameters and buffers.
    parameters : list[str]
        Names of those that are parameters.
    momentum : dict[str, torch.Tensor]
        Momentum of the one optimiser of `client_sync=step`.
    version : int
        Goes up whenever the tensors change.
    """

    tensors: Tensors
    parameters: list[str]
    momentum: Tensors = field(default_factory=dict)
    version: int = 0


class Observer(Protocol):
    """Is told how a run goes on."""

    def on_step(self, round_: int, step: int, steps: int, loss: float) -> None:
        """Hear of a finished step."""

    def on_round(self, row: Mapping[str, Any]) -> None:
        """Hear of a finished round: its row of metrics."""


@dataclass
class _Round:
    """Sums over a round."""

    number: int
    lr: float
    samples: int = 0
    loss: float = 0.0
    rebuilt: int = 0
    errors: list[float] = field(default_factory=list)
    halves: dict[int, Tensors] = field(default_factory=dict)
    score: Score = field(default_factory=Score)


class SplitLearning(Strategy):
    """Split learning, protocol ``parallel``.

    In a step every participating client sends the activation of its next mini-batch,
    the server half takes one optimiser step on all of them together, and each client
    gets its gradient back. A round is one pass of every participating client over its
    data, followed by an evaluation by all clients.

    Parameters
    ----------
    server : ServerHalf
        The half that the server trains.
    shared : SharedHalf | None
        The initial client half; None under ``client_sync=never``.
    settings : Settings
        Configuration of the run; sent to the clients as it is.
    activation_shape : tuple[int, ...]
        Shape of a sample's activation.
    classes : int
        Number of classes.
    optimizer : OptimizerConfig
        Optimiser of both halves.
    schedule : ScheduleConfig
        Schedule of their learning rate.
    gradient_compressor : Compressor
        What gradients go down through.
    ledger : Ledger
        Counts what is sent.
    observer : Observer
        Is told how the run goes on.
    """

    # pylint: disable-next=too-many-arguments
    def __init__(
        self,
        *,
        server: ServerHalf,
        shared: SharedHalf | None,
        settings: Settings,
        activation_shape: tuple[int, ...],
        classes: int,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        gradient_compressor: Compressor,
        ledger: Ledger,
        observer: Observer,
    ) -> None:
        self.server = server
        self.shared = shared
        self.settings = settings
        self.activation_shape = torch.Size(activation_shape)
        self.classes = classes
        self.optimizer = optimizer
        self.schedule = schedule
        self.gradient_compressor = gradient_compressor
        self.ledger = ledger
        self.observer = observer
        self.clients: list[ClientInfo] = []
        self.run = RunConfig.of(settings)
        self._timeout = 3600.0
        self._model: tuple[int, ArrayRecord] | None = None
        self._round = _Round(0, 0.0)

    def summary(self) -> None:
        """Say nothing: the run's own table and progress bar do."""

    # pylint: disable-next=too-many-arguments,too-many-positional-arguments
    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run all rounds.

        Parameters
        ----------
        grid : Grid
            Where the clients are.
        initial_arrays, train_config, evaluate_config, evaluate_fn
            Not used: halves are built from the seed, and every message has its own
            configuration.
        num_rounds : int
            Number of rounds.
        timeout : float
            Seconds to wait for the replies of an exchange.

        Returns
        -------
        Result
            Training and evaluation metrics by round.

        Raises
        ------
        RunError
            If a client or a frame fails; the text is one line.
        """
        self._timeout = timeout
        result = Result()
        self.greet(grid)
        for number in range(1, num_rounds + 1):
            row = self.run_round(grid, number, num_rounds)
            figures = {key: row[key] for key in ("loss", "lr")}
            result.train_metrics_clientapp[number] = MetricRecord(figures)
            figures = {key: row[key] for key in ("test_loss", "top1", "top5")}
            result.evaluate_metrics_clientapp[number] = MetricRecord(figures)
        return result

    def greet(self, grid: Grid) -> None:
        """Send the settings to every node and learn which client it is."""
        record = ConfigRecord(self.settings)  # type: ignore[arg-type]
        content = RecordDict({messages.SETTINGS: record})
        nodes = list(grid.get_node_ids())
        sent = [Message(content, node, messages.HELLO) for node in nodes]
        clients: dict[int, ClientInfo] = {}
        for reply in grid.send_and_receive(sent, timeout=self._timeout):
            figures = self._content(reply, "query.hello").metric_records["figures"]
            if "train_samples" in figures:
                told: dict[str, Any] = dict(figures)
                number = told.pop("partition")
                clients[number] = ClientInfo(number, reply.metadata.src_node_id, **told)
        wanted = self.run.clients
        if sorted(clients) != list(range(wanted)):
            raise RunError(
                f"clients={wanted}: nodes answered for the partitions "
                f"{sorted(clients)} only"
            )
        self.clients = [clients[number] for number in range(wanted)]

    def run_round(self, grid: Grid, number: int, rounds: int) -> dict[str, Any]:
        """Train and evaluate once; return the round's row of metrics."""
        began = time.monotonic()
        self.ledger.begin_round()
        lr = self.optimizer.lr * self.schedule.factor(number, rounds)
        self._round = _Round(number, lr)
        chosen = self.sample(number)
        steps = max(client.train_steps for client in chosen)
        for step in range(steps):
            loss = self.run_step(
                grid, [c for c in chosen if step < c.train_steps], step
            )
            self.observer.on_step(number, step + 1, steps, loss)
        if self.run.client_sync == "round":
            self._adopt_average(chosen)
        for step in range(max(client.test_steps for client in self.clients)):
            self.run_evaluation(
                grid, [c for c in self.clients if step < c.test_steps], step
            )
        row = self._row(time.monotonic() - began)
        self.observer.on_round(row)
        return row

    def sample(self, round_: int) -> list[ClientInfo]:
        """Return the clients that take part in a round, by partition."""
        count = max(1, round(self.run.fraction * len(self.clients)))
        generator = seeds.generator(self.run.seed, "sample", round=round_)
        drawn = torch.randperm(len(self.clients), generator=generator)[:count]
        return [self.clients[number] for number in sorted(drawn.tolist())]

    # --- one step ---------------------------------------------------------------------

    def run_step(self, grid: Grid, clients: list[ClientInfo], step: int) -> float:
        """Take one step with these clients; return its loss."""
        sent = {c.number: self._request(c, step, with_model=True) for c in clients}
        replies = self._exchange(grid, clients, messages.FORWARD, sent, step)
        gradients, loss = self._train_server(clients, replies, step)
        sent = {}
        for client, gradient in zip(clients, gradients, strict=True):
            content = self._request(client, step, with_model=False)
            if self.run.gradient_positions == "kept":
                with _blame(self._where(client.number, step)):
                    gradient = _at_kept(gradient, replies[client.number])
            with _blame(self._where(client.number, step, gradient=True)):
                seed = self._derive("compress.gradient", client.number, step)
                frame = self.gradient_compressor.encode(gradient, seed=seed)
            content[messages.GRADIENT] = messages.frame_record(frame)
            sent[client.number] = content
        if not math.isfinite(loss):
            raise RunError(f"round {self._round.number}, step {step}: loss not finite")
        elements = [gradient.numel() for gradient in gradients]
        whole = dict(zip(sent, elements, strict=True))
        replies = self._exchange(grid, clients, messages.BACKWARD, sent, step, whole)
        sizes = [len(gradient) for gradient in gradients]
        self._collect_halves(clients, replies, sizes, step)
        return loss

    def _request(
        self, client: ClientInfo, step: int, *, with_model: bool
    ) -> RecordDict:
        """Return a message's content: its place, and the half if the client lacks
        it."""
        place: dict[str, Any] = {
            "round": self._round.number,
            "step": step,
            "lr": self._round.lr,
            "last": step == client.train_steps - 1,
        }
        content = RecordDict({messages.PLACE: ConfigRecord(place)})
        shared = self.shared
        if with_model and shared is not None and client.version != shared.version:
            if self._model is None or self._model[0] != shared.version:
                with _blame(f"round {self._round.number}, step {step}, client half"):
                    record = messages.model_record(shared.tensors)
                self._model = shared.version, record
            content[messages.MODEL] = self._model[1]
            client.version = shared.version
        return content

    def _train_server(
        self, clients: list[ClientInfo], replies: Mapping[int, RecordDict], step: int
    ) -> tuple[list[torch.Tensor], float]:
        """Take the server half's step on all replies; return gradients and loss."""
        activations, labels = [], []
        for client in clients:
            content = replies[client.number]
            activation, label = self._decode(client, content, step)
            activations.append(activation)
            labels.append(label)
            figures: Any = content.metric_records.get(messages.FIGURES, {})
            if "relative_error" in figures:
                self._round.errors.append(figures["relative_error"])
        seed = self._derive("dropout.server", 0, step)
        trained = self.server.step(activations, labels, lr=self._round.lr, seed=seed)
        samples = sum(len(label) for label in labels)
        self._round.samples += samples
        self._round.loss += trained.loss * samples
        return trained.gradients, trained.loss

    def _decode(
        self, client: ClientInfo, content: RecordDict, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the activation and the labels of a reply."""
        with _blame(self._where(client.number, step)):
            frame = messages.frame_of(content, messages.ACTIVATION)
            activation = decode(frame, device=self.server.device)
            expected = self.activation_shape
            if activation.shape[1:] != expected or activation.dtype != torch.float32:
                sizes = ", ".join(map(str, expected))
                raise FrameError(
                    f"activation of shape {tuple(activation.shape)}, "
                    f"{activation.dtype}, expected (n, {sizes}), float32"
                )
            labels = messages.labels_of(content, self.classes, len(activation))
            return activation, labels.to(self.server.device)

    def _collect_halves(
        self,
        clients: list[ClientInfo],
        replies: Mapping[int, RecordDict],
        sizes: list[int],
        step: int,
    ) -> None:
        """Take in what came up with the replies to `train.backward`.

        ``sizes`` are the samples of each client in this step.
        """
        came: dict[int, Tensors] = {}
        for client in clients:
            content = replies[client.number]
            figures: Any = content.metric_records[messages.FIGURES]
            self._round.rebuilt += figures["rebuilt"]
            if self.shared is not None:
                where = f"round {self._round.number}, step {step}"
                with _blame(f"{where}, client {client.number}, client half"):
                    half = messages.model_of(content, self.shared.tensors)
                if half is not None:
                    came[client.number] = half
        if self.run.client_sync == "round":
            self._round.halves |= came
        elif self.run.client_sync == "step":
            self._step_shared([came[client.number] for client in clients], sizes)

    def _step_shared(self, came: list[Tensors], samples: list[int]) -> None:
        """Take one optimiser step on the one client half."""
        assert self.shared is not None
        mean = average(came, samples)
        gradients = {name: mean.pop(name) for name in self.shared.parameters}
        self.shared.tensors |= mean
        apply_gradients(
            self.shared.tensors,
            gradients,
            self.shared.momentum,
            self.optimizer,
            self._round.lr,
        )
        self.shared.version += 1

    def _adopt_average(self, chosen: Iterable[ClientInfo]) -> None:
        """Average the halves of a round, weighted by samples."""
        assert self.shared is not None
        halves = [self._round.halves[client.number] for client in chosen]
        weights = [client.train_samples for client in chosen]
        self.shared.tensors = average(halves, weights)
        self.shared.version += 1

    # --- evaluation -------------------------------------------------------------------

    def run_evaluation(self, grid: Grid, clients: list[ClientInfo], step: int) -> None:
        """Score one batch of test images of each of these clients."""
        sent = {c.number: self._request(c, step, with_model=True) for c in clients}
        replies = self._exchange(grid, clients, messages.EVALUATE, sent, step)
        for client in clients:
            activation, labels = self._decode(client, replies[client.number], step)
            self._round.score += self.server.evaluate(activation, labels)
        if not math.isfinite(self._round.score.loss):
            where = f"round {self._round.number}, evaluation {step}"
            raise RunError(f"{where}: loss not finite")

    def _row(self, seconds: float) -> dict[str, Any]:
        """Return the metrics of the round."""
        this, traffic = self._round, self.ledger.round
        score, kind = this.score, messages.ACTIVATION
        return {
            "round": this.number,
            "lr": this.lr,
            "loss": this.loss / this.samples,
            "test_loss": score.loss / score.samples,
            "top1": score.top1 / score.samples,
            "top5": score.top5 / score.samples,
            "samples": this.samples,
            "relative_error": sum(this.errors) / len(this.errors),
            "compression_factor": compression_factor(
                traffic.dense(kind), traffic.bytes(kind)
            ),
            "bytes": traffic.nested(),
            "link_seconds": traffic.link_seconds,
            "wall_seconds": seconds,
            "rebuilt_graphs": this.rebuilt,
        }

    # --- exchanges --------------------------------------------------------------------

    # pylint: disable-next=too-many-arguments,too-many-positional-arguments
    def _exchange(
        self,
        grid: Grid,
        clients: list[ClientInfo],
        kind: str,
        sent: Mapping[int, RecordDict],
        step: int,
        whole: Mapping[int, int] | None = None,
    ) -> dict[int, RecordDict]:
        """Send each client its message, count both ways, return the replies.

        ``whole`` are the elements of gradients of which a part may be sent.
        """
        group = str(self._round.number)
        numbers = {client.node_id: client.number for client in clients}
        outgoing = [
            Message(sent[client.number], client.node_id, kind, group_id=group)
            for client in clients
        ]
        replies: dict[int, RecordDict] = {}
        came: dict[int, list[Entry]] = {}
        gradient = kind == messages.BACKWARD
        for reply in grid.send_and_receive(outgoing, timeout=self._timeout):
            number = numbers[reply.metadata.src_node_id]
            where = self._where(number, step, gradient)
            replies[number] = self._content(reply, where)
            with _blame(where):
                came[number] = messages.entries(replies[number])
        missing = [number for number in numbers.values() if number not in replies]
        if missing:
            raise RunError(
                f"round {group}, step {step}: no reply from clients {sorted(missing)} "
                f"within {self._timeout:.0f} s"
            )
        phase = EVALUATION if kind == messages.EVALUATE else TRAINING
        self.ledger.exchange(
            phase,
            {n: messages.entries(sent[n], whole[n] if whole else None) for n in sent},
            {number: came[number] for number in sorted(came)},
        )
        return replies

    def _content(self, reply: Message, where: str) -> RecordDict:
        """Return the content of a reply; `RunError` where it is a failure."""
        if reply.has_error():
            reason = " ".join((reply.error.reason or "no reason given").split())
            raise RunError(f"{where}: the client failed: {reason}")
        failed = reply.content.config_records.get(messages.FAILURE)
        if failed is not None:
            raise RunError(f"{where}: {failed['reason']!s}")
        return reply.content

    def _where(self, client: int, step: int, gradient: bool = False) -> str:
        group = "gradient_compressor" if gradient else "compressor"
        return (
            f"round {self._round.number}, step {step}, client {client}, "
            f"{group} {self.settings[f'{group}.name']}"
        )

    def _derive(self, purpose: str, client: int, step: int) -> int:
        number = self._round.number
        return seeds.derive(
            self.run.seed, purpose, client=client, round=number, step=step
        )

    # --- what Flower's own rounds would call ------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Not called: `start` makes a round of many exchanges."""
        raise RuntimeError("SplitLearning trains by SplitLearning.start")

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Not called, likewise."""
        raise RuntimeError("SplitLearning trains by SplitLearning.start")

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Not called, likewise."""
        raise RuntimeError("SplitLearning evaluates by SplitLearning.start")

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Not called, likewise."""
        raise RuntimeError("SplitLearning evaluates by SplitLearning.start")


def _at_kept(gradient: torch.Tensor, content: RecordDict) -> torch.Tensor:
    """Return a gradient, shape (k,), where the frame of a reply kept the activation."""
    frame = messages.frame_of(content, messages.ACTIVATION)
    return gradient.flatten()[kept_positions(frame, device=gradient.device)]


@contextmanager
def _blame(where: str) -> Iterator[None]:
    """Turn what must end a run into a `RunError` that says where it happened."""
    try:
        yield
    except (FrameError, NotFiniteError) as error:
        raise RunError(f"{where}: {error}") from error
