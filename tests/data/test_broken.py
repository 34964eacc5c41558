"""Broken data sets: the error names the file; what does not matter is skipped."""

import gzip
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from masksl import dataset
from masksl.data.images import FileImages
from masksl.dataset import DATASETS, DatasetConfig, DatasetError, TensorImages, load
from masksl.runtime.messages import RunError
from tests.conftest import ROOT, train
from tests.data.folders import (
    make_imagenet,
    make_picture,
    make_tiny_imagenet,
    write_idx,
)

FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def error_of(name: str, root: Path, **options: Any) -> str:
    """Return the text of the error that loading a data set raises."""
    with pytest.raises(DatasetError) as caught:
        load(DatasetConfig(name=name, root=str(root), **options))
    message = str(caught.value)
    assert "\n" not in message and "not found" not in message
    return message


# --- MNIST ----------------------------------------------------------------------------


def make_mnist(root: Path) -> Path:
    """Write 30 training and 10 test images; return their folder."""
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 30), ("t10k", 10)):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)
        write_idx(raw / f"{part}-images-idx3-ubyte", pixels)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count, dtype="u1") % 10)
    return raw


def test_a_whole_mnist_is_read(tmp_path: Path) -> None:
    make_mnist(tmp_path)
    data = load(DatasetConfig(name="mnist", root=str(tmp_path), download=False))
    assert isinstance(data.train, TensorImages)
    assert data.train.images.shape == (30, 1, 28, 28)
    assert data.test.labels.tolist() == list(range(10))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train-images-idx3-ubyte", "cut", "23,500 bytes, expected 23,536"),
        ("train-images-idx3-ubyte", "garbled", "23,536 bytes without the header"),
        ("train-labels-idx1-ubyte", "empty", "0 bytes without the header of 1-idx"),
        ("t10k-images-idx3-ubyte", "small", "images of shape (10, 1, 20, 20)"),
        ("t10k-images-idx3-ubyte", "long", "7,857 bytes, expected 7,856"),
        ("t10k-labels-idx1-ubyte", "cut", "12 bytes, expected 18"),
        ("t10k-labels-idx1-ubyte", "fewer", "9 labels of 10 images"),
        ("train-labels-idx1-ubyte", "label", "label 10, expected 0 to 9"),
    ],
)
def test_the_broken_file_of_mnist_is_named(
    name: str, content: str, said: str, tmp_path: Path
) -> None:
    path = make_mnist(tmp_path) / name
    whole = path.read_bytes()
    match content:
        case "cut":
            path.write_bytes(whole[: -36 if "images" in name else -6])
        case "garbled":
            path.write_bytes(bytes(reversed(whole)))
        case "empty":
            path.write_bytes(b"")
        case "long":
            path.write_bytes(whole + b"\0")
        case "small":
            write_idx(path, np.zeros((10, 20, 20), np.uint8))
        case "fewer":
            write_idx(path, np.arange(9, dtype=np.uint8))
        case "label":
            write_idx(path, np.arange(30, dtype=np.uint8) % 11)
    # With a download allowed, which nothing attempts: the file would be lost.
    message = error_of("mnist", tmp_path, download=True)
    assert message.startswith(f"{path}: ")
    assert said in message
    assert "download failed" not in message


def test_a_broken_archive_of_mnist_is_named(tmp_path: Path) -> None:
    raw = make_mnist(tmp_path)
    path = raw / "train-images-idx3-ubyte"
    archive = raw / "train-images-idx3-ubyte.gz"
    archive.write_bytes(gzip.compress(path.read_bytes())[:-9])
    load(DatasetConfig(name="mnist", root=str(tmp_path), download=False))
    path.unlink()
    dataset.load.cache_clear()
    dataset._read.cache_clear()
    message = error_of("mnist", tmp_path, download=False)
    assert message.startswith(f"{archive}: corrupted or cut short")


# --- CIFAR ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "data_batch_3"),
        ("cifar10", "batches.meta"),
        ("cifar100", "train"),
        ("cifar100", "test"),
    ],
)
def test_the_broken_file_of_cifar_is_named(
    name: str, file: str, tmp_path: Path
) -> None:
    path = tmp_path / FOLDERS[name] / file
    path.parent.mkdir()
    path.write_bytes(b"\x80\x04no pickle")
    message = error_of(name, tmp_path, download=True)
    assert message.startswith(f"{path}: corrupted or cut short: 11 bytes, whose MD5")
    assert "download failed" not in message


