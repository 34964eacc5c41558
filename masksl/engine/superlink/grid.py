"""Grid of a run on a SuperLink: Flower invites the clients, streams carry the rest."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.run import Run

from masksl.engine import EngineError
from masksl.engine.nodes import CallGrid
from masksl.engine.options import SuperlinkOptions
from masksl.engine.superlink import wire
from masksl.engine.superlink.certificate import RunCertificate
from masksl.engine.superlink.server import StreamServer
from masksl.engine.superlink.session import StreamLost
from masksl.engine.superlink.wire import WireError

TTL = 30 * 24 * 3600.0  # seconds that an invitation is valid, Flower's default is 12 h
MOST_FAILURES = 3  # after so many a node is not invited again
POLL = 0.05  # seconds between two looks at the streams
FLOWER_POLL = 1.0  # seconds between two looks at Flower's nodes and replies
SLOW = 60.0  # seconds after which a node that starts makes room for another
REPEAT = 90.0  # seconds after which an invitation may have been lost with its node

logger = logging.getLogger(__name__)


class Inviter(Protocol):
    """What delivers invitations: Flower's grid, or nodes of this machine."""

    @property
    def run(self) -> Run:
        """The run of the messages."""

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are connected."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver messages and return their ids."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to messages that are there."""


@contextmanager
def _asking_flower() -> Iterator[None]:
    """Turn whatever Flower's grid raises into `EngineError`."""
    try:
        yield
    except Exception as error:  # pylint: disable=broad-exception-caught
        reason = " ".join(str(error).split()) or type(error).__name__
        raise EngineError(f"the SuperLink does not answer ({reason})") from error


@dataclass
class _Guest:
    """What is known of the start of a node that has no stream.

    Attributes
    ----------
    token : str
        Token of its invitation.
    message : str
        Id of the newest invitation, empty if it was answered.
    invited : float
        When that was sent.
    failures : int
        How often the node answered an invitation with an error.
    reason : str
        The last of these errors.
    """

    token: str = ""
    message: str = ""
    invited: float = 0.0
    failures: int = 0
    reason: str = ""

    @property
    def is_starting(self) -> bool:
        """Whether its process is probably being started."""
        return bool(self.message) and time.monotonic() < self.invited + SLOW

    @property
    def is_due(self) -> bool:
        """Whether it must be invited, for the first time or once more."""
        return not self.message or time.monotonic() > self.invited + REPEAT


