"""The run folder: writing results, and reading them back."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
EVENTS = "events.jsonl"
CURVES = "curves.png"
_PATHS = ("dataset.root", "resume")
_FIRST_METHOD = "split"  # method of runs from the time when there was no other


class RunFolder:
    """The folder of one run.

    Parameters
    ----------
    path : Path
        Created if missing. Rows of an earlier run in it are removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        (path / METRICS).unlink(missing_ok=True)
        (path / SUMMARY).unlink(missing_ok=True)
        (path / EVENTS).unlink(missing_ok=True)

    def write_config(self, text: str) -> None:
        """Write the resolved configuration, YAML."""
        _write(self.path / CONFIG, text)

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Append the metrics of a round."""
        _append(self.path / METRICS, row)

    def add_event(self, event: Mapping[str, Any]) -> None:
        """Append a disturbance that did not end the run."""
        _append(self.path / EVENTS, event)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary and the curves."""
        draw_curves(read_rows(self.path), self.path / CURVES)
        _write(
            self.path / SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n"
        )


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration of a run folder, flat."""
    config = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
    return {"method.name": _FIRST_METHOD} | config


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a run folder, one a round."""
    lines = (path / METRICS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read_summary(path: Path) -> dict[str, Any]:
    """Return the summary of a run folder."""
    summary = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
    return {"method": _FIRST_METHOD} | summary


def collect(folder: Path, into: Path) -> None:
    """Copy what reports need of the finished runs below a folder.

    Parameters
    ----------
    folder : Path
        Holds run folders, at any depth.
    into : Path
        Receives the same folders, without checkpoints, curves, and paths of this
        machine. Its other files are kept. Not the folder itself, nor below it.
    """
    for summary in sorted(folder.glob(f"**/{SUMMARY}")):
        run = into / summary.parent.relative_to(folder)
        run.mkdir(parents=True, exist_ok=True)
        text = (summary.parent / CONFIG).read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
        kept = {key: settings[key] for key in settings if key not in _PATHS}
        _write(run / CONFIG, yaml.safe_dump(kept, sort_keys=False))
        for name in (METRICS, SUMMARY):
            _write(run / name, (summary.parent / name).read_text(encoding="utf-8"))


def draw_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw loss by round, and accuracy by round and by bytes sent.

    Parameters
    ----------
    rows : Sequence[Mapping[str, Any]]
        Rows of a run, one a round.
    path : Path
        PNG file to write.
    """
    # pylint: disable-next=import-outside-toplevel
    from matplotlib.figure import Figure

    rounds = [row["round"] for row in rows]
    sent: list[float] = []
    for row in rows:
        sent.append((sent[-1] if sent else 0) + total(row["bytes"]) / 1e6)
    figure = Figure(figsize=(10.5, 3.2), layout="constrained")
    loss, accuracy, traffic = figure.subplots(1, 3)
    loss.plot(
        rounds, [_number(row["loss"]) for row in rows], marker=".", label="training"
    )
    loss.plot(rounds, [row["test_loss"] for row in rows], marker=".", label="test")
    loss.set(xlabel="round", ylabel="cross-entropy")
    loss.legend()
    for axes, x, label in (
        (accuracy, rounds, "round"),
        (traffic, sent, "MB sent, both ways"),
    ):
        axes.plot(x, [100 * row["top1"] for row in rows], marker=".", label="top-1")
        axes.set(xlabel=label, ylabel="test accuracy, %")
    for axes in (loss, accuracy, traffic):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _number(value: float | None) -> float:
    """Return a value, NaN for a round in which nobody trained."""
    return math.nan if value is None else value


def total(nested: Mapping[str, Any] | int) -> int:
    """Return the sum of the counts of a row, whatever they are nested by."""
    if isinstance(nested, Mapping):
        return sum(map(total, nested.values()))
    return nested


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def _write(path: Path, text: str) -> None:
    """Write a file atomically."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
