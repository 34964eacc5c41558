"""What docs/extending.md shows is what is in examples/, and its commands run."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel
from datasets import Dataset as Table
from datasets import Features, Image

from masksl import compress, dataset, model
from masksl.compress import FrameError, decode, decode_set, encode_set, make
from masksl.dataset import DATASETS, DatasetConfig, DatasetError
from masksl.methods import METHODS
from masksl.runtime import results
from tests.conftest import ROOT, settings_of, train, untimed

PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
FILES = re.findall(r"^```\w+ (examples/\S+)\n(.*?)^```$", PAGE, re.M | re.S)
COMMANDS = {
    Path(command.split()[0].partition("=")[2]).name: command
    for command in re.findall(r"^```shell\n(.*?)^```$", PAGE, re.M | re.S)
}


# --- the page -------------------------------------------------------------------------


def test_the_page_shows_every_file_as_it_is() -> None:
    kept = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in (ROOT / "examples").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert dict(FILES) == kept
    assert len(PAGE.splitlines()) <= 200


def test_an_example_is_one_python_and_one_yaml_file() -> None:
    folders = sorted(path.name for path in (ROOT / "examples").iterdir())
    assert folders == sorted(COMMANDS)
    for folder in folders:
        kinds = [Path(name).suffix for name, _ in FILES if name.split("/")[1] == folder]
        assert sorted(kinds) == [".py", ".yaml"], folder
    assert not re.search(r"import _|\._[a-z]", "".join(text for _, text in FILES))


# --- the commands ---------------------------------------------------------------------


def digits() -> dict[str, np.ndarray]:
    images, _ = DATASETS["digits"].load(DatasetConfig())
    pixels, labels = images.pixels(torch.arange(500), None).numpy(), images.labels
    return {
        **{"train_x": pixels[:400], "train_y": labels[:400].numpy()},
        **{"test_x": pixels[400:], "test_y": labels[400:500].numpy()},
    }


def write_arrays(folder: Path) -> None:
    """Write what `examples/dataset` reads."""
    (folder / "arrays").mkdir()
    np.savez(folder / "arrays/my_dataset.npz", **digits())  # type: ignore[arg-type]


def write_hub(folder: Path) -> None:
    """Write what `examples/dataset_huggingface` reads: images and labels in Parquet."""
    arrays = digits()
    kinds = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    (folder / "hub/data").mkdir(parents=True)
    for part in ("train", "test"):
        pixels = list(arrays[f"{part}_x"][:, 0])
        columns = {"image": pixels, "label": arrays[f"{part}_y"].tolist()}
        table = Table.from_dict(columns, features=kinds)
        table.to_parquet(str(folder / f"hub/data/{part}-00000-of-00001.parquet"))


def follow(example: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run an example's command as the page shows it, in a folder like this one."""
    for name in ("conf", "examples", "hydra_plugins", "masksl"):
        (folder / name).symlink_to(ROOT / name)
    here, path = Path(sys.executable).parent, os.environ["PATH"]
    environment = {"PATH": f"{here}{os.pathsep}{path}", "HF_HOME": str(folder / "hf")}
    return subprocess.run(
        ["bash", "-c", COMMANDS[example]],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run every command, two at a time; return the run folders."""
    folders = {example: tmp_path_factory.mktemp(example) for example in COMMANDS}
    write_arrays(folders["dataset"])
    write_hub(folders["dataset_huggingface"])
    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(follow, folders, folders.values()))
    for done in ended:
        assert done.returncode == 0, done.stderr
    return {
        example: next((folder / "outputs").rglob(results.SUMMARY)).parent
        for example, folder in folders.items()
    }


@pytest.mark.slow
def test_the_compressor(runs: dict[str, Path]) -> None:
    run = runs["compressor"]
    summary = results.read_summary(run)
    assert summary["compressor"] == "mine"
    assert 8 < summary["bits_per_element"] < 8.02  # a byte an element, and headers
    assert 0 < results.read_rows(run)[-1]["relative_error"] < 0.02
    assert summary["top1"] > 0.8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "name"), [("dataset", "mine"), ("dataset_huggingface", "hub")]
)
def test_the_data_sets(example: str, name: str, runs: dict[str, Path]) -> None:
    run = runs[example]
    assert results.read_config(run)["dataset.name"] == name
    rows = results.read_rows(run)
    assert [row["samples"] for row in rows] == [400, 400]
    up = rows[-1]["bytes"]["evaluation"]["up"]
    assert up["label"] == 100
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.slow
def test_the_network(runs: dict[str, Path]) -> None:
    run = runs["network"]
    assert results.read_config(run)["model.name"] == "mine"
    row = results.read_rows(run)[0]
    sent = row["bytes"]["training"]["down"]["gradient"]
    frames = row["messages"]["training"]["down"]["gradient"]
    dense = 1437 * 4 * (32 * 2 * 2)  # what the second unit gives
    assert dense < sent <= dense + 64 * frames


@pytest.mark.slow
def test_the_method(runs: dict[str, Path]) -> None:
    run = runs["method"]
    assert results.read_summary(run)["method"] == "fedprox"
    config = results.read_config(run)
    assert (config["method.mu"], config["method.local_epochs"]) == (0.1, 1)
    rows = results.read_rows(run)
    assert rows[1]["loss"] < rows[0]["loss"]
    assert rows[1]["messages"]["training"] == {
        "up": {"model": 10},
        "down": {"model": 10},
    }


# --- what they promise ----------------------------------------------------------------


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let the examples be imported, and forget them afterwards."""
    tables: Any = (compress.COMPRESSORS, DATASETS, METHODS, model.ARCHITECTURES)
    for table in tables:
        for name in ("mine", "hub", "fedprox"):
            monkeypatch.setitem(table, name, None)
            del table[name]
    for folder in COMMANDS:
        monkeypatch.syspath_prepend(ROOT / "examples" / folder)
    for name, _ in FILES:
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    return monkeypatch


@pytest.mark.parametrize("dtype", compress.Compressor.dtypes)
def test_no_element_is_off_by_more_than_half_a_step(
    dtype: torch.dtype, plugins: pytest.MonkeyPatch
) -> None:
    del plugins
    __import__("my_compressor")
    for tensor in (torch.randn(3, 4, 5), torch.zeros(7), torch.tensor(-3e4)):
        tensor = tensor.to(dtype)
        for steps in (1, 10, 127):
            frame = make("mine", steps=steps).encode(tensor)
            step = tensor.abs().max().double() / steps
            error = (decode(frame).double() - tensor.double()).abs().max()
            rounding = torch.finfo(dtype).eps * tensor.abs().max().double()
            assert error <= step / 2 + rounding
            assert tensor.numel() < len(frame) <= tensor.numel() + 64
            with pytest.raises(FrameError):
                decode(frame[:-1])
    named = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    decoded = decode_set(encode_set(named, make("mine")), named)
    assert all(torch.allclose(decoded[key], named[key], atol=0.02) for key in named)
    bad: tuple[Any, ...] = (0, 128, 1.0)
    for steps in bad:
        with pytest.raises(ValueError, match="steps="):
            make("mine", steps=steps)


def test_the_compressor_serves_gradients(plugins: pytest.MonkeyPatch) -> None:
    del plugins
    (how,) = re.findall(r"serve gradients: `'(.*?)' '(.*?)'`", PAGE)
    rows = train(
        *("hydra.searchpath=[file://examples/compressor/conf]", *how),
        *("plugins=[my_compressor]", "rounds=1", "clients=2", "dataset.limit=60"),
    ).rows
    traffic = rows[0]["bytes"]["training"]["down"]["gradient"]
    assert 60 * 1024 < traffic < 60 * 1024 + 64 * 4  # 64x4x4 elements, a byte each


def test_a_broken_file_of_the_data_set_is_one_line(
    plugins: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    del plugins
    __import__("my_dataset")
    path = tmp_path / "my_dataset.npz"
    for content in (b"", b"PK\3\4", b"\x93NUMPY", b"no arrays at all"):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match="dataset.name='mine'") as caught:
            dataset.load(DatasetConfig(name="mine", root=str(tmp_path)))
        assert "\n" not in str(caught.value)
    arrays = digits()
    np.savez(path, **(arrays | {"test_y": arrays["test_y"][:-1]}))  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match="test set: 99 labels of 100 images"):
        dataset.load(DatasetConfig(name="mine", root=str(tmp_path)))


