"""The Ray engine: equal to the others for any number of hosts, and tidy."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from ray.cluster_utils import Cluster

from masksl import config, main
from masksl.engine import EngineError, Shared
from masksl.engine import ray as engine
from masksl.runtime import messages, results
from masksl.settings import section
from tests.conftest import ROOT, processes, settings_of, train, untimed

SMALL = ("rounds=2", "clients=5", "dataset.limit=230", "dataset.test_limit=60")


@pytest.fixture(scope="module", autouse=True)
def end_ray() -> Iterator[None]:
    """End the Ray of this process after its tests."""
    yield
    ray.shutdown()


def run(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    main.run(settings_of("engine=ray", *overrides), folder)
    return untimed(results.read_rows(folder))


@pytest.mark.parametrize(
    ("hosts", "overrides"),
    [
        (1, ("client_sync=round",)),
        (2, ("client_sync=step",)),
        (3, ("client_sync=never", "dataset.partition=dirichlet")),
        (3, ("fraction=0.5", "client_sync=round", "compressor=qu")),
        (7, ("fraction=0.5", "client_sync=step", "gradient_compressor=qu")),
    ],
)
def test_hosts_change_nothing(
    hosts: int, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    rows = run(tmp_path, *SMALL, *overrides, f"engine.hosts={hosts}")
    assert rows == untimed(train(*SMALL, *overrides).rows)
    assert sum(row["rebuilt_graphs"] for row in rows) == 0


def test_graphs_beyond_the_limit_are_rebuilt(tmp_path: Path) -> None:
    rows = run(tmp_path, *SMALL, "engine.hosts=2", "engine.clients_in_flight=1")
    # 46 samples a client: two steps, in which three of five clients have no graph.
    assert [row.pop("rebuilt_graphs") for row in rows] == [6, 6]
    local = untimed(train(*SMALL).rows)
    assert [row.pop("rebuilt_graphs") for row in local] == [0, 0]
    assert rows == local


def test_messages_that_go_in_portions_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PORTION", 1)
    rows = run(tmp_path, *SMALL, "engine.hosts=2")
    assert rows == untimed(train(*SMALL).rows)


def test_a_crowd_is_no_different(tmp_path: Path) -> None:
    job = ("rounds=2", "clients=70", "dataset.limit=280", "dataset.test_limit=70")
    job += ("batch_size=2",)
    rows = run(tmp_path, *job, "engine.clients_in_flight=null")
    local = train(*job)
    assert rows == untimed(local.rows)
    assert rows[1]["loss"] < rows[0]["loss"]


def test_portions_hold_what_they_may() -> None:
    engine.identify(1)  # Flower's messages ask for a task
    half = messages.model_record({"w": torch.zeros(1000)})
    half_size = sum(len(array.data) for array in half.values())
    frames = [messages.frame_record(bytes(4_000_000)) for _ in range(10)]
    sent = [
        Message(RecordDict({"model": half, "gradient": frame}), 1, "train.backward")
        for frame in frames
    ]
    assert engine.PORTION == 16_000_000
    divided = list(engine.portions(sent))
    assert [message for portion in divided for message in portion] == sent
    assert [len(portion) for portion in divided] == [3, 3, 3, 1]
    assert half_size < 4_000_000
    assert [len(portion) for portion in engine.portions(sent[:3])] == [3]
    whole = messages.model_record({"w": torch.zeros(2_500_000)})  # 10 MB
    sent = [
        Message(RecordDict({"model": whole, "gradient": frame}), 1, "train.backward")
        for frame in frames[:3]
    ]
    assert [len(portion) for portion in engine.portions(sent)] == [1, 1, 1]
    large = messages.frame_record(bytes(engine.PORTION + 1))
    alone = Message(RecordDict({"gradient": large}), 1, "train.backward")
    assert [len(portion) for portion in engine.portions([alone, alone])] == [2]
    assert not list(engine.portions([]))


def test_records_cross_once_and_whole() -> None:
    big = messages.model_record({"w": torch.randn(100, 100), "n": torch.tensor(3)})
    small = messages.frame_record(b"frame")
    place = ConfigRecord({"round": 1, "lr": 0.1})
    contents = [
        RecordDict({"model": big, "place": place}),
        RecordDict({"model": big, "gradient": small}),
    ]
    packed = engine.pack(contents)
    assert packed[0]["model"] is packed[1]["model"]
    kinds = [type(arrays[-1]) for arrays in packed[0]["model"]]
    assert kinds == [np.ndarray, bytes]
    first, second = engine.unpack(packed)
    assert first["model"] is second["model"]
    assert first["model"] == big and second["gradient"] == small
    assert all(isinstance(a.data, bytes) for a in first["model"].values())


def test_places_divide_neighbours() -> None:
    found = engine.places(5, {"hosts": 2, "pin": None})
    assert [list(place.nodes) for place in found] == [[1, 2, 3], [4, 5]]
    assert len(engine.places(3, {"hosts": 8, "pin": None})) == 3
    pin = ("alice 0-2 dataset-root=/srv/a", "bob 3")
    pinned = engine.places(4, {"hosts": 2, "pin": pin})
    assert [list(p.nodes) for p in pinned] == [[1, 2], [3], [4]]
    assert [p.resource for p in pinned] == ["alice", "alice", "bob"]
    told = {"partition-id": 2, "num-partitions": 4, "dataset-root": "/srv/a"}
    assert pinned[1].nodes[3] == told


def test_hosts_share_what_is_made_once(tmp_path: Path) -> None:
    arrays = {"pixels": np.arange(200_000)}
    options = section(settings_of("engine=ray", "clients=2"), "engine")
    engine.start(None, 2)
    shared = Shared(lambda: arrays, "tests.test_engine_ray:look_at")
    grid = engine.RayGrid("masksl.client_app:app", 1, 2, options, shared)
    try:
        assert len(set(grid.pids())) == 2
    finally:
        grid.close()


def look_at(shared: dict[str, Any]) -> None:
    """Be handed something in a host; an error here ends its start."""
    pixels = shared["pixels"]
    assert int(pixels[-1]) == 199_999
    assert not pixels.flags.owndata and not pixels.flags.writeable


def test_a_host_that_cannot_start_says_why(tmp_path: Path) -> None:
    options = section(settings_of("engine=ray", "clients=2"), "engine")
    engine.start(None, 2)
    with pytest.raises(EngineError, match="a host could not start: .*no_such_module"):
        engine.RayGrid("no_such_module:app", 1, 2, options, None)


def test_threads_beyond_the_cores_are_named() -> None:
    hosts = (os.cpu_count() or 1) + 1
    settings = settings_of("engine=ray", f"engine.hosts={hosts}", "threads.client=2")
    (line,) = config.warnings(settings)
    assert f"engine.hosts={hosts} times threads.client=2 is {2 * hosts} threads" in line
    assert config.warnings(settings_of("engine=ray", "engine.hosts=1")) == []


def test_two_machines(tmp_path: Path) -> None:
    """A cluster of two nodes; partitions are pinned, data lie in a root of each."""
    ray.shutdown()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "resources": {"alice": 1}},
    )
    try:
        cluster.add_node(num_cpus=1, resources={"bob": 1})
        pins = '["alice 0-2 dataset-root=/srv/alice","bob 3-4 dataset-root=/srv/bob"]'
        command = [
            *(sys.executable, "-m", "masksl.main", *SMALL, "engine=ray"),
            *("engine.hosts=1", f"engine.address='{cluster.address}'"),
            *(f"engine.pin={pins}", f"hydra.run.dir={tmp_path}/run"),
        ]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200
        )
        assert done.returncode == 0, done.stderr
    finally:
        cluster.shutdown()
    assert untimed(results.read_rows(tmp_path / "run")) == untimed(train(*SMALL).rows)


def test_a_cluster_that_is_not_there_is_named(tmp_path: Path) -> None:
    ray.shutdown()
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
    ) - ray.available_resources().get("object_store_memory", 0), len(
        os.listdir("/dev/shm")
    )


def files():
    # Connections to ended hosts take a moment to close.
    counts = []
    for _ in range(20):
        time.sleep(0.25)
        counts.append(len(os.listdir("/proc/self/fd")))
    return min(counts)


for number in range(1, int(sys.argv[2]) + 1):
    main.run(settings, Path(sys.argv[1]))
    if number in (2, int(sys.argv[2])):
        print("RUN", number, files(), children(), shared_memory())
"""


@pytest.mark.slow
def test_twenty_runs_leave_nothing(tmp_path: Path) -> None:
    ray.shutdown()
    done = subprocess.run(
        [sys.executable, "-c", TWENTY_RUNS, str(tmp_path), "20"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    lines = [ln.split(" ", 2) for ln in done.stdout.splitlines() if ln[:3] == "RUN"]
    assert [line[1] for line in lines] == ["2", "20"], done.stderr
    assert lines[0][2] == lines[1][2]
    assert processes("raylet", "ray::", "gcs_server") == []
