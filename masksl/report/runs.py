"""Table of the runs of a folder: one line per setting, averaged over its seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masksl.report.cells import SPLIT
from masksl.report.tables import (
    MISSING,
    ReportError,
    comma_separated,
    markdown,
    share,
    spread,
    with_spread,
)
from masksl.runtime import results

Summary = Mapping[str, Any]


def _percent(fraction: float) -> float:
    return 100 * fraction


def _megabytes(number: float) -> float:
    return number / 1e6


@dataclass(frozen=True)
class _Column:
    """A column of the table.

    Parameters
    ----------
    name : str
        Its heading.
    key : str
        Key of the summary.
    form : str
        Format of its values in Markdown.
    convert : Callable[[float], float]
        Converts the value of a summary to the unit of the column.
    """

    name: str
    key: str
    form: str
    convert: Callable[[float], float] = float

    def values(self, summaries: Sequence[Summary]) -> list[float]:
        """Return the values of the summaries that have one."""
        values = [summary.get(self.key) for summary in summaries]
        return [self.convert(value) for value in values if value is not None]

    def text(self, summaries: Sequence[Summary]) -> str:
        """Return the cell of a Markdown table."""
        values = self.values(summaries)
        if not values:
            return MISSING
        return with_spread(values, self.form) + share(len(values), len(summaries))

    def numbers(self, summaries: Sequence[Summary]) -> list[str]:
        """Return the cells of a CSV file: mean and deviation, empty without values."""
        values = self.values(summaries)
        return [f"{value:.6g}" for value in spread(values)] if values else ["", ""]


_COLUMNS = (
    _Column("top-1, %", "top1", ".2f", _percent),
    _Column("best top-1, %", "best_top1", ".2f", _percent),
    _Column("bits an element", "bits_per_element", ".3f"),
    _Column("relative error", "relative_error", ".3f"),
    _Column("activations, MB", "paper_bytes", ".1f", _megabytes),
    _Column("everything, MB", "bytes_total", ".1f", _megabytes),
)


def runs(folder: Path) -> dict[str, str]:
    """Return the tables of all finished runs below a folder, one line per setting.

    Parameters
    ----------
    folder : Path
        Holds runs as ``<setting>/seed=<n>``, like the folder of a sweep. A run in a
        folder of another name is a setting of its own.

    Returns
    -------
    dict[str, str]
        Text by file name. Values are means over seeds ± standard deviations. Columns
        without a value in any run are left out.

    Raises
    ------
    ReportError
        If there is no finished run.
    """
    settings = _summaries(folder)
    summaries = [summary for several in settings.values() for summary in several]
    columns = [column for column in _COLUMNS if column.values(summaries)]
    head = ["setting", "seeds"]
    if with_method := any(_method(summary) != SPLIT for summary in summaries):
        head.insert(1, "method")
    texts, numbers = [], []
    for setting, several in settings.items():
        start = [setting, str(len(several))]
        if with_method:
            start.insert(1, ", ".join(sorted(set(map(_method, several)))))
        cells = [column.text(several) for column in columns]
        texts.append([start[0].replace("|", "\\|"), *start[1:], *cells])
        flat = [cell for column in columns for cell in column.numbers(several)]
        numbers.append([*start, *flat])
    names = [column.name for column in columns]
    pairs = [text for name in names for text in (name, f"{name}, std")]
    return {
        "runs.md": markdown([*head, *names], texts),
        "runs.csv": comma_separated([*head, *pairs], numbers),
    }


def _summaries(folder: Path) -> dict[str, list[Summary]]:
    """Return the summaries of the finished runs below a folder, by setting."""
    settings: dict[str, list[Summary]] = {}
    for run in results.finished_runs(folder):
        place = run.parent if run.name.startswith("seed=") else run
        setting = place.relative_to(folder).as_posix()
        settings.setdefault(setting, []).append(_read(run))
    if not settings:
        raise ReportError(f"no {results.SUMMARY} below {folder}")
    return settings


def _read(run: Path) -> Summary:
    """Return the summary of a run, checked by its other files unless it lies alone."""
    if not any((run / name).exists() for name in (results.CONFIG, results.METRICS)):
        return results.read_summary(run)
    return results.read_result(run).summary


def _method(summary: Summary) -> str:
    return summary.get("method", SPLIT)
