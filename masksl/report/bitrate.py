"""Accuracy of FedPM and of federated averaging against bits a weight.

One rule counts the bits a weight of both methods. The bits of a round are those of all
training messages of one direction. They are divided by the number of weights, and by
the number of clients that sent a mask, a model or an update up. Sums add the figures of
the rounds. The server scores the test set, so evaluation sends nothing. The formula is
the figure of FedPM's authors, the entropy of a mask.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from masksl.report.cells import FREE, NONE, rank
from masksl.report.lines import (
    Lines,
    Run,
    cell,
    check_keys,
    check_rounds,
    differing,
    each_line,
    grouped,
    in_words,
    mean_of,
    task_of,
    without,
)
from masksl.report.tables import ReportError, comma_separated, markdown
from masksl.runtime import results
from masksl.runtime.folder import write_whole

ROUNDS = (1, 4, 8, 16)  # those of the tables, beside the last
FEDPM, FEDAVG = "fedpm", "fedavg"
# By method, what a client sends up once a round.
KINDS = {FEDPM: ("mask",), FEDAVG: ("model", "update")}
_LAST = 0  # the number by which the last round is found
_CODES = ("global", "layer", "theta", "dither")
# Keys that a run must have, by method.
_SETTINGS = {
    FEDPM: ("method.code",),
    FEDAVG: ("method.evaluate", "compressor.name", "model_compressor.name"),
}
_COMMON = (
    *("dataset.name", "dataset.partition", "model.name", "clients", "rounds", "seed"),
)
_SUMMARY = {FEDPM: ("elements", "model_bytes"), FEDAVG: ()}
_COLUMNS = {
    FEDPM: ("messages", "bits_formula", "top1_drawn", "top1_mean"),
    FEDAVG: ("messages",),
}
# Prefixes of keys that may differ between lines.
_VARIANT = ("method.", "compressor.", "model_compressor.", "optimizer.", "plugins")
# Keys that every name contains.
_NAMED = {
    *("method.name", "method.code", "method.aggregate", "compressor.name"),
    "model_compressor.name",
}


class Point(NamedTuple):
    """A round.

    Parameters
    ----------
    up, down : float
        Bits a weight for each client that sent something up.
    formula : float | None
        The figure of FedPM's authors for the masks of the round; None for other
        methods.
    top1 : float
        Accuracy after the round, a fraction.
    drawn, mean : float | None
        That of one drawn mask, and of the mean of all masks; None for other methods.
    """

    up: float
    down: float
    formula: float | None
    top1: float
    drawn: float | None
    mean: float | None


@dataclass(frozen=True)
class _Run(Run):
    """A finished run.

    Parameters
    ----------
    order : tuple[Any, ...]
        Place of its line in the tables.
    model_bytes : int
        Size of the final model: of a coded mask for FedPM, else of float32 weights.
    points : list[Point]
        Its rounds.
    """

    order: tuple[Any, ...]
    model_bytes: int
    points: list[Point]


_Lines = Lines[_Run]
_Value = Callable[[_Run], float | None]


def bitrate(folder: Path) -> dict[str, str]:
    """Return the tables of a folder of runs, and draw ``bitrate.png``.

    Parameters
    ----------
    folder : Path
        Holds runs of FedPM, of federated averaging or of both, at any depth.

    Returns
    -------
    dict[str, str]
        Text by file name. Values are means over seeds ± standard deviations.

    Raises
    ------
    ReportError
        If there are no runs, a run is of another method or lacks a needed key, the
        number of weights is unknown, runs of one line differ in more than their seed,
        or those of one task in more than the method, the compression and the optimiser.
    """
    lines = _read(folder)
    _draw(lines, folder / "bitrate.png")
    return {
        "bitrate.md": f"{_bits(lines)}\n{_accuracies(lines)}",
        "bitrate.csv": _figures(lines),
    }


# --- runs -----------------------------------------------------------------------------


def _read(folder: Path) -> _Lines:
    """Return the runs by task and name, in the order of the tables."""
    found = [results.read_result(path) for path in results.finished_runs(folder)]
    if not found:
        raise ReportError(f"no {results.SUMMARY} below {folder}")
    for result in found:
        _check_result(result)
    weights, named = _weights(found), _named([r.settings for r in found])
    runs = (_run_of(result, weights, named) for result in found)
    return grouped(runs, lambda run: run.order, _VARIANT)


def _check_result(result: results.Result) -> None:
    """Raise `ReportError` if a run cannot be compared or lacks something."""
    settings, folder = result.settings, result.folder
    method = result.summary["method"]
    if method not in KINDS:
        names = " or ".join(KINDS)
        raise ReportError(f"{folder / results.SUMMARY}: method={method}, not {names}")
    if settings["method.name"] != method:
        text = f"method={method}, {settings['method.name']} by {results.CONFIG}"
        raise ReportError(f"{folder / results.SUMMARY}: {text}")
    needed = (*_COMMON, *_SETTINGS[method])
    check_keys(result, needed, _SUMMARY[method], _COLUMNS[method])
    check_rounds(result)
    if method == FEDAVG and settings["method.evaluate"] != "server":
        text = f"method.evaluate={settings['method.evaluate']}, not server"
        raise ReportError(f"{folder / results.CONFIG}: {text}")


def _run_of(
    result: results.Result,
    weights: Mapping[tuple[Any, ...], int],
    named: Mapping[str, set[str]],
) -> _Run:
    settings, summary = result.settings, result.summary
    known = weights.get(_network(settings))
    if known is None:
        text = "no bits_per_element, nor a run of fedpm: number of weights unknown"
        raise ReportError(f"{result.folder / results.SUMMARY}: {text}")
    name = _name(settings, named[settings["method.name"]])
    return _Run(
        task=task_of(settings),
        name=name,
        seed=settings["seed"],
        order=(*_rank(settings), name),
        model_bytes=summary.get("model_bytes", 4 * known),
        points=[_point(result, row, known) for row in result.rows],
        settings=without(settings, (*FREE, "target")),
    )


def _point(result: results.Result, row: Mapping[str, Any], weights: int) -> Point:
    """Return the figures of a round."""
    kinds = KINDS[result.summary["method"]]
    sent = row["bytes"].get("training", {})
    up, down = (results.total(sent.get(way, {})) for way in ("up", "down"))
    uploads = _of_kinds(row["messages"], kinds)
    if up and not uploads:
        place = f"{result.folder / results.METRICS}, line {row['round']}"
        text = f"bytes of {', '.join(sent['up'])} up, but no {' or '.join(kinds)}"
        raise ReportError(f"{place}: {text}")
    scale = 8 / weights / max(1, uploads)
    fedpm = result.summary["method"] == FEDPM
    return Point(
        up=up * scale,
        down=down * scale,
        formula=(row["bits_formula"] or 0.0) if fedpm else None,
        top1=row["top1"],
        drawn=row["top1_drawn"] if fedpm else None,
        mean=row["top1_mean"] if fedpm else None,
    )


def _of_kinds(nested: Mapping[str, Any], kinds: Iterable[str]) -> int:
    """Return the sum over some kinds of what training sent up."""
    sent = nested.get("training", {}).get("up", {})
    return sum(sent.get(kind, 0) for kind in kinds)


# --- the number of weights ------------------------------------------------------------


def _network(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what determines the number of weights: network and data set."""
    model = (
        (key, value) for key, value in settings.items() if key.startswith("model.")
    )
    return settings["dataset.name"], *sorted(model)