METHOD = (
    *("hydra.searchpath=[file://examples/method/conf]", "plugins=[my_method]"),
    "method=my_method",
)
SMALL = ("rounds=2", "clients=3", "dataset.limit=180", "compressor=sp")


def test_fedprox_without_its_term_is_federated_averaging(
    plugins: pytest.MonkeyPatch,
) -> None:
    del plugins
    assert settings_of(*METHOD)["compressor.name"] == "none"
    whole = untimed(train("method=fedavg", *SMALL).rows)
    assert untimed(train(*METHOD, *SMALL, "method.mu=0").rows) == whole
    assert untimed(train(*METHOD, *SMALL, "method.mu=0.5").rows) != whole


def test_fedprox_stays_near_the_model_of_the_round(
    plugins: pytest.MonkeyPatch,
) -> None:
    del plugins
    distances = []
    for mu in (0, 1, 10):
        training = train(
            *METHOD, "rounds=1", "clients=2", "dataset.limit=180", f"method.mu={mu}"
        )
        start = training.client(0).setup.initial
        server = training.server.model
        moved = [(server.tensors[n] - start[n]).norm() for n in server.parameters]
        distances.append(float(torch.stack(moved).norm()))
    assert distances[0] > distances[1] > distances[2] > 0


def test_the_key_of_the_method_is_checked(plugins: pytest.MonkeyPatch) -> None:
    del plugins
    with pytest.raises(ValueError, match="method.mu=-1: must be a number from 0 on"):
        settings_of(*METHOD, "method.mu=-1")
