"""The clients of a run, and every exchange with them."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from masksl.runtime import messages
from masksl.runtime.ledger import Entry, Ledger
from masksl.runtime.messages import RunError, ends_run, metrics_of
from masksl.settings import RunConfig, Settings
from masksl.utils import seeded_generator

if TYPE_CHECKING:
    from masksl.runtime.round import Round

TRAINING = "training"
EVALUATION = "evaluation"
PHASES = {"train": TRAINING, "evaluate": EVALUATION}
"""Phase by the prefix of a message type."""

UNKNOWN = -1  # model version of a client whose state is unknown
_CLIENT_FAULTS = (
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION,
    ErrorCode.CLIENT_APP_CRASHED,
)

logger = logging.getLogger(__name__)


class NodesLost(RuntimeError):
    """Raised when nodes lost their client state; the round must be repeated.

    Parameters
    ----------
    reasons : Iterable[str]
        One for each cause.
    sent : int
        Bytes of the exchange that failed.
    """

    def __init__(self, reasons: Iterable[str], sent: int = 0) -> None:
        self.reasons = sorted(set(reasons))
        self.sent = sent
        super().__init__("; ".join(self.reasons))


@dataclass
class ClientInfo:
    """What the server knows of a client.

    Parameters
    ----------
    number : int
        Its partition.
    node_id : int
        Flower's id of its node, random in every run.
    train_samples, test_samples : int
        Samples of its partition of the training set, of its shard of the test set.
    version : int
        Version of the global model that it has; 0 is the initial model, -1 unknown.
    """

    number: int
    node_id: int
    train_samples: int
    test_samples: int
    version: int = 0


class ClientManager:
    """The clients of a run, and the only way to reach them.

    It counts every byte of `exchange`, and none of `register` and `query`.

    Parameters
    ----------
    settings : Settings
        Configuration of the run; sent to the clients as it is.
    ledger : Ledger
        Counts what is sent.

    Attributes
    ----------
    clients : list[ClientInfo]
        Registered clients by partition; empty before `register`.
    timeout : float
        Seconds to wait for the replies of an exchange.
    """

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self.settings = settings
        self.run = RunConfig.of(settings)
        self.ledger = ledger
        self.clients: list[ClientInfo] = []
        self.timeout = 3600.0
        self._grid: Grid | None = None

    def register(
        self,
        grid: Grid,
        records: Callable[[ClientInfo], Mapping[str, ArrayRecord]] | None = None,
    ) -> None:
        """Send the settings to every node and learn its partition and samples.

        Parameters
        ----------
        grid : Grid
            The nodes.
        records : Callable[[ClientInfo], Mapping[str, ArrayRecord]] | None
            Given for clients that must be restored: called for each client, it returns
            what the client gets with a second greeting.

        Raises
        ------
        RunError
            If a partition is missing, or a client has no data.
        NodesLost
            If a node lost its state meanwhile.
        """
        self._grid = grid
        greeting = dict.fromkeys(grid.get_node_ids(), self._greeting())
        clients: dict[int, ClientInfo] = {}
        for reply in self._send(greeting, messages.HELLO):
            metrics = metrics_of(_content(reply, _greeted(reply)))
            if "train_samples" in metrics:
                number = metrics["partition"]
                node_id = reply.metadata.src_node_id
                samples = metrics["train_samples"], metrics["test_samples"]
                clients[number] = ClientInfo(number, node_id, *samples)
        expected = self.run.clients
        if sorted(clients) != list(range(expected)):
            raise RunError(
                f"clients={expected}: nodes answered for the partitions "
                f"{sorted(clients)} only"
            )
        self.clients = [clients[number] for number in range(expected)]
        if records is not None:
            contents = {}
            for client in self.clients:
                contents[client.number] = self._greeting()
                for name, record in records(client).items():
                    contents[client.number][name] = record
            self.query(messages.HELLO, contents)

    def _greeting(self) -> RecordDict:
        record = ConfigRecord(self.settings)  # type: ignore[arg-type]
        return RecordDict({messages.SETTINGS: record})

    def sample(
        self, round_: int, fraction: float | None = None, purpose: str = "sample"
    ) -> list[ClientInfo]:
        """Draw clients for a round, by partition.

        Parameters
        ----------
        round_ : int
            Number of the round.
        fraction : float | None
            Share of all clients, at least one; by default that of the configuration.
        purpose : str
            Purpose of the seed.
        """
        fraction = self.run.fraction if fraction is None else fraction
        count = max(1, round(fraction * len(self.clients)))
        generator = seeded_generator(self.run.seed, purpose, round=round_)
        drawn = torch.randperm(len(self.clients), generator=generator)[:count]
        return [self.clients[number] for number in sorted(drawn.tolist())]

    def query(
        self, kind: str, contents: Mapping[int, RecordDict], place: str = ""
    ) -> dict[int, RecordDict]:
        """Exchange messages that are not part of training; nothing is counted.

        Parameters
        ----------
        kind : str
            Message type, ``query.*``.
        contents : Mapping[int, RecordDict]
            Content for each client by its number.
        place : str
            Begins the error lines; by default the message type does.

        Returns
        -------
        dict[int, RecordDict]
            Content of each reply by the client's number, ascending.

        Raises
        ------
        RunError
            If a client failed or did not reply.
        NodesLost
            If a node lost its state.
        """
        numbers = {client.node_id: client.number for client in self.clients}
        nodes = {self.clients[n].node_id: content for n, content in contents.items()}
        replies = {}
        for reply in self._send(nodes, kind):
            number = numbers[reply.metadata.src_node_id]
            replies[number] = _content(reply, f"{place or kind}, client {number}")
        if missing := sorted(contents.keys() - replies.keys()):
            raise RunError(f"{place or kind}: no reply from clients {missing}")
        return dict(sorted(replies.items()))

    def _send(self, nodes: Mapping[int, RecordDict], kind: str) -> list[Message]:
        assert self._grid is not None
        sent = [Message(content, node, kind) for node, content in nodes.items()]
        replies = list(self._grid.send_and_receive(sent, timeout=self.timeout))
        if lost := [reply for reply in replies if _is_lost(reply)]:
            raise NodesLost(_reason(reply) for reply in lost)
        return replies

    # pylint: disable-next=too-many-arguments
    def exchange(
        self,
        round_: "Round",
        kind: str,
        sent: Mapping[int, RecordDict],
        *,
        step: int,
        label: str = "",
        full: Mapping[int, Mapping[str, int]] | None = None,
    ) -> dict[int, RecordDict]:
        """Send each client its message, count both ways, return the replies.

        Clients that raise are left out for the rest of the phase.

        Parameters
        ----------
        round_ : Round
            The current round.
        kind : str
            Message type. Its prefix is the phase, ``train`` or ``evaluate``.
        sent : Mapping[int, RecordDict]
            Content for each client by its number.
        step : int
            Step within the round, for error lines.
        label : str
            Compressor of the payload in words, for error lines.
        full : Mapping[int, Mapping[str, int]] | None
            By client and record name, the elements of tensors of which a part is sent.

        Returns
        -------
        dict[int, RecordDict]
            Content of each reply by the client's number, ascending.

        Raises
        ------
        NodesLost
            If the round must be repeated.
        RunError
            If the run must end; the text is one line.
        """
        assert self._grid is not None
        phase = PHASES[kind.partition(".")[0]]
        group = str(round_.number)
        outgoing = [
            Message(content, self.clients[n].node_id, kind, group_id=group)
            for n, content in sent.items()
        ]
        began = time.perf_counter()
        received = list(self._grid.send_and_receive(outgoing, timeout=self.timeout))
        seconds = time.perf_counter() - began
        down = {
            n: messages.entries(content, full.get(n) if full else None)
            for n, content in sent.items()
        }
        replies, up, failed = self._sort(round_, received, step, label, down)
        if missing := sorted(sent.keys() - replies.keys() - failed.keys()):
            raise RunError(
                f"{round_.place(step)}: no reply from clients {missing} "
                f"within {self.timeout:.0f} s"
            )
        for number, reason in failed.items():
            if phase == TRAINING or down[number]:  # else nothing that it keeps changed
                self.clients[number].version = UNKNOWN
            self._leave_out(round_, self.clients[number], phase, step, reason)
        self.ledger.exchange(phase, down, up)
        _divide(round_, replies.values(), seconds)
        return replies

    # pylint: disable-next=too-many-arguments,too-many-positional-arguments
    def _sort(
        self,
        round_: "Round",
        received: Sequence[Message],
        step: int,
        label: str,
        down: Mapping[int, Sequence[Entry]],
    ) -> tuple[dict[int, RecordDict], dict[int, list[Entry]], dict[int, str]]:
        """Return by client: contents of replies, their entries, reasons of failures."""
        by_node = {client.node_id: client.number for client in self.clients}
        numbered = [(by_node[r.metadata.src_node_id], r) for r in received]
        replies: dict[int, RecordDict] = {}
        up: dict[int, list[Entry]] = {}
        failed: dict[int, str] = {}
        lost = []
        for number, reply in sorted(numbered, key=lambda pair: pair[0]):
            if _is_lost(reply):
                lost.append(_reason(reply))
            elif reply.has_error() and reply.error.code in _CLIENT_FAULTS:
                failed[number] = _reason(reply)
            else:
                place = round_.place(step, number, label)
                replies[number] = _content(reply, place)
                with ends_run(place):
                    up[number] = messages.entries(replies[number])
                    for name in (messages.WORKER, *metrics_of(replies[number])):
                        messages.metric_of(replies[number], name)
        if lost:
            every = [*down.values(), *up.values()]
            raise NodesLost(lost, sum(e.bytes for entries in every for e in entries))
        return replies, up, failed

    # pylint: disable-next=too-many-arguments,too-many-positional-arguments
    def _leave_out(
        self, round_: "Round", client: ClientInfo, phase: str, step: int, reason: str
    ) -> None:
        """Leave a client out for the rest of a phase."""
        round_.fail(client, phase, step, reason)
        logger.warning(
            "round %d, %s, step %d: client %d failed and is left out: %s",
            *(round_.number, phase, step, client.number, reason),
        )


def _divide(round_: "Round", replies: Iterable[RecordDict], seconds: float) -> None:
    """Divide the time of an exchange into work of its busiest worker, and the rest."""
    workers: dict[int, tuple[float, float]] = {}
    for content in replies:
        metrics = metrics_of(content)
        worker = metrics[messages.WORKER]
        compute, codec = workers.get(worker, (0.0, 0.0))
        compute += metrics.get("compute_seconds", 0.0)
        codec += metrics.get("codec_seconds", 0.0)
        workers[worker] = compute, codec
    compute, codec = max(workers.values(), key=sum, default=(0.0, 0.0))
    spent = round_.watch.seconds
    spent["clients"] += compute
    spent["codec"] += codec
    spent["exchange"] += max(0.0, seconds - compute - codec)


def _greeted(reply: Message) -> str:
    """Return what begins the error line of a reply to a greeting."""
    metrics = {} if reply.has_error() else metrics_of(reply.content)
    if "partition" not in metrics:
        return messages.HELLO
    return f"{messages.HELLO}, client {metrics['partition']}"


def _content(reply: Message, place: str) -> RecordDict:
    """Return the content of a reply; `RunError` if it is a failure."""
    if reply.has_error():
        raise RunError(f"{place}: the client failed: {_reason(reply)}")
    failed = messages.config_of(reply.content, messages.FAILURE)
    if failed is not None:
        raise RunError(f"{place}: {failed['reason']!s}")
    return reply.content


def _is_lost(reply: Message) -> bool:
    """Return whether a node is back with an empty state."""
    return reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE


def _reason(reply: Message) -> str:
    """Return in one line why a reply is an error."""
    return " ".join((reply.error.reason or "no reason given").split())
