"""The table of federated averaging: rounds and bytes up to two accuracies."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from masksl import main as training
from masksl.report import fedavg as module
from masksl.report.__main__ import main
from masksl.report.fedavg import fedavg
from masksl.report.tables import ReportError
from masksl.runtime import results
from tests.conftest import settings_of


def synthetic(
    folder: Path, tops: list[float], sent: int = 1_000_000, **settings: Any
) -> None:
    """Write a finished run with these accuracies and bytes a round and way."""
    given = {"method.name": "fedavg", "dataset.name": "mnist", "seed": 1, "clients": 2}
    given |= {"model.name": "lenet", "dataset.partition": "iid", "dataset.alpha": 0.1}
    given |= {"compressor.name": "none", "model_compressor.name": "none"}
    run = results.RunFolder(folder)
    run.write_config(json.dumps(given | settings) + "\n")
    for number, top1 in enumerate(tops, 1):
        ways = {"up": {"update": sent}, "down": {"model": sent}}
        row = {"round": number, "steps": 1, "checks": [], "loss": 1, "top1": top1}
        run.add_row(row | {"bytes": {"training": ways}})
    summary = {"method": (given | settings)["method.name"], "rounds": len(tops)}
    summary |= {"top1": tops[-1], "bytes_total": 2 * sent * len(tops)}
    (folder / results.SUMMARY).write_text(json.dumps(summary))


def cells(folder: Path) -> dict[tuple[str, str], list[str]]:
    """Return the cells of the table by partition and compressor."""
    lines = fedavg(folder)["fedavg.md"].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert {row[0] for row in rows} == {"lenet, mnist, 2 clients"}
    return {(row[1], row[2]): row[3:] for row in rows}


def test_networks_of_different_strides_are_different_tasks(tmp_path: Path) -> None:
    """Runs from before the key had the stride 1."""
    for number, stride in enumerate((None, 1, 2)):
        more: dict[str, Any] = {} if stride is None else {"model.stem_stride": stride}
        synthetic(tmp_path / str(number), [0.5], seed=number, **more)
    lines = fedavg(tmp_path)["fedavg.md"].splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in lines]
    assert rows == [
        ["lenet (stem stride 2), mnist, 2 clients", "iid", "none", "1"],
        ["lenet, mnist, 2 clients", "iid", "none", "2"],
    ]


def test_rounds_and_bytes_are_those_until_the_targets(tmp_path: Path) -> None:
    synthetic(tmp_path / "a", [0.5, 0.975, 0.99])
    synthetic(tmp_path / "b", [0.97, 0.98, 0.96], seed=2)
    sp: dict[str, Any] = {"compressor.name": "sp", "compressor.sparsity": 0.9}
    synthetic(tmp_path / "c", [0.2, 0.98, 0.98], 250_000, **sp)
    synthetic(tmp_path / "d", [0.2, 0.3, 0.4], 250_000, seed=2, **sp)
    # a run of split learning is none of these
    other: dict[str, Any] = {"method.name": "split"}
    synthetic(tmp_path / "e", [0.9], **other)
    half: dict[str, Any] = {"dataset.partition": "dirichlet", "dataset.alpha": 0.5}
    synthetic(tmp_path / "f", [0.2], 250_000, **sp, **half)
    down: dict[str, Any] = {"model_compressor.name": "qu", "model_compressor.bits": 8}
    synthetic(tmp_path / "g", [0.995], **half, **down)
    level = half | {"dataset.partition": "dirichlet_equal"}
    synthetic(tmp_path / "h", [0.2], **level)
    assert cells(tmp_path) == {
        ("iid", "none"): [
            *("2", "97.50 ± 2.12"),
            *("1.5 ± 0.7", "3.00 ± 1.41", "1.00 ± 0.00"),
            *("3.0 (1 of 2)", "6.00 (1 of 2)", "1.00 (1 of 2)"),
        ],
        ("iid", "SP"): [
            *("2", "69.00 ± 41.01"),
            *("2.0 (1 of 2)", "1.00 (1 of 2)", "4.00 (1 of 2)", "INF", "INF", "–"),
        ],
        ("dirichlet 0.5", "none, down QU"): [
            *("1", "99.50", "1.0", "2.00", "–", "1.0", "2.00", "–"),
        ],
        ("dirichlet 0.5", "SP"): ["1", "20.00", *("INF", "INF", "–") * 2],
        ("dirichlet_equal 0.5", "none"): ["1", "20.00", *("INF", "INF", "–") * 2],
    }
    rows = list(csv.DictReader(fedavg(tmp_path)["fedavg.csv"].splitlines()))
    assert len(rows) == 7
    found = {(row["compressor"], row["partition"], row["seed"]): row for row in rows}
    assert found["SP", "iid", "1"]["bytes to 0.97"] == "1000000"
    assert found["SP", "iid", "2"]["rounds to 0.97"] == ""
    assert found["none", "iid", "1"]["rounds to 0.99"] == "3"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1}, "seed=1: 2 runs of lenet, mnist, 2 clients, iid, none"),
        ({"seed": 2, "rounds": 4}, "iid, none differ in rounds: None, 4"),
        (
            {"compressor.name": "sp", "optimizer.lr": 0.5},
            "iid, none and lenet, mnist, 2 clients, iid, SP differ in optimizer.lr: ",
        ),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    synthetic(tmp_path / "a", [0.5])
    synthetic(tmp_path / "b", [0.5], **settings)
    with pytest.raises(ReportError, match=re.escape(message)):
        fedavg(tmp_path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no summary.json of method=fedavg below"):
        fedavg(tmp_path)
    unnamed: dict[str, Any] = {"dataset.partition": None}
    synthetic(tmp_path / "a", [0.5], **unnamed)
    with pytest.raises(ReportError, match="a/config.yaml: no dataset.partition"):
        fedavg(tmp_path)


def test_the_table_of_small_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs on digits, from the run folders to the printed table."""
    monkeypatch.setattr(module, "TARGETS", (0.2, 0.999))
    job = ("method=fedavg", "clients=2", "rounds=3", "dataset.limit=300")
    totals = {}
    for name in ("none", "sp_auto"):
        folder = tmp_path / "runs" / name
        settings = settings_of(*job, f"compressor={name}", "compressor.values=float32")
        training.run(settings, folder)
        totals[name] = results.read_rows(folder)
    capsys.readouterr()
    arguments = ["report", "fedavg", str(tmp_path / "runs"), "--into"]
    monkeypatch.setattr("sys.argv", [*arguments, str(tmp_path / "kept")])
    main()
    printed = capsys.readouterr().out.splitlines()
    head = "| task | partition | compressor | seeds | top-1, % | rounds to 20% |"
    assert printed[0].startswith(head)
    assert len(printed) == 4
    assert (tmp_path / "kept/none/metrics.jsonl").exists()
    lines = (tmp_path / "kept/fedavg.csv").read_text().splitlines()
    for row, rows in zip(csv.DictReader(lines), totals.values(), strict=True):
        reached = [r["round"] for r in rows if r["top1"] >= 0.2]
        assert row["rounds to 0.2"] == str(reached[0] if reached else "")
        assert row["rounds to 0.999"] == ""
        assert float(row["top1"]) == pytest.approx(rows[-1]["top1"], abs=1e-4)
