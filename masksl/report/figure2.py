"""Figure 2: error against bits, from files of ``python -m masksl.bench figure2``."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from masksl.report.tables import ReportError, comma_separated, markdown
from masksl.runtime.folder import write_whole
from masksl.runtime.results import image_of

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

# Keys of the description of a network, and of each of its measurements.
_NETWORK = {"model", "dataset", "images"}
_MEASUREMENT = {
    *("cut", "shape", "compressor", "options", "budget", "bits", "error", "norm"),
}

_PAPER_BITS = range(3, 9)
# 2-norm of the error at these bits in the paper, which does not state batch and cut.
_PAPER = {
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
    """Read the files of ``python -m masksl.bench figure2`` in a folder.

    Returns
    -------
    list[dict[str, Any]]
        For each network its description, ``network``, and its measurements, ``rows``.

    Raises
    ------
    ReportError
        If there is no such file, or a JSON file is damaged.
    """
    files = [_read(path) for path in sorted(folder.glob("*.json"))]
    measured = [content for content in files if "network" in content]
    if not measured:
        raise ReportError(f"no measurements of python -m masksl.bench in {folder}")
    return measured


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON file, whose measurements are complete if it is one of them."""
    try:
        content: Any = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict) or not content:
            raise ValueError("no keys")
        if "network" in content:
            network = content["network"]
            missing = _NETWORK - network.keys()
            for row in content["rows"]:
                missing |= _MEASUREMENT - row.keys()
            if missing or not content["rows"]:
                raise ValueError(f"no {', '.join(sorted(missing or {'rows'}))}")
        return content
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ReportError(f"{path}: damaged or cut short ({reason})") from error


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

    Raises
    ------
    ReportError
        If there is no such file.
    """
    measured = read_measurements(folder)
    draw_figure2(measured, folder / "figure2.png")
    budgets = sorted({row["budget"] for row in measured[0]["rows"]})
    bits = [f"{budget} bits" for budget in budgets]
    errors = [line for each in measured for line in _errors(each)]
    norms = _norms_beside_paper(measured, budgets)
    return {
        "figure2.csv": _lines(measured),
        "figure2.md": markdown(["network, data set, cut", "compressor", *bits], errors),
        "paper.md": markdown(["network, data set, cut", "", *bits], norms),
    }


def _lines(measured: Sequence[Row]) -> str:
    """Return a CSV file with one line per measurement."""
    lines = []
    for each in measured:
        network = each["network"]
        start = [network["model"], network["dataset"], network["images"]]
        for row in each["rows"]:
            options = json.dumps(row["options"]).strip("{}").replace('"', "")
            key = [row["cut"], row["shape"], row["compressor"], options]
            values = [f"{row[name]:.5g}" for name in ("bits", "error", "norm")]
            lines.append([*start, *key, *values])
    columns = ["network", "dataset", "images", "cut", "shape", "compressor", "options"]
    return comma_separated([*columns, "bits", "error", "norm"], lines)


def _norms_beside_paper(
    measured: Sequence[Row], budgets: Sequence[int]
) -> list[list[str]]:
    """Return the 2-norm of the error of MS, and the ratios of the others to it.

    The paper's values follow, for the data sets that were measured.
    """
    lines = []
    for each in measured:
        norms: dict[str, dict[tuple[str, int], float]] = {}
        for row in each["rows"]:
            of_cut = norms.setdefault(row["cut"], {})
            of_cut[_series(row), row["budget"]] = row["norm"]
        for cut, of_cut in norms.items():
            lines += _ratios_to_ms(_title(each, cut), of_cut, budgets)
    datasets = dict.fromkeys(each["network"]["dataset"] for each in measured)
    for dataset in [name for name in datasets if name in _PAPER]:
        paper = {
            (compressor, bits): norm
            for compressor, values in _PAPER[dataset].items()
            for bits, norm in zip(_PAPER_BITS, values, strict=True)
        }
        lines += _ratios_to_ms(f"the paper's, {dataset}", paper, budgets)
    return lines


def _ratios_to_ms(
    title: str, norms: Mapping[tuple[str, int], float], budgets: Sequence[int]
) -> list[list[str]]:
    """Return a line of norms of MS, and lines of other norms divided by them.

    Parameters
    ----------
    title : str
        First cell of each line.
    norms : Mapping[tuple[str, int], float]
        2-norm of the error by compressor and budget.
    budgets : Sequence[int]
        Bits per element, one for each column.
    """
    values = [f"{norms['ms', budget]:.4g}" for budget in budgets]
    lines = [[title, "MS, 2-norm", *values]]
    for compressor in ("qu", "sp", "rt"):
        ratios = [norms[compressor, bits] / norms["ms", bits] for bits in budgets]
        name = f"{_NAMES[compressor]} / MS"
        lines.append([title, name, *(f"{ratio:.2f}" for ratio in ratios)])
    return lines


def _errors(measured: Row) -> list[list[str]]:
    """Return one line per cut and compressor: the error at the paper's budgets."""
    cells: dict[tuple[str, str], list[str]] = {}
    for row in measured["rows"]:
        if row["compressor"] == "ec" and row["options"]["bits"] != row["budget"]:
            continue  # a budget that only the figure shows
        key = _title(measured, row["cut"]), _NAMES[_series(row)]
        cells.setdefault(key, []).append(f"{row['error']:.4f} ({row['bits']:.2f})")
    return [[title, name, *values] for (title, name), values in cells.items()]


def _title(measured: Row, cut: str) -> str:
    """Return the names of network, data set and cut."""
    network = measured["network"]
    return f"{network['model']}, {network['dataset']}, {cut}"


def _series(row: Row) -> str:
    """Return the line of the figure that a measurement belongs to."""
    staged = row["options"].get("lossless", "none") != "none"
    return f"{row['compressor']} context" if staged else row["compressor"]


def draw_figure2(measured: Sequence[Row], path: Path) -> None:
    """Draw relative error against measured bits: one row per network, column per cut.

    Parameters
    ----------
    measured : Sequence[Mapping[str, Any]]
        See `read_measurements`.
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
            axes.set(title=_title(each, cut), yscale="log", xlim=(0, 8.3))
            axes.grid(alpha=0.3)
        line[0].set_ylabel("relative error")
    for axes in grid[-1]:
        axes.set_xlabel("measured bits an element")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(_NAMES))
    write_whole(path, image_of(figure, dpi=110))
