"""The same configuration gives the same run on every engine."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from masksl import compress, engine, main, server_app
from masksl.engine import ENGINES
from masksl.methods.client import Client
from masksl.methods.split import client as split
from masksl.runtime import messages, results
from masksl.runtime.messages import RunError
from masksl.settings import Settings
from tests.conftest import settings_of, untimed
from tests.engine.ray_runs import left_behind, program, ray_folder

FORWARD, BACKWARD = "train.forward", "train.backward"
SMALL = ("rounds=2", "clients=3", "dataset.limit=150", "dataset.test_limit=60")


def run(settings: Settings, folder: Path) -> list[dict[str, Any]]:
    """Run on the engine of the settings; return the rows without timed columns."""
    main.run(settings, folder)
    return untimed(results.read_rows(folder))


@pytest.mark.parametrize(
    "options",
    [
        ("client_sync=round",),
        pytest.param(("traffic=compact",), marks=pytest.mark.slow),
        pytest.param(("client_sync=step",), marks=pytest.mark.slow),
        pytest.param(("client_sync=never",), marks=pytest.mark.slow),
        pytest.param(
            ("compressor=rt", "gradient_positions=kept"), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_engines_agree(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run three clients on two Ray workers: messages reach changing processes.

    On a busy machine one worker can be ready so much earlier that it answers all; then
    they are run again. No process is left behind.
    """
    overrides = (*SMALL, *options)
    local = run(settings_of(*overrides), tmp_path / "local")
    assert sum(row.pop("rebuilt_graphs") for row in local) == 0
    remote = settings_of(*overrides, "engine=flower", "engine.cpus_per_client=0.5")
    moved = 0
    for number in range(3):
        with ray_folder() as folder:
            monkeypatch.setenv("RAY_TMPDIR", str(folder))
            flower = run(remote, tmp_path / f"flower{number}")
            assert list(folder.glob("**/logs/raylet.out"))
            assert left_behind(folder) == []
        moved += sum(row.pop("rebuilt_graphs") for row in flower)
        assert flower == local
        if moved:
            break
    assert moved > 0


@pytest.mark.parametrize(
    "name",
    [e if e == "local" else pytest.param(e, marks=pytest.mark.slow) for e in ENGINES],
)
def test_divergence_ends_a_run_with_one_line(name: str, tmp_path: Path) -> None:
    settings = settings_of(*SMALL, f"engine={name}", "optimizer.lr=1e30")
    with pytest.raises(RunError) as caught:
        run(settings, tmp_path)
    message = str(caught.value)
    assert message == (
        "round 1, step 1, client 0, gradient_compressor none: "
        "none: 24576 of 24576 values are not finite"
    )
    assert not (tmp_path / results.SUMMARY).exists()


