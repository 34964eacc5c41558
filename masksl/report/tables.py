"""Tables as Markdown and CSV, and the error of all reports."""

import csv
import io
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

MISSING = "–"  # cell of a Markdown table without a value


class ReportError(ValueError):
    """Raised when a folder lacks what a report needs; the text is one line."""


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned right."""
    marks = ["---", *["---:"] * (len(columns) - 1)]
    lines = [columns, marks, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def comma_separated(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return the text of a CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation, 0 for a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def with_spread(values: Sequence[float], form: str) -> str:
    """Return mean ± standard deviation as text, for a single value the value alone.

    >>> with_spread([1, 2], ".1f"), with_spread([1], ".1f")
    ('1.5 ± 0.7', '1.0')
    """
    mean, deviation = spread(values)
    return f"{mean:{form}}" + (f" ± {deviation:{form}}" if len(values) > 1 else "")


def share(part: int, whole: int) -> str:
    """Return how many of the runs a value describes, nothing if it is all of them.

    >>> share(1, 2), share(2, 2)
    (' (1 of 2)', '')
    """
    return "" if part == whole else f" ({part} of {whole})"
