"""Command line: ``python -m masksl.report NAME FOLDER``.

Tables are Markdown and CSV, figures PNG; they go into the folder, or that of --into.
"""

import argparse
import sys
from pathlib import Path

from masksl.report.figure2 import figure2
from masksl.report.figure3 import figure3
from masksl.report.runs import runs
from masksl.report.table1 import table1
from masksl.report.tables import ReportError
from masksl.runtime.results import collect

REPORTS = {"runs": runs, "table1": table1, "figure2": figure2, "figure3": figure3}


def main() -> None:
    """Write the report that the command line names, and print its tables."""
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
        if not arguments.folder.is_dir():
            raise ReportError(f"folder={str(arguments.folder)!r}: not a folder")
        folder = arguments.folder
        if arguments.into is not None:
            folder = arguments.into
            if arguments.folder.resolve() in (
                folder.resolve(),
                *folder.resolve().parents,
            ):
                allowed = f"outside of {arguments.folder}"
                raise ReportError(f"--into {folder}: must be a folder {allowed}")
            collect(arguments.folder, folder)
        texts = REPORTS[arguments.report](folder)
    except ReportError as error:
        print(f"masksl: {error}", file=sys.stderr)
        sys.exit(1)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        if name.endswith(".md"):
            print(text, end="")


if __name__ == "__main__":
    main()
