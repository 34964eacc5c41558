"""Peers that attack the server of a run are refused, while the run goes on."""

import itertools
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.run import Run as FlowerRun

from masksl.engine import EngineError
from masksl.engine.nodes import set_task_identity, with_ids
from masksl.engine.options import SuperlinkOptions
from masksl.engine.superlink import client, server, wire
from masksl.engine.superlink.certificate import RunCertificate
from masksl.engine.superlink.grid import SuperlinkGrid
from masksl.engine.superlink.server import StreamServer
from masksl.engine.superlink.wire import KEEPALIVE
from tests.engine import superlink_peers
from tests.engine.superlink_apps import Proxy
from tests.engine.superlink_peers import (
    DATA,
    GOOD,
    HEADERS,
    PING,
    PREFACE,
    SETTINGS,
    Host,
    Run,
    call,
    channel_to,
    connect,
    connect_http2,
    connect_tls,
    credentials_of,
    first_message,
    frame,
    head_of,
    opening,
    prefixed,
    run_apart,
    run_here,
    status_in,
    times,
    until_closed,
)

MIB = 2**20
TIMEOUT = 1.0  # seconds, of each kind, of the servers here
LATER = TIMEOUT + 2.0  # when it must have passed on a machine that is busy
IDLE_CLOSE = 2 * LATER + 3.0  # gRPC looks for idle connections once in a time
MAX_MIB = 20  # length of a reply at most
CODES = {code.value[0]: code for code in grpc.StatusCode}


@pytest.fixture(name="reads", scope="module")
def _reads() -> set[tuple[str, str]]:
    """Return the credentials of the streams from which a message was read."""
    return set()


class Watched:
    """The context of a call that notes when a message is read."""

    def __init__(self, context: Any, reads: set[tuple[str, str]]) -> None:
        self._context = context
        self._reads = reads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def read(self) -> Any:
        metadata = dict(self._context.invocation_metadata())
        self._reads.add((metadata[wire.NODE_KEY], metadata[wire.TOKEN_KEY]))
        return await self._context.read()


@pytest.fixture(name="run", scope="module")
def _run(reads: set[tuple[str, str]]) -> Iterator[Run]:
    """Return a run that goes on in this process."""
    serve = StreamServer._serve

    async def watched(self: StreamServer, replies: Any, context: Any) -> None:
        await serve(self, replies, Watched(context, reads))

    with pytest.MonkeyPatch.context() as patch, times(TIMEOUT, TIMEOUT, TIMEOUT):
        patch.setattr(StreamServer, "_serve", watched)
        with run_here(Host()) as run:
            yield run


@pytest.fixture(name="proxy", scope="module")
def _proxy() -> Iterator[Proxy]:
    """Return what cuts the stream of the last client of `apart`."""
    with closing(Proxy(0)) as proxy:
        yield proxy


@pytest.fixture(name="apart", scope="module")
def _apart(proxy: Proxy) -> Iterator[Run]:
    """Return a run whose server has a process of its own."""
    timeouts = {"first": TIMEOUT, "handshake": LATER, "idle": LATER}
    with run_apart(proxy, **timeouts, reconnect=20.0) as run:
        yield run


