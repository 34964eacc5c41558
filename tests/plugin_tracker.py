"""A plugin: a tracker that writes what it is given as lines, with a key of its own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from masksl.runtime.tracking import TRACKERS, Tracker, TrackingConfig, scalars
from masksl.settings import Settings, read


class LinesConfig(TrackingConfig):
    """The keys under ``tracking.``.

    Parameters
    ----------
    file : str
        Name of the file in the run folder.
    """

    file: str = Field("lines.jsonl", min_length=1, description="the name of a file")


class Lines(Tracker):
    """Writes a line for each row, for the summary, and at the end."""

    config = LinesConfig

    def __init__(self, settings: Settings, folder: Path) -> None:
        super().__init__(settings, folder)
        name = read(LinesConfig, settings, "tracking").file
        self._file = open(folder / name, "w", encoding="utf-8")

    def on_round(self, row: Mapping[str, Any]) -> None:
        self._write({"step": row["round"]} | dict(scalars(row)))

    def on_summary(self, summary: Mapping[str, Any]) -> None:
        self._write({"step": "summary"} | dict(scalars(summary)))

    def close(self) -> None:
        self._write({"step": "closed"})
        self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")


TRACKERS["lines"] = Lines
