"""ClientApps for tests of the streams, and a proxy that cuts them."""

import os
import random
import socket
import struct
import threading
import time
from contextlib import suppress
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
_LINGER = struct.pack("ii", 1, 0)  # closing sends a reset


@app.query("count")
def count(message: Message, context: Context) -> Message:
    """Count the requests of a node; return the count and what came, added to it."""
    record: Any = context.state.setdefault("seen", MetricRecord({"count": 0}))
    record["count"] += 1
    sent: Any = message.content["data"]
    (array,) = sent.values()
    data = (np.frombuffer(array.data, np.uint8) + 1).tobytes()
    content = data_content(data)
    content["seen"] = MetricRecord(dict(record))
    return Message(content, reply_to=message)


@app.query("sleep")
def sleep(message: Message, context: Context) -> Message:
    """Answer too late."""
    del context
    time.sleep(3)
    return Message(RecordDict(), reply_to=message)


@app.query("fail")
def fail(message: Message, context: Context) -> Message:
    """Raise."""
    raise ValueError(f"out of paper, node {context.node_id}")


@app.query("grow")
def grow(message: Message, context: Context) -> Message:
    """Return two MiB."""
    del context
    return Message(data_content(bytes(2 * 2**20)), reply_to=message)


@app.query("die")
def die(message: Message, context: Context) -> Message:
    """End the process."""
    os._exit(1)


def data_content(data: bytes) -> RecordDict:
    """Return a content with one array."""
    record = ArrayRecord()
    record["data"] = Array(dtype="uint8", shape=(len(data),), stype="raw", data=data)
    return RecordDict({"data": record})


class Proxy:
    """Forwards connections to a port until it cuts them.

    Attributes
    ----------
    port : int
        Where it listens.
    target : int
        Where it forwards to; 0 to refuse.
    cuts : int
        Moments at which connections were cut.
    """

    def __init__(self, seed: int) -> None:
        self.target = 0
        self.cuts = 0
        self._random = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, everything: bool = False) -> None:
        """Cut one of the connections, or each, with a reset or in order."""
        pairs = sorted(self._pairs, key=id)
        if pairs and not everything and self._random.random() < 0.5:
            pairs = [self._random.choice(pairs)]
        self.cuts += bool(pairs)
        for pair in pairs:
            self._pairs.discard(pair)
            reset = self._random.random() < 0.5
            for end in pair:
                with suppress(OSError):
                    if reset:
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def close(self) -> None:
        """Stop."""
        self._listener.close()
        while self._pairs:
            self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self.target))
                except OSError:  # there is no target
                    client.close()
                    continue
                self._pairs.add((client, server))
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=_forward, args=pair, daemon=True).start()


def _forward(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
