"""Table 1: traffic saved until a target accuracy, beside the paper's values.

The multiplier of a compressor is the traffic of float32 until the target over the
traffic of the compressor until the target. The rounds of float32 are those of the
uncompressed runs, at whatever cut. Its bytes per round at a cut are those of the
compressor's own run: the ledger knows the float32 size of everything that was sent.
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
    compressors_of,
    display_name,
    evaluations,
    key_columns,
    key_values,
    read_cells,
)
from masksl.report.tables import (
    MISSING,
    ReportError,
    comma_separated,
    markdown,
    share,
    with_spread,
)

# By data set and cut: the paper's multipliers of QU, SP, MS, RT.
PAPER = {
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
# By data set and cut: its top-1 after the last epoch, %, of none, QU, SP, MS, RT.
PAPER_TOP1 = {
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
        Holds run folders, at any depth, some of them without compression.

    Returns
    -------
    dict[str, str]
        Text by file name.

    Raises
    ------
    ReportError
        If a run has no target; see also `masksl.report.cells.read_cells`.
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


def rounds_to_target(rows: Sequence[Mapping[str, Any]], target: float) -> float | None:
    """Return the rounds trained until the target is first reached, None if never."""
    return next((x for x, top1 in evaluations(rows) if top1 >= target), None)


def multiplier(run: Run, baseline: float, account: int) -> float | None:
    """Return the factor by which traffic is saved, None if the target is not reached.

    Parameters
    ----------
    run : Run
        A run of the compressor.
    baseline : float
        Rounds until the target without compression.
    account : int
        Index in `ACCOUNTS`.
    """
    rounds = _rounds_to_target(run)
    if rounds is None:
        return None
    return run.dense[account] * baseline / (run.sent[account] * rounds)


def _rounds_to_target(run: Run) -> float | None:
    assert run.target is not None
    return rounds_to_target(run.rows, run.target)


def _multipliers(cells: Cells) -> str:
    """Return the table in the paper's shape, once for each account."""
    compressors = [name for name in compressors_of(cells) if name != NONE]
    names = [display_name(name) for name in compressors]
    head = ["traffic", "task", "cut", *names, "the paper's QU, SP, MS, RT"]
    rows = []
    for account, title in enumerate(ACCOUNTS):
        for (task, cut), runs in cells.items():
            saved = [
                _saved(runs.get(name, []), runs[NONE], account) for name in compressors
            ]
            paper = ", ".join(PAPER.get((task.dataset, cut), ())) or MISSING
            rows.append([title, str(task), cut, *saved, paper])
    return markdown(head, rows)


def _saved(runs: Sequence[Run], baselines: Sequence[Run], account: int) -> str:
    """Return mean ± deviation of the multipliers, INF if no run reached the target.

    Each run is compared with the uncompressed run of the same seed, or with the mean of
    the uncompressed runs if that seed is missing. Runs whose uncompressed run never
    reaches the target are not counted.
    """
    if not runs:
        return MISSING
    target = runs[0].target
    assert target is not None
    by_seed = {run.seed: rounds_to_target(run.rows, target) for run in baselines}
    mean = _mean([rounds for rounds in by_seed.values() if rounds is not None])
    pairs = [(run, by_seed.get(run.seed, mean)) for run in runs]
    comparable = [(run, rounds) for run, rounds in pairs if rounds is not None]
    if not comparable:
        return "none without"
    multipliers = [multiplier(run, rounds, account) for run, rounds in comparable]
    reached = [value for value in multipliers if value is not None]
    if not reached:
        return "INF"
    return with_spread(reached, ".2f") + share(len(reached), len(runs))


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _accuracies(cells: Cells) -> str:
    """Return the accuracy after the last round, and the best one, of every cell."""
    compressors = compressors_of(cells)
    names = [display_name(name) for name in compressors]
    head = ["task", "cut", *names, "the paper's none, QU, SP, MS, RT"]
    rows = []
    for (task, cut), runs in cells.items():
        accuracies = [_accuracy(runs.get(name, [])) for name in compressors]
        values = PAPER_TOP1.get((task.dataset, cut), ())
        paper = ", ".join(f"{top1:.2f}" for top1 in values) or MISSING
        rows.append([str(task), cut, *accuracies, paper])
    return markdown(head, rows)


def _accuracy(runs: Sequence[Run]) -> str:
    if not runs:
        return MISSING
    last = with_spread([100 * run.last for run in runs], ".2f")
    return f"{last} ({fmean(100 * run.best for run in runs):.2f})"


def _figures(cells: Cells) -> str:
    """Return a CSV file: one line per run, with the values behind its multipliers."""
    kinds = ("sent", "dense")
    names = [f"{kind} bytes a round, {name}" for kind in kinds for name in ACCOUNTS]
    columns = key_columns(cells)
    lines = [_line(columns, run) for run in _runs(cells)]
    head = [*columns, "seed", "target", "rounds to target", "best", "last", *names]
    return comma_separated(head, lines)


def _line(columns: Sequence[str], run: Run) -> list[Any]:
    rounds = _rounds_to_target(run)
    key = key_values(columns, run.task, run.cut, run.compressor)
    reached = "" if rounds is None else f"{rounds:g}"
    accuracies = f"{run.best:.4f}", f"{run.last:.4f}"
    bytes_ = [f"{value:.0f}" for value in (*run.sent, *run.dense)]
    return [*key, run.seed, run.target, reached, *accuracies, *bytes_]


def _runs(cells: Cells) -> list[Run]:
    """Return every run once."""
    lists = [runs for by_name in cells.values() for runs in by_name.values()]
    return list({id(run): run for runs in lists for run in runs}.values())
