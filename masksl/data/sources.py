"""Data sets by name: their configuration, their constants and how they are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, field_validator
from pydantic_core import PydanticCustomError

from masksl.data.images import DatasetError, FileImages, Images, TensorImages

PARTITIONS = ("iid", "dirichlet", "pathological", "class")


class DatasetConfig(
    BaseModel, frozen=True, strict=True, extra="forbid", allow_inf_nan=False
):
    """A data set, and how its training samples are divided over the clients.

    Parameters
    ----------
    name : str
        A key of `DATASETS`.
    root : str
        Folder that contains the folder of the data set.
    download : bool
        Whether torchvision downloads a missing data set to ``root``, if it can.
    limit, test_limit : int | None
        Number of training, of test samples to use, the first ones; None for all.
    partition : str
        ``iid``; ``dirichlet`` with ``alpha``; ``pathological`` with
        ``classes_per_client``; ``class``: each class is at one client.
    alpha : float
        Concentration of the Dirichlet partition; smaller is more uneven.
    classes_per_client : int
        Number of classes of each client in a pathological partition.
    workers : int
        Number of threads that read image files.
    """

    name: str = Field("digits", description="the name of a data set")
    root: str = Field("data", min_length=1, description="text that is not empty")
    download: bool = Field(True, description="true or false")
    limit: int | None = Field(
        None, ge=1, description="null or a whole number from 1 on"
    )
    test_limit: int | None = Field(
        None, ge=1, description="null or a whole number from 1 on"
    )
    partition: Literal[PARTITIONS] = Field(  # type: ignore[valid-type]
        "iid", description=f"one of {', '.join(PARTITIONS)}"
    )
    alpha: float = Field(0.5, gt=0, description="a number greater than 0")
    classes_per_client: int = Field(2, ge=1, description="a whole number from 1 on")
    workers: int = Field(2, ge=1, description="a whole number from 1 on")

    @field_validator("name", mode="before")
    @classmethod
    def _is_registered(cls, name: Any) -> Any:
        """Look the name up now, because plugins register data sets of their own."""
        if not isinstance(name, str) or name not in DATASETS:
            names = {"names": ", ".join(DATASETS)}
            raise PydanticCustomError("allowed", "one of {names}", names)
        return name


@dataclass(frozen=True)
class Spec:
    """Constants of a data set, known before it is read.

    Parameters
    ----------
    load : Callable[[DatasetConfig], tuple[Images, Images]]
        Returns the training and the test images.
    classes : int
        Number of classes.
    channels, size : int
        Images have the shape (channels, size, size).
    mean, std : tuple[float, ...]
        Of each channel, for pixels from 0 to 1; both splits are normalised with them.
    crop : int
        Padding of training images before a random crop, in pixels; 0 for no crop.
    flip : bool
        Whether training images are flipped at random.
    samples : tuple[int, int] | None
        Number of training and of test images, or None if it depends on the files.
    """

    load: Callable[[DatasetConfig], tuple[Images, Images]]
    classes: int
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: int = 0
    flip: bool = False
    samples: tuple[int, int] | None = None


# --- bundled and downloaded sets ------------------------------------------------------


def load_digits(config: DatasetConfig) -> tuple[Images, Images]:
    """Return the digits of scikit-learn; 360 images, stratified, are the test set."""
    # Imported here: importing it takes seconds, and no other data set needs it.
    # pylint: disable=import-outside-toplevel
    from sklearn.datasets import load_digits as load_bunch
    from sklearn.model_selection import train_test_split

    del config
    bunch = load_bunch()
    images = np.rint(bunch.images[:, None] * (255 / 16)).astype(np.uint8)
    parts = train_test_split(
        images, bunch.target, test_size=360, random_state=0, stratify=bunch.target
    )
    train, test, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    return TensorImages(train, train_labels.long()), TensorImages(
        test, test_labels.long()
    )


def torchvision_loader(
    kind: str, files: str
) -> Callable[[DatasetConfig], tuple[Images, Images]]:
    """Return the function that reads a torchvision data set of small images.

    Parameters
    ----------
    kind : str
        Name of the class in ``torchvision.datasets``.
    files : str
        Folder of its files, for error lines.
    """

    def load_both(config: DatasetConfig) -> tuple[Images, Images]:
        reason = "dataset.download is false"
        for download in (False, True) if config.download else (False,):
            made = download and _make_root(config.root)
            try:
                return (
                    _read_torchvision(kind, config.root, True, download),
                    _read_torchvision(kind, config.root, False, False),
                )
            except (RuntimeError, OSError) as error:
                if download:
                    reason = f"the download failed ({' '.join(str(error).split())})"
                if made:
                    _remove_if_empty(config.root)
        how = (
            "put torchvision's files there or set dataset.download=true with a network"
        )
        raise _missing(config, files, f"{reason}; {how}")

    return load_both


def _read_torchvision(kind: str, root: str, train: bool, download: bool) -> Images:
    """Return one split of a torchvision data set."""
    # Imported here: importing it takes seconds, and the digits do not need it.
    # pylint: disable-next=import-outside-toplevel
    from torchvision import datasets as torchvision_datasets

    split = getattr(torchvision_datasets, kind)(root, train=train, download=download)
    images = torch.as_tensor(split.data)  # (n, H, W) or (n, H, W, C)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return TensorImages(images.contiguous(), torch.as_tensor(split.targets).long())


def _make_root(root: str) -> bool:
    """Make the folder; return whether it was missing."""
    missing = not Path(root).exists()
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatasetError(
            f"dataset.root={root!r}: cannot be made ({error})"
        ) from error
    return missing


def _remove_if_empty(root: str) -> None:
    """Remove a folder that contains no file."""
    folder = Path(root)
    if not any(path.is_file() for path in folder.rglob("*")):
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir()
        folder.rmdir()


# --- folders of image files -----------------------------------------------------------


def load_tiny_imagenet(config: DatasetConfig) -> tuple[Images, Images]:
    """Return Tiny-ImageNet-200 in its original layout."""
    root = Path(config.root) / "tiny-imagenet-200"
    annotations = root / "val" / "val_annotations.txt"
    names = root / "wnids.txt"
    for path in (names, annotations, root / "train"):
        if not path.exists():
            files = str(path.relative_to(config.root))
            raise _missing(config, files, "unpack tiny-imagenet-200.zip there")
    label = {name: i for i, name in enumerate(sorted(names.read_text().split()))}
    train = [
        (str(path), label[folder.name])
        for folder in sorted((root / "train").iterdir())
        for path in sorted((folder / "images").iterdir())
    ]
    rows = [line.split("\t") for line in annotations.read_text().splitlines()]
    test = [(str(root / "val/images" / row[0]), label[row[1]]) for row in rows]
    return _file_images(train, 64, False, config), _file_images(test, 64, False, config)


def load_imagenet(config: DatasetConfig) -> tuple[Images, Images]:
    """Return ImageNet-1K; ``train`` and ``val`` contain one folder per class."""
    # pylint: disable-next=import-outside-toplevel
    from torchvision import datasets as torchvision_datasets

    root = Path(config.root) / "imagenet"
    splits = []
    for name in ("train", "val"):
        try:
            folder = torchvision_datasets.ImageFolder(root / name)
        except FileNotFoundError as error:
            files = f"imagenet/{name} with one folder of images a class"
            how = "unpack the ILSVRC2012 archives there"
            raise _missing(config, files, how) from error
        splits.append(_file_images(folder.samples, 224, True, config))
    return splits[0], splits[1]


def _file_images(
    samples: Sequence[tuple[str, int]], size: int, crop: bool, config: DatasetConfig
) -> FileImages:
    """Return the images of paths and labels."""
    paths, labels = [path for path, _ in samples], [label for _, label in samples]
    return FileImages(paths, torch.tensor(labels), size, crop, config.workers)


def _missing(config: DatasetConfig, files: str, how: str) -> DatasetError:
    """Return the error of a data set without its files, and how to get them."""
    root = Path(config.root).resolve()
    return DatasetError(
        f"dataset.root={config.root!r}: {config.name} not found, looked for {files} "
        f"in {root}; {how}"
    )


# --- the table ------------------------------------------------------------------------

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

DATASETS = {
    "digits": Spec(
        load_digits, 10, 1, 8, mean=(0.3053,), std=(0.3761,), samples=(1437, 360)
    ),
    "mnist": Spec(
        torchvision_loader("MNIST", "MNIST/raw"),
        *(10, 1, 28),
        mean=(0.1307,),
        std=(0.3081,),
        samples=(60_000, 10_000),
    ),
    "cifar10": Spec(
        torchvision_loader("CIFAR10", "cifar-10-batches-py"),
        *(10, 3, 32),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        crop=4,
        flip=True,
        samples=(50_000, 10_000),
    ),
    "cifar100": Spec(
        torchvision_loader("CIFAR100", "cifar-100-python"),
        *(100, 3, 32),
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2673, 0.2564, 0.2762),
        crop=4,
        flip=True,
        samples=(50_000, 10_000),
    ),
    "tinyimagenet": Spec(
        *(load_tiny_imagenet, 200, 3, 64, _IMAGENET_MEAN, _IMAGENET_STD),
        crop=4,
        flip=True,
    ),
    "imagenet": Spec(
        *(load_imagenet, 1000, 3, 224, _IMAGENET_MEAN, _IMAGENET_STD), flip=True
    ),
}
"""Every data set by its name; plugins add theirs."""
