"""What reports share: tables as Markdown and CSV, and their error."""

import csv
import io
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any


class ReportError(ValueError):
    """A folder that does not hold what a report needs; one line says what."""


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; what follows the first column is aligned right."""
    marks = ["---", *["---:"] * (len(columns) - 1)]
    lines = [columns, marks, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def comma_separated(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return the lines of a CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation, 0 of a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def with_spread(values: Sequence[float], form: str) -> str:
    """Return mean ± standard deviation as text, the figure alone where it is one."""
    mean, deviation = spread(values)
    return f"{mean:{form}}" + (f" ± {deviation:{form}}" if len(values) > 1 else "")
