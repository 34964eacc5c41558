"""A data set of one's own: images and labels in the file my_dataset.npz."""

import numpy as np
import torch

from masksl.dataset import DATASETS, DatasetConfig, Spec, TensorImages


def load(config: DatasetConfig) -> list[TensorImages]:
    """Return the training and the test images."""
    with np.load(f"{config.root}/my_dataset.npz") as file:
        parts = [(file[f"{part}_x"], file[f"{part}_y"]) for part in ("train", "test")]
    return [TensorImages(*map(torch.from_numpy, part)) for part in parts]


DATASETS["mine"] = Spec(load, classes=10, channels=1, size=8, mean=(0.3,), std=(0.4,))
