"""Client of the streams: dials the server and answers its requests until it says
bye."""

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import grpc
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import ErrorCode

from masksl.engine import EngineError
from masksl.engine.nodes import answer
from masksl.engine.superlink import wire
from masksl.engine.superlink.certificate import NAME
from masksl.engine.superlink.wire import (
    KEEPALIVE,
    METHOD,
    NODE_KEY,
    SERVICE,
    TOKEN_KEY,
)

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0  # seconds between two attempts to connect
FINAL = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
)
"""Answers of a server after which it is not called again."""

ClientCall = Callable[[Message, Context], Message]

logger = logging.getLogger(__name__)


def serve(client_app: ClientCall, message: Message, context: Context) -> Message:
    """Answer the requests of a run until its server says bye.

    Parameters
    ----------
    client_app : Callable[[Message, Context], Message]
        Answers a message; its exceptions become error replies.
    message : Message
        The invitation.
    context : Context
        Of the node. Its state is empty afterwards.

    Returns
    -------
    Message
        An empty reply to the invitation.

    Raises
    ------
    EngineError
        If the server cannot be reached, or refuses this client.
    """
    invitation = message.content[wire.INVITATION]
    assert isinstance(invitation, ConfigRecord)
    try:
        _Client(client_app, dict(invitation), context).run()
    finally:
        context.state.clear()
    return Message(RecordDict(), reply_to=message)


class _Client:
    """One node of a run, which keeps its last reply in case that it is lost.

    Parameters
    ----------
    client_app : Callable[[Message, Context], Message]
        Answers a message.
    invitation : dict[str, Any]
        See `wire.INVITATION`.
    context : Context
        Of the node.
    """

    def __init__(
        self, client_app: ClientCall, invitation: dict[str, Any], context: Context
    ) -> None:
        if "partition-id" not in context.node_config:
            raise EngineError("node config without partition-id")
        self._client_app = client_app
        self._invitation = invitation
        self._context = context
        partition = int(context.node_config["partition-id"])
        first = {"instance": secrets.token_hex(16), "partition": partition}
        self._first = wire.encode(wire.BYE, first)
        self._last: tuple[int, Future[bytes]] = wire.BYE, Future()
        # Answers are made in a thread of their own: meanwhile a stream may break and
        # be opened again.
        self._worker = ThreadPoolExecutor(1, "answers")
        self._admitted: float | None = None  # when the last stream was
        self._heard = False  # whether a request came through it

    def run(self) -> None:
        """Answer requests until the server says bye."""
        try:
            self._keep_stream()
        finally:
            self._worker.shutdown()

    def _keep_stream(self) -> None:
        """Open the stream again whenever it breaks."""
        patience = float(self._invitation["reconnect"])
        pause, end = FIRST_PAUSE, time.monotonic() + patience
        while True:
            self._admitted, self._heard = None, False
            try:
                if self._serve_stream():
                    return
                reason = "the server closed it"
            except grpc.RpcError as error:
                reason = self._check(error)
            now = time.monotonic()
            if self._heard or (self._admitted or now) + patience < now:
                pause, end = FIRST_PAUSE, now + patience
            if now > end:
                address = self._invitation["address"]
                raise EngineError(f"{address}: no stream for {patience:g} s ({reason})")
            logger.warning("the stream broke (%s) and is opened again", reason)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _check(self, error: grpc.RpcError) -> str:
        """Return in words why a stream broke; `EngineError` if that is final."""
        assert isinstance(error, grpc.Call)
        reason = f"{error.code().name}: {error.details()}"
        exhausted = error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        # Before it is admitted: others have taken all streams, for the moment.
        if error.code() in FINAL or (exhausted and self._admitted is not None):
            raise EngineError(
                f"{self._invitation['address']}: refused ({reason})"
            ) from error
        return reason

    def _serve_stream(self) -> bool:
        """Open a stream and serve it; return whether it ended in order."""
        replies: SimpleQueue[bytes | None] = SimpleQueue()
        replies.put(self._first)
        with self._channel() as channel:
            call = channel.stream_stream(f"/{SERVICE}/{METHOD}")
            node = str(self._context.node_id)
            credentials = (NODE_KEY, node), (TOKEN_KEY, self._invitation["token"])
            requests = call(_until_none(replies), metadata=credentials)
            try:
                requests.initial_metadata()  # comes once the server has admitted it
                if requests.is_active():
                    self._admitted = time.monotonic()
                for request in requests:
                    if wire.number_of(request) == wire.BYE:
                        return True
                    self._heard = True
                    self._reply(request).add_done_callback(
                        lambda reply: replies.put(reply.result())
                    )
            finally:
                replies.put(None)
                requests.cancel()
        return False

    def _channel(self) -> grpc.Channel:
        length = self._invitation["max_message"]
        certificate = self._invitation["certificate"]
        return grpc.secure_channel(
            self._invitation["address"],
            grpc.ssl_channel_credentials(root_certificates=certificate),
            options=(
                *KEEPALIVE,
                ("grpc.ssl_target_name_override", NAME),
                ("grpc.max_receive_message_length", length),
                ("grpc.max_send_message_length", length),
            ),
        )

    def _reply(self, request: bytes) -> "Future[bytes]":
        """Return the reply to a request: the one begun before if it comes again."""
        number = wire.number_of(request)
        if number != self._last[0]:
            self._last = number, self._worker.submit(self._answer, number, request)
        return self._last[1]

    def _answer(self, number: int, request: bytes) -> bytes:
        """Return the reply to a request, whatever happens."""
        try:
            head, content = wire.decode(request)
            kind, group = str(head["kind"]), str(head["group"])
            message = Message(content, self._context.node_id, kind, group_id=group)
            reply = answer(self._client_app, message, self._context)
            if reply.has_error():
                return _error(number, reply.error.code, reply.error.reason or "")
            data = wire.encode(number, {}, reply.content)
        except Exception as error:  # pylint: disable=broad-exception-caught
            code = ErrorCode.CLIENT_APP_CRASHED
            return _error(number, code, f"{type(error).__name__}: {error}")
        if len(data) > self._invitation["max_message"]:
            return wire.encode(number, {"too_long": len(data)})
        return data


def _error(number: int, code: int, reason: str) -> bytes:
    return wire.encode(number, {"error": [code, reason]})


def _until_none(queue: "SimpleQueue[bytes | None]") -> Iterator[bytes]:
    """Yield what a queue gets until it gets None."""
    while (item := queue.get()) is not None:
        yield item