@pytest.mark.parametrize("how", ["cut", "garbled"])
@pytest.mark.parametrize("name", FOLDERS)
def test_one_broken_file_among_real_ones(
    name: str, how: str, data_root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / FOLDERS[name]
    folder.mkdir()
    for path in (data_root / FOLDERS[name]).iterdir():
        (folder / path.name).symlink_to(path)
    broken = folder / ("test_batch" if name == "cifar10" else "test")
    whole = broken.read_bytes()
    broken.unlink()
    middle = len(whole) // 2
    garbled = whole[:middle] + b"?" + whole[middle + 1 :]
    broken.write_bytes(whole[:-1000] if how == "cut" else garbled)
    assert error_of(name, tmp_path).startswith(f"{broken}: corrupted or cut short")


def test_a_missing_file_of_several_is_named(tmp_path: Path) -> None:
    (make_mnist(tmp_path) / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(DatasetError, match="looked for MNIST/raw/t10k-images-idx3-u"):
        load(DatasetConfig(name="mnist", root=str(tmp_path), download=False))


# --- folders of images ----------------------------------------------------------------

STRAY = (".DS_Store", "Thumbs.db", "desktop.ini", "._0.JPEG", ".hidden.JPEG", "a.txt")


def litter(folder: Path) -> None:
    """Put files of operating systems into every folder."""
    for parent in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        for name in STRAY:
            (parent / name).write_bytes(b"\0\0\0\1Bud1")
    for name in (".ipynb_checkpoints", "@eaDir"):
        for parent in (folder, next(folder.iterdir())):
            if parent.is_dir():
                (parent / name).mkdir()
                make_picture(parent / name / "0.JPEG", (64, 64))


@pytest.mark.parametrize("name", ["tinyimagenet", "imagenet"])
def test_stray_files_are_skipped(name: str, tmp_path: Path) -> None:
    config = DatasetConfig(name=name, root=str(tmp_path))
    make_tiny_imagenet(tmp_path)
    make_imagenet(tmp_path)
    clean = load(config)
    for part in ("train", "val"):
        litter(tmp_path / "tiny-imagenet-200" / part)
        litter(tmp_path / "imagenet" / part)
    dataset.load.cache_clear()
    dataset._read.cache_clear()
    littered = load(config)
    for ours, theirs in ((littered.train, clean.train), (littered.test, clean.test)):
        assert isinstance(ours, FileImages) and isinstance(theirs, FileImages)
        assert list(ours.paths) == list(theirs.paths)
        assert torch.equal(ours.labels, theirs.labels)
    littered.train_batch(torch.arange(len(littered.train.labels)), torch.Generator())


def test_folders_that_do_not_fit_are_named(tmp_path: Path) -> None:
    make_tiny_imagenet(tmp_path)
    make_imagenet(tmp_path)
    tiny = tmp_path / "tiny-imagenet-200"
    notes = tiny / "val/val_annotations.txt"
    rows = notes.read_text()
    notes.write_text(rows + "\nval_9.JPEG\n")
    said = "line 6 has the class ''"
    assert error_of("tinyimagenet", tmp_path).startswith(f"{notes}: {said}, which")
    notes.write_bytes(b"\xff\xfe\xff")
    assert error_of("tinyimagenet", tmp_path).startswith(f"{notes}: cannot be read")
    notes.write_text(rows)
    (tiny / "train/n9/images").mkdir(parents=True)
    assert error_of("tinyimagenet", tmp_path).startswith(f"{tiny}/train/n9: is a class")
    names = tiny / "wnids.txt"
    names.write_text("n9\n" + names.read_text())
    assert error_of("tinyimagenet", tmp_path).startswith(f"{tiny}/train/n9/images: hol")
    make_picture(tiny / "train/n9/images/0.JPEG", (64, 64))
    names.write_text("\n".join(f"a{i}" for i in range(200)) + "\n" + names.read_text())
    message = error_of("tinyimagenet", tmp_path)
    assert message == f"{names}: label 200, expected 0 to 199"

    (tmp_path / "imagenet/val/n04").mkdir()
    message = error_of("imagenet", tmp_path)
    assert message.startswith(f"{tmp_path}/imagenet/val/n04: is a class, which")
    (tmp_path / "imagenet/val/n04").rmdir()
    (tmp_path / "imagenet/train/n04").mkdir()
    message = error_of("imagenet", tmp_path)
    assert message == f"{tmp_path}/imagenet/train/n04: holds no image"


# --- data sets of one's own -----------------------------------------------------------


@pytest.mark.parametrize(
    ("pixels", "labels", "said"),
    [
        ((40, 3, 32, 32), [0, 10] * 20, "label 10, expected 0 to 9"),
        ((40, 3, 32, 32), [-1] * 40, "label -1, expected 0 to 9"),
        ((40, 3, 32, 32), [1] * 39, "39 labels of 40 images"),
        ((40, 3, 32, 31), [1] * 40, "images of shape (40, 3, 32, 31), torch.uint8"),
        ((0, 3, 32, 32), [], "holds no image"),
        ((40, 3, 32, 32), [1.0] * 40, "labels of shape (40,), torch.float32"),
    ],
)
def test_images_that_do_not_fit_are_refused(
    pixels: Any, labels: Any, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kind = None if labels else torch.int64
    images = torch.zeros(pixels, dtype=torch.uint8)
    wrong = TensorImages(images, torch.tensor(labels, dtype=kind))
    right = DATASETS["toy"].load(DatasetConfig())[0]
    spec = replace(DATASETS["toy"], load=lambda _: (right, wrong))
    monkeypatch.setitem(DATASETS, "wrong", spec)
    message = error_of("wrong", tmp_path)
    assert message.startswith(f"dataset.name='wrong', test set: {said}")


def test_what_a_function_of_ones_own_raises_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def read(config: DatasetConfig) -> Any:
        return np.load(Path(config.root) / "mine.npz")

    monkeypatch.setitem(DATASETS, "mine", replace(DATASETS["toy"], load=read))
    message = error_of("mine", tmp_path)
    assert message.startswith("dataset.name='mine': cannot be read (FileNotFoundError")
    assert str(tmp_path / "mine.npz") in message


# --- runs -----------------------------------------------------------------------------


def masksl(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "masksl.main", "engine=local", *overrides]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_a_broken_file_ends_a_run_in_one_line(tmp_path: Path) -> None:
    path = make_mnist(tmp_path) / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    done = masksl("dataset=mnist", "model=lenet", f"dataset.root={tmp_path}")
    assert done.returncode == 1
    assert done.stderr.startswith(f"masksl: {path}: corrupted or cut short: 37 bytes")
    assert done.stderr.count("\n") == 1


def tiny_run(root: Path) -> tuple[str, ...]:
    return (
        *("dataset=tinyimagenet", f"dataset.root={root}", "rounds=2", "clients=3"),
        *("batch_size=4", f"hydra.run.dir={root}/run"),
    )


def break_image(root: Path, part: str) -> tuple[Path, str]:
    """Break one image; return it and what the error says of it."""
    if part == "train":
        path = root / "tiny-imagenet-200/train/n00000002/images/n00000002_3.JPEG"
        path.write_bytes(path.read_bytes()[:900])
        return path, "cannot be read (image file is truncated"
    path = root / "tiny-imagenet-200/val/images/val_2.JPEG"
    path.write_bytes(b"<html>404</html>")
    return path, "cannot be read (no image of a known format)"


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("method", ["split", "fedavg"])
def test_an_unreadable_image_ends_a_run(method: str, part: str, tmp_path: Path) -> None:
    make_tiny_imagenet(tmp_path)
    path, said = break_image(tmp_path, part)
    with pytest.raises(RunError) as caught:
        train(f"method={method}", *tiny_run(tmp_path)[:-1])
    message = str(caught.value)
    assert message.startswith("round 1, ")
    assert f": {path}: {said}" in message
    assert "\n" not in message


def test_an_unreadable_image_ends_a_program_in_one_line(tmp_path: Path) -> None:
    make_tiny_imagenet(tmp_path)
    path, said = break_image(tmp_path, "train")
    done = masksl(*tiny_run(tmp_path))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("masksl: round 1, step ")
    assert f": {path}: {said}" in last
    assert "Traceback" not in done.stdout + done.stderr


def test_a_client_that_cannot_read_an_image_may_be_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_tiny_imagenet(tmp_path)
    path, said = break_image(tmp_path, "train")
    overrides = (*tiny_run(tmp_path)[:-1], "dataset.unreadable=leave_out")
    rows = train(*overrides).rows
    lost = [[out["client"] for out in row["left_out"]] for row in rows]
    assert lost[0] == lost[1] and len(lost[0]) == 1
    assert (
        f"is left out: masksl.data.images.DatasetError: {path}: {said}" in caplog.text
    )
    with pytest.raises(RunError, match="2 of 3 clients are left, min_clients=3"):
        train(*overrides, "min_clients=3")
