"""Six small runs whose traffic, steps and clients never change by accident.

The counts are exact on every machine: sizes of frames do not depend on the values.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import prepare, settings_of

FROZEN = Path(__file__).with_name("frozen_runs.json")
SMALL = (
    *("rounds=2", "clients=4", "fraction=0.75", "evaluations=2"),
    *("dataset.limit=250", "dataset.test_limit=60", "threads.server=1"),
)
RUNS = [
    (sync, compressor)
    for sync in ("step", "round", "never")
    for compressor in ("ms", "none")
]


def counts(sync: str, compressor: str) -> dict[str, Any]:
    """Run and return what is frozen: bytes, messages, steps and clients by round."""
    overrides = (*SMALL, f"client_sync={sync}", f"compressor={compressor}")
    training = prepare(settings_of(*overrides))
    sent: Counter[str] = Counter()
    clients: set[int] = set()
    exchange = training.grid.exchange

    def count(messages: Any, timeout: float | None) -> Any:
        for message in messages:
            if not message.metadata.message_type.startswith("query."):
                sent[message.metadata.message_type] += 1
            if message.metadata.message_type == "train.forward":
                clients.add(message.metadata.dst_node_id - 1)
        return exchange(messages, timeout)

    training.grid.exchange = count  # type: ignore[method-assign]
    rounds = []
    for number in (1, 2):
        sent.clear()
        clients.clear()
        training.strategy.run_round(training.grid, number, 2)
        row = training.rows[-1]
        rounds.append(
            {
                "bytes": row["bytes"],
                "messages": dict(sorted(sent.items())),
                "steps": row["steps"],
                "samples": row["samples"],
                "clients": sorted(clients),
                "checks": [check["step"] for check in row["checks"]],
                "link_seconds": row["link_seconds"],
            }
        )
    return {"rounds": rounds}


@pytest.mark.parametrize(("sync", "compressor"), RUNS)
def test_counts_are_frozen(sync: str, compressor: str) -> None:
    frozen = json.loads(FROZEN.read_text(encoding="utf-8"))
    assert counts(sync, compressor) == frozen[f"{sync}/{compressor}"]


if __name__ == "__main__":  # python -m tests.test_frozen_runs
    text = json.dumps({f"{s}/{c}": counts(s, c) for s, c in RUNS}, indent=1)
    FROZEN.write_text(text + "\n", encoding="utf-8")
