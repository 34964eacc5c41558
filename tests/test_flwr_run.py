"""``flwr run``: a configuration from conf/ in the bundle, on a local SuperLink."""

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import pytest
from flwr.app import Context, RecordDict
from flwr.cli.build import build_fab_from_disk

from masksl import client_app, server_app
from masksl.engine.local import open_grid
from tests.conftest import ROOT, train

FLWR = Path(sys.executable).with_name("flwr")
OVERRIDES = 'overrides="rounds=1 traffic=paper compressor=qu federation=paper"'


@pytest.fixture
def home(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Return an environment with a Flower home of its own; end its SuperLink."""
    superlink = f"flower-superlink.*{tmp_path}"
    if subprocess.run(["pgrep", "-f", "flower-superlink"], check=False).returncode == 0:
        pytest.skip("a local SuperLink is running already, and there can be one only")
    environment = os.environ | {
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{FLWR.parent}{os.pathsep}{os.environ['PATH']}",
    }
    (tmp_path / "flwr").mkdir()
    yield environment
    assert subprocess.run(["pkill", "-f", superlink], check=False).returncode == 0
    deadline = time.monotonic() + 10
    while subprocess.run(["pgrep", "-f", superlink], check=False).returncode == 0:
        assert time.monotonic() < deadline, "the SuperLink does not end"
        time.sleep(0.1)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a copy of what `flwr` bundles."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("masksl", "conf", "hydra_plugins"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


COMPOSED = """
import sys
from masksl import config, dataset, server_app
settings = config.compose(
    ["engine=flower", *config.split_overrides({"overrides": sys.argv[1]})]
)
print(server_app.__file__, settings["engine.name"], settings["compressor.name"])
print(len(dataset.load(dataset.DatasetConfig()).train.labels))
"""


def test_a_bundle_has_all_that_a_run_needs(project: Path, tmp_path: Path) -> None:
    """The sources, the configuration and the digits; it composes alone."""
    bundle = tmp_path / "bundle"
    with ZipFile(BytesIO(build_fab_from_disk(project))) as archive:
        archive.extractall(bundle)
    for kind in ("masksl/**/*.py", "conf/**/*.yaml"):
        sources = {path.relative_to(project) for path in project.glob(kind)}
        assert sources == {path.relative_to(bundle) for path in bundle.glob(kind)}
    done = subprocess.run(
        [sys.executable, "-c", COMPOSED, "rounds=1 compressor=qu federation=paper"],
        cwd=bundle,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    composed = f"{bundle}/masksl/server_app.py flower qu\n1437\n"
    assert done.stdout == composed


def test_a_run_that_fails_says_so_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Flower logs what the ServerApp raises, with its traceback."""
    context = Context(1, 0, {}, RecordDict(), {"overrides": "rounds=0"})
    with pytest.raises(server_app.RunFailed) as caught:
        server_app.app(open_grid(client_app.app, 1), context)
    logging.getLogger("flwr").error("failed", exc_info=caught.value)
    text = logging.Formatter().format(caplog.records[-1])
    failed = "rounds=0: must be a whole number from 1 on"
    assert text == f"failed\nmasksl.server_app.RunFailed: {failed}"


@pytest.mark.slow
def test_flwr_run_composes_the_configuration(
    home: dict[str, str], project: Path
) -> None:

    def flwr(*arguments: str) -> str:
        done = subprocess.run(
            [str(FLWR), *arguments],
            cwd=project,
            env=home,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    federation = ("@none/default", "local", "--num-supernodes", "10")
    flwr("federation", "simulation-config", *federation)
    printed = flwr("run", ".", "--stream", "--run-config", OVERRIDES)
    row = train("rounds=1", "compressor=qu", "federation=paper").rows[0]
    assert f"round 1/1: top-1 {row['top1']:.2%}, training loss {row['loss']:.4f}" in (
        printed
    )
    sent = row["bytes"]["training"]["up"]["activation"]
    assert f"{sent:,} B" in printed
    assert len(list(project.glob("outputs/*/*/summary.json"))) == 1
