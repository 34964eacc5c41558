"""The table of FLASH and its baselines: accuracy, densities and bytes by setting."""

import csv
import json
import re
import shutil
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from masksl import main as training
from masksl.report.__main__ import main
from masksl.report.flash import flash
from masksl.report.tables import ReportError
from masksl.runtime import results
from tests.conftest import ROOT, settings_of

KEYS: dict[str, Any] = {
    **{"method.name": "flash", "method.variant": "spdst", "method.density": 0.02},
    **{"method.hetero": "[]", "method.rest": "float32", "compressor.name": "none"},
    **{"model_compressor.name": "none", "dataset.name": "digits", "clients": 4},
    **{"dataset.partition": "dirichlet_equal", "dataset.alpha": 1.0, "seed": 1},
    **{"model.name": "small_cnn", "compressor.values": "float32"},
}
TASK = "small_cnn, digits, 4 clients, dirichlet_equal 1"
DENSE = {"method.variant": "dense"}
JMWST = {"method.variant": "jmwst"}
COMPACT = {
    **{"compressor.name": "ec", "compressor.error": 0.25},
    **{"model_compressor.name": "qu", "method.rest": "bfloat16"},
}
Rows = list[dict[str, str]]


def synthetic(
    folder: Path, tops: list[float], more: dict[str, Any], *, sent: int = 1000
) -> None:
    """Write a run in which two clients a round get and send so many bytes each.

    There is a first stage of 60 bytes, and nothing but a mask of 10 bytes comes down in
    the first round. The averaged model of ``jmwst`` is 0.01 better in even rounds, and
    not tested in others.
    """
    settings = KEYS | {"rounds": len(tops)} | more
    run = results.RunFolder(folder)
    run.write_config(json.dumps(settings) + "\n")
    for number, top1 in enumerate(tops, 1):
        up, down = {"model": 2 * sent}, {"mask": 20}
        counts = {"up": {"model": 2}, "down": {"mask": 2}}
        if number == 1:
            up["counts"], counts["up"]["counts"] = 60, 1
        else:
            down["model"], counts["down"]["model"] = 2 * sent, 2
        row = {"round": number, "steps": 1, "checks": [], "loss": 1.0, "top1": top1}
        row |= {"density": 0.05 - number / 1000, "density_masked": 0.02}
        row |= {"overlap": 0.5 + number / 100, "messages": {"training": counts}}
        if settings["method.variant"] == "jmwst" and number % 2 == 0:
            row["top1_union"] = top1 + 0.01
        run.add_row(row | {"bytes": {"training": {"up": up, "down": down}}})
    summary = {"method": settings["method.name"], "rounds": len(tops)}
    summary |= {"top1": tops[-1], "bytes_total": 0}
    (folder / results.SUMMARY).write_text(json.dumps(summary))


def tables(text: str) -> list[Rows]:
    """Return the lines of each table, cells by heading."""
    found = []
    for part in text.split("\n\n"):
        lines = [line.strip("| ").split(" | ") for line in part.splitlines()]
        found.append([dict(zip(lines[0], line, strict=True)) for line in lines[2:]])
    return found


def column(folder: Path, name: str, **options: Any) -> list[str]:
    """Return a column of the first table."""
    return [row[name] for row in tables(flash(folder, **options)["flash.md"])[0]]


TOPS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]


@pytest.mark.parametrize(
    ("every", "top1", "averaged"),
    [
        (1, (0.5 + 0.6 + 0.7) / 3, 0.01 / 3),
        (2, (0.4 + 0.6 + 0.7) / 3, 0.02 / 3),
        (3, (0.3 + 0.6 + 0.7) / 3, 0.01 / 3),
        (5, (0.5 + 0.7) / 2, 0.0),  # the last round is a test, too
        (7, 0.7, 0.0),
        (9, 0.7, 0.0),
    ],
)
def test_accuracy_is_the_mean_of_the_last_three_tests(
    every: int, top1: float, averaged: float, tmp_path: Path
) -> None:
    """Where the averaged model is not tested, it is the masked one."""
    synthetic(tmp_path / "a", TOPS, JMWST)
    text = f"{100 * top1:.2f}"
    assert column(tmp_path, "top-1, %", every=every) == [text]
    text = f"{100 * (top1 + averaged):.2f}"
    assert column(tmp_path, "top-1 averaged, %", every=every) == [text]