def _weights(found: Sequence[results.Result]) -> dict[tuple[Any, ...], int]:
    """Return the number of weights by `_network`.

    The summary of a run of FedPM contains it. For a network without such a run it is
    computed from a run of federated averaging. Networks without either are left out.
    """
    weights: dict[tuple[Any, ...], int] = {}
    for result in (r for r in found if r.summary["method"] == FEDPM):
        own = result.summary["elements"]
        known = weights.setdefault(_network(result.settings), own)
        if known != own:
            text = f"elements={own}, another run of its network has {known}"
            raise ReportError(f"{result.folder / results.SUMMARY}: {text}")
    for result in (r for r in found if r.summary["method"] == FEDAVG):
        computed = _computed_weights(result)
        if computed is not None:
            weights.setdefault(_network(result.settings), computed)
    return weights


def _computed_weights(result: results.Result) -> int | None:
    """Return the number of elements of an upload of federated averaging.

    The summary has the bits of all uploads over the number of their elements. None
    stands for a run without this figure or without uploads.
    """
    bits = result.summary.get("bits_per_element")
    uploads = sum(_of_kinds(row["messages"], KINDS[FEDAVG]) for row in result.rows)
    if not bits or not uploads:
        return None
    sent = sum(_of_kinds(row["bytes"], KINDS[FEDAVG]) for row in result.rows)
    return round(8 * sent / float(bits) / uploads)


# --- names ----------------------------------------------------------------------------


def _name(settings: Mapping[str, Any], named: set[str]) -> str:
    """Return the name of a line: method, code or compressor, and what else differs."""
    method = settings["method.name"]
    if method == FEDPM:
        parts = [method, settings["method.code"]]
    else:
        up, down = settings["compressor.name"], settings["model_compressor.name"]
        if settings.get("method.aggregate") == "majority":
            up += " majority"
        parts = [method, up, *([f"down {down}"] if down != NONE else [])]
    return ", ".join([*parts, *in_words(settings, named)])


def _named(several: Sequence[Mapping[str, Any]]) -> dict[str, set[str]]:
    """Return the keys that belong in names, by method.

    Keys of the methods are compared over all runs that have them, those of optimisers
    within a method, and those of compressors within one compressor of a method.
    """
    named: dict[str, set[str]] = {}
    for method in KINDS:
        own = [settings for settings in several if settings["method.name"] == method]
        keys = differing(several, "method.") | differing(own, "optimizer.")
        for slot in ("compressor.", "model_compressor."):
            for name in {settings.get(f"{slot}name") for settings in own}:
                same = (s for s in own if s.get(f"{slot}name") == name)
                keys |= differing(same, slot)
        named[method] = keys - _NAMED
    return named


