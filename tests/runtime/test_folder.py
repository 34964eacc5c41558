"""The run folder: one run at a time, files written whole, nothing left of a refusal."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

from masksl.config import ConfigError
from masksl.runtime import checkpoint, folder, results
from masksl.runtime.folder import FolderError, discard, locked, make
from tests.conftest import ROOT
from tests.runtime.test_checkpoint import SMALL, contents, run, run_until

HOLD = (
    "import sys, time; from pathlib import Path; from masksl.runtime import folder\n"
    "with folder.locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
)
QUICK = ("engine=local", *SMALL)


def start(*overrides: str, cwd: Path = ROOT) -> subprocess.Popen[str]:
    """Start the program, with its output in pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "masksl.main", *overrides],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@contextmanager
def held(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Let another process hold a run folder."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_folder_in_use_is_refused_until_its_process_is_killed(tmp_path: Path) -> None:
    run_until(tmp_path, 2, *SMALL)
    with held(tmp_path) as process:
        before = contents(tmp_path)
        for again in ((), ("resume=auto",)):
            with pytest.raises(FolderError) as caught:
                run(tmp_path, *SMALL, *again)
            message = str(caught.value)
            assert message.startswith(f"{tmp_path}: another run is using this")
            assert "\n" not in message
        assert contents(tmp_path) == before
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / folder.LOCK).exists()
        rows, _ = run(tmp_path, *SMALL, "resume=auto")
    assert [row["round"] for row in rows] == [1, 2, 3, 4]
    assert not (tmp_path / folder.LOCK).exists()


def test_of_two_programs_in_one_folder_one_runs(tmp_path: Path) -> None:
    """The other ends in one line, and Hydra writes nothing of it either."""
    both = [start(*QUICK, f"hydra.run.dir={tmp_path}/run", f"seed={n}") for n in (1, 2)]
    errors = [process.communicate(timeout=200)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], errors
    first = [process.returncode for process in both].index(0)
    (line,) = errors[1 - first].splitlines()
    assert line.startswith(f"masksl: {tmp_path}/run: another run is using")
    path = tmp_path / "run"
    assert f"seed={first + 1}" in (path / "hydra/overrides.yaml").read_text()
    settings = yaml.safe_load((path / results.CONFIG).read_text())
    assert settings["seed"] == first + 1
    assert [row["round"] for row in results.read_rows(path)] == [1, 2, 3, 4]


