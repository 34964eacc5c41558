"""Table 1: traffic saved until a target accuracy, ours beside the paper's.

The multiplier of a method is the traffic that sending everything in float32 takes until
the target over the method's own. Progress to the target is that of the runs without
compression, at whatever cut; what a round of these would send at the cut follows from
the method's ledger, which knows the float32 size of all that it sent.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from masksl import results
from masksl.report.tables import ReportError, comma_separated, markdown, spread

METHODS = {
    "qu": "QU",
    "sp": "SP",
    "ms": "MS",
    "rt": "RT",
    "ms+lossless": "MS, lossless",
    "ec": "EC",
}
CUTS = ("shallow", "medium", "deep")
PAPER = {
    "cifar10": {
        "shallow": {"qu": "INF", "sp": "INF", "ms": "13.11", "rt": "INF"},
        "medium": {"qu": "9.92", "sp": "13.56", "ms": "13.56", "rt": "13.71"},
        "deep": {"qu": "10.37", "sp": "13.56", "ms": "13.63", "rt": "13.71"},
    },
    "cifar100": {
        "shallow": {"qu": "INF", "sp": "INF", "ms": "12.53", "rt": "INF"},
        "medium": {"qu": "INF", "sp": "INF", "ms": "13.50", "rt": "INF"},
        "deep": {"qu": "INF", "sp": "INF", "ms": "12.29", "rt": "INF"},
    },
    "imagenet": {
        "shallow": {"qu": "INF", "sp": "INF", "ms": "INF", "rt": "INF"},
        "medium": {"qu": "INF", "sp": "INF", "ms": "13.20", "rt": "INF"},
        "deep": {"qu": "INF", "sp": "INF", "ms": "12.32", "rt": "INF"},
    },
}


@dataclass(frozen=True)
class Run:
    """What the table needs of a finished run.

    Parameters
    ----------
    dataset, cut, method : str
        Of its configuration; the method is the compressor's name, ``ms+lossless`` with
        a lossless stage.
    seed : int
        Its seed.
    progress : float | None
        Rounds until the target, None where it was not reached.
    best, last : float
        Top-1 accuracies over all rounds and after the last one, fractions.
    sent : tuple[float, ...]
        Bytes a round by the three accounts: activations; with labels; everything.
    dense : tuple[float, ...]
        Bytes of the same tensors in float32.
    """

    dataset: str
    cut: str
    method: str
    seed: int
    progress: float | None
    best: float
    last: float
    sent: tuple[float, ...]
    dense: tuple[float, ...]


ACCOUNTS = ("activations", "with labels", "everything")


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
    return Run(
        settings["dataset.name"],
        str(settings["cut"]),
        f"{name}+lossless" if staged else name,
        settings["seed"],
        progress(rows, _target(settings)),
        max(top1 for _, top1 in evaluations(rows)),
        rows[-1]["top1"],
        tuple(figure / len(rows) for figure in sent),
        tuple(figure / len(rows) for figure in whole),
    )


def _target(settings: Mapping[str, Any]) -> float:
    target = settings.get("target")
    if not isinstance(target, float):
        raise ReportError(f"target={target!r}: must be a top-1 accuracy for this table")
    return target


def _labels(nested: Mapping[str, Any]) -> int:
    return sum(phase.get("up", {}).get("label", 0) for phase in nested.values())


def evaluations(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return every evaluation: rounds trained until then, and top-1 accuracy."""
    found = []
    for row in rows:
        before = row["round"] - 1
        found += [(before + c["step"] / row["steps"], c["top1"]) for c in row["checks"]]
        found.append((row["round"], row["top1"]))
    return found


def progress(rows: Sequence[Mapping[str, Any]], target: float) -> float | None:
    """Return after how many rounds the target is first reached, None if never."""
    return next((at for at, top1 in evaluations(rows) if top1 >= target), None)


def multiplier(run: Run, baseline: float, account: int) -> float | None:
    """Return how many times the traffic is smaller, None where it is never enough.

    Parameters
    ----------
    run : Run
        A run of the method.
    baseline : float
        Rounds until the target without compression.
    account : int
        Index in `ACCOUNTS`.
    """
    if run.progress is None:
        return None
    return run.dense[account] * baseline / (run.sent[account] * run.progress)


