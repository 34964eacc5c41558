"""Data sets on a device, and how their samples are divided over clients and batches.

Small images are one uint8 tensor on the device; image files are read batch by batch.
Augmentation and normalisation are tensor operations on a whole batch.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from masksl.data import chunks, dirichlet
from masksl.data.augmentation import random_crop, random_flip
from masksl.data.images import DatasetError, FileImages, Images, TensorImages
from masksl.data.sources import DATASETS
from masksl.data.spec import PARTITIONS, DatasetConfig, Spec, check_images
from masksl.utils import derive_seed, seeded_generator

__all__ = [
    "DATASETS",
    "PARTITIONS",
    "Dataset",
    "DatasetConfig",
    "DatasetError",
    "FileImages",
    "Images",
    "Spec",
    "TensorImages",
    "adopt",
    "batches",
    "load",
    "partition",
    "shards",
    "share",
]


class Dataset:
    """A data set whose batches are on a device.

    Parameters
    ----------
    spec : Spec
        Constants of the data set.
    train, test : Images
        Images of the two splits.
    device : torch.device | str
        Device of the batches.
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
            On the CPU; the only source of randomness.

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
        """Return training images without augmentation, as `train_batch` does."""
        return self._plain_batch(self.train, indices)

    def test_batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return test images without augmentation, as `train_batch` does."""
        return self._plain_batch(self.test, indices)

    def _plain_batch(
        self, split: Images, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        images = split.pixels(indices, None).to(self.device)
        return self._normalise(images), split.labels[indices].to(self.device)

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mul_(self._scale).add_(self._shift)


@lru_cache(maxsize=2)
def load(config: DatasetConfig, device: str = "cpu") -> Dataset:
    """Load a data set, once in a process.

    Parameters
    ----------
    config : DatasetConfig
        The data set and the number of its samples.
    device : str
        Device of the batches, and of all images if they are in memory.

    Returns
    -------
    Dataset
        The same object for the same arguments; it must not be changed.

    Raises
    ------
    DatasetError
        If files are missing, and the message says how to get them; or if one is
        broken, and the message names it.
    """
    train, test = _read(config)
    if isinstance(train, TensorImages) and isinstance(test, TensorImages):
        train = TensorImages(train.images.to(device), train.labels)
        test = TensorImages(test.images.to(device), test.labels)
    return Dataset(DATASETS[config.name], train, test, device)


@lru_cache(maxsize=2)
def _read(config: DatasetConfig) -> tuple[Images, Images]:
    """Return the limited training and test images, on the CPU."""
    if (adopted := _ADOPTED.images_of(config)) is not None:
        return adopted
    train, test = _checked(config)
    return train.first(config.limit), test.first(config.test_limit)


def _checked(config: DatasetConfig) -> tuple[Images, Images]:
    """Return the training and test images; raise nothing but `DatasetError`."""
    spec, key = DATASETS[config.name], f"dataset.name={config.name!r}"
    try:
        train, test = spec.load(config)
        for images, split in ((train, "training set"), (test, "test set")):
            check_images(images, spec, f"{key}, {split}", f"{key}, {split}")
    except DatasetError:
        raise
    # A plugin's function may raise anything.
    except Exception as error:  # pylint: disable=broad-exception-caught
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DatasetError(f"{key}: cannot be read ({said})") from error
    return train, test


# --- division over clients ------------------------------------------------------------


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
        The int64 indices of each client's samples; disjoint, none empty. The same list
        for the same arguments; it must not be changed.

    Raises
    ------
    DatasetError
        If such a partition is impossible.
    """
    if (adopted := _ADOPTED.parts_of(config, clients, seed)) is not None:
        return adopted
    labels = _read(config)[0].labels
    if clients > len(labels):
        raise DatasetError(
            f"clients={clients}: must be at most {len(labels)}, "
            f"the training samples of {config.name}"
        )
    try:
        parts = _divide(config, clients, labels, seed)
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


