"""Server of the streams: one gRPC stream over TLS for every client of a run.

A client dials, proves by its token that it was invited, and then answers one request
after another. A stream that breaks may come back: the request that was not answered is
sent again, and the client sends the reply again if it has made it. So every request is
handled once. A client that does not come back in time is lost.

The streams live in an event loop in a thread of its own. `StreamServer` is what the
other threads call.
"""

import asyncio
import hmac
import logging
import secrets
import threading
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import grpc

from masksl.engine import EngineError
from masksl.engine.superlink import wire
from masksl.engine.superlink.certificate import RunCertificate
from masksl.engine.superlink.session import Session, Stream, StreamLost
from masksl.engine.superlink.wire import (
    KEEPALIVE,
    KEEPALIVE_TIME,
    METHOD,
    NODE_KEY,
    SERVICE,
    TOKEN_KEY,
    WireError,
)

FIRST_TIMEOUT = 10.0  # seconds for the first message of a stream
HANDSHAKE_TIMEOUT = 10.0  # seconds for a connection to become one of HTTP/2 over TLS
IDLE_TIMEOUT = 10.0  # seconds that a connection without a stream stays open
END_TIMEOUT = 5.0  # seconds for the clients to close their streams at the end
SPARE_STREAMS = 8  # beyond two of each client: one that breaks and one that takes over
SPARE_CONNECTIONS = 64  # likewise: connections that are not, or not yet, of a client
FIRST_BYTES = 4096  # of the first message, and of the metadata before it, at most
NODE_DIGITS = 20  # of a node id, which has 64 bits

REFUSED = "no such node, or another token"
TAKEN = "another process serves this node"

T = TypeVar("T")


def _is_fault(record: logging.LogRecord) -> bool:
    """Return whether gRPC logs a fault of this program.

    It also logs a traceback for metadata that is no text, and for a call that has
    ended: any peer could fill the log with them.
    """
    return not record.getMessage().startswith(("Invalid encoding", "ExecuteBatchError"))


logging.getLogger("grpc._cython.cygrpc").addFilter(_is_fault)


def _make_server(clients: int, max_message: int) -> grpc.aio.Server:
    """Return a gRPC server that accepts so many clients and bytes of a message."""
    streams = 2 * clients + SPARE_STREAMS
    return grpc.aio.server(
        maximum_concurrent_rpcs=streams,
        options=(
            *KEEPALIVE,
            ("grpc.max_receive_message_length", max_message),
            ("grpc.max_send_message_length", max_message),
            ("grpc.max_concurrent_streams", SPARE_STREAMS),  # of a connection
            ("grpc.max_allowed_incoming_connections", streams + SPARE_CONNECTIONS),
            ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_TIMEOUT * 1000)),
            ("grpc.max_connection_idle_ms", int(IDLE_TIMEOUT * 1000)),
            ("grpc.max_metadata_size", FIRST_BYTES),
            ("grpc.so_reuseport", 0),
            (
                "grpc.http2.min_ping_interval_without_data_ms",
                int(KEEPALIVE_TIME * 500),
            ),
        ),
    )


