"""Benchmark of the engines: ``python -m masksl.bench engine``.

It prints tables: the time of an exchange; the time of a training step, compared with a
bare PyTorch loop over the unsplit network; training with and without compression; the
parts of an iteration of SASG; the memory of all processes of a run, by number of
clients.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from masksl.bench import (
    compression,
    deployed,
    exchanges,
    iterations,
    memory,
    steps,
)
from masksl.engine import ENGINES

Row = dict[str, Any]

PARTS = ("exchanges", "deployed", "steps", "compression", "iterations", "memory")

# Overrides of the jobs whose training steps are timed; the second needs CIFAR-10.
JOBS: dict[str, tuple[str, ...]] = {
    "small CNN, digits": ("traffic=paper", "client_sync=round"),
    "small CNN, CIFAR-10": (
        *("dataset=cifar10", "dataset.limit=5200", "dataset.test_limit=260"),
        *("traffic=paper", "client_sync=round"),
    ),
}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the parts of the benchmark named by the arguments.

    Returns
    -------
    dict[str, Any]
        The number of cores, and the rows of each part.
    """
    report: dict[str, Any] = {"cores": os.cpu_count()}
    report |= {part: [] for part in (*PARTS, "uploads")}
    root = f"dataset.root={arguments.root}"
    if "exchanges" in arguments.parts:
        report["exchanges"] = _exchanges(arguments)
    if "deployed" in arguments.parts:
        _announce("exchanges of two SuperNodes")
        rows = deployed.measure(arguments.sizes, arguments.repeats)
        _add_ratios(rows, "mean_ms", deployed.STREAMS, ("clients", "bytes"))
        report["deployed"] = rows
    if "steps" in arguments.parts:
        report["steps"] = _steps(root)
    if "compression" in arguments.parts:
        _announce("training with compressors")
        report["compression"] = compression.measure(root)
    if "iterations" in arguments.parts:
        report |= _iterations(root)
    if "memory" in arguments.parts:
        report["memory"] = _memory(arguments.clients, root)
    return report


def _exchanges(arguments: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for clients in arguments.clients:
        sizes = [n for n in arguments.sizes if n * clients <= arguments.most]
        for name in ENGINES:
            _announce(f"exchanges of {clients} clients on {name}")
            rows += exchanges.measure(name, clients, sizes, arguments.repeats)
    _add_ratios(rows, "mean_ms", "ray", ("clients", "bytes"))
    return rows


def _steps(root: str) -> list[Row]:
    rows: list[Row] = []
    for job, overrides in JOBS.items():
        _announce(f"steps of the {job} in a bare loop")
        of_job = [steps.measure_bare(*overrides, root)]
        for name in ("local", "ray", "flower"):
            _announce(f"steps of the {job} on {name}")
            of_job.append(steps.measure(name, *overrides, root))
        rows += [{"job": job} | row for row in of_job]
    _add_ratios(rows, "step_ms", "ray", ("job",))
    _add_ratios(rows, "step_ms", "bare loop", ("job",))
    return rows


def _iterations(root: str) -> dict[str, list[Row]]:
    rows: list[Row] = []
    for case in iterations.CASES:
        for name in ("local", "ray"):
            _announce(f"iterations of {case} on {name}")
            rows.append(iterations.measure(name, case, root))
    uploads = [iterations.measure_codec(case) for case in iterations.CASES]
    return {"iterations": rows, "uploads": uploads}


def _memory(numbers: Sequence[int], root: str) -> list[Row]:
    rows: list[Row] = []
    for clients in numbers:
        for channels_last in (False, True):
            _announce(f"memory of {clients} clients, channels_last={channels_last}")
            layout = f"compute.channels_last={channels_last}"
            row = memory.measure(clients, root, layout)
            rows.append({"channels_last": channels_last} | row)
    return rows


def _add_ratios(rows: list[Row], key: str, engine: str, same: Sequence[str]) -> None:
    """Add to each row its value divided by the value of one engine.

    Parameters
    ----------
    rows : list[dict[str, Any]]
        Changed in place: they get the column ``times_ENGINE``, up to the first blank.
    key : str
        Column of the values.
    engine : str
        The engine that others are compared with.
    same : Sequence[str]
        Columns that compared rows have in common.
    """
    base = {tuple(r[s] for s in same): r[key] for r in rows if r["engine"] == engine}
    for row in rows:
        value = base.get(tuple(row[s] for s in same), float("nan"))
        row[f"times_{engine.split()[0]}"] = row[key] / value


def _announce(text: str) -> None:
    """Print to stderr what is measured next."""
    print(text, file=sys.stderr, flush=True)


# --- tables ---------------------------------------------------------------------------


def show(report: Mapping[str, Any]) -> None:
    """Print the tables of a report, except empty ones."""
    cores = f"{report['cores']} cores"
    times = dict.fromkeys(("mean_ms", "p50_ms", "p95_ms"), ",.1f")
    _show(
        f"exchanges, {cores}",
        {"engine": "", "clients": ",", "bytes": ",", "exchanges": ""}
        | times
        | {"steps_per_second": ",.1f", "times_ray": ".2f"},
        report["exchanges"],
    )
    _show(
        f"exchanges on a deployed SuperLink, {cores}",
        {"engine": "", "clients": ",", "bytes": ",", "exchanges": ""}
        | times
        | {"times_superlink": ",.2f"},
        report["deployed"],
    )
    _show_shares(
        f"training steps, {cores}",
        {"job": "", "engine": "", "step_ms": ",.1f", "samples_per_second": ",.0f"}
        | {"times_ray": ".2f", "times_bare": ".2f"},
        report["steps"],
    )
    _show_shares(
        f"training with compressors, ResNet8, CIFAR-10, ten clients, {cores}",
        {"precision": "", "engine": "", "compressor": ""}
        | {"samples_per_second": ",.0f", "times_none": ".2f"},
        report["compression"],
    )
    _show(
        f"iterations of SASG, MNIST, ten workers, {cores}",
        {"method": "", "engine": "", "iteration_ms": ".1f", "gradients_ms": ".1f"}
        | {"codec_ms": ".1f", "exchange_ms": ".1f", "sum_ms": ".1f", "other_ms": ".1f"},
        report["iterations"],
    )
    _show(
        f"one upload alone, {cores}",
        {"method": "", "bytes": ",", "encode_ms": ".2f", "decode_ms": ".2f"}
        | {"sum_ms": ".2f"},
        report["uploads"],
    )
    _show(
        f"memory of all processes, MNIST, {cores}",
        {"channels_last": "", "clients": ",", "peak_gib": ".2f"}
        | {"driver_gib": ".2f", "hosts_gib": ".2f", "client_steps": ","}
        | {"client_step_ms": ".2f", "round_seconds": ".1f", "rebuilt_graphs": ","},
        report["memory"],
    )


def _show_shares(title: str, columns: Mapping[str, str], rows: list[Row]) -> None:
    """Print rows, and their shares of the time in percent."""
    names = dict.fromkeys(name for row in rows for name in row["shares"])
    percent = [
        row | {name: f"{row['shares'].get(name, 0):.0%}" for name in names}
        for row in rows
    ]
    _show(title, {**columns, **dict.fromkeys(names, "")}, percent)


def _show(title: str, columns: Mapping[str, str], rows: list[Row]) -> None:
    """Print rows; each column is a key with the format of its values."""
    if not rows:
        return
    table = Table(title=title)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{row[key]:{form}}" for key, form in columns.items()))
    Console(width=150).print(table)
