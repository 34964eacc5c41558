"""Runs of one method that stand in the lines of a table, several seeds in each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from masksl.report.cells import check_settings
from masksl.report.tables import ReportError
from masksl.runtime import results


class Run(Protocol):
    """A finished run of a line."""

    @property
    def title(self) -> str:
        """What it is called in error lines."""

    @property
    def seed(self) -> int:
        """Its seed."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The part of its configuration that all runs of a line share."""


def results_of(folder: Path, method: str) -> list[results.Result]:
    """Return the finished runs of a method below a folder.

    Raises
    ------
    ReportError
        If there are none.
    """
    found = [results.read_result(path) for path in results.finished_runs(folder)]
    own = [result for result in found if result.summary["method"] == method]
    if not own:
        raise ReportError(f"no {results.SUMMARY} of method={method} below {folder}")
    return own


def check_lines(by_name: Mapping[str, Sequence[Run]], free: tuple[str, ...]) -> None:
    """Check the lines that are compared with each other.

    Parameters
    ----------
    by_name : Mapping[str, Sequence[Run]]
        Runs of each line, by seed.
    free : tuple[str, ...]
        Prefixes of the keys in which lines may differ.

    Raises
    ------
    ReportError
        If lines differ in another key, or runs of a line in any, or have the same seed.
    """
    first = next(iter(by_name.values()))[0]
    for several in by_name.values():
        _check(first, several[0], free)
        for before, run in zip(several, several[1:], strict=False):
            _check(before, run, ())
            if before.seed == run.seed:
                raise ReportError(f"seed={run.seed}: 2 runs of {run.title}")


def _check(a: Run, b: Run, free: tuple[str, ...]) -> None:
    """Raise `ReportError` if runs differ in more than keys of some prefixes."""
    what = f"runs of {a.title} and {b.title}"
    check_settings(a.settings, b.settings, free, what)
