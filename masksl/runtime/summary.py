"""The row of a round and the summary of a run, from generic and own columns."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from masksl.runtime.ledger import Traffic, compression_factor
from masksl.runtime.round import Round
from masksl.settings import Settings


def make_row(round_: Round, own: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Return the row of metrics of a round.

    Parameters
    ----------
    round_ : Round
        The completed round.
    own : Mapping[str, Any]
        The method's own columns.
    seconds : float
        Wall time of the round.
    """
    traffic = round_.manager.ledger.round
    return {
        "round": round_.number,
        "lr": round_.lr,
        "loss": round_.loss / round_.samples if round_.samples else None,
        **round_.score.means(),
        "steps": round_.steps,
        "checks": round_.checks,
        "samples": round_.samples,
        **own,
        "bytes": traffic.nested_bytes(),
        "messages": traffic.nested_messages(),
        "link_seconds": traffic.link_seconds,
        "left_out": round_.failures,
        "wall_seconds": seconds,
        "train_seconds": round_.train_seconds,
        "samples_per_second": round_.samples / round_.train_seconds,
        "shares": round_.shares(seconds),
    }


# pylint: disable-next=too-many-arguments
def summarize(
    settings: Settings,
    rows: Sequence[Mapping[str, Any]],
    traffic: Traffic,
    *,
    own: Mapping[str, Any],
    seconds: float,
    hardware: str,
) -> dict[str, Any]:
    """Return the content of ``summary.json``.

    Parameters
    ----------
    settings : Settings
        Configuration of the run.
    rows : Sequence[Mapping[str, Any]]
        Rows of all rounds.
    traffic : Traffic
        Traffic of the whole run.
    own : Mapping[str, Any]
        The method's own keys.
    seconds : float
        Wall time of the run.
    hardware : str
        Hardware of the server in words.

    Returns
    -------
    dict[str, Any]
        Accuracies are fractions; bytes and messages are those of the whole run.
    """
    last = rows[-1]
    return {
        "method": settings["method.name"],
        "compressor": settings["compressor.name"],
        "top1": last["top1"],
        "top5": last["top5"],
        "best_top1": max(row["top1"] for row in rows),
        "loss": last["loss"],
        "test_loss": last["test_loss"],
        "rounds": len(rows),
        "bytes": traffic.nested_bytes(),
        "messages": traffic.nested_messages(),
        "bytes_total": traffic.bytes(),
        **own,
        "factor_total": compression_factor(traffic.dense(), traffic.bytes()),
        "link_seconds": traffic.link_seconds,
        "wall_seconds": seconds,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware,
    } | throughput(rows)


def throughput(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return training samples a second, and the shares of the time by activity.

    Shares are those of whole rounds, evaluation included.
    """
    trained = sum(row["train_seconds"] for row in rows)
    whole = sum(row["wall_seconds"] for row in rows)
    return {
        "samples_per_second": sum(row["samples"] for row in rows) / trained,
        "shares": {
            name: sum(row["shares"][name] * row["wall_seconds"] for row in rows) / whole
            for name in rows[0]["shares"]
        },
    }
