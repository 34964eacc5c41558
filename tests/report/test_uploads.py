"""The tables of uploads: amounts up to a target that is exceeded, and in all."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from masksl import main as training
from masksl.report.__main__ import main
from masksl.report.tables import ReportError
from masksl.report.uploads import uploads
from masksl.runtime import results
from tests.conftest import settings_of

KEYS: dict[str, Any] = {
    **{"method.name": "sasg", "method.upload": "sparse", "method.adaptive": True},
    **{"method.down": "relay", "method.target_metric": "top1", "target": 0.5},
    **{"dataset.name": "mnist", "model.name": "mlp_512", "clients": 10, "seed": 1},
    **{"compressor.name": "sp", "compressor.sparsity": 0.99},
}
SGD = {"method.upload": "dense", "method.adaptive": False, "method.down": "dense"}


def synthetic(
    folder: Path, tops: list[float], *, values: int = 100, skips: int = 4, **more: Any
) -> None:
    """Write a run of as many rounds of 10 iterations, tested twice in each.

    A round has 96 uploads of 1,000 bytes, half of them before its first test.
    """
    settings = KEYS | more
    run = results.RunFolder(folder)
    run.write_config(json.dumps(settings) + "\n")
    for number in range(1, len(tops) // 2 + 1):
        first, last = tops[2 * number - 2 : 2 * number]
        check = {"step": 5, "top1": first, "top5": 1.0, "uploads": 48}
        check |= {"bytes_up": 48_000, "bytes_down": 90_000, "values": 48 * values}
        row = {"round": number, "steps": 10, "checks": [check], "loss": 1 / number}
        row |= {"top1": last, "top5": 1.0, "uploads": 100 - skips, "skips": skips}
        row |= {"values": (100 - skips) * values}
        ways = {"up": {"update": 95_996, "skip": 4}, "down": {"update": 200_000}}
        run.add_row(row | {"bytes": {"training": ways}})
    summary = {"method": "sasg", "rounds": len(tops) // 2, "top1": tops[-1]}
    summary |= {"elements": 10_000, "bytes_total": 0}
    (folder / results.SUMMARY).write_text(json.dumps(summary))


def table(text: str) -> dict[tuple[str, str], list[str]]:
    """Return the cells of a table by method and what they reach up to."""
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()[2:]
    ]
    return {(row[1], row[4]): row[2:4] + row[5:] for row in rows}


def test_amounts_until_the_target_is_exceeded(tmp_path: Path) -> None:
    synthetic(tmp_path / "a", [0.3, 0.5, 0.51, 0.6])  # 0.5 itself is not above 0.5
    synthetic(tmp_path / "b", [0.3, 0.6, 0.4, 0.4], seed=2)
    synthetic(tmp_path / "c", [0.1, 0.2], values=10_000, skips=0, **SGD)
    found = table(uploads(tmp_path)["uploads.md"])
    sasg = "SASG, SP 1 %, relay"
    assert found == {
        ("SGD", "> 50 % (0 of 1)"): ["1", "20.00", *["–"] * 6],
        ("SGD", "the end"): ["1", "20.00", "10", "100", "4.00", "4.00", "0.10", "0.30"],
        (sasg, "> 50 %"): [
            *("2", "60.00 ± 0.00", "12 ± 4", "120 ± 34", "0.05 ± 0.01"),
            *("0.10 ± 0.03", "0.12 ± 0.03", "0.36 ± 0.10"),
        ],
        (sasg, "the end"): [
            *("2", "60.00 ± 0.00", "20 ± 0", "192 ± 0", "0.08 ± 0.00"),
            *("0.15 ± 0.00", "0.19 ± 0.00", "0.59 ± 0.00"),
        ],
    }
    skips = uploads(tmp_path)["skips.md"].splitlines()
    assert skips[0] == "| task | method | 1 | 2 |"
    assert skips[2:] == [f"| mlp_512, mnist, 10 workers | {sasg} | 4 | 4 |"]
    rows = list(csv.DictReader(uploads(tmp_path)["uploads.csv"].splitlines()))
    assert len(rows) == 2 * 4 + 2
    assert (tmp_path / "uploads.png").stat().st_size > 10_000


def test_the_metric_of_the_target_counts(tmp_path: Path) -> None:
    more: dict[str, Any] = {"method.target_metric": "top5", "target": 0.99}
    synthetic(tmp_path / "a", [0.3, 0.4], **more)
    found = table(uploads(tmp_path)["uploads.md"])
    assert found["SASG, SP 1 %, relay", "> 99 %"][:3] == ["1", "100.00", "5"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "seed=1: 2 runs of mlp_512, mnist, 10 workers, SASG, SP 1 %, relay"),
        ({"seed": 2, "rounds": 4}, "differ in rounds: None, 4"),
        ({**SGD, "optimizer.lr": 1}, "differ in optimizer.lr: 1, None"),
        ({"seed": 2, "clients": None}, "b/config.yaml: no clients"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    synthetic(tmp_path / "a", [0.3, 0.4])
    synthetic(tmp_path / "b", [0.3, 0.4], **more)
    with pytest.raises(ReportError, match=re.escape(message)):
        uploads(tmp_path)


def test_other_methods_are_left_out(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no summary.json of method=sasg below"):
        uploads(tmp_path)


def test_the_table_of_a_small_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Amounts of the last evaluation are those of the whole run, of two in between."""
    job = (
        *("method=sasg", "rounds=2", "evaluations=3", "dataset.limit=180"),
        *("clients=3", "batch_size=10", "target=0.1", "method.delay=2"),
        *("method.constant=20", "threads.server=1"),
    )
    training.run(settings_of(*job), tmp_path / "runs/sasg")
    rows = results.read_rows(tmp_path / "runs/sasg")
    for row in rows:
        steps = [check["step"] for check in row["checks"]]
        assert steps == [2, 4] and row["steps"] == 6
        counts = [check["uploads"] for check in row["checks"]] + [row["uploads"]]
        assert counts == sorted(counts) and row["uploads"] + row["skips"] == 18
        sent = [check["bytes_up"] for check in row["checks"]]
        up = [results.total(phase["up"]) for phase in row["bytes"].values()]
        assert 0 < sent[0] <= sent[1] <= sum(up)
    assert sum(row["skips"] for row in rows) > 0
    summary = results.read_summary(tmp_path / "runs/sasg")
    monkeypatch.setattr("sys.argv", ["report", "uploads", str(tmp_path / "runs")])
    main()
    printed = capsys.readouterr().out
    assert "SASG, SPSIGN 1 % × 2, relay" in printed and "the end" in printed
    with open(tmp_path / "runs/uploads.csv", encoding="utf-8") as file:
        *_, last = csv.DictReader(file)
    assert int(last["uploads"]) == summary["uploads"]
    both = int(last["bytes up"]) + int(last["bytes down"])
    assert both == summary["bytes_total"]
