"""What the tests of the streams share: runs that go on, and peers of other kinds."""

import multiprocessing
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
from flwr.app import ConfigRecord, Context, Message, RecordDict

from masksl.engine import EngineError
from masksl.engine.nodes import set_task_identity
from masksl.engine.superlink import client, server, wire
from masksl.engine.superlink.certificate import RunCertificate
from masksl.engine.superlink.server import StreamServer
from tests.engine.superlink_apps import Proxy

GOOD = (1, 2)  # nodes of a run whose clients are as they should be
DROP = 0.1  # seconds between two bytes of a slow peer
TIMES = ("FIRST_TIMEOUT", "HANDSHAKE_TIMEOUT", "IDLE_TIMEOUT")


def echo(message: Message, _: Context) -> Message:
    """Answer with the content of the request."""
    return Message(message.content, reply_to=message)


def request(number: int, node: int) -> bytes:
    """Return the request of a number to a node."""
    numbers = ConfigRecord({"number": number, "node": node})
    head = {"kind": "query", "group": str(number)}
    return wire.encode(number, head, RecordDict({"numbers": numbers}))


class Rounds:
    """Exchanges with good clients, one after another in a thread of its own.

    Attributes
    ----------
    done : int
        Exchanges whose replies were right.
    wrong : str
        What was wrong with the first reply that was not; empty if there is none.
    """

    def __init__(self, streams: StreamServer, nodes: Sequence[int] = GOOD) -> None:
        self.done = 0
        self.wrong = ""
        self._streams = streams
        self._nodes = nodes
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        self._thread.start()

    def _go_on(self) -> None:
        number = 0
        while not self._stopped.wait(0.02):
            number += 1
            requests = {node: request(number, node) for node in self._nodes}
            for node, reply in self._streams.exchange(requests, None).items():
                if isinstance(reply, server.StreamLost):
                    self.wrong = self.wrong or f"node {node}: {reply}"
                elif wire.decode(reply)[1] != wire.decode(requests[node])[1]:
                    self.wrong = self.wrong or f"node {node}: another content"
            self.done += 1

    def stop(self) -> None:
        """Stop after the exchange that goes on; there must be one that ends."""
        self._stopped.set()
        self._thread.join(20)
        assert not self._thread.is_alive()


@contextmanager
def times(first: float, handshake: float, idle: float) -> Iterator[None]:
    """Set the times in which a server that is started now gives peers up."""
    before = {name: getattr(server, name) for name in TIMES}
    for name, value in zip(TIMES, (first, handshake, idle), strict=True):
        setattr(server, name, value)
    yield
    for name, value in before.items():
        setattr(server, name, value)