def table1(folder: Path) -> dict[str, str]:
    """Return the tables of a folder of runs.

    Parameters
    ----------
    folder : Path
        Holds run folders, at any depth; runs without compression among them.

    Returns
    -------
    dict[str, str]
        Text by file name.

    Raises
    ------
    ReportError
        If there are no runs, or none without compression.
    """
    paths = sorted(folder.glob(f"**/{results.SUMMARY}"))
    runs = [read_run(path.parent) for path in paths]
    if not runs:
        raise ReportError(f"no {results.SUMMARY} below {folder}")
    cells: dict[tuple[str, str], dict[str, list[Run]]] = defaultdict(dict)
    baselines: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.method == "none":
            baselines[run.dataset].append(run)
        else:
            cells[run.dataset, run.cut].setdefault(run.method, []).append(run)
    for dataset, _ in cells:
        if dataset not in baselines:
            raise ReportError(f"no run of {dataset} without compression in {folder}")
    order = sorted(cells, key=lambda place: (place[0], _rank(place[1])))
    places = {place: cells[place] for place in order}
    return {
        "table1.md": _multipliers(places, baselines),
        "table1.csv": _figures(places, baselines),
        "accuracy.md": _accuracies(places, baselines),
    }


def _rank(cut: str) -> tuple[int, str]:
    return (CUTS.index(cut) if cut in CUTS else len(CUTS), cut)


Places = Mapping[tuple[str, str], Mapping[str, list[Run]]]
Baselines = Mapping[str, list[Run]]


def _saved(found: list[Run], baselines: list[Run], account: int) -> list[float | None]:
    """Return the multiplier of every run, against the baseline of its seed."""
    by_seed = {run.seed: run.progress for run in baselines}
    reached = [rounds for rounds in by_seed.values() if rounds is not None]
    saved = []
    for run in found:
        rounds = by_seed.get(run.seed, fmean(reached) if reached else None)
        saved.append(None if rounds is None else multiplier(run, rounds, account))
    return saved


def _cell(saved: Sequence[float | None]) -> str:
    """Return mean ± deviation of those that reached the target, INF if none did."""
    reached = [figure for figure in saved if figure is not None]
    if not reached:
        return "INF"
    mean, deviation = spread(reached)
    part = "" if len(reached) == len(saved) else f" ({len(reached)} of {len(saved)})"
    return f"{mean:.2f} ± {deviation:.2f}{part}"


def _multipliers(places: Places, baselines: Baselines) -> str:
    """Return the table in the paper's shape, an account after the other."""
    methods = _present(places)
    head = ["traffic, data set, cut", *(METHODS[m] for m in methods), "the paper's"]
    rows = []
    for account, name in enumerate(ACCOUNTS):
        for (dataset, cut), found in places.items():
            cells = [
                (
                    _cell(_saved(found[method], baselines[dataset], account))
                    if method in found
                    else "–"
                )
                for method in methods
            ]
            rows.append([f"{name}, {dataset}, {cut}", *cells, _paper(dataset, cut)])
    return markdown(head, rows)


def _paper(dataset: str, cut: str) -> str:
    figures = PAPER.get(dataset, {}).get(cut, {})
    return ", ".join(f"{METHODS[m]} {figure}" for m, figure in figures.items()) or "–"


def _present(places: Places) -> list[str]:
    there = {method for found in places.values() for method in found}
    return [method for method in METHODS if method in there]


def _accuracies(places: Places, baselines: Baselines) -> str:
    """Return best and last accuracy of every cell."""
    methods = _present(places)
    head = ["data set, cut", "none", *(METHODS[m] for m in methods)]
    rows = []
    for (dataset, cut), found in places.items():
        columns = [baselines[dataset], *(found.get(method, []) for method in methods)]
        cells = [_accuracy(runs) for runs in columns]
        rows.append([f"{dataset}, {cut}", *cells])
    return markdown(head, rows)


def _accuracy(runs: Sequence[Run]) -> str:
    if not runs:
        return "–"
    get: tuple[Callable[[Run], float], ...] = (lambda r: r.last, lambda r: r.best)
    last, best = (spread([100 * figure(run) for run in runs]) for figure in get)
    return f"{last[0]:.2f} ± {last[1]:.2f} ({best[0]:.2f})"


def _figures(places: Places, baselines: Baselines) -> str:
    """Return a line a run, with what its multipliers come from."""
    kinds = ("sent", "dense")
    names = [f"{kind} bytes a round, {name}" for kind in kinds for name in ACCOUNTS]
    head = ["dataset", "cut", "method", "seed", "rounds to target", "best", "last"]
    rows: list[list[Any]] = []
    for dataset in dict.fromkeys(dataset for dataset, _ in places):
        rows += [_line(run) for run in baselines[dataset]]
    for found in places.values():
        rows += [_line(run) for runs in found.values() for run in runs]
    return comma_separated([*head, *names], rows)


def _line(run: Run) -> list[Any]:
    reached = "" if run.progress is None else f"{run.progress:g}"
    figures = [f"{figure:.0f}" for figure in (*run.sent, *run.dense)]
    accuracy = f"{run.best:.4f}", f"{run.last:.4f}"
    return [run.dataset, run.cut, run.method, run.seed, reached, *accuracy, *figures]
