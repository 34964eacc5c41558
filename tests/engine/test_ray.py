"""The Ray engine: same rows for any number of hosts, and no processes left."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from masksl import config, main
from masksl.engine import EngineError, Shared, packing, ray_access, ray_session
from masksl.engine.options import RayOptions
from masksl.engine.ray import RayGrid, host_specs
from masksl.runtime import results
from tests.conftest import PAPER, ROOT, settings_of, train, untimed
from tests.engine.ray_runs import left_behind, ray_folder

SMALL = ("rounds=2", "clients=5", "dataset.limit=230", "dataset.test_limit=60")


@pytest.fixture(scope="module", autouse=True)
def end_ray() -> Iterator[None]:
    """Shut Ray down after the tests of this module."""
    yield
    ray_session.stop()


def run(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    main.run(settings_of("engine=ray", *overrides), folder)
    return untimed(results.read_rows(folder))


@pytest.mark.parametrize(
    ("hosts", "overrides"),
    [
        pytest.param(1, ("client_sync=round",), marks=pytest.mark.slow),
        pytest.param(2, ("client_sync=step",), marks=pytest.mark.slow),
        pytest.param(
            *(2, ("client_sync=never", "dataset.partition=dirichlet")),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(3, ("client_sync=never", "dataset.partition=dirichlet")),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(7, ("fraction=0.5", "client_sync=step", "gradient_compressor=qu")),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_hosts_change_nothing(
    hosts: int, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    rows = run(tmp_path, *SMALL, *overrides, f"engine.hosts={hosts}")
    assert rows == untimed(train(*SMALL, *overrides).rows)
    assert sum(row["rebuilt_graphs"] for row in rows) == 0


@pytest.mark.slow
def test_graphs_beyond_the_limit_are_rebuilt(tmp_path: Path) -> None:
    rows = run(tmp_path, *SMALL, "engine.hosts=2", "engine.clients_in_flight=1")
    # 46 samples per client: two steps; each rebuilds the graphs of 3 of the 5 clients.
    assert [row.pop("rebuilt_graphs") for row in rows] == [6, 6]
    local = untimed(train(*SMALL).rows)
    assert [row.pop("rebuilt_graphs") for row in local] == [0, 0]
    assert rows == local


@pytest.mark.slow
def test_several_calls_per_host_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "PORTION", 1)
    overrides = (*SMALL, "fraction=0.5", "client_sync=round", "compressor=qu")
    rows = run(tmp_path, *overrides, "engine.hosts=2")
    assert rows == untimed(train(*overrides).rows)


@pytest.mark.slow
def test_seventy_clients_change_nothing(tmp_path: Path) -> None:
    job = (
        *("rounds=2", "clients=70", "dataset.limit=280", "dataset.test_limit=70"),
        "batch_size=2",
    )
    rows = run(tmp_path, *job, "engine.clients_in_flight=null")
    local = train(*job)
    assert rows == untimed(local.rows)
    assert rows[1]["loss"] < rows[0]["loss"]


def test_hosts_keep_neighbouring_partitions() -> None:
    specs = host_specs(5, RayOptions(hosts=2))
    assert [list(spec.nodes) for spec in specs] == [[1, 2, 3], [4, 5]]
    assert len(host_specs(3, RayOptions(hosts=8))) == 3
    pin = ("alice 0-2 dataset-root=/srv/a", "bob 3")
    pinned = host_specs(4, RayOptions(hosts=2, pin=pin))
    assert [list(spec.nodes) for spec in pinned] == [[1, 2], [3], [4]]
    assert [spec.resource for spec in pinned] == ["alice", "alice", "bob"]
    config = {"partition-id": 2, "num-partitions": 4, "dataset-root": "/srv/a"}
    assert pinned[1].nodes[3] == config


def test_hosts_share_an_object() -> None:
    arrays = {"pixels": np.arange(200_000)}
    ray_session.start(None, 2)
    shared = Shared(lambda: arrays, "tests.engine.test_ray:adopt")
    grid = RayGrid("masksl.client_app:app", 1, 2, RayOptions(), shared)
    try:
        assert len(set(grid.pids())) == 2
    finally:
        grid.close()


def adopt(shared: dict[str, Any]) -> None:
    """Check the shared object in a host; an error here makes its start fail."""
    pixels = shared["pixels"]
    assert int(pixels[-1]) == 199_999
    assert not pixels.flags.owndata and not pixels.flags.writeable


def test_a_host_that_cannot_start_is_reported() -> None:
    ray_session.start(None, 2)
    with pytest.raises(EngineError, match="a host could not start: .*no_such_module"):
        RayGrid("no_such_module:app", 1, 2, RayOptions(), None)


@pytest.mark.slow
def test_a_running_ray_is_used_again_if_it_has_enough_cpus() -> None:
    ray_session.start(None, 1)
    node = ray.get_runtime_context().get_node_id()
    ray_session.start(None, 1)
    assert ray.get_runtime_context().get_node_id() == node
    ray_session.start(None, int(ray.cluster_resources()["CPU"]) + 1)
    assert ray.get_runtime_context().get_node_id() != node
    ray_session.stop()
    assert not ray.is_initialized()


def test_threads_beyond_the_cores_are_named() -> None:
    hosts = (os.cpu_count() or 1) + 1
    settings = settings_of("engine=ray", f"engine.hosts={hosts}", "threads.client=2")
    (line,) = config.warnings(settings)
    assert f"engine.hosts={hosts} times threads.client=2 is {2 * hosts} threads" in line
    assert config.warnings(settings_of("engine=ray", "engine.hosts=1")) == []


@pytest.mark.slow
def test_two_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run on a cluster of two nodes with pinned partitions and a data root each."""
    ray_session.stop()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the cluster")
    ray_access.reread()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "resources": {"alice": 1}},
    )
    try:
        cluster.add_node(num_cpus=1, resources={"bob": 1})
        pins = '["alice 0-2 dataset-root=/srv/alice","bob 3-4 dataset-root=/srv/bob"]'
        command = [
            *(sys.executable, "-m", "masksl.main", *SMALL, PAPER, "engine=ray"),
            *("engine.hosts=1", f"engine.address='{cluster.address}'"),
            *(f"engine.pin={pins}", f"hydra.run.dir={tmp_path}/run"),
        ]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200
        )
        assert done.returncode == 0, done.stderr
    finally:
        cluster.shutdown()
        monkeypatch.undo()
        ray_access.reread()
    assert untimed(results.read_rows(tmp_path / "run")) == untimed(train(*SMALL).rows)


