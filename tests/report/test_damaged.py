"""Reports from run folders with damaged files: one line that names the file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from masksl.report.__main__ import PLOT, REPORTS, main
from masksl.runtime import results
from tests.report.test_report import synthetic

Reporter = Callable[..., str]


@pytest.fixture(name="report")
def fixture_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Reporter:
    """Return a function that runs a command and returns its one error line."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["report", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        return str(line)

    return run


@pytest.fixture(name="runs")
def fixture_runs(tmp_path: Path) -> Path:
    """Return a folder with a run without compression and one with it."""
    synthetic(tmp_path / "runs/none", [0.4, 0.6, 0.7])
    synthetic(tmp_path / "runs/qu", [0.4, 0.5, 0.6], **{"compressor.name": "qu"})
    return tmp_path / "runs"


DAMAGES: dict[str, Callable[[str], str | None]] = {
    "cut short": lambda text: text[: len(text) * 2 // 3],
    "empty": lambda text: "",
    "a list": lambda text: "[]\n",
    "no keys": lambda text: "{}\n",
    "not text": lambda text: "\x00\udcff",
    "missing": lambda text: None,
}
ROWS: dict[str, Callable[[str], str]] = {
    "a row less": lambda text: "".join(text.splitlines(keepends=True)[:-1]),
    "a row twice": lambda text: text.splitlines(keepends=True)[0] + text,
    "the last row cut": lambda text: text[:-30],
    "a row without a key": lambda text: text.replace('"steps": 4, ', "", 1),
}
COMMANDS = [name for name in REPORTS if name != "figure2"] + [PLOT]


def arguments_of(name: str, folder: Path) -> list[str]:
    """Return the command line of a report."""
    return [name, str(folder), *(["--x", "round", "--y", "top1"] * (name == PLOT))]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("file", [results.CONFIG, results.METRICS, results.SUMMARY])
@pytest.mark.parametrize("how", [*DAMAGES, *ROWS])
def test_a_damaged_file_is_named(
    name: str, file: str, how: str, runs: Path, report: Reporter
) -> None:
    if how in ROWS and file != results.METRICS:
        return
    if how == "missing" and file == results.SUMMARY:
        return  # a run that is not finished
    path = runs / "qu" / file
    text = (DAMAGES | ROWS)[how](path.read_text())
    path.unlink()
    if text is not None:
        path.write_text(text, errors="surrogateescape")
    if name == PLOT and text is None and file == results.METRICS:
        return  # a folder without rows is no run
    line = report(*arguments_of(name, runs))
    assert line.startswith(f"masksl: {path}")
    assert not list(runs.glob("*.*")), "nothing is written"


@pytest.mark.parametrize("file", [results.CONFIG, results.METRICS, results.SUMMARY])
def test_nothing_is_copied_from_damaged_runs(
    file: str, runs: Path, report: Reporter, tmp_path: Path
) -> None:
    (runs / "qu" / file).write_text("[]\n")
    line = report("runs", str(runs), "--into", str(tmp_path / "into"))
    assert line.startswith(f"masksl: {runs / 'qu' / file}")
    assert not (tmp_path / "into").exists()


def test_a_summary_alone_is_a_row_of_the_table_of_runs(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (results.CONFIG, results.METRICS):
        (runs / "qu" / file).unlink()
    monkeypatch.setattr("sys.argv", ["report", "runs", str(runs)])
    main()
    assert len((runs / "runs.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("how", ["cut short", "empty", "a list", "no keys", "no norm"])
def test_damaged_measurements_are_named(
    how: str, tmp_path: Path, report: Reporter
) -> None:
    keys = ("cut", "shape", "compressor", "options", "budget", "bits", "error")
    network = {"model": "small_cnn", "dataset": "digits", "images": 3}
    content = {"network": network, "rows": [dict.fromkeys(keys, 1)]}
    text = json.dumps(content)
    if how in DAMAGES:
        text = DAMAGES[how](text) or ""
    (tmp_path / "one.json").write_text(text)
    line = report("figure2", str(tmp_path))
    assert line.startswith(f"masksl: {tmp_path}/one.json: damaged or cut short (")


def test_reports_that_cannot_be_written_are_one_line(
    runs: Path, report: Reporter
) -> None:
    (runs / "runs.md.part").symlink_to("/dev/full")
    line = report("runs", str(runs))
    path = runs / "runs.md"
    assert line == f"masksl: {path}: cannot be written: No space left on device"
    (runs / "file").write_text("")
    line = report("runs", str(runs / "none"), "--into", str(runs / "file/into"))
    assert line.startswith(f"masksl: {runs}/file/into")
    assert line.endswith("cannot be written: Not a directory")
