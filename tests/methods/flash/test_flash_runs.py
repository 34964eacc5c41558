"""FLASH goes on after a kill as if nothing had happened, on every engine."""

import json
from pathlib import Path
from typing import Any

import pytest

from masksl import main
from masksl.config import ConfigError, check_resume
from masksl.runtime import results
from tests.conftest import settings_of, untimed
from tests.runtime.test_checkpoint import check_resumed, run, same_checkpoints

SMALL = (
    *("method=flash", "method.density=0.05", "rounds=4", "clients=4", "batch_size=8"),
    *("dataset.limit=160", "dataset.test_limit=40", "threads.server=1"),
    *("method.warmup_epochs=2", "method.warmup_fraction=0.5"),
)
GROUPS = ("method.hetero=[0.5,1.0]", "method.hetero_ends=[0.5,1.0]")
OPTIONS = [
    ("method.variant=nst", "fraction=0.5"),
    ("method.variant=jmwst", "method.interval=2", "fraction=0.5", "method.anneal=true"),
    (*GROUPS, "method.aggregate=fma", "method.warmup=init", "checkpoint.every=2"),
    (
        *("method.variant=jmwst", "compressor=ec", "method.feedback=true"),
        *("model_compressor=qu", "model_compressor.bits=8", "method.rest=bfloat16"),
    ),
]


def same_tensors(one: Path, other: Path) -> None:
    """Assert that the last checkpoints of two runs are the same."""
    assert same_checkpoints(one, other, 5)["method"]["version"] == 4


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_resumed_run_equals_an_undisturbed_one(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    check_resumed(tmp_path, *SMALL, *options)
    same_tensors(tmp_path / "whole", tmp_path / "third")


def test_a_run_whose_masks_anneal_cannot_be_prolonged() -> None:
    options = (*SMALL, "method.variant=jmwst")
    saved = settings_of(*options, "method.anneal=true")
    longer = settings_of(*options, "method.anneal=true", "rounds=40", "resume=x")
    with pytest.raises(ConfigError, match="differs in rounds"):
        check_resume(longer, saved, 4)
    check_resume(longer | {"method.anneal": False}, settings_of(*options), 4)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_lost_hosts_change_nothing(
    options: tuple[str, ...], order: Path, tmp_path: Path
) -> None:
    plugin = "plugins=[tests.methods.flash.plugin_kill]"
    everybody = "fraction=1.0", "method.warmup_fraction=1.0"
    overrides = (*SMALL, *options, plugin, *everybody)
    main.run(settings_of(*overrides), tmp_path / "whole")
    first = "train.warmup 1 2" if "compressor=ec" in options else "train.local 2 1"
    order.write_text("\n".join([first, "train.local 4 3"]))
    main.run(settings_of(*overrides, "engine=ray"), tmp_path / "killed")
    assert order.read_text() == "", "not everybody was killed"
    rows: list[Any] = [
        untimed(results.read_rows(tmp_path / name)) for name in ("whole", "killed")
    ]
    assert rows[0] == rows[1]
    same_tensors(tmp_path / "whole", tmp_path / "killed")
    events = (tmp_path / "killed" / results.EVENTS).read_text().splitlines()
    repeated = [json.loads(event)["round"] for event in events]
    assert repeated == [int(first.split()[1]), 4]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("engine", ["ray", "flower"])
def test_engines_agree(engine: str, options: tuple[str, ...], tmp_path: Path) -> None:
    expected = run(tmp_path / "local", *SMALL, *options)
    more = ("engine.cpus_per_client=0.5",) if engine == "flower" else ()
    found = run(tmp_path / engine, *SMALL, *options, f"engine={engine}", *more)
    assert found == expected
    same_tensors(tmp_path / "local", tmp_path / engine)
