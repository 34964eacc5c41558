"""The run folder: writing results, and reading them back."""

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from masksl.runtime.folder import FolderError, make, write_whole, writing
from masksl.settings import EARLIER

if TYPE_CHECKING:  # imported where figures are drawn: it takes a second
    from matplotlib.figure import Figure

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
EVENTS = "events.jsonl"
CURVES = "curves.png"
_PATHS = ("dataset.root", "resume")
# What every finished run has, by the file that holds it.
_SETTINGS = ("dataset.name", "model.name", "clients", "seed", "compressor.name")
_TOTALS = ("rounds", "top1", "bytes_total")
_COLUMNS = ("round", "loss", "top1", "steps", "checks", "bytes")


class RunFolder:
    """The folder of one run.

    Parameters
    ----------
    path : Path
        Created if missing. Rows of an earlier run in it are removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        make(path)
        for name in (METRICS, SUMMARY, EVENTS):
            with writing(path / name):
                (path / name).unlink(missing_ok=True)

    def write_config(self, text: str) -> None:
        """Write the resolved configuration, YAML."""
        write_whole(self.path / CONFIG, text)

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Append the metrics of a round."""
        _append(self.path / METRICS, row)

    def add_event(self, event: Mapping[str, Any]) -> None:
        """Append a disturbance that did not end the run."""
        _append(self.path / EVENTS, event)

    def add_files(self, files: Mapping[str, bytes]) -> None:
        """Write the method's own files, content by name."""
        for name, content in files.items():
            write_whole(self.path / name, content)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the curves and then the summary, with which the run is finished."""
        draw_curves(read_rows(self.path), self.path / CURVES)
        text = json.dumps(summary, indent=2, allow_nan=False)
        write_whole(self.path / SUMMARY, text + "\n")


@dataclass(frozen=True)
class Result:
    """What a finished run has left in its folder.

    Parameters
    ----------
    folder : Path
        The run folder.
    settings : Mapping[str, Any]
        Its configuration, flat.
    rows : Sequence[Mapping[str, Any]]
        Metrics of its rounds.
    summary : Mapping[str, Any]
        Its summary.
    """

    folder: Path
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]


def finished_runs(folder: Path) -> list[Path]:
    """Return the folders of the finished runs below a folder, sorted."""
    return [path.parent for path in sorted(folder.glob(f"**/{SUMMARY}"))]


def read_result(path: Path) -> Result:
    """Return what a finished run has left, after comparing its files.

    Parameters
    ----------
    path : Path
        Run folder with a summary.

    Raises
    ------
    FolderError
        If a file is missing, damaged or cut short, or lacks what all runs have.
    """
    summary, rows, settings = read_summary(path), read_rows(path), read_config(path)
    _check_keys(path / CONFIG, settings, _SETTINGS)
    for number, row in enumerate(rows, 1):
        _check_keys(path / METRICS, row, _COLUMNS, f", line {number}")
        if row["round"] != number:
            text = f"line {number} is of round {row['round']}"
            raise FolderError(f"{path / METRICS}: {text}: rows are missing or mixed")
    if len(rows) != summary["rounds"]:
        raise FolderError(
            f"{path / METRICS}: {len(rows)} rows, {summary['rounds']} by {SUMMARY}: "
            "cut short or mixed"
        )
    return Result(path, settings, rows, summary)


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration of a run folder, flat.

    Raises
    ------
    FolderError
        If it is missing, damaged or cut short; likewise `read_rows`, `read_summary`.
    """
    file = path / CONFIG
    text = _read(file)
    if not text.endswith("\n"):
        raise _damaged(file, "its last line has no end")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _damaged(file, error) from error
    return EARLIER | _mapping(file, config)


