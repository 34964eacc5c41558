"""Checkpoints: a run that was killed goes on as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from masksl import main
from masksl.config import ConfigError
from masksl.runtime import checkpoint, results
from masksl.runtime.checkpoint import CheckpointError
from tests.conftest import ROOT, settings_of, untimed
from tests.engine.ray_runs import left_behind, ray_folder

SMALL = ("rounds=4", "clients=3", "dataset.limit=130", "dataset.test_limit=40")
KEPT = ("loss", "test_loss", "top1", "top5", "bytes", "bytes_total", "link_seconds")


def run(folder: Path, *overrides: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    main.run(settings_of(*overrides), folder)
    rows = untimed(results.read_rows(folder))
    summary = results.read_summary(folder)
    return rows, {key: summary[key] for key in KEPT}


class Stop(Exception):
    """Ends a run in the middle of a round."""


def run_until(folder: Path, last: int, *overrides: str) -> None:
    """Run and break off in the round after the last one, within a step."""

    def stop(_: Any, round_: int, step: int, steps: int, loss: float) -> None:
        if round_ > last:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("masksl.runtime.console.ProgressBar.on_step", stop)
        with pytest.raises(Stop):
            run(folder, *overrides)


def check_resumed(folder: Path, *overrides: str) -> None:
    """Check that a run which is broken off twice ends as an undisturbed one.

    Their folders are ``third`` and ``whole``.
    """
    expected = run(folder / "whole", *overrides)
    run_until(folder / "first", 1, *overrides)
    run_until(folder / "second", 3, *overrides, f"resume={folder}/first")
    assert run(folder / "third", *overrides, f"resume={folder}/second") == expected


def same_checkpoints(one: Path, other: Path, least: int) -> dict[str, Any]:
    """Check that the last checkpoints of two runs are the same; return their facts.

    They hold more than ``least`` tensors.
    """
    (ours, facts), (theirs, others) = checkpoint.read(one), checkpoint.read(other)
    assert ours.keys() == theirs.keys() and len(ours) > least
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert facts["method"] == others["method"]
    assert facts["versions"] == others["versions"]
    return facts


@pytest.mark.parametrize(
    "overrides",
    [
        ("client_sync=step", "fraction=0.6"),
        ("client_sync=round", "fraction=0.6", "compressor=qu"),
        ("client_sync=never", "schedule.name=cosine"),
        ("client_sync=round", "optimizer.momentum=0", "checkpoint.every=2"),
    ],
)
def test_a_resumed_run_equals_an_undisturbed_one(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    expected = run(tmp_path / "whole", *SMALL, *overrides)
    run_until(tmp_path / "first", 1, *SMALL, *overrides)
    before = contents(tmp_path / "first")
    resume = f"resume={tmp_path}/first"
    run_until(tmp_path / "second", 3, *SMALL, *overrides, resume)
    assert contents(tmp_path / "first") == before
    resume = f"resume={tmp_path}/second"
    assert run(tmp_path / "third", *SMALL, *overrides, resume) == expected


def test_a_run_that_ends_while_it_takes_up_another_is_resumed(tmp_path: Path) -> None:
    """The first checkpoint is there before the earlier rows are."""
    expected = run(tmp_path / "whole", *SMALL)
    run_until(tmp_path / "first", 2, *SMALL)
    add = results.RunFolder.add_row
    added: list[Any] = []

    def stop(folder: results.RunFolder, row: Any) -> None:
        if added:
            raise Stop
        added.append(row)
        add(folder, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results.RunFolder, "add_row", stop)
        with pytest.raises(Stop):
            run(tmp_path / "second", *SMALL, f"resume={tmp_path}/first")
    assert len(added) == len(results.read_rows(tmp_path / "second")) == 1
    for earlier in ("second", "first"):
        folder = tmp_path / f"after_{earlier}"
        assert run(folder, *SMALL, f"resume={tmp_path}/{earlier}") == expected


@pytest.mark.parametrize("sync", ["round", "never"])
def test_state_of_clients_is_current_in_rare_checkpoints(
    sync: str, tmp_path: Path
) -> None:
    """A client that trained since the last checkpoint need not train in its round."""
    overrides = (
        *("rounds=8", "clients=4", "fraction=0.5", "dataset.limit=130"),
        *("dataset.test_limit=40", "checkpoint.every=2", f"client_sync={sync}"),
    )
    expected = run(tmp_path / "whole", *overrides)
    run_until(tmp_path / "first", 5, *overrides)
    assert checkpoint.read(tmp_path / "first")[1]["round"] == 4
    resume = f"resume={tmp_path}/first"
    assert run(tmp_path / "second", *overrides, resume) == expected


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_run_goes_on_in_its_own_folder(tmp_path: Path) -> None:
    """With resume=auto: from the checkpoint, and not at all when it is finished."""
    expected = run(tmp_path / "whole", *SMALL)
    again = (*SMALL, "resume=auto")
    run_until(tmp_path / "run", 1, *again)
    run_until(tmp_path / "run", 3, *again)
    assert checkpoint.read(tmp_path / "run")[1]["round"] == 3
    assert run(tmp_path / "run", *again) == expected
    written = (tmp_path / "run" / results.SUMMARY).stat().st_mtime_ns
    assert run(tmp_path / "run", *again) == expected
    assert (tmp_path / "run" / results.SUMMARY).stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="batch_size"):
        run(tmp_path / "run", *again, "batch_size=25")
    rows, _ = run(tmp_path / "run", *again, "rounds=5")
    assert rows[:4] == expected[0]
    assert len(rows) == 5


@pytest.mark.slow
def test_a_run_can_be_prolonged_and_change_its_engine(tmp_path: Path) -> None:
    expected = run(tmp_path / "whole", *SMALL)
    run(tmp_path / "short", *SMALL, "rounds=2", "checkpoint.every=5")
    resume = f"resume={tmp_path}/short"
    long = (*SMALL, "engine=ray", "engine.hosts=1", resume)
    assert run(tmp_path / "long", *long)[1] == expected[1]


def test_a_run_killed_before_its_first_round_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "killed/hydra").mkdir(parents=True)
    expected = run(tmp_path / "whole", *SMALL)
    assert run(tmp_path / "new", *SMALL, f"resume={tmp_path}/killed") == expected


def test_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path / "run", *SMALL, "rounds=1")
    resume = ("rounds=2", f"resume={tmp_path}/run")
    with pytest.raises(ConfigError) as caught:
        run(tmp_path / "new", *SMALL, *resume, "batch_size=7", "compressor.bits=3")
    message = str(caught.value)
    assert message.startswith(f"resume='{tmp_path}/run': must be a run of the same")
    assert "batch_size (26 there, 7 here)" in message
    assert "compressor.bits (2 there, 3 here)" in message
    assert "engine" not in message
    with pytest.raises(ConfigError, match="rounds .1 there, 2 here.*schedule.name"):
        run(tmp_path / "new", *SMALL, *resume, "schedule.name=cosine")
    with pytest.raises(ConfigError, match="must be a folder other than this run's own"):
        run(tmp_path / "run", *SMALL, *resume)
    with pytest.raises(ConfigError, match="must be a run folder with a checkpoint"):
        run(tmp_path / "new", *SMALL, f"resume={tmp_path}")
    assert not (tmp_path / "new").exists()


def change(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut short":
        del content[len(content) * 2 // 3 :]
    elif how == "emptied":
        content.clear()
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["cut short", "emptied", "altered"])
@pytest.mark.parametrize("file", ["state.json", "round-0001.safetensors"])
def test_broken_files_are_refused(how: str, file: str, tmp_path: Path) -> None:
    run(tmp_path / "run", *SMALL, "rounds=1")
    path = tmp_path / "run" / checkpoint.FOLDER / file
    change(path, how)
    with pytest.raises(CheckpointError) as caught:
        run(tmp_path / "new", *SMALL, f"resume={tmp_path}/run")
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert "altered" in message
    path.unlink()
    if file != "state.json":
        with pytest.raises(CheckpointError, match="cannot be read"):
            run(tmp_path / "new", *SMALL, f"resume={tmp_path}/run")


def test_checkpoints_of_another_format_are_refused(tmp_path: Path) -> None:
    """One line; the tensors of format 1 had other names."""
    checkpoint.write(tmp_path, {"w": torch.ones(1)}, {"round": 1})
    path = tmp_path / checkpoint.FOLDER / checkpoint.STATE
    body = json.loads(path.read_text(encoding="utf-8")) | {"format": 1}
    del body["check"]
    body["check"] = checkpoint._check(body)
    path.write_text(json.dumps(body), encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(tmp_path)
    assert str(caught.value) == f"{path}: format 1, this version reads format 2"


def test_results_without_a_key_have_what_held_before_it(tmp_path: Path) -> None:
    summary = {"top1": 0.5, "rounds": 3, "bytes_total": 7}
    (tmp_path / results.SUMMARY).write_text(json.dumps(summary), encoding="utf-8")
    (tmp_path / results.CONFIG).write_text("rounds: 3\n", encoding="utf-8")
    assert results.read_summary(tmp_path) == {"method": "split"} | summary
    config = {"method.name": "split", "model.stem_stride": 1, "rounds": 3}
    config["traffic"] = "null"
    assert results.read_config(tmp_path) == config


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    tensors = {"a/w": torch.randn(3, 4).t(), "a/n": torch.tensor(7), "b": torch.ones(1)}
    checkpoint.write(tmp_path, tensors, {"round": 1})
    checkpoint.write(tmp_path, tensors, {"round": 2, "x": 0.1 + 0.2})
    loaded, facts = checkpoint.read(tmp_path)
    assert facts == {"round": 2, "x": 0.1 + 0.2}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    names = sorted(path.name for path in (tmp_path / checkpoint.FOLDER).iterdir())
    assert names == ["round-0002.safetensors", "state.json"]


def test_a_checkpoint_that_is_not_finished_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any of the moments between two files, the old one or the new stands."""
    tensors = {"w": torch.ones(2)}
    checkpoint.write(tmp_path, tensors, {"round": 1})
    replace, calls = os.replace, []

    def stop(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise Stop
        replace(*arguments)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(Stop):
        checkpoint.write(tmp_path, tensors, {"round": 2})
    assert checkpoint.read(tmp_path)[1] == {"round": 1}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_the_whole_program_killed_at_five_moments(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = (*SMALL, "rounds=40", f"engine={engine}", "client_sync=never")
    with ray_folder() as folder:
        monkeypatch.setenv("RAY_TMPDIR", str(folder))
        kill_at_five_moments(tmp_path, *overrides)
        # Agents of a Ray that was killed wait a minute.
        assert left_behind(folder, 120) == []


def kill_at_five_moments(tmp_path: Path, *overrides: str) -> None:
    """Resume a run that is killed five times; compare it with an undisturbed one."""
    began = time.monotonic()
    undisturbed = program(tmp_path / "whole", *overrides)
    while not (tmp_path / "whole" / results.METRICS).exists():
        assert undisturbed.poll() is None
        time.sleep(0.05)
    start = time.monotonic() - began
    assert undisturbed.wait() == 0
    work = time.monotonic() - began - start
    draws = random.Random(1)
    resume = "resume=null"
    killed = 0
    for number in range(5):
        folder = tmp_path / f"run{number}"
        running = program(folder, *overrides, resume)
        try:
            running.wait(draws.uniform(start / 2, start + work / 5))
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGKILL)
            running.wait()
            killed += 1
        if folder.is_dir():
            resume = f"resume={folder}"
    assert killed >= 3
    assert program(tmp_path / "last", *overrides, resume).wait() == 0
    last, first = tmp_path / "last", tmp_path / "whole"
    assert untimed(results.read_rows(last)) == untimed(results.read_rows(first))
    ours, theirs = results.read_summary(last), results.read_summary(first)
    assert [ours[key] for key in KEPT] == [theirs[key] for key in KEPT]


def program(folder: Path, *overrides: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "masksl.main", *overrides]
    with open(folder.with_suffix(".log"), "w", encoding="utf-8") as log:
        return subprocess.Popen(
            [*command, f"hydra.run.dir={folder}"], cwd=ROOT, stdout=log, stderr=log
        )
