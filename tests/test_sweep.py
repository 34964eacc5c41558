"""Sweeps as processes: killed, continued, and with failing runs."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from masksl.report.figure3 import figure3
from masksl.report.table1 import table1
from masksl.runtime import results
from masksl.runtime.folder import locked
from masksl.sweep import Job, run
from tests.conftest import ROOT, processes

SWEEP = (
    *("--multirun", "experiment=table1_small", "dataset=digits", "model=small_cnn"),
    *("rounds=4", "dataset.limit=240", "dataset.test_limit=60", "target=0.3"),
    *("batch_size=10", "clients=3", "cut=shallow,medium", "seed=1"),
    "compressor=none,ms_context",
)
RUNS = 3  # uncompressed only at the shallow cut


def command(folder: Path, *overrides: str) -> list[str]:
    sweep_dir = f"hydra.sweep.dir={folder}"
    return [sys.executable, "-m", "masksl.main", *SWEEP, sweep_dir, *overrides]


def sweep(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *overrides),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def finished(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"**/{results.SUMMARY}"))


def rounds_done(folder: Path) -> int:
    """Return the number of completed rounds of all runs."""
    rows = folder.glob(f"**/{results.METRICS}")
    return sum(path.read_text().count("\n") for path in rows)


def kill_sweep(folder: Path, rounds: int, signal_: signal.Signals) -> None:
    """Start the sweep and signal only its process after a number of rounds."""
    with subprocess.Popen(
        command(folder),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A shell's "&" may ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as running:
        deadline = time.monotonic() + 240
        while rounds_done(folder) < rounds:
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        running.send_signal(signal_)
        if signal_ == signal.SIGINT:
            assert running.wait(30) == 130


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = sweep(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{RUNS} of {RUNS} runs are finished" in done.stdout
    return folder


def test_a_sweep_skips_repeated_uncompressed_runs(undisturbed: Path) -> None:
    names = [path.parent.relative_to(undisturbed) for path in finished(undisturbed)]
    assert list(map(str, names)) == [
        f"{place}/seed=1"
        for place in ("medium/ms_context", "shallow/ms_context", "shallow/none")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 2])
def test_a_sweep_that_was_killed_gives_the_same_table(
    kills: int, undisturbed: Path, tmp_path: Path
) -> None:
    for number in range(kills):
        rounds = rounds_done(tmp_path) + (5 if number else 3)
        kill_sweep(tmp_path, rounds, signal.SIGKILL)
        assert len(finished(tmp_path)) < RUNS
    done = sweep(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{RUNS} of {RUNS} runs are finished" in done.stdout
    assert table1(tmp_path) == table1(undisturbed)
    assert figure3(tmp_path) == figure3(undisturbed)


def test_a_finished_sweep_is_not_repeated(undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished(undisturbed)}
    done = sweep(undisturbed)
    assert done.returncode == 0
    assert f"{RUNS} runs, {RUNS} of them finished before" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in finished(undisturbed)} == before


@pytest.mark.slow
def test_a_sweep_ends_at_its_time_limit_or_an_interrupt(tmp_path: Path) -> None:
    done = sweep(tmp_path, "rounds=1000", "hydra.launcher.minutes=0.05")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"0 of {RUNS} runs are finished" in done.stdout
    assert not processes(str(tmp_path))
    kill_sweep(tmp_path / "again", 1, signal.SIGINT)
    assert not processes(str(tmp_path))


@pytest.mark.slow
def test_runs_that_fail_do_not_stop_the_others(
    undisturbed: Path, tmp_path: Path
) -> None:
    """One has a broken checkpoint, the folder of one is in use, one is missing."""
    folder = tmp_path / "sweep"
    shutil.copytree(undisturbed, folder)
    broken, used = folder / "medium/ms_context/seed=1", folder / "shallow/none/seed=1"
    for path in (broken, used):
        (path / results.SUMMARY).unlink()
    (broken / "checkpoint/state.json").write_text("{}")
    shutil.rmtree(folder / "shallow/ms_context")
    with locked(used):
        done = sweep(folder)
    assert done.returncode == 1
    assert "2 runs failed: " in done.stderr
    for path in (broken, used):
        assert str(path.relative_to(folder)) in done.stderr
    assert "state.json: cut short or altered" in done.stdout
    assert "another run is using this run folder" in done.stdout
    assert len(finished(folder)) == RUNS - 2


@pytest.mark.slow
def test_damaged_runs_go_on_from_their_checkpoints(
    undisturbed: Path, tmp_path: Path
) -> None:
    """One is damaged in its summary, one in its rows, one in its configuration."""
    folder = tmp_path / "sweep"
    shutil.copytree(undisturbed, folder)
    first, second, third = (path.parent for path in finished(folder))
    (first / results.SUMMARY).write_text("[]\n")
    rows = (second / results.METRICS).read_text()
    (second / results.METRICS).write_text(rows[:-40])
    (third / results.CONFIG).write_text("")
    done = sweep(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{RUNS} runs, 0 of them finished before" in done.stdout
    for path in (first / results.SUMMARY, third / results.CONFIG):
        assert f"{path}: damaged or cut short" in done.stdout
    assert f"{second / results.METRICS}, line 4: damaged or cut" in done.stdout
    assert (second / results.METRICS).read_text() == rows  # not trained again: times
    assert table1(folder) == table1(undisturbed)


def test_a_wrong_sweep_is_refused_before_any_run(tmp_path: Path) -> None:
    done = sweep(tmp_path, "batch_size=26,0")
    assert done.returncode == 1
    assert "batch_size=0: must be a whole number from 1 on" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("**/output.txt"))


@pytest.mark.parametrize(
    ("names", "at_a_time", "minutes", "text"),
    [
        (("a", "b"), 0, None, "hydra.launcher.jobs=0: must be 1 or more"),
        (("a", "b"), 1, -1, "hydra.launcher.minutes=-1: must be null or greater"),
        (("a", "b"), 1, "x", "hydra.launcher.minutes='x': must be null or greater"),
        (("a", "a"), 1, None, "'a': must be a folder a run, 2 of them would share"),
    ],
)
def test_a_wrong_launcher_is_refused(
    names: tuple[str, str],
    at_a_time: int,
    minutes: Any,
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        composed = compose("base", overrides=["engine=local"])
    jobs = [Job(name, composed, [], tmp_path / name) for name in names]
    with pytest.raises(SystemExit) as ended:
        run(jobs, tmp_path, at_a_time, minutes)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line
    assert not list(tmp_path.iterdir())


FEW = ("seed=1,2", "cut=medium,deep", "compressor=none,ms")


def test_runs_start_in_the_order_of_the_paper() -> None:
    """Order the full runs by seed, task, cut and compressor."""
    script = (
        "import runpy, masksl.sweep\n"
        "masksl.sweep.run = lambda jobs, *_: print(*(job.name for job in jobs))\n"
        "runpy.run_module('masksl.main', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--multirun", "experiment=table1", *FEW],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    expected = [
        f"{task}/10_clients/{place}/seed={seed}"
        for seed in (1, 2)
        for task in ("vgg19_cifar10", "resnet18_cifar100")
        for place in ("medium/none", "medium/ms", "deep/ms")
    ]
    assert done.stdout.split() == expected
