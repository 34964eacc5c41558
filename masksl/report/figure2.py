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

_PAPER_BITS = range(3, 9)
_PAPER = {  # 2-norm of the error at these; batch and cut are not stated
    "cifar10": {
        "ms": (504.4, 200.0, 90.6, 43.2, 21.0, 10.4),
        "qu": (512.7, 239.7, 115.0, 57.2, 28.3, 13.9),
        "sp": (1578, 1322, 1114, 949, 798, 663),
        "rt": (1773, 1588, 1453, 1353, 1271, 1206),
    },
    "cifar100": {
        "ms": (344.6, 136.6, 62.9, 29.7, 14.6, 7.2),
        "qu": (394.1, 185.2, 89.9, 44.0, 21.8, 10.9),
        "sp": (1021, 837, 706, 588, 487, 401),
        "rt": (1163, 1033, 952, 881, 831, 792),
    },
    "imagenet": {
        "ms": (382.9, 156.3, 71.0, 33.6, 16.5, 8.2),
        "qu": (357.6, 170.5, 79.6, 39.5, 19.3, 9.8),
        "sp": (1140, 962, 801, 659, 552, 461),
        "rt": (1297, 1178, 1074, 986, 931, 893),
    },
}


def read_measurements(folder: Path) -> list[dict[str, Any]]:
    """Return what ``bench figure2`` wrote into a folder, a network each."""
    found = [json.loads(p.read_text("utf-8")) for p in sorted(folder.glob("*.json"))]
    measured = [each for each in found if "network" in each]
    if not measured:
        raise ReportError(f"no measurements of python -m masksl.bench in {folder}")
    return measured


def figure2(folder: Path) -> dict[str, str]:
    """Return tables of error against bits, and draw them as ``figure2.png``.

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
    bits = [f"{budget} bits" for budget in budgets]
    head = ["network, data set, cut", "compressor", *bits]
    return {
        "figure2.csv": comma_separated([*columns, "bits", "error", "norm"], lines),
        "figure2.md": markdown(head, shown),
        "paper.md": markdown(
            ["network, data set, cut", "", *bits], _beside(measured, budgets)
        ),
    }


def _beside(measured: Sequence[Row], budgets: Sequence[int]) -> list[list[str]]:
    """Return the 2-norm of the error of MS and how many times larger others' are.

    The paper's follow, of the data sets that are here.
    """
    lines = []
    for each in measured:
        network = each["network"]
        norms: dict[str, dict[tuple[str, int], float]] = {}
        for row in each["rows"]:
            found = norms.setdefault(row["cut"], {})
            found[_series(row), row["budget"]] = row["norm"]
        for cut, found in norms.items():
            place = f"{network['model']}, {network['dataset']}, {cut}"
            lines += _over_ms(place, found, budgets)
    datasets = dict.fromkeys(each["network"]["dataset"] for each in measured)
    for dataset in [name for name in datasets if name in _PAPER]:
        told = {
            (method, bits): norm
            for method, row in _PAPER[dataset].items()
            for bits, norm in zip(_PAPER_BITS, row, strict=True)
        }
        lines += _over_ms(f"the paper's, {dataset}", told, budgets)
    return lines


def _over_ms(
    place: str, norms: Mapping[tuple[str, int], float], budgets: Sequence[int]
) -> list[list[str]]:
    """Return lines of MS and of what others have over it, by method and budget."""
    shown = [f"{norms['ms', budget]:.4g}" for budget in budgets]
    lines = [[place, "MS, 2-norm", *shown]]
    for method in ("qu", "sp", "rt"):
        ratios = (norms[method, budget] / norms["ms", budget] for budget in budgets)
        line = [place, f"{_NAMES[method]} / MS", *(f"{each:.2f}" for each in ratios)]
        lines.append(line)
    return lines


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
