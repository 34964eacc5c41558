"""Measurements on activations, and the tables and figures made of results."""

import csv
import json
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch

from masksl import results
from masksl.bench import activations
from masksl.report.__main__ import main
from masksl.report.figure2 import _series, figure2
from masksl.report.runs import runs
from tests.test_main import QUICK, masksl


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the measurements of a network trained on 300 digits."""
    folder = tmp_path_factory.mktemp("figure2")
    network = activations.Network("small_cnn", "digits", 300, 0.05)
    result = activations.figure2(network, "data")
    activations.show_figure2(result)
    (folder / "digits.json").write_text(json.dumps(result))
    return folder


def test_figure2_measures_every_compressor_at_every_cut(measured: Path) -> None:
    result = json.loads((measured / "digits.json").read_text())
    assert result["network"]["images"] == 300
    errors: dict[tuple[str, int, str], float] = {}
    for row in result["rows"]:
        series = _series(row)
        if series in ("qu", "qq", "fp", "ms"):
            assert row["bits"] == pytest.approx(row["budget"], abs=0.05)
        if series in ("sp", "rt", "ms", "qu"):
            errors[row["cut"], row["budget"], series] = row["error"]
        if series == "ms context":
            assert row["bits"] < row["budget"]
            assert row["error"] == errors[row["cut"], row["budget"], "ms"]
    assert len(errors) == 3 * 6 * 4
    for cut in ("shallow", "medium", "deep"):
        for budget in range(3, 9):
            sent = {s: errors[cut, budget, s] for s in ("sp", "rt", "ms")}
            assert sent["ms"] < sent["sp"] < sent["rt"]
            if budget > 3:
                half = errors[cut, budget - 1, "qu"] / errors[cut, budget, "qu"]
                assert 1.8 < half < 2.5  # a bit more halves the error


def test_figure2_is_written_and_the_same_again(measured: Path) -> None:
    texts = figure2(measured)
    rows = list(csv.DictReader(texts["figure2.csv"].splitlines()))
    assert len(rows) == 3 * 6 * 9
    assert {row["cut"] for row in rows} == {"shallow", "medium", "deep"}
    assert all(float(row["norm"]) > 0 for row in rows)
    assert texts["figure2.md"].count("\n") == 2 + 3 * 8
    assert (measured / "figure2.png").stat().st_size > 20_000
    assert figure2(measured) == texts


def test_held_out_images_are_not_trained_on() -> None:
    network = activations.Network("small_cnn", "digits", None, 0.05)
    _, images, seen = activations.train(network, "data")
    assert len(images) == activations.HELD_OUT
    assert seen == 1437 - activations.HELD_OUT


def test_comparison_is_at_one_error() -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(32, 16, 16, 16, generator=generator).relu()
    rows = activations.compare(tensor)
    paper = rows[0]
    assert paper["share"] == pytest.approx(1, abs=0.01)
    for row in rows:
        if "error" in row["options"]:
            assert row["error_ratio"] == pytest.approx(1, abs=0.02)
        if "bits" in row["options"]:
            assert row["share"] == pytest.approx(1, abs=0.03)
            assert row["error_ratio"] < 0.5
    activations.show_targets([{"activation": "noise"} | row for row in rows])


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a sweep over two compressors and two seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    done = masksl(
        "--multirun",
        *(*QUICK, "rounds=1", "compressor=ms,qu", "seed=1,2"),
        f"hydra.sweep.dir={folder}",
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_runs_are_put_together_by_setting(sweep: Path) -> None:
    texts = runs(sweep)
    rows = list(csv.DictReader(texts["runs.csv"].splitlines()))
    assert [row["seeds"] for row in rows] == ["2", "2"]
    assert "compressor=ms" in rows[0]["setting"]
    assert "compressor=qu" in rows[1]["setting"]
    for row in rows:
        folder = sweep / row["setting"]
        found = [results.read_summary(folder / f"seed={seed}") for seed in (1, 2)]
        top1 = [100 * summary["top1"] for summary in found]
        assert float(row["top-1, %"]) == pytest.approx(fmean(top1), rel=1e-4)
        assert float(row["top-1, %, std"]) == pytest.approx(stdev(top1), abs=1e-4)
    assert texts["runs.md"].splitlines()[0].startswith("| setting | seeds | top-1, % |")


def test_reports_say_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, folder, text in (
        ("runs", tmp_path, f"no summary.json below {tmp_path}"),
        ("figure2", tmp_path, "no measurements of python -m masksl.bench in"),
        ("runs", tmp_path / "none", "none': not a folder"),
    ):
        monkeypatch.setattr("sys.argv", ["report", name, str(folder)])
        with pytest.raises(SystemExit):
            main()
        assert text in capsys.readouterr().err


def test_a_report_is_written_into_the_folder(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["report", "runs", str(sweep)])
    main()
    assert capsys.readouterr().out == (sweep / "runs.md").read_text()
    assert (sweep / "runs.csv").exists()
