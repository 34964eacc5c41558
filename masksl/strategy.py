"""Flower strategy: runs the rounds of any method."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from masksl.methods.base import ServerMethod, State
from masksl.runtime.client_states import ClientStates
from masksl.runtime.clients import (
    EVALUATION,
    TRAINING,
    ClientInfo,
    ClientManager,
    NodesLost,
)
from masksl.runtime.ledger import Traffic
from masksl.runtime.messages import RunError
from masksl.runtime.round import Round
from masksl.runtime.summary import make_row, summarize
from masksl.settings import CheckpointConfig, RunConfig, Settings, read
from masksl.training.compute import describe, resolve_device
from masksl.training.optimizer import OptimizerConfig
from masksl.training.schedule import Rates, ScheduleConfig
from masksl.training.tensors import grouped

logger = logging.getLogger(__name__)


class Observer(Protocol):
    """Is notified of the progress of a run."""

    def on_step(self, round_: int, step: int, steps: int, loss: float) -> None:
        """Handle a completed step."""

    def on_round(self, row: Mapping[str, Any]) -> None:
        """Handle a completed round, given its row of metrics."""

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Handle a disturbance that does not end the run."""


@dataclass
class _Progress:
    """Number of the last completed round, and nodes lost so far."""

    completed: int = 0
    lost: int = 0


