"""Data sets, partitions, batches, augmentation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from masksl import dataset
from masksl.dataset import DatasetConfig, DatasetError

DIGITS = DatasetConfig()


def test_digits_are_bundled() -> None:
    data = dataset.load(DIGITS)
    assert data.train.images.shape == (1437, 1, 8, 8)
    assert data.train.images.dtype == torch.uint8
    assert len(data.test.labels) == 360
    images, labels = data.test_batch(torch.arange(360))
    assert images.shape == (360, 1, 8, 8)
    assert images.mean().abs() < 0.05
    assert images.std() == pytest.approx(1, abs=0.05)
    assert labels.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]


@pytest.mark.parametrize(
    ("name", "train", "test", "shape", "classes"),
    [
        ("mnist", 60_000, 10_000, (1, 28, 28), 10),
        ("cifar10", 50_000, 10_000, (3, 32, 32), 10),
        ("cifar100", 50_000, 10_000, (3, 32, 32), 100),
    ],
)
def test_real_sets(
    data_root: Path, name: str, train: int, test: int, shape: Any, classes: int
) -> None:
    data = dataset.load(DatasetConfig(name, str(data_root), download=False))
    assert data.train.images.shape == (train, *shape)
    assert (len(data.train.labels), len(data.test.labels)) == (train, test)
    assert data.train.labels.unique().tolist() == list(range(classes))
    images, _ = data.test_batch(torch.arange(2000))
    assert images.mean().abs() < 0.1
    assert 0.9 < images.std() < 1.3  # the usual CIFAR-10 figures are not quite its own
    limited = dataset.load(DatasetConfig(name, str(data_root), limit=70, test_limit=30))
    assert torch.equal(limited.train.images, data.train.images[:70])
    assert len(limited.test.labels) == 30


# --- partitions -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", dataset.PARTITIONS)
@pytest.mark.parametrize("clients", [1, 5, 10])
def test_partitions_are_complete_and_disjoint(kind: str, clients: int) -> None:
    config = DatasetConfig(partition=kind, classes_per_client=10)
    parts = dataset.partition(config, clients, 42)
    assert len(parts) == clients
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1437))
    again = dataset.partition.__wrapped__(config, clients, 42)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_partitions_are_of_their_kind() -> None:
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


@pytest.mark.parametrize(
    ("options", "clients", "message"),
    [
        ({}, 1438, "clients=1438: must be at most 1437"),
        ({"limit": 5}, 6, "clients=6: must be at most 5"),
        ({"partition": "class"}, 3, "dataset.partition='class': 10 classes do not"),
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
def test_tail_of_one_joins_the_batch_before(
    samples: int, size: int, expected: list[tuple[int, int]]
) -> None:
    assert dataset.batches(samples, size) == expected


# --- augmentation ---------------------------------------------------------------------


def test_crops_are_windows_of_the_padded_image() -> None:
    images = torch.randint(1, 256, (50, 3, 6, 6), dtype=torch.uint8)
    cropped = dataset.random_crop(images, 2, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (2,) * 4)
    places = set()
    for image, crop in zip(padded, cropped, strict=True):
        found = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if torch.equal(image[:, y : y + 6, x : x + 6], crop)
        ]
        assert found
        places.update(found)
    assert len(places) > 15


def test_about_half_is_mirrored() -> None:
    images = torch.arange(400 * 4).view(400, 1, 1, 4)
    mirrored = dataset.random_flip(images, torch.Generator().manual_seed(0))
    same = (mirrored == images).all(dim=(1, 2, 3))
    assert 150 < int(same.sum()) < 250
    assert torch.equal(mirrored[~same], images[~same].flip(-1))


def test_batches_depend_on_their_generator_alone(toy_data: None) -> None:
    data = dataset.load(DatasetConfig("toy"))
    state = torch.random.get_rng_state()
    indices = torch.arange(9)
    first, same, other = (
        data.train_batch(indices, torch.Generator().manual_seed(seed))[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


# --- image files ----------------------------------------------------------------------


def picture(path: Path, size: tuple[int, int], mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)))
    shape = size[::-1] + ((3,) if mode == "RGB" else ())
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode).save(path)


def make_tiny_imagenet(root: Path) -> None:
    """Write a few pictures in Tiny-ImageNet's layout, a grey one among them."""
    base = root / "tiny-imagenet-200"
    names = [f"n{i:08d}" for i in range(4)]
    base.mkdir(parents=True)
    (base / "wnids.txt").write_text("\n".join(reversed(names)))
    rows = []
    for label, name in enumerate(names):
        for i in range(6):
            mode = "L" if (label, i) == (1, 2) else "RGB"
            picture(base / f"train/{name}/images/{name}_{i}.JPEG", (64, 64), mode)
        picture(base / f"val/images/val_{label}.JPEG", (64, 64))
        rows.append(f"val_{label}.JPEG\t{names[3 - label]}\t0\t0\t63\t63")
    (base / "val/val_annotations.txt").write_text("\n".join(rows) + "\n")


