"""Command line: ``python -m masksl.report NAME FOLDER``.

Tables are written as Markdown and CSV, figures as PNG, into the folder or the one of
--into. ``plot`` draws any two columns of the rows of the runs, --y over --x.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from masksl.report.bitrate import bitrate
from masksl.report.fedavg import fedavg
from masksl.report.figure2 import figure2
from masksl.report.figure3 import figure3
from masksl.report.flash import EVERY, flash
from masksl.report.plot import plot
from masksl.report.runs import runs
from masksl.report.table1 import table1
from masksl.report.tables import ReportError
from masksl.report.traffic import traffic
from masksl.report.uploads import uploads
from masksl.runtime.folder import FolderError, write_whole
from masksl.runtime.results import collect

REPORTS: dict[str, Callable[..., dict[str, str]]] = {
    "runs": runs,
    "table1": table1,
    "figure2": figure2,
    "figure3": figure3,
    "fedavg": fedavg,
    "uploads": uploads,
    "bitrate": bitrate,
    "flash": flash,
    "traffic": traffic,
}
PLOT = "plot"
# Options that one report alone has, by its name.
OPTIONS = {PLOT: ("x", "y"), "flash": ("every", "by_round")}


def main() -> None:
    """Write the report named by the command line, and print its tables."""
    parser = argparse.ArgumentParser(
        prog="python -m masksl.report", description=__doc__
    )
    parser.add_argument("report", choices=[*REPORTS, PLOT])
    parser.add_argument("folder", type=Path, help="holds run folders, at any depth")
    parser.add_argument(
        "--into",
        type=Path,
        help="folder that finished runs are copied to beforehand; of plot: the image "
        "file, or its folder",
    )
    parser.add_argument("--x", metavar="COLUMN", help="of plot: what to draw over")
    parser.add_argument("--y", metavar="COLUMN", help="of plot: what to draw")
    parser.add_argument(
        "--every",
        type=int,
        metavar="N",
        help=f"of flash: rounds from one test to the next, {EVERY} by default",
    )
    parser.add_argument(
        "--by-round",
        action="store_true",
        default=None,
        help="of flash: a table with a line for each round, too",
    )
    arguments = parser.parse_args()
    try:
        _report(arguments)
    except (FolderError, ReportError) as error:
        print(f"masksl: {error}", file=sys.stderr)
        sys.exit(1)


def _report(arguments: argparse.Namespace) -> None:
    """Write a report and print its tables, or the names of the files of a plot."""
    name, options = arguments.report, _options(arguments)
    if not arguments.folder.is_dir():
        raise ReportError(f"folder={str(arguments.folder)!r}: not a folder")
    if name == PLOT:
        into = arguments.into
        for line in plot(arguments.folder, arguments.x, arguments.y, into):
            print(line)
        return
    folder = _results_folder(arguments.folder, arguments.into)
    for file, text in REPORTS[name](folder, **options).items():
        write_whole(folder / file, text)
        if file.endswith(".md"):
            print(text, end="")


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options that are given; those of another report are refused."""
    given: dict[str, Any] = {}
    for report, names in OPTIONS.items():
        values = {name: getattr(arguments, name) for name in names}
        own = {name: value for name, value in values.items() if value is not None}
        if own and report != arguments.report:
            listed = ", ".join(f"--{name.replace('_', '-')}" for name in names)
            raise ReportError(f"{listed}: of {report} alone, not of {arguments.report}")
        given |= own
    return given


def _results_folder(folder: Path, into: Path | None) -> Path:
    """Return the folder of the runs, after copying them if another one is given.

    Raises
    ------
    ReportError
        If the other one lies in it.
    """
    if into is None:
        return folder
    if folder.resolve() in (into.resolve(), *into.resolve().parents):
        raise ReportError(f"--into {into}: must be a folder outside of {folder}")
    collect(folder, into)
    return into


if __name__ == "__main__":
    main()
