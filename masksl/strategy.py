"""SplitLearning: what is asked of the clients and what becomes of their answers."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

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
from masksl.runtime import messages
from masksl.runtime.ledger import Entry, Ledger, Traffic, compression_factor
from masksl.runtime.messages import RunError
from masksl.settings import RunConfig, Settings, checkpoint_due
from masksl.utils import Stopwatch, derive_seed, seeded_generator

TRAINING = "training"
EVALUATION = "evaluation"

_UNKNOWN = -1  # version of a client of which nobody knows what it has
_CLIENT_FAULTS = (
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION,
    ErrorCode.CLIENT_APP_CRASHED,
)

logger = logging.getLogger(__name__)


class NodesLost(RuntimeError):
    """Nodes that have forgotten their clients: the round must be done again.

    Parameters
    ----------
    reasons : Iterable[str]
        Why, once for each cause.
    sent : int
        Bytes of the exchange that came to nothing.
    """

    def __init__(self, reasons: Iterable[str], sent: int = 0) -> None:
        self.reasons = sorted(set(reasons))
        self.sent = sent
        super().__init__("; ".join(self.reasons))


class State(NamedTuple):
    """All that a run needs to go on after a round.

    Seeds make every random choice, so no generator has a state of its own.

    Parameters
    ----------
    tensors : dict[str, torch.Tensor]
        Halves and momentum of server and clients; names begin with whose they are.
    facts : dict[str, Any]
        What JSON can hold: the round, versions of halves, the ledger.
    """

    tensors: Tensors
    facts: dict[str, Any]


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
        Which version of the shared client half it has; 0 is the initial one, -1 says
        that nobody knows.
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

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Hear of what disturbs a run without ending it."""


