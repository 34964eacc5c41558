"""Transfer in pieces: their size, their checks, the extracted files."""

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SHIP = ROOT / "scripts/ship.py"


def ship(
    *arguments: object, cwd: Path, program: Path = SHIP
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(program), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_packed_files_are_unpacked_unchanged(tmp_path: Path) -> None:
    noise = random.Random(0).randbytes(2_500_000)
    (tmp_path / "data/inner").mkdir(parents=True)
    (tmp_path / "data/inner/noise").write_bytes(noise)
    (tmp_path / "notes.txt").write_text("some notes")
    done = ship("pack", "pieces", "data", "notes.txt", "--limit=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pieces = sorted((tmp_path / "pieces").glob("piece-*"))
    assert len(pieces) == 3
    assert all(piece.stat().st_size <= 1_000_000 for piece in pieces)
    copied = tmp_path / "pieces/ship.py"
    done = ship("unpack", "pieces", "there", cwd=tmp_path, program=copied)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "there/data/inner/noise").read_bytes() == noise
    assert (tmp_path / "there/notes.txt").read_text() == "some notes"

    done = ship("pack", "pieces", "notes.txt", cwd=tmp_path)
    assert done.stderr == "ship: pieces: is not empty\n"
    done = ship("pack", "more", "../notes.txt", cwd=tmp_path)
    assert "must be a path below the working directory" in done.stderr
    pieces[1].write_bytes(pieces[1].read_bytes()[:-1])
    done = ship("unpack", "pieces", "again", cwd=tmp_path)
    assert done.stderr == "ship: pieces/piece-001: cut short or altered\n"
    assert done.returncode == 1
    pieces[1].unlink()
    done = ship("unpack", "pieces", "again", cwd=tmp_path)
    assert done.stderr == "ship: pieces/piece-001: is missing\n"
    assert not (tmp_path / "again").exists()


def test_requirements_of_a_python_version_are_selected() -> None:
    spec = importlib.util.spec_from_file_location("ship", SHIP)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (
        'numpy==2.4.6 ; python_version == "3.11" \\\n    --hash=sha256:a\n'
        'numpy==2.5.5 ; python_version >= "3.12" \\\n    --hash=sha256:b\n'
        'colorama==0.4.6 ; sys_platform == "win32" \\\n    --hash=sha256:c\n'
        "torch==2.11.0 \\\n    --hash=sha256:d\n"
        "flwr==1.41.0 \\\n    --hash=sha256:e\n"
    )
    assert module.locked(text, "3.12") == (
        "numpy==2.5.5 \\\n    --hash=sha256:b\nflwr==1.41.0 \\\n    --hash=sha256:e\n"
    )
    assert module.locked(text, "3.11").startswith("numpy==2.4.6 ")


def test_the_code_is_packed(tmp_path: Path) -> None:
    done = ship("pack", tmp_path / "pieces", "--code", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    done = ship("unpack", tmp_path / "pieces", tmp_path / "there", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("masksl/main.py", "conf/base.yaml", "pyproject.toml"):
        packed = (tmp_path / "there" / name).read_bytes()
        shown = ["git", "show", f"HEAD:{name}"]
        head = subprocess.run(shown, cwd=ROOT, capture_output=True, check=True)
        assert packed == head.stdout


def test_wheels_need_poetry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "scripts/ship.py"
    program.parent.mkdir()
    program.write_bytes(SHIP.read_bytes())
    monkeypatch.setenv("PATH", "")
    done = ship("pack", "pieces", "--wheels=3.12", cwd=tmp_path, program=program)
    assert (
        done.stderr == "ship: --wheels 3.12: needs Poetry, which make setup installs\n"
    )
    assert not list((tmp_path / "pieces").iterdir())


@pytest.mark.slow
def test_a_dry_run_of_the_full_list(data_root: Path, tmp_path: Path) -> None:
    """Run two epochs in an unpacked copy and pack its results."""
    ship("pack", tmp_path / "pieces", "--code", cwd=ROOT)
    there = tmp_path / "there"
    done = ship("unpack", tmp_path / "pieces", there, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    overrides = (
        *("experiment=table1", "task=vgg19_cifar10", "seed=1", "cut=shallow,deep"),
        *("compressor=none,ms", "rounds=2", "dataset.limit=260", "threads.server=1"),
        *("dataset.test_limit=50", f"dataset.root={data_root.resolve()}"),
    )
    for command in (
        ("masksl.main", "--multirun", *overrides),
        ("masksl.report", "table1", "multirun/table1", "--into", "results/table1"),
        ("masksl.report", "figure3", "multirun/table1", "--into", "results/table1"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=there,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(there)},
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    ship("pack", "back", "results/table1", cwd=there)
    done = ship("unpack", there / "back", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = tmp_path / "here/results/table1"
    assert len(list(results.rglob("summary.json"))) == 3  # no compression once
    assert (results / "figure3.png").stat().st_size > 20_000
    assert (results / "table1.md").read_text().count("\n") == 2 + 3 * 2
