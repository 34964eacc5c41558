"""Data sets, their partitions over the clients, augmentation on whole batches.

Sets of small images lie on the device as one uint8 tensor; sets of image files are read
batch by batch. Either way augmentation and normalisation are tensor operations on a
batch, with randomness of their own for every sample.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import datasets as torchvision_datasets

from masksl.utils import derive_seed, seeded_generator

PARTITIONS = ("iid", "dirichlet", "pathological", "class")


class DatasetError(ValueError):
    """A data set that is missing or cannot be divided as asked; one line says why."""


@dataclass(frozen=True)
class DatasetConfig:
    """Which data, and how the clients share it.

    Parameters
    ----------
    name : str
        A key of `DATASETS`.
    root : str
        Folder that holds the data set's own folder.
    download : bool
        Whether a missing set that torchvision can fetch is downloaded to ``root``.
    limit : int | None
        Only the first so many training samples.
    test_limit : int | None
        Only the first so many test samples.
    partition : str
        ``iid``; ``dirichlet`` with ``alpha``; ``pathological`` with
        ``classes_per_client``; ``class``, every class at one client.
    alpha : float
        Concentration of the Dirichlet partition; the smaller, the more uneven.
    classes_per_client : int
        Classes that each client of a pathological partition sees.
    workers : int
        Threads that read image files.
    """

    name: str = "digits"
    root: str = "data"
    download: bool = True
    limit: int | None = None
    test_limit: int | None = None
    partition: str = "iid"
    alpha: float = 0.5
    classes_per_client: int = 2
    workers: int = 2


class Images(ABC):
    """The images of one split and their labels.

    Parameters
    ----------
    labels : torch.Tensor
        int64, shape (n,), on the CPU.
    """

    labels: torch.Tensor

    @abstractmethod
    def pixels(
        self, indices: torch.Tensor, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Return images, uint8, shape (len(indices), C, H, W).

        A generator asks for a random crop where the images differ in size.
        """

    @abstractmethod
    def first(self, limit: int | None) -> "Images":
        """Return the first ``limit`` images, all of them where it is None."""


