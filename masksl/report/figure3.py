"""Figure 3: training loss and accuracy by round, for each compressor and cut."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from masksl.report.cells import (
    Cells,
    Run,
    compressors_of,
    display_name,
    key_columns,
    key_values,
    read_cells,
)
from masksl.report.tables import comma_separated, spread
from masksl.runtime.folder import write_whole
from masksl.runtime.results import image_of

Point = tuple[float, float, float]  # rounds, mean over seeds, standard deviation


def figure3(folder: Path) -> dict[str, str]:
    """Return the curves of a folder of runs, and draw them as ``figure3.png``.

    Parameters
    ----------
    folder : Path
        Holds run folders, at any depth, some of them without compression.

    Returns
    -------
    dict[str, str]
        Text by file name. A line of the CSV file is an evaluation, or the loss of a
        round.

    Raises
    ------
    ReportError
        See `masksl.report.cells.read_cells`.
    """
    cells = read_cells(folder)
    columns = key_columns(cells)
    lines: list[list[Any]] = []
    for (task, cut), by_compressor in cells.items():
        for compressor, runs in by_compressor.items():
            key = [*key_values(columns, task, cut, compressor), len(runs)]
            for kind, points in (("loss", _losses(runs)), ("top-1", _accuracies(runs))):
                for point in points:
                    lines.append([*key, kind, *(f"{value:.6g}" for value in point)])
    draw_figure3(cells, folder / "figure3.png")
    columns += ["seeds", "figure", "round", "mean", "std"]
    return {"figure3.csv": comma_separated(columns, lines)}


def draw_figure3(cells: Cells, path: Path) -> None:
    """Draw loss above accuracy: two rows of axes per task, one column per cut.

    Parameters
    ----------
    cells : Cells
        The runs.
    path : Path
        PNG file to write.
    """
    tasks = list(dict.fromkeys(task for task, _ in cells))
    cuts = list(dict.fromkeys(cut for _, cut in cells))
    colors = {name: f"C{i}" for i, name in enumerate(compressors_of(cells))}
    figure = Figure(
        figsize=(0.8 + 3.4 * len(cuts), 0.8 + 5.2 * len(tasks)), layout="constrained"
    )
    grid = figure.subplots(2 * len(tasks), len(cuts), squeeze=False, sharey="row")
    for (task, cut), by_compressor in cells.items():
        row, column = 2 * tasks.index(task), cuts.index(cut)
        above, below = grid[row][column], grid[row + 1][column]
        for compressor, runs in by_compressor.items():
            _draw(above, _losses(runs), colors[compressor])
            _draw(below, _accuracies(runs), colors[compressor])
        above.set(title=f"{task}\n{cut}", yscale="log")
        above.yaxis.set_major_formatter("{x:g}")
        above.yaxis.set_minor_formatter("{x:g}")
        below.set(xlabel="round")
    for row, kind in enumerate(("training loss", "top-1, %") * len(tasks)):
        grid[row][0].set_ylabel(kind)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    handles = [
        Line2D([], [], color=color, label=display_name(compressor))
        for compressor, color in colors.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    write_whole(path, image_of(figure, dpi=110))


def _draw(axes: Axes, points: Sequence[Point], color: str) -> None:
    """Draw the mean over seeds, and a band of one standard deviation around it."""
    rounds = [x for x, _, _ in points]
    means = [mean for _, mean, _ in points]
    axes.plot(rounds, means, color=color, linewidth=1.2)
    low = [mean - deviation for _, mean, deviation in points]
    high = [mean + deviation for _, mean, deviation in points]
    axes.fill_between(rounds, low, high, color=color, alpha=0.15, linewidth=0)


def _losses(runs: Sequence[Run]) -> list[Point]:
    """Return the loss of every round in which clients of every run took part."""
    curves = [[(row["round"], row["loss"]) for row in run.rows] for run in runs]
    return _over_seeds(
        [[(x, loss) for x, loss in curve if loss is not None] for curve in curves]
    )


def _accuracies(runs: Sequence[Run]) -> list[Point]:
    curves = [run.evaluations for run in runs]
    return _over_seeds([[(x, 100 * top1) for x, top1 in curve] for curve in curves])


def _over_seeds(curves: Sequence[Sequence[tuple[float, float]]]) -> list[Point]:
    """Return mean and deviation by round, for rounds in which all curves have a
    value."""
    by_round: dict[float, list[float]] = {}
    for curve in curves:
        for x, value in curve:
            by_round.setdefault(x, []).append(value)
    complete = {x: v for x, v in sorted(by_round.items()) if len(v) == len(curves)}
    return [(x, *spread(values)) for x, values in complete.items()]
