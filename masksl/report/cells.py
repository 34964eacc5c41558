"""The finished runs of a folder by task, cut and method, for tables and figures."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masksl import results
from masksl.report.tables import ReportError

NONE = "none"
METHODS = {
    NONE: "none",
    "qu": "QU",
    "sp": "SP",
    "ms": "MS",
    "rt": "RT",
    "ms+lossless": "MS, lossless",
    "ec": "EC",
}
"""Names of the methods as they are shown, in this order."""

CUTS = ("shallow", "medium", "deep")
# What of the traffic counts: the paper's account, and two wider ones.
ACCOUNTS = ("activations", "with labels", "everything")


@dataclass(frozen=True, order=True)
class Task:
    """What runs that are compared have in common.

    Parameters
    ----------
    dataset, model : str
        Names of the data set and of the network.
    clients : int
        How many share the data.
    """

    dataset: str
    model: str
    clients: int

    def __str__(self) -> str:
        """Return how it is called in tables."""
        clients = "1 client" if self.clients == 1 else f"{self.clients} clients"
        return f"{self.model}, {self.dataset}, {clients}"


@dataclass(frozen=True)
class Run:
    """A finished run.

    Parameters
    ----------
    task : Task
        What it was about.
    cut, method : str
        Of its configuration; the method is the compressor's name, ``ms+lossless`` with
        a lossless stage.
    seed : int
        Its seed.
    target : float | None
        Top-1 accuracy, a fraction, up to which its traffic counts.
    rows : Sequence[Mapping[str, Any]]
        Metrics of its rounds.
    sent : tuple[float, ...]
        Bytes a round by `ACCOUNTS`.
    dense : tuple[float, ...]
        Bytes of the same tensors in float32.
    """

    task: Task
    cut: str
    method: str
    seed: int
    target: float | None
    rows: Sequence[Mapping[str, Any]]
    sent: tuple[float, ...]
    dense: tuple[float, ...]

    @property
    def last(self) -> float:
        """Top-1 accuracy after the last round."""
        return self.rows[-1]["top1"]

    @property
    def best(self) -> float:
        """Highest top-1 accuracy of all evaluations."""
        return max(top1 for _, top1 in self.evaluations)

    @property
    def evaluations(self) -> list[tuple[float, float]]:
        """Every evaluation: rounds trained until then, and top-1 accuracy."""
        return evaluations(self.rows)


Cells = dict[tuple[Task, str], dict[str, list[Run]]]
"""Runs by method, by task and cut, in the order in which they are shown."""


def read_cells(folder: Path) -> Cells:
    """Return the finished runs below a folder.

    Without compression the cut changes little, and such runs are at hand at one cut as
    a rule: they stand under every cut of their task.

    Parameters
    ----------
    folder : Path
        Holds run folders, at any depth.

    Raises
    ------
    ReportError
        If there are no runs, or none without compression.
    """
    paths = sorted(folder.glob(f"**/{results.SUMMARY}"))
    runs = [read_run(path.parent) for path in paths]
    if not runs:
        raise ReportError(f"no {results.SUMMARY} below {folder}")
    baselines: dict[Task, list[Run]] = defaultdict(list)
    places: dict[tuple[Task, str], list[Run]] = defaultdict(list)
    for run in runs:
        if run.method == NONE:
            baselines[run.task].append(run)
        else:
            places[run.task, run.cut].append(run)
    for task, _ in places:
        if task not in baselines:
            raise ReportError(f"no run of {task} without compression below {folder}")
    cells: Cells = {}
    for task, cut in sorted(places, key=lambda place: (place[0], _rank(place[1]))):
        by_method = cells[task, cut] = {NONE: baselines[task]}
        for method in METHODS:
            if found := [run for run in places[task, cut] if run.method == method]:
                by_method[method] = found
    return cells


def read_run(folder: Path) -> Run:
    """Return a finished run by its folder."""
    settings = results.read_config(folder)
    summary, rows = results.read_summary(folder), results.read_rows(folder)
    staged = settings.get("compressor.lossless", "none") != "none"
    name = settings["compressor.name"]
    labels = _labels(summary["bytes"])
    activations = float(summary["paper_bytes"])
    everything = float(summary["bytes_total"])
    dense = summary["compression_factor"] * activations
    sent = activations, activations + labels, everything
    whole = dense, dense + labels, summary["factor_total"] * everything
    target = settings["target"]
    return Run(
        task=Task(
            settings["dataset.name"], settings["model.name"], settings["clients"]
        ),
        cut=str(settings["cut"]),
        method=f"{name}+lossless" if staged else name,
        seed=settings["seed"],
        target=target if isinstance(target, float) else None,
        rows=rows,
        sent=tuple(figure / len(rows) for figure in sent),
        dense=tuple(figure / len(rows) for figure in whole),
    )


def evaluations(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return every evaluation: rounds trained until then, and top-1 accuracy."""
    found = []
    for row in rows:
        before = row["round"] - 1
        found += [(before + c["step"] / row["steps"], c["top1"]) for c in row["checks"]]
        found.append((row["round"], row["top1"]))
    return found


def _labels(nested: Mapping[str, Any]) -> int:
    return sum(phase.get("up", {}).get("label", 0) for phase in nested.values())


def _rank(cut: str) -> tuple[int, str]:
    return (CUTS.index(cut) if cut in CUTS else len(CUTS), cut)
