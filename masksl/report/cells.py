"""Finished runs of a folder, grouped by task, cut and compressor."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masksl.report.tables import ReportError
from masksl.runtime import results

SPLIT = "split"  # the method that tables do not mention
NONE = "none"
ORDER = (NONE, "qu", "sp", "ms", "rt", "ms+context", "ec")  # all others follow
CUTS = ("shallow", "medium", "deep")
# Three accounts of the traffic: the paper's, and two that count more.
ACCOUNTS = ("activations", "with labels", "everything")
# Prefixes of the keys that may differ between runs of one line.
FREE = (
    *("seed", "dataset.root", "engine.", "checkpoint.", "resume", "tracking."),
    "traffic",  # the compressors that it sets are compared
)
# Prefixes of the keys that may also differ between compressors.
_COMPRESSION = ("compressor.", "gradient_", "cut", "plugins")
# Keys that a run must have, by the file that holds them.
_NEEDED = {
    results.CONFIG: (
        *("dataset.name", "model.name", "clients", "seed", "target"),
        *("cut", "compressor.name"),
    ),
    results.SUMMARY: (
        *("bytes", "bytes_total", "factor_total"),
        *("paper_bytes", "compression_factor"),
    ),
}


@dataclass(frozen=True, order=True)
class Task:
    """What runs must have in common to be compared.

    Parameters
    ----------
    dataset, model : str
        Names of the data set and of the network.
    clients : int
        Number of clients that share the data.
    method : str
        How clients and server cooperate.
    """

    dataset: str
    model: str
    clients: int
    method: str = SPLIT

    def __str__(self) -> str:
        """Return the name of the task in tables."""
        clients = "1 client" if self.clients == 1 else f"{self.clients} clients"
        method = "" if self.method == SPLIT else f", {self.method}"
        return f"{self.model}, {self.dataset}, {clients}{method}"


@dataclass(frozen=True)
class Run:
    """A finished run.

    Parameters
    ----------
    task : Task
        Its task.
    cut, compressor : str
        From its configuration. The compressor is its name, followed by a plus and its
        lossless stage if it has one.
    seed : int
        Its seed.
    target : float | None
        Top-1 accuracy, a fraction, up to which the traffic counts.
    rows : Sequence[Mapping[str, Any]]
        Metrics of its rounds.
    settings : Mapping[str, Any]
        The part of its configuration that all runs of a compressor share.
    sent : tuple[float, ...]
        Bytes per round, in the order of `ACCOUNTS`.
    dense : tuple[float, ...]
        Bytes per round of the same tensors in float32, in the order of `ACCOUNTS`.
    """

    task: Task
    cut: str
    compressor: str
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
        """All evaluations, see `evaluations`."""
        return evaluations(self.rows)


Cells = dict[tuple[Task, str], dict[str, list[Run]]]
"""Runs by compressor, by task and cut, in the order of the tables."""


def read_cells(folder: Path) -> Cells:
    """Read the finished runs below a folder.

    Uncompressed results hardly depend on the cut. A cut without an uncompressed run
    uses those of the first cut.

    Parameters
    ----------
    folder : Path
        Holds run folders, at any depth.

    Raises
    ------
    ReportError
        If there are no runs, a run lacks a needed key, no run is uncompressed, runs of
        one compressor differ in more than their seed, or runs of two compressors
        differ in more than the compression.
    """
    runs = [read_run(path) for path in results.finished_runs(folder)]
    if not runs:
        raise ReportError(f"no {results.SUMMARY} below {folder}")
    baselines: dict[Task, dict[str, list[Run]]] = defaultdict(dict)
    compressed: dict[tuple[Task, str], dict[str, list[Run]]] = defaultdict(dict)
    for run in sorted(runs, key=lambda run: (rank(CUTS, run.cut), run.seed)):
        if run.compressor == NONE:
            baselines[run.task].setdefault(run.cut, []).append(run)
        else:
            group = compressed[run.task, run.cut]
            group.setdefault(run.compressor, []).append(run)
    cells: Cells = {}
    for task, cut in sorted(compressed, key=lambda key: (key[0], rank(CUTS, key[1]))):
        if task not in baselines:
            raise ReportError(f"no run of {task} without compression below {folder}")
        first = next(iter(baselines[task].values()))
        baseline = {NONE: baselines[task].get(cut, first)}
        cells[task, cut] = _cell(task, cut, baseline | compressed[task, cut])
    return cells


def display_name(compressor: str) -> str:
    """Return the name of a compressor in tables.

    >>> display_name("ms+context")
    'MS, context'
    """
    name, _, stage = compressor.partition("+")
    name = name if name == NONE else name.upper()
    return f"{name}, {stage}" if stage else name


def compressors_of(cells: Cells) -> list[str]:
    """Return the names of all compressors, in the order of the tables."""
    names = {name for runs in cells.values() for name in runs}
    return sorted(names, key=lambda name: rank(ORDER, name))


def key_columns(cells: Cells) -> list[str]:
    """Return the CSV columns that identify a task, a cut and a compressor.

    The method is left out if every run is one of split learning.
    """
    columns = ["dataset", "model", "clients", "cut", "compressor"]
    split = all(task.method == SPLIT for task, _ in cells)
    return columns if split else ["method", *columns]


def key_values(
    columns: Sequence[str], task: Task, cut: str, compressor: str
) -> list[Any]:
    """Return the values of `key_columns`."""
    values = vars(task) | {"cut": cut, "compressor": compressor}
    return [values[column] for column in columns]


def read_run(folder: Path) -> Run:
    """Read the finished run in a folder.

    Raises
    ------
    ReportError
        If its configuration or its summary lacks a key that the tables need. The runs
        of a method without a cut do.
    FolderError
        If one of its files is damaged.
    """
    result = results.read_result(folder)
    settings, summary, rows = result.settings, result.summary, result.rows
    method = settings.get("method.name", SPLIT)
    for file, values in ((results.CONFIG, settings), (results.SUMMARY, summary)):
        for key in _NEEDED[file]:
            if values.get(key) is None:
                raise ReportError(f"{folder / file}: no {key}, method={method}")
    name, stage = settings["compressor.name"], settings.get("compressor.lossless", NONE)
    labels = _label_bytes(summary["bytes"])
    activations = float(summary["paper_bytes"])
    everything = float(summary["bytes_total"])
    dense = summary["compression_factor"] * activations
    sent = activations, activations + labels, everything
    whole = dense, dense + labels, summary["factor_total"] * everything
    target = settings["target"]
    return Run(
        task=Task(
            *(settings["dataset.name"], results.network_name(settings)),
            *(settings["clients"], method),
        ),
        cut=str(settings["cut"]),
        compressor=name if stage == NONE else f"{name}+{stage}",
        seed=settings["seed"],
        target=None if isinstance(target, str) else target,
        rows=rows,
        settings={k: v for k, v in settings.items() if not k.startswith(FREE)},
        sent=tuple(total / len(rows) for total in sent),
        dense=tuple(total / len(rows) for total in whole),
    )


def evaluations(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return all evaluations: rounds trained before them, and top-1 accuracy."""
    points = []
    for row in rows:
        before = row["round"] - 1
        for check in row["checks"]:
            points.append((before + check["step"] / row["steps"], check["top1"]))
        points.append((row["round"], row["top1"]))
    return points


