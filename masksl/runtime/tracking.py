"""Trackers: they are given the metrics of a run as they come.

The run folder is written whatever the tracker. A plugin adds a tracker of its own to
`TRACKERS`, as it adds compressors and methods.
"""

import math
import shutil
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import Field

from masksl.settings import ConfigError, Section, Settings, Value


class TrackingConfig(Section):
    """The keys under ``tracking.``; a tracker with more of them extends it.

    Parameters
    ----------
    name : str
        Which tracker is given the metrics.
    """

    name: str = Field("none", description="the name of a tracker")


class Tracker:
    """Base of the trackers; by itself it ignores what it is given.

    A tracker is made where the server runs, before the first round. If the run resumes
    another, it is given the rows of that one first, so it always begins with round 1.

    Parameters
    ----------
    settings : Settings
        Configuration of the run.
    folder : Path
        The run folder.

    Attributes
    ----------
    config : type[TrackingConfig]
        Section of its keys under ``tracking.``.
    needs : str
        A module that must be installed; empty if there is none.
    install : str
        The command that installs it.
    """

    config: ClassVar[type[TrackingConfig]] = TrackingConfig
    needs: ClassVar[str] = ""
    install: ClassVar[str] = ""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder

    def on_round(self, row: Mapping[str, Any]) -> None:
        """Handle the row of a completed round."""

    def on_summary(self, summary: Mapping[str, Any]) -> None:
        """Handle the summary of a completed run."""

    def close(self) -> None:
        """Release what is open; called at the end of a run that fails, too."""


class TensorBoard(Tracker):
    """Writes scalars into ``tensorboard/`` of the run folder, by round.

    They are float32 there; exact counts of bytes are in ``metrics.jsonl``. Events of an
    earlier run in the folder are removed, as its rows are.
    """

    needs = "tensorboard"
    install = 'pip install -e ".[tensorboard]"'

    def __init__(self, settings: Settings, folder: Path) -> None:
        super().__init__(settings, folder)
        # Imported here: importing it takes a second, and other runs do not need it.
        # pylint: disable-next=import-outside-toplevel
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "tensorboard"
        shutil.rmtree(path, ignore_errors=True)
        self._writer = SummaryWriter(str(path))
        text = yaml.safe_dump(dict(settings), sort_keys=False)
        self._writer.add_text("config", f"```yaml\n{text}```")

    def on_round(self, row: Mapping[str, Any]) -> None:
        """Write the scalars of a row at once, so that they are seen during the run."""
        self._write(row, row["round"])

    def on_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the scalars of the summary, at the last round."""
        self._write({"summary": summary}, summary["rounds"])

    def close(self) -> None:
        """Close the file of events."""
        self._writer.close()

    def _write(self, metrics: Mapping[str, Any], round_: int) -> None:
        for name, value in scalars(metrics):
            self._writer.add_scalar(name, value, round_)
        self._writer.flush()


TRACKERS: dict[str, type[Tracker]] = {"none": Tracker, "tensorboard": TensorBoard}
"""Every tracker by its name."""


def tracker_of(settings: Mapping[str, Value]) -> type[Tracker]:
    """Return the tracker named by settings.

    Raises
    ------
    ConfigError
        If there is none of that name, or it needs a module that is not installed.
    """
    name = settings.get("tracking.name")
    if name not in TRACKERS:
        raise ConfigError.of("tracking.name", name, f"one of {', '.join(TRACKERS)}")
    tracker = TRACKERS[str(name)]
    if tracker.needs and find_spec(tracker.needs) is None:
        allowed = f"another, or {tracker.needs} installed: {tracker.install}"
        raise ConfigError.of("tracking.name", name, allowed)
    return tracker


def scalars(
    metrics: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, int | float]]:
    """Yield the finite numbers of a row or a summary by name, without ``round``.

    >>> dict(scalars({"round": 1, "loss": 0.5, "bytes": {"up": {"mask": 9}}}))
    {'loss': 0.5, 'bytes/up/mask': 9}
    """
    for key, value in metrics.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from scalars(value, f"{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            if name != "round" and math.isfinite(value):
                yield name, value
