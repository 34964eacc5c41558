"""The finished runs of a folder by task, cut and method, for tables and figures."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masksl.report.tables import ReportError
from masksl.runtime import results

NONE = "none"
ORDER = (NONE, "qu", "sp", "ms", "rt", "ms+context", "ec")  # others come after these
CUTS = ("shallow", "medium", "deep")
# Keys in which runs may differ that are averaged.
_FREE = ("seed", "dataset.root", "engine.", "checkpoint.", "resume")
# Keys in which methods may differ besides.
_METHOD = ("compressor.", "gradient_", "cut", "plugins")
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
        Of its configuration; the method is the compressor's name, and after a plus its
        lossless stage.
    seed : int
        Its seed.
    target : float | None
        Top-1 accuracy, a fraction, up to which its traffic counts.
    rows : Sequence[Mapping[str, Any]]
        Metrics of its rounds.
    settings : Mapping[str, Any]
        Of its configuration what the runs of a method have in common.
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
    settings: Mapping[str, Any]
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
    a rule: those of the first cut stand under every cut that has none of its own.

    Parameters
    ----------
    folder : Path
        Holds run folders, at any depth.

    Raises
    ------
    ReportError
        If there are no runs, none without compression, runs of one method that
        differ in more than their seed, or of two in more than how they send.
    """
    paths = sorted(folder.glob(f"**/{results.SUMMARY}"))
    runs = [read_run(path.parent) for path in paths]
    if not runs:
        raise ReportError(f"no {results.SUMMARY} below {folder}")
    baselines: dict[Task, dict[str, list[Run]]] = defaultdict(dict)
    places: dict[tuple[Task, str], dict[str, list[Run]]] = defaultdict(dict)
    for run in sorted(runs, key=lambda run: (_rank(CUTS, run.cut), run.seed)):
        if run.method == NONE:
            baselines[run.task].setdefault(run.cut, []).append(run)
        else:
            places[run.task, run.cut].setdefault(run.method, []).append(run)
    cells: Cells = {}
    for task, cut in sorted(
        places, key=lambda place: (place[0], _rank(CUTS, place[1]))
    ):
        if task not in baselines:
            raise ReportError(f"no run of {task} without compression below {folder}")
        first = next(iter(baselines[task].values()))
        found = {NONE: baselines[task].get(cut, first)} | places[task, cut]
        methods = sorted(found, key=lambda method: _rank(ORDER, method))
        for method in methods:
            _check_alike(found[method])
            where = f"runs of {task}, {cut}, {NONE} and {method}"
            _check_settings(found[NONE][0], found[method][0], _METHOD, where)
        cells[task, cut] = {method: found[method] for method in methods}
    return cells


def shown(method: str) -> str:
    """Return how a method is called in tables.

    >>> shown("ms+context")
    'MS, context'
    """
    name, _, stage = method.partition("+")
    name = name if name == NONE else name.upper()
    return f"{name}, {stage}" if stage else name


def methods_of(cells: Cells) -> list[str]:
    """Return all methods that there are, in their order."""
    there = {method for found in cells.values() for method in found}
    return sorted(there, key=lambda method: _rank(ORDER, method))


def _check_alike(runs: list[Run]) -> None:
    """Raise `ReportError` unless runs differ in their seeds, and in these alone."""
    first, seeds = runs[0], Counter(run.seed for run in runs)
    where = f"runs of {first.task}, {first.cut}, {first.method}"
    for seed, number in seeds.items():
        if number > 1:
            raise ReportError(f"seed={seed}: {number} {where} have it")
    for run in runs:
        _check_settings(first, run, (), where)


def _check_settings(a: Run, b: Run, free: tuple[str, ...], where: str) -> None:
    """Raise `ReportError` if two runs differ in a key that begins with none of some."""
    for key in sorted(a.settings.keys() | b.settings.keys()):
        values = a.settings.get(key), b.settings.get(key)
        if values[0] != values[1] and not key.startswith(free):
            raise ReportError(f"{where} differ in {key}: {values[0]}, {values[1]}")


def read_run(folder: Path) -> Run:
    """Return a finished run by its folder."""
    settings = results.read_config(folder)
    summary, rows = results.read_summary(folder), results.read_rows(folder)
    name, stage = settings["compressor.name"], settings.get("compressor.lossless", NONE)
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
        method=name if stage == NONE else f"{name}+{stage}",
        seed=settings["seed"],
        target=None if isinstance(target, str) else target,
        rows=rows,
        settings={k: v for k, v in settings.items() if not k.startswith(_FREE)},
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


def _rank(order: Sequence[str], name: str) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order), name)
