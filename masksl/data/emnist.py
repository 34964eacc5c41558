"""EMNIST's balanced split (Cohen et al., 2017): 47 classes of letters and digits."""

import gzip
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import EMNIST
from torchvision.datasets.utils import download_url

from masksl.data.images import DatasetError, Images, TensorImages
from masksl.data.packed import digest_fault, idx_fault, make_root, remove_if_empty
from masksl.data.spec import DATASETS, DatasetConfig, check_images, not_found

FOLDER = "EMNIST/raw"
ARCHIVE = "gzip.zip"  # torchvision's name
FILES = [  # images and labels of the training set, then of the test set
    f"emnist-balanced-{split}-{kind}-ubyte"
    for split in ("train", "test")
    for kind in ("images-idx3", "labels-idx1")
]


def load_balanced(config: DatasetConfig) -> tuple[Images, Images]:
    """Return the training and the test images, upright.

    Files are read as they are or compressed (``.gz``). Files that are there are never
    overwritten by a download.

    Parameters
    ----------
    config : DatasetConfig
        The folder, and whether missing files are downloaded to it.

    Returns
    -------
    tuple[Images, Images]
        uint8, shape (n, 1, 28, 28), and labels from 0 to 46.

    Raises
    ------
    DatasetError
        If a file is missing or broken.
    """
    folder = Path(config.root) / FOLDER
    if _missing(folder):
        _check_present(folder)
        reason = "dataset.download is false"
        if config.download:
            reason = _download(config, folder)
        if missing := _missing(folder):
            raise _not_found(config, folder, missing[0], reason)
    return _read_split(config, FILES[:2]), _read_split(config, FILES[2:])


def _read_split(config: DatasetConfig, names: list[str]) -> Images:
    """Return the images of one split."""
    paths = [_path(Path(config.root) / FOLDER, name) for name in names]
    pixels, labels = (_read_idx(path) for path in paths)
    # The files hold images transposed: (n, W, H).
    upright = torch.from_numpy(pixels.transpose(0, 2, 1).copy())[:, None]
    images = TensorImages(upright, torch.from_numpy(labels.astype(np.int64)))
    check_images(images, DATASETS[config.name], str(paths[0]), str(paths[1]))
    return images


def _read_idx(path: Path) -> np.ndarray:
    """Return the array of a file of images or labels; it is read-only.

    Raises
    ------
    DatasetError
        If the file cannot be read or its header does not fit its size.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DatasetError(f"{path}: corrupted or cut short ({error})") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror})") from error
    axes = 3 if "images" in path.name else 1
    if fault := idx_fault(content, len(content), axes):
        unpacked = "unpacked, " if path.suffix == ".gz" else ""
        raise DatasetError(f"{path}: {unpacked}{fault}")
    shape = struct.unpack_from(f">{axes}I", content, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


# --- files ----------------------------------------------------------------------------


def _path(folder: Path, name: str) -> Path:
    """Return the path of a file, of the compressed one if there is no other."""
    path, packed = folder / name, folder / f"{name}.gz"
    return packed if packed.exists() and not path.exists() else path


def _missing(folder: Path) -> list[str]:
    """Return the names of missing files."""
    return [name for name in FILES if not _path(folder, name).exists()]


def _check_present(folder: Path) -> None:
    """Raise `DatasetError` for a broken file among those that are there."""
    for name in FILES:
        if (path := _path(folder, name)).exists():
            _read_idx(path)


def _download(config: DatasetConfig, folder: Path) -> str:
    """Download the archive and unpack what is missing.

    Returns
    -------
    str
        Why that failed; empty if it did not.
    """
    made = make_root(config.root)
    try:
        download_url(EMNIST.url, str(folder), ARCHIVE, EMNIST.md5)
        _unpack(folder)
    # A network and an archive may raise anything.
    except Exception as error:  # pylint: disable=broad-exception-caught
        if made:
            remove_if_empty(config.root)
        return f"the download failed ({' '.join(str(error).split())})"
    return ""


def _unpack(folder: Path) -> None:
    """Unpack the missing files from the archive, each as a whole or not at all."""
    with zipfile.ZipFile(folder / ARCHIVE) as archive:
        for name in _missing(folder):
            part = folder / f"{name}.part"
            try:
                with (
                    archive.open(f"gzip/{name}.gz") as member,
                    gzip.open(member) as content,
                    part.open("wb") as file,
                ):
                    shutil.copyfileobj(content, file)
                part.replace(folder / name)
            finally:
                part.unlink(missing_ok=True)


def _not_found(
    config: DatasetConfig, folder: Path, missing: str, reason: str
) -> DatasetError:
    """Return the error of missing files, or of a broken archive in their place."""
    archive = folder / ARCHIVE
    if archive.exists() and (fault := digest_fault(archive, EMNIST.md5)):
        return DatasetError(f"{archive}: {fault}; {reason}")
    files = f"{FOLDER}/{missing}" if folder.is_dir() else FOLDER
    how = (
        f"{reason}; put the files emnist-balanced-* of {EMNIST.url} (MD5 {EMNIST.md5}) "
        "there or set dataset.download=true with a network"
    )
    return not_found(config, files, how)
