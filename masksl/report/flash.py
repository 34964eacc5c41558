"""Accuracy, densities and bytes of FLASH and its baselines, by setting and density.

The accuracy of a run is the mean of its last three tests. Tests are the rounds that are
multiples of a number, and the last round. Bytes of a client and round are all bytes of
a direction over the number of models and updates that went up. The factor is the bytes
of the dense runs of the same task, without loss, over those of the run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from masksl.report.cells import FREE, NONE, rank
from masksl.report.lines import (
    Lines,
    Run,
    T,
    cell,
    check_keys,
    check_rounds,
    differing,
    each_line,
    grouped,
    in_words,
    mean_of,
    results_of,
    task_of,
    without,
)
from masksl.report.tables import ReportError, comma_separated, markdown
from masksl.runtime import results
from masksl.runtime.folder import write_whole

METHOD = "flash"
EVERY = 5  # rounds from one test to the next
_TESTS = 3  # those that make the accuracy of a run
DENSE = "dense"  # the variant without masks
_VARIANTS = (DENSE, "nst", "pdst", "spdst", "jmwst")
_EXACT = "float32"
_UPLOADS = ("model", "update")  # kinds of which a client sends one a round
_NEEDED = (
    *("method.variant", "method.density", "method.hetero", "method.rest"),
    *("compressor.name", "model_compressor.name", "dataset.name", "dataset.partition"),
    *("model.name", "clients", "rounds", "seed"),
)
_ROUND = ("top1", "top1_union", "density", "density_masked", "overlap")
_COLUMNS = ("density", "density_masked", "overlap", "messages")
_COLORS = 10  # of a figure; they begin anew after these
# Prefixes of keys by which lines differ.
_OPTIONS = ("method.", "compressor.", "model_compressor.")

_Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Run(Run):
    """A finished run.

    Parameters
    ----------
    setting : str
        Its variant, groups of clients and coding.
    density : float
        Share of the maskable weights that a client has.
    plain : bool
        Whether it has neither masks nor loss.
    rows : Sequence[Mapping[str, Any]]
        Metrics of its rounds.
    """

    setting: str
    density: float
    plain: bool
    rows: Sequence[_Row]

    @property
    def bytes(self) -> int:
        """Bytes of both ways."""
        return sum(results.total(row["bytes"]) for row in self.rows)

    def tests(self, every: int) -> list[_Row]:
        """Return the rows of the tests."""
        last = len(self.rows)
        return [r for r in self.rows if r["round"] % every == 0 or r["round"] == last]


_Lines = Lines[_Run]
_Column = tuple[str, str, Callable[[T], float | None]]


def flash(folder: Path, every: int = EVERY, by_round: bool = False) -> dict[str, str]:
    """Return the tables of a folder of runs, and draw ``flash.png``.

    Parameters
    ----------
    folder : Path
        Holds run folders, at any depth; those of other methods are left out.
    every : int
        Rounds from one test to the next.
    by_round : bool
        Whether a second table has a line for each round.

    Returns
    -------
    dict[str, str]
        Text by file name. Values are means over seeds ± standard deviations.

    Raises
    ------
    ReportError
        If ``every`` is less than 1, there are no runs, a run lacks a needed key or a
        round, runs of one line differ in more than their seed, or those of one task in
        more than the method and the compression.
    """
    if every < 1:
        raise ReportError(f"--every {every}: must be a whole number from 1 on")
    found = results_of(folder, METHOD)
    for result in found:
        check_keys(result, _NEEDED, columns=_COLUMNS)
        check_rounds(result)
    lines = grouped(_runs(found), _rank, (*_OPTIONS, "plugins"))
    kinds = _kinds(lines)
    _draw(lines, every, folder / "flash.png")
    text = _table(lines, every)
    if by_round:
        text += "\n" + _rounds(lines, kinds)
    return {"flash.md": text, "flash.csv": _figures(lines, kinds)}


# --- runs -----------------------------------------------------------------------------


def _runs(found: Sequence[results.Result]) -> list[_Run]:
    """Return the runs, with the settings in their names in which they differ."""
    alike: dict[tuple[str, float], list[results.Result]] = {}
    for result in found:
        key = _setting(result.settings), _density(result.settings)
        alike.setdefault(key, []).append(result)
    runs = []
    for (setting, density), several in alike.items():
        named = differing((result.settings for result in several), _OPTIONS)
        for result in several:
            text = ", ".join([setting, *in_words(result.settings, named)])
            runs.append(_run_of(result, text, density))
    return runs


def _run_of(result: results.Result, setting: str, density: float) -> _Run:
    settings = result.settings
    dense = settings["method.variant"] == DENSE
    return _Run(
        task=task_of(settings),
        name=setting if dense else f"{setting}, density {density:g}",
        seed=settings["seed"],
        settings=without(settings, (*FREE, "target")),
        setting=setting,
        density=density,
        plain=dense and not _coding(settings),
        rows=result.rows,
    )


def _setting(settings: Mapping[str, Any]) -> str:
    """Return variant, groups and coding, like ``spdst, hetero, ec/qu, bfloat16``."""
    parts = [str(settings["method.variant"])]
    if str(settings["method.hetero"]) != "[]":
        parts.append("hetero")
    return ", ".join(parts + _coding(settings))


def _coding(settings: Mapping[str, Any]) -> list[str]:
    """Return the compressors up and down and the type of the rest, unless exact."""
    slots = [_slot(settings, slot) for slot in ("compressor", "model_compressor")]
    parts = [] if slots == [NONE, NONE] else ["/".join(slots)]
    rest = settings["method.rest"]
    return parts if rest == _EXACT else [*parts, rest]


def _slot(settings: Mapping[str, Any], slot: str) -> str:
    """Return the name of a compressor, for ``none`` the type if it is not exact."""
    name, values = settings[f"{slot}.name"], settings.get(f"{slot}.values", _EXACT)
    return str(values if name == NONE and values != _EXACT else name)


def _density(settings: Mapping[str, Any]) -> float:
    """Return the share of the weights that a client has."""
    dense = settings["method.variant"] == DENSE
    return 1.0 if dense else float(settings["method.density"])


def _rank(run: _Run) -> tuple[Any, ...]:
    """Return the place of a line: dense, then by density and variant."""
    variant = run.settings["method.variant"]
    return variant != DENSE, run.density, rank(_VARIANTS, variant), run.setting


# --- figures of a run -----------------------------------------------------------------


def _percent(row: _Row) -> float:
    return 100 * row["top1"]


def _percent_averaged(row: _Row) -> float | None:
    """Return the accuracy of the averaged model, None in rounds without one."""
    return 100 * row["top1_union"] if "top1_union" in row else None


def _masked(run: _Run, every: int) -> float:
    """Return the mean accuracy of the last tests."""
    return fmean(map(_percent, run.tests(every)[-_TESTS:]))


def _averaged(run: _Run, every: int) -> float | None:
    """Return the same for the averaged model, None if it is always the masked one.

    In rounds in which no mask changes both are the same.
    """
    if not any("top1_union" in row for row in run.rows):
        return None
    rows = run.tests(every)[-_TESTS:]
    return fmean(100 * row.get("top1_union", row["top1"]) for row in rows)


def _sent(row: _Row, way: str, kind: str | None = None) -> int:
    """Return the bytes of a direction, of one kind or of all."""
    ways = [phase.get(way, {}) for phase in row["bytes"].values()]
    return sum(results.total(w) if kind is None else w.get(kind, 0) for w in ways)


def _uploads(row: _Row) -> int:
    """Return how many clients sent a model or an update."""
    ways = [phase.get("up", {}) for phase in row["messages"].values()]
    return sum(way.get(kind, 0) for way in ways for kind in _UPLOADS)


def _a_client(row: _Row, way: str, kind: str) -> float:
    """Return the bytes of a kind in a round, for a client."""
    return _sent(row, way, kind) / max(1, _uploads(row))


def _in_all(run: _Run, way: str) -> float:
    """Return the bytes of a direction, for a client and round."""
    sent = sum(_sent(row, way) for row in run.rows)
    return sent / max(1, sum(map(_uploads, run.rows)))


def _kinds(lines: _Lines) -> list[tuple[str, str]]:
    """Return directions and kinds of all that was sent, up first."""
    found = {
        (way, kind)
        for *_, several in each_line(lines)
        for run in several
        for row in run.rows
        for phase in row["bytes"].values()
        for way in phase
        for kind in phase[way]
    }
    return sorted(found, key=lambda pair: (pair[0] != "up", pair))


# --- tables ---------------------------------------------------------------------------


def _table(lines: _Lines, every: int) -> str:
    """Return the table with one line per setting and density."""
    dense = {
        task: [
            run.bytes for several in by_name.values() for run in several if run.plain
        ]
        for task, by_name in lines.items()
    }

    def factor(run: _Run) -> float | None:
        return fmean(dense[run.task]) / run.bytes if dense[run.task] else None

    columns: list[_Column[_Run]] = [
        ("top-1, %", ".2f", partial(_masked, every=every)),
        ("top-1 averaged, %", ".2f", partial(_averaged, every=every)),
        ("averaged density", ".4f", lambda run: run.rows[-1]["density"]),
        ("masked density", ".4f", lambda run: run.rows[-1]["density_masked"]),
        ("overlap", ".3f", lambda run: run.rows[-1]["overlap"]),
        ("up, bytes", ",.0f", partial(_in_all, way="up")),
        ("down, bytes", ",.0f", partial(_in_all, way="down")),
        ("factor", ".1f", factor),
    ]
    head = ["task", "setting", "density", "seeds", *(name for name, *_ in columns)]
    rows = [
        _start(several) + [cell(several, form, value) for _, form, value in columns]
        for *_, several in each_line(lines)
    ]
    return markdown(head, rows)


def _start(several: Sequence[_Run]) -> list[str]:
    """Return the first cells of a line."""
    run = several[0]
    return [run.task, run.setting, f"{run.density:g}", str(len(several))]


def _rounds(lines: _Lines, kinds: Sequence[tuple[str, str]]) -> str:
    """Return the table with one line per setting, density and round."""
    columns: list[_Column[_Row]] = [
        ("top-1, %", ".2f", _percent),
        ("top-1 averaged, %", ".2f", _percent_averaged),
        ("averaged density", ".4f", lambda row: row["density"]),
        ("masked density", ".4f", lambda row: row["density_masked"]),
        ("overlap", ".3f", lambda row: row["overlap"]),
    ]
    columns += [
        (f"{way} {kind}, bytes", ",.0f", partial(_a_client, way=way, kind=kind))
        for way, kind in kinds
    ]
    head = ["task", "setting", "density", "seeds", "round"]
    rows = [
        [*_start(several), str(same[0]["round"])]
        + [cell(same, form, value) for _, form, value in columns]
        for *_, several in each_line(lines)
        for same in zip(*(run.rows for run in several), strict=True)
    ]
    return markdown([*head, *(name for name, *_ in columns)], rows)


def _figures(lines: _Lines, kinds: Sequence[tuple[str, str]]) -> str:
    """Return a CSV file: one line per round of a run, with the bytes of all clients."""
    head = ["task", "setting", "density", "seed", "round", *_ROUND, "uploads"]
    rows = [
        [task, run.setting, run.density, run.seed, row["round"]]
        + ["" if row.get(key) is None else f"{row[key]:.6g}" for key in _ROUND]
        + [_uploads(row), *(_sent(row, way, kind) for way, kind in kinds)]
        for task, _, several in each_line(lines)
        for run in several
        for row in run.rows
    ]
    return comma_separated([*head, *(f"bytes {' '.join(k)}" for k in kinds)], rows)


# --- figure ---------------------------------------------------------------------------


def _draw(lines: _Lines, every: int, path: Path) -> None:
    """Draw the accuracy of all tests over the bytes both ways, a panel a task.

    Each setting and density is one line, the mean over its seeds.
    """
    figure = Figure(figsize=(8, 4.5 * len(lines)), layout="constrained")
    panels = figure.subplots(len(lines), squeeze=False)[:, 0]
    for (task, by_name), axes in zip(lines.items(), panels, strict=True):
        for place, (name, several) in enumerate(by_name.items()):
            tops = [[*map(_percent, run.tests(every))] for run in several]
            sent = [_megabytes(run, every) for run in several]
            style = "-" if place < _COLORS else "--"
            axes.plot(mean_of(sent), mean_of(tops), f".{style}", lw=1, label=name)
        x = "MB both ways, up to the round"
        axes.set(title=task, xlabel=x, ylabel="accuracy, %", xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    write_whole(path, results.image_of(figure, dpi=110))


def _megabytes(run: _Run, every: int) -> list[float]:
    """Return what a run has sent by each of its tests."""
    sums = [*accumulate(results.total(row["bytes"]) for row in run.rows)]
    return [sums[row["round"] - 1] / 1e6 for row in run.tests(every)]