@dataclass(frozen=True)
class TensorImages(Images):
    """Images of one size in one tensor, uint8, shape (n, C, H, W)."""

    images: torch.Tensor
    labels: torch.Tensor

    def pixels(
        self, indices: torch.Tensor, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Return images of the tensor."""
        return self.images[indices.to(self.images.device)]

    def first(self, limit: int | None) -> "TensorImages":
        """Return the first ``limit`` images."""
        return TensorImages(self.images[:limit], self.labels[:limit])


@dataclass(frozen=True)
class FileImages(Images):
    """Image files, read when they are asked for.

    Parameters
    ----------
    paths : Sequence[str]
        Files of any size and mode; grey ones become RGB.
    labels : torch.Tensor
        int64, shape (n,).
    size : int
        Height and width that they come out with.
    crop : bool
        Whether a random box of a training image and the centre of a test image are
        taken; else the whole image is, and must be of that size.
    workers : int
        Threads that read them.
    """

    paths: Sequence[str]
    labels: torch.Tensor
    size: int
    crop: bool
    workers: int

    def pixels(
        self, indices: torch.Tensor, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Read images, with ``workers`` threads."""
        draws: Sequence[torch.Tensor | None] = [None] * len(indices)
        if generator is not None:
            draws = list(torch.rand(len(indices), 10, 4, generator=generator))
        paths = [self.paths[index] for index in indices.tolist()]
        with ThreadPoolExecutor(self.workers) as pool:
            return torch.stack(list(pool.map(self._read, paths, draws)))

    def first(self, limit: int | None) -> "FileImages":
        """Return the first ``limit`` images."""
        return replace(self, paths=self.paths[:limit], labels=self.labels[:limit])

    def _read(self, path: str, draws: torch.Tensor | None) -> torch.Tensor:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        if self.crop:
            if draws is None:
                box = _centre_box(*image.size)
            else:
                box = _random_box(*image.size, draws.tolist())
            bilinear = Image.Resampling.BILINEAR
            image = image.resize((self.size, self.size), bilinear, box=box)
        elif image.size != (self.size, self.size):
            raise DatasetError(
                f"{path}: {image.size}, expected {self.size}x{self.size}"
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@dataclass(frozen=True)
class Spec:
    """What is known of a data set before it is read.

    Parameters
    ----------
    load : Callable[[DatasetConfig], tuple[Images, Images]]
        Returns the training and the test images.
    classes : int
        Number of classes.
    channels, size : int
        Images are (channels, size, size).
    mean, std : tuple[float, ...]
        Per channel, of pixels from 0 to 1; test images are normalised with the same.
    crop : int
        Zeros put around training images before a random crop; 0 for none.
    flip : bool
        Whether half of the training images are mirrored.
    samples : tuple[int, int] | None
        Training and test images, where their number is fixed.
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


class Dataset:
    """A data set on a device.

    Parameters
    ----------
    spec : Spec
        What is known of it.
    train, test : Images
        Its images.
    device : torch.device | str
        Where batches come out.
    """

    def __init__(
        self, spec: Spec, train: Images, test: Images, device: torch.device | str
    ) -> None:
        self.spec = spec
        self.train = train
        self.test = test
        self.device = torch.device(device)
        scale = 255 * torch.tensor(spec.std, device=self.device)
        shift = -torch.tensor(spec.mean, device=self.device) * 255 / scale
        self._scale = (1 / scale).view(1, -1, 1, 1)
        self._shift = shift.view(1, -1, 1, 1)

    def train_batch(
        self, indices: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return augmented training images and their labels.

        Parameters
        ----------
        indices : torch.Tensor
            int64, shape (B,).
        generator : torch.Generator
            On the CPU; all randomness of the augmentation comes from it.

        Returns
        -------
        tuple[torch.Tensor, torch.Tensor]
            float32 (B, C, H, W) and int64 (B,), on the device.
        """
        images = self.train.pixels(indices, generator).to(self.device)
        if self.spec.crop:
            images = random_crop(images, self.spec.crop, generator)
        if self.spec.flip:
            images = random_flip(images, generator)
        return self._normalise(images), self.train.labels[indices].to(self.device)

    def train_images(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return training images as they are, likewise, and their labels."""
        return self._whole(self.train, indices)

    def test_batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return test images as they are, likewise, and their labels."""
        return self._whole(self.test, indices)

    def _whole(
        self, split: Images, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        images = split.pixels(indices, None).to(self.device)
        return self._normalise(images), split.labels[indices].to(self.device)

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mul_(self._scale).add_(self._shift)


_adopted: dict[str, Any] = {}
"""What another process of this machine has read; see `adopt`."""


@lru_cache(maxsize=2)
def _read(config: DatasetConfig) -> tuple[Images, Images]:
    """Return the training and the test images, limited, on the CPU."""
    if _adopted.get("config") == config:
        return _adopted["images"]
    train, test = DATASETS[config.name].load(config)
    return train.first(config.limit), test.first(config.test_limit)


@lru_cache(maxsize=2)
def load(config: DatasetConfig, device: str = "cpu") -> Dataset:
    """Load a data set, once in a process.

    Parameters
    ----------
    config : DatasetConfig
        Which set, and how much of it.
    device : str
        Where images of small size lie and batches come out.

    Returns
    -------
    Dataset
        Do not change it: it is shared by all who ask for the same.

    Raises
    ------
    DatasetError
        If it is not where it should be; the message says how to get it.
    """
    train, test = _read(config)
    if isinstance(train, TensorImages) and isinstance(test, TensorImages):
        train = TensorImages(train.images.to(device), train.labels)
        test = TensorImages(test.images.to(device), test.labels)
    return Dataset(DATASETS[config.name], train, test, device)


# --- who has what ---------------------------------------------------------------------


@lru_cache(maxsize=4)
def partition(config: DatasetConfig, clients: int, seed: int) -> list[torch.Tensor]:
    """Divide the training samples over the clients.

    Parameters
    ----------
    config : DatasetConfig
        The data set and the kind of partition.
    clients : int
        Number of parts.
    seed : int
        Seed of the run.

    Returns
    -------
    list[torch.Tensor]
        For each client the int64 indices of its samples; disjoint, none empty.

    Raises
    ------
    DatasetError
        If the samples cannot be divided so.
    """
    if _adopted.get("key") == (config, clients, seed):
        return _adopted["parts"]
    # Imported here: it takes seconds, and only those who hold training data need it.
    from datasets import Dataset as Table  # pylint: disable=import-outside-toplevel

    labels = _read(config)[0].labels
    if clients > len(labels):
        raise DatasetError(
            f"clients={clients}: must be at most {len(labels)}, "
            f"the training samples of {config.name}"
        )
    order = torch.randperm(
        len(labels), generator=seeded_generator(seed, "partition.order")
    )
    table = Table.from_dict({"label": labels[order].tolist(), "index": order.tolist()})
    try:
        partitioner = _partitioner(config, clients, labels, seed)
        partitioner.dataset = table
        parts = [
            torch.tensor(partitioner.load_partition(client)["index"], dtype=torch.int64)
            for client in range(clients)
        ]
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise DatasetError(
            f"dataset.partition={config.partition!r}: {reason}"
        ) from error
    if empty := [client for client, part in enumerate(parts) if len(part) == 0]:
        raise DatasetError(
            f"dataset.partition={config.partition!r}: leaves clients {empty} "
            "without samples; take fewer clients or another partition"
        )
    return parts


def share(config: DatasetConfig, clients: int, seed: int) -> dict[str, Any]:
    """Return a data set and its partition for `adopt` in other processes.

    Parameters
    ----------
    config : DatasetConfig
        The data set and the kind of partition.
    clients : int
        Number of parts.
    seed : int
        Seed of the run.

    Returns
    -------
    dict[str, Any]
        NumPy arrays of images, labels and indices, and what tells them apart.
    """
    parts = partition(config, clients, seed)
    return {
        "key": (config, clients, seed),
        "images": [
            (
                (split.images.numpy(), split.labels.numpy())
                if isinstance(split, TensorImages)
                else split
            )
            for split in _read(config)
        ],
        "indices": torch.cat(parts).numpy(),
        "sizes": [len(part) for part in parts],
    }


def adopt(shared: Mapping[str, Any]) -> None:
    """Take what `share` returned in another process as if it had been read here.

    The arrays are not copied and may be read-only.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        images = tuple(
            split if isinstance(split, Images) else TensorImages(*map(_tensor, split))
            for split in shared["images"]
        )
        indices = _tensor(shared["indices"])
    _adopted.update(
        key=shared["key"],
        config=shared["key"][0],
        images=images,
        parts=list(indices.split(shared["sizes"])),
    )


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


def shards(samples: int, clients: int, seed: int) -> list[torch.Tensor]:
    """Divide test samples over the clients, independently of their classes.

    Returns
    -------
    list[torch.Tensor]
        For each client the int64 indices of its share; sizes differ by at most one.
    """
    order = torch.randperm(samples, generator=seeded_generator(seed, "test"))
    return list(torch.tensor_split(order, clients))


def batches(samples: int, batch_size: int) -> list[tuple[int, int]]:
    """Return the bounds of the mini-batches of a round.

    The tail is kept; a tail of a single sample joins the batch before it, because
    BatchNorm cannot train on one.

    Returns
    -------
    list[tuple[int, int]]
        First and one past the last sample of every step.
    """
    starts = list(range(0, samples, batch_size))
    if len(starts) > 1 and samples % batch_size == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], samples], strict=True))


def _partitioner(config: DatasetConfig, clients: int, labels: torch.Tensor, seed: int):
    """Return flwr-datasets' partitioner for a configuration."""
    # pylint: disable-next=import-outside-toplevel
    from flwr_datasets import partitioner

    drawn = derive_seed(seed, "partition") % 2**32
    classes = len(labels.unique())
    match config.partition:
        case "iid":
            return partitioner.IidPartitioner(num_partitions=clients)
        case "dirichlet":
            return partitioner.DirichletPartitioner(
                num_partitions=clients,
                partition_by="label",
                alpha=config.alpha,
                min_partition_size=1,
                seed=drawn,
            )
        case "pathological":
            return partitioner.PathologicalPartitioner(
                num_partitions=clients,
                partition_by="label",
                num_classes_per_partition=config.classes_per_client,
                class_assignment_mode="deterministic",
                seed=drawn,
            )
    if classes % clients:
        raise ValueError(f"{classes} classes do not go evenly into {clients} clients")
    return partitioner.GroupedNaturalIdPartitioner(
        partition_by="label", group_size=classes // clients, sort_unique_ids=True
    )


# --- augmentation ---------------------------------------------------------------------


def random_crop(
    images: torch.Tensor, padding: int, generator: torch.Generator
) -> torch.Tensor:
    """Cut every image at a place of its own out of its padded self.

    Parameters
    ----------
    images : torch.Tensor
        Shape (B, C, H, W), any dtype.
    padding : int
        Zeros put on every side.
    generator : torch.Generator
        On the CPU.

    Returns
    -------
    torch.Tensor
        Same shape and dtype.
    """
    count, channels, height, width = images.shape
    offsets = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
    offsets = offsets.to(images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)  # (B, H)
    columns = offsets[1] + torch.arange(width, device=images.device)  # (B, W)
    sample = torch.arange(count, device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def random_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror every image of (B, C, H, W) left to right with probability one half."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored.to(images.device), images.flip(-1), images)


def _centre_box(width: int, height: int) -> tuple[float, float, float, float]:
    """Return the central 224 of 256 of an image's shorter side."""
    side = min(width, height) * 224 / 256
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def _random_box(
    width: int, height: int, draws: Sequence[Sequence[float]]
) -> tuple[float, float, float, float]:
    """Return a box of 8 to 100 % of the area with sides from 3:4 to 4:3.

    Every row of ``draws`` is one try: area, ratio, left, upper, each from [0, 1).
    """
    for area, ratio, left, upper in draws:
        size = (0.08 + 0.92 * area) * width * height
        aspect = (3 / 4) ** (1 - 2 * ratio)
        box_width, box_height = (size * aspect) ** 0.5, (size / aspect) ** 0.5
        if box_width <= width and box_height <= height:
            x, y = left * (width - box_width), upper * (height - box_height)
            return x, y, x + box_width, y + box_height
    side = min(width, height)
    x, y = (width - side) / 2, (height - side) / 2
    return x, y, x + side, y + side


# --- reading --------------------------------------------------------------------------


def _missing(config: DatasetConfig, what: str, how: str) -> DatasetError:
    root = Path(config.root).resolve()
    return DatasetError(
        f"dataset.root={config.root!r}: {config.name} not found, looked for {what} "
        f"in {root}; {how}"
    )


def _load_digits(config: DatasetConfig) -> tuple[Images, Images]:
    """Return scikit-learn's digits: a fixed fifth of every class is the test set."""
    from sklearn.datasets import load_digits  # pylint: disable=C0415
    from sklearn.model_selection import train_test_split  # pylint: disable=C0415

    del config
    bunch = load_digits()
    images = np.rint(bunch.images[:, None] * (255 / 16)).astype(np.uint8)
    parts = train_test_split(
        images, bunch.target, test_size=360, random_state=0, stratify=bunch.target
    )
    train, test, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    return TensorImages(train, train_labels.long()), TensorImages(
        test, test_labels.long()
    )


def _load_torchvision(kind: str, what: str) -> Callable:
    """Return a loader of one of torchvision's sets of small images."""

    def read(config: DatasetConfig, train: bool, download: bool) -> Images:
        found = getattr(torchvision_datasets, kind)(
            config.root, train=train, download=download
        )
        images = torch.as_tensor(found.data)  # (n, H, W) or (n, H, W, C)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        return TensorImages(images.contiguous(), torch.as_tensor(found.targets).long())

    def load_both(config: DatasetConfig) -> tuple[Images, Images]:
        reason = "dataset.download is false"
        for download in (False, True) if config.download else (False,):
            made = download and _make_root(config.root)
            try:
                return read(config, True, download), read(config, False, False)
            except (RuntimeError, OSError) as error:
                if download:
                    reason = f"the download failed ({' '.join(str(error).split())})"
                if made:
                    _remove_if_empty(config.root)
        how = (
            "put torchvision's files there or set dataset.download=true with a network"
        )
        raise _missing(config, what, f"{reason}; {how}")

    return load_both


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
    folder = Path(root)
    if not any(path.is_file() for path in folder.rglob("*")):
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir()
        folder.rmdir()


def _load_tiny_imagenet(config: DatasetConfig) -> tuple[Images, Images]:
    """Return Tiny-ImageNet-200 in its original layout."""
    root = Path(config.root) / "tiny-imagenet-200"
    annotations = root / "val" / "val_annotations.txt"
    names = root / "wnids.txt"
    for path in (names, annotations, root / "train"):
        if not path.exists():
            what = str(path.relative_to(config.root))
            raise _missing(config, what, "unpack tiny-imagenet-200.zip there")
    label = {name: i for i, name in enumerate(sorted(names.read_text().split()))}
    train = [
        (str(path), label[folder.name])
        for folder in sorted((root / "train").iterdir())
        for path in sorted((folder / "images").iterdir())
    ]
    rows = [line.split("\t") for line in annotations.read_text().splitlines()]
    test = [(str(root / "val/images" / row[0]), label[row[1]]) for row in rows]
    return _files(train, 64, False, config), _files(test, 64, False, config)


def _load_imagenet(config: DatasetConfig) -> tuple[Images, Images]:
    """Return ImageNet-1K from one folder a class, under train and val."""
    root = Path(config.root) / "imagenet"
    parts = []
    for part in ("train", "val"):
        try:
            found = torchvision_datasets.ImageFolder(root / part)
        except FileNotFoundError as error:
            what = f"imagenet/{part} with one folder of images a class"
            how = "unpack the ILSVRC2012 archives there"
            raise _missing(config, what, how) from error
        parts.append(_files(found.samples, 224, True, config))
    return parts[0], parts[1]


def _files(
    found: Sequence[tuple[str, int]], size: int, crop: bool, config: DatasetConfig
) -> FileImages:
    labels = torch.tensor([label for _, label in found])
    return FileImages([path for path, _ in found], labels, size, crop, config.workers)


_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

DATASETS = {
    "digits": Spec(
        *(_load_digits, 10, 1, 8, (0.3053,), (0.3761,)), samples=(1437, 360)
    ),
    "mnist": Spec(
        _load_torchvision("MNIST", "MNIST/raw"),
        *(10, 1, 28, (0.1307,), (0.3081,)),
        samples=(60_000, 10_000),
    ),
    "cifar10": Spec(
        _load_torchvision("CIFAR10", "cifar-10-batches-py"),
        *(10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 4, True),
        samples=(50_000, 10_000),
    ),
    "cifar100": Spec(
        _load_torchvision("CIFAR100", "cifar-100-python"),
        *(100, 3, 32, (0.5071, 0.4867, 0.4408), (0.2673, 0.2564, 0.2762), 4, True),
        samples=(50_000, 10_000),
    ),
    "tinyimagenet": Spec(
        _load_tiny_imagenet, 200, 3, 64, _IMAGENET_MEAN, _IMAGENET_STD, 4, True
    ),
    "imagenet": Spec(
        _load_imagenet, 1000, 3, 224, _IMAGENET_MEAN, _IMAGENET_STD, 0, True
    ),
}
"""Every data set by its name."""
