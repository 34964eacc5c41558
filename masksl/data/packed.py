"""Small images in the files of torchvision: MNIST's and CIFAR's."""

import struct
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import torch
from torchvision import datasets as torchvision_datasets
from torchvision.datasets.utils import check_integrity

from masksl.data.images import DatasetError, Images, TensorImages
from masksl.data.spec import DATASETS, DatasetConfig, check_images, not_found


def torchvision_loader(
    kind: str, files: str
) -> Callable[[DatasetConfig], tuple[Images, Images]]:
    """Return the function that reads a torchvision data set of small images.

    Files that are there and broken are never downloaded over: the error names them.

    Parameters
    ----------
    kind : str
        Name of the class in ``torchvision.datasets``.
    files : str
        Folder of its files, for error lines.
    """

    def load_both(config: DatasetConfig) -> tuple[Images, Images]:
        root, reason = Path(config.root), "dataset.download is false"
        for download in (False, True) if config.download else (False,):
            made = download and make_root(config.root)
            try:
                return _read(kind, config, True, download), _read(kind, config, False)
            except DatasetError:
                raise
            # Of a broken file anything may come.
            except Exception as error:  # pylint: disable=broad-exception-caught
                for line in _faults(kind, root):
                    raise DatasetError(f"{line}; {_ANEW}") from error
                said = " ".join(str(error).split())
                if download:
                    reason = f"the download failed ({said})"
                elif not any(_missing(kind, root)):
                    raise DatasetError(f"{root / files}: {said}") from error
                if made:
                    remove_if_empty(config.root)
        for line in _archive_faults(kind, root):
            raise DatasetError(f"{line}; {reason}")
        missing = next(_missing(kind, root), None)
        named = f"{files}/{missing}" if (root / files).is_dir() and missing else files
        raise not_found(config, named, f"{reason}; {_HOW}")

    return load_both


_HOW = "put torchvision's files there or set dataset.download=true with a network"
_ANEW = "put the right file there, or delete it and set dataset.download=true"


def _read(
    kind: str, config: DatasetConfig, train: bool, download: bool = False
) -> Images:
    """Return one split of a torchvision data set."""
    made = getattr(torchvision_datasets, kind)
    split = made(config.root, train=train, download=download)
    pixels = torch.as_tensor(split.data)  # (n, H, W) or (n, H, W, C)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    labels = torch.as_tensor(split.targets).long()
    images = TensorImages(pixels.contiguous(), labels)
    folder, names = _files(kind, Path(config.root))
    # MNIST's come in pairs, images and labels, the training set first.
    pair = sorted(names)[2:] if train else sorted(names)[:2]
    paths = [str(folder / name) for name in pair]
    if not issubclass(made, torchvision_datasets.MNIST):
        paths = [str(folder)] * 2  # CIFAR's have both; their MD5 was right
    check_images(images, DATASETS[config.name], paths[0], paths[1])
    return images


# --- which file is broken -------------------------------------------------------------


def _files(kind: str, root: Path) -> tuple[Path, dict[str, str | None]]:
    """Return the folder of a data set, and the MD5 of its files if it is known."""
    made = getattr(torchvision_datasets, kind)
    if issubclass(made, torchvision_datasets.MNIST):
        names = [name.removesuffix(".gz") for name, _ in made.resources]
        return root / kind / "raw", dict.fromkeys(names)
    meta = [(made.meta["filename"], made.meta["md5"])]
    return root / made.base_folder, dict([*made.train_list, *made.test_list, *meta])


def _missing(kind: str, root: Path) -> Iterator[str]:
    """Yield the names of missing files."""
    folder, names = _files(kind, root)
    yield from (name for name in names if not (folder / name).exists())


def _faults(kind: str, root: Path) -> Iterator[str]:
    """Yield a line for each file that is there and is not what it should be."""
    folder, names = _files(kind, root)
    for name, digest in names.items():
        if (path := folder / name).exists():
            try:
                fault = digest_fault(path, digest) if digest else _idx_fault(path)
            except OSError as error:
                fault = f"cannot be read ({error.strerror})"
            if fault:
                yield f"{path}: {fault}"


def _archive_faults(kind: str, root: Path) -> Iterator[str]:
    """Yield a line for each broken archive that torchvision would unpack."""
    made = getattr(torchvision_datasets, kind)
    folder, names = _files(kind, root)
    if issubclass(made, torchvision_datasets.MNIST):
        archives = {folder / name: digest for name, digest in made.resources}
    else:
        archives = {root / made.filename: made.tgz_md5}
    if all((folder / name).exists() for name in names):
        return
    for path, digest in archives.items():
        if path.exists() and (fault := digest_fault(path, digest)):
            yield f"{path}: {fault}"


def digest_fault(path: Path, digest: str) -> str | None:
    """Return what is wrong with a file whose MD5 is known, None if nothing is."""
    if check_integrity(path, digest):
        return None
    size = path.stat().st_size
    return f"corrupted or cut short: {size:,} bytes, whose MD5 is not {digest}"


def _idx_fault(path: Path) -> str | None:
    """Return what is wrong with a file of MNIST, None if its header fits its size."""
    axes = 3 if "images" in path.name else 1
    with path.open("rb") as file:
        head = file.read(4 + 4 * axes)
    return idx_fault(head, path.stat().st_size, axes)


def idx_fault(head: bytes, size: int, axes: int) -> str | None:
    """Return what is wrong with a file of unsigned bytes in MNIST's format (idx).

    Parameters
    ----------
    head : bytes
        The first ``4 + 4 * axes`` bytes, or more.
    size : int
        Number of bytes of the whole file.
    axes : int
        Number of dimensions that it should have.

    Returns
    -------
    str | None
        A description of the fault, None if the header fits the number of dimensions
        and the size.
    """
    length = 4 + 4 * axes
    if head[:4] != bytes((0, 0, 8, axes)) or len(head) < length:
        return (
            f"corrupted or cut short: {size:,} bytes without the header of {axes}-idx"
        )
    expected = length + prod(struct.unpack(f">{axes}I", head[4:length]))
    if size != expected:
        return f"corrupted or cut short: {size:,} bytes, expected {expected:,}"
    return None


# --- where downloads go ---------------------------------------------------------------


def make_root(root: str) -> bool:
    """Make the folder; return whether it was missing."""
    missing = not Path(root).exists()
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatasetError(
            f"dataset.root={root!r}: cannot be made ({error})"
        ) from error
    return missing


def remove_if_empty(root: str) -> None:
    """Remove a folder that contains no file."""
    folder = Path(root)
    if not any(path.is_file() for path in folder.rglob("*")):
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir()
        folder.rmdir()
