"""FedPM goes on after a kill as if nothing had happened, on every engine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from masksl import main, model
from masksl.compress import FrameError
from masksl.dataset import DatasetConfig, load
from masksl.methods.fedpm import artefact
from masksl.runtime import results
from masksl.settings import read
from tests.conftest import settings_of, untimed
from tests.runtime.test_checkpoint import check_resumed, run, same_checkpoints

SMALL = (
    *("method=fedpm", "rounds=4", "clients=4", "dataset.limit=160", "batch_size=20"),
    *("dataset.test_limit=40", "threads.server=1"),
)
OPTIONS = [
    ("method.code=dither",),
    ("method.keep_moments=true", "method.reset_every=3", "fraction=0.5"),
    ("method.code=layer", "method.down=full", "checkpoint.every=2"),
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


def stride_of(file: Path) -> tuple[int, ...]:
    """Return the stride of the first convolution of a model."""
    first = next(artefact.load(file)[0].children())
    assert isinstance(first, nn.Conv2d)
    return first.stride


def test_the_model_of_a_run_is_a_plain_module(tmp_path: Path) -> None:
    settings = settings_of(*SMALL)
    main.run(settings, tmp_path)
    file = tmp_path / artefact.NAME
    network = artefact.load(file)
    images, labels = load(read(DatasetConfig, settings, "dataset")).test_batch(
        torch.arange(40)
    )
    with torch.no_grad():
        right = (network(images).argmax(1) == labels).float().mean()
    summary = results.read_summary(tmp_path)
    assert float(right) == pytest.approx(summary["top1"])
    kept = sum(int((p != 0).sum()) for p in network.parameters())
    assert 0 < kept < summary["elements"]
    content = file.read_bytes()
    line, _, frame = content.partition(b"\n")
    assert len(frame) == summary["model_bytes"] and len(line) < 150
    for broken in (
        content[:-1],
        b"{}\n" + frame,
        content.replace(b"mlp_digits", b"mlp_dig1ts"),
        content.replace(b"mlp_digits", b"mlp_128"),
        frame,
    ):
        file.write_bytes(broken)
        with pytest.raises(FrameError):
            artefact.load(file)


def test_the_model_of_a_run_has_the_stride_of_its_stem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def build(classes: int, channels: int, stem_stride: int = 1) -> model.Units:
        stem = nn.Conv2d(channels, 4, 3, stem_stride), nn.ReLU()
        head = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, classes)
        return [nn.Sequential(*stem), nn.Sequential(*head)]

    architecture = model.Architecture(build, 2, {}, (), (1,), stem_strides=(1, 2))
    monkeypatch.setitem(model.ARCHITECTURES, "fedpm_strided", architecture)
    for stride in (1, 2):
        own = ("model.name=fedpm_strided", f"model.stem_stride={stride}", "rounds=1")
        main.run(settings_of(*SMALL, *own), tmp_path / str(stride))
        file = tmp_path / str(stride) / artefact.NAME
        assert stride_of(file) == (stride, stride)
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"stem_stride": 2', b'"stem_stride": 3'))
    with pytest.raises(FrameError, match="no model of FedPM .stem_stride=3: must be"):
        artefact.load(file)
    # A file from before the stride was written into it.
    file.write_bytes(content.replace(b', "stem_stride": 2', b""))
    assert stride_of(file) == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2]], ids=str)
def test_lost_hosts_change_nothing(
    options: tuple[str, ...], order: Path, tmp_path: Path
) -> None:
    plugin = "plugins=[tests.methods.fedpm.plugin_kill]"
    overrides = (*SMALL, *options, plugin)
    main.run(settings_of(*overrides), tmp_path / "whole")
    order.write_text("\n".join(["train.local 2 1", "train.local 4 3"]))
    main.run(settings_of(*overrides, "engine=ray"), tmp_path / "killed")
    assert order.read_text() == "", "not everybody was killed"
    rows: list[Any] = [
        untimed(results.read_rows(tmp_path / name)) for name in ("whole", "killed")
    ]
    assert rows[0] == rows[1]
    same_tensors(tmp_path / "whole", tmp_path / "killed")
    events = (tmp_path / "killed" / results.EVENTS).read_text().splitlines()
    assert [json.loads(event)["round"] for event in events] == [2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("engine", ["ray", "flower"])
def test_engines_agree(engine: str, options: tuple[str, ...], tmp_path: Path) -> None:
    expected = run(tmp_path / "local", *SMALL, *options)
    more = ("engine.cpus_per_client=0.5",) if engine == "flower" else ()
    found = run(tmp_path / engine, *SMALL, *options, f"engine={engine}", *more)
    assert found == expected
    same_tensors(tmp_path / "local", tmp_path / engine)
