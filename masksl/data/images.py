"""Images of one split of a data set, in memory or in files."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from masksl.data.augmentation import centre_box, random_box


class DatasetError(ValueError):
    """A data set that is missing, broken or cannot be divided as configured.

    The text is one line. Where a file is broken it begins with its path.
    """


class Images(ABC):
    """Images of one split, with their labels.

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
        """Return some of the images.

        Parameters
        ----------
        indices : torch.Tensor
            int64, shape (B,).
        generator : torch.Generator | None
            On the CPU. Images of different sizes are cropped at random if it is given,
            else at their centre.

        Returns
        -------
        torch.Tensor
            uint8, shape (B, C, H, W).
        """

    @abstractmethod
    def first(self, limit: int | None) -> "Images":
        """Return the first ``limit`` images, or all if it is None."""


@dataclass(frozen=True)
class TensorImages(Images):
    """Images of one size in one tensor.

    Parameters
    ----------
    images : torch.Tensor
        uint8, shape (n, C, H, W), on any device.
    labels : torch.Tensor
        int64, shape (n,), on the CPU.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def pixels(
        self, indices: torch.Tensor, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Return some of the images, on their device."""
        return self.images[indices.to(self.images.device)]

    def first(self, limit: int | None) -> "TensorImages":
        """Return the first ``limit`` images, or all if it is None."""
        return TensorImages(self.images[:limit], self.labels[:limit])


@dataclass(frozen=True)
class FileImages(Images):
    """Image files, read when a batch is made.

    Parameters
    ----------
    paths : Sequence[str]
        Files of any size and mode; grey images become RGB.
    labels : torch.Tensor
        int64, shape (n,), on the CPU.
    size : int
        Height and width of the returned images, in pixels.
    crop : bool
        Whether a random box of a training image and the centre of a test image are
        resized to ``size``. Otherwise every file must have that size.
    workers : int
        Number of threads that read files.
    """

    paths: Sequence[str]
    labels: torch.Tensor
    size: int
    crop: bool
    workers: int

    def pixels(
        self, indices: torch.Tensor, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Read some of the images.

        Raises
        ------
        DatasetError
            If a file cannot be read, or has another size and ``crop`` is false; the
            text begins with its path.
        """
        draws: Sequence[torch.Tensor | None] = [None] * len(indices)
        if generator is not None:
            draws = list(torch.rand(len(indices), 10, 4, generator=generator))
        paths = [self.paths[index] for index in indices.tolist()]
        with ThreadPoolExecutor(self.workers) as pool:
            return torch.stack(list(pool.map(self._read, paths, draws)))

    def first(self, limit: int | None) -> "FileImages":
        """Return the first ``limit`` images, or all if it is None."""
        return replace(self, paths=self.paths[:limit], labels=self.labels[:limit])

    def _read(self, path: str, draws: torch.Tensor | None) -> torch.Tensor:
        """Return one image, uint8, shape (3, size, size)."""
        image = _open(path)
        if self.crop:
            if draws is None:
                box = centre_box(*image.size)
            else:
                box = random_box(*image.size, draws.tolist())
            bilinear = Image.Resampling.BILINEAR
            image = image.resize((self.size, self.size), bilinear, box=box)
        elif image.size != (self.size, self.size):
            raise DatasetError(
                f"{path}: {image.size}, expected {self.size}x{self.size}"
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _open(path: str) -> Image.Image:
    """Return an image file as RGB."""
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except UnidentifiedImageError as error:
        reason = "no image of a known format"
        raise DatasetError(f"{path}: cannot be read ({reason})") from error
    # The decoders of formats raise errors of many kinds, SyntaxError among them.
    except Exception as error:  # pylint: disable=broad-exception-caught
        said = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DatasetError(f"{path}: cannot be read ({said})") from error
