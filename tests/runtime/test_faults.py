"""Clients that fail are left out, hosts that die are replaced, nothing is lost."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import MetricRecord

from masksl import main
from masksl.engine import packing
from masksl.engine import ray as engine
from masksl.methods.client import Client
from masksl.methods.split import client as split
from masksl.runtime import messages, results
from masksl.runtime.messages import RunError
from tests.conftest import prepare, settings_of, train, untimed

SMALL = ("rounds=3", "clients=4", "dataset.limit=184", "dataset.test_limit=40")
FAULTY = (*SMALL, "plugins=[tests.plugin_faults]")
KILLED = (*SMALL, "plugins=[tests.plugin_faults,tests.plugin_kill]")


def run(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    main.run(settings_of(*overrides), folder)
    return untimed(results.read_rows(folder))


# --- clients --------------------------------------------------------------------------


@pytest.mark.parametrize("sync", ["step", "round", "never"])
def test_a_client_that_fails_is_left_out(sync: str) -> None:
    training = train(*FAULTY, f"client_sync={sync}")
    first, second, third = training.rows
    # 46 samples a client make a step of 26 and one of 20.
    assert first["left_out"] == [{"client": 1, "phase": "training", "step": 1}]
    assert first["samples"] == 184 - 20
    assert second["left_out"] == [
        {"client": 2, "phase": "training", "step": 0},
        {"client": 0, "phase": "evaluation", "step": 0},
    ]
    assert second["samples"] == 184 - 20
    assert third["left_out"] == []
    assert third["samples"] == 184


@pytest.mark.parametrize("traffic", ["paper", "compact"])
@pytest.mark.parametrize(
    "sync",
    ["round", *(pytest.param(s, marks=pytest.mark.slow) for s in ("step", "never"))],
)
def test_a_failure_in_an_evaluation_does_not_touch_training(
    sync: str, traffic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client fails between the steps of a round: what it has trained goes on."""
    job = [*SMALL[:1], "clients=2", "dataset.limit=104", "dataset.test_limit=40"]
    job += [f"client_sync={sync}", f"traffic={traffic}", "evaluations=2"]
    whole = train(*job)
    evaluate = split.HANDLERS["evaluate.forward"]
    failed: list[int] = []

    def fail(client: Client, content: Any) -> Any:
        if client.number == 1 and not failed:
            failed.append(messages.place_of(content)["round"])
            raise ValueError("out of paper")
        return evaluate(client, content)

    monkeypatch.setitem(split.HANDLERS, "evaluate.forward", fail)
    disturbed = train(*job)
    assert failed == [1] and disturbed.rows[0]["left_out"]
    for name, tensor in whole.server.state().tensors.items():
        assert torch.equal(disturbed.server.state().tensors[name], tensor), name


