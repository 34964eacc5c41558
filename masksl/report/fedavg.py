"""Rounds and bytes of federated averaging up to two accuracies, by partition.

Bytes are those of both ways, training and evaluation, up to the end of the round in
which the accuracy is first reached. The factor is the bytes of the run without
compression of the same seed over those of the run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masksl.report.cells import FREE, NONE, ORDER, display_name, rank
from masksl.report.lines import (
    Lines,
    Run,
    check_keys,
    each_line,
    grouped,
    network_of,
    partition_of,
    results_of,
    task_of,
    without,
)
from masksl.report.tables import (
    MISSING,
    comma_separated,
    markdown,
    share,
    with_spread,
)
from masksl.runtime import results

METHOD = "fedavg"
TARGETS = (0.97, 0.99)  # top-1 accuracies, fractions
# Keys that a run must have in its configuration.
_NEEDED = (
    *("method.name", "dataset.name", "dataset.partition", "dataset.alpha"),
    *("model.name", "clients", "seed", "compressor.name", "model_compressor.name"),
)
# Prefixes of keys that may differ between lines.
_COMPRESSION = ("compressor.", "model_compressor.", "plugins")


@dataclass(frozen=True)
class _Run(Run):
    """A finished run.

    Parameters
    ----------
    network, partition : str
        The two parts of its task.
    rows : Sequence[Mapping[str, Any]]
        Metrics of its rounds.
    """

    network: str
    partition: str
    rows: Sequence[Mapping[str, Any]]

    @property
    def last(self) -> float:
        """Top-1 accuracy after the last round."""
        return self.rows[-1]["top1"]

    def until(self, target: float) -> tuple[int, int] | None:
        """Return rounds and bytes until an accuracy, None if it is never reached."""
        sent = 0
        for row in self.rows:
            sent += results.total(row["bytes"])
            if row["top1"] >= target:
                return row["round"], sent
        return None


_Lines = Lines[_Run]


def fedavg(folder: Path) -> dict[str, str]:
    """Return the tables of a folder of runs.

    Parameters
    ----------
    folder : Path
        Holds run folders, at any depth; those of other methods are left out.

    Returns
    -------
    dict[str, str]
        Text by file name. Values are means over seeds ± standard deviations.

    Raises
    ------
    ReportError
        If there are no runs, a run lacks a needed key, runs of one compressor differ in
        more than their seed, or those of one partition in more than compression.
    """
    lines = _read(folder)
    return {"fedavg.md": _table(lines), "fedavg.csv": _figures(lines)}


def _read(folder: Path) -> _Lines:
    """Return the runs by task and compressor, in the order of the table."""
    runs = map(_run_of, results_of(folder, METHOD))
    return grouped(runs, _rank, _COMPRESSION)


def _run_of(result: results.Result) -> _Run:
    settings = result.settings
    check_keys(result, _NEEDED)
    up, down = settings["compressor.name"], settings["model_compressor.name"]
    name = display_name(up)
    return _Run(
        task=task_of(settings),
        name=name if down == NONE else f"{name}, down {display_name(down)}",
        seed=settings["seed"],
        settings=without(settings, (*FREE, "target")),
        network=network_of(settings),
        partition=partition_of(settings),
        rows=result.rows,
    )


def _table(lines: _Lines) -> str:
    """Return the Markdown table."""
    head = ["task", "partition", "compressor", "seeds", "top-1, %"]
    for target in TARGETS:
        at = f"{target:.0%}"
        head += [f"rounds to {at}", f"MB to {at}", f"factor at {at}"]
    rows = []
    for task, name, several in each_line(lines):
        top1 = with_spread([100 * run.last for run in several], ".2f")
        place = [several[0].network, several[0].partition]
        row = [*place, name, str(len(several)), top1]
        for target in TARGETS:
            row += _cells(several, lines[task].get(NONE, []), target)
        rows.append(row)
    return markdown(head, rows)


def _cells(
    several: Sequence[_Run], baselines: Sequence[_Run], target: float
) -> list[str]:
    """Return rounds, bytes and factor of the runs of a line; INF if none reached it."""
    reached = {run.seed: run.until(target) for run in several}
    found = [until for until in reached.values() if until is not None]
    if not found:
        return ["INF", "INF", MISSING]
    of = share(len(found), len(several))
    rounds = with_spread([until[0] for until in found], ".1f") + of
    bytes_ = with_spread([until[1] / 1e6 for until in found], ".2f") + of
    plain = {run.seed: run.until(target) for run in baselines}
    factors = []
    for seed, until in reached.items():
        base = plain.get(seed)
        if until is not None and base is not None:
            factors.append(base[1] / until[1])
    if not factors:
        return [rounds, bytes_, MISSING]
    factor = with_spread(factors, ".2f") + share(len(factors), len(several))
    return [rounds, bytes_, factor]


def _figures(lines: _Lines) -> str:
    """Return a CSV file: one line per run."""
    head = ["task", "partition", "compressor", "seed", "top1"]
    for target in TARGETS:
        head += [f"rounds to {target:g}", f"bytes to {target:g}"]
    rows = []
    for _, name, several in each_line(lines):
        for run in several:
            row = [run.network, run.partition, name, run.seed, f"{run.last:.4f}"]
            for target in TARGETS:
                row += list(run.until(target) or ("", ""))
            rows.append(row)
    return comma_separated(head, rows)


def _rank(run: _Run) -> tuple[int, str, str]:
    """Return the place of a run's compressor in the table."""
    return (*rank(ORDER, run.settings["compressor.name"]), run.name)
