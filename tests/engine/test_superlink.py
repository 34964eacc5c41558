"""Streams to clients: the same runs, every request once, nobody waits for ever."""

import json
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode

from masksl import client_app, main, server_app
from masksl.config import ConfigError
from masksl.engine import EngineError
from masksl.engine.local import open_grid
from masksl.engine.nodes import run_ids, set_task_identity
from masksl.engine.options import SuperlinkOptions
from masksl.engine.superlink import grid as grids
from masksl.engine.superlink.grid import SuperlinkGrid
from masksl.engine.superlink.local_nodes import LocalNodes
from masksl.runtime import results
from tests.conftest import processes, settings_of, train, untimed
from tests.engine.superlink_apps import Proxy, data_content

SMALL = ("rounds=2", "clients=3", "dataset.limit=150", "dataset.test_limit=60")
KILLED = ("plugins=[tests.plugin_faults,tests.plugin_kill]", "engine.reconnect=0.5")
APPS = "tests.engine.superlink_apps:app"


def run(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    main.run(settings_of(*overrides), folder)
    return untimed(results.read_rows(folder))


@contextmanager
def streams(
    nodes: int = 2, app: str = APPS, clients: int | None = None, **options: Any
) -> Iterator[SuperlinkGrid]:
    """Return a grid of streams to nodes in two processes."""
    run_id = next(run_ids)
    set_task_identity(run_id)
    given: dict[str, Any] = {"address": "localhost:0", "starting": nodes}
    given |= {"patience": 60.0} | options
    with (
        closing(LocalNodes(app, run_id, nodes, 2)) as local,
        closing(
            SuperlinkGrid(local, clients or nodes, SuperlinkOptions(**given))
        ) as grid,
    ):
        yield grid


def ask(
    grid: SuperlinkGrid,
    kind: str,
    content: RecordDict | None = None,
    timeout: float | None = 60.0,
) -> list[Any]:
    """Send the same to all nodes; return the replies by partition."""
    nodes = list(grid.get_node_ids())
    sent = [Message(content or RecordDict(), node, kind) for node in nodes]
    replies = grid.send_and_receive(sent, timeout=timeout)
    return sorted(replies, key=lambda reply: reply.metadata.src_node_id)


# --- runs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("traffic=compact",),
        ("method=fedavg",),
        pytest.param(("client_sync=round",), marks=pytest.mark.slow),
        pytest.param(("client_sync=step",), marks=pytest.mark.slow),
        pytest.param(("client_sync=never",), marks=pytest.mark.slow),
        pytest.param(("method=fedpm",), marks=pytest.mark.slow),
        pytest.param(("method=flash",), marks=pytest.mark.slow),
        pytest.param(("method=sasg",), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_is_that_of_the_local_engine(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    local = run(tmp_path / "local", *SMALL, *options)
    assert run(tmp_path / "own", *SMALL, *options, "engine=superlink") == local
    assert processes("masksl.engine.superlink") == []


@pytest.mark.parametrize(
    ("options", "places"),
    [
        (("client_sync=round",), ["forward 1 1 0", "evaluate 1 0 2", "backward 2 0 1"]),
    ],
    ids=str,
)
def test_killed_processes_change_nothing(
    options: tuple[str, ...], places: list[str], order: Path, tmp_path: Path
) -> None:
    job = (*SMALL, *options, KILLED[0])
    undisturbed = untimed(train(*job).rows)
    order.write_text("\n".join(places))
    rows = run(tmp_path, *SMALL, *options, *KILLED, "engine=superlink")
    assert order.read_text() == "", "not everybody was killed"
    assert rows == undisturbed
    events = [json.loads(e) for e in (tmp_path / results.EVENTS).open(encoding="utf-8")]
    assert [event["round"] for event in events] == [int(p.split()[1]) for p in places]
    for event, place in zip(events, places, strict=True):
        client = place.split()[3]
        assert any(f"client {client} is gone" in reason for reason in event["reasons"])


# --- streams --------------------------------------------------------------------------


def test_every_request_is_handled_once_whatever_is_cut() -> None:
    """A hundred cuts at random moments, of one connection or of all."""
    drawn = random.Random(1)
    proxy = Proxy(seed=2)
    address = f"localhost:{proxy.port}"
    with (
        closing(proxy),
        streams(4, address=address, bind="127.0.0.1:0", reconnect=30.0) as grid,
    ):
        proxy.target = grid.port
        assert len(list(grid.get_node_ids())) == 4
        over = threading.Event()

        def cut() -> None:
            while proxy.cuts < 100:
                time.sleep(drawn.random() * 0.12)
                proxy.cut()
            over.set()

        threading.Thread(target=cut, daemon=True).start()
        exchanges = 0
        while not over.is_set():
            exchanges += 1
            data = drawn.randbytes(drawn.choice((1, 1000, 300_000)))
            expected = bytes((byte + 1) % 256 for byte in data)
            for reply in ask(grid, "query.count", data_content(data)):
                assert reply.content["seen"]["count"] == exchanges
                (array,) = reply.content["data"].values()
                assert array.data == expected
        assert proxy.cuts >= 100
        assert exchanges > 5


def test_a_client_that_is_gone_is_invited_again(caplog: Any) -> None:
    """Its messages are answered by an error until it is back, with an empty state."""
    with streams(2, reconnect=0.3) as grid:
        for expected in (1, 2):
            replies = ask(grid, "query.count", data_content(b"x"))
            assert [r.content["seen"]["count"] for r in replies] == [expected] * 2
        nodes = list(grid.get_node_ids())
        die = Message(RecordDict(), nodes[1], "query.die")
        (reply,) = grid.send_and_receive([die])
        assert reply.error.code == ErrorCode.NODE_UNAVAILABLE
        assert reply.error.reason == (
            "client 1 is gone: its stream broke and did not come back in 0.3 s"
        )
        replies = ask(grid, "query.count", data_content(b"x"))
        assert [r.content["seen"]["count"] for r in replies] == [3, 1]


def test_a_network_that_is_gone_for_long_starts_clients_anew() -> None:
    """What comes back too late is refused, and its process makes room for another."""
    proxy = Proxy(seed=3)
    address = f"localhost:{proxy.port}"
    with (
        closing(proxy),
        streams(2, address=address, bind="127.0.0.1:0", reconnect=1.0) as grid,
    ):
        proxy.target = grid.port
        replies = ask(grid, "query.count", data_content(b"x"))
        proxy.target = 0
        proxy.cut(everything=True)
        nodes = list(grid.get_node_ids())
        sent = [Message(data_content(b"x"), node, "query.count") for node in nodes]
        replies = list(grid.send_and_receive(sent))
        assert {reply.error.code for reply in replies} == {ErrorCode.NODE_UNAVAILABLE}
        proxy.target = grid.port
        replies = ask(grid, "query.count", data_content(b"x"))
        assert [r.content["seen"]["count"] for r in replies] == [1, 1]


def test_a_stream_may_break_while_its_client_computes() -> None:
    """It is opened again meanwhile, and the computation is not repeated."""
    proxy = Proxy(seed=4)
    address = f"localhost:{proxy.port}"
    with (
        closing(proxy),
        streams(1, address=address, bind="127.0.0.1:0", reconnect=1.0) as grid,
    ):
        proxy.target = grid.port
        assert len(ask(grid, "query.count", data_content(b"x"))) == 1
        threading.Timer(0.5, proxy.cut, kwargs={"everything": True}).start()
        (reply,) = ask(grid, "query.sleep")  # for three seconds
        assert not reply.has_error()
        (reply,) = ask(grid, "query.count", data_content(b"x"))
        assert reply.content["seen"]["count"] == 2
        assert proxy.cuts == 1


def test_an_exchange_that_is_interrupted_leaves_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(*_: Any) -> None:
        raise Interrupted

    with pytest.raises(Interrupted), streams() as grid:
        ask(grid, "query.count", data_content(b"x"))
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        try:
            ask(grid, "query.sleep")
        finally:
            signal.signal(signal.SIGALRM, before)
    assert "Task was destroyed" not in capfd.readouterr().err


def test_errors_of_clients_are_replies() -> None:
    with streams() as grid:
        replies = ask(grid, "query.fail")
    for node, reply in enumerate(replies, 1):
        assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        assert reply.error.reason == f"ValueError: out of paper, node {node}"


def test_a_client_that_is_late_is_left_out_and_lost() -> None:
    with streams(reconnect=0.3) as grid:
        list(grid.get_node_ids())
        began = time.monotonic()
        assert ask(grid, "query.sleep", timeout=0.5) == []
        assert time.monotonic() - began < 2
        replies = ask(grid, "query.count", data_content(b"x"))
        assert [r.content["seen"]["count"] for r in replies] == [1, 1]


def test_messages_that_are_too_long_end_a_run() -> None:
    with streams(max_message_mib=1) as grid:
        nodes = list(grid.get_node_ids())
        long = Message(data_content(bytes(2**20)), nodes[0], "query.count")
        with pytest.raises(EngineError) as caught:
            grid.send_and_receive([long])
        assert str(caught.value).startswith(
            "engine.max_message_mib=1: query.count has 1,048,"
        )
        with pytest.raises(EngineError) as caught:
            ask(grid, "query.grow")
        assert str(caught.value).startswith(
            "engine.max_message_mib=1: reply to query.grow has 2,097,"
        )


# --- who takes part -------------------------------------------------------------------


def test_nodes_beyond_the_clients_are_sent_home() -> None:
    with streams(4, clients=2) as grid:
        assert list(grid.get_node_ids()) == [1, 2]
        replies = ask(grid, "query.count", data_content(b"x"))
        assert [r.metadata.src_node_id for r in replies] == [1, 2]


def test_nodes_that_cannot_start_end_a_run_with_their_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grids, "FLOWER_POLL", 0.1)
    with (
        streams(2, app="tests.engine.superlink_apps:missing") as grid,
        pytest.raises(EngineError) as caught,
    ):
        grid.get_node_ids()
    text = str(caught.value)
    assert text.startswith("clients=2: no stream of the partitions [0, 1] after ")
    assert "node 2 did not start: error 2, AttributeError: module" in text
    assert "\n" not in text


def test_a_server_that_nobody_reaches_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address that clients dial is not that of the server."""
    monkeypatch.setattr(grids, "FLOWER_POLL", 0.1)
    options: dict[str, Any] = {
        "address": "localhost:1",
        "bind": "127.0.0.1:0",
        "reconnect": 0.2,
    }
    with streams(1, **options) as grid, pytest.raises(EngineError) as caught:
        grid.get_node_ids()
    assert "localhost:1: no stream for 0.2 s (UNAVAILABLE" in str(caught.value)


def test_an_address_that_is_taken_ends_a_run_with_one_line() -> None:
    with streams() as grid, pytest.raises(EngineError) as caught:
        with streams(bind=f"127.0.0.1:{grid.port}"):
            pass
    assert str(caught.value).startswith(
        f"engine.bind='127.0.0.1:{grid.port}': cannot listen there"
    )


def test_flowers_own_grid_carries_the_run_unless_it_is_deployed() -> None:
    settings = settings_of("engine=superlink", "engine.address='localhost:0'")
    with pytest.raises(ConfigError) as caught:
        with server_app.carried(open_grid(client_app.app, 1), settings):
            pass
    assert str(caught.value) == (
        "engine.name='superlink': must be another engine, because the nodes are "
        "simulated"
    )
