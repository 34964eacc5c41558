"""Runs that stand in the lines of a table: lines by task, several seeds in each."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from masksl.report.cells import check_settings
from masksl.report.tables import MISSING, ReportError, with_spread
from masksl.runtime import results

# By partition, the key that describes it.
_PARTITIONS = {
    **dict.fromkeys(("dirichlet", "dirichlet_equal"), "dataset.alpha"),
    **dict.fromkeys(("pathological", "chunks"), "dataset.classes_per_client"),
}


@dataclass(frozen=True)
class Run:
    """A finished run of a line.

    Parameters
    ----------
    task, name : str
        What runs have in common that are compared; its line among these.
    seed : int
        Its seed.
    settings : Mapping[str, Any]
        The part of its configuration that all runs of a line share.
    """

    task: str
    name: str
    seed: int
    settings: Mapping[str, Any]

    @property
    def title(self) -> str:
        """What it is called in error lines."""
        return f"{self.task}, {self.name}"


R = TypeVar("R", bound=Run)
T = TypeVar("T")
Lines = dict[str, dict[str, list[R]]]
"""Runs by task and name, in the order of the tables."""


# --- reading --------------------------------------------------------------------------


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


def check_keys(
    result: results.Result,
    settings: Iterable[str],
    summary: Iterable[str] = (),
    columns: Sequence[str] = (),
) -> None:
    """Raise `ReportError` if a run lacks keys of its configuration, summary or rows."""
    folder = result.folder
    for key in settings:
        if result.settings.get(key) is None:
            raise ReportError(f"{folder / results.CONFIG}: no {key}")
    for key in summary:
        if not result.summary.get(key):
            raise ReportError(f"{folder / results.SUMMARY}: no {key}")
    for number, row in enumerate(result.rows, 1):
        for key in columns:
            if key not in row:
                place = f"{folder / results.METRICS}, line {number}"
                raise ReportError(f"{place}: no {key}")


def check_rounds(result: results.Result) -> None:
    """Raise `ReportError` if a run has ended before its last round."""
    rows, rounds = len(result.rows), result.settings["rounds"]
    if rows != rounds:
        text = f"{rows} rows, rounds={rounds} by {results.CONFIG}"
        raise ReportError(f"{result.folder / results.METRICS}: {text}")


def without(settings: Mapping[str, Any], free: tuple[str, ...]) -> dict[str, Any]:
    """Return the settings whose keys have none of some prefixes."""
    return {k: value for k, value in settings.items() if not k.startswith(free)}


# --- names ----------------------------------------------------------------------------


def network_of(settings: Mapping[str, Any]) -> str:
    """Return network, data set and number of clients, in words."""
    number = settings["clients"]
    clients = "1 client" if number == 1 else f"{number} clients"
    names = results.network_name(settings), settings["dataset.name"]
    return ", ".join([*names, clients])


def partition_of(settings: Mapping[str, Any]) -> str:
    """Return how the data are divided, in words.

    >>> partition_of({"dataset.partition": "dirichlet", "dataset.alpha": 1.0})
    'dirichlet 1'
    """
    partition = str(settings["dataset.partition"])
    if partition not in _PARTITIONS:
        return partition
    value = settings.get(_PARTITIONS[partition], MISSING)
    number = f"{value:g}" if isinstance(value, float) else value
    return f"{partition} {number}"


def task_of(settings: Mapping[str, Any]) -> str:
    """Return what runs must have in common to be compared, in words."""
    return f"{network_of(settings)}, {partition_of(settings)}"


def differing(
    several: Iterable[Mapping[str, Any]], prefix: str | tuple[str, ...]
) -> set[str]:
    """Return the keys with a prefix whose values differ.

    Settings without a key are not compared in it.
    """
    values: dict[str, set[str]] = defaultdict(set)
    for settings in several:
        for key, value in settings.items():
            if key.startswith(prefix):
                values[key].add(str(value))
    return {key for key, different in values.items() if len(different) > 1}


def in_words(settings: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Return some settings in words, sorted by key, without those that are missing.

    >>> in_words({"model_compressor.bits": 8, "seed": 1}, ["model_compressor.bits"])
    ['down bits 8']
    """
    parts = []
    for key in sorted(settings.keys() & keys):
        group, option = key.split(".", 1)
        if group == "model_compressor":
            option = f"down {option}"
        value = str(settings[key])
        parts.append(value if option == "name" else f"{option} {value}")
    return parts


# --- lines ----------------------------------------------------------------------------


def grouped(
    runs: Iterable[R], rank: Callable[[R], tuple[Any, ...]], free: tuple[str, ...]
) -> Lines[R]:
    """Return runs by task and name, after checking what is compared.

    Parameters
    ----------
    runs : Iterable[R]
        In any order.
    rank : Callable[[R], tuple[Any, ...]]
        Place of a run's line among those of its task.
    free : tuple[str, ...]
        Prefixes of the keys in which lines of a task may differ.

    Raises
    ------
    ReportError
        If lines of a task differ in another key, or runs of a line in any, or have the
        same seed.
    """
    lines: Lines[R] = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: (run.task, *rank(run), run.seed)):
        lines[run.task][run.name].append(run)
    for by_name in lines.values():
        _check(by_name, free)
    return lines


def each_line(lines: Lines[R]) -> Iterator[tuple[str, str, list[R]]]:
    """Yield task, name and runs of each line."""
    for task, by_name in lines.items():
        for name, several in by_name.items():
            yield task, name, several


def cell(several: Iterable[T], form: str, value: Callable[[T], float | None]) -> str:
    """Return mean ± standard deviation over the runs, or rows, that have a value."""
    found = [x for x in map(value, several) if x is not None]
    return with_spread(found, form) if found else MISSING


def mean_of(curves: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean of curves, point by point."""
    return [fmean(values) for values in zip(*curves, strict=True)]


def _check(by_name: Mapping[str, Sequence[Run]], free: tuple[str, ...]) -> None:
    """Check the lines of a task, see `grouped`."""
    first = next(iter(by_name.values()))[0]
    for several in by_name.values():
        _check_alike(first, several[0], free)
        for before, run in zip(several, several[1:], strict=False):
            _check_alike(before, run, ())
            if before.seed == run.seed:
                raise ReportError(f"seed={run.seed}: 2 runs of {run.title}")


def _check_alike(a: Run, b: Run, free: tuple[str, ...]) -> None:
    """Raise `ReportError` if runs differ in more than keys of some prefixes."""
    what = f"runs of {a.title} and {b.title}"
    check_settings(a.settings, b.settings, free, what)
