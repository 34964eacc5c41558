"""What is known of a data set before it is read, and its configuration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, field_validator
from pydantic_core import PydanticCustomError

from masksl.data.images import DatasetError, FileImages, Images, TensorImages

PARTITIONS = (
    *("iid", "dirichlet", "dirichlet_equal", "pathological", "class", "chunks"),
)


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
        ``iid``; ``dirichlet`` with ``alpha``; ``dirichlet_equal`` with ``alpha``, parts
        of equal size: `masksl.data.dirichlet.deal`; ``pathological`` with
        ``classes_per_client``; ``class``: each class is at one client; ``chunks`` with
        ``classes_per_client``: `masksl.data.chunks.deal`.
    alpha : float
        Concentration of the Dirichlet partitions; smaller is more uneven.
    classes_per_client : int
        Number of classes of each client in a pathological partition, of chunks of each
        client in ``chunks``.
    workers : int
        Number of threads that read image files.
    unreadable : str
        What an image does that a client cannot read: ``end`` ends the run,
        ``leave_out`` leaves the client out for the rest of the phase, as clients that
        fail are.
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
    workers: int = Field(2, ge=1, le=256, description="a whole number from 1 to 256")
    unreadable: Literal["end", "leave_out"] = Field(
        "end", description="one of end, leave_out"
    )

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
    load : Callable[[DatasetConfig], Sequence[Images]]
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

    load: Callable[[DatasetConfig], Sequence[Images]]
    classes: int
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: int = 0
    flip: bool = False
    samples: tuple[int, int] | None = None


# Every data set by its name; `masksl.data.sources` fills it, plugins add theirs.
DATASETS: dict[str, Spec] = {}


def not_found(config: DatasetConfig, files: str, how: str) -> DatasetError:
    """Return the error of a data set without its files, and how to get them."""
    root = Path(config.root).resolve()
    return DatasetError(
        f"dataset.root={config.root!r}: {config.name} not found, looked for {files} "
        f"in {root}; {how}"
    )


def check_images(images: Images, spec: Spec, pixels_in: str, labels_in: str) -> None:
    """Refuse images and labels that do not fit the data set or each other.

    Parameters
    ----------
    images : Images
        One split.
    spec : Spec
        What is known of the data set.
    pixels_in, labels_in : str
        Files of the images and of the labels; error lines begin with them.

    Raises
    ------
    DatasetError
        If shape or type of images or labels, their number, or a label does not fit.
    """
    labels = images.labels
    if labels.ndim != 1 or labels.dtype != torch.int64:
        shape = tuple(labels.shape)
        raise DatasetError(
            f"{labels_in}: labels of shape {shape}, {labels.dtype}, "
            "expected (n,), torch.int64"
        )
    if isinstance(images, TensorImages):
        expected = (spec.channels, spec.size, spec.size)
        shape, dtype = tuple(images.images.shape), images.images.dtype
        if shape[1:] != expected or dtype != torch.uint8:
            raise DatasetError(
                f"{pixels_in}: images of shape {shape}, {dtype}, expected "
                f"(n, {', '.join(map(str, expected))}), torch.uint8"
            )
    if (count := _count(images)) not in (None, len(labels)):
        raise DatasetError(f"{labels_in}: {len(labels)} labels of {count} images")
    if len(labels) == 0:
        raise DatasetError(f"{pixels_in}: holds no image")
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < spec.classes:
            allowed = f"0 to {spec.classes - 1}"
            raise DatasetError(f"{labels_in}: label {label}, expected {allowed}")


def _count(images: Images) -> int | None:
    """Return the number of images, None if only they themselves know it."""
    if isinstance(images, TensorImages):
        return len(images.images)
    return len(images.paths) if isinstance(images, FileImages) else None