@pytest.fixture(autouse=True)
def no_traceback(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Demand that nothing that a peer does looks like a fault of the program."""
    yield
    records = caplog.get_records("call")
    assert not [record for record in records if record.levelno >= logging.ERROR]


# --- who may speak --------------------------------------------------------------------


def fields(run: Run, case: str) -> list[tuple[bytes, bytes]]:
    """Return metadata that does not prove anything; bytes that no client could send."""
    one = run.tokens[1]
    cases: dict[str, tuple[int | bytes, str | bytes]] = {
        "wrong token": (1, "0" * 64),
        "empty token": (1, ""),
        "half a token": (1, one[:32]),
        "token in capitals": (1, one.upper() + "A"),
        "token of another node": (1, run.tokens[2]),
        "token that is no text": (1, b"\xff\xfe\x80"),
        "no such node": (99, one),
        "no node": (b"", one),
        "node that is no number": (b"one", one),
        "negative node": (b"-1", one),
        "node with a sign": (b"+1", one),
        "node with an underscore": (b"0_1", one),
        "node of other digits": ("١".encode(), one),
        "superscript node": ("¹".encode(), one),
        "node that is too long": (b"0" * 50 + b"1", one),
        "huge node": (b"9" * 120, one),
        "node that is no text": (b"\xff\xfe\x80", one),
    }
    if case == "no metadata":
        return []
    if case == "no token":
        return credentials_of(1, "")[:1]
    return credentials_of(*cases[case])


@pytest.mark.parametrize(
    "case",
    [
        *("no metadata", "no token", "wrong token", "empty token", "half a token"),
        *("token in capitals", "token of another node", "token that is no text"),
        *("no such node", "no node", "node that is no number", "negative node"),
        *("node with a sign", "node with an underscore", "node of other digits"),
        *("superscript node", "node that is too long", "huge node"),
        "node that is no text",
    ],
)
def test_a_stream_without_the_token_of_its_node_is_not_read(
    case: str, run: Run, reads: set[tuple[str, str]]
) -> None:
    body = prefixed(first_message() + bytes(60_000))  # as much as may come unread
    parts = [body[place : place + 15_000] for place in range(0, len(body), 15_000)]
    with connect_tls(run.port) as peer, run.undisturbed():
        peer.sendall(opening(*fields(run, case)))
        with suppress(OSError):  # it may be closed already
            for part in parts:
                peer.sendall(frame(DATA, part, stream=1))
        assert answered(peer) is grpc.StatusCode.UNAUTHENTICATED
    known = {(str(node), token) for node, token in run.tokens.items()}
    assert {("1", run.tokens[1]), ("2", run.tokens[2])} <= reads <= known


def answered(peer: socket.socket) -> grpc.StatusCode | None:
    """Return the status that a server answers a peer with, None if it has none."""
    peer.settimeout(10)
    data = b""
    while status_in(data) is None:
        part = peer.recv(2**16)
        if not part:
            return None
        data += part
    return CODES[status_in(data) or 0]


def status(run: Run, node: int, messages: Iterable[bytes]) -> grpc.StatusCode:
    """Return how a stream of a client of gRPC with the right token ends."""
    with channel_to(run) as channel:
        stream = call(channel, node, run.tokens[node], iter(messages), timeout=10)
        with suppress(grpc.RpcError):
            list(stream)
        return stream.code()


def test_another_service_is_not_implemented(run: Run) -> None:
    with channel_to(run) as channel, run.undisturbed():
        for path in ("/masksl.Streams/Other", "/grpc.health.v1.Health/Check"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(path)(b"", timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_flood_of_streams_without_a_token_keeps_no_client_out(run: Run) -> None:
    credentials = credentials_of(1, "0" * 64)
    streams = range(1, 2 * server.SPARE_STREAMS, 2)
    flood = b"".join(head_of(*credentials, stream=number) for number in streams)
    with ExitStack() as stack, run.undisturbed():
        peers = [stack.enter_context(connect_tls(run.port)) for _ in range(40)]
        for peer in peers:
            peer.sendall(PREFACE + frame(SETTINGS) + flood)
        with channel_to(run) as channel:  # as a client that comes back meanwhile
            message = iter([first_message()])
            stream = call(channel, 8, run.tokens[8], message)
            stream.initial_metadata()
            assert stream.is_active()
            stream.cancel()
        for peer in peers:
            assert answered(peer) is grpc.StatusCode.UNAUTHENTICATED


def test_an_invited_client_that_takes_all_streams_keeps_no_other_out(run: Run) -> None:
    most = 2 * len(GOOD) + server.SPARE_STREAMS
    head = opening(*credentials_of(3, run.tokens[3]))
    with ExitStack() as stack, run.undisturbed():
        peers = [stack.enter_context(connect_tls(run.port)) for _ in range(most)]
        for peer in peers:
            peer.sendall(head)
        assert {answered(peer) for peer in peers} == {
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            grpc.StatusCode.DEADLINE_EXCEEDED,
        }
        for peer in (connect_tls(run.port) for _ in range(most)):
            stack.enter_context(peer).sendall(head)
        run.start(6)
        began = time.monotonic()
        while 6 not in run.ask("connected"):
            assert time.monotonic() - began < 10
            time.sleep(0.05)


# --- whom a client trusts -------------------------------------------------------------


def failure(run: Run, **changes: Any) -> str:
    """Return why a good client gives up; it must say so in one line, and in time."""
    began = time.monotonic()
    with pytest.raises(EngineError) as caught:
        run.serve(7, reconnect=1.0, **changes)
    assert time.monotonic() - began < 6
    (line,) = str(caught.value).splitlines()
    return line


def test_a_client_that_pins_another_certificate_does_not_speak(
    run: Run, reads: set[tuple[str, str]]
) -> None:
    other = RunCertificate.make().certificate
    with run.undisturbed():
        line = failure(run, certificate=other)
    assert line.startswith(f"localhost:{run.port}: no stream for 1 s (UNAVAILABLE: ")
    assert ("7", run.tokens[7]) not in reads


def test_a_client_tells_no_other_server_its_token(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    async def note(*_: Any) -> None:
        calls.append(1)

    monkeypatch.setattr(StreamServer, "_serve", note)
    other = StreamServer(
        "127.0.0.1:0",
        clients=1,
        reconnect=1.0,
        max_message=MIB,
        certificate=RunCertificate.make(),
    )
    with run.undisturbed(), closing(other):
        line = failure(run, address=f"localhost:{other.port}")
    assert line.startswith(f"localhost:{other.port}: no stream for 1 s (UNAVAILABLE: ")
    assert not calls


def test_a_client_says_nothing_in_clear(run: Run) -> None:
    heard = bytearray()

    def listen() -> None:
        with suppress(OSError):
            while True:
                peer, _ = listener.accept()
                with peer:
                    heard.extend(peer.recv(2**16))

    with run.undisturbed(), socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=listen)
        thread.start()
        failure(run, address=f"localhost:{listener.getsockname()[1]}")
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert heard.startswith(b"\x16\x03")  # TLS
    assert run.tokens[7].encode() not in heard and b"masksl-" not in heard


# --- peers that do not speak HTTP/2 over TLS, or slowly -------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        *(b"", bytes(range(256)) * 300, b"GET / HTTP/1.1\r\nHost: masksl\r\n\r\n"),
        PREFACE + frame(SETTINGS),
        b"\x16\x03\x01\xff\xff" + bytes(1000),  # TLS of a record that does not end
    ],
    ids=["nothing", "random", "HTTP/1", "HTTP/2", "half a record"],
)
def test_a_peer_without_tls_is_closed(sent: bytes, run: Run) -> None:
    with connect(run.port) as peer, run.undisturbed():
        with suppress(OSError):  # it may be closed already
            peer.sendall(sent)
        data, _ = until_closed(peer, LATER)
    assert len(data) < 100  # an alert of TLS at most


@pytest.mark.parametrize(
    "sent",
    [
        *(b"", bytes(range(256)) * 300, b"GET / HTTP/1.1\r\nHost: masksl\r\n\r\n"),
        *(PREFACE, PREFACE + frame(HEADERS, bytes(10), 4, 1)),
    ],
    ids=["nothing", "random", "HTTP/1", "no settings", "broken"],
)
def test_a_peer_without_http2_is_closed(sent: bytes, run: Run) -> None:
    with connect_tls(run.port) as peer, run.undisturbed():
        with suppress(OSError):  # it may be closed already
            peer.sendall(sent)
        until_closed(peer, LATER)


def test_slow_handshakes_are_closed(run: Run) -> None:
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200)
    cases = ((connect, hello), (connect_tls, PREFACE + frame(SETTINGS)))
    for open_, drops in cases:
        with open_(run.port) as peer, run.undisturbed():
            _, seconds = until_closed(peer, LATER, drops)
        assert seconds > TIMEOUT / 2  # it was the time-out


def test_connections_without_a_stream_are_closed(run: Run) -> None:
    head = head_of(*credentials_of(3, run.tokens[3]))
    for drops in (b"", head):
        with connect_tls(run.port) as peer, run.undisturbed():
            peer.sendall(PREFACE + frame(SETTINGS))
            until_closed(peer, IDLE_CLOSE, drops)


def test_a_first_message_that_comes_slowly_ends_its_stream(run: Run) -> None:
    message = prefixed(first_message())
    drops = b"".join(frame(DATA, bytes([byte]), stream=1) for byte in message)
    with connect_tls(run.port) as peer, run.undisturbed():
        peer.sendall(opening(*credentials_of(3, run.tokens[3])))
        began = time.monotonic()
        peer.sendall(drops[:20])
        assert answered(peer) is grpc.StatusCode.DEADLINE_EXCEEDED
        assert TIMEOUT / 2 < time.monotonic() - began < LATER
        until_closed(peer, IDLE_CLOSE, drops[20:])


def test_a_peer_that_pings_too_often_is_closed(run: Run) -> None:
    with connect_http2(run.port) as peer, run.undisturbed():
        peer.sendall(10 * frame(PING, bytes(8)))
        data, _ = until_closed(peer, LATER)
    assert b"too_many_pings" in data


def test_a_client_that_waits_for_a_request_is_not_closed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seconds = 1.0  # gRPC pings no more often
    often = {"grpc.keepalive_time_ms": int(seconds * 1000)}
    monkeypatch.setattr(client, "KEEPALIVE", tuple((dict(KEEPALIVE) | often).items()))
    monkeypatch.setattr(server, "KEEPALIVE_TIME", seconds)
    with run_here(Host()) as run:
        run.start(5)
        time.sleep(5.5 * seconds)
        assert 5 in run.ask("connected")
    assert not caplog.records  # its stream did not break


# --- first messages -------------------------------------------------------------------


def headed(text: bytes) -> bytes:
    """Return a message with this text in place of its head."""
    return struct.pack("<QI", 0, len(text)) + text


GOOD_FIRST = first_message()


@pytest.mark.parametrize(
    "message",
    [
        *(b"", b"\0", bytes(12), GOOD_FIRST[:-1], GOOD_FIRST + b"\0"),
        struct.pack("<QI", 0, 2**32 - 1) + b"{}",
        *(headed(b"{}"), headed(b"[]"), headed(b"no JSON"), headed(b"\xff\x80")),
        *(headed(b"[" * 4000), headed(b'{"records":' * 360), headed(b"1" * 4084)),
        wire.encode(0, {"partition": 0}),
        wire.encode(0, {"instance": "mine"}),
        *(first_message(other) for other in ("", 1, None, ["mine"], {"a": 1})),
        *(first_message("mine", other) for other in ("0", 0.0, None, True, [0])),
        *(first_message("x" * 4096), first_message("x" * 300_000)),
    ],
    ids=lambda message: f"{len(message)}-{message[12:40]!r}",
)
def test_first_messages_that_are_broken_are_refused(message: bytes, run: Run) -> None:
    with run.undisturbed():
        assert status(run, 3, [message]) is grpc.StatusCode.INVALID_ARGUMENT


def test_a_stream_that_ends_without_a_message_is_refused(run: Run) -> None:
    with run.undisturbed():
        assert status(run, 3, []) is grpc.StatusCode.INVALID_ARGUMENT


def test_another_process_cannot_take_a_place(run: Run) -> None:
    with run.undisturbed():
        for node in GOOD:
            message = first_message("another")
            assert status(run, node, [message]) is grpc.StatusCode.PERMISSION_DENIED


# --- what a server can be made to keep ------------------------------------------------


@pytest.mark.parametrize("invited", [False, True])
def test_the_length_that_a_message_claims_takes_no_memory(
    invited: bool, apart: Run
) -> None:
    token = apart.tokens[3] if invited else "0" * 64
    claim = prefixed(b"", 2**31 - 1)
    expected = "RESOURCE_EXHAUSTED" if invited else "UNAUTHENTICATED"
    with ExitStack() as stack, apart.undisturbed():
        peers = [stack.enter_context(connect_tls(apart.port)) for _ in range(3)]
        with apart.bounded(8):
            for peer in peers:
                peer.sendall(opening(*credentials_of(3, token)))
                peer.sendall(frame(DATA, claim + bytes(15_000), stream=1))
                peer.sendall(3 * frame(DATA, bytes(15_000), stream=1))
            for peer in peers:
                assert answered(peer) is grpc.StatusCode[expected]
        with apart.bounded(32):
            for peer in peers:
                with suppress(OSError):  # closed, for more than it may send
                    for _ in range(1000):
                        peer.sendall(frame(DATA, bytes(15_000), stream=1))


@pytest.mark.parametrize("open_", [connect, connect_tls, connect_http2])
def test_a_thousand_connections_are_few_to_the_server(
    open_: Callable[[int], socket.socket], apart: Run, proxy: Proxy
) -> None:
    most = 2 * len(GOOD) + server.SPARE_STREAMS + server.SPARE_CONNECTIONS
    threads, files = apart.threads(), apart.files()

    def attack(count: int, stack: ExitStack) -> None:
        for _ in range(count):
            with suppress(OSError):  # closed at once, beyond the limit
                stack.enter_context(open_(apart.port))

    with ExitStack() as stack, apart.bounded(16):
        with apart.undisturbed():
            attack(1000, stack)
            time.sleep(0.2)
            assert most / 2 < apart.files() - files <= most
            assert apart.threads() - threads <= 8
        proxy.cut()
        attack(10, stack)  # they take the place of the client
        began = time.monotonic()
        apart.wait_for(3)
        while apart.files() > files + 4:
            assert time.monotonic() - began < IDLE_CLOSE
            time.sleep(0.05)


# --- replies of a client that was invited ---------------------------------------------


class ThreadNodes:
    """Nodes that are threads: the last answers what a test says, the others well."""

    def __init__(self) -> None:
        self.run = FlowerRun.create_empty(1)
        self.answer: Callable[[bytes], list[bytes]] = echo
        self._numbers = itertools.count(1)

    def get_node_ids(self) -> Iterable[int]:
        return list(range(1, len(GOOD) + 1))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = with_ids(messages, self._numbers)
        for message in sent:
            node = message.metadata.dst_node_id
            target = self._bad if node == GOOD[-1] else superlink_peers.serve
            arguments = message.content[wire.INVITATION], node
            threading.Thread(target=target, args=arguments, daemon=True).start()
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return []

    def _bad(self, invitation: ConfigRecord, node: int) -> None:
        values: dict[str, Any] = dict(invitation)
        run = Run(
            port=int(values["address"].rpartition(":")[2]),
            certificate=values["certificate"],
            tokens={node: values["token"]},
            pid=0,
            ask=str,
            reconnect=0,
        )
        replies: SimpleQueue[bytes | None] = SimpleQueue()
        replies.put(first_message(f"{time.monotonic()}", node - 1))
        with channel_to(run) as channel, suppress(grpc.RpcError):
            for request in call(
                channel, node, run.tokens[node], iter(replies.get, None)
            ):
                for reply in self.answer(request):
                    replies.put(reply)
        replies.put(None)


def echo(request: bytes) -> list[bytes]:
    """Answer well."""
    return [wire.encode(wire.number_of(request), {}, wire.decode(request)[1])]


@pytest.fixture(name="nodes", scope="module")
def _nodes() -> ThreadNodes:
    return ThreadNodes()


@pytest.fixture(name="grid", scope="module")
def _grid(nodes: ThreadNodes) -> Iterator[SuperlinkGrid]:
    """Return a grid of good clients and one that sends what it likes."""
    set_task_identity(1)  # Flower needs it to make messages
    options = SuperlinkOptions(
        address="localhost:0",
        patience=20.0,
        reconnect=1.0,
        max_message_mib=MAX_MIB,
    )
    with closing(SuperlinkGrid(nodes, len(GOOD), options)) as grid:
        yield grid


def exchange(grid: SuperlinkGrid) -> list[Message]:
    """Send a message to every node and return the replies in their order."""
    content = RecordDict({"numbers": ConfigRecord({"a": [1, 2]})})
    sent = [Message(content, node, "query") for node in grid.get_node_ids()]
    replies = list(grid.send_and_receive(sent, timeout=20))
    assert [reply.metadata.src_node_id for reply in replies] == list(GOOD)
    assert replies[0].content == content
    return replies


def numbered(request: bytes, text: bytes, rest: bytes = b"") -> bytes:
    """Return a reply to a request with this text in place of its head."""
    return request[:8] + struct.pack("<I", len(text)) + text + rest


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda request: echo(request)[0][:-1],
    "nothing but numbers": lambda request: request[:12],
    "longer": lambda request: echo(request)[0] + b"\0",
    "head beyond the end": lambda request: request[:8] + b"\xff" * 4 + b"{}",
    "array beyond the end": lambda request: numbered(
        request,
        b'{"records": [["arrays", "a", [["x", "uint8", [1], "raw", 9223372036854775807]'
        b"]]]}",
    ),
    "negative array": lambda request: numbered(
        request, b'{"records": [["arrays", "a", [["x", "uint8", [1], "raw", -1]]]]}'
    ),
    "no JSON": lambda request: numbered(request, b"\xff\x00no\nJSON"),
    "no object": lambda request: numbered(request, b"[1]"),
    "deep lists": lambda request: numbered(request, b"[" * 15_000_000),
    "deep objects": lambda request: numbered(request, b'{"records":' * 1_000_000),
    "deep value": lambda request: numbered(
        request,
        b'{"records": [["config", "a", {"x": ' + b"[" * 900 + b"]" * 900 + b"}]]}",
    ),
    "long integer": lambda request: numbered(request, b"1" * 15_000_000),
    "long name": lambda request: numbered(
        request, b'{"records": [["' + b"\\n" * 1_000_000 + b'", "a", {}]]}'
    ),
    "no error": lambda request: numbered(request, b'{"records": [], "error": {}}'),
    "half an error": lambda request: numbered(
        request, b'{"records": [], "error": [1]}'
    ),
    "infinite error": lambda request: numbered(
        request, b'{"records": [], "error": [Infinity, "x"]}'
    ),
    "object for an error": lambda request: numbered(
        request, b'{"records": [], "error": {"a": 1, "b": "c"}}'
    ),
    "infinite length": lambda request: numbered(
        request, b'{"records": [], "too_long": Infinity}'
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_reply_ends_a_run_with_its_client(
    case: str, nodes: ThreadNodes, grid: SuperlinkGrid
) -> None:
    nodes.answer = lambda request: [BROKEN[case](request)]
    with pytest.raises(EngineError, match=r"^client 1: ") as caught:
        exchange(grid)
    (line,) = str(caught.value).splitlines()
    assert len(line) < 400
    nodes.answer = echo
    assert not any(reply.has_error() for reply in exchange(grid))


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"", "its reply is broken: message of 0 bytes: at least 12"),
        (bytes(11), "its reply is broken: message of 11 bytes: at least 12"),
        (wire.encode(2**64 - 1, {}), "its reply is broken: number 1844674407370955161"),
        (bytes(MAX_MIB * MIB + 1), "its stream broke and did not come back in 1 s"),
    ],
    ids=["empty", "short", "number", "long"],
)
def test_a_client_whose_reply_cannot_be_read_is_lost(
    sent: bytes, reason: str, nodes: ThreadNodes, grid: SuperlinkGrid
) -> None:
    nodes.answer = lambda request: [sent]
    error = exchange(grid)[-1].error
    assert error.code == ErrorCode.NODE_UNAVAILABLE
    assert str(error.reason).startswith(f"client 1 is gone: {reason}")
    nodes.answer = echo
    assert not any(reply.has_error() for reply in exchange(grid))  # it is invited again


def test_replies_to_earlier_requests_are_ignored(
    nodes: ThreadNodes, grid: SuperlinkGrid
) -> None:
    requests = []

    def late(request: bytes) -> list[bytes]:
        requests.append(request)
        return [wire.encode(0, {}), wire.encode(0, {}), *echo(request)]

    nodes.answer = late
    for _ in range(3):
        assert not any(reply.has_error() for reply in exchange(grid))
    assert len(requests) == 3  # none was sent again
    nodes.answer = lambda request: 3 * echo(request)
    for _ in range(3):
        assert not any(reply.has_error() for reply in exchange(grid))
    nodes.answer = echo