def test_a_line_of_the_table(tmp_path: Path) -> None:
    """Means over seeds; bytes of two clients and rounds; factors of the dense runs."""
    synthetic(tmp_path / "a", [0.1, 0.2], {})
    synthetic(tmp_path / "b", [0.1, 0.4], {"seed": 2}, sent=2000)
    synthetic(tmp_path / "c", [0.9, 0.9], DENSE, sent=50_000)
    (dense, line), _ = tables(flash(tmp_path, by_round=True)["flash.md"])
    factors = [(6 * 50_000 + 100) / (6 * sent + 100) for sent in (1000, 2000)]
    assert line == {
        **{"task": TASK, "setting": "spdst", "density": "0.02", "seeds": "2"},
        **{"top-1, %": "30.00 ± 14.14", "top-1 averaged, %": "–"},
        **{"averaged density": "0.0480 ± 0.0000", "overlap": "0.520 ± 0.000"},
        "masked density": "0.0200 ± 0.0000",
        "up, bytes": "1,515 ± 707",  # with 60 bytes of the first stage
        "down, bytes": "760 ± 354",  # no model in the first round
        "factor": f"{fmean(factors):.1f} ± {stdev(factors):.1f}",
    }
    assert line["factor"] == "37.0 ± 17.2"
    assert (dense["setting"], dense["density"], dense["factor"]) == (
        "dense",
        "1",
        "1.0",
    )


def test_lines_are_settings_and_densities(tmp_path: Path) -> None:
    hetero = {"method.hetero": "[0.5, 1.0]"}
    settings: list[dict[str, Any]] = [
        *(JMWST, {}, {"method.density": 0.05}, {"method.variant": "pdst"}, DENSE),
        *(COMPACT, COMPACT | {"seed": 2}, COMPACT | hetero, hetero),
        *({"compressor.values": "float16"}, {"method.variant": "nst"}),
    ]
    for place, more in enumerate(settings):
        synthetic(tmp_path / f"{place}", [0.5], more)
    rows, _ = tables(flash(tmp_path, by_round=True)["flash.md"])
    assert [(row["setting"], row["density"], row["seeds"]) for row in rows] == [
        ("dense", "1", "1"),
        ("nst", "0.02", "1"),
        ("pdst", "0.02", "1"),
        ("spdst", "0.02", "1"),
        ("spdst, ec/qu, bfloat16", "0.02", "2"),
        ("spdst, float16/none", "0.02", "1"),
        ("spdst, hetero", "0.02", "1"),
        ("spdst, hetero, ec/qu, bfloat16", "0.02", "1"),
        ("jmwst", "0.02", "1"),
        ("spdst", "0.05", "1"),
    ]
    assert (tmp_path / "flash.png").stat().st_size > 10_000


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    """What differs between two settings of other names is not."""
    fma = {"method.hetero": "[0.5, 1.0]", "method.aggregate": "fma"}
    synthetic(tmp_path / "a", [0.5], JMWST | {"method.interval": 1})
    synthetic(tmp_path / "b", [0.5], JMWST | {"method.interval": 5})
    synthetic(tmp_path / "c", [0.5], {"method.aggregate": "fedavg"})
    synthetic(tmp_path / "d", [0.5], fma)
    synthetic(tmp_path / "e", [0.5], COMPACT | {"model_compressor.bits": 8})
    synthetic(tmp_path / "f", [0.5], COMPACT | {"model_compressor.bits": 4})
    synthetic(tmp_path / "g", [0.5], DENSE)
    synthetic(tmp_path / "h", [0.5], DENSE | {"method.density": 0.05})
    assert column(tmp_path, "setting") == [
        *("dense, density 0.02", "dense, density 0.05", "spdst"),
        *(f"spdst, ec/qu, bfloat16, down bits {bits}" for bits in (4, 8)),
        *("spdst, hetero", "jmwst, interval 1", "jmwst, interval 5"),
    ]


