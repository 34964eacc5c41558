"""Figure 2: error against bits, of what ``python -m masksl.bench figure2`` wrote."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from masksl.report.tables import ReportError, comma_separated, markdown

Row = Mapping[str, Any]

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
        name = _NAMES[_series(row)]
        place = f"{network['model']}, {network['dataset']}, {row['cut']}"
        if row["compressor"] == "ec" and row["options"]["bits"] != row["budget"]:
            continue  # a budget of the figure alone
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
