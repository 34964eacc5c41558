"""The paper's tasks, a step of each on tiny data, and how their halves may compute."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from masksl import dataset, main
from masksl.dataset import DATASETS, TensorImages
from masksl.runtime import results
from masksl.training.compute import ComputeConfig, compute
from tests.conftest import PAPER, ROOT, settings_of
from tests.data.folders import make_imagenet, make_tiny_imagenet

COMPRESSORS = sorted(path.stem for path in (ROOT / "conf/compressor").glob("*.yaml"))
CUTS = ["shallow", "medium", "deep"]
STEP = (
    *("rounds=1", "clients=2", "batch_size=2", "dataset.limit=4"),
    *("dataset.test_limit=4", "checkpoint.every=0", "device=cpu", "client_device=cpu"),
)


@pytest.fixture
def tiny_cifar(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put four random images in place of both CIFARs."""

    def load(_: dataset.DatasetConfig) -> tuple[TensorImages, TensorImages]:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=generator)
        images = TensorImages(pixels.to(torch.uint8), torch.arange(4))
        return images, images

    for name in ("cifar10", "cifar100"):
        spec = replace(DATASETS[name], load=load, samples=None)
        monkeypatch.setitem(DATASETS, name, spec)
    yield
    dataset.load.cache_clear()
    dataset.partition.cache_clear()


def take_a_step(folder: Path, *overrides: str) -> None:
    main.run(settings_of(*overrides, *STEP), folder)
    (row,) = results.read_rows(folder)
    assert row["steps"] == 1
    assert math.isfinite(row["loss"])
    assert row["bytes"]["training"]["up"]["activation"] > 0
    assert row["bytes"]["evaluation"]["up"]["activation"] > 0
    exact = results.read_summary(folder)["compressor"] == "none"
    assert (row["relative_error"] == 0) == exact


@pytest.mark.parametrize(
    ("experiment", "every"),  # every third compressor at a cut, at the next cut others
    [
        ("resnet18_cifar100", 3),
        pytest.param("resnet18_cifar100", 1, marks=pytest.mark.slow),
        pytest.param("vgg19_cifar10", 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("cut", CUTS)
def test_a_step_of_every_cut_and_of_every_compressor(
    experiment: str, cut: str, every: int, tiny_cifar: None, tmp_path: Path
) -> None:
    first = CUTS.index(cut) % every
    for compressor in COMPRESSORS[first::every]:
        place = (f"experiment={experiment}", f"cut={cut}", f"compressor={compressor}")
        take_a_step(tmp_path / compressor, *place)


def test_a_step_on_image_folders(tmp_path: Path) -> None:
    make_imagenet(tmp_path)
    make_tiny_imagenet(tmp_path)
    for name in ("resnet34_imagenet", "resnet34_tinyimagenet"):
        root = f"dataset.root={tmp_path}"
        take_a_step(tmp_path / name, f"experiment={name}", root)


@pytest.mark.parametrize("federation", ["paper", "public_code"])
def test_both_federations(federation: str, tiny_cifar: None, tmp_path: Path) -> None:
    settings = settings_of("experiment=vgg19_cifar10", f"federation={federation}")
    expected = {"paper": (10, 26), "public_code": (1, 256)}[federation]
    assert (settings["clients"], settings["batch_size"]) == expected
    assert settings["client_sync"] == "step"
    place = ("experiment=resnet18_cifar100", f"federation={federation}")
    take_a_step(tmp_path, *place)


@pytest.mark.parametrize(
    "method", ["split", "fedavg", pytest.param("sasg", marks=pytest.mark.slow)]
)
def test_the_stride_of_the_stem_reaches_clients_and_server(
    method: str, tmp_path: Path
) -> None:
    """Clients and server agree on it, and activations have a quarter of the
    elements."""
    job = (
        *("dataset.name=toy", "model=resnet8", "rounds=1", "clients=2"),
        *("dataset.limit=60", "compressor=none", f"method={method}"),
        *([PAPER] if method == "split" else []),
    )
    rows = []
    for stride in (1, 2):
        folder = tmp_path / str(stride)
        main.run(settings_of(*job, f"model.stem_stride={stride}"), folder)
        assert results.read_config(folder)["model.stem_stride"] == stride
        rows += results.read_rows(folder)
    sent = [row["bytes"]["training"]["up"] for row in rows]
    assert rows[0]["loss"] != rows[1]["loss"]
    if method == "split":
        activations = [counts.pop("activation") for counts in sent]
        assert activations[0] == pytest.approx(4 * activations[1], rel=0.01)
    assert sent[0] == sent[1]  # the weights are as many


@pytest.mark.parametrize(
    "options", ["precision=tf32", "precision=bfloat16", "channels_last=true"]
)
def test_faster_ways_to_compute_stay_near_float32(options: str, tmp_path: Path) -> None:
    job = (
        *("dataset.name=toy", "model=resnet8", "rounds=2", "clients=2", "cut=medium"),
        *("dataset.limit=100", "compressor=none", "client_sync=step"),
    )
    losses, sizes = [], []
    for number, more in enumerate(((), (f"compute.{options}",))):
        folder = tmp_path / str(number)
        main.run(settings_of(*job, *more), folder)
        losses.append([row["loss"] for row in results.read_rows(folder)])
        sizes.append(results.read_summary(folder)["bytes"])
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert sizes[0] == sizes[1]  # frames are float32 whatever the halves compute in
    if "bfloat16" in options:
        assert losses[0] != losses[1]
    if "tf32" in options:  # there is none on the CPU
        assert losses[0] == losses[1]


def test_options_reach_theloops() -> None:
    images = torch.randn(2, 3, 8, 8)
    plain, last = ComputeConfig(), ComputeConfig(channels_last=True)
    assert plain.laid_out(images) is images
    assert last.laid_out(images).is_contiguous(memory_format=torch.channels_last)
    cpu, kernel = torch.device("cpu"), torch.backends.cuda.matmul
    before = kernel.fp32_precision
    for precision, rounding in (("tf32", "tf32"), ("float32", "ieee")):
        with compute(1, cpu, 0, ComputeConfig(precision=precision)):
            assert kernel.fp32_precision == rounding
        assert kernel.fp32_precision == before


@pytest.mark.slow
def test_a_compiled_server_half_computes_the_same(tmp_path: Path) -> None:
    job = ("dataset.name=toy", "model=resnet8", "rounds=1", "clients=2", "cut=medium")
    losses = []
    for compiled in ("false", "true"):
        folder = tmp_path / compiled
        main.run(settings_of(*job, f"compute.compile={compiled}"), folder)
        losses += [row["loss"] for row in results.read_rows(folder)]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("contender", ["flash_jmwst", "flash_spdst_compact"])
def test_two_rounds_of_flash_on_tiny_imagenet(contender: str, tmp_path: Path) -> None:
    make_tiny_imagenet(tmp_path)
    settings = settings_of(
        *("experiment=flash_tinyimagenet", f"contender={contender}", "rounds=2"),
        *(f"dataset.root={tmp_path}", "dataset.download=false", "clients=4"),
        *("fraction=0.5", "batch_size=2", "method.warmup_epochs=2"),
        *("device=cpu", "client_device=cpu", "checkpoint.every=0"),
    )
    main.run(settings, tmp_path / "run")
    rows = results.read_rows(tmp_path / "run")
    assert [row["density_masked"] for row in rows] == pytest.approx(
        [0.05] * 2, abs=1e-3
    )
    assert all(math.isfinite(row["loss"]) for row in rows)