def test_factors_need_a_dense_run_of_the_task_without_loss(tmp_path: Path) -> None:
    other = {"dataset.alpha": 1000.0}
    synthetic(tmp_path / "a", [0.5], {})
    synthetic(tmp_path / "b", [0.5], DENSE | COMPACT)
    synthetic(tmp_path / "c", [0.5], other)
    synthetic(tmp_path / "d", [0.5], DENSE | other)
    assert column(tmp_path, "task") == [TASK] * 2 + [f"{TASK}000"] * 2
    assert column(tmp_path, "factor") == ["–", "–", "1.0", "1.0"]


def test_rounds(tmp_path: Path) -> None:
    synthetic(tmp_path / "a", [0.1, 0.2], JMWST)
    synthetic(tmp_path / "b", [0.3, 0.4], JMWST | {"seed": 2}, sent=2000)
    _, rows = tables(flash(tmp_path, by_round=True)["flash.md"])
    start = {"task": TASK, "setting": "jmwst", "density": "0.02", "seeds": "2"}
    start |= {"masked density": "0.0200 ± 0.0000", "down mask, bytes": "10 ± 0"}
    assert rows == [
        {
            **start,
            **{"round": "1", "top-1, %": "20.00 ± 14.14", "top-1 averaged, %": "–"},
            **{"averaged density": "0.0490 ± 0.0000", "overlap": "0.510 ± 0.000"},
            **{"up counts, bytes": "30 ± 0", "up model, bytes": "1,500 ± 707"},
            **{"down model, bytes": "0 ± 0"},
        },
        {
            **start,
            **{"round": "2", "top-1, %": "30.00 ± 14.14"},
            **{"top-1 averaged, %": "31.00 ± 14.14"},
            **{"averaged density": "0.0480 ± 0.0000", "overlap": "0.520 ± 0.000"},
            **{"up counts, bytes": "0 ± 0", "up model, bytes": "1,500 ± 707"},
            **{"down model, bytes": "1,500 ± 707"},
        },
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, f"seed=1: 2 runs of {TASK}, spdst, density 0.02"),
        ({"seed": 2, "batch_size": 8}, "differ in batch_size: None, 8"),
        (JMWST | {"optimizer.lr": 1}, "differ in optimizer.lr: "),
        ({"method.variant": None}, "b/config.yaml: no method.variant"),
        ({"rounds": 3}, "b/metrics.jsonl: 2 rows, rounds=3 by config.yaml"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    synthetic(tmp_path / "a", [0.3, 0.4], {})
    synthetic(tmp_path / "b", [0.3, 0.4], more)
    with pytest.raises(ReportError, match=re.escape(message)):
        flash(tmp_path)
    assert not list(tmp_path.glob("*.*")), "nothing is written"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    synthetic(tmp_path / "a", [0.3], {"method.name": "fedavg"})
    with pytest.raises(ReportError, match="no summary.json of method=flash below"):
        flash(tmp_path)
    synthetic(tmp_path / "b", [0.3], {})
    file = tmp_path / "b" / results.METRICS
    file.write_text(file.read_text().replace('"overlap"', '"overlaps"'))
    with pytest.raises(ReportError, match="b/metrics.jsonl, line 1: no overlap$"):
        flash(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("flash {} --every 0", "--every 0: must be a whole number from 1 on"),
        ("runs {} --every 5", "--every, --by-round: of flash alone, not of runs"),
        ("plot {} --by-round", "--every, --by-round: of flash alone, not of plot"),
        ("flash {} --x round", "--x, --y: of plot alone, not of flash"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    synthetic(tmp_path / "a", [0.3], {})
    monkeypatch.setattr("sys.argv", ["report", *arguments.format(tmp_path).split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"masksl: {message}\n"


SMALL = (
    *("method=flash", "model=small_cnn", "rounds=2", "clients=3", "dataset.limit=60"),
    *("dataset.test_limit=40", "threads.server=1", "method.warmup_epochs=1"),
    *("batch_size=10", "method.density=0.05"),
)


def test_the_table_of_small_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the run folders to the printed tables; bytes are those of the summaries."""
    runs, into = tmp_path / "runs", tmp_path / "into"
    coded = ("contender=flash_jmwst_compact", *SMALL[1:])
    job = {
        "dense": (*SMALL, "method.variant=dense"),
        "jmwst": (*SMALL, "method.variant=jmwst"),
        "coded": coded,
    }
    for name, overrides in job.items():
        training.run(settings_of(*overrides), runs / name)
    capsys.readouterr()
    command = ["report", "flash", str(runs), "--by-round", "--into", str(into)]
    monkeypatch.setattr("sys.argv", command)
    main()
    printed = capsys.readouterr().out
    assert printed == (into / "flash.md").read_text()
    lines, rounds = tables(printed)
    assert [line["setting"] for line in lines] == [
        *("dense", "jmwst", "jmwst, ec/qu, bfloat16")
    ]
    whole = results.read_summary(runs / "dense")["bytes_total"]
    for name, line in zip(job, lines, strict=True):
        summary = results.read_summary(runs / name)
        rows = results.read_rows(runs / name)
        assert line["up, bytes"] == f"{summary['bytes_up']:,.0f}"
        assert line["down, bytes"] == f"{summary['bytes_down']:,.0f}"
        assert line["factor"] == f"{whole / summary['bytes_total']:.1f}"
        assert line["overlap"] == f"{summary['overlap']:.3f}"
        assert line["averaged density"] == f"{summary['density']:.4f}"
        assert line["top-1, %"] == f"{100 * rows[-1]['top1']:.2f}"
        assert (line["top-1 averaged, %"] == "–") == (name == "dense")
    assert len(rounds) == 6
    with open(into / "flash.csv", encoding="utf-8") as file:
        figures = list(csv.DictReader(file))
    sums: dict[str, int] = {}
    for row in figures:
        sent = sum(int(row[key]) for key in row if key.startswith("bytes "))
        sums[row["setting"]] = sums.get(row["setting"], 0) + sent
        assert row["uploads"] == "3"
    totals = [results.read_summary(runs / name)["bytes_total"] for name in job]
    assert list(sums.values()) == totals


# --- what is committed ----------------------------------------------------------------

FOLDERS = ["flash_digits", "flash_cifar10_small", "flash_compact"]


def lines_of(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the rows of settings below a heading of a page."""
    text = (ROOT / page).read_text(encoding="utf-8").split(heading)[1]
    rows = re.findall(r"(?m)^\| ((?:dense|nst|pdst|spdst|jmwst).*) \|$", text)
    return [row.split(" | ") for row in rows]


@pytest.mark.parametrize("folder", FOLDERS)
def test_committed_tables_come_out_again(folder: str, tmp_path: Path) -> None:
    shown = ROOT / "results" / folder
    shutil.copytree(shown, tmp_path / folder)
    for name, text in flash(tmp_path / folder).items():
        assert text == (shown / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("page", "heading", "rows"),
    [("README.md", "**FLASH:**", 3), ("docs/methods/flash.md", "## Results", 17)],
)
def test_pages_show_figures_of_committed_tables(
    page: str, heading: str, rows: int
) -> None:
    """Each cell of a row is in the line of that setting in one of the tables."""
    tables = [ROOT / "results" / folder / "flash.md" for folder in FOLDERS]
    lines = [line for table in tables for line in table.read_text().splitlines()]
    found = lines_of(page, heading)
    assert len(found) == rows
    for setting, *cells in found:
        own = "\n".join(line for line in lines if f" | {setting} | " in line)
        figures = [figure for cell in cells for figure in cell.split(", ")]
        for figure in figures:
            assert figure == "=" or figure in own, (page, setting, figure)
