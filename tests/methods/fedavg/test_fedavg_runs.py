"""Federated averaging goes on after a kill as if nothing had happened."""

import json
from pathlib import Path
from typing import Any

import pytest

from masksl import main
from masksl.runtime import results
from tests.conftest import settings_of, untimed
from tests.runtime.test_checkpoint import check_resumed, run, same_checkpoints

SMALL = (
    *("method=fedavg", "rounds=4", "clients=4", "dataset.limit=130"),
    *("dataset.test_limit=40", "threads.server=1"),
)
EVERYTHING = (
    *("compressor=rt", "compressor.sparsity=0.9", "fraction=0.5"),
    *("model_compressor=rt", "model_compressor.sparsity=0.3", "method.local_epochs=2"),
)
OPTIONS = [
    ("fraction=0.5",),
    EVERYTHING,
    (*EVERYTHING, "method.evaluate=clients", "method.server_lr=0.7"),
    ("method.evaluate=clients", "fraction=0.5", "checkpoint.every=2"),
    ("optimizer.name=adam", "optimizer.lr=0.001", "schedule.name=cosine"),
]


def same_tensors(one: Path, other: Path) -> None:
    """Assert that the last checkpoints of two runs hold the same tensors."""
    assert same_checkpoints(one, other, 5)["method"] == {"version": 4}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_resumed_run_equals_an_undisturbed_one(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    check_resumed(tmp_path, *SMALL, *options)
    same_tensors(tmp_path / "whole", tmp_path / "third")


@pytest.mark.slow
def test_lost_hosts_change_nothing(order: Path, tmp_path: Path) -> None:
    """They are lost while they train in two rounds, and evaluate in one."""
    places = ("train.local 1 3", "evaluate.local 2 0", "train.local 3 2")
    overrides = (
        *(*SMALL, *EVERYTHING, "fraction=1", "method.evaluate=clients"),
        "plugins=[tests.methods.fedavg.plugin_kill]",
    )
    main.run(settings_of(*overrides), tmp_path / "whole")
    order.write_text("\n".join(places))
    main.run(settings_of(*overrides, "engine=ray"), tmp_path / "killed")
    assert order.read_text() == "", "not everybody was killed"
    rows: list[Any] = [
        untimed(results.read_rows(tmp_path / name)) for name in ("whole", "killed")
    ]
    assert rows[0] == rows[1]
    same_tensors(tmp_path / "whole", tmp_path / "killed")
    events = (tmp_path / "killed" / results.EVENTS).read_text().splitlines()
    assert [json.loads(event)["round"] for event in events] == [1, 2, 3]


@pytest.mark.parametrize(
    ("engine", "evaluate"),
    [
        pytest.param("ray", "server", marks=pytest.mark.slow),
        pytest.param("ray", "clients", marks=pytest.mark.slow),
        pytest.param("flower", "server", marks=pytest.mark.slow),
        pytest.param("flower", "clients", marks=pytest.mark.slow),
    ],
)
def test_engines_agree(engine: str, evaluate: str, tmp_path: Path) -> None:
    options = (*SMALL, *EVERYTHING, f"method.evaluate={evaluate}")
    expected = run(tmp_path / "local", *options)
    more = ("engine.cpus_per_client=0.5",) if engine == "flower" else ()
    assert run(tmp_path / engine, *options, f"engine={engine}", *more) == expected
    same_tensors(tmp_path / "local", tmp_path / engine)
