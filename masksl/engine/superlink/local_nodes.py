"""Nodes on this machine, which stand in for those of a SuperLink.

They deliver invitations to processes that this program starts itself. Everything after
the invitation is as in a federation: the same streams, certificate, tokens, handlers.
"""

import itertools
import multiprocessing
import threading
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.run import Run

from masksl.engine.nodes import (
    answer,
    import_attribute,
    node_configs,
    set_task_identity,
    with_ids,
)
from masksl.engine.superlink.client import serve
from masksl.engine.superlink.wire import SERVE

END_TIMEOUT = 5.0  # seconds for the processes to exit at the end

Nodes = dict[int, dict[str, Any]]


class LocalNodes:
    """Nodes that are kept by processes of this machine.

    It delivers invitations and reports errors, as Flower does. A process that died is
    started again for the next invitation to one of its nodes.

    Parameters
    ----------
    client_app : str
        The ClientApp of every node, as ``module:attribute``.
    run_id : int
        Id of the run.
    clients : int
        Number of nodes.
    hosts : int
        Number of processes; each keeps neighbouring partitions.

    Attributes
    ----------
    run : Run
        The run, as Flower's grids have it.
    """

    def __init__(self, client_app: str, run_id: int, clients: int, hosts: int) -> None:
        self.run = Run.create_empty(run_id)
        configs = node_configs(clients)
        self._numbers = itertools.count(1)
        self._delivered: dict[str, Message] = {}
        self._hosts = [
            _Host(client_app, run_id, {int(node): configs[int(node)] for node in part})
            for part in np.array_split(list(configs), min(hosts, clients))
        ]
        self._host_of = {node: host for host in self._hosts for node in host.nodes}

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids in the order of the partitions."""
        return list(self._host_of)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver invitations; start the processes that do not run."""
        sent = with_ids(messages, self._numbers)
        for message in sent:
            identity, node = message.metadata.message_id, message.metadata.dst_node_id
            self._delivered[identity] = message
            self._host_of[node].send(identity, node, message)
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return errors of nodes that could not serve; each is returned once."""
        errors = {}
        for host in self._hosts:
            errors.update(host.errors())
        return [
            Message(
                Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, errors[identity]),
                reply_to=self._delivered.pop(identity),
            )
            for identity in message_ids
            if identity in errors
        ]

    def close(self) -> None:
        """End the processes."""
        for host in self._hosts:
            host.close()


class _Host:
    """A process that keeps some nodes, as its parent sees it."""

    def __init__(self, client_app: str, run_id: int, nodes: Nodes) -> None:
        self.nodes = nodes
        self._arguments = client_app, run_id, nodes
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.is_alive()

    def send(self, identity: str, node: int, message: Message) -> None:
        """Deliver a message to a node; start the process if it does not run."""
        if not self.is_alive:
            if self._pipe is not None:
                self._pipe.close()  # of the process that died
            spawn = multiprocessing.get_context("spawn")
            self._pipe, end = spawn.Pipe()
            arguments = (*self._arguments, end)
            self._process = spawn.Process(target=_run_host, args=arguments, daemon=True)
            self._process.start()
            end.close()
        assert self._pipe is not None
        with suppress(OSError):  # it died; the stream that does not come tells
            self._pipe.send((identity, node, message.content))

    def errors(self) -> dict[str, str]:
        """Return the reasons why messages could not be answered, by their ids."""
        errors = {}
        with suppress(EOFError, OSError):  # it died
            while self._pipe is not None and self._pipe.poll():
                identity, reason = self._pipe.recv()
                errors[identity] = reason
        return errors

    def close(self) -> None:
        """End the process."""
        if self._process is None or self._pipe is None:
            return
        self._pipe.close()
        self._process.join(END_TIMEOUT)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


# --- in the processes -----------------------------------------------------------------


def _run_host(client_app: str, run_id: int, nodes: Nodes, pipe: Connection) -> None:
    """Serve the nodes of a process until the parent closes the pipe."""
    set_task_identity(run_id)
    lock = threading.Lock()  # the clients of a process share what they compute with
    send_lock = threading.Lock()

    def call(message: Message, context: Context) -> Message:
        with lock:
            return import_attribute(client_app)(message, context)

    def start(message: Message, context: Context) -> Message:
        import_attribute(client_app)  # it answers the invitation, so it must be there
        return serve(call, message, context)

    def serve_node(identity: str, node: int, content: RecordDict) -> None:
        context = Context(run_id, node, nodes[node], RecordDict(), {})
        invitation = Message(content, node, SERVE)
        reply = answer(start, invitation, context)
        if reply.has_error():
            with send_lock, suppress(OSError):
                pipe.send((identity, reply.error.reason))

    with suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            threading.Thread(target=serve_node, args=pipe.recv(), daemon=True).start()
