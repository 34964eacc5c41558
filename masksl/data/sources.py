"""The data sets of this package, by name."""

from collections.abc import Callable

import numpy as np
import torch

from masksl.data.folders import load_imagenet, load_tiny_imagenet
from masksl.data.images import Images, TensorImages
from masksl.data.spec import DATASETS, DatasetConfig, Spec


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


def packed(kind: str, files: str) -> Callable[[DatasetConfig], tuple[Images, Images]]:
    """Return `masksl.data.packed.torchvision_loader`, imported when it is called."""

    def load(config: DatasetConfig) -> tuple[Images, Images]:
        # Importing torchvision takes seconds, and the digits do not need it.
        # pylint: disable-next=import-outside-toplevel
        from masksl.data.packed import torchvision_loader

        return torchvision_loader(kind, files)(config)

    return load


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
