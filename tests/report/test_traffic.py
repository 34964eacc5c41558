"""The table of everything that split learning sends, beside what it sends exactly."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from masksl import main as training
from masksl.report.__main__ import main
from masksl.report.tables import ReportError
from masksl.report.traffic import interval, traffic
from masksl.runtime import results
from tests.conftest import settings_of

NONE = {
    f"{slot}.name": "none"
    for slot in ("compressor", "gradient_compressor", "model_compressor")
}
COMPACT = {
    "compressor.name": "ec",
    "gradient_compressor.name": "ec",
    "gradient_compressor.step": 1.5,
    "model_compressor.name": "ec",
    "traffic": "compact",
}


def synthetic(folder: Path, top1: float, sent: int, **settings: Any) -> None:
    """Write a finished run with this accuracy, and bytes of activations."""
    given = {"dataset.name": "cifar10", "model.name": "resnet8", "clients": 10}
    given |= {"seed": 1, "cut": "medium", "client_sync": "round"} | NONE
    run = results.RunFolder(folder)
    run.write_config(json.dumps(given | settings) + "\n")
    up = {"activation": sent, "label": 10, "update": 5, "digest": 1}
    ways = {"training": {"up": up, "down": {"gradient": 2 * sent, "update": 2}}}
    ways["evaluation"] = {"down": {"model": 3, "buffer": 4}, "up": {}}
    row = {"round": 1, "steps": 1, "checks": [], "loss": 1, "top1": top1}
    run.add_row(row | {"bytes": ways})
    summary = {"method": "split", "rounds": 1, "bytes": ways}
    summary |= {"bytes_total": 3 * sent + 25, "top1": top1, "factor_total": 50.0}
    (folder / results.SUMMARY).write_text(json.dumps(summary))


def cells(folder: Path) -> dict[tuple[str, ...], list[str]]:
    """Return the cells of the table by cut, synchronisation and traffic."""
    lines = traffic(folder)["traffic.md"].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert {row[0] for row in rows} == {"resnet8, cifar10, 10 clients"}
    return {tuple(row[1:4]): row[4:] for row in rows}


# Quantiles of Student's t distribution at 97.5 %, from printed tables.
@pytest.mark.parametrize(
    ("count", "quantile"),
    [(2, 12.706), (3, 4.303), (5, 2.776), (12, 2.201), (31, 2.042), (1001, 1.962)],
)
def test_the_interval_is_student_s(count: int, quantile: float) -> None:
    values = [float(number % 2) for number in range(count)]
    mean, half = interval(values) or (0, 0)
    assert mean == pytest.approx(sum(values) / count)
    variance = sum((x - mean) ** 2 for x in values) / (count - 1)
    assert half == pytest.approx(quantile * (variance / count) ** 0.5, rel=3e-4)
    assert interval(values[:1]) is None and interval([]) is None


def test_differences_are_those_of_equal_seeds(tmp_path: Path) -> None:
    for seed, tops in enumerate(((0.80, 0.79), (0.70, 0.70), (0.75, 0.76)), 1):
        plain, small = tops
        synthetic(tmp_path / f"a{seed}", plain, 1000, seed=seed)
        synthetic(tmp_path / f"b{seed}", small, 10, seed=seed, **COMPACT)
    alone: dict[str, Any] = {**COMPACT, "seed": 7, "cut": "deep"}
    synthetic(tmp_path / "c", 0.5, 10, **alone)
    found = cells(tmp_path)
    assert list(found) == [
        ("medium", "round", "exact"),
        ("medium", "round", "compact"),
        ("deep", "round", "compact"),
    ]
    assert found["medium", "round", "compact"] == [
        *("3", "75.00 ± 4.58", "+0.00 ± 2.48", "0.00 ± 0.00", "0.00 ± 0.00"),
        *("0.00 ± 0.00", "0.00 ± 0.00", "55.0 ± 0.0", "50.0 ± 0.0"),
    ]
    assert found["medium", "round", "exact"][2] == "–"
    assert found["deep", "round", "compact"] == [
        *("1", "50.00", "–", "0.00", "0.00", "0.00", "0.00", "–", "50.0"),
    ]
    rows = list(csv.DictReader(traffic(tmp_path)["traffic.csv"].splitlines()))
    row = next(row for row in rows if row["traffic"] == "compact")
    kinds = ("activations", "gradients", "halves", "everything")
    assert [row[kind] for kind in kinds] == ["10", "20", "14", "55"]


def test_lines_are_named_by_their_compressors(tmp_path: Path) -> None:
    """A preset is a name only as long as no compressor is given another one."""
    null: dict[str, Any] = {"traffic": "null"}
    synthetic(tmp_path / "a", 0.5, 10, **null)
    for number, name in enumerate(("ms", "qu")):
        other: dict[str, Any] = {**null, "compressor.name": name}
        synthetic(tmp_path / f"b{number}", 0.5, 10, **other)
    mixed: dict[str, Any] = {**COMPACT, "compressor.name": "qu"}
    synthetic(tmp_path / "c", 0.5, 10, **mixed)
    claimed: dict[str, Any] = {"traffic": "exact", "compressor.name": "ec"}
    synthetic(tmp_path / "d", 0.5, 10, **claimed)
    finer: dict[str, Any] = {**COMPACT, "compressor.deadzone": 0.5}
    synthetic(tmp_path / "e", 0.5, 10, **finer)
    for number, error in enumerate((0.08, 0.15)):
        own = {**finer, "compressor.error": error, "gradient_compressor.step": 4.0}
        synthetic(tmp_path / f"f{number}", 0.5, 10, **own)
    assert [key[2] for key in cells(tmp_path)] == [
        *("exact", "compact", "EC, none, none", "MS, none, none", "QU, EC, EC"),
        *(
            "QU, none, none",
            "compact, compressor.error=0.15, gradient_compressor.step=4.0",
        ),
        "compact, gradient_compressor.step=4.0",
    ]


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no summary.json of method=split"):
        traffic(tmp_path)
    synthetic(tmp_path / "a", 0.5, 10)
    other: dict[str, Any] = {**COMPACT, "optimizer.lr": 0.2}
    synthetic(tmp_path / "b", 0.5, 10, **other)
    with pytest.raises(ReportError, match="differ in optimizer.lr"):
        traffic(tmp_path)


def test_the_table_of_real_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    job = ("rounds=1", "clients=2", "dataset.limit=60", "dataset.test_limit=20")
    for name in ("exact", "paper", "compact"):
        settings = settings_of(*job, f"traffic={name}", "client_sync=step")
        training.run(settings, tmp_path / "runs" / name)
    monkeypatch.setattr("sys.argv", ["report", "traffic", str(tmp_path / "runs")])
    main()
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split(" | ")[3] for line in lines if line.startswith("| small_cnn")]
    assert shown == ["exact", "paper", "compact"]
    rows = csv.DictReader((tmp_path / "runs/traffic.csv").read_text().splitlines())
    sent = {row["traffic"]: int(row["everything"]) for row in rows}
    for name, total in sent.items():
        summary = results.read_summary(tmp_path / "runs" / name)
        assert total == summary["bytes_total"]
    assert sent["exact"] > sent["paper"] > 5 * sent["compact"]
