"""SASG goes on after a kill as if nothing had happened, on every engine."""

import json
from pathlib import Path
from typing import Any

import pytest

from masksl import main
from masksl.runtime import results
from tests.conftest import settings_of, untimed
from tests.runtime.test_checkpoint import check_resumed, run, same_checkpoints

# With BatchNorm; an epoch has four iterations, the rule begins in the second one.
SMALL = (
    *("method=sasg", "rounds=4", "clients=4", "dataset.limit=160", "batch_size=10"),
    *("dataset.test_limit=40", "threads.server=1", "optimizer.lr=0.02"),
    *("method.delay=3", "method.constant=20", "evaluations=2"),
)
OPTIONS = [
    (),
    ("compressor=sp_auto", "method.down=sum", "checkpoint.every=2"),
    ("method.down=dense", "schedule.name=cosine", "method.threshold_lag=step"),
    ("method.upload=dense",),
    ("method.adaptive=false", "compressor=rt", "compressor.sparsity=0.9"),
    ("compressor=ec", "compressor.error=0.3"),
]


def same_tensors(one: Path, other: Path) -> None:
    """Assert that the last checkpoints of two runs are the same."""
    facts = same_checkpoints(one, other, 20)
    assert facts["method"]["version"] == 16
    assert facts["versions"] == [15] * 4


QUICK = (0, 1, 3)  # of these options; the others are slow
SOME = [
    pytest.param(options, marks=() if number in QUICK else pytest.mark.slow)
    for number, options in enumerate(OPTIONS)
]


@pytest.mark.parametrize("options", SOME, ids=str)
def test_a_resumed_run_equals_an_undisturbed_one(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    check_resumed(tmp_path, *SMALL, *options)
    rows = results.read_rows(tmp_path / "whole")
    adaptive = "method.adaptive=false" not in options
    assert (sum(row["skips"] for row in rows) > 0) == adaptive
    same_tensors(tmp_path / "whole", tmp_path / "third")


EVERYWHERE = ("train.gradient 1 3", "evaluate.buffers 2 0", "train.gradient 3 2")


@pytest.mark.parametrize(
    ("options", "places"),
    [
        pytest.param((), EVERYWHERE, marks=pytest.mark.slow),
        pytest.param(OPTIONS[1], EVERYWHERE, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_lost_hosts_change_nothing(
    options: tuple[str, ...], places: tuple[str, ...], order: Path, tmp_path: Path
) -> None:
    """They are lost in the middle of an epoch, or in an evaluation."""
    overrides = (*SMALL, *options, "plugins=[tests.methods.sasg.plugin_kill]")
    main.run(settings_of(*overrides), tmp_path / "whole")
    order.write_text("\n".join(places))
    main.run(settings_of(*overrides, "engine=ray"), tmp_path / "killed")
    assert order.read_text() == "", "not everybody was killed"
    rows: list[Any] = [
        untimed(results.read_rows(tmp_path / name)) for name in ("whole", "killed")
    ]
    assert rows[0] == rows[1]
    assert sum(row["skips"] for row in rows[0]) > 0
    same_tensors(tmp_path / "whole", tmp_path / "killed")
    events = (tmp_path / "killed" / results.EVENTS).read_text().splitlines()
    lost = [int(place.split()[1]) for place in places]
    assert [json.loads(event)["round"] for event in events] == lost


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("engine", ["ray", "flower"])
def test_engines_agree(engine: str, options: tuple[str, ...], tmp_path: Path) -> None:
    expected = run(tmp_path / "local", *SMALL, *options)
    more = ("engine.cpus_per_client=0.5",) if engine == "flower" else ()
    found = run(tmp_path / engine, *SMALL, *options, f"engine={engine}", *more)
    assert found == expected
    same_tensors(tmp_path / "local", tmp_path / engine)
