"""Any two columns of the rows of runs, one line a run.

A column is a key of ``metrics.jsonl``, with dots where rows are nested:
``bytes.training.up.activation``. One that has others below it, like ``bytes``, is their
sum. ``sum:COLUMN`` adds a column up over the rounds.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from masksl.report.tables import ReportError, comma_separated
from masksl.runtime import results
from masksl.runtime.folder import make, write_whole

SUM = "sum:"  # before a column: its running total
# Prefixes of keys that say nothing about a run: paths of a machine.
_NOT_SHOWN = ("dataset.root", "resume")


@dataclass(frozen=True)
class _Run:
    """A run with its rows, flat.

    Parameters
    ----------
    name : str
        Its folder, relative to that of the report.
    settings : Mapping[str, Any]
        Its configuration, flat.
    rows : Sequence[Mapping[str, float]]
        Columns of its rounds by name; those without a value are left out.
    """

    name: str
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, float]]

    @property
    def columns(self) -> set[str]:
        """Names of the columns of any round."""
        return {name for row in self.rows for name in row}

    def values(self, column: str) -> list[float]:
        """Return a column by round, NaN in rounds without a value."""
        if column.startswith(SUM):
            name = column.removeprefix(SUM)
            return list(accumulate(row.get(name, 0) for row in self.rows))
        return [row.get(column, math.nan) for row in self.rows]


def plot(folder: Path, x: str | None, y: str | None, into: Path | None) -> list[str]:
    """Draw a column of the rows of all runs below a folder over another.

    Parameters
    ----------
    folder : Path
        Holds run folders, at any depth. Runs that are not finished are drawn too.
    x, y : str | None
        Names of the columns.
    into : Path | None
        Image file, by its suffix, or a folder; by default the folder of the runs. A CSV
        file with the values is written beside it.

    Returns
    -------
    list[str]
        Lines for the user: the files, runs that are not finished or not drawn.

    Raises
    ------
    ReportError
        If there is no run, or no run has the column; the text lists those that exist.
    FolderError
        If a file of a run is damaged, or the files cannot be written.
    """
    lines: list[str] = []
    runs = list(_read(folder, lines))
    if not runs:
        raise ReportError(f"no {results.METRICS} below {folder}")
    for option, column in (("--x", x), ("--y", y)):
        _check_column(option, column, runs)
    assert x is not None and y is not None
    wanted = {column.removeprefix(SUM) for column in (x, y)}
    drawn = [run for run in runs if wanted <= run.columns]
    if not drawn:
        raise ReportError(f"--x {x} --y {y}: no run below {folder} has both")
    for run in runs:
        if missing := sorted(wanted - run.columns):
            lines.append(f"{run.name}: left out, it has no {', '.join(missing)}")
    image = _image(folder if into is None else into, x, y)
    labels = labels_of([(run.name, run.settings) for run in drawn])
    write_whole(image, _draw(drawn, labels, x, y, image.suffix[1:]))
    table = image.with_suffix(".csv")
    write_whole(table, _table(drawn, labels, x, y))
    return [*lines, str(image), str(table)]


def _read(folder: Path, lines: list[str]) -> Iterator[_Run]:
    """Yield the runs below a folder; say which are not finished."""
    for path in sorted(folder.glob(f"**/{results.METRICS}")):
        run = path.parent
        name = run.relative_to(folder).as_posix()
        if (run / results.SUMMARY).exists():
            result = results.read_result(run)
            settings, rows = result.settings, result.rows
        else:
            settings, rows = results.read_config(run), results.read_rows(run)
            of = settings.get("rounds", "?")
            lines.append(f"{name}: not finished, {len(rows)} of {of} rounds")
        if rows:
            yield _Run(name, settings, [dict(_flat(row)) for row in rows])


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a row by dotted name, and the sums of nested ones."""
    for key, value in row.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            below = dict(_flat(value, f"{name}."))
            yield from below.items()
            depth = name.count(".") + 1
            parts = [below[key] for key in below if key.count(".") == depth]
            yield name, sum(parts)
        elif isinstance(value, (int, float)):
            yield name, value


def _check_column(option: str, column: str | None, runs: Sequence[_Run]) -> None:
    known = set().union(*(run.columns for run in runs))
    if column is None or column.removeprefix(SUM) not in known:
        listed = ", ".join(sorted(known))
        given = "not given" if column is None else repr(column)
        raise ReportError(f"{option} {given}: must be one of {listed}")


def labels_of(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Return a name for each run: the settings in which it differs from others.

    A setting that not all runs have, like the options of one compressor, is named where
    runs that have it differ. Runs of the same settings get their folder as well.

    Parameters
    ----------
    runs : Sequence[tuple[str, Mapping[str, Any]]]
        Folder and configuration of each.

    Examples
    --------
    >>> labels_of([("a", {"x": 1, "y": 2}), ("b", {"x": 1, "y": 3})])
    ['y=2', 'y=3']
    """
    keys = dict.fromkeys(key for _, settings in runs for key in settings)
    differing = []
    for key in keys:
        values = {str(settings[key]) for _, settings in runs if key in settings}
        if len(values) > 1 and not key.startswith(_NOT_SHOWN):
            differing.append(key)
    texts = [
        ", ".join(f"{key}={settings[key]}" for key in differing if key in settings)
        for _, settings in runs
    ]
    return [
        text if texts.count(text) == 1 and text else f"{text} ({name})".strip()
        for text, (name, _) in zip(texts, runs, strict=True)
    ]


def _image(into: Path, x: str, y: str) -> Path:
    """Return the image file, whose folder is made."""
    formats = Figure().canvas.get_supported_filetypes()
    if into.suffix[1:] in formats and not into.is_dir():
        make(into.parent)
        return into
    make(into)
    return into / (re.sub(r"[^\w.-]", "_", f"{y}_by_{x}") + ".png")


def _draw(
    runs: Sequence[_Run], labels: Sequence[str], x: str, y: str, form: str
) -> bytes:
    """Return the figure as a file of a format."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for run, label in zip(runs, labels, strict=True):
        axes.plot(run.values(x), run.values(y), marker=".", label=label)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="small")
    return results.image_of(figure, form)


def _table(runs: Sequence[_Run], labels: Sequence[str], x: str, y: str) -> str:
    """Return a CSV file: one line per run and round, in their order."""
    lines = []
    for run, label in zip(runs, labels, strict=True):
        for pair in zip(run.values(x), run.values(y), strict=True):
            cells = ["" if math.isnan(value) else f"{value:.10g}" for value in pair]
            lines.append([run.name, label, *cells])
    return comma_separated(["run", "label", x, y], lines)
