"""Uploads and bytes of SASG and its baselines, up to the target and in all.

One upload is one worker's, once. A target is reached by the first evaluation that
exceeds it, compared by the number of images that are right. Two accounts are those of
the paper's authors, who count values, or values and positions of 32 bits each, and
nothing that comes down; the others are lengths of what was sent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from masksl.report.cells import FREE, display_name
from masksl.report.lines import (
    Lines,
    Run,
    check_keys,
    each_line,
    grouped,
    results_of,
    without,
)
from masksl.report.tables import (
    MISSING,
    comma_separated,
    markdown,
    share,
    spread,
    with_spread,
)
from masksl.runtime import results
from masksl.runtime.folder import write_whole

METHOD = "sasg"
# By upload and whether workers skip.
NAMES = {
    ("dense", False): "SGD",
    ("sparse", False): "Sparse",
    ("dense", True): "LASG",
    ("sparse", True): "SASG",
}
_NEEDED = (
    *("method.name", "method.upload", "method.adaptive", "method.down"),
    *("method.target_metric", "dataset.name", "model.name", "clients", "seed"),
    *("compressor.name", "target"),
)
_METHOD = ("method.", "compressor.", "plugins")


class Point(NamedTuple):
    """An evaluation, and what was sent before it.

    Parameters
    ----------
    iterations, uploads, values : int
        Iterations; uploads of all workers, and the values in them.
    up, down : int
        Bytes sent.
    metric : float
        The accuracy that the target is about, a fraction.
    """

    iterations: int
    uploads: int
    values: int
    up: int
    down: int
    metric: float


@dataclass(frozen=True)
class _Run(Run):
    """A finished run.

    Parameters
    ----------
    target : float
        The accuracy to exceed, a fraction.
    elements : int
        Elements of the network.
    rows : Sequence[Mapping[str, Any]]
        Metrics of its rounds.
    points : list[Point]
        All evaluations.
    """

    target: float
    elements: int
    rows: Sequence[Mapping[str, Any]]
    points: list[Point]

    @property
    def reached(self) -> Point | None:
        """The first evaluation that exceeds the target, None if there is none."""
        above = (point for point in self.points if point.metric > self.target)
        return next(above, None)

    def values_only(self, point: Point) -> int:
        """Bytes of the values of all uploads before an evaluation."""
        return 4 * point.values

    def with_positions(self, point: Point) -> int:
        """Bytes of values, and of positions where uploads are sparse."""
        sparse = point.values < point.uploads * self.elements
        return self.values_only(point) * (2 if sparse else 1)


_Lines = Lines[_Run]


def uploads(folder: Path) -> dict[str, str]:
    """Return the tables of a folder of runs, and draw ``uploads.png``.

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
        If there are no runs, a run lacks a needed key, runs of one line differ in more
        than their seed, or those of one task in more than the method.
    """
    lines = _read(folder)
    _draw(lines, folder / "uploads.png")
    return {
        "uploads.md": _table(lines),
        "skips.md": _skips(lines),
        "uploads.csv": _figures(lines),
    }


def _read(folder: Path) -> _Lines:
    """Return the runs by task and name, in the order of the table."""
    runs = map(_run_of, results_of(folder, METHOD))
    return grouped(runs, _rank, _METHOD)


def _rank(run: _Run) -> tuple[int, str]:
    names = list(NAMES.values())
    return names.index(run.name.split(",")[0]), run.name


def _run_of(result: results.Result) -> _Run:
    settings, summary = result.settings, result.summary
    check_keys(result, _NEEDED, ["elements"])
    workers, network = settings["clients"], results.network_name(settings)
    return _Run(
        task=f"{network}, {settings['dataset.name']}, {workers} workers",
        name=_name(settings),
        seed=settings["seed"],
        target=float(settings["target"]),
        elements=summary["elements"],
        rows=result.rows,
        points=_points(result.rows, settings["method.target_metric"]),
        settings=without(settings, FREE),
    )


def _name(settings: Mapping[str, Any]) -> str:
    """Return the name of a line: method, compressor with its shares, way down."""
    upload = settings["method.upload"]
    name = NAMES[upload, settings["method.adaptive"]]
    if upload == "dense":
        return name
    parts = [name, display_name(settings["compressor.name"])]
    if "compressor.sparsity" in settings:
        kept = 1 - Fraction(str(settings["compressor.sparsity"]))
        parts[-1] += f" {100 * float(kept):g} %"
    if "compressor.magnitudes" in settings:
        parts[-1] += f" × {settings['compressor.magnitudes']}"
    down = settings["method.down"]
    return ", ".join([*parts, "relay" if down == "auto" else down])


def _points(rows: Sequence[Mapping[str, Any]], metric: str) -> list[Point]:
    """Return all evaluations of a run."""
    points, before = [], Point(0, 0, 0, 0, 0, 0.0)
    for row in rows:
        for check in row["checks"]:
            points.append(
                Point(
                    before.iterations + check["step"],
                    before.uploads + check["uploads"],
                    before.values + check["values"],
                    before.up + check["bytes_up"],
                    before.down + check["bytes_down"],
                    check[metric],
                )
            )
        ways = {
            way: sum(
                results.total(phase.get(way, {})) for phase in row["bytes"].values()
            )
            for way in ("up", "down")
        }
        before = Point(
            before.iterations + row["steps"],
            before.uploads + row["uploads"],
            before.values + row["values"],
            before.up + ways["up"],
            before.down + ways["down"],
            row[metric],
        )
        points.append(before)
    return points


# --- tables ---------------------------------------------------------------------------

Amount = Callable[[_Run, Point], float]
_AMOUNTS: list[tuple[str, str, Amount]] = [
    ("iterations", ",.0f", lambda run, point: point.iterations),
    ("uploads", ",.0f", lambda run, point: point.uploads),
    ("values, MB", ",.2f", lambda run, point: run.values_only(point) / 1e6),
    (
        "values and positions, MB",
        ",.2f",
        lambda run, point: run.with_positions(point) / 1e6,
    ),
    ("up, MB", ",.2f", lambda run, point: point.up / 1e6),
    ("both ways, MB", ",.2f", lambda run, point: (point.up + point.down) / 1e6),
]


def _table(lines: _Lines) -> str:
    """Return the table: amounts up to the target, then those of whole runs."""
    head = ["task", "method", "seeds", "best, %", "up to"]
    head += [name for name, _, _ in _AMOUNTS]
    rows = []
    for task, name, several in each_line(lines):
        best = [100 * max(point.metric for point in run.points) for run in several]
        start = [task, name, str(len(several)), with_spread(best, ".2f")]
        found = [(run, run.reached) for run in several]
        reached = [(run, point) for run, point in found if point is not None]
        target = f"> {100 * several[0].target:g} %"
        of = share(len(reached), len(several))
        rows.append([*start, target + of, *_cells(reached)])
        ends = [(run, run.points[-1]) for run in several]
        rows.append([*start, "the end", *_cells(ends)])
    return markdown(head, rows)


def _cells(found: Sequence[tuple[_Run, Point]]) -> list[str]:
    if not found:
        return [MISSING] * len(_AMOUNTS)
    return [
        with_spread([amount(run, point) for run, point in found], form)
        for _, form, amount in _AMOUNTS
    ]


def _skips(lines: _Lines) -> str:
    """Return the table of the mean share of skipped uploads by round."""
    most = max(len(run.rows) for *_, several in each_line(lines) for run in several)
    head = ["task", "method", *(f"{number}" for number in range(1, most + 1))]
    rows = []
    for task, name, several in each_line(lines):
        if not any(row["skips"] for run in several for row in run.rows):
            continue
        row = [task, name]
        for i in range(most):
            shares = [
                100 * run.rows[i]["skips"] / _asked(run.rows[i])
                for run in several
                if i < len(run.rows)
            ]
            row.append(f"{spread(shares)[0]:.0f}" if shares else MISSING)
        rows.append(row)
    return markdown(head, rows)


def _asked(row: Mapping[str, Any]) -> int:
    return int(row["uploads"] + row["skips"])


def _figures(lines: _Lines) -> str:
    """Return a CSV file: one line per evaluation."""
    head = ["task", "method", "seed", "iterations", "uploads", "values", "bytes up"]
    head += ["bytes down", "accuracy"]
    rows = [
        [task, name, run.seed, p.iterations, p.uploads, p.values]
        + [p.up, p.down, f"{p.metric:.4f}"]
        for task, name, several in each_line(lines)
        for run in several
        for p in run.points
    ]
    return comma_separated(head, rows)


# --- figure ---------------------------------------------------------------------------


def _draw(lines: _Lines, path: Path) -> None:
    """Draw loss above accuracy, over uploads and over bytes both ways.

    Every run is a line, all of one method in one colour.
    """
    figure = Figure(figsize=(9, 5.6 * len(lines)), layout="constrained")
    grid = figure.subplots(2 * len(lines), 2, squeeze=False)
    for i, (task, by_name) in enumerate(lines.items()):
        axes = grid[2 * i : 2 * i + 2]
        for color, (name, several) in enumerate(by_name.items()):
            for number, run in enumerate(several):
                style: dict[str, Any] = {"color": f"C{color}", "linewidth": 1}
                style["label"] = None if number else name
                ends = _ends(run)
                losses = [row["loss"] for row in run.rows]
                tops = [100 * point.metric for point in run.points]
                for column, amount in enumerate((_uploads, _bytes)):
                    axes[0][column].plot([*map(amount, ends)], losses, **style)
                    axes[1][column].plot([*map(amount, run.points)], tops, **style)
        for column, text in enumerate(("uploads", "MB both ways")):
            axes[0][column].set(title=task, yscale="log", ylabel="training loss")
            axes[1][column].set(xlabel=text, ylabel="accuracy, %")
        axes[1][0].legend()
    for each in grid.flat:
        each.grid(alpha=0.3)
        each.set_xscale("log")
        for axis in (each.xaxis, each.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    write_whole(path, results.image_of(figure, dpi=110))


def _ends(run: _Run) -> list[Point]:
    """Return the evaluations at the ends of rounds."""
    steps = [row["steps"] for row in run.rows]
    ends = {sum(steps[: i + 1]) for i in range(len(steps))}
    return [point for point in run.points if point.iterations in ends]


def _uploads(point: Point) -> float:
    return float(point.uploads)


def _bytes(point: Point) -> float:
    return (point.up + point.down) / 1e6