def _cell(task: Task, cut: str, runs: Mapping[str, list[Run]]) -> dict[str, list[Run]]:
    """Return the runs by compressor in the order of the tables, after checking them."""
    ordered = sorted(runs, key=lambda name: rank(ORDER, name))
    for name in ordered:
        _check_alike(runs[name])
        what = f"runs of {task}, {cut}, {NONE} and {name}"
        first, other = runs[NONE][0].settings, runs[name][0].settings
        check_settings(first, other, _COMPRESSION, what)
    return {name: runs[name] for name in ordered}


def _check_alike(runs: list[Run]) -> None:
    """Raise `ReportError` unless runs differ in their seeds, and only there."""
    first, seeds = runs[0], Counter(run.seed for run in runs)
    what = f"runs of {first.task}, {first.cut}, {first.compressor}"
    for seed, number in seeds.items():
        if number > 1:
            raise ReportError(f"seed={seed}: {number} {what} have it")
    for run in runs:
        check_settings(first.settings, run.settings, (), what)


def check_settings(
    a: Mapping[str, Any], b: Mapping[str, Any], free: tuple[str, ...], what: str
) -> None:
    """Raise `ReportError` if settings differ in a key without one of some prefixes."""
    for key in sorted(a.keys() | b.keys()):
        values = a.get(key), b.get(key)
        if values[0] != values[1] and not key.startswith(free):
            raise ReportError(f"{what} differ in {key}: {values[0]}, {values[1]}")


def _label_bytes(nested: Mapping[str, Any]) -> int:
    return sum(phase.get("up", {}).get("label", 0) for phase in nested.values())


def rank(order: Sequence[str], name: str) -> tuple[int, str]:
    """Return the place of a name in an order; all others follow by the alphabet."""
    return (order.index(name) if name in order else len(order), name)