@dataclass
class Run:
    """A server, its good clients and the exchanges between them, as a test sees it.

    Attributes
    ----------
    port : int
        Where the server listens.
    certificate : bytes
        What its clients pin.
    tokens : dict[int, str]
        Token of every node that it has invited.
    pid : int
        Process of the server.
    ask : Callable[[str], Any]
        Calls `Host.ask`.
    reconnect : float
        Seconds that its clients try to come back.
    """

    port: int
    certificate: bytes
    tokens: dict[int, str]
    pid: int
    ask: Callable[[str], Any]
    reconnect: float

    def invitation(self, node: int, **changes: Any) -> ConfigRecord:
        """Return the invitation of a node."""
        values: dict[str, Any] = {
            "address": f"localhost:{self.port}",
            "certificate": self.certificate,
            "token": self.tokens.get(node, ""),
            "max_message": 2**26,
            "reconnect": self.reconnect,
        }
        return ConfigRecord(values | changes)

    def serve(self, node: int, **changes: Any) -> None:
        """Be the good client of a node, until the server says bye."""
        serve(self.invitation(node, **changes), node)

    def start(self, node: int, **changes: Any) -> threading.Thread:
        """Start the good client of a node in a thread."""

        def ignoring() -> None:
            with suppress(EngineError):  # told by the reply that is missing
                self.serve(node, **changes)

        thread = threading.Thread(target=ignoring, daemon=True)
        thread.start()
        return thread

    def wait_for(self, rounds: int) -> None:
        """Wait until so many more exchanges have gone right."""
        until, end = self.ask("done") + rounds, time.monotonic() + 20
        while not (wrong := self.ask("wrong")) and self.ask("done") < until:
            assert time.monotonic() < end, "no exchange ends"
            time.sleep(0.01)
        assert not wrong

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Demand that exchanges go right during the block, and at its end."""
        self.wait_for(0)
        yield
        self.wait_for(3)

    @contextmanager
    def bounded(self, mebibytes: float) -> Iterator[None]:
        """Demand that the server's process has at most so much more memory."""
        most = before = self._status("VmRSS")
        stopped = threading.Event()

        def watch() -> None:
            nonlocal most
            while not stopped.wait(0.01):
                most = max(most, self._status("VmRSS"))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()
        assert (most - before) / 1024 < mebibytes

    def threads(self) -> int:
        """Return the number of threads of the server's process."""
        return self._status("Threads")

    def files(self) -> int:
        """Return the number of open files of the server's process."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def _status(self, name: str) -> int:
        text = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8")
        (number,) = re.findall(rf"^{name}:\s+(\d+)", text, re.MULTILINE)
        return int(number)


def serve(invitation: ConfigRecord, node: int) -> None:
    """Be the good client of a node, until the server says bye."""
    set_task_identity(1)  # Flower needs it to make messages
    message = Message(RecordDict({wire.INVITATION: invitation}), node, wire.SERVE)
    config: dict[str, Any] = {"partition-id": node - 1, "num-partitions": len(GOOD)}
    client.serve(echo, message, Context(1, node, config, RecordDict(), {}))


@dataclass
class Host:
    """A server and its exchanges, in the process in which they are.

    Attributes
    ----------
    spare : int
        Nodes that are invited besides the good ones, for the tests to take.
    """

    reconnect: float = 5.0
    spare: int = 8
    certificate: RunCertificate = field(default_factory=RunCertificate.make)

    def __post_init__(self) -> None:
        self.streams = StreamServer(
            "127.0.0.1:0",
            clients=len(GOOD),
            reconnect=self.reconnect,
            max_message=2**26,
            certificate=self.certificate,
        )
        nodes = range(1, len(GOOD) + self.spare + 1)
        self.tokens = {node: self.streams.invite(node) for node in nodes}
        self._rounds = Rounds(self.streams)

    def about(self) -> dict[str, Any]:
        """Return what peers must know."""
        certificate = self.certificate.certificate
        return {"port": self.streams.port, "certificate": certificate}

    def ask(self, name: str) -> Any:
        """Return what the server, or else the exchanges, have of that name."""
        if name == "connected":
            return self.streams.connected()
        return getattr(self._rounds, name)

    def close(self) -> None:
        """Stop the exchanges and the server."""
        self._rounds.stop()
        self.streams.close()


@contextmanager
def run_here(host: Host) -> Iterator[Run]:
    """Run a server in this process, and its good clients."""
    here = multiprocessing.current_process().pid or 0
    run = Run(**host.about(), tokens=host.tokens, pid=here, ask=host.ask, reconnect=5)
    with ExitStack() as stack:
        stack.callback(_join, [run.start(node) for node in GOOD])
        stack.callback(host.close)
        run.wait_for(2)
        yield run
        run.wait_for(2)


@contextmanager
def run_apart(proxy: Proxy, **options: float) -> Iterator[Run]:
    """Run a server in a process of its own, and its good clients in this one.

    Parameters
    ----------
    proxy : Proxy
        Forwards the connections of the last of the clients.
    options : float
        ``first``, ``handshake``, ``idle`` (see `times`) and ``reconnect`` in seconds.
    """
    spawn = multiprocessing.get_context("spawn")
    pipe, end = spawn.Pipe()
    process = spawn.Process(target=_host_apart, args=(end, options), daemon=True)
    process.start()
    about = pipe.recv()

    def ask(name: str) -> Any:
        pipe.send(name)
        return pipe.recv()

    run = Run(**about, pid=process.pid or 0, ask=ask, reconnect=options["reconnect"])
    proxy.target = run.port
    threads = [run.start(node) for node in GOOD[:-1]]
    threads.append(run.start(GOOD[-1], address=f"localhost:{proxy.port}"))
    try:
        run.wait_for(2)
        yield run
        run.wait_for(2)
    finally:
        pipe.close()
        _join(threads)
        process.join(20)
        assert process.exitcode == 0


def _join(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def _host_apart(pipe: Connection, options: dict[str, float]) -> None:
    """Keep a server, and tell of it, until the other side closes the pipe."""
    with times(options["first"], options["handshake"], options["idle"]):
        host = Host(options["reconnect"])
    pipe.send({**host.about(), "tokens": host.tokens})
    with suppress(EOFError):
        while True:
            pipe.send(host.ask(pipe.recv()))
    host.close()


# --- peers that are no clients --------------------------------------------------------


def first_message(instance: Any = "mine", partition: Any = 0) -> bytes:
    """Return the first message of a stream."""
    return wire.encode(wire.BYE, {"instance": instance, "partition": partition})


@contextmanager
def channel_to(run: Run) -> Iterator[grpc.Channel]:
    """Open a connection to a server, with gRPC and the certificate of the run."""
    credentials = grpc.ssl_channel_credentials(run.certificate)
    options = [
        ("grpc.ssl_target_name_override", "masksl"),
        ("grpc.use_local_subchannel_pool", 1),  # a connection of its own
    ]
    where = f"localhost:{run.port}"
    with grpc.secure_channel(where, credentials, options) as channel:
        yield channel


def call(
    channel: grpc.Channel,
    node: int,
    token: str,
    messages: Iterator[bytes],
    timeout: float | None = None,
) -> Any:
    """Open a stream; return it to be read and cancelled."""
    opened = channel.stream_stream(f"/{wire.SERVICE}/{wire.METHOD}")
    metadata = ((wire.NODE_KEY, str(node)), (wire.TOKEN_KEY, token))
    return opened(messages, metadata=metadata, timeout=timeout)


def connect(port: int) -> socket.socket:
    """Open a connection of TCP."""
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def connect_tls(port: int) -> ssl.SSLSocket:
    """Open a connection of TLS as gRPC does, with any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context.wrap_socket(connect(port))


