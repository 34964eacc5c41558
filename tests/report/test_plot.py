"""Any two columns of the rows of runs."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from masksl.report.__main__ import main
from masksl.report.plot import labels_of, plot
from masksl.report.tables import ReportError
from masksl.runtime import results
from tests.report.test_report import synthetic

QU = {"compressor.name": "qu", "compressor.bits": 4, "sent": 250}


def table(folder: Path, x: str, y: str, **arguments: Any) -> list[dict[str, str]]:
    """Return the values that a plot writes beside the image."""
    *_, image, values = plot(folder, x, y, arguments.get("into"))
    assert Path(image).stat().st_size > 5_000
    return list(csv.DictReader(Path(values).read_text("utf-8").splitlines()))


def test_columns_of_all_runs_are_drawn(tmp_path: Path) -> None:
    synthetic(tmp_path / "a/none", [0.4, 0.6])
    synthetic(tmp_path / "qu", [0.3, 0.5, 0.7], **QU)
    rows = table(tmp_path, "sum:bytes", "top1")
    assert [list(row.values()) for row in rows] == [
        ["a/none", "compressor.name=none", "1000", "0.4"],
        ["a/none", "compressor.name=none", "2000", "0.6"],
        ["qu", "compressor.name=qu", "250", "0.3"],
        ["qu", "compressor.name=qu", "500", "0.5"],
        ["qu", "compressor.name=qu", "750", "0.7"],
    ]
    assert (tmp_path / "top1_by_sum_bytes.png").read_bytes().startswith(b"\x89PNG")
    nested = table(tmp_path, "round", "bytes.training.up.activation")
    assert [row["bytes.training.up.activation"] for row in nested] == [
        *("1000", "1000", "250", "250", "250")
    ]
    assert [row["bytes.training"] for row in table(tmp_path, "top1", "bytes.training")]


def test_a_round_without_a_value_is_a_gap(tmp_path: Path) -> None:
    synthetic(tmp_path, [0.4, 0.6])
    rows = results.read_rows(tmp_path)
    rows[0]["loss"] = None
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / results.METRICS).write_text(text)
    assert [row["loss"] for row in table(tmp_path, "round", "loss")] == ["", "1"]


def test_the_image_goes_where_it_should(tmp_path: Path) -> None:
    synthetic(tmp_path / "runs", [0.4, 0.6])
    for into, image in (
        ("new/figure.pdf", "new/figure.pdf"),
        ("new/v1.2", "new/v1.2/top1_by_round.png"),
        ("other", "other/top1_by_round.png"),
    ):
        table(tmp_path / "runs", "round", "top1", into=tmp_path / into)
        assert (tmp_path / image).exists()
        assert (tmp_path / image).with_suffix(".csv").exists()
    kept = {results.CONFIG, results.METRICS, results.SUMMARY}
    assert {path.name for path in (tmp_path / "runs").iterdir()} == kept


def test_runs_are_named_by_what_differs() -> None:
    base = {"seed": 1, "lr": 0.1, "compressor.name": "ms", "compressor.bits": 2}
    none = {"seed": 1, "lr": 0.1, "compressor.name": "none", "dataset.root": "/x"}
    assert labels_of([("a", base), ("b", none)]) == [
        *("compressor.name=ms", "compressor.name=none")
    ]
    runs = [("a", base), ("b", base | {"seed": 2}), ("c", base | {"lr": 1})]
    assert labels_of(runs) == ["seed=1, lr=0.1", "seed=2, lr=0.1", "seed=1, lr=1"]
    assert labels_of([("a", base), ("b", base)]) == ["(a)", "(b)"]
    assert labels_of([("a", base)]) == ["(a)"]


def test_what_is_not_shown_is_said(tmp_path: Path) -> None:
    synthetic(tmp_path / "done", [0.4, 0.6])
    synthetic(tmp_path / "going", [0.4], rounds=3, seed=2)
    (tmp_path / "going" / results.SUMMARY).unlink()
    synthetic(tmp_path / "other", [0.4], seed=3)
    path = tmp_path / "other" / results.METRICS
    path.write_text(path.read_text().replace('"loss": 1', '"loss": null'))
    lines = plot(tmp_path, "round", "loss", None)
    assert lines[:2] == [
        "going: not finished, 1 of 3 rounds",
        "other: left out, it has no loss",
    ]
    assert len(lines) == 4
    with open(tmp_path / "going" / results.METRICS, "a", encoding="utf-8") as file:
        file.write('{"round": 2, "lo')
    with pytest.raises(RuntimeError, match="going/metrics.jsonl, line 2: damaged"):
        plot(tmp_path, "round", "loss", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--x round --y top2", "--y 'top2': must be one of bytes, bytes.training, "),
        ("--x sum:rounds --y top1", "--x 'sum:rounds': must be one of bytes, "),
        ("--y top1", "--x not given: must be one of bytes, bytes.training, "),
        ("--x round --y top1 --into runs/qu/summary.json/x", "cannot be written: "),
    ],
)
def test_wrong_plots_are_one_line(
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    synthetic(tmp_path / "runs/qu", [0.4], **QU)
    for command, text in (
        (f"plot runs {arguments}", message),
        (f"plot runs/qu/none {arguments}", "folder='runs/qu/none': not a folder"),
        (f"runs runs {arguments}", "--x, --y: of plot alone, not of runs"),
    ):
        monkeypatch.setattr("sys.argv", ["report", *command.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert text in line
    assert not list((tmp_path / "runs").glob("*.*"))


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=f"no metrics.jsonl below {tmp_path}"):
        plot(tmp_path, "round", "top1", None)
