"""Table 1: traffic saved until a target accuracy, ours beside the paper's.

The multiplier of a method is the traffic that sending everything in float32 takes until
the target over the method's own. Progress to the target is that of the runs without
compression, at whatever cut; what a round of these would send at the cut follows from
the method's ledger, which knows the float32 size of all that it sent.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from masksl.report.cells import (
    ACCOUNTS,
    NONE,
    Cells,
    Run,
    evaluations,
    methods_of,
    read_cells,
    shown,
)
from masksl.report.tables import ReportError, comma_separated, markdown, with_spread

NOT_RUN = "–"
PAPER = {  # data set, cut: multipliers of QU, SP, MS, RT
    ("cifar10", "shallow"): ("INF", "INF", "13.11", "INF"),
    ("cifar10", "medium"): ("9.92", "13.56", "13.56", "13.71"),
    ("cifar10", "deep"): ("10.37", "13.56", "13.63", "13.71"),
    ("cifar100", "shallow"): ("INF", "INF", "12.53", "INF"),
    ("cifar100", "medium"): ("INF", "INF", "13.50", "INF"),
    ("cifar100", "deep"): ("INF", "INF", "12.29", "INF"),
    ("imagenet", "shallow"): ("INF", "INF", "INF", "INF"),
    ("imagenet", "medium"): ("INF", "INF", "13.20", "INF"),
    ("imagenet", "deep"): ("INF", "INF", "12.32", "INF"),
}
PAPER_TOP1 = {  # likewise top-1 after the last epoch, %, of none, QU, SP, MS, RT
    ("cifar10", "shallow"): (93.90, 88.69, 91.32, 93.51, 90.76),
    ("cifar10", "medium"): (93.90, 93.39, 93.67, 93.78, 93.37),
    ("cifar10", "deep"): (93.90, 93.65, 93.60, 93.70, 93.55),
    ("cifar100", "shallow"): (77.78, 62.80, 75.78, 77.24, 74.21),
    ("cifar100", "medium"): (77.78, 75.19, 76.30, 77.76, 74.55),
    ("cifar100", "deep"): (77.78, 76.54, 75.48, 77.18, 75.12),
    ("imagenet", "shallow"): (73.15, 66.39, 69.01, 72.40, 71.15),
    ("imagenet", "medium"): (73.15, 66.34, 71.20, 73.09, 71.67),
    ("imagenet", "deep"): (73.15, 70.05, 70.69, 73.07, 71.67),
}


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
        If there are no runs, none without compression, or no target.
    """
    cells = read_cells(folder)
    for run in _runs(cells):
        if run.target is None:
            raise ReportError(f"target=null: a run of {run.task} counts up to none")
    return {
        "table1.md": _multipliers(cells),
        "table1.csv": _figures(cells),
        "accuracy.md": _accuracies(cells),
    }


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
    rounds = _progress(run)
    if rounds is None:
        return None
    return run.dense[account] * baseline / (run.sent[account] * rounds)


def _progress(run: Run) -> float | None:
    assert run.target is not None
    return progress(run.rows, run.target)


def _multipliers(cells: Cells) -> str:
    """Return the table in the paper's shape, an account after the other."""
    methods = [method for method in methods_of(cells) if method != NONE]
    names = [shown(method) for method in methods]
    head = ["traffic", "task", "cut", *names, "the paper's QU, SP, MS, RT"]
    rows = []
    for account, name in enumerate(ACCOUNTS):
        for (task, cut), found in cells.items():
            saved = [_cell(found.get(method, []), found, account) for method in methods]
            paper = ", ".join(PAPER.get((task.dataset, cut), ())) or NOT_RUN
            rows.append([name, str(task), cut, *saved, paper])
    return markdown(head, rows)


def _cell(runs: Sequence[Run], beside: Mapping[str, list[Run]], account: int) -> str:
    """Return mean ± deviation of those that reached the target, INF if none did.

    A run counts against that without compression of its seed, where there is none
    against their mean. Where that never reaches the target there is nothing to count.
    """
    if not runs:
        return NOT_RUN
    target = runs[0].target
    assert target is not None
    by_seed = {run.seed: progress(run.rows, target) for run in beside[NONE]}
    mean = _mean([rounds for rounds in by_seed.values() if rounds is not None])
    pairs = [(run, by_seed.get(run.seed, mean)) for run in runs]
    against = [(run, rounds) for run, rounds in pairs if rounds is not None]
    if not against:
        return "none without"
    saved = [multiplier(run, rounds, account) for run, rounds in against]
    found = [figure for figure in saved if figure is not None]
    if not found:
        return "INF"
    return with_spread(found, ".2f") + _part(len(found), len(runs))


def _part(found: int, of: int) -> str:
    """Return how many of the runs a figure is about, where these are not all."""
    return "" if found == of else f" ({found} of {of})"


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _accuracies(cells: Cells) -> str:
    """Return accuracy after the last epoch, and the best one, of every cell."""
    methods = methods_of(cells)
    names = [shown(method) for method in methods]
    head = ["task", "cut", *names, "the paper's none, QU, SP, MS, RT"]
    rows = []
    for (task, cut), found in cells.items():
        figures = [_accuracy(found.get(method, [])) for method in methods]
        paper = PAPER_TOP1.get((task.dataset, cut), ())
        told = ", ".join(f"{top1:.2f}" for top1 in paper) or NOT_RUN
        rows.append([str(task), cut, *figures, told])
    return markdown(head, rows)


def _accuracy(runs: Sequence[Run]) -> str:
    if not runs:
        return NOT_RUN
    last = with_spread([100 * run.last for run in runs], ".2f")
    return f"{last} ({fmean(100 * run.best for run in runs):.2f})"


def _figures(cells: Cells) -> str:
    """Return a line a run, with what its multipliers come from."""
    kinds = ("sent", "dense")
    names = [f"{kind} bytes a round, {name}" for kind in kinds for name in ACCOUNTS]
    place = ["dataset", "model", "clients", "cut", "method", "seed"]
    head = [*place, "target", "rounds to target", "best", "last", *names]
    return comma_separated(head, [_line(run) for run in _runs(cells)])


def _line(run: Run) -> list[Any]:
    task, rounds = run.task, _progress(run)
    reached = "" if rounds is None else f"{rounds:g}"
    figures = [f"{figure:.0f}" for figure in (*run.sent, *run.dense)]
    place = task.dataset, task.model, task.clients, run.cut, run.method, run.seed
    return [*place, run.target, reached, f"{run.best:.4f}", f"{run.last:.4f}", *figures]


def _runs(cells: Cells) -> list[Run]:
    """Return every run once."""
    lists = [runs for found in cells.values() for runs in found.values()]
    return list({id(run): run for runs in lists for run in runs}.values())
