"""Data sets as they are read from their files."""

from pathlib import Path
from typing import Any

import pytest
import torch

from masksl.data.images import Images, TensorImages
from masksl.dataset import DatasetConfig, DatasetError, load
from tests.data.folders import make_imagenet, make_picture, make_tiny_imagenet


def held(images: Images) -> torch.Tensor:
    """Return the images of a split that holds them as one tensor."""
    assert isinstance(images, TensorImages)
    return images.images


def test_digits_are_bundled() -> None:
    data = load(DatasetConfig())
    assert held(data.train).shape == (1437, 1, 8, 8)
    assert held(data.train).dtype == torch.uint8
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
    config = DatasetConfig(name=name, root=str(data_root), download=False)
    data = load(config)
    assert held(data.train).shape == (train, *shape)
    assert (len(data.train.labels), len(data.test.labels)) == (train, test)
    assert data.train.labels.unique().tolist() == list(range(classes))
    images, _ = data.test_batch(torch.arange(2000))
    assert images.mean().abs() < 0.1
    assert 0.9 < images.std() < 1.3  # the usual constants of CIFAR-10 are not exact
    limited = load(config.model_copy(update={"limit": 70, "test_limit": 30}))
    assert torch.equal(held(limited.train), held(data.train)[:70])
    assert len(limited.test.labels) == 30


def test_tiny_imagenet_in_its_layout(tmp_path: Path) -> None:
    make_tiny_imagenet(tmp_path)
    config = DatasetConfig(name="tinyimagenet", root=str(tmp_path))
    data = load(config)
    assert data.train.labels.tolist() == [i // 6 for i in range(24)]
    assert data.test.labels.tolist() == [3, 2, 1, 0]
    images, labels = data.train_batch(torch.arange(24), torch.Generator())
    assert images.shape == (24, 3, 64, 64)
    assert labels.tolist() == data.train.labels.tolist()
    assert len(load(config.model_copy(update={"limit": 5})).train.labels) == 5


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    make_tiny_imagenet(tmp_path)
    path = tmp_path / "tiny-imagenet-200/val/images/val_1.JPEG"
    make_picture(path, (64, 65))
    data = load(DatasetConfig(name="tinyimagenet", root=str(tmp_path)))
    with pytest.raises(DatasetError) as caught:
        data.test_batch(torch.arange(4))
    assert str(caught.value) == f"{path}: (64, 65), expected 64x64"


def test_imagenet_as_a_folder(tmp_path: Path) -> None:
    make_imagenet(tmp_path)
    data = load(DatasetConfig(name="imagenet", root=str(tmp_path)))
    assert data.train.labels.tolist() == [i // 4 for i in range(12)]
    generator = torch.Generator().manual_seed(3)
    images, _ = data.train_batch(torch.tensor([0, 0, 5]), generator)
    assert images.shape == (3, 3, 224, 224)
    assert not torch.equal(images[0], images[1])
    assert data.test_batch(torch.arange(3))[0].shape == (3, 3, 224, 224)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("mnist", "MNIST/raw"),
        ("emnist", "EMNIST/raw"),
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("tinyimagenet", "tiny-imagenet-200/wnids.txt"),
        ("imagenet", "imagenet/train with one folder of images a class"),
    ],
)
def test_missing_sets_are_explained(tmp_path: Path, name: str, files: str) -> None:
    root = tmp_path / "nowhere"
    with pytest.raises(DatasetError) as caught:
        load(DatasetConfig(name=name, root=str(root), download=False))
    message = str(caught.value)
    assert message.startswith(f"dataset.root={str(root)!r}: {name} not found")
    assert f"looked for {files} in {root}" in message
    assert "\n" not in message
    assert not root.exists()
