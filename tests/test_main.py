"""The program as a user runs it: commands, run folders, errors in one line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from masksl import cli, config, main
from masksl.runtime import results
from tests.conftest import PAPER, ROOT, settings_of

QUICK = (PAPER, "engine=local", "rounds=2", "clients=3", "dataset.limit=160")


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
    assert summary["factor_total"] > 14.5
    printed = figures_of(done.stdout)
    for page in ("README.md", "docs/running.md"):
        quoted = figures_of((ROOT / page).read_text(encoding="utf-8"))
        assert len(quoted) >= 4
        for label, figure in quoted.items():  # coded sizes depend on the processor
            assert printed[label] == pytest.approx(figure, rel=0.02), (page, label)


def figures_of(text: str) -> dict[str, float]:
    """Return the bytes and the factors in a run's table, by label."""
    lines = re.findall(r"^│ (.*?) +│ +([\d,]+) B │$", text, re.M)
    lines += re.findall(r"^│ (compression .*?) +│ +([\d.]+) │$", text, re.M)
    return {label: float(figure.replace(",", "")) for label, figure in lines}


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
        (
            (PAPER, "compressor.sparsity=1.5"),
            "compressor.sparsity=1.5: must be at least 0",
        ),
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
def test_errors_are_one_line(
    overrides: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ("engine=local", f"hydra.run.dir={tmp_path}", "hydra/job_logging=none")
    said = refusal((*more, *overrides), monkeypatch, capsys)
    assert said.startswith(f"masksl: {message}")


def refusal(
    arguments: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """Return what the program says of wrong arguments, run in this process."""
    monkeypatch.setattr(sys, "argv", ["masksl.main", *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # restores it, for `start` sets it
    with pytest.raises(SystemExit) as ended:
        cli.start(main.main, config.CONF)
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.out
    (line,) = said.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("nosuch=1", "nosuch=1: must be one of compressor, gradient_compressor, "),
        ("momentum=0.5", "momentum=0.5: must be a known name, near ones: optimizer.mo"),
        ("experimnt=table1", "experimnt=table1: must be a known name, near ones: exp"),
        ("optimizer.lrx=3", "optimizer.lrx=3: must be a known name, near ones: optimi"),
        ("optimizer.zz=3", "optimizer.zz=3: must be one of optimizer.name, optimizer"),
        ("hydra.nosuch=1", "hydra.nosuch=1: must be one of hydra.run, hydra.sweep, "),
        ("compressor.ratio=1", "compressor.ratio=1: must be "),
        ("+nosuch=1", "nosuch=1: must be one of rounds, evaluations, "),
        ("~nosuch", "~nosuch: must be one of compressor, "),
        ("~seed=1", "seed: must be deleted as ~seed=42, not as ~seed=1"),
        ("+rounds=3", "rounds=3: must be given without the +: the key exists"),
        ("+model=lenet", "model: must be given without the +: an option is chosen"),
        ("++model=lenet", "++model=lenet: must be given without the ++"),
        ("model=nosuch", "model=nosuch: must be one of conv10, conv4, "),
        ("model=", "model=: must be one of conv10, conv4, "),
        ("model=null", "model=null: must be one of conv10, conv4, "),
        ("model=3", "model=3: must be one of conv10, conv4, "),
        ("dataset=nosuch", "dataset=nosuch: must be one of cifar10, cifar100, "),
        ("task=nosuch", "task=nosuch: must be one of fast_cifar10, "),
        ("federation=nosuch", "federation=nosuch: must be one of paper, public_code"),
        ("experiment=nosuch", "experiment=nosuch: must be one of both_ways"),
        ("hydra/launcher=nosuch", "hydra/launcher=nosuch: must be one of basic, proc"),
        ("+x", "'+x': must be KEY=VALUE, +KEY=VALUE or ~KEY, with quotes"),
        ("rounds", "'rounds': must be KEY=VALUE, +KEY=VALUE or ~KEY"),
        ("a=b=c", "'a=b=c': must be KEY=VALUE, +KEY=VALUE or ~KEY"),
        ("rounds=[", "'rounds=[': must be KEY=VALUE, +KEY=VALUE or ~KEY"),
        ("rounds='", '"rounds=\'": must be KEY=VALUE, +KEY=VALUE or ~KEY'),
        (" ", "' ': must be KEY=VALUE, +KEY=VALUE or ~KEY"),
        ("rounds=1,2", "rounds=1,2: must be one value; a list has brackets"),
        ("rounds=range(1,3)", "rounds=range(1,3): must be given with --multirun"),
        ("plugins={a: 1}", "plugins={a: 1}: must be a value of another type (Cannot"),
        ("seed=${nope}", "seed: must be a value that can be resolved (Interpolation"),
        ("hydra.run.dir=${nope}", "hydra.run.dir: must be a value that can be"),
        ("hydra.run.dir=/proc/x", "/proc/x: cannot be written: "),
        (f"hydra.run.dir={__file__}/x", f"{__file__}/x: cannot be written: Not a dir"),
        ("hydra.job.chdir=x", "hydra.job.chdir=x: must be a value of another type"),
        ("model=" + "x" * 1000, "model=xxx"),
        ("hydra.searchpath=[file:///nosuch]", "hydra.searchpath=[file:///nosuch]: "),
        ("--nosuch", "--nosuch: must be one of --help, "),
        ("--multi-runn", "--multi-runn: must be a known name, near ones: --multirun"),
        ("--cfg=x", "--cfg/-c: invalid choice: 'x' (choose from"),
        ("--config-dir=/nosuch", "--config-dir='/nosuch': must be a folder"),
        ("--config-path=/nosuch", "--config-path='/nosuch': must be a folder"),
        ("--config-name=nosuch", "'nosuch': must be a file of the configuration"),
        ("--experimental-rerun=x", "--experimental-rerun='x': must be left out"),
        ("--resolve", "The --resolve flag can only be used in conjunction with"),
    ],
)
def test_hydras_errors_are_one_line(
    argument: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ("engine=local", f"hydra.run.dir={tmp_path}", "hydra/job_logging=none")
    said = refusal((*more, argument), monkeypatch, capsys)
    assert said.startswith(f"masksl: {message}")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("nosuch=1,2", "nosuch=1,2: must be one of compressor, "),
        ("model=small_cnn,nosuch", "model=small_cnn,nosuch: must be one of conv10, "),
        ("rounds=1,", "'rounds=1,': must be KEY=VALUE, "),
        ("rounds=0,1", "rounds=0: must be a whole number from 1 on"),
        ("hydra.sweep.dir=/proc/x", "/proc/x: cannot be written: "),
        ("hydra/sweeper=nosuch", "hydra/sweeper=nosuch: must be one of basic"),
    ],
)
@pytest.mark.parametrize("launcher", ["basic", "processes"])
def test_sweeps_are_refused_in_one_line(
    argument: str,
    message: str,
    launcher: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    groups = (f"hydra/launcher={launcher}", "hydra/job_logging=none")
    more = ("--multirun", "engine=local", f"hydra.sweep.dir={tmp_path}", *groups)
    said = refusal((*more, argument), monkeypatch, capsys)
    assert said.startswith(f"masksl: {message}")


def test_a_process_says_one_line_too(tmp_path: Path) -> None:
    """The process has a standard error of its own, and libraries that may use it."""
    for arguments, message in (
        (("model=nosuch",), "model=nosuch: must be one of conv10, "),
        (
            ("dataset=cifar10", "dataset.root=/nowhere", "dataset.download=false"),
            "dataset.root='/nowhere': cifar10 not found",
        ),
    ):
        done = masksl(*arguments, f"hydra.run.dir={tmp_path}")
        assert done.returncode == 1
        assert done.stderr.startswith(f"masksl: {message}")
        assert done.stderr.count("\n") == 1


def test_hydras_own_options_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # restores it, for `start` sets it
    for argument, text in (
        ("--help", "== Configuration groups =="),
        ("--cfg=job", "eval_batch_size: 256"),
        ("--info=searchpath", "Provider"),
        ("--hydra-help", "== Flags =="),
    ):
        arguments = ["masksl.main", argument, f"hydra.run.dir={tmp_path}"]
        monkeypatch.setattr(sys, "argv", arguments)
        try:
            cli.start(main.main, config.CONF)
        except SystemExit as ended:
            assert not ended.code
        said = capsys.readouterr()
        assert text in said.out
        assert not said.err
    done = masksl("--version")
    assert done.returncode == 0, done.stderr
    assert "Hydra 1.3" in done.stdout
    assert not done.stderr


def test_an_installed_package_asks_for_its_configuration(tmp_path: Path) -> None:
    """Only a checkout has conf/."""
    for folder in ("masksl", "hydra_plugins"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    done = subprocess.run(
        [sys.executable, "-m", "masksl.main", "rounds=1"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"masksl: conf='{tmp_path}/conf': must be a folder, ")
    assert "a checkout of the repository" in done.stderr
    assert done.stderr.count("\n") == 1


def mapped(process: subprocess.Popen[bytes], library: str) -> bool:
    """Return whether a process has loaded a library."""
    return library in Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("moment", "number", "word"),
    [
        ("imports", signal.SIGINT, "interrupted"),
        ("imports", signal.SIGHUP, "hung up"),
        ("rounds", signal.SIGTERM, "terminated"),
        pytest.param(
            *("imports", signal.SIGTERM, "terminated"), marks=pytest.mark.slow
        ),
        pytest.param(*("rounds", signal.SIGINT, "interrupted"), marks=pytest.mark.slow),
        pytest.param(*("rounds", signal.SIGHUP, "hung up"), marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_program_in_one_line(
    moment: str, number: signal.Signals, word: str, tmp_path: Path
) -> None:
    if moment == "imports" and not Path("/proc/self/maps").exists():
        pytest.skip("the moment is found in /proc")
    output = tmp_path / "output"
    command = [sys.executable, "-m", "masksl.main", *QUICK, "rounds=100000"]

    def reached() -> bool:
        if moment == "imports":
            return mapped(process, "libtorch_cpu")
        return "round 1/" in output.read_text(encoding="utf-8")

    with (
        open(output, "wb") as file,
        subprocess.Popen(
            [*command, f"hydra.run.dir={tmp_path}/run"],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.PIPE,
            # A shell's "&" may ignore SIGINT.
            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
        ) as process,
    ):
        assert process.stderr is not None
        deadline = time.monotonic() + 90
        while not reached() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(20) == 128 + number
        assert process.stderr.read() == f"masksl: {word}\n".encode()
    began = "round 1/" in output.read_text(encoding="utf-8")
    assert began == (moment == "rounds")


def test_folders_are_written_whole(tmp_path: Path) -> None:
    folder = results.RunFolder(tmp_path)
    folder.add_row({"round": 1})
    results.RunFolder(tmp_path)  # begins anew
    assert not (tmp_path / results.METRICS).exists()