def test_a_diverged_activation_names_its_client(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forward = split.run_forward

    def diverge(client: Client, network: Any, place: Any) -> Any:
        activation, labels = forward(client, network, place)
        if (client.number, place.step) == (2, 1):
            activation[3] = float("nan")
        return activation, labels

    monkeypatch.setattr(split, "run_forward", diverge)
    with pytest.raises(RunError) as caught:
        run(settings_of(*SMALL), tmp_path)
    assert str(caught.value) == (
        "round 1, step 1, client 2, compressor ms: "
        "ms: 1024 of 24576 values are not finite"
    )


BROKEN = {
    "altered": (
        lambda frame: frame[:100] + b"x" + frame[101:],
        "checksum does not match: the frame has been altered",
    ),
    "cut short": (
        lambda frame: frame[:30],
        "frame of 30 bytes is shorter than its header",
    ),
    "of another shape": (
        lambda frame: compress.make("ms").encode(torch.rand(26, 3)),
        "activation of shape (26, 3), torch.float32, expected (n, 64, 4, 4), float32",
    ),
    "of another type": (
        lambda frame: compress.make("ms").encode(torch.rand(26, 64, 4, 4).double()),
        (
            "activation of shape (26, 64, 4, 4), torch.float64, "
            "expected (n, 64, 4, 4), float32"
        ),
    ),
    "of other samples": (
        lambda frame: compress.make("ms").encode(torch.rand(7, 64, 4, 4)),
        "26 bytes of labels for 7 samples",
    ),
}


@pytest.mark.parametrize("how", list(BROKEN))
def test_a_broken_frame_names_its_client(
    how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forward = split.HANDLERS[FORWARD]
    change, reason = BROKEN[how]

    def break_frame(client: Client, content: Any) -> Any:
        reply = forward(client, content)
        if client.number == 1:
            frame = change(messages.frame_of(reply, "activation"))
            reply["activation"] = messages.frame_record(frame)
        return reply

    monkeypatch.setitem(split.HANDLERS, FORWARD, break_frame)
    with pytest.raises(RunError) as caught:
        run(settings_of(*SMALL, "batch_size=26"), tmp_path)
    assert str(caught.value) == f"round 1, step 0, client 1, compressor ms: {reason}"


def test_a_frame_without_positions_names_its_client(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forward = split.HANDLERS[FORWARD]

    def send_all(client: Client, content: Any) -> Any:
        reply = forward(client, content)
        frame = compress.make("none").encode(torch.rand(26, 64, 4, 4))
        reply["activation"] = messages.frame_record(frame)
        return reply

    monkeypatch.setitem(split.HANDLERS, FORWARD, send_all)
    options = ("compressor=sp", "gradient_positions=kept", "batch_size=26")
    with pytest.raises(RunError) as caught:
        run(settings_of(*SMALL, *options), tmp_path)
    assert str(caught.value) == (
        "round 1, step 0, client 0, compressor sp: none frame has no positions"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("batch_size=100", "optimizer.lr=1e18"), "round 1, evaluation 0: loss not"),
        (
            ("client_sync=step", "optimizer.lr=1e30", "optimizer.weight_decay=1e12"),
            "round 1, step 1, client half: tensor ",
        ),
    ],
)
def test_divergence_is_never_hidden(
    overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RunError) as caught:
        run(settings_of(*SMALL, "rounds=1", *overrides), tmp_path)
    assert str(caught.value).startswith(message)


def test_clients_that_all_raise_end_a_run_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(client: Client, content: Any) -> Any:
        raise KeyError("no such thing")

    monkeypatch.setitem(split.HANDLERS, BACKWARD, fail)
    with pytest.raises(RunError) as caught:
        run(settings_of(*SMALL), tmp_path)
    assert str(caught.value) == (
        "round 1, training, step 1: 0 of 3 clients are left, min_clients=1; "
        "clients [0, 1, 2] failed, the last one: client 2: KeyError: 'no such thing'"
    )


@pytest.mark.parametrize(
    ("name", "end"),
    [
        pytest.param("local", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("local", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("ray", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("flower", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("superlink", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("superlink", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("flower", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_an_ended_run_leaves_no_process(name: str, end: signal.Signals) -> None:
    with program("rounds=500", f"engine={name}") as running:
        running.wait_for("round 1/500")
        running.process.send_signal(end)
        assert running.process.wait(5) == 128 + end
        assert left_behind(running.folder) == []
        assert "Traceback" not in running.output


def test_unknown_engines_are_refused() -> None:
    with pytest.raises(ValueError, match="engine.name='mpi': must be one of flower"):
        engine.run("mpi", lambda: None, "", clients=1, options={})  # type: ignore


def test_missing_clients_are_named() -> None:
    class Empty:
        def get_node_ids(self) -> list[int]:
            return [5, 6]

    with pytest.raises(RunError, match="clients=10: 2 nodes connected within 0 s"):
        server_app.wait_for_clients(Empty(), 10, 0.2)  # type: ignore[arg-type]
