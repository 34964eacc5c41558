"""Trackers: what they are given, what TensorBoard reads back, what is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from masksl import main
from masksl.config import ConfigError
from masksl.runtime import results, tracking
from masksl.runtime.tracking import scalars
from tests.conftest import ROOT, settings_of

QUICK = ("rounds=2", "clients=2", "dataset.limit=60", "dataset.test_limit=20")
BOARD = (*QUICK, "tracking=tensorboard")
LINES = (*QUICK, "plugins=[tests.plugin_tracker]", "tracking.name=lines")


def events(folder: Path) -> EventAccumulator:
    """Read the events of a run folder, which must be in one file."""
    assert len(list((folder / "tensorboard").iterdir())) == 1
    return EventAccumulator(str(folder / "tensorboard")).Reload()


def check_rows(folder: Path, rounds: list[int]) -> None:
    """Compare the scalars of every round with the rows of the run folder."""
    read, rows = events(folder), results.read_rows(folder)
    expected: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in scalars(row):
            point = (row["round"], float(np.float32(value)))
            expected.setdefault(name, []).append(point)
    for number, value in scalars({"summary": results.read_summary(folder)}):
        expected[number] = [(rounds[-1], float(np.float32(value)))]
    assert {"loss", "top1", "bytes/training/up/activation"} < expected.keys()
    found = {
        name: [(event.step, event.value) for event in read.Scalars(name)]
        for name in read.Tags()["scalars"]
    }
    assert found == expected
    assert [step for step, _ in found["top1"]] == rounds


def lines(folder: Path, name: str = "lines.jsonl") -> list[dict[str, Any]]:
    text = (folder / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_tensorboard_reads_the_rows_of_a_resumed_run_once(tmp_path: Path) -> None:
    """In the run's own folder and in another one."""
    main.run(settings_of(*BOARD), tmp_path / "own")
    check_rows(tmp_path / "own", [1, 2])
    text = events(tmp_path / "own").Tensors("config/text_summary")
    assert b"tracking.name: tensorboard" in text[0].tensor_proto.string_val[0]
    main.run(settings_of(*BOARD, "rounds=3", "resume=auto"), tmp_path / "own")
    check_rows(tmp_path / "own", [1, 2, 3])
    more = ("rounds=4", f"resume={tmp_path}/own")
    main.run(settings_of(*BOARD, *more), tmp_path / "other")
    check_rows(tmp_path / "other", [1, 2, 3, 4])


def test_rows_are_seen_before_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def stop(_: Any, round_: int, step: int, steps: int, loss: float) -> None:
        if round_ == 2:
            seen.extend(event.step for event in events(tmp_path).Scalars("top1"))
            raise KeyboardInterrupt

    monkeypatch.setattr("masksl.runtime.console.ProgressBar.on_step", stop)
    with pytest.raises(KeyboardInterrupt):
        main.run(settings_of(*BOARD), tmp_path)
    assert seen == [1]


def test_a_tracker_of_ones_own(tmp_path: Path) -> None:
    """A plugin's tracker, with a key of its own, changes nothing in the run."""
    own = ("+tracking.file=mine", "seed=3")
    main.run(settings_of(*LINES, *own), tmp_path / "first")
    rows = results.read_rows(tmp_path / "first")
    expected = [{"step": row["round"]} | dict(scalars(row)) for row in rows]
    summary = results.read_summary(tmp_path / "first")
    end = [{"step": "summary"} | dict(scalars(summary)), {"step": "closed"}]
    assert lines(tmp_path / "first", "mine") == expected + end
    # trackers may differ between a run and the one that it resumes
    resume = ("tracking.name=none", "rounds=3", "seed=3", f"resume={tmp_path}/first")
    main.run(settings_of(*LINES, *resume), tmp_path / "second")
    assert not list((tmp_path / "second").glob("*lines*"))
    assert results.read_rows(tmp_path / "second")[:2] == rows


def test_a_tracker_is_closed_when_the_run_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("masksl.runtime.console.ProgressBar.on_step", stop)
    settings = settings_of(*LINES, "+tracking.file=lines.jsonl")
    with pytest.raises(KeyboardInterrupt):
        main.run(settings, tmp_path)
    assert lines(tmp_path) == [{"step": "closed"}]


def test_what_is_not_allowed_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of("tracking.name=paper")
    expected = "tracking.name='paper': must be one of none, tensorboard"
    assert str(caught.value).startswith(expected)
    with pytest.raises(
        ConfigError, match="^tracking.file: is missing, must be the name of a"
    ):
        settings_of(*LINES)
    with pytest.raises(ConfigError, match="^tracking.file='': must be the name of a"):
        settings_of(*LINES, "+tracking.file=''")
    with pytest.raises(ConfigError, match="^tracking.file='x': must be "):
        settings_of(*QUICK, "+tracking.file=x")


def test_without_tensorboard_a_run_says_how_to_install_it() -> None:
    """In a process that cannot find the package; other runs do not miss it."""
    script = (
        "import sys\n"
        "sys.modules['tensorboard'] = None\n"
        "from masksl import config\n"
        "config.compose(['engine=local'])\n"
        "try:\n"
        "    config.compose(['tracking=tensorboard'])\n"
        "except config.ConfigError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout == (
        "tracking.name='tensorboard': must be another, or tensorboard installed: "
        'pip install -e ".[tensorboard]"\n'
    )


def test_files_and_trackers_agree() -> None:
    stems = {path.stem for path in (ROOT / "conf/tracking").glob("*.yaml")}
    assert stems == tracking.TRACKERS.keys() - {"lines"}
    for name in stems:
        assert settings_of(f"tracking={name}")["tracking.name"] == name


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_trackers_of_the_page_log_every_number(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The services themselves are stood in for."""
    service = MagicMock()
    monkeypatch.setitem(sys.modules, name, service)
    page = (ROOT / "docs/tracking.md").read_text(encoding="utf-8")
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", page, re.S) if name in c)
    with patch.dict(tracking.TRACKERS):
        exec(code, {})  # pylint: disable=exec-used
        main.run(settings_of(*QUICK, f"tracking.name={name}"), tmp_path)
    log = service.log_metrics if name == "mlflow" else service.init.return_value.log
    rows = results.read_rows(tmp_path)
    assert [call.args[0] for call in log.call_args_list] == [
        dict(scalars(row)) for row in rows
    ]
    assert [call.kwargs["step"] for call in log.call_args_list] == [1, 2]
    end = service.end_run if name == "mlflow" else service.init.return_value.finish
    end.assert_called_once_with()