def connect_http2(port: int) -> ssl.SSLSocket:
    """Open a connection of HTTP/2 over TLS, without a stream."""
    peer = connect_tls(port)
    peer.sendall(PREFACE + frame(SETTINGS))
    return peer


def until_closed(
    peer: socket.socket, seconds: float, drops: bytes = b""
) -> tuple[bytes, float]:
    """Return what arrives before a connection is closed, and the seconds it took.

    Parameters
    ----------
    seconds : float
        How long it may take at most.
    drops : bytes
        Is sent meanwhile, one byte after another.
    """
    began, data = time.monotonic(), b""
    peer.settimeout(DROP)
    while (taken := time.monotonic() - began) < seconds:
        try:
            if drops:
                peer.sendall(drops[:1])
                drops = drops[1:]
            part = peer.recv(2**16)
        except TimeoutError:
            continue
        except OSError:  # it was reset
            return data, taken
        if not part:
            return data, taken
        data += part
    raise AssertionError(f"a connection is open after {seconds} s: {data!r}")


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING = 0, 1, 4, 6
END_HEADERS = 4


def frame(kind: int, data: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    """Return a frame of HTTP/2."""
    return (
        struct.pack(">I", len(data))[1:]
        + struct.pack(">BBI", kind, flags, stream)
        + data
    )


def _field(name: bytes, value: bytes) -> bytes:
    """Return a field of a header that is in no table."""
    assert len(name) < 127 and len(value) < 127
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def head_of(*credentials: tuple[bytes, bytes], stream: int = 1) -> bytes:
    """Return the frame that opens a stream."""
    fields = (
        (b":method", b"POST"),
        (b":scheme", b"https"),
        (b":path", f"/{wire.SERVICE}/{wire.METHOD}".encode()),
        (b":authority", b"masksl"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    )
    block = b"".join(_field(*field) for field in (*fields, *credentials))
    return frame(HEADERS, block, END_HEADERS, stream)


def opening(*credentials: tuple[bytes, bytes]) -> bytes:
    """Return the bytes with which a connection and its first stream begin."""
    return PREFACE + frame(SETTINGS) + head_of(*credentials)


def credentials_of(node: int | bytes, token: str | bytes) -> list[tuple[bytes, bytes]]:
    """Return the metadata that a client proves itself with."""
    node = str(node).encode() if isinstance(node, int) else node
    token = token.encode() if isinstance(token, str) else token
    return [(wire.NODE_KEY.encode(), node), (wire.TOKEN_KEY.encode(), token)]


def prefixed(message: bytes, length: int | None = None) -> bytes:
    """Return a message of gRPC that says that it has a length."""
    return (
        struct.pack(">?I", False, len(message) if length is None else length) + message
    )


def status_in(data: bytes) -> int | None:
    """Return the status of gRPC in what a server has sent, None if it has none."""
    found = re.search(rb"grpc-status([\x01\x02])(\d+)", data)
    return int(found[2][: found[1][0]]) if found else None