def test_a_missing_cluster_is_named(tmp_path: Path) -> None:
    ray_session.stop()
    with pytest.raises(EngineError, match="engine.address='127.0.0.1:9': no Ray there"):
        run(tmp_path, *SMALL, "engine.address='127.0.0.1:9'")


TWENTY_RUNS = """
import os
import sys
import time
from pathlib import Path

from masksl import main
from tests.conftest import settings_of

settings = settings_of(
    "engine=ray", "rounds=1", "clients=2", "dataset.limit=30", "dataset.test_limit=10"
)


def children():
    tasks = Path("/proc/self/task")
    found = [(task / "children").read_text().split() for task in tasks.iterdir()]
    return sum(map(len, found))


def shared_memory():
    import ray

    return sum(
        node["Resources"].get("object_store_memory", 0) for node in ray.nodes()
    ) - ray.available_resources().get("object_store_memory", 0)


def files():
    # Connections to ended hosts close after a moment.
    counts = []
    for _ in range(20):
        time.sleep(0.25)
        counts.append([len(os.listdir(f)) for f in ("/proc/self/fd", "/dev/shm")])
    return list(map(min, zip(*counts)))


for number in range(1, int(sys.argv[2]) + 1):
    main.run(settings, Path(sys.argv[1]))
    if number in (2, int(sys.argv[2])):
        print("RUN", number, files(), children(), shared_memory())
"""


@pytest.mark.slow
def test_twenty_runs_leak_nothing(tmp_path: Path) -> None:
    ray_session.stop()
    with ray_folder() as folder:
        done = subprocess.run(
            [sys.executable, "-c", TWENTY_RUNS, str(tmp_path), "20"],
            cwd=ROOT,
            env=os.environ | {"RAY_TMPDIR": str(folder)},
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
        )
        assert left_behind(folder) == []
    lines = [ln.split(" ", 2) for ln in done.stdout.splitlines() if ln[:3] == "RUN"]
    assert [line[1] for line in lines] == ["2", "20"], done.stderr
    assert lines[0][2] == lines[1][2]
