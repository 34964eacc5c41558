"""Nodes that are lost: how that is noticed, and how long they are waited for."""

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager

import pytest
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from masksl.engine.nodes import run_ids, set_task_identity
from masksl.engine.options import SuperlinkOptions
from masksl.engine.superlink import grid as grids
from masksl.engine.superlink import server
from masksl.engine.superlink.grid import SuperlinkGrid
from masksl.engine.superlink.local_nodes import LocalNodes
from masksl.engine.superlink.wire import KEEPALIVE
from tests.engine.superlink_apps import data_content


class Restarted(LocalNodes):
    """Its node is taken for connected although it is gone, then it is away, then back.

    Attributes
    ----------
    away : int
        How often its absence is still to be seen.
    """

    away = 3
    _lost: Message | None = None

    def get_node_ids(self) -> Iterable[int]:
        """Return the node if it is taken for connected."""
        if self._lost is not None and self.away:
            self.away -= 1
            return []
        return [1]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Lose the first message."""
        if self._lost is None:
            (self._lost,) = messages
            return ["lost"]
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the error that a message was lost, or what nodes report."""
        if list(message_ids) != ["lost"]:
            return super().pull_messages(message_ids)
        assert self._lost is not None
        reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, ""), reply_to=self._lost)
        reply.metadata.__dict__["_reply_to_message_id"] = "lost"
        return [reply]


@contextmanager
def streams(kind: type[LocalNodes]) -> Iterator[tuple[LocalNodes, SuperlinkGrid]]:
    """Return one node of this machine, and a grid of its stream."""
    run_id = next(run_ids)
    set_task_identity(run_id)
    options = SuperlinkOptions(address="localhost:0", patience=60.0, reconnect=0.5)
    with (
        closing(kind("tests.engine.superlink_apps:app", run_id, 1, 1)) as nodes,
        closing(SuperlinkGrid(nodes, 1, options)) as grid,
    ):
        yield nodes, grid


def test_a_node_that_starts_again_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grids, "FLOWER_POLL", 0.05)
    with streams(Restarted) as (nodes, grid):
        assert list(grid.get_node_ids()) == [1]
        assert isinstance(nodes, Restarted) and nodes.away == 0


def test_a_process_that_was_stopped_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine goes on to confirm what it is sent."""
    short = [(key, v // 10 if key.endswith("_ms") else v) for key, v in KEEPALIVE]
    monkeypatch.setattr(server, "KEEPALIVE", short)
    with streams(LocalNodes) as (_, grid):
        assert list(grid.get_node_ids()) == [1]
        (pid,) = (process.pid for process in multiprocessing.active_children())
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            sent = Message(data_content(b"x"), 1, "query.count")
            (reply,) = grid.send_and_receive([sent], timeout=30.0)
            assert reply.error.code == ErrorCode.NODE_UNAVAILABLE
        finally:
            os.kill(pid, signal.SIGKILL)
