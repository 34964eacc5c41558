"""The program as a user runs it: commands, run folders, errors in one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from masksl.runtime import results
from tests.conftest import ROOT, settings_of

QUICK = ("engine=local", "rounds=2", "clients=3", "dataset.limit=160")


def masksl(*overrides: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "masksl.main", *overrides]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300
    )


def test_a_run_leaves_its_folder(tmp_path: Path) -> None:
    done = masksl(*QUICK, f"hydra.run.dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    assert f"run folder: {folder}" in done.stdout
    assert "compression factor of activations" in done.stdout
    assert "training, up, activation" in done.stdout
    assert "samples/s" in done.stdout
    settings = yaml.safe_load((folder / results.CONFIG).read_text())
    expected = settings_of(*QUICK)
    expected["dataset.root"] = str(ROOT / "data")
    assert settings == expected
    rows = results.read_rows(folder)
    assert [row["round"] for row in rows] == [1, 2]
    summary = results.read_summary(folder)
    assert summary["rounds"] == 2
    assert summary["top1"] == rows[-1]["top1"] <= summary["best_top1"] <= 1
    sums: dict[str, int] = {}
    for row in rows:
        for phase, directions in row["bytes"].items():
            for direction, kinds in directions.items():
                for kind, sent in kinds.items():
                    key = f"{phase} {direction} {kind}"
                    sums[key] = sums.get(key, 0) + sent
    assert summary["bytes_total"] == sum(sums.values())
    assert summary["paper_bytes"] == sum(
        sent for key, sent in sums.items() if key.endswith("up activation")
    )
    assert summary["link_seconds"] == pytest.approx(
        sum(row["link_seconds"] for row in rows)
    )
    assert summary["samples_per_second"] > 0
    assert sum(summary["shares"].values()) == pytest.approx(1)
    png = (folder / results.CURVES).read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000


def test_the_default_job_reaches_95_percent(tmp_path: Path) -> None:
    """All of it, Ray included; how long it may take is for the README."""
    done = masksl(f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    summary = results.read_summary(tmp_path)
    assert summary["top1"] >= 0.95
    assert 13.6 < summary["compression_factor"] < 13.8
    printed = " ".join(done.stdout.split())
    for page in ("README.md", "docs/running.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        quoted = re.findall(r"^│.* [\d,]+ B │$|^│ compression .*$", text, re.M)
        assert len(quoted) >= 4
        for line in quoted:
            assert " ".join(line.split()) in printed, (page, line)


def test_multirun_sweeps(tmp_path: Path) -> None:
    done = masksl(
        "--multirun",
        *QUICK,
        "rounds=1",
        "compressor=ms,sp",
        "seed=1,2",
        f"hydra.sweep.dir={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    summaries = {
        path.parent.relative_to(tmp_path).as_posix(): json.loads(path.read_text())
        for path in tmp_path.rglob(results.SUMMARY)
    }
    assert len(summaries) == 4
    assert {summary["compressor"] for summary in summaries.values()} == {"ms", "sp"}
    parents = {Path(name).parent.as_posix() for name in summaries}
    assert len(parents) == 2, "the seeds of one setting lie side by side"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("compressor.sparsity=1.5",), "compressor.sparsity=1.5: must be at least 0"),
        (("cut=7",), "cut=7: must be shallow, medium, deep or a whole number"),
        (("clients=5000",), "clients=5000: must be at most 1437"),
        (
            ("dataset=cifar10", "dataset.root=/nowhere/x", "dataset.download=false"),
            "dataset.root='/nowhere/x': cifar10 not found, looked for",
        ),
        (
            (*QUICK, "optimizer.lr=1e30"),
            "round 1, step 1, client 0, gradient_compressor none: none: ",
        ),
    ],
)
def test_errors_are_one_line(overrides: tuple[str, ...], message: str) -> None:
    environment = os.environ | {"COLUMNS": "200"}
    command = [sys.executable, "-m", "masksl.main", *overrides]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"masksl: {message}")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout + done.stderr


def test_unknown_keys_keep_hydras_message() -> None:
    done = masksl("compressor.ratio=0.5")
    assert done.returncode != 0
    assert "Key 'ratio' is not in struct" in done.stderr


def test_folders_are_written_whole(tmp_path: Path) -> None:
    folder = results.RunFolder(tmp_path)
    folder.add_row({"round": 1})
    results.RunFolder(tmp_path)  # begins anew
    assert not (tmp_path / results.METRICS).exists()
