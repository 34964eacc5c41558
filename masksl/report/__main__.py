"""Command line: ``python -m masksl.report NAME FOLDER``.

Tables are written as Markdown and CSV, figures as PNG, into the folder or the one of
--into.
"""

import argparse
import sys
from pathlib import Path

from masksl.report.fedavg import fedavg
from masksl.report.figure2 import figure2
from masksl.report.figure3 import figure3
from masksl.report.runs import runs
from masksl.report.table1 import table1
from masksl.report.tables import ReportError
from masksl.runtime.results import collect

REPORTS = {
    "runs": runs,
    "table1": table1,
    "figure2": figure2,
    "figure3": figure3,
    "fedavg": fedavg,
}


def main() -> None:
    """Write the report named by the command line, and print its tables."""
    parser = argparse.ArgumentParser(
        prog="python -m masksl.report", description=__doc__
    )
    parser.add_argument("report", choices=REPORTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--into", type=Path, help="folder that finished runs are copied to beforehand"
    )
    arguments = parser.parse_args()
    try:
        folder = _results_folder(arguments.folder, arguments.into)
        texts = REPORTS[arguments.report](folder)
    except ReportError as error:
        print(f"masksl: {error}", file=sys.stderr)
        sys.exit(1)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        if name.endswith(".md"):
            print(text, end="")


def _results_folder(folder: Path, into: Path | None) -> Path:
    """Return the folder of the runs, after copying them if another one is given.

    Raises
    ------
    ReportError
        If the folder does not exist, or the other one lies in it.
    """
    if not folder.is_dir():
        raise ReportError(f"folder={str(folder)!r}: not a folder")
    if into is None:
        return folder
    if folder.resolve() in (into.resolve(), *into.resolve().parents):
        raise ReportError(f"--into {into}: must be a folder outside of {folder}")
    collect(folder, into)
    return into


if __name__ == "__main__":
    main()