def _rank(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the place of a line in the tables: FedPM by code, then the baselines."""
    method = settings["method.name"]
    if method == FEDPM:
        return 0, rank(_CODES, settings["method.code"])
    return 1, rank((NONE,), settings["compressor.name"])


# --- tables ---------------------------------------------------------------------------


def _rounds(lines: _Lines) -> dict[int, str]:
    """Return the rounds of the tables with their names; `_LAST` is each run's last."""
    ends = {len(run.points) for _, _, several in each_line(lines) for run in several}
    rounds = {number: f"round {number}" for number in ROUNDS if number <= min(ends)}
    if len(ends) > 1:
        rounds[_LAST] = "last round"
    elif ends.isdisjoint(rounds):
        rounds[_LAST] = f"round {min(ends)}"
    return rounds


def _bits(lines: _Lines) -> str:
    """Return the table of bits a weight: of single rounds, and over all rounds."""
    columns: list[tuple[str, str, _Value]] = [
        (f"up, {name}", ".3f", partial(_up, number=number))
        for number, name in _rounds(lines).items()
    ]
    columns += [
        ("up, all", ".3f", lambda run: sum(p.up for p in run.points)),
        ("down, all", ".3f", lambda run: sum(p.down for p in run.points)),
        ("both ways", ".3f", lambda run: sum(p.up + p.down for p in run.points)),
        ("formula, all", ".3f", _formula),
        ("model, bytes", ",.0f", lambda run: run.model_bytes),
    ]
    return _table(lines, columns)


def _up(run: _Run, number: int) -> float:
    """Return the bits up of a round, `_LAST` of the last."""
    return run.points[number - 1].up


def _formula(run: _Run) -> float | None:
    """Return the formula's sum over all rounds."""
    figures = [point.formula for point in run.points if point.formula is not None]
    return sum(figures) if figures else None


def _accuracies(lines: _Lines) -> str:
    """Return the table of accuracies in percent."""
    columns: list[tuple[str, str, _Value]] = [
        (f"top-1, {name}, %", ".2f", partial(_percent, key="top1", number=number))
        for number, name in _rounds(lines).items()
    ]
    columns += [
        ("drawn mask, %", ".2f", partial(_percent, key="drawn")),
        ("mean of masks, %", ".2f", partial(_percent, key="mean")),
    ]
    return _table(lines, columns)


def _percent(run: _Run, key: str, number: int = _LAST) -> float | None:
    """Return an accuracy after a round in percent, None if the run has none."""
    share = getattr(run.points[number - 1], key)
    return None if share is None else 100 * share


def _table(lines: _Lines, columns: Sequence[tuple[str, str, _Value]]) -> str:
    """Return a table with one line per variant."""
    head = ["task", "method", "seeds", *(name for name, _, _ in columns)]
    rows = [
        [task, name, str(len(several))]
        + [cell(several, form, value) for _, form, value in columns]
        for task, name, several in each_line(lines)
    ]
    return markdown(head, rows)


def _figures(lines: _Lines) -> str:
    """Return a CSV file: one line per round of a run."""
    head = ["task", "method", "seed", "round", "bits up", "bits down", "formula"]
    head += ["top1", "drawn", "mean"]
    rows = [
        [task, name, run.seed, number, f"{p.up:.6f}", f"{p.down:.6f}"]
        + ["" if p.formula is None else f"{p.formula:.6f}", f"{p.top1:.4f}"]
        + ["" if share is None else f"{share:.4f}" for share in (p.drawn, p.mean)]
        for task, name, several in each_line(lines)
        for run in several
        for number, p in enumerate(run.points, 1)
    ]
    return comma_separated(head, rows)


# --- figure ---------------------------------------------------------------------------


def _draw(lines: _Lines, path: Path) -> None:
    """Draw accuracy over bits up and over those of both ways, a task a row.

    Each variant is one line, the mean over its seeds.
    """
    figure = Figure(figsize=(10, 4 * len(lines)), layout="constrained")
    grid = figure.subplots(len(lines), 2, squeeze=False)
    for (task, by_name), (left, right) in zip(lines.items(), grid, strict=True):
        for name, several in by_name.items():
            tops = [[100 * point.top1 for point in run.points] for run in several]
            ups = [[*accumulate(p.up for p in run.points)] for run in several]
            both = [[*accumulate(p.up + p.down for p in run.points)] for run in several]
            for axes, bits in ((left, ups), (right, both)):
                axes.plot(
                    mean_of(bits), mean_of(tops), marker=".", linewidth=1, label=name
                )
        for axes, text in ((left, "up"), (right, "both ways")):
            x = f"bits a weight {text}, up to the round"
            axes.set(title=task, xlabel=x, ylabel="accuracy, %", xscale="log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.3)
        left.legend()
    write_whole(path, results.image_of(figure, dpi=110))