def test_weights_adapt_to_those_who_are_left() -> None:
    """Of two clients one fails at once: the round is that of the other alone."""
    overrides = ("rounds=1", "clients=2", "dataset.limit=52", "client_sync=round")
    training = prepare(settings_of(*overrides))
    forward = split.HANDLERS["train.forward"]

    def fail(client: Client, content: Any) -> Any:
        if client.number == 0:
            raise ValueError("out of paper")
        return forward(client, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(split.HANDLERS, "train.forward", fail)
        row = training.strategy.run_round(training.grid, 1, 1)
    assert row["left_out"] == [{"client": 0, "phase": "training", "step": 0}]
    assert row["samples"] == 26
    assert training.server.sync.shared is not None
    for number in (0, 1):  # the average is the half of the one that is left
        tensors = training.client_tensors(number)
        for name, tensor in training.server.sync.shared.tensors.items():
            assert tensor.equal(tensors[name])
    up = row["bytes"]["training"]["up"]
    assert up["label"] == 26


@pytest.mark.parametrize(
    ("kind", "measured", "line"),
    [
        ("train.forward", {"worker": 1, "relative_error": math.nan}, "relative_error"),
        ("train.forward", {"rebuilt": 0}, "worker=None"),
        ("train.backward", {"worker": 1}, "rebuilt=None"),
        ("evaluate.forward", {"worker": 1, "codec_seconds": math.inf}, "codec_seconds"),
    ],
)
def test_broken_measurements_end_a_run(
    kind: str, measured: Any, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = split.HANDLERS[kind]

    def lie(client: Client, content: Any) -> Any:
        reply = handler(client, content)
        reply["metrics"] = MetricRecord(measured)
        return reply

    monkeypatch.setitem(split.HANDLERS, kind, lie)
    with pytest.raises(RunError) as caught:
        train(*SMALL, "rounds=1")
    text = str(caught.value)
    assert text.startswith("round 1, step 0, client 0") and line in text
    assert text.endswith(", expected a finite number") and "\n" not in text


def test_too_few_clients_end_a_run(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RunError) as caught:
        train(*FAULTY, "min_clients=4")
    assert str(caught.value) == (
        "round 1, training, step 2: 3 of 4 clients are left, min_clients=4; clients [1]"
        " failed, the last one: client 1: KeyError: 'no luck in forward'"
    )
    assert "round 1, training, step 1: client 1 failed and is left out" in caplog.text


@pytest.mark.parametrize(
    "name", ["ray", pytest.param("flower", marks=pytest.mark.slow)]
)
def test_engines_agree_on_who_is_left_out(name: str, tmp_path: Path) -> None:
    rows = run(tmp_path, *FAULTY, f"engine={name}")
    local = untimed(train(*FAULTY).rows)
    for row in (*rows, *local):
        del row["rebuilt_graphs"]
    assert rows == local


# --- hosts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sync", "portion", "places"),
    [
        ("round", packing.PORTION, ["evaluate 1 0 2", "forward 2 1 3"]),
        pytest.param(
            *("never", packing.PORTION, ["save 0 0 2", "backward 3 1 0"]),
            marks=pytest.mark.slow,
        ),
        pytest.param(  # a call a message
            *("step", 1, ["backward 2 0 1"]), marks=pytest.mark.slow
        ),
    ],
)
def test_killed_hosts_change_nothing(
    sync: str,
    portion: int,
    places: list[str],
    order: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing, "PORTION", portion)
    overrides = (*KILLED, f"client_sync={sync}")
    undisturbed = untimed(train(*overrides).rows)
    order.write_text("\n".join(places))
    rows = run(tmp_path, *overrides, "engine=ray")
    assert order.read_text() == "", "not everybody was killed"
    assert rows == undisturbed
    lines = (tmp_path / results.EVENTS).read_text().splitlines()
    for line, place in zip(lines, places, strict=True):
        event, (_, round_, _, client) = json.loads(line), place.split()
        assert event["event"] == "round repeated"
        assert event["round"] == (int(round_) or 1)
        assert event["reasons"] == [f"host {int(int(client) > 1)} died"]
        assert event["wasted_bytes"] > 0
    summary = results.read_summary(tmp_path)
    assert summary["bytes_total"] == sum(map(_bytes, rows))


def _bytes(row: Any) -> int:
    if isinstance(row, dict):
        nested = row["bytes"] if "bytes" in row else row
        return sum(map(_bytes, nested.values()))
    return row


@pytest.mark.slow
def test_a_host_killed_between_rounds_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids: list[engine.RayGrid] = []
    start = engine.RayGrid.__init__

    def remember(grid: engine.RayGrid, *arguments: Any) -> None:
        start(grid, *arguments)
        grids.append(grid)

    def kill(_: Any, row: Any) -> None:
        if row["round"] in (1, 2):
            os.kill(grids[0].pids()[row["round"] - 1], signal.SIGKILL)

    monkeypatch.setattr(engine.RayGrid, "__init__", remember)
    monkeypatch.setattr("masksl.runtime.console.ProgressBar.on_round", kill)
    rows = run(tmp_path, *SMALL, "engine=ray")
    assert rows == untimed(train(*SMALL).rows)
    events = (tmp_path / results.EVENTS).read_text().splitlines()
    assert [json.loads(line)["round"] for line in events] == [2, 3]


def test_hosts_are_not_replaced_for_ever(order: Path, tmp_path: Path) -> None:
    order.write_text("forward 1 1 3")
    with pytest.raises(RunError) as caught:
        run(tmp_path, *KILLED, "engine=ray", "engine.max_restarts=0")
    assert str(caught.value) == (
        "round 1: host 1 died; 1 were lost in this run, engine.max_restarts=0"
    )