def test_a_process_may_enter_its_folder_again(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        with locked(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / folder.LOCK).exists()
    assert not (tmp_path / "run" / folder.LOCK).exists()


def test_runs_of_the_same_second_have_folders_of_their_own() -> None:
    names = []
    for _ in range(4):
        with initialize_config_dir(str(ROOT / "conf"), version_base=None):
            hydra = compose("base", return_hydra_config=True).hydra
            names += [hydra.run.dir, hydra.sweep.dir]
    assert len(set(names)) == 8


@pytest.mark.parametrize("sweep", [False, True])
def test_a_refused_run_leaves_no_folder(sweep: bool, tmp_path: Path) -> None:
    overrides = [*(["--multirun", "seed=1,2"] if sweep else []), "batch_size=0"]
    process = start(*overrides, cwd=tmp_path)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 1
    assert error.splitlines() == [
        "masksl: batch_size=0: must be a whole number from 1 on"
    ]
    assert not list(tmp_path.iterdir())


def hydras(path: Path) -> None:
    """Write what Hydra writes."""
    (path / "hydra").mkdir(parents=True)
    for name in ("config.yaml", "hydra.yaml", "overrides.yaml"):
        (path / "hydra" / name).write_text("x")
    (path / "main.log").write_text("")


def test_only_what_this_run_made_is_removed(tmp_path: Path) -> None:
    hydras(tmp_path / "old")
    discard(tmp_path / "old")
    assert (tmp_path / "old/hydra").exists()
    make(tmp_path / "outputs/day/used")
    hydras(tmp_path / "outputs/day/used")
    (tmp_path / "outputs/day/used/notes.txt").write_text("mine")
    discard(tmp_path / "outputs/day/used")
    assert len(contents(tmp_path / "outputs/day/used")) == 5
    make(tmp_path / "outputs/day/time")
    hydras(tmp_path / "outputs/day/time")
    discard(tmp_path / "outputs/day/time")
    assert [p.name for p in (tmp_path / "outputs/day").iterdir()] == ["used"]
    with locked(tmp_path / "a/b"):
        hydras(tmp_path / "a/b")
        discard(tmp_path / "a/b")
    assert not (tmp_path / "a").exists()


ROW = {"round": 1, "loss": 1.0, "test_loss": 1.0, "top1": 0.5, "bytes": {}}
TENSORS = {"w": torch.ones(1000)}
WRITES: dict[str, tuple[str, Callable[[results.RunFolder], None]]] = {
    "config.yaml": ("config.yaml.part", lambda run_: run_.write_config("a: 1\n")),
    "metrics.jsonl": ("metrics.jsonl", lambda run_: run_.add_row(ROW)),
    "events.jsonl": ("events.jsonl", lambda run_: run_.add_event({"event": "x"})),
    "curves.png": ("curves.png.part", lambda run_: run_.finish({})),
    "summary.json": ("summary.json.part", lambda run_: run_.finish({})),
    "checkpoint/state.json": (
        "checkpoint/state.json.part",
        lambda run_: checkpoint.write(run_.path, TENSORS, {"round": 2}),
    ),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("name", WRITES)
def test_a_full_disk_is_one_line_with_the_path(name: str, tmp_path: Path) -> None:
    run_ = results.RunFolder(tmp_path)
    if name in (results.SUMMARY, results.CURVES):
        run_.add_row(ROW)
    checkpoint.write(tmp_path, TENSORS, {"round": 1})
    written, write = WRITES[name]
    (tmp_path / written).symlink_to("/dev/full")
    with pytest.raises(FolderError) as caught:
        write(run_)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}: cannot be written: ")
    assert "No space left on device" in message
    assert "\n" not in message
    assert not list(tmp_path.glob("**/*.part"))
    assert checkpoint.read(tmp_path)[1] == {"round": 1}


def limited(limit: int) -> Callable[[], None]:
    """Return a function that lets no file of this process exceed a size."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def printed(script: str, folder: Path, limit: int) -> str:
    """Return what a script prints, given a folder, if no file exceeds a size."""
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=limited(limit),
    )
    return done.stdout


def test_rows_are_whole_or_not_there(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from masksl.runtime import results\n"
        "run = results.RunFolder(Path(sys.argv[1]))\n"
        "try:\n"
        "    for number in range(1, 1000): run.add_row({'round': number})\n"
        "except results.FolderError as error: print(error)\n"
    )
    output = printed(script, tmp_path, 100)
    path = tmp_path / results.METRICS
    assert output == f"{path}: cannot be written: File too large\n"
    assert [row["round"] for row in results.read_rows(tmp_path)] == [*range(1, 8)]
    assert path.read_bytes().endswith(b"\n")


def test_a_checkpoint_without_room_leaves_the_one_before(tmp_path: Path) -> None:
    script = (
        "import sys, torch; from pathlib import Path\n"
        "from masksl.runtime import checkpoint, folder\n"
        "path = Path(sys.argv[1])\n"
        "checkpoint.write(path, {'w': torch.ones(10)}, {'round': 1})\n"
        "try: checkpoint.write(path, {'w': torch.ones(9000)}, {'round': 2})\n"
        "except folder.FolderError as error: print(error)\n"
    )
    output = printed(script, tmp_path, 20_000)
    (line,) = output.splitlines()
    path = tmp_path / "checkpoint/round-0002.safetensors"
    assert line.startswith(f"{path}: cannot be written: ")
    assert "File too large" in line
    assert checkpoint.read(tmp_path)[1] == {"round": 1}
    assert len(list((tmp_path / "checkpoint").iterdir())) == 2


def test_a_program_on_a_full_disk_ends_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "masksl.main", *QUICK]
    done = subprocess.run(
        [*command, f"hydra.run.dir={tmp_path}/run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limited(70_000),
        timeout=200,
    )
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    path = tmp_path / "run/checkpoint/round-0000.safetensors"
    assert line.startswith(f"masksl: {path}: cannot be written: ")
    assert not list((tmp_path / "run/checkpoint").iterdir())


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError) as caught:
        run(tmp_path / name, *SMALL)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}: cannot be written: ")
    assert "\n" not in message


def test_a_program_without_a_folder_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    process = start(*QUICK, f"hydra.run.dir={tmp_path}/file/run")
    _, error = process.communicate(timeout=100)
    assert process.returncode == 1
    assert error.splitlines() == [
        f"masksl: {tmp_path}/file/run: cannot be written: Not a directory"
    ]


DAMAGES: dict[str, Callable[[str], str]] = {
    "cut short": lambda text: text[: len(text) * 2 // 3],
    "empty": lambda text: "",
    "a list": lambda text: "[]\n",
    "no keys": lambda text: "{}\n",
    "a line less": lambda text: "".join(text.splitlines(keepends=True)[:-1]),
}


@pytest.fixture(scope="module", name="whole")
def fixture_whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run."""
    path = tmp_path_factory.mktemp("whole")
    run(path, *SMALL)
    return path


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", [results.CONFIG, results.METRICS, results.SUMMARY])
def test_a_damaged_run_goes_on_from_its_checkpoint(
    name: str, how: str, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is trained again: the checkpoint is that of the last round."""
    again = (*SMALL, "resume=auto")
    expected = run(whole, *again)
    path = whole / name
    before = path.read_text()
    path.write_text(DAMAGES[how](before))
    assert path.read_text() != before

    def fail(*_: Any) -> None:
        raise AssertionError("a step was trained")

    monkeypatch.setattr("masksl.runtime.console.ProgressBar.on_step", fail)
    assert run(whole, *again) == expected
    assert results.read_result(whole).summary["rounds"] == 4
    if name == results.METRICS:
        assert path.read_text() == before


def test_a_damaged_configuration_is_not_another(whole: Path) -> None:
    """What differs by its checkpoint is refused, whatever its files say."""
    path = whole / results.CONFIG
    before = path.read_text()
    for text in (before, "[]\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="batch_size .26 there, 25 here"):
            run(whole, *SMALL, "resume=auto", "batch_size=25")
    path.write_text(before)


def test_a_row_that_is_cut_is_named(tmp_path: Path) -> None:
    (tmp_path / results.METRICS).write_text('{"round": 1}\n{"round": 2}\n{"rou')
    with pytest.raises(FolderError, match=r"metrics\.jsonl, line 3: damaged or cut"):
        results.read_rows(tmp_path)
