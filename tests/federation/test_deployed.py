"""Deployed runs equal those of the local engine, whatever fails."""

import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import yaml

from masksl import signals
from masksl.engine.superlink.wire import KEEPALIVE_TIME, KEEPALIVE_TIMEOUT
from masksl.federation import processes
from masksl.runtime import results
from tests.conftest import ROOT, train, untimed
from tests.federation import network
from tests.federation.deployment import (
    BEGIN,
    CLIENTS,
    END,
    HOLD,
    PLUGIN,
    Clock,
    Deployment,
    Hold,
    clients_of,
    events_of,
    is_listening,
    kill_all,
    processes_of,
    rounds_of,
    rows_of,
    run_folders,
    servers_of,
    wait_for,
)

pytestmark = pytest.mark.slow

ROUNDS = 3
TRAIN = {"split": "train.forward", "fedavg": "train.local"}
METHODS = pytest.mark.parametrize("method", TRAIN)
FONTS = matplotlib.get_cachedir()  # matplotlib makes its list of fonts once for all
SOON = ("engine.reconnect=5", "engine.patience=30")


def job(method: str) -> tuple[str, ...]:
    """Return a small job of a method whose clients evaluate."""
    more = ("method.evaluate=clients",) if method == "fedavg" else ()
    return (f"method={method}", f"clients={CLIENTS}", f"rounds={ROUNDS}", *more)


