"""Tables and figures from results alone: ``python -m masksl.report NAME FOLDER``.

``runs`` makes one line of every setting among the runs of a folder, over its seeds;
``figure2`` draws error against bits from what ``python -m masksl.bench figure2`` wrote.
Tables are Markdown and CSV, figures PNG; they go into the folder.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure

from masksl import results

Row = Mapping[str, Any]


class ReportError(ValueError):
    """A folder that does not hold what a report needs; one line says what."""


# --- tables ---------------------------------------------------------------------------


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; what follows the first column is aligned right."""
    marks = ["---", *["---:"] * (len(columns) - 1)]
    lines = [columns, marks, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def comma_separated(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return the lines of a CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


# --- runs -----------------------------------------------------------------------------

_RUNS = {  # column: figure of a run, and how it is printed
    "top-1, %": (lambda s: 100 * s["top1"], ".2f"),
    "best top-1, %": (lambda s: 100 * s["best_top1"], ".2f"),
    "bits an element": (lambda s: s["bits_per_element"], ".3f"),
    "relative error": (lambda s: s["relative_error"], ".3f"),
    "activations, MB": (lambda s: s["paper_bytes"] / 1e6, ".1f"),
    "everything, MB": (lambda s: s["bytes_total"] / 1e6, ".1f"),
}


def runs(folder: Path) -> dict[str, str]:
    """Return the tables of all finished runs below a folder, a line a setting.

    Parameters
    ----------
    folder : Path
        Runs lie in it as ``<setting>/seed=<n>``, as a sweep leaves them.

    Returns
    -------
    dict[str, str]
        Text by file name. Figures are means over seeds ± standard deviations.

    Raises
    ------
    ReportError
        If there is no finished run.
    """
    settings: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob(f"**/{results.SUMMARY}")):
        setting = path.parent.parent.relative_to(folder).as_posix()
        settings.setdefault(setting, []).append(results.read_summary(path.parent))
    if not settings:
        raise ReportError(f"no {results.SUMMARY} below {folder}")
    shown, figures = [], []
    for setting, summaries in settings.items():
        each = [[get(s) for s in summaries] for get, _ in _RUNS.values()]
        spread = [_spread(values) for values in each]
        cells = [
            f"{mean:{form}} ± {deviation:{form}}"
            for (mean, deviation), (_, form) in zip(spread, _RUNS.values(), strict=True)
        ]
        shown.append([setting.replace("|", "\\|"), str(len(summaries)), *cells])
        flat = [f"{figure:.6g}" for pair in spread for figure in pair]
        figures.append([setting, len(summaries), *flat])
    pairs = [name for column in _RUNS for name in (column, f"{column}, std")]
    return {
        "runs.md": markdown(["setting", "seeds", *_RUNS], shown),
        "runs.csv": comma_separated(["setting", "seeds", *pairs], figures),
    }


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation, 0 of a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


# --- figure 2 -------------------------------------------------------------------------

_NAMES = {
    "qu": "QU",
    "sp": "SP",
    "rt": "RT",
    "ms": "MS",
    "ms context": "MS, lossless=context",
    "qq": "QQ",
    "fp": "FP",
    "ec": "EC",
}


def read_measurements(folder: Path) -> list[dict[str, Any]]:
    """Return what ``bench figure2`` wrote into a folder, a network each."""
    found = [json.loads(p.read_text("utf-8")) for p in sorted(folder.glob("*.json"))]
    measured = [each for each in found if "network" in each]
    if not measured:
        raise ReportError(f"no measurements of python -m masksl.bench in {folder}")
    return measured


def figure2(folder: Path) -> dict[str, str]:
    """Return the table of error against bits, and draw it as ``figure2.png``.

    Parameters
    ----------
    folder : Path
        Holds JSON files of ``python -m masksl.bench figure2``.

    Returns
    -------
    dict[str, str]
        Text by file name.
    """
    measured = read_measurements(folder)
    columns = ["network", "dataset", "images", "cut", "shape", "compressor", "options"]
    lines, shown = [], []
    for each in measured:
        network = each["network"]
        place = [network["model"], network["dataset"], network["images"]]
        for row in each["rows"]:
            options = json.dumps(row["options"]).strip("{}").replace('"', "")
            figures = [f"{row[key]:.5g}" for key in ("bits", "error", "norm")]
            where = [row["cut"], row["shape"], row["compressor"], options]
            lines.append([*place, *where, *figures])
        shown += _norms(each)
    draw_figure2(measured, folder / "figure2.png")
    budgets = sorted({row["budget"] for row in measured[0]["rows"]})
    head = ["network, data set, cut", "compressor", *(f"{b} bits" for b in budgets)]
    return {
        "figure2.csv": comma_separated([*columns, "bits", "error", "norm"], lines),
        "figure2.md": markdown(head, shown),
    }


def _norms(measured: Row) -> list[list[str]]:
    """Return a line for each cut and compressor: the error at the paper's budgets."""
    network = measured["network"]
    cells: dict[tuple[str, str], list[str]] = {}
    for row in measured["rows"]:
        if "bits" in row["options"] and row["options"]["bits"] < 1:
            continue  # below what the paper's budgets reach
        name = _NAMES[_series(row)]
        place = f"{network['model']}, {network['dataset']}, {row['cut']}"
        if row["compressor"] == "ec" and row["options"]["bits"] != row["budget"]:
            continue
        cell = f"{row['error']:.4f} ({row['bits']:.2f})"
        cells.setdefault((place, name), []).append(cell)
    return [[place, name, *values] for (place, name), values in cells.items()]


def _series(row: Row) -> str:
    """Return to which line of the figure a measurement belongs."""
    staged = row["options"].get("lossless", "none") != "none"
    return f"{row['compressor']} context" if staged else row["compressor"]


def draw_figure2(measured: Sequence[Row], path: Path) -> None:
    """Draw relative error against measured bits, a row a network, a column a cut.

    Parameters
    ----------
    measured : Sequence[Mapping[str, Any]]
        What ``bench figure2`` wrote, a network each.
    path : Path
        PNG file to write.
    """
    cuts = list(dict.fromkeys(row["cut"] for row in measured[0]["rows"]))
    figure = Figure(figsize=(11, 0.8 + 3.1 * len(measured)), layout="constrained")
    grid = figure.subplots(
        len(measured), len(cuts), squeeze=False, sharex=True, sharey="row"
    )
    for line, each in zip(grid, measured, strict=True):
        for axes, cut in zip(line, cuts, strict=True):
            rows = [row for row in each["rows"] if row["cut"] == cut]
            for key, name in _NAMES.items():
                points = sorted(
                    (row["bits"], row["error"]) for row in rows if _series(row) == key
                )
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
            network = each["network"]
            title = f"{network['model']}, {network['dataset']}, {cut}"
            axes.set(title=title, yscale="log", xlim=(0, 8.3))
            axes.grid(alpha=0.3)
        line[0].set_ylabel("relative error")
    for axes in grid[-1]:
        axes.set_xlabel("measured bits an element")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(_NAMES))
    figure.savefig(path, dpi=110)


# --- command line ---------------------------------------------------------------------

REPORTS = {"runs": runs, "figure2": figure2}


def main() -> None:
    """Write the report that the command line names, and print its table."""
    parser = argparse.ArgumentParser(
        prog="python -m masksl.report", description=__doc__
    )
    parser.add_argument("report", choices=REPORTS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        if not arguments.folder.is_dir():
            raise ReportError(f"folder={str(arguments.folder)!r}: not a folder")
        texts = REPORTS[arguments.report](arguments.folder)
    except ReportError as error:
        print(f"masksl: {error}", file=sys.stderr)
        sys.exit(1)
    for name, text in texts.items():
        (arguments.folder / name).write_text(text, encoding="utf-8")
        if name.endswith(".md"):
            print(text, end="")


if __name__ == "__main__":
    main()
