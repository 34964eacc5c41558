"""What the tests share: composed settings, small runs, data made on the spot."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Tests fork beside the threads of gRPC, whose handlers of a fork can abort the child.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# A Ray hands the variables of its start on; see the fixture `order`.
os.environ["MASKSL_TEST_KILL"] = f"{tempfile.gettempdir()}/masksl-kill-{os.getpid()}"
# Threads that wait for each other in a loop take the cores from the tests beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# pylint: disable=wrong-import-position
import pytest
import torch

from masksl import client_app, config, dataset, server_app
from masksl.dataset import Spec, TensorImages
from masksl.engine.local import LocalGrid, open_grid
from masksl.methods.client import Client
from masksl.settings import Settings
from masksl.strategy import RoundStrategy

ROOT = Path(__file__).resolve().parents[1]
PAPER = "traffic=paper"


# Of these each says itself what travels.
_GROUPS = "traffic=", "method=", "contender=", "experiment="


def settings_of(*overrides: str) -> Settings:
    """Return the settings that the command line with these overrides makes.

    Where they do not say what travels, it is as in the paper, not as by default: exact
    gradients and client halves let most tests compare with training in one piece.
    """
    plain = [] if any(each.startswith(_GROUPS) for each in overrides) else [PAPER]
    return config.compose(["engine=local", *plain, *overrides])


@dataclass
class Training:
    """A run on the local engine, and what its observer was notified of."""

    grid: LocalGrid
    strategy: RoundStrategy
    losses: list[float] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def client(self, number: int) -> Client:
        return Client.of(self.grid.contexts[number + 1])

    def client_tensors(self, number: int) -> dict[str, torch.Tensor]:
        return self.client(number).state["model"]

    @property
    def server(self) -> Any:
        """The server side of the method."""
        return self.strategy.method

    @property
    def traffic(self) -> Any:
        """The traffic of the whole run."""
        return self.strategy.clients.ledger.total


def prepare(settings: Settings) -> Training:
    """Return a run whose clients are registered, before its first round."""
    grid = open_grid(client_app.app, int(settings["clients"]))

    class Recorder:
        def on_step(self, round_: int, step: int, steps: int, loss: float) -> None:
            training.losses.append(loss)

        def on_round(self, row: Any) -> None:
            training.rows.append(dict(row))

        def on_event(self, event: Any) -> None:
            training.events.append(dict(event))

    training = Training(grid, server_app.make_strategy(settings, Recorder()))
    training.strategy.register(grid)
    return training


def train(*overrides: str) -> Training:
    """Run a configuration to its end on the local engine."""
    settings = settings_of(*overrides)
    training = prepare(settings)
    for number in range(1, int(settings["rounds"]) + 1):
        training.strategy.run_round(training.grid, number, int(settings["rounds"]))
    return training


TIMED = ("wall_seconds", "train_seconds", "samples_per_second", "shares")


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of metrics without timed columns."""
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rows]


def processes(*words: str) -> list[str]:
    """Return the command lines with one of these words, without zombies.

    Those alone that were started here: tests of another copy may run at the same time.
    """
    listed = subprocess.run(
        ["ps", "-eww", "-o", "stat=,pid=,args="],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in listed.stdout.splitlines() if not line.startswith("Z")]
    found = [line for line in lines if any(word in line for word in words)]
    return [line for line in found if _folder(line.split()[1]) in (ROOT, Path.cwd())]


def _folder(pid: str) -> Path | None:
    """Return the folder in which a process runs, None if it has ended."""
    try:
        return Path(f"/proc/{pid}/cwd").readlink()
    except FileNotFoundError:
        return None


# Modules that take longest.
LONG = (
    *("tests/test_sweep.py", "tests/engine/test_ray.py", "tests/test_main.py"),
    *("tests/runtime/test_faults.py", "tests/methods/fedavg/test_fedavg_runs.py"),
    *("tests/engine/test_engines.py", "tests/engine/test_ray_access.py"),
    *("tests/test_examples.py", "tests/methods/split/test_split.py"),
)


def module_of(name: str) -> str:
    """Return the module of a test, whose tests run in one process: they share runs."""
    return name.split("::", 1)[0]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of modules first that take long."""
    modules = dict.fromkeys([*LONG, *(module_of(item.nodeid) for item in items)])
    places = {name: place for place, name in enumerate(modules)}
    items.sort(key=lambda item: places[module_of(item.nodeid)])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give whole modules to the processes of pytest-xdist, in their order."""
    # pylint: disable-next=import-outside-toplevel
    from xdist.scheduler import LoadScopeScheduling

    class Modules(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return module_of(nodeid)

    config.option.loadscopereorder = False
    return Modules(config, log)


@pytest.fixture(scope="session", autouse=True)
def toy_data() -> Iterator[None]:
    """Register ``toy``: random images of CIFAR's shape, enough for 20 steps of 8."""

    def load(_: dataset.DatasetConfig) -> tuple[TensorImages, TensorImages]:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (1000, 3, 32, 32), generator=generator)
        labels = torch.randint(0, 10, (1000,), generator=generator)
        pixels = images.to(torch.uint8)
        return TensorImages(pixels, labels), TensorImages(pixels[:40], labels[:40])

    half = (0.5, 0.5, 0.5)
    dataset.DATASETS["toy"] = Spec(load, 10, 3, 32, half, half, 4, True)
    yield
    del dataset.DATASETS["toy"]


@pytest.fixture
def order() -> Iterator[Path]:
    """Return the file whose lines say where processes are to be killed."""
    path = Path(os.environ["MASKSL_TEST_KILL"])
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Let every test draw the same numbers whenever it runs."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Return the folder of real CIFAR and MNIST that MASKSL_DATA names, else skip."""
    root = os.environ.get("MASKSL_DATA")
    if not root:
        pytest.skip("MASKSL_DATA does not name a folder with CIFAR-10 and MNIST")
    return Path(root)


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Return every device that is here in turn."""
    return request.param


def run_alone(module: str) -> None:
    """Run a module of tests in a process whose allocator gives everything back at once.

    So the memory of the process is that of what it holds.
    """
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
