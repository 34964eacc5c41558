"""A few random pictures in the layouts of the data sets, and files of MNIST's
format."""

import struct
from pathlib import Path

import numpy as np
from PIL import Image


def make_picture(path: Path, size: tuple[int, int], mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)))
    shape = size[::-1] + ((3,) if mode == "RGB" else ())
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode).save(path)


def make_tiny_imagenet(root: Path) -> None:
    """Write pictures in Tiny-ImageNet's layout; one of them is grey."""
    base = root / "tiny-imagenet-200"
    names = [f"n{i:08d}" for i in range(4)]
    base.mkdir(parents=True)
    (base / "wnids.txt").write_text("\n".join(reversed(names)))
    rows = []
    for label, name in enumerate(names):
        for i in range(6):
            mode = "L" if (label, i) == (1, 2) else "RGB"
            make_picture(base / f"train/{name}/images/{name}_{i}.JPEG", (64, 64), mode)
        make_picture(base / f"val/images/val_{label}.JPEG", (64, 64))
        rows.append(f"val_{label}.JPEG\t{names[3 - label]}\t0\t0\t63\t63")
    (base / "val/val_annotations.txt").write_text("\n".join(rows) + "\n")


def make_imagenet(root: Path) -> None:
    """Write pictures of different sizes, one folder per class."""
    for part, count in (("train", 4), ("val", 1)):
        for name in ("n01", "n02", "n03"):
            for i in range(count):
                path = root / f"imagenet/{part}/{name}/{i}.JPEG"
                make_picture(path, (250 + 40 * i, 300), "L" if i == 2 else "RGB")


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write an array of bytes in MNIST's format."""
    head = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(head + array.tobytes())
