"""Everything that split learning sends, both ways, beside what it sends exactly.

Runs of one cut and one ``client_sync`` are compared with those of the same seeds in
which nothing is compressed: accuracies by paired differences, bytes by their factor.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import mpmath

from masksl.report.cells import CUTS, FREE, NONE, SPLIT, display_name, rank
from masksl.report.lines import (
    Lines,
    Run,
    cell,
    check_keys,
    each_line,
    grouped,
    network_of,
    results_of,
    without,
)
from masksl.report.tables import MISSING, comma_separated, markdown, with_spread
from masksl.runtime import results

SLOTS = ("compressor", "gradient_compressor", "model_compressor")
EXACT = "exact"
# Kinds of bytes in the table, and those of the ledger in each; all else is the rest.
KINDS = {
    "activations": ("activation",),
    "gradients": ("gradient",),
    "halves": ("model", "update", "optimizer", "buffer"),
}
_PLAIN = {"name": NONE, "values": "float32"}
_MS = {"name": "ms", "sparsity": 0.99, "bits": 2, "rounding": "nearest"}
_MS |= {"scope": "tensor", "values": "float32", "lossless": "none"}
_EC = {"name": "ec"} | dict.fromkeys(("step", "bits", "error", "deadzone"), "null")
_EC |= {"context": "spatial", "rounding": "nearest"}
# Options of the compressors of each preset, in the order of the slots.
_PRESETS: dict[str, tuple[Mapping[str, Any], ...]] = {
    EXACT: (_PLAIN, _PLAIN, _PLAIN),
    "paper": (_MS, _PLAIN, _PLAIN),
    "compact": (
        _EC | {"error": 0.08, "deadzone": 0.5},
        _EC | {"step": 1.5, "rounding": "stochastic"},
        _EC,
    ),
}
_NEEDED = (
    *("dataset.name", "model.name", "clients", "seed", "cut", "client_sync"),
    *(f"{slot}.name" for slot in SLOTS),
)
# Prefixes of keys that may differ between lines.
_COMPRESSION = (*(f"{slot}." for slot in SLOTS), "gradient_positions")


@dataclass(frozen=True)
class _Run(Run):
    """A finished run.

    Parameters
    ----------
    place : tuple[str, str, str]
        Network and data set, cut, ``client_sync``.
    top1 : float
        Accuracy after the last round.
    sent : Mapping[str, int]
        Bytes of the whole run, by the names of `KINDS`, and of ``everything``.
    factor : float
        Bytes of the same tensors in float32, all in full, over those of everything.
    """

    place: tuple[str, str, str]
    top1: float
    sent: Mapping[str, int]
    factor: float

    @property
    def everything(self) -> int:
        """Bytes of the whole run."""
        return self.sent["everything"]


def traffic(folder: Path) -> dict[str, str]:
    """Return the tables of a folder of runs.

    Parameters
    ----------
    folder : Path
        Holds run folders, at any depth; those of other methods are left out.

    Returns
    -------
    dict[str, str]
        Text by file name. Values are means over seeds ± standard deviations; the
        difference of accuracies is the mean over pairs with its 95 % t interval.

    Raises
    ------
    ReportError
        If there are no runs, a run lacks a needed key, runs of a line differ in more
        than their seed, or lines of a cut and a ``client_sync`` in more than
        compression.
    """
    runs = map(_run_of, results_of(folder, SPLIT))
    found = grouped(runs, _rank, _COMPRESSION)
    lines = {task: found[task] for task in sorted(found, key=_order)}
    return {"traffic.md": _table(lines), "traffic.csv": _figures(lines)}


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return mean and half the width of the two-sided 95 % t interval.

    None of fewer than two.

    >>> tuple(round(x, 3) for x in interval([1.0, 2.0, 4.0]))
    (2.333, 3.795)
    """
    count = len(differences)
    if count < 2:
        return None
    error = stdev(differences) / sqrt(count)
    return fmean(differences), _quantile(count - 1) * error