def _divide(
    config: DatasetConfig, clients: int, labels: torch.Tensor, seed: int
) -> list[torch.Tensor]:
    """Return the parts of a partition of shuffled samples.

    All but ``chunks`` and ``dirichlet_equal`` are those of flwr-datasets' partitioners.
    """
    order = torch.randperm(
        len(labels), generator=seeded_generator(seed, "partition.order")
    )
    if config.partition == "iid":  # what IidPartitioner does
        return [part.clone() for part in torch.tensor_split(order, clients)]
    if config.partition == "chunks":
        generator = seeded_generator(seed, "partition")
        parts = chunks.deal(
            labels[order], clients, config.classes_per_client, generator
        )
        return [order[part] for part in parts]
    if config.partition == "dirichlet_equal":
        draws = np.random.default_rng(derive_seed(seed, "partition"))
        parts = dirichlet.deal(labels[order], clients, config.alpha, draws)
        return [order[part] for part in parts]
    # Imported here: importing it takes seconds, and a process that adopts a partition,
    # or divides at random, does not need it.
    from datasets import Dataset as Table  # pylint: disable=import-outside-toplevel

    partitioner = _partitioner(config, clients, labels, seed)
    partitioner.dataset = Table.from_dict(
        {"label": labels[order].tolist(), "index": order.tolist()}
    )
    return [
        torch.tensor(partitioner.load_partition(client)["index"], dtype=torch.int64)
        for client in range(clients)
    ]


def _partitioner(
    config: DatasetConfig, clients: int, labels: torch.Tensor, seed: int
) -> Any:
    """Return flwr-datasets' partitioner of a configuration."""
    # pylint: disable-next=import-outside-toplevel
    from flwr_datasets import partitioner

    derived = derive_seed(seed, "partition") % 2**32
    classes = len(labels.unique())
    match config.partition:
        case "dirichlet":
            return partitioner.DirichletPartitioner(
                num_partitions=clients,
                partition_by="label",
                alpha=config.alpha,
                min_partition_size=1,
                seed=derived,
            )
        case "pathological":
            return partitioner.PathologicalPartitioner(
                num_partitions=clients,
                partition_by="label",
                num_classes_per_partition=config.classes_per_client,
                class_assignment_mode="deterministic",
                seed=derived,
            )
    if classes % clients:
        raise ValueError(f"{classes} classes do not go evenly into {clients} clients")
    return partitioner.GroupedNaturalIdPartitioner(
        partition_by="label", group_size=classes // clients, sort_unique_ids=True
    )


@lru_cache(maxsize=4)
def shards(samples: int, clients: int, seed: int) -> list[torch.Tensor]:
    """Divide the test samples over the clients at random (IID).

    Parameters
    ----------
    samples : int
        Number of test samples.
    clients : int
        Number of shards.
    seed : int
        Seed of the run.

    Returns
    -------
    list[torch.Tensor]
        The int64 indices of each client's shard; sizes differ by at most one. The same
        list for the same arguments; it must not be changed.
    """
    order = torch.randperm(samples, generator=seeded_generator(seed, "test"))
    return list(torch.tensor_split(order, clients))


def batches(samples: int, batch_size: int) -> list[tuple[int, int]]:
    """Return the bounds of the mini-batches of a round.

    The last batch may be smaller. A single last sample joins the batch before it,
    because BatchNorm cannot train on one sample.

    Parameters
    ----------
    samples : int
        Number of the client's samples.
    batch_size : int
        Samples in a batch.

    Returns
    -------
    list[tuple[int, int]]
        First sample, and last sample plus one, of every batch.
    """
    starts = list(range(0, samples, batch_size))
    if len(starts) > 1 and samples % batch_size == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], samples], strict=True))


# --- processes of one machine ---------------------------------------------------------


@dataclass
class _Adopted:
    """The data set and the partition of the last `adopt`; empty before.

    They replace reading and dividing in this process and change no result.
    """

    key: tuple[DatasetConfig, int, int] | None = None
    images: tuple[Images, Images] | None = None
    parts: list[torch.Tensor] | None = None

    def images_of(self, config: DatasetConfig) -> tuple[Images, Images] | None:
        """Return the adopted images, or None if they have another configuration."""
        return self.images if self.key and self.key[0] == config else None

    def parts_of(
        self, config: DatasetConfig, clients: int, seed: int
    ) -> list[torch.Tensor] | None:
        """Return the adopted partition, or None if it is another one."""
        return self.parts if self.key == (config, clients, seed) else None


_ADOPTED = _Adopted()


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
        ``key``: the arguments; ``images``: for each split, NumPy arrays of images and
        labels, or `FileImages`; ``indices``: all parts in one array; ``sizes``: the
        length of each part.

    Raises
    ------
    DatasetError
        As `load` and `partition` do.
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
    """Use what `share` returned in another process instead of reading the files.

    Parameters
    ----------
    shared : Mapping[str, Any]
        As returned by `share`. Arrays are not copied and may be read-only.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        train, test = (
            split if isinstance(split, Images) else TensorImages(*map(_tensor, split))
            for split in shared["images"]
        )
        indices = _tensor(shared["indices"])
    _ADOPTED.key = shared["key"]
    _ADOPTED.images = train, test
    _ADOPTED.parts = list(indices.split(shared["sizes"]))


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)