def make_imagenet(root: Path) -> None:
    """Write a few pictures of different sizes, one folder a class."""
    for part, count in (("train", 4), ("val", 1)):
        for name in ("n01", "n02", "n03"):
            for i in range(count):
                mode = "L" if i == 2 else "RGB"
                picture(
                    root / f"imagenet/{part}/{name}/{i}.JPEG", (250 + 40 * i, 300), mode
                )


def test_tiny_imagenet_in_its_layout(tmp_path: Path) -> None:
    make_tiny_imagenet(tmp_path)
    data = dataset.load(DatasetConfig("tinyimagenet", str(tmp_path)))
    assert data.train.labels.tolist() == [i // 6 for i in range(24)]
    assert data.test.labels.tolist() == [3, 2, 1, 0]
    images, labels = data.train_batch(torch.arange(24), torch.Generator())
    assert images.shape == (24, 3, 64, 64)
    assert labels.tolist() == data.train.labels.tolist()
    assert (
        len(
            dataset.load(
                DatasetConfig("tinyimagenet", str(tmp_path), limit=5)
            ).train.labels
        )
        == 5
    )


def test_imagenet_as_a_folder(tmp_path: Path) -> None:
    make_imagenet(tmp_path)
    data = dataset.load(DatasetConfig("imagenet", str(tmp_path)))
    assert data.train.labels.tolist() == [i // 4 for i in range(12)]
    generator = torch.Generator().manual_seed(3)
    images, _ = data.train_batch(torch.tensor([0, 0, 5]), generator)
    assert images.shape == (3, 3, 224, 224)
    assert not torch.equal(images[0], images[1])
    assert data.test_batch(torch.arange(3))[0].shape == (3, 3, 224, 224)


def test_random_boxes_lie_within_the_image() -> None:
    draws = torch.rand(200, 10, 4, generator=torch.Generator().manual_seed(0))
    for draw in draws.tolist():
        left, upper, right, lower = dataset._random_box(500, 333, draw)
        assert 0 <= left < right <= 500 + 1e-6
        assert 0 <= upper < lower <= 333 + 1e-6
        assert 0.07 < (right - left) * (lower - upper) / (500 * 333) <= 1
        assert 0.74 < (right - left) / (lower - upper) < 1.34


@pytest.mark.parametrize(
    ("name", "looked_for"),
    [
        ("mnist", "MNIST/raw"),
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("tinyimagenet", "tiny-imagenet-200/wnids.txt"),
        ("imagenet", "imagenet/train with one folder of images a class"),
    ],
)
def test_missing_sets_are_explained(tmp_path: Path, name: str, looked_for: str) -> None:
    root = tmp_path / "nowhere"
    with pytest.raises(DatasetError) as caught:
        dataset.load(DatasetConfig(name, str(root), download=False))
    message = str(caught.value)
    assert message.startswith(f"dataset.root={str(root)!r}: {name} not found")
    assert f"looked for {looked_for} in {root}" in message
    assert "\n" not in message
    assert not root.exists()
