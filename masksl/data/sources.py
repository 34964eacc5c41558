"""The data sets of this package, by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from masksl.data.folders import load_imagenet, load_tiny_imagenet
from masksl.data.images import Images, TensorImages
from masksl.data.spec import DATASETS, DatasetConfig, Spec


def load_digits(config: DatasetConfig) -> tuple[Images, Images]:
    """Return the digits of the UCI repository (Alpaydin and Kaynak, 1998).

    They lie beside this module, an image a line of ``digits.json``: a pixel is a digit
    to base 17. 360 images, stratified, are the test set.
    """
    del config
    text = Path(__file__).with_name("digits.json").read_text(encoding="utf-8")
    splits = json.loads(text)
    return _digits(splits["train"]), _digits(splits["test"])


def _digits(split: dict[str, Any]) -> TensorImages:
    """Return the images of a split of the digits."""
    levels = [[int(pixel, 17) for pixel in image] for image in split["images"]]
    pixels = np.rint(np.array(levels) * (255 / 16)).astype(np.uint8)
    labels = torch.tensor(list(map(int, split["labels"])))
    return TensorImages(torch.from_numpy(pixels.reshape(-1, 1, 8, 8)), labels)


def packed(kind: str, files: str) -> Callable[[DatasetConfig], tuple[Images, Images]]:
    """Return `masksl.data.packed.torchvision_loader`, imported when it is called."""

    def load(config: DatasetConfig) -> tuple[Images, Images]:
        # Importing torchvision takes seconds, and the digits do not need it.
        # pylint: disable-next=import-outside-toplevel
        from masksl.data.packed import torchvision_loader

        return torchvision_loader(kind, files)(config)

    return load


def load_emnist(config: DatasetConfig) -> tuple[Images, Images]:
    """Return `masksl.data.emnist.load_balanced`'s images, imported when called."""
    # It imports torchvision, too.
    # pylint: disable-next=import-outside-toplevel
    from masksl.data.emnist import load_balanced

    return load_balanced(config)


_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

DATASETS |= {
    "digits": Spec(
        load_digits, 10, 1, 8, mean=(0.3053,), std=(0.3761,), samples=(1437, 360)
    ),
    "mnist": Spec(
        packed("MNIST", "MNIST/raw"),
        *(10, 1, 28),
        mean=(0.1307,),
        std=(0.3081,),
        samples=(60_000, 10_000),
    ),
    # Mean and standard deviation as commonly used for the balanced split: the files
    # are not at hand to compute them.
    "emnist": Spec(
        *(load_emnist, 47, 1, 28),
        mean=(0.1751,),
        std=(0.3332,),
        samples=(112_800, 18_800),
    ),
    "cifar10": Spec(
        packed("CIFAR10", "cifar-10-batches-py"),
        *(10, 3, 32),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        crop=4,
        flip=True,
        samples=(50_000, 10_000),
    ),
    "cifar100": Spec(
        packed("CIFAR100", "cifar-100-python"),
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