@dataclass
class _Round:
    """Sums over a round."""

    number: int
    lr: float
    steps: int = 0
    samples: int = 0
    loss: float = 0.0
    rebuilt: int = 0
    errors: list[float] = field(default_factory=list)
    halves: dict[int, Tensors] = field(default_factory=dict)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    last_fault: str = ""
    watch: Stopwatch = field(default_factory=Stopwatch)
    train_seconds: float = 0.0
    score: Score = field(default_factory=Score)
    checks: list[dict[str, float]] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Return loss and accuracies of the last evaluation."""
        score = self.score
        return {
            "test_loss": score.loss / score.samples,
            "top1": score.top1 / score.samples,
            "top5": score.top5 / score.samples,
        }

    def takes_part(self, client: ClientInfo, phase: str) -> bool:
        """Tell whether a client has not failed in this phase of the round."""
        return (client.number, phase) not in {
            (fault["client"], fault["phase"]) for fault in self.left_out
        }


class SplitLearning(Strategy):  # pylint: disable=too-many-instance-attributes
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

    Attributes
    ----------
    snapshot : State | None
        State after the last round whose state was kept; see `state`.
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
        self.snapshot: State | None = None
        self.run = RunConfig.of(settings)
        self._lost = 0
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
        if self.snapshot is None:
            self.snapshot = self.state({})
        for number in range(self._round.number + 1, num_rounds + 1):
            row = self._complete_round(grid, number, num_rounds)
            figures = {key: row[key] for key in ("loss", "lr")}
            result.train_metrics_clientapp[number] = MetricRecord(figures)
            figures = {key: row[key] for key in ("test_loss", "top1", "top5")}
            result.evaluate_metrics_clientapp[number] = MetricRecord(figures)
        return result

    def greet(self, grid: Grid) -> None:
        """Send the settings to every node and learn which client it is.

        Clients of a run that goes on get back what was kept for them.
        """
        nodes = dict.fromkeys(grid.get_node_ids(), self._hello())
        clients: dict[int, ClientInfo] = {}
        for reply in self._ask(grid, nodes, messages.HELLO):
            figures = self._content(reply, messages.HELLO).metric_records["figures"]
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
        if self.snapshot is not None and self.snapshot.facts["round"]:
            self._give_back(grid, self.snapshot)

    def run_round(self, grid: Grid, number: int, rounds: int) -> dict[str, Any]:
        """Train and evaluate once; return the round's row of metrics.

        Raises
        ------
        NodesLost
            If the round must be done again, from `snapshot`.
        """
        began = time.monotonic()
        self.ledger.begin_round()
        lr = self.optimizer.lr * self.schedule.factor(number, rounds)
        self._round = _Round(number, lr)
        chosen = self.sample(number)
        self._round.steps = steps = max(client.train_steps for client in chosen)
        parts = self.run.evaluations
        due = {math.ceil(steps * part / parts) for part in range(1, parts)} - {steps}
        began_training = began
        for step in range(steps):
            self._check_enough(chosen, TRAINING, step)
            taking = [c for c in chosen if step < c.train_steps]
            loss = self.run_step(grid, taking, step)
            if loss is not None:
                self.observer.on_step(number, step + 1, steps, loss)
            if step + 1 in due:
                paused = time.monotonic()
                self._evaluate(grid)
                self._round.checks.append(self._round.figures() | {"step": step + 1})
                began_training += time.monotonic() - paused
        self._check_enough(chosen, TRAINING, steps)
        if self.run.client_sync == "round":
            self._adopt_average()
        self._round.train_seconds = time.monotonic() - began_training
        self._evaluate(grid)
        if self._is_kept(number):
            self.snapshot = self.state(self._collect_states(grid))
        row = self._row(time.monotonic() - began)
        self.observer.on_round(row)
        return row

    # --- what a run needs to go on ----------------------------------------------------

    def state(self, clients: Mapping[int, Mapping[str, Tensors]]) -> State:
        """Return the state after the last completed round.

        Parameters
        ----------
        clients : Mapping[int, Mapping[str, dict[str, torch.Tensor]]]
            What the clients themselves must get back: tensors by kind, ``model`` and
            ``momentum``, for each client that has any.
        """
        server, momentum = self.server.state()
        groups = {"server": server, "server.momentum": momentum}
        facts: dict[str, Any] = {
            "round": self._round.number,
            "versions": [client.version for client in self.clients],
            "traffic": self.ledger.total.state(),
        }
        if self.shared is not None:
            facts["version"] = self.shared.version
            for name, tensors in (
                ("shared", self.shared.tensors),
                ("shared.momentum", self.shared.momentum),
            ):
                groups[name] = {key: t.clone() for key, t in tensors.items()}
        for number, kinds in clients.items():
            groups |= {f"{kind}.{number}": kept for kind, kept in kinds.items()}
        tensors = {
            f"{group}/{name}": tensor.detach()
            for group, members in groups.items()
            for name, tensor in members.items()
        }
        return State(tensors, facts)

    def restore(self, state: State) -> None:
        """Go back, or on, to a state; the clients get theirs when they are greeted."""
        self.snapshot = state
        self.server.load(_group(state, "server"), _group(state, "server.momentum"))
        if self.shared is not None:
            shared = self.shared
            loaded = _group(state, "shared")
            shared.tensors = {
                name: loaded[name].to(tensor.device, copy=True)
                for name, tensor in shared.tensors.items()
            }
            device = self.server.device
            shared.momentum = {
                name: tensor.to(device, copy=True)
                for name, tensor in _group(state, "shared.momentum").items()
            }
            shared.version = state.facts["version"]
        self.ledger.total = Traffic.of(state.facts["traffic"])
        self._round = _Round(state.facts["round"], 0.0)
        self._model = None
        self.clients = []

    def _complete_round(self, grid: Grid, number: int, rounds: int) -> dict[str, Any]:
        """Run a round, again and again where nodes are lost in the middle of it."""
        while True:
            try:
                if not self.clients:
                    self.greet(grid)
                return self.run_round(grid, number, rounds)
            except NodesLost as lost:
                self._go_back(lost, number)

    def _go_back(self, lost: NodesLost, number: int) -> None:
        """Return to the last completed round; `RunError` where that was too often."""
        self._lost += len(lost.reasons)
        if self._lost > self._most_lost:
            raise RunError(
                f"round {number}: {lost}; {self._lost} were lost in this run, "
                f"engine.max_restarts={self._most_lost}"
            ) from lost
        wasted = lost.sent + self.ledger.round.bytes()
        event = {"event": "round repeated", "round": number, "reasons": lost.reasons}
        self.observer.on_event(event | {"wasted_bytes": wasted})
        logger.warning(
            "round %d is done again: %s; %d bytes were sent for nothing",
            *(number, lost, wasted),
        )
        assert self.snapshot is not None
        self.restore(self.snapshot)
        self.ledger.begin_round()

    def _is_kept(self, number: int) -> bool:
        """Tell whether the state after a round may be needed."""
        return bool(self._most_lost) or checkpoint_due(self.settings, number)

    @property
    def _most_lost(self) -> int:
        """How often nodes may be lost; engines without the setting lose none."""
        return int(self.settings.get("engine.max_restarts", 0))

    def _collect_states(self, grid: Grid) -> dict[int, dict[str, Tensors]]:
        """Ask the clients for what only they know."""
        if self.run.client_sync == "step":
            return {}  # halves and momentum are the server's
        numbers = {client.node_id: client.number for client in self.clients}
        kept: dict[int, dict[str, Tensors]] = {}
        nodes = dict.fromkeys(numbers, RecordDict())
        for reply in self._ask(grid, nodes, messages.SAVE):
            number = numbers[reply.metadata.src_node_id]
            where = f"round {self._round.number}, {messages.SAVE}, client {number}"
            content = self._content(reply, where)
            with _blame(where):
                kinds = (messages.MODEL, messages.MOMENTUM)
                found = {kind: messages.kept_of(content, kind) for kind in kinds}
            kept[number] = {kind: tensors for kind, tensors in found.items() if tensors}
        if missing := set(numbers.values()) - kept.keys():
            raise RunError(
                f"round {self._round.number}, {messages.SAVE}: no reply from clients "
                f"{sorted(missing)}"
            )
        return dict(sorted(kept.items()))

    def _give_back(self, grid: Grid, state: State) -> None:
        """Send the clients what was kept for them, and the half that they had."""
        shared: ArrayRecord | None = None
        if self.shared is not None:
            shared = messages.model_record(self.shared.tensors)
        nodes = {}
        for client, version in zip(self.clients, state.facts["versions"], strict=True):
            client.version = version
            content = self._hello()
            if shared is not None and self.shared is not None:
                if version == self.shared.version:
                    content[messages.MODEL] = shared
            for kind in (messages.MODEL, messages.MOMENTUM):
                kept = _group(state, f"{kind}.{client.number}")
                if kept:
                    content[kind] = messages.model_record(kept)
            nodes[client.node_id] = content
        for reply in self._ask(grid, nodes, messages.HELLO):
            self._content(reply, messages.HELLO)

    def _hello(self) -> RecordDict:
        record = ConfigRecord(self.settings)  # type: ignore[arg-type]
        return RecordDict({messages.SETTINGS: record})

    def _ask(
        self, grid: Grid, nodes: Mapping[int, RecordDict], kind: str
    ) -> list[Message]:
        """Return the replies to what is no part of training and is not counted."""
        sent = [Message(content, node, kind) for node, content in nodes.items()]
        replies = list(grid.send_and_receive(sent, timeout=self._timeout))
        if lost := [reply for reply in replies if _is_lost(reply)]:
            raise NodesLost(_reason(reply) for reply in lost)
        return replies

    # --- a round ----------------------------------------------------------------------

    def sample(self, round_: int) -> list[ClientInfo]:
        """Return the clients that take part in a round, by partition."""
        count = max(1, round(self.run.fraction * len(self.clients)))
        generator = seeded_generator(self.run.seed, "sample", round=round_)
        drawn = torch.randperm(len(self.clients), generator=generator)[:count]
        return [self.clients[number] for number in sorted(drawn.tolist())]

    # --- one step ---------------------------------------------------------------------

    def run_step(
        self, grid: Grid, clients: list[ClientInfo], step: int
    ) -> float | None:
        """Take one step with those of the clients that have not failed.

        Returns
        -------
        float | None
            Its loss, None if nobody was left to take it.
        """
        clients = [c for c in clients if self._round.takes_part(c, TRAINING)]
        sent = {c.number: self._request(c, step, with_model=True) for c in clients}
        replies = self._exchange(grid, clients, messages.FORWARD, sent, step)
        clients = [c for c in clients if c.number in replies]
        if not clients:
            return None
        gradients, loss = self._train_server(clients, replies, step)
        sizes = {c.number: len(g) for c, g in zip(clients, gradients, strict=True)}
        whole = {c.number: g.numel() for c, g in zip(clients, gradients, strict=True)}
        if self.run.gradient_positions == "kept":
            for number, client in enumerate(clients):
                with _blame(self._where(client.number, step)):
                    kept = _at_kept(gradients[number], replies[client.number])
                gradients[number] = kept
        sent = self._gradient_messages(clients, gradients, step)
        del gradients  # as large as all frames of `none` together
        if not math.isfinite(loss):
            raise RunError(f"round {self._round.number}, step {step}: loss not finite")
        replies = self._exchange(grid, clients, messages.BACKWARD, sent, step, whole)
        clients = [c for c in clients if c.number in replies]
        self._collect_halves(clients, replies, sizes, step)
        return loss

    def _gradient_messages(
        self, clients: list[ClientInfo], gradients: list[torch.Tensor], step: int
    ) -> dict[int, RecordDict]:
        """Return what each client is sent to go backward with."""
        sent = {}
        for client, gradient in zip(clients, gradients, strict=True):
            content = self._request(client, step, with_model=False)
            with _blame(self._where(client.number, step, gradient=True)):
                seed = self._derive("compress.gradient", client.number, step)
                with self._round.watch("codec"):
                    frame = self.gradient_compressor.encode(gradient, seed=seed)
            content[messages.GRADIENT] = messages.frame_record(frame)
            sent[client.number] = content
        return sent

    def _check_enough(
        self, clients: Iterable[ClientInfo], phase: str, step: int
    ) -> None:
        """End the run where too few clients have not failed."""
        asked = list(clients)
        left = sum(self._round.takes_part(client, phase) for client in asked)
        least = int(self.settings["min_clients"])
        if left < least:
            out = [f["client"] for f in self._round.left_out if f["phase"] == phase]
            raise RunError(
                f"round {self._round.number}, {phase}, step {step}: {left} of "
                f"{len(asked)} clients are left, min_clients={least}; clients {out} "
                f"failed, the last one: {self._round.last_fault}"
            )

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
                with (
                    _blame(f"round {self._round.number}, step {step}, client half"),
                    self._round.watch("codec"),
                ):
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
        with self._round.watch("server_half"):
            trained = self.server.step(
                activations, labels, lr=self._round.lr, seed=seed
            )
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
            with self._round.watch("codec"):
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
        sizes: Mapping[int, int],
        step: int,
    ) -> None:
        """Take in what came up with the replies to `train.backward`.

        ``sizes`` are the samples in this step by the number of the client.
        """
        came: dict[int, Tensors] = {}
        for client in clients:
            content = replies[client.number]
            figures: Any = content.metric_records[messages.FIGURES]
            self._round.rebuilt += figures["rebuilt"]
            if self.shared is not None:
                where = f"round {self._round.number}, step {step}"
                with (
                    _blame(f"{where}, client {client.number}, client half"),
                    self._round.watch("codec"),
                ):
                    half = messages.model_of(content, self.shared.tensors)
                if half is not None:
                    came[client.number] = half
        if self.run.client_sync == "round":
            self._round.halves |= came
        elif self.run.client_sync == "step" and came:
            samples = [sizes[number] for number in came]
            self._step_shared(list(came.values()), samples)

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

    def _adopt_average(self) -> None:
        """Average the halves that came in a round, weighted by samples."""
        assert self.shared is not None
        came = dict(sorted(self._round.halves.items()))
        if came:
            weights = [self.clients[number].train_samples for number in came]
            self.shared.tensors = average(list(came.values()), weights)
            self.shared.version += 1

    # --- evaluation -------------------------------------------------------------------

    def _evaluate(self, grid: Grid) -> None:
        """Score the whole test set."""
        self._round.score = Score()
        steps = max(client.test_steps for client in self.clients)
        for step in range(steps):
            self.run_evaluation(
                grid, [c for c in self.clients if step < c.test_steps], step
            )
        self._check_enough(self.clients, EVALUATION, steps)

    def run_evaluation(self, grid: Grid, clients: list[ClientInfo], step: int) -> None:
        """Score one batch of test images of each of these clients.

        Those that have failed in this evaluation are left out.
        """
        clients = [c for c in clients if self._round.takes_part(c, EVALUATION)]
        sent = {c.number: self._request(c, step, with_model=True) for c in clients}
        replies = self._exchange(grid, clients, messages.EVALUATE, sent, step)
        for client in clients:
            if client.number in replies:
                activation, labels = self._decode(client, replies[client.number], step)
                with self._round.watch("server_half"):
                    self._round.score += self.server.evaluate(activation, labels)
        if not math.isfinite(self._round.score.loss):
            where = f"round {self._round.number}, evaluation {step}"
            raise RunError(f"{where}: loss not finite")

    def _row(self, seconds: float) -> dict[str, Any]:
        """Return the metrics of the round."""
        this, traffic = self._round, self.ledger.round
        kind = messages.ACTIVATION
        return {
            "round": this.number,
            "lr": this.lr,
            "loss": this.loss / this.samples,
            **this.figures(),
            "steps": this.steps,
            "checks": this.checks,
            "samples": this.samples,
            "relative_error": sum(this.errors) / len(this.errors),
            "compression_factor": compression_factor(
                traffic.dense(kind), traffic.bytes(kind)
            ),
            "bytes": traffic.nested(),
            "link_seconds": traffic.link_seconds,
            "rebuilt_graphs": this.rebuilt,
            "left_out": this.left_out,
            "wall_seconds": seconds,
            "train_seconds": this.train_seconds,
            "samples_per_second": this.samples / this.train_seconds,
            "shares": _shares(this.watch.seconds, seconds),
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

        Clients that fail are left out of what is returned, and of the rest of the
        phase. ``whole`` are the elements of gradients of which a part may be sent.
        """
        group = str(self._round.number)
        numbers = {client.node_id: client for client in clients}
        outgoing = [
            Message(sent[client.number], client.node_id, kind, group_id=group)
            for client in clients
        ]
        phase = EVALUATION if kind == messages.EVALUATE else TRAINING
        began = time.perf_counter()
        came = list(grid.send_and_receive(outgoing, timeout=self._timeout))
        seconds = time.perf_counter() - began
        down = {
            n: messages.entries(content, whole[n] if whole else None)
            for n, content in sent.items()
        }
        up: dict[int, list[Entry]] = {}
        replies: dict[int, RecordDict] = {}
        lost, failed = [], []
        for reply in sorted(came, key=lambda r: numbers[r.metadata.src_node_id].number):
            client = numbers.pop(reply.metadata.src_node_id)
            where = self._where(client.number, step, kind == messages.BACKWARD)
            if _is_lost(reply):
                lost.append(_reason(reply))
            elif reply.has_error() and reply.error.code in _CLIENT_FAULTS:
                failed.append((client, _reason(reply)))
            else:
                replies[client.number] = self._content(reply, where)
                with _blame(where):
                    up[client.number] = messages.entries(replies[client.number])
        if lost:
            every = [*down.values(), *up.values()]
            raise NodesLost(lost, sum(e.bytes for entries in every for e in entries))
        if numbers:
            missing = sorted(client.number for client in numbers.values())
            raise RunError(
                f"round {group}, step {step}: no reply from clients {missing} "
                f"within {self._timeout:.0f} s"
            )
        for client, reason in failed:
            self._leave_out(client, phase, step, reason)
        self.ledger.exchange(phase, down, up)
        self._measure(replies.values(), seconds)
        return replies

    def _leave_out(
        self, client: ClientInfo, phase: str, step: int, reason: str
    ) -> None:
        """Do without a client for the rest of a phase."""
        client.version = _UNKNOWN
        fault = {"client": client.number, "phase": phase, "step": step}
        self._round.left_out.append(fault)
        self._round.last_fault = f"client {client.number}: {reason}"
        logger.warning(
            "round %d, %s, step %d: client %d failed and is left out: %s",
            *(self._round.number, phase, step, client.number, reason),
        )

    def _measure(self, replies: Iterable[RecordDict], seconds: float) -> None:
        """Divide the time of an exchange: what its busiest worker did, and the rest."""
        workers: dict[int, tuple[float, float]] = {}
        for content in replies:
            told: Any = content.metric_records[messages.FIGURES]
            half, codec = workers.get(told["worker"], (0.0, 0.0))
            half += told.get("half_seconds", 0.0)
            workers[told["worker"]] = half, codec + told.get("codec_seconds", 0.0)
        half, codec = max(workers.values(), key=sum, default=(0.0, 0.0))
        spent = self._round.watch.seconds
        spent["client_halves"] += half
        spent["codec"] += codec
        spent["exchange"] += max(0.0, seconds - half - codec)

    def _content(self, reply: Message, where: str) -> RecordDict:
        """Return the content of a reply; `RunError` where it is a failure."""
        if reply.has_error():
            raise RunError(f"{where}: the client failed: {_reason(reply)}")
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
        return derive_seed(
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


def _is_lost(reply: Message) -> bool:
    """Tell whether a node is there again with nothing in its state."""
    return reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE


def _reason(reply: Message) -> str:
    """Return in one line why a reply is an error."""
    return " ".join((reply.error.reason or "no reason given").split())


def _group(state: State, name: str) -> Tensors:
    """Return the tensors of one group of a state by their own names."""
    start = name + "/"
    return {
        key.removeprefix(start): tensor
        for key, tensor in state.tensors.items()
        if key.startswith(start)
    }


PARTS = ("client_halves", "server_half", "codec", "exchange")


def _shares(seconds: Mapping[str, float], whole: float) -> dict[str, float]:
    """Return the shares of a time by part; what no part took is ``other``."""
    shares = {part: seconds.get(part, 0.0) / whole for part in PARTS}
    return shares | {"other": max(0.0, 1 - sum(shares.values()))}


@contextmanager
def _blame(where: str) -> Iterator[None]:
    """Turn what must end a run into a `RunError` that says where it happened."""
    try:
        yield
    except (FrameError, NotFiniteError) as error:
        raise RunError(f"{where}: {error}") from error
