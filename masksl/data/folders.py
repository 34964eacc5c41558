"""Data sets that are folders of image files: Tiny-ImageNet's and ImageNet's.

Hidden files and folders, and files whose names are no images', such as ``Thumbs.db``,
are skipped.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from masksl.data.images import DatasetError, FileImages, Images
from masksl.data.spec import DATASETS, DatasetConfig, check_images, not_found

_STRAY = ("@eaDir", "__MACOSX")  # folders of file servers and archives


def load_tiny_imagenet(config: DatasetConfig) -> tuple[Images, Images]:
    """Return Tiny-ImageNet-200 in its original layout."""
    root = Path(config.root) / "tiny-imagenet-200"
    annotations = root / "val" / "val_annotations.txt"
    names = root / "wnids.txt"
    for path in (names, annotations, root / "train"):
        if not path.exists():
            files = str(path.relative_to(config.root))
            raise not_found(config, files, "unpack tiny-imagenet-200.zip there")
    classes = sorted(_text(names).split())
    train = []
    for folder in _folders(root / "train"):
        label = _label(folder.name, classes, f"{folder}: is a class", names)
        train += [(path, label) for path in _image_files(folder / "images")]
    test = []
    for number, line in enumerate(_text(annotations).splitlines(), 1):
        if line.strip():
            name, *rest = line.split("\t")
            given = rest[0] if rest else ""
            where = f"{annotations}: line {number} has the class {given!r}"
            label = _label(given, classes, where, names)
            test.append((str(root / "val/images" / name), label))
    return (
        _file_images(train, 64, False, config, str(names)),
        _file_images(test, 64, False, config, str(annotations)),
    )


def load_imagenet(config: DatasetConfig) -> tuple[Images, Images]:
    """Return ImageNet-1K; ``train`` and ``val`` contain one folder per class."""
    root = Path(config.root) / "imagenet"
    classes: list[str] = []
    splits = []
    for name in ("train", "val"):
        folders = _folders(root / name) if (root / name).is_dir() else []
        if not folders:
            files = f"imagenet/{name} with one folder of images a class"
            how = "unpack the ILSVRC2012 archives there"
            raise not_found(config, files, how)
        classes = classes or [folder.name for folder in folders]
        samples = []
        for folder in folders:
            label = _label(
                folder.name, classes, f"{folder}: is a class", root / "train"
            )
            samples += [(path, label) for path in _image_files(folder)]
        splits.append(_file_images(samples, 224, True, config, str(root / name)))
    return splits[0], splits[1]


def _label(name: str, classes: Sequence[str], where: str, named_in: Path) -> int:
    """Return the label of a class; `DatasetError` if it is none."""
    if name not in classes:
        raise DatasetError(f"{where}, which {named_in} does not have")
    return classes.index(name)


def _folders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted by name, without stray ones."""
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not _is_stray(path.name)
    )


def _image_files(folder: Path) -> list[str]:
    """Return the image files below a folder, sorted, without stray ones."""
    # pylint: disable-next=import-outside-toplevel
    from torchvision.datasets.folder import is_image_file  # takes seconds

    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _is_stray(name)]
        found += [
            os.path.join(parent, name)
            for name in files
            if is_image_file(name) and not _is_stray(name)
        ]
    if not found:
        raise DatasetError(f"{folder}: holds no image")
    return sorted(found)


def _is_stray(name: str) -> bool:
    """Return whether an operating system has left a file or folder behind."""
    return name.startswith(".") or name in _STRAY


def _text(path: Path) -> str:
    """Return the text of a file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from error


def _file_images(
    samples: Sequence[tuple[str, int]],
    size: int,
    crop: bool,
    config: DatasetConfig,
    labels_in: str,
) -> FileImages:
    """Return the images of paths and labels."""
    paths, labels = [path for path, _ in samples], [label for _, label in samples]
    images = FileImages(paths, torch.tensor(labels), size, crop, config.workers)
    check_images(images, DATASETS[config.name], labels_in, labels_in)
    return images
