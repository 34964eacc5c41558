"""One round of a run: its clients, its failures, its sums."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from masksl.runtime import messages
from masksl.runtime.clients import TRAINING, ClientInfo, ClientManager
from masksl.training.schedule import Rates
from masksl.training.score import Score
from masksl.utils import Stopwatch, derive_seed

ACTIVITIES = ("clients", "server", "codec", "exchange")


@dataclass
class Round:
    """One round of a run, as a method sees it.

    Parameters
    ----------
    number : int
        Number of the round, from 1.
    rates : Rates
        Learning rates of the round.
    clients : list[ClientInfo]
        Clients that take part, by partition.
    manager : ClientManager
        All clients, and the way to reach them.

    Attributes
    ----------
    watch : Stopwatch
        Seconds by activity, see `ACTIVITIES`.
    failures : list[dict[str, Any]]
        Client, phase and step of each failure of a client.
    score : Score
        The last evaluation.
    checks : list[dict[str, float]]
        Evaluations between steps.
    """

    number: int
    rates: Rates
    clients: list[ClientInfo]
    manager: ClientManager
    steps: int = 0
    samples: int = 0
    loss: float = 0.0
    train_seconds: float = 0.0
    last_failure: str = ""
    watch: Stopwatch = field(default_factory=Stopwatch)
    failures: list[dict[str, Any]] = field(default_factory=list)
    score: Score = field(default_factory=Score)
    checks: list[dict[str, float]] = field(default_factory=list)
    _failed: set[tuple[int, str]] = field(default_factory=set)

    @property
    def lr(self) -> float:
        """Learning rate of the first step."""
        return self.lr_at(0)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, from 0 on."""
        return self.rates.at(step, max(1, self.steps))

    # pylint: disable-next=too-many-arguments
    def exchange(
        self,
        kind: str,
        sent: Mapping[int, RecordDict],
        *,
        step: int,
        label: str = "",
        full: Mapping[int, Mapping[str, int]] | None = None,
    ) -> dict[int, RecordDict]:
        """Exchange messages with clients; see `ClientManager.exchange`."""
        return self.manager.exchange(
            self, kind, sent, step=step, label=label, full=full
        )

    def active(
        self, clients: Iterable[ClientInfo], phase: str = TRAINING
    ) -> list[ClientInfo]:
        """Return the clients that have not failed in a phase of this round."""
        return [c for c in clients if (c.number, phase) not in self._failed]

    def fail(self, client: ClientInfo, phase: str, step: int, reason: str) -> None:
        """Record the failure of a client; it is inactive for the rest of the phase."""
        failed = {"client": client.number, "phase": phase, "step": step}
        self.failures.append(failed)
        self._failed.add((client.number, phase))
        self.last_failure = f"client {client.number}: {reason}"

    def seed(self, purpose: str, client: int = 0, step: int = 0) -> int:
        """Derive the seed of one purpose at one step of this round."""
        seed = self.manager.run.seed
        return derive_seed(seed, purpose, client=client, round=self.number, step=step)

    def message(self, step: int) -> RecordDict:
        """Return the content of a message of a step: its place, and all rounds."""
        place = {"round": self.number, "step": step, "rounds": self.rates.rounds}
        record = ConfigRecord(place)  # type: ignore[arg-type]
        return RecordDict({messages.PLACE: record})

    def place(self, step: int, client: int | None = None, label: str = "") -> str:
        """Return round, step, client and a label in words, for error lines."""
        number = "" if client is None else f", client {client}"
        suffix = f", {label}" if label else ""
        return f"round {self.number}, step {step}{number}{suffix}"

    def add_loss(self, loss: float, samples: int) -> None:
        """Add the mean training loss of a number of samples."""
        self.loss += loss * samples
        self.samples += samples

    def add_losses(self, replies: Mapping[int, RecordDict], step: int) -> float | None:
        """Add the training losses that clients report, ``loss`` and ``samples``.

        Return their mean over samples, None without samples.
        """
        total, count = 0.0, 0
        for number, content in replies.items():
            with messages.ends_run(self.place(step, number)):
                loss = messages.metric_of(content, "loss")
                samples = int(messages.metric_of(content, "samples"))
            self.add_loss(loss, samples)
            total += loss * samples
            count += samples
        return total / count if count else None

    def shares(self, seconds: float) -> dict[str, float]:
        """Return the share of each activity in a time, and of all ``other``."""
        spent = self.watch.seconds
        shares = {name: spent.get(name, 0.0) / seconds for name in ACTIVITIES}
        return shares | {"other": max(0.0, 1 - sum(shares.values()))}
