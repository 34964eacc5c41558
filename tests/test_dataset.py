"""Configuration of data sets, partitions, shards, batches, sharing."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset as Table
from flwr_datasets.partitioner import IidPartitioner
from pydantic import ValidationError

from masksl import dataset
from masksl.dataset import DatasetConfig, DatasetError
from tests.conftest import ROOT
from tests.data.folders import make_tiny_imagenet

DIGITS = DatasetConfig()


# --- configuration --------------------------------------------------------------------


def test_defaults_are_those_of_the_files() -> None:
    text = (ROOT / "conf/dataset/_defaults.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == DIGITS.model_dump() | {"name": "???"}


def test_configurations_are_hashable_and_picklable() -> None:
    config = DatasetConfig(limit=5)
    assert hash(config) == hash(DIGITS.model_copy(update={"limit": 5}))
    assert pickle.loads(pickle.dumps(config)) == config != DIGITS


def test_names_are_looked_up_when_they_are_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ", ".join(dataset.DATASETS)
    with pytest.raises(ValidationError) as caught:
        DatasetConfig(name="later")
    (error,) = caught.value.errors()
    assert (error["type"], error["msg"]) == ("allowed", f"one of {names}")
    monkeypatch.setitem(dataset.DATASETS, "later", dataset.DATASETS["digits"])
    assert DatasetConfig(name="later").name == "later"


@pytest.mark.parametrize(
    "options",
    [
        {"limit": 0},
        {"limit": True},
        {"download": 1},
        {"alpha": 0},
        {"alpha": float("inf")},
        {"partition": "odd"},
        {"classes_per_client": 1.0},
        {"workers": 0},
        {"workers": 257},
        {"root": None},
        {"size": 8},
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DatasetConfig(**options)


# --- division over clients ------------------------------------------------------------


@pytest.mark.parametrize("kind", dataset.PARTITIONS)
@pytest.mark.parametrize("clients", [1, 5, 10])
def test_partitions_are_complete_and_disjoint(kind: str, clients: int) -> None:
    config = DatasetConfig(partition=kind, classes_per_client=10)
    parts = dataset.partition(config, clients, 42)
    assert len(parts) == clients
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1437))
    again = dataset.partition.__wrapped__(config, clients, 42)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_iid_parts_are_those_of_flwr_datasets() -> None:
    order = torch.cat(dataset.partition(DIGITS, 10, 42))
    partitioner = IidPartitioner(num_partitions=10)
    partitioner.dataset = Table.from_dict({"index": order.tolist()})
    for client, part in enumerate(dataset.partition(DIGITS, 10, 42)):
        assert part.tolist() == list(partitioner.load_partition(client)["index"])


def test_each_kind_of_partition() -> None:
    labels = dataset.load(DIGITS).train.labels

    def classes(**options: Any) -> list[int]:
        parts = dataset.partition(DatasetConfig(**options), 10, 42)
        return [len(labels[part].unique()) for part in parts]

    assert classes(partition="iid") == [10] * 10
    assert classes(partition="class") == [1] * 10
    assert classes(partition="pathological", classes_per_client=3) == [3] * 10
    even = [len(part) for part in dataset.partition(DIGITS, 10, 42)]
    assert max(even) - min(even) == 1
    skewed = dataset.partition(DatasetConfig(partition="dirichlet", alpha=0.1), 10, 42)
    sizes = [len(part) for part in skewed]
    assert max(sizes) > 2 * min(sizes)
    assert sum(classes(partition="dirichlet_equal", alpha=0.01)) < 35
    level = DatasetConfig(partition="dirichlet_equal", alpha=0.1)
    parts = dataset.partition(level, 10, 42)
    assert [len(part) for part in parts] == [144] * 7 + [143] * 3


@pytest.mark.parametrize(
    ("options", "clients", "message"),
    [
        ({}, 1438, "clients=1438: must be at most 1437"),
        ({"limit": 5}, 6, "clients=6: must be at most 5"),
        ({"partition": "class"}, 3, "dataset.partition='class': 10 classes do not"),
        (
            {"partition": "chunks", "classes_per_client": 11},
            3,
            "dataset.partition='chunks': dataset.classes_per_client=11: must be",
        ),
    ],
)
def test_impossible_partitions_are_refused(
    options: Any, clients: int, message: str
) -> None:
    with pytest.raises(DatasetError) as caught:
        dataset.partition(DatasetConfig(**options), clients, 42)
    assert str(caught.value).startswith(message)


def test_shards_of_the_test_set() -> None:
    parts = dataset.shards(103, 10, 42)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(103))
    assert sorted(map(len, parts)) == [10] * 7 + [11] * 3
    assert dataset.shards(103, 10, 42) is parts
    again = dataset.shards.__wrapped__(103, 10, 42)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


# --- batches --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "size", "expected"),
    [
        (52, 26, [(0, 26), (26, 52)]),
        (60, 26, [(0, 26), (26, 52), (52, 60)]),
        (53, 26, [(0, 26), (26, 53)]),
        (1, 26, [(0, 1)]),
        (27, 26, [(0, 27)]),
        (3, 1, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_a_single_last_sample_joins_the_batch_before(
    samples: int, size: int, expected: list[tuple[int, int]]
) -> None:
    assert dataset.batches(samples, size) == expected


def test_batches_depend_on_their_generator_alone(toy_data: None) -> None:
    data = dataset.load(DatasetConfig(name="toy"))
    state = torch.random.get_rng_state()
    indices = torch.arange(9)
    first, same, other = (
        data.train_batch(indices, torch.Generator().manual_seed(seed))[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


# --- processes of one machine ---------------------------------------------------------


def test_adopted_images_and_parts_replace_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pretend to be another process by an empty store and functions without cache."""
    make_tiny_imagenet(tmp_path)
    files = DatasetConfig(name="tinyimagenet", root=str(tmp_path))
    for config in (DatasetConfig(limit=50), files):
        monkeypatch.setattr(dataset, "_ADOPTED", dataset._Adopted())
        shared = pickle.loads(pickle.dumps(dataset.share(config, 3, 7)))
        read, parts = dataset._read(config), dataset.partition(config, 3, 7)
        dataset.adopt(shared)
        adopted = dataset._read.__wrapped__(config)
        for ours, theirs in zip(adopted, read, strict=True):
            assert type(ours) is type(theirs) and ours is not theirs
            indices = torch.arange(len(theirs.labels))
            assert torch.equal(ours.labels, theirs.labels)
            assert torch.equal(ours.pixels(indices, None), theirs.pixels(indices, None))
        again = dataset.partition.__wrapped__(config, 3, 7)
        assert again is dataset._ADOPTED.parts
        assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
        other = dataset.partition.__wrapped__(config, 3, 8)
        assert not torch.equal(torch.cat(other), torch.cat(parts))
