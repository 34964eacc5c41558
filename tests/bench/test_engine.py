"""The benchmark of the engines, without Ray."""

import os

import pytest
import torch

from masksl.bench import compression, engine, exchanges, iterations, memory, steps
from tests.conftest import settings_of


def test_exchanges_are_timed() -> None:
    rows = exchanges.measure("local", 3, (100, 20_000), 5)
    assert [row["bytes"] for row in rows] == [100, 20_000]
    for row in rows:
        assert row["exchanges"] == 5
        assert 0 < row["p50_ms"] <= row["p95_ms"]
        assert row["steps_per_second"] == pytest.approx(500 / row["mean_ms"])


def test_fewer_long_exchanges_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchanges, "LONG", 0.0)
    (row,) = exchanges.measure("local", 2, (100,), 20)
    assert row["exchanges"] == exchanges.FEW


def test_steps_of_the_bare_loop_and_of_an_engine() -> None:
    job = ("clients=2", "dataset.limit=52", "dataset.test_limit=10")
    rows = [steps.measure_bare(*job), steps.measure("local", *job)]
    rows = [row | {"job": "tiny"} for row in rows]
    assert sum(rows[1]["shares"].values()) == pytest.approx(1)
    assert rows[1]["shares"]["clients"] > 0
    assert rows[1]["shares"]["codec"] > 0
    engine._add_ratios(rows, "step_ms", "bare loop", ("job",))
    assert rows[0]["times_bare"] == 1
    assert rows[1]["times_bare"] == rows[1]["step_ms"] / rows[0]["step_ms"]


def test_training_with_compressors(monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("clients=2", "dataset.limit=52", "dataset.test_limit=10")
    monkeypatch.setattr(compression, "JOB", small)
    monkeypatch.delitem(compression.PLACES, "ray")
    monkeypatch.delitem(compression.PRECISIONS, "bfloat16")
    rows = compression.measure("dataset.root=data", repeats=2)
    assert [row["compressor"] for row in rows] == ["none", "ms", "ec"]
    speeds = [row["samples_per_second"] for row in rows]
    assert [row["times_none"] for row in rows] == [speeds[0] / s for s in speeds]
    assert all(0 < row["shares"]["codec"] < 1 for row in rows)


def test_the_bare_loop_has_the_network_of_the_run() -> None:
    job = ("model=resnet8", "dataset=cifar10", "cut=medium", "compressor=none")
    images = torch.randn(2, 3, 32, 32)
    for stride, side in ((1, 16), (2, 8)):
        settings = settings_of(*job, f"model.stem_stride={stride}")
        client = steps._network(settings)[0]
        assert client(images).shape == (2, 32, side, side)


def test_parts_of_an_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("method=sasg", "clients=2", "dataset.limit=80", "dataset.test_limit=10")
    monkeypatch.setattr(iterations, "JOB", (*small, "batch_size=10"))
    row = iterations.measure("local", "SASG, spsign, relay", "dataset.root=data")
    parts = {key: value for key, value in row.items() if key.endswith("_ms")}
    assert sum(parts.values()) == pytest.approx(2 * parts.pop("iteration_ms"))
    assert min(parts.values()) > 0
    codec = iterations.measure_codec("SASG, spsign, relay", repeats=1)
    dense = iterations.measure_codec("SGD", repeats=1)
    assert 50 * codec["bytes"] < dense["bytes"]
    assert min(codec["encode_ms"], codec["decode_ms"], codec["sum_ms"]) > 0


def test_memory_of_processes() -> None:
    assert os.getpid() in set(memory._descendants(os.getppid()))
    assert memory._pss(os.getpid()) > 2**20
    assert memory._pss(2**30) == 0