class SuperlinkGrid(CallGrid):
    """A grid whose clients answer through streams that they have opened.

    A client that is gone is answered for with the error ``NODE_UNAVAILABLE``; it is
    invited again by `get_node_ids`.

    Parameters
    ----------
    flower : Inviter
        Flower's grid, or what stands in for it.
    clients : int
        Partitions that must be served. Other nodes are told to close their streams.
    options : SuperlinkOptions
        Options of the engine.

    Attributes
    ----------
    address : str
        ``host:port`` at which the clients reach it.
    port : int
        Port at which it listens.
    """

    def __init__(
        self, flower: Inviter, clients: int, options: SuperlinkOptions
    ) -> None:
        super().__init__(flower.run.run_id, 0)
        self._flower = flower
        self._clients = clients
        self._options = options
        if options.address is None:
            raise EngineError(
                "engine.address=null: must be HOST:PORT at which the clients reach "
                "this server; engine=flower does without it, at seconds an exchange"
            )
        self._certificate = RunCertificate.make()
        self._server = StreamServer(
            options.where,
            clients=clients + options.starting,
            reconnect=options.reconnect,
            max_message=options.max_message_mib * 2**20,
            certificate=self._certificate,
        )
        host, _, port = options.address.rpartition(":")
        self.port = self._server.port
        self.address = f"{host}:{self._server.port}" if port == "0" else options.address
        self._guests: dict[int, _Guest] = {}
        self._serving: dict[int, int] = {}  # node by partition
        self._spare: set[int] = set()  # nodes that were told to close their streams
        self._online: set[int] = set()  # nodes that are connected to the SuperLink
        self._polled = float("-inf")
        self._number = 0

    def close(self) -> None:
        """End the streams and stop listening."""
        self._server.close()

    # --- who takes part ---------------------------------------------------------------

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes by partition; invite them, and wait until all are there.

        Raises
        ------
        EngineError
            If they are not there in time, or cannot start.
        """
        began = time.monotonic()
        while self.invite():
            waited = time.monotonic() - began
            if waited > self._options.patience or self._is_hopeless():
                raise EngineError(self._missing(waited))
            time.sleep(POLL)
        return [self._serving[number] for number in range(self._clients)]

    def invite(self) -> bool:
        """Invite nodes that may serve a missing partition, without waiting for them.

        Returns
        -------
        bool
            Whether a partition is missing.
        """
        self._forget_lost()
        self._seat()
        if len(self._serving) == self._clients:
            return False
        if time.monotonic() > self._polled + FLOWER_POLL:
            self._polled = time.monotonic()
            with _asking_flower():
                self._read_errors()
                self._online = set(self._flower.get_node_ids())
            self._forget_absent()
            starting = sum(guest.is_starting for guest in self._guests.values())
            for node in sorted(self._candidates()):
                guest = self._guests.setdefault(node, _Guest())
                if starting < self._options.starting and guest.is_due:
                    self._send_invitation(node, guest)
                    starting += 1
        return True

    def _candidates(self) -> set[int]:
        """Return the connected nodes that may serve a partition and do not."""
        failed = {n for n, g in self._guests.items() if g.failures >= MOST_FAILURES}
        return self._online - set(self._serving.values()) - self._spare - failed

    def _send_invitation(self, node: int, guest: _Guest) -> None:
        """Invite a node; an invitation that is repeated has the same token.

        So the first of two processes that the node may have started is not refused.
        """
        if not guest.message:
            guest.token = self._server.invite(node)
        invitation = ConfigRecord(
            {
                "address": self.address,
                "certificate": self._certificate.certificate,
                "token": guest.token,
                "max_message": self._options.max_message_mib * 2**20,
                "reconnect": self._options.reconnect,
            }
        )
        content = RecordDict({wire.INVITATION: invitation})
        sent = Message(content, node, wire.SERVE, ttl=TTL)
        with _asking_flower():
            (message,) = self._flower.push_messages([sent])
        guest.message, guest.invited = message or "", time.monotonic()

    def _read_errors(self) -> None:
        """Read the replies of nodes that could not start."""
        waiting = {g.message: node for node, g in self._guests.items() if g.message}
        if not waiting:
            return
        for reply in self._flower.pull_messages(list(waiting)):
            node = waiting[reply.metadata.reply_to_message_id]
            guest = self._guests[node]
            guest.message = ""
            if reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE:
                continue  # it is invited again once it is back
            guest.failures += 1
            guest.reason = "it hung up"
            if reply.has_error():
                reason = " ".join((reply.error.reason or "").split())
                guest.reason = (
                    f"error {reply.error.code}, {reason or 'no reason given'}"
                )
            logger.warning("node %d did not start: %s", node, guest.reason)

    def _seat(self) -> None:
        """Let nodes that have opened a stream serve their partitions."""
        for node, partition in self._server.connected().items():
            if node in self._serving.values():
                continue
            self._guests.pop(node, None)
            if partition in range(self._clients) and partition not in self._serving:
                self._serving[partition] = node
                continue
            self._server.dismiss(node)
            self._spare.add(node)
            if partition in self._serving:
                logger.warning(
                    "nodes %d and %d both have partition-id=%d; the first serves it",
                    *(self._serving[partition], node, partition),
                )

    def _forget_lost(self) -> None:
        """Forget clients that are lost."""
        lost = self._server.lost()
        for partition, node in list(self._serving.items()):
            if node in lost:
                del self._serving[partition]
                self._spare.clear()  # one of them may have the same partition
        for node in lost.keys() & self._guests.keys():
            self._guests[node].message = ""  # its token is of no use any more

    def _forget_absent(self) -> None:
        """Forget what nodes did that have left; they may come back as others."""
        self._spare &= self._online
        for node in self._guests.keys() - self._online:
            self._guests[node].failures = 0

    def _is_hopeless(self) -> bool:
        """Return whether nodes failed too often, and there is no other to wait for."""
        failed = any(g.failures >= MOST_FAILURES for g in self._guests.values())
        return failed and not self._candidates()

    def _missing(self, waited: float) -> str:
        """Return in one line which clients are missing after a time, and why."""
        missing = [n for n in range(self._clients) if n not in self._serving]
        failed = [
            f"; node {node} did not start: {guest.reason}"
            for node, guest in self._guests.items()
            if guest.failures
        ]
        return (
            f"clients={self._clients}: no stream of the partitions {missing} after "
            f"{waited:.0f} s; {len(self._online)} nodes are connected to the SuperLink"
            f", {len(self._serving)} have opened their streams" + "".join(failed)
        )

    # --- exchanges --------------------------------------------------------------------

    def exchange(
        self, messages: Sequence[Message], timeout: float | None
    ) -> list[Message]:
        """Send messages and return the replies.

        Raises
        ------
        EngineError
            If a message is too long, or a reply is broken.
        """
        sent = {message.metadata.dst_node_id: message for message in messages}
        if len(sent) < len(messages):
            raise ValueError("an exchange has one message to a node")
        requests = {node: self._encode(message) for node, message in sent.items()}
        outcomes = self._server.exchange(requests, timeout)
        return [self._reply(sent[node], outcome) for node, outcome in outcomes.items()]

    def _encode(self, message: Message) -> bytes:
        self._number += 1
        kind = message.metadata.message_type
        head = {"kind": kind, "group": message.metadata.group_id}
        try:
            data = wire.encode(self._number, head, message.content)
        except WireError as error:
            raise EngineError(f"{kind}: {error}") from error
        self._check_length(kind, len(data))
        return data

    def _reply(self, sent: Message, outcome: bytes | StreamLost) -> Message:
        """Return the reply to a message, or the error that its client is lost."""
        if isinstance(outcome, StreamLost):
            node = sent.metadata.dst_node_id
            reason = f"client {self._partition(node)} is gone: {outcome}"
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, reason), reply_to=sent)
        try:
            head, content = wire.decode(outcome)
        except WireError as error:
            partition = self._partition(sent.metadata.dst_node_id)
            raise EngineError(f"client {partition}: {error}") from error
        if "error" in head:
            return Message(Error(*head["error"]), reply_to=sent)
        length = head.get("too_long", 0)
        self._check_length(f"reply to {sent.metadata.message_type}", length)
        return Message(content, reply_to=sent)

    def _check_length(self, what: str, length: int) -> None:
        if length > self._options.max_message_mib * 2**20:
            raise EngineError(
                f"engine.max_message_mib={self._options.max_message_mib}: {what} has "
                f"{length:,} bytes"
            )

    def _partition(self, node: int) -> int:
        """Return the partition that a node serves."""
        return next(p for p, serving in self._serving.items() if serving == node)