def _quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution."""

    def outside(t: mpmath.mpf) -> mpmath.mpf:  # of both tails
        share = freedom / (freedom + t * t)
        return mpmath.betainc(freedom / 2, 0.5, 0, share, regularized=True) - 0.05

    return float(mpmath.findroot(outside, (1.9, 13.0), solver="anderson"))


def _run_of(result: results.Result) -> _Run:
    settings = result.settings
    check_keys(result, _NEEDED, ("bytes", "bytes_total", "factor_total"))
    place = (network_of(settings), str(settings["cut"]), settings["client_sync"])
    total = result.summary["bytes"]
    sent = {name: _bytes(total, kinds) for name, kinds in KINDS.items()}
    return _Run(
        task=", ".join(place),
        name=_name(settings),
        seed=settings["seed"],
        settings=without(settings, (*FREE, "target")),
        place=place,
        top1=result.rows[-1]["top1"],
        sent=sent | {"everything": result.summary["bytes_total"]},
        factor=result.summary["factor_total"],
    )


def _name(settings: Mapping[str, Any]) -> str:
    """Return what a run's traffic is called.

    That is its preset, with the options that differ from it as on the command line;
    else its compressors.
    """
    names = [settings[f"{slot}.name"] for slot in SLOTS]
    given = EXACT if set(names) == {NONE} else str(settings.get("traffic"))
    preset = _PRESETS.get(given, ())
    if names != [own["name"] for own in preset]:
        return ", ".join(map(display_name, names))
    return ", ".join([given, *_overrides(settings, preset)])


def _overrides(
    settings: Mapping[str, Any], preset: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Yield the options of a run that differ from a preset's."""
    for slot, own in zip(SLOTS, preset, strict=True):
        for option, value in own.items():
            key = f"{slot}.{option}"
            if settings.get(key, value) != value:  # older runs lack some
                yield f"{key}={settings[key]}"


def _bytes(nested: Mapping[str, Any], kinds: Sequence[str]) -> int:
    """Return the bytes of some kinds, both ways, training and evaluation."""
    ways = [way for phase in nested.values() for way in phase.values()]
    return sum(way.get(kind, 0) for way in ways for kind in kinds)


def _table(lines: Lines[_Run]) -> str:
    """Return the Markdown table."""
    head = ["task", "cut", "client_sync", "traffic", "seeds", "top-1, %", "points"]
    head += [f"{name}, MB" for name in (*KINDS, "everything")]
    rows = []
    for task, name, several in each_line(lines):
        exact = {run.seed: run for run in lines[task].get(EXACT, [])}
        top1 = with_spread([100 * run.top1 for run in several], ".2f")
        row = [*several[0].place, name, str(len(several)), top1]
        row.append(MISSING if name == EXACT else _points(several, exact))
        for kind in (*KINDS, "everything"):
            row.append(with_spread([run.sent[kind] / 1e6 for run in several], ".2f"))
        row.append(cell(several, ".1f", partial(_factor, exact=exact)))
        row.append(cell(several, ".1f", lambda run: run.factor))
        rows.append(row)
    return markdown([*head, "times less", "than float32"], rows)


def _points(several: Sequence[_Run], exact: Mapping[int, _Run]) -> str:
    """Return the mean paired difference of accuracies and its interval."""
    found = _differences(several, exact)
    within = interval(found)
    if within is not None:
        return f"{within[0]:+.2f} ± {within[1]:.2f}"
    return f"{found[0]:+.2f}" if found else MISSING


def _differences(several: Sequence[_Run], exact: Mapping[int, _Run]) -> list[float]:
    pairs = [(run, exact[run.seed]) for run in several if run.seed in exact]
    return [100 * (run.top1 - other.top1) for run, other in pairs]


def _factor(run: _Run, exact: Mapping[int, _Run]) -> float | None:
    other = exact.get(run.seed)
    return None if other is None else other.everything / run.everything


def _figures(lines: Lines[_Run]) -> str:
    """Return a CSV file: one line per run."""
    head = ["task", "cut", "client_sync", "traffic", "seed", "top1"]
    rows = [
        [*run.place, name, run.seed, f"{run.top1:.4f}", *run.sent.values()]
        for _, name, several in each_line(lines)
        for run in several
    ]
    return comma_separated([*head, *KINDS, "everything"], rows)


def _rank(run: _Run) -> tuple[Any, ...]:
    """Return the place of a run's line among those of its task."""
    return rank(tuple(_PRESETS), run.name)


def _order(task: str) -> tuple[Any, ...]:
    """Return the place of a task: by network, then by cut from the shallow one on."""
    network, cut, sync = task.rsplit(", ", 2)
    return network, rank(CUTS, cut), sync
