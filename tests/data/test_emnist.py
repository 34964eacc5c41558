"""EMNIST's balanced split, in files of random bytes in its layout."""

import gzip
import hashlib
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import EMNIST

from masksl import dataset
from masksl.data import emnist
from masksl.dataset import DatasetConfig, DatasetError, TensorImages, load
from tests.data.folders import write_idx

COUNTS = {"train": 300, "test": 94}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test download half a gigabyte."""
    monkeypatch.setattr(EMNIST, "url", "file:///nowhere/gzip.zip")


def pixels(split: str) -> np.ndarray:
    """Return images as they lie in the files."""
    shape = COUNTS[split], 28, 28
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def labels(split: str) -> np.ndarray:
    return np.arange(COUNTS[split], dtype=np.uint8) % 47


def make_emnist(root: Path) -> Path:
    """Write 300 training and 94 test images; return their folder."""
    raw = root / "EMNIST/raw"
    raw.mkdir(parents=True)
    for split in COUNTS:
        images = raw / f"emnist-balanced-{split}-images-idx3-ubyte"
        write_idx(images, pixels(split))
        write_idx(raw / f"emnist-balanced-{split}-labels-idx1-ubyte", labels(split))
    return raw


def pack(path: Path) -> Path:
    """Replace a file by its compressed one."""
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes(), 1))
    path.unlink()
    return packed


def read(root: Path, **options: Any) -> dataset.Dataset:
    """Load the data set without the caches of other tests."""
    dataset.load.cache_clear()
    dataset._read.cache_clear()
    options.setdefault("download", False)
    return load(DatasetConfig(name="emnist", root=str(root), **options))


def error_of(root: Path, **options: Any) -> str:
    with pytest.raises(DatasetError) as caught:
        read(root, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def check(data: dataset.Dataset) -> None:
    for split, images in (("train", data.train), ("test", data.test)):
        assert isinstance(images, TensorImages)
        assert images.images.shape == (COUNTS[split], 1, 28, 28)
        assert images.images.dtype == torch.uint8
        upright = pixels(split).swapaxes(1, 2)
        assert np.array_equal(images.images[:, 0].numpy(), upright)
        assert images.labels.tolist() == labels(split).tolist()


@pytest.mark.parametrize("packed", [[], ["train-images"], ["train", "test"]])
def test_files_are_read_upright(packed: list[str], tmp_path: Path) -> None:
    raw = make_emnist(tmp_path)
    for path in list(raw.iterdir()):
        if any(part in path.name for part in packed):
            pack(path)
    data = read(tmp_path)
    check(data)
    spec = data.spec
    assert (spec.classes, spec.samples) == (47, (112_800, 18_800))
    assert not spec.crop and not spec.flip
    assert len(read(tmp_path, limit=7).train.labels) == 7


def test_pixels_are_those_of_torchvision_but_for_orientation(tmp_path: Path) -> None:
    make_emnist(tmp_path)
    theirs = EMNIST(str(tmp_path), "balanced", train=True)
    ours = read(tmp_path).train
    assert isinstance(ours, TensorImages)
    assert torch.equal(ours.images[:, 0], theirs.data.transpose(1, 2))
    assert torch.equal(ours.labels, theirs.targets)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train-images-idx3", "cut", "235,180 bytes, expected 235,216"),
        ("train-images-idx3", "garbled", "235,216 bytes without the header of 3-idx"),
        ("train-labels-idx1", "empty", "0 bytes without the header of 1-idx"),
        ("train-labels-idx1", "head", "6 bytes without the header of 1-idx"),
        ("test-images-idx3", "long", "73,713 bytes, expected 73,712"),
        ("test-images-idx3", "small", "images of shape (94, 1, 20, 20), torch.uint8"),
        ("test-images-idx3", "none", "94 labels of 0 images"),
        ("test-labels-idx1", "fewer", "93 labels of 94 images"),
        ("test-labels-idx1", "label", "label 47, expected 0 to 46"),
        ("test-labels-idx1", "axes", "without the header of 1-idx"),
    ],
)
def test_the_broken_file_is_named(
    name: str, content: str, said: str, packed: bool, tmp_path: Path
) -> None:
    raw = make_emnist(tmp_path)
    path = raw / f"emnist-balanced-{name}-ubyte"
    whole = path.read_bytes()
    match content:
        case "cut":
            path.write_bytes(whole[:-36])
        case "garbled":
            path.write_bytes(bytes(reversed(whole)))
        case "empty":
            path.write_bytes(b"")
        case "head":
            path.write_bytes(whole[:6])
        case "long":
            path.write_bytes(whole + b"\0")
        case "small":
            write_idx(path, np.zeros((94, 20, 20), np.uint8))
        case "none":
            write_idx(path, np.zeros((0, 28, 28), np.uint8))
        case "fewer":
            write_idx(path, labels("test")[:-1])
        case "label":
            write_idx(path, np.arange(94, dtype=np.uint8) % 48)
        case "axes":
            write_idx(path, labels("test")[:, None])
    path = pack(path) if packed else path
    # With a download allowed, which nothing attempts: the file would be lost.
    message = error_of(tmp_path, download=True)
    if content == "none":  # labels without images
        path = raw / "emnist-balanced-test-labels-idx1-ubyte"
    assert message.startswith(f"{path}: ")
    assert said in message


@pytest.mark.parametrize("how", ["cut", "garbled", "plain"])
def test_a_broken_compressed_file_is_named(how: str, tmp_path: Path) -> None:
    raw = make_emnist(tmp_path)
    path = pack(raw / "emnist-balanced-test-images-idx3-ubyte")
    whole = path.read_bytes()
    middle = bytes(value ^ 255 for value in whole[1000:1100])
    path.write_bytes(
        {
            "cut": whole[:-500],
            "garbled": whole[:1000] + middle + whole[1100:],
            "plain": b"<html>404</html>",
        }[how]
    )
    assert error_of(tmp_path).startswith(f"{path}: corrupted or cut short (")


# --- missing files --------------------------------------------------------------------


def test_missing_files_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the true address
    message = error_of(tmp_path / "nowhere")
    assert message == (
        f"dataset.root={str(tmp_path / 'nowhere')!r}: emnist not found, looked for "
        f"EMNIST/raw in {tmp_path / 'nowhere'}; dataset.download is false; put the "
        "files emnist-balanced-* of https://biometrics.nist.gov/cs_links/EMNIST/"
        "gzip.zip (MD5 58c8d27c78d21e728a6bc7b3cc06412e) there or set "
        "dataset.download=true with a network"
    )
    name = "emnist-balanced-test-labels-idx1-ubyte"
    (make_emnist(tmp_path) / name).unlink()
    assert f"looked for EMNIST/raw/{name} in {tmp_path}" in error_of(tmp_path)


def test_a_failed_download_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    message = error_of(tmp_path / "nowhere", download=True)
    assert "emnist not found" in message
    assert "; the download failed (" in message
    assert not (tmp_path / "nowhere").exists()


def test_a_broken_file_is_told_before_others_are_downloaded(tmp_path: Path) -> None:
    raw = make_emnist(tmp_path)
    (raw / "emnist-balanced-train-images-idx3-ubyte").unlink()
    path = raw / "emnist-balanced-test-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    message = error_of(tmp_path, download=True)
    assert message.startswith(f"{path}: corrupted or cut short: 101 bytes")


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Serve an archive of the layout of EMNIST's."""
    root = tmp_path / "served"
    raw = make_emnist(root / "source")
    path = root / "gzip.zip"
    with zipfile.ZipFile(path, "w") as file:
        for part in raw.iterdir():
            file.writestr(f"gzip/{part.name}.gz", gzip.compress(part.read_bytes(), 1))
        file.writestr("gzip/emnist-letters-test-labels-idx1-ubyte.gz", b"")
    handler = partial(SimpleHTTPRequestHandler, directory=str(root))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/gzip.zip"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(EMNIST, "url", url)
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setattr(EMNIST, "md5", md5)
        yield path
        server.shutdown()


@pytest.mark.usefixtures("archive")
def test_missing_files_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(read(tmp_path / "new", download=True))
    raw = tmp_path / "new/EMNIST/raw"
    assert {path.name for path in raw.iterdir()} == {emnist.ARCHIVE, *emnist.FILES}

    # One is missing: the archive that lies there serves, and the rest is left alone.
    monkeypatch.setattr(EMNIST, "url", "file:///nowhere/gzip.zip")
    (raw / emnist.FILES[1]).unlink()
    times = {name: (raw / name).stat().st_mtime_ns for name in emnist.FILES[2:]}
    check(read(tmp_path / "new", download=True))
    assert times == {name: (raw / name).stat().st_mtime_ns for name in times}


def test_a_broken_archive_is_named(tmp_path: Path, archive: Path) -> None:
    raw = tmp_path / "new/EMNIST/raw"
    raw.mkdir(parents=True)
    path = raw / emnist.ARCHIVE
    path.write_bytes(archive.read_bytes()[:-9])
    message = error_of(tmp_path / "new")
    assert message.startswith(f"{path}: corrupted or cut short: ")
    assert message.endswith(f"whose MD5 is not {EMNIST.md5}; dataset.download is false")