class StreamServer:
    """The server of the streams of a run.

    Parameters
    ----------
    bind : str
        ``host:port`` to listen at; port 0 for any free one.
    clients : int
        Clients that may be connected at the same time.
    reconnect : float
        Seconds that a stream that broke may take to come back.
    max_message : int
        Bytes of a message at most.
    certificate : RunCertificate
        Certificate and key of the server.

    Attributes
    ----------
    port : int
        The port at which it listens.

    Raises
    ------
    EngineError
        If it cannot listen at that address.
    """

    # pylint: disable-next=too-many-arguments
    def __init__(
        self,
        bind: str,
        *,
        clients: int,
        reconnect: float,
        max_message: int,
        certificate: RunCertificate,
    ) -> None:
        self._bind = bind
        self._clients = clients
        self._reconnect = reconnect
        self._max_message = max_message
        self._certificate = certificate
        self._sessions: dict[int, Session] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="streams", daemon=True
        )
        self._thread.start()
        try:
            self._server, self.port = self._call(self._start())
        except BaseException:
            self._stop_loop()
            raise

    # --- called by other threads ------------------------------------------------------

    def invite(self, node: int) -> str:
        """Return the token with which a node may open its stream.

        A session that the node had before ends.
        """

        async def invite() -> str:
            if node in self._sessions:
                self._sessions[node].lose("it was invited again")
            session = self._sessions[node] = Session(secrets.token_hex(32))
            return session.token

        return self._call(invite())

    def connected(self) -> dict[int, int]:
        """Return the partition by node of the clients that have a stream, or may have
        one again."""

        async def connected() -> dict[int, int]:
            return {
                node: session.partition
                for node, session in self._sessions.items()
                if session.instance and not session.lost and not session.ending
            }

        return self._call(connected())

    def lost(self) -> dict[int, str]:
        """Return by node why clients are lost; only an invitation brings them back."""

        async def lost() -> dict[int, str]:
            return {node: s.lost for node, s in self._sessions.items() if s.lost}

        return self._call(lost())

    def dismiss(self, node: int) -> None:
        """Tell a client to close its stream; only an invitation brings it back."""

        async def dismiss() -> None:
            self._sessions[node].end()

        self._call(dismiss())

    def exchange(
        self, requests: Mapping[int, bytes], timeout: float | None
    ) -> dict[int, bytes | StreamLost]:
        """Send every node its request and return the replies.

        Parameters
        ----------
        requests : Mapping[int, bytes]
            Encoded messages by node, each of a greater number than those before.
        timeout : float | None
            Seconds after which missing replies are left out; None waits for all.

        Returns
        -------
        dict[int, bytes | StreamLost]
            By node the reply, or why its client is lost.
        """
        return self._call(self._exchange(requests, timeout))

    def close(self) -> None:
        """End all streams in order, as far as the clients answer, and stop."""
        if not self._loop.is_closed():
            self._call(self._close())
            self._stop_loop()

    def _call(self, task: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the event loop and return its result."""
        future = asyncio.run_coroutine_threadsafe(task, self._loop)
        try:
            return future.result()
        except BaseException:  # perhaps this thread was interrupted
            future.cancel()
            raise

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- run in the event loop --------------------------------------------------------

    async def _start(self) -> tuple[grpc.aio.Server, int]:
        """Start the gRPC server; return it and its port."""
        server = _make_server(self._clients, self._max_message)
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),)
        )
        pair = (self._certificate.key, self._certificate.certificate)
        try:
            port = server.add_secure_port(
                self._bind, grpc.ssl_server_credentials([pair])
            )
        except RuntimeError as error:
            raise EngineError(
                f"engine.bind={self._bind!r}: cannot listen there ({error})"
            ) from error
        await server.start()
        return server, port

    # pylint: disable-next=unused-argument
    async def _serve(self, replies: Any, context: grpc.aio.ServicerContext) -> None:
        """Serve one stream: write a request, read the reply, and so on.

        No message is read before the token has matched.
        """
        session = self._authenticated(context)
        if session is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, REFUSED)
            return
        stream = Stream()
        try:
            await self._admit(session, stream, context)
            while session.stream is stream and not session.lost:
                if session.request is not None:
                    reply = await self._reply(session.request, context)
                    if reply is None:
                        return
                    session.answer(reply)
                elif session.ending:
                    await context.write(wire.encode(wire.BYE, {}))
                    return
                else:
                    await stream.wake.wait()
                    stream.wake.clear()
        except WireError as error:
            if session.stream is stream:
                session.lose(f"its reply is broken: {error}")
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            self._left(session, stream)

    def _authenticated(self, context: grpc.aio.ServicerContext) -> Session | None:
        """Return the session of the token of a call, None if it is of no session.

        A client that is lost must end its process, to be started anew.
        """
        metadata = dict(context.invocation_metadata() or ())
        node, token = metadata.get(NODE_KEY, ""), metadata.get(TOKEN_KEY, "")
        if not (
            isinstance(node, str)
            and (node.isascii() and node.isdecimal())
            and len(node) <= NODE_DIGITS
        ):
            return None
        session = self._sessions.get(int(node))
        expected = session.token if session is not None else secrets.token_hex(32)
        matches = hmac.compare_digest(str(token).encode(), expected.encode())
        return session if matches and session is not None and not session.lost else None

    async def _admit(
        self, session: Session, stream: Stream, context: grpc.aio.ServicerContext
    ) -> None:
        """Read the first message of a stream and let it be that of its session."""
        try:
            first = await asyncio.wait_for(context.read(), FIRST_TIMEOUT)
        except TimeoutError:
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            await context.abort(code, f"no first message in {FIRST_TIMEOUT:.0f} s")
        if first is grpc.aio.EOF or len(first) > FIRST_BYTES:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no first message")
        head, _ = wire.decode(first)
        instance, partition = head.get("instance"), head.get("partition")
        if not (isinstance(instance, str) and instance) or not (
            isinstance(partition, int) and not isinstance(partition, bool)
        ):
            raise WireError("first message without instance and partition")
        if session.instance not in ("", instance):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, TAKEN)
        session.instance, session.partition = instance, partition
        session.attach(stream)
        await context.send_initial_metadata(())  # tells the client that it is admitted

    async def _reply(
        self, request: bytes, context: grpc.aio.ServicerContext
    ) -> bytes | None:
        """Write a request and read the reply; None if the stream has ended.

        Replies to requests before it are skipped.
        """
        number = wire.number_of(request)
        await context.write(request)
        while (reply := await context.read()) is not grpc.aio.EOF:
            if wire.number_of(reply) > number:
                raise WireError(f"number {wire.number_of(reply)} after {number}")
            if wire.number_of(reply) == number:
                return bytes(reply)
        return None

    def _left(self, session: Session, stream: Stream) -> None:
        """Wait for a stream that has ended to come back, unless another took over."""
        if session.stream is not stream:
            return
        session.stream = None
        if not session.ending and not session.lost:
            reason = f"its stream broke and did not come back in {self._reconnect:g} s"
            session.timer = self._loop.call_later(self._reconnect, session.lose, reason)

    async def _exchange(
        self, requests: Mapping[int, bytes], timeout: float | None
    ) -> dict[int, bytes | StreamLost]:
        tasks = {
            node: asyncio.ensure_future(self._sessions[node].ask(data))
            for node, data in requests.items()
        }
        try:
            if tasks:
                await asyncio.wait(tasks.values(), timeout=timeout)
        except asyncio.CancelledError:
            for task in tasks.values():
                task.cancel()
            raise
        outcomes: dict[int, bytes | StreamLost] = {}
        for node, task in tasks.items():
            if not task.done():
                task.cancel()
                self._sessions[node].lose("it did not answer in time")
            elif isinstance(error := task.exception(), StreamLost):
                outcomes[node] = error
            else:
                outcomes[node] = task.result()
        return outcomes

    async def _close(self) -> None:
        for session in self._sessions.values():
            if session.request is not None:
                session.lose("the run has ended")
            session.end()
        began = self._loop.time()
        while self._loop.time() < began + END_TIMEOUT:
            if not any(session.stream for session in self._sessions.values()):
                break
            await asyncio.sleep(0.01)
        await self._server.stop(None)