class RoundStrategy(Strategy):
    """Runs the rounds of a method.

    Progress, evaluations between steps, repeats after lost nodes, snapshots and the row
    of metrics are the same for every method.

    Parameters
    ----------
    method : ServerMethod
        The server side of the method.
    clients : ClientManager
        The clients of the run.
    settings : Settings
        Configuration of the run.
    own_state : Sequence[str]
        Names of the state that only the clients know; see `ClientMethod`.
    observer : Observer
        Is notified of the progress.

    Attributes
    ----------
    snapshot : State
        State after the last round whose state was kept; see `state`.
    """

    # pylint: disable-next=too-many-arguments
    def __init__(
        self,
        *,
        method: ServerMethod,
        clients: ClientManager,
        settings: Settings,
        own_state: Sequence[str],
        observer: Observer,
    ) -> None:
        self.method = method
        self.clients = clients
        self.settings = settings
        self.observer = observer
        self.run = RunConfig.of(settings)
        self.optimizer = read(OptimizerConfig, settings, "optimizer")
        self.schedule = read(ScheduleConfig, settings, "schedule")
        self._checkpoint = read(CheckpointConfig, settings, "checkpoint")
        self._client_states = ClientStates(own_state)
        self._progress = _Progress()
        self.snapshot = self.state()

    def summary(self) -> None:
        """Print nothing: the run has its own table and progress bar."""

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
            The nodes.
        initial_arrays, train_config, evaluate_config, evaluate_fn
            Not used: models are built from the seed, and every message has its own
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
        self.clients.timeout = timeout
        result = Result()
        for number in range(self._progress.completed + 1, num_rounds + 1):
            row = self._complete_round(grid, number, num_rounds)
            metrics = {key: row[key] for key in ("loss", "lr") if row[key] is not None}
            result.train_metrics_clientapp[number] = MetricRecord(metrics)
            metrics = {key: row[key] for key in ("test_loss", "top1", "top5")}
            result.evaluate_metrics_clientapp[number] = MetricRecord(metrics)
        return result

    def register(self, grid: Grid) -> None:
        """Register all clients; restore those of a run that has begun."""
        versions = self.snapshot.facts["versions"]
        if not self.snapshot.facts["round"]:
            self.clients.register(grid)
            return

        def records(client: ClientInfo) -> Mapping[str, ArrayRecord]:
            client.version = versions[client.number]
            own = self._client_states.records(client.number)
            return dict(self.method.client_records(client)) | own

        self.clients.register(grid, records)

    def run_round(self, grid: Grid, number: int, rounds: int) -> dict[str, Any]:
        """Train and evaluate once.

        Returns
        -------
        dict[str, Any]
            The round's row of metrics.

        Raises
        ------
        NodesLost
            If the round must be repeated from `snapshot`.
        """
        if not self.clients.clients:
            self.register(grid)
        began = time.monotonic()
        self.clients.ledger.begin_round()
        rates = Rates(self.schedule, self.optimizer.lr, number, rounds)
        round_ = Round(number, rates, self.clients.sample(number), self.clients)
        self._train(round_)
        self._evaluate(round_)
        self._progress.completed = number
        self._client_states.expire(round_)
        if self._is_kept(number):
            self._client_states.collect(self.clients, round_)
            self.snapshot = self.state()
        own = self.method.metrics(round_)
        row = make_row(round_, own, time.monotonic() - began)
        self.observer.on_round(row)
        return row

    def _train(self, round_: Round) -> None:
        """Run all steps of a round, with evaluations in between."""
        began = time.monotonic()
        round_.steps = steps = self.method.steps(round_)
        parts = self.run.evaluations
        due = {math.ceil(steps * part / parts) for part in range(1, parts)} - {steps}
        for step in range(steps):
            self._check_enough(round_, round_.clients, TRAINING, step)
            loss = self.method.run_step(round_, step)
            if loss is not None:
                self.observer.on_step(round_.number, step + 1, steps, loss)
            if step + 1 in due:
                paused = time.monotonic()
                self._evaluate(round_)
                own = self.method.progress(round_)
                round_.checks.append(round_.score.means() | {"step": step + 1} | own)
                began += time.monotonic() - paused
        self._check_enough(round_, round_.clients, TRAINING, steps)
        self.method.finish(round_)
        round_.train_seconds = time.monotonic() - began

    def _evaluate(self, round_: Round) -> None:
        """Score the whole test set."""
        round_.score = self.method.evaluate(round_)
        self._check_enough(round_, self.clients.clients, EVALUATION, None)

    def _check_enough(
        self,
        round_: Round,
        clients: Sequence[ClientInfo],
        phase: str,
        step: int | None,
    ) -> None:
        """End the run if too few clients have not failed."""
        left, least = len(round_.active(clients, phase)), self.run.min_clients
        if left < least:
            failed = [f["client"] for f in round_.failures if f["phase"] == phase]
            place = phase if step is None else f"{phase}, step {step}"
            raise RunError(
                f"round {round_.number}, {place}: {left} of {len(clients)} clients are "
                f"left, min_clients={least}; clients {failed} failed, the last one: "
                f"{round_.last_failure}"
            )

    def summarize(
        self, rows: Sequence[Mapping[str, Any]], seconds: float
    ) -> dict[str, Any]:
        """Return the content of ``summary.json``; see `runtime.summary.summarize`."""
        traffic = self.clients.ledger.total
        return summarize(
            self.settings,
            rows,
            traffic,
            own=self.method.summary(rows, traffic),
            seconds=seconds,
            hardware=describe(resolve_device(self.run.device)),
        )

    # --- state ------------------------------------------------------------------------

    def state(self) -> State:
        """Return the state after the last completed round.

        The tensors are those of the method, and those that only clients know, in the
        groups ``client.<number>.<name>``.
        """
        method = self.method.state()
        facts = {
            "round": self._progress.completed,
            "versions": [client.version for client in self.clients.clients],
            "traffic": self.clients.ledger.total.state(),
            "method": method.facts,
        }
        own = grouped(self._client_states.groups)
        return State(method.tensors | own, facts)

    def restore(self, state: State) -> None:
        """Restore a state; the clients get theirs when they are registered."""
        self.snapshot = state
        self.method.load(State(state.tensors, state.facts["method"]))
        self.clients.ledger.total = Traffic.of(state.facts["traffic"])
        self._progress.completed = state.facts["round"]
        self._client_states.load(state.tensors)
        self.clients.clients = []

    def _complete_round(self, grid: Grid, number: int, rounds: int) -> dict[str, Any]:
        """Run a round; repeat it whenever nodes are lost."""
        while True:
            try:
                return self.run_round(grid, number, rounds)
            except NodesLost as lost:
                self._repeat(lost, number)

    def _repeat(self, lost: NodesLost, number: int) -> None:
        """Return to the last snapshot; `RunError` after too many lost nodes."""
        self._progress.lost += len(lost.reasons)
        if self._progress.lost > self._most_lost:
            raise RunError(
                f"round {number}: {lost}; {self._progress.lost} were lost in this run, "
                f"engine.max_restarts={self._most_lost}"
            ) from lost
        wasted = lost.sent + self.clients.ledger.round.bytes()
        event = {"event": "round repeated", "round": number, "reasons": lost.reasons}
        self.observer.on_event(event | {"wasted_bytes": wasted})
        logger.warning(
            "round %d is repeated: %s; %d bytes were wasted", number, lost, wasted
        )
        self.restore(self.snapshot)
        self.clients.ledger.begin_round()

    def _is_kept(self, number: int) -> bool:
        """Return whether the state after a round may be needed."""
        due = self._checkpoint.due(number, self.run.rounds)
        return bool(self._most_lost) or due

    @property
    def _most_lost(self) -> int:
        """How often nodes may be lost; engines without the setting lose none."""
        return int(self.settings.get("engine.max_restarts", 0))

    # --- not called by `start` --------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Not called: `start` makes a round of many exchanges."""
        raise RuntimeError("RoundStrategy trains by RoundStrategy.start")

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Not called, likewise."""
        raise RuntimeError("RoundStrategy trains by RoundStrategy.start")

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Not called, likewise."""
        raise RuntimeError("RoundStrategy evaluates by RoundStrategy.start")

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Not called, likewise."""
        raise RuntimeError("RoundStrategy evaluates by RoundStrategy.start")