def network_name(settings: Mapping[str, Any]) -> str:
    """Return what the network of a run is called, which tells it from all others.

    >>> network_name({"model.name": "resnet8", "model.stem_stride": 2})
    'resnet8 (stem stride 2)'
    """
    name, stride = str(settings["model.name"]), settings["model.stem_stride"]
    return name if stride == 1 else f"{name} (stem stride {stride})"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a run folder, one a round."""
    file = path / METRICS
    return [
        _parse(file, line, f", line {number}")
        for number, line in enumerate(_read(file).splitlines(), 1)
    ]


def read_summary(path: Path) -> dict[str, Any]:
    """Return the summary of a run folder."""
    file = path / SUMMARY
    summary = _parse(file, _read(file))
    _check_keys(file, summary, _TOTALS)
    return {"method": EARLIER["method.name"]} | summary


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise FolderError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _damaged(file, error) from error
    return text


def _parse(file: Path, text: str, place: str = "") -> dict[str, Any]:
    """Return the JSON object of a file or of a line of it."""
    try:
        return _mapping(file, json.loads(text), place)
    except ValueError as error:
        raise _damaged(file, error, place) from error


def _mapping(file: Path, value: Any, place: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _damaged(file, f"no keys but {value!r:.40}", place)
    return value


def _damaged(file: Path, reason: object, place: str = "") -> FolderError:
    text = " ".join(str(reason).split())
    return FolderError(f"{file}{place}: damaged or cut short ({text})")


def _check_keys(
    file: Path, values: Mapping[str, Any], keys: Sequence[str], place: str = ""
) -> None:
    for key in keys:
        if key not in values:
            raise FolderError(f"{file}{place}: damaged or cut short (no {key})")


def collect(folder: Path, into: Path) -> None:
    """Copy what reports need of the finished runs below a folder.

    Parameters
    ----------
    folder : Path
        Holds run folders, at any depth.
    into : Path
        Receives the same folders, without checkpoints, curves, and paths of this
        machine. Its other files are kept. Not the folder itself, nor below it.

    Raises
    ------
    FolderError
        If a file is damaged or cannot be written. All are read before any is written.
    """
    found = [read_result(path) for path in finished_runs(folder)]
    for result in found:
        run = into / result.folder.relative_to(folder)
        make(run)
        settings = yaml.safe_load(_read(result.folder / CONFIG))
        kept = {key: settings[key] for key in settings if key not in _PATHS}
        write_whole(run / CONFIG, yaml.safe_dump(kept, sort_keys=False))
        for name in (METRICS, SUMMARY):
            write_whole(run / name, _read(result.folder / name))


def draw_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw loss by round, and accuracy by round and by bytes sent.

    Parameters
    ----------
    rows : Sequence[Mapping[str, Any]]
        Rows of a run, one a round.
    path : Path
        PNG file to write.
    """
    # pylint: disable-next=import-outside-toplevel,redefined-outer-name
    from matplotlib.figure import Figure

    rounds = [row["round"] for row in rows]
    sent: list[float] = []
    for row in rows:
        sent.append((sent[-1] if sent else 0) + total(row["bytes"]) / 1e6)
    figure = Figure(figsize=(10.5, 3.2))
    loss, accuracy, traffic = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.16, top=0.96, wspace=0.23)
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
    write_whole(path, image_of(figure))


def image_of(figure: "Figure", form: str = "png", dpi: int = 120) -> bytes:
    """Return a figure as the content of a file of a format."""
    image = io.BytesIO()
    figure.savefig(image, format=form, dpi=dpi)
    return image.getvalue()


def _number(value: float | None) -> float:
    """Return a value, NaN for a round in which nobody trained."""
    return math.nan if value is None else value


def total(nested: Mapping[str, Any] | int) -> int:
    """Return the sum of the counts of a row, whatever they are nested by."""
    if isinstance(nested, Mapping):
        return sum(map(total, nested.values()))
    return nested


def _append(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row, whole or not at all, and wait until it is on the disk."""
    left = memoryview(f"{json.dumps(row, allow_nan=False)}\n".encode())
    with writing(path), open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                os.truncate(path, before)
            raise
