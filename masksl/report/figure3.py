"""Figure 3: training loss and accuracy by round, of every method at every cut."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from masksl.report.cells import Cells, Run, methods_of, read_cells, shown
from masksl.report.tables import comma_separated, spread

Point = tuple[float, float, float]  # rounds, mean over seeds, standard deviation


def figure3(folder: Path) -> dict[str, str]:
    """Return the curves of a folder of runs, and draw them as ``figure3.png``.

    Parameters
    ----------
    folder : Path
        Holds run folders, at any depth; runs without compression among them.

    Returns
    -------
    dict[str, str]
        Text by file name. A line is a round, or a part of one that was evaluated.

    Raises
    ------
    ReportError
        If there are no runs, or none without compression.
    """
    cells = read_cells(folder)
    place = ["dataset", "model", "clients", "cut", "method", "seeds"]
    lines: list[list[Any]] = []
    for (task, cut), found in cells.items():
        for method, runs in found.items():
            where = [task.dataset, task.model, task.clients, cut, method, len(runs)]
            for kind, points in (("loss", _losses(runs)), ("top-1", _accuracies(runs))):
                for point in points:
                    figures = [f"{figure:.6g}" for figure in point]
                    lines.append([*where, kind, *figures])
    draw_figure3(cells, folder / "figure3.png")
    head = [*place, "figure", "round", "mean", "std"]
    return {"figure3.csv": comma_separated(head, lines)}


def draw_figure3(cells: Cells, path: Path) -> None:
    """Draw loss above accuracy, a pair of rows a task, a column a cut.

    Parameters
    ----------
    cells : Cells
        The runs.
    path : Path
        PNG file to write.
    """
    tasks = list(dict.fromkeys(task for task, _ in cells))
    cuts = list(dict.fromkeys(cut for _, cut in cells))
    colors = {method: f"C{i}" for i, method in enumerate(methods_of(cells))}
    figure = Figure(
        figsize=(0.8 + 3.4 * len(cuts), 0.8 + 5.2 * len(tasks)), layout="constrained"
    )
    grid = figure.subplots(2 * len(tasks), len(cuts), squeeze=False, sharey="row")
    for (task, cut), found in cells.items():
        row, column = 2 * tasks.index(task), cuts.index(cut)
        above, below = grid[row][column], grid[row + 1][column]
        for method, runs in found.items():
            _draw(above, _losses(runs), colors[method])
            _draw(below, _accuracies(runs), colors[method])
        above.set(title=f"{task}\n{cut}", yscale="log")
        above.yaxis.set_major_formatter("{x:g}")
        above.yaxis.set_minor_formatter("{x:g}")
        below.set(xlabel="round")
    for row, kind in enumerate(("training loss", "top-1, %") * len(tasks)):
        grid[row][0].set_ylabel(kind)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    handles = [
        Line2D([], [], color=color, label=shown(method))
        for method, color in colors.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.savefig(path, dpi=110)


def _draw(axes: Axes, points: Sequence[Point], color: str) -> None:
    """Draw the mean over seeds, and a band of a standard deviation around it."""
    rounds = [at for at, _, _ in points]
    means = [mean for _, mean, _ in points]
    axes.plot(rounds, means, color=color, linewidth=1.2)
    low = [mean - deviation for _, mean, deviation in points]
    high = [mean + deviation for _, mean, deviation in points]
    axes.fill_between(rounds, low, high, color=color, alpha=0.15, linewidth=0)


def _losses(runs: Sequence[Run]) -> list[Point]:
    return _over_seeds([[(row["round"], row["loss"]) for row in r.rows] for r in runs])


def _accuracies(runs: Sequence[Run]) -> list[Point]:
    curves = [run.evaluations for run in runs]
    return _over_seeds([[(at, 100 * top1) for at, top1 in curve] for curve in curves])


def _over_seeds(curves: Sequence[Sequence[tuple[float, float]]]) -> list[Point]:
    """Return mean and deviation where all curves have a value, by round."""
    by_round: dict[float, list[float]] = {}
    for curve in curves:
        for at, value in curve:
            by_round.setdefault(at, []).append(value)
    whole = {at: v for at, v in sorted(by_round.items()) if len(v) == len(curves)}
    return [(at, *spread(values)) for at, values in whole.items()]
