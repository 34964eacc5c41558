"""Output of a run: the progress bar, and the table at the end."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table


class ProgressBar:
    """A progress bar over rounds and one over the steps of the round.

    If the output is not a terminal, it prints a line for each round instead.

    Parameters
    ----------
    rounds : int
        Number of rounds.
    """

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._console = Console()
        columns = (
            TextColumn("{task.description:<6}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._progress = Progress(
            *columns, console=self._console, disable=not self._console.is_terminal
        )
        self._round = self._progress.add_task("round", total=rounds, text="")
        self._step = self._progress.add_task("step", total=None, text="")

    def __enter__(self) -> Self:
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop updating the bar."""
        self._progress.stop()

    def on_step(self, round_: int, step: int, steps: int, loss: float) -> None:
        """Show a finished step."""
        del round_
        self._progress.update(
            self._step, completed=step, total=steps, text=f"loss {loss:.4f}"
        )

    def on_round(self, row: Mapping[str, Any]) -> None:
        """Show a finished round."""
        loss = "none" if row["loss"] is None else f"{row['loss']:.4f}"
        text = f"top-1 {row['top1']:.2%}, training loss {loss}"
        self._progress.update(self._round, completed=row["round"], text=text)
        if self._progress.disable:
            self._console.print(f"round {row['round']}/{self._rounds}: {text}")


def print_summary(
    summary: Mapping[str, Any], labels: Mapping[str, tuple[str, str]], folder: str
) -> None:
    """Print the table at the end of a run.

    Parameters
    ----------
    summary : Mapping[str, Any]
        Content of ``summary.json``.
    labels : Mapping[str, tuple[str, str]]
        Text and format of keys that only this method has.
    folder : str
        The run folder.
    """
    console = Console()
    names = f"{summary['method']}, {summary['compressor']}"
    table = Table(title=f"{names}, {summary['rounds']} rounds", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("test accuracy, top-1", f"{summary['top1']:.2%}")
    table.add_row("test accuracy, top-5", f"{summary['top5']:.2%}")
    table.add_row("training loss, last round", _shown(summary["loss"], ".4f"))
    table.add_row("test loss", f"{summary['test_loss']:.4f}")
    table.add_section()
    for phase, directions in summary["bytes"].items():
        for direction, kinds in directions.items():
            for kind, sent in kinds.items():
                table.add_row(f"{phase}, {direction}, {kind}", f"{sent:,} B")
    table.add_row("all", f"{summary['bytes_total']:,} B")
    table.add_section()
    for key, (text, form) in labels.items():
        table.add_row(text, _shown(summary[key], form))
    factor = _shown(summary["factor_total"], ".2f")
    table.add_row("compression factor of everything", factor)
    table.add_section()
    table.add_row("time on the simulated link", f"{summary['link_seconds']:.2f} s")
    table.add_row("wall time", f"{summary['wall_seconds']:.1f} s")
    table.add_row("training", f"{summary['samples_per_second']:,.0f} samples/s")
    for activity, share in summary["shares"].items():
        table.add_row(f"time in {activity}", f"{share:.1%}")
    console.print(table)
    console.print(f"run folder: {folder}", soft_wrap=True, highlight=False)


def _shown(value: Any, form: str) -> str:
    """Return a value in a format; a run can lack one."""
    return "none" if value is None else format(value, form)