@cache
def expected(method: str) -> list[dict[str, Any]]:
    """Return the rows of the job on the local engine."""
    return untimed(train(*job(method)).rows)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the folder of a federation.

    Nothing may be left of it: no process, no key, nothing outside the folder.
    """
    outside = tmp_path / "outside"
    for variable in ("HOME", "TMPDIR"):
        (outside / variable).mkdir(parents=True)
        monkeypatch.setenv(variable, str(outside / variable))
    (outside / "here").mkdir()
    monkeypatch.chdir(outside / "here")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)  # of the plugin
    monkeypatch.setenv("MPLCONFIGDIR", FONTS)
    monkeypatch.setenv(HOLD, str(tmp_path / "hold"))
    path = tmp_path / "federation"
    yield path
    assert kill_all(path) == []
    assert not (path / "keys").exists()
    assert [file for file in outside.glob("**/*") if file.is_file()] == []


@contextmanager
def program(folder: Path, *overrides: str) -> Iterator["subprocess.Popen[str]"]:
    """Start the program of a federation; kill it if it has not ended."""
    command = [sys.executable, "-m", "masksl.federation", "--folder", str(folder)]
    with subprocess.Popen(
        [*command, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's "&" may ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def check_end(
    process: "subprocess.Popen[bytes]", run_folder: Path, method: str
) -> None:
    """Assert that a run ends, and as an undisturbed one does."""
    assert process.wait(END) == 0
    assert rows_of(run_folder) == expected(method)
    assert results.read_summary(run_folder)["rounds"] == ROUNDS


def check_lost(run_folder: Path, clock: Clock, round_: int) -> None:
    """Wait for the event that a round must be repeated, because client 1 is gone."""
    wait_for((run_folder / results.EVENTS).exists, 60, "event")
    clock.print("the client is lost")
    (event,) = events_of(run_folder)
    assert (event["event"], event["round"]) == ("round repeated", round_)
    (reason,) = event["reasons"]
    assert reason.startswith("client 1 is gone: ")


def check_repeated(
    process: "subprocess.Popen[bytes]",
    run_folder: Path,
    clock: Clock,
    method: str,
    round_: int,
) -> None:
    """Wait for the end of a repeated round and of its run."""
    wait_for(lambda: rounds_of(run_folder) >= round_, END, "repeated round")
    clock.print("the round is repeated")
    check_end(process, run_folder, method)
    clock.print("the run has ended")
    assert len(events_of(run_folder)) == 1


# --- no fault -------------------------------------------------------------------------


@METHODS
def test_a_run_equals_that_of_the_local_engine(method: str, folder: Path) -> None:
    with program(folder, *job(method)) as process:
        printed, errors = process.communicate(timeout=END)
    assert process.returncode == 0, errors
    (run_folder,) = run_folders(folder)
    assert rows_of(run_folder) == expected(method)
    assert f"run folder: {run_folder}" in printed
    flower = tomllib.loads((folder / "flwr-user/config.toml").read_text())
    assert not is_listening(flower["superlink"][processes.NAME]["address"])
    settings = yaml.safe_load((run_folder / results.CONFIG).read_text())
    assert not is_listening(settings["engine.address"])


def test_plain_messages_are_slow_and_say_so(folder: Path) -> None:
    small = ("method=fedavg", f"clients={CLIENTS}", "rounds=1")
    with Deployment(folder) as federation:
        overrides = shlex.join(("engine=flower", *small))
        process = federation.submit(ROOT, overrides, log="run")
        assert process.wait(END) == 0
        assert rows_of(federation.run_folder()) == untimed(train(*small).rows)
    assert "every exchange goes through Flower's messages" in federation.printed


# --- clients --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "place"),
    [
        ("split", "train.forward 2 1"),
        ("split", "train.backward 1 1"),
        ("split", "evaluate.forward 2 1"),
        ("fedavg", "train.local 1 1"),
        ("fedavg", "evaluate.local 2 1"),
    ],
)
def test_a_killed_client_changes_nothing(method: str, place: str, folder: Path) -> None:
    with Deployment(folder) as federation:
        hold = Hold(place)
        process = federation.run(*job(method), "engine.reconnect=5")
        pid = hold.wait()
        clock = Clock()
        os.kill(pid, signal.SIGKILL)
        hold.release()
        run_folder, round_ = federation.run_folder(), int(place.split()[1])
        check_lost(run_folder, clock, round_)
        check_repeated(process, run_folder, clock, method, round_)


@pytest.mark.parametrize(
    ("method", "goes_on"), [("split", True), ("split", False), ("fedavg", True)]
)
def test_a_stopped_client_changes_nothing(
    method: str, goes_on: bool, folder: Path
) -> None:
    """Whether it goes on when it is no longer waited for, or never."""
    with Deployment(folder) as federation:
        hold = Hold(f"{TRAIN[method]} 2 1")
        process = federation.run(*job(method), "engine.reconnect=5")
        pid = hold.wait()
        clock = Clock()
        os.kill(pid, signal.SIGSTOP)
        run_folder = federation.run_folder()
        check_lost(run_folder, clock, 2)
        if goes_on:
            os.kill(pid, signal.SIGCONT)
        hold.release()
        check_repeated(process, run_folder, clock, method, 2)


# --- nodes ----------------------------------------------------------------------------


@METHODS
def test_a_killed_node_changes_nothing(method: str, folder: Path) -> None:
    with Deployment(folder) as federation:
        hold = Hold(f"{TRAIN[method]} 2 1")
        process = federation.run(*job(method), "engine.reconnect=5")
        hold.wait()
        clock = Clock()
        os.killpg(federation.nodes[1].pid, signal.SIGKILL)
        hold.release()
        run_folder = federation.run_folder()
        check_lost(run_folder, clock, 2)
        federation.revive_node(1)
        clock.print("the node is back")
        check_repeated(process, run_folder, clock, method, 2)


@METHODS
def test_a_node_that_never_comes_back_ends_a_run(method: str, folder: Path) -> None:
    hold = Hold(f"{TRAIN[method]} 2 1")
    with program(folder, *job(method), PLUGIN, *SOON) as process:
        hold.wait()
        clock = Clock()
        (node,) = processes_of(folder, str(folder / "keys/node-1"))
        os.killpg(node, signal.SIGKILL)
        hold.release()
        printed, errors = process.communicate(timeout=END)
        clock.print("the program has ended")
    assert process.returncode == 1
    end = f"masksl: the run did not finish; see {folder}"
    assert errors.splitlines()[-1] == end
    (line,) = [text for text in printed.splitlines() if "no stream" in text]
    assert f"clients={CLIENTS}: no stream of the partitions [1] after 30 s" in line


def test_a_node_without_a_partition_ends_a_run(folder: Path) -> None:
    with Deployment(folder, "other=1") as federation:
        process = federation.run(*job("fedavg"))
        process.wait(END)
    assert run_folders(folder) == []
    assert "did not start: error " in federation.printed
    assert "node config without partition-id" in federation.printed


def test_a_node_without_data_ends_a_run(folder: Path) -> None:
    data = "dataset=mnist", "dataset.root=nowhere", "dataset.download=false"
    with Deployment(folder) as federation:
        process = federation.run(*job("fedavg"), *data)
        process.wait(END)
    assert "dataset.root='nowhere': mnist not found" in federation.printed


# --- the server -----------------------------------------------------------------------


def test_a_stopped_run_leaves_its_nodes_free(folder: Path) -> None:
    """Its processes end, and the next run is as any other."""
    with Deployment(folder) as federation:
        hold = Hold("train.forward 2 1")
        process = federation.run(*job("split"))
        hold.wait()
        clock = Clock()
        (run_id,) = federation.run_ids()
        federation.flwr("stop", run_id, processes.NAME)
        clock.print("flwr stop has returned")
        hold.release()
        wait_for(lambda: not servers_of(folder), 60, "end of the ServerApp")
        clock.print("the ServerApp is gone")
        wait_for(lambda: not clients_of(folder), 60, "end of the ClientApps")
        assert clock.print("the ClientApps are gone") < 60
        process.wait(END)
        again = federation.run(*job("split"))
        wait_for(lambda: len(run_folders(folder)) == 2, BEGIN, "second run folder")
        check_end(again, federation.run_folder(1), "split")


@METHODS
def test_a_run_whose_server_was_killed_is_resumed(method: str, folder: Path) -> None:
    with Deployment(folder) as federation:
        hold = Hold(f"{TRAIN[method]} 2 1")
        process = federation.run(*job(method))
        hold.wait()
        clock = Clock()
        (server,) = servers_of(folder)
        os.kill(server, signal.SIGKILL)
        hold.release()
        first = federation.run_folder()
        again = federation.run(*job(method), f"resume='{first}'")
        wait_for(lambda: len(run_folders(folder)) == 2, BEGIN, "second run folder")
        clock.print("the second run has begun")
        check_end(again, federation.run_folder(1), method)
        clock.print("the second run has ended")
        process.wait(END)
        clock.print("the first flwr run has ended")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_program_that_is_told_to_end_leaves_nothing(
    number: signal.Signals, folder: Path
) -> None:
    hold = Hold("train.forward 2 1")
    with program(folder, *job("split"), PLUGIN) as process:
        hold.wait()
        clock = Clock()
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        clock.print("the program has ended")
    assert process.returncode == 128 + number
    assert errors.splitlines()[-1] == f"masksl: {signals.WORDS[number]}"


# --- the network ----------------------------------------------------------------------


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Iterator[network.Network]:
    """Return a network, and let the SuperLink be at this end of it."""
    if not network.is_possible():
        pytest.skip("this user may not make network namespaces")
    with network.network() as made:
        monkeypatch.setattr(processes, "LOOPBACK", network.HERE)
        yield made


@pytest.mark.parametrize("seconds", [10.0, 30.0])
def test_a_silent_network_that_comes_back_changes_nothing(
    seconds: float, folder: Path, net: network.Network
) -> None:
    """Not even if the stream breaks and is opened again, as in the longer time."""
    with Deployment(folder, entry=net.entry) as federation:
        hold = Hold("train.forward 2 1")
        process = federation.run(*job("split"), "engine.reconnect=60")
        hold.wait()
        clock = Clock()
        net.forward(False)
        hold.release()
        time.sleep(seconds)
        net.forward(True)
        run_folder = federation.run_folder()
        wait_for(lambda: rounds_of(run_folder) == 2, END, "second round")
        clock.print("the round goes on")
        check_end(process, run_folder, "split")
        clock.print("the run has ended")
        assert not (run_folder / results.EVENTS).exists()
        log = (folder / "node-1.log").read_text()
        assert seconds < KEEPALIVE_TIME + KEEPALIVE_TIMEOUT or "stream broke" in log


def test_a_silent_network_that_stays_so_ends_a_run(
    folder: Path, net: network.Network
) -> None:
    with Deployment(folder, entry=net.entry) as federation:
        hold = Hold("train.forward 2 1")
        process = federation.run(*job("split"), *SOON)
        hold.wait()
        clock = Clock()
        net.forward(False)
        hold.release()
        run_folder = federation.run_folder()
        check_lost(run_folder, clock, 2)
        process.wait(END)
        clock.print("the run has ended")
        assert "no stream of the partitions [1] after 30 s" in federation.printed
