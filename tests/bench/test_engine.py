"""The benchmark of the engines, as far as it runs without Ray."""

import os

import pytest

from masksl.bench import engine as bench_engine


def test_exchanges_are_timed() -> None:
    rows = bench_engine.exchanges("local", 3, (100, 20_000), 5)
    assert [row["bytes"] for row in rows] == [100, 20_000]
    for row in rows:
        assert row["exchanges"] == 5
        assert 0 < row["p50_ms"] <= row["p95_ms"]
        assert row["steps_per_second"] == pytest.approx(500 / row["mean_ms"])


def test_long_exchanges_are_timed_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_engine, "LONG", 0.0)
    (row,) = bench_engine.exchanges("local", 2, (100,), 20)
    assert row["exchanges"] == bench_engine.FEW


def test_steps_of_the_bare_loop_and_of_an_engine() -> None:
    job = ("clients=2", "dataset.limit=52", "dataset.test_limit=10")
    rows = [bench_engine.bare_steps(*job), bench_engine.train_steps("local", *job)]
    rows = [row | {"job": "tiny"} for row in rows]
    assert sum(rows[1]["shares"].values()) == pytest.approx(1)
    assert rows[1]["shares"]["client_halves"] > 0
    assert rows[1]["shares"]["codec"] > 0
    bench_engine._relate(rows, "step_ms", "bare loop", ("job",))
    assert rows[0]["times_bare"] == 1
    assert rows[1]["times_bare"] == rows[1]["step_ms"] / rows[0]["step_ms"]


def test_memory_of_a_family() -> None:
    assert os.getpid() in set(bench_engine._family(os.getppid()))
    assert bench_engine._pss(os.getpid()) > 2**20
    assert bench_engine._pss(2**30) == 0
