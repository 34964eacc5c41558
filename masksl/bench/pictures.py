"""Beside `ec`, what picture coders take for the same activations at the same error.

The activations are those of training images, augmented as in training. The maps of a
frame are laid side by side in one grey picture of 8 bits. Of each coder's settings the
smallest file is taken whose relative error is at most that of `ec`.
"""

import io
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from rich.console import Console
from rich.table import Table

from masksl.bench.coding import SAMPLES, Row, frames_of
from masksl.compress import decode, make

ERRORS = (0.4, 0.25, 0.15, 0.05)
FRAMES = 2  # of each cut
_TOP = 0.9999  # quantile that is white: a few larger elements would darken all others
_CODERS: dict[str, tuple[str, str, list[dict[str, Any]]]] = {
    "AVIF": (
        "avif",
        "AVIF",
        [{"quality": q, "speed": 6, "subsampling": "4:0:0"} for q in range(4, 101)],
    ),
    "JPEG 2000": (
        *("jpg_2000", "JPEG2000"),
        [
            {"irreversible": True, "quality_mode": "rates", "quality_layers": [rate]}
            for rate in np.geomspace(1, 60, 100).tolist()
        ],
    ),
    "WebP": ("webp", "WEBP", [{"quality": q, "method": 4} for q in range(1, 101)]),
    "JPEG": ("jpg", "JPEG", [{"quality": q} for q in range(1, 101)]),
}


def measure(runs: Iterable[Path], root: str) -> list[Row]:
    """Return bits an element by cut and error, of `ec` and of each picture coder.

    Parameters
    ----------
    runs : Iterable[Path]
        Folders of runs with a checkpoint, see `masksl.bench.activations.trained`.
    root : str
        Folder of the data sets.

    Returns
    -------
    list[Row]
        For each run facts of its network and the rows of its table.
    """
    return [_network(run, root) for run in runs]


def _network(run: Path, root: str) -> Row:
    """Return facts and rows of a run's network."""
    frames, network = frames_of(run, root, augmented=True)
    rows = []
    for cut, tensors in frames.items():
        found = [_bits(tensor, ERRORS) for tensor in tensors[:FRAMES]]
        for error, several in zip(ERRORS, zip(*found, strict=True), strict=True):
            row: Row = {"cut": cut, "error": error}
            for name in several[0]:
                values = [each[name] for each in several]
                known = [value for value in values if value is not None]
                row[name] = mean(known) if len(known) == len(values) else None
            rows.append(row)
    return {"network": network, "rows": rows}


def _bits(
    tensor: torch.Tensor, errors: Iterable[float]
) -> list[dict[str, float | None]]:
    """Return bits an element of one frame by coder, None where no setting does.

    There is an entry for each error.
    """
    files = {name: list(_files(name, tensor)) for name in _coders()}
    result = []
    for error in errors:
        frame = make("ec", error=error).encode(tensor)
        most = _error(decode(frame).numpy(), tensor.numpy())
        found: dict[str, float | None] = {"ec": 8 * len(frame) / tensor.numel()}
        for name, several in files.items():
            sizes = [size for size, own in several if own <= most]
            found[name] = 8 * min(sizes) / tensor.numel() if sizes else None
        result.append(found)
    return result


def _coders() -> Iterable[str]:
    """Return the names of the coders that Pillow was built with."""
    return [
        name for name, (feature, _, _) in _CODERS.items() if features.check(feature)
    ]


def _files(name: str, tensor: torch.Tensor) -> Iterator[tuple[int, float]]:
    """Yield bytes and relative error of a picture coder at each of its settings."""
    _, form, settings = _CODERS[name]
    maps = mosaic(tensor.numpy())
    white = float(np.quantile(maps, _TOP)) or 1.0
    picture = Image.fromarray(np.clip(np.rint(maps / white * 255), 0, 255).astype("u1"))
    for options in settings:
        file = io.BytesIO()
        picture.save(file, form, **options)
        with Image.open(io.BytesIO(file.getvalue())) as decoded:
            levels = np.asarray(decoded.convert("L"), np.float64)
        yield len(file.getvalue()), _error(levels * (white / 255), maps)


def mosaic(maps: np.ndarray) -> np.ndarray:
    """Return all maps of an activation (B, C, H, W) side by side, nearly a square."""
    batch, channels, height, width = maps.shape
    number = batch * channels
    columns = math.ceil(math.sqrt(number))
    rows = -(-number // columns)
    whole = np.zeros((rows * columns, height, width), maps.dtype)
    whole[:number] = maps.reshape(number, height, width)
    parts = whole.reshape((rows, columns, height, width))
    grid = np.swapaxes(parts, 1, 2)
    return grid.reshape((rows * height, columns * width))


def _error(decoded: np.ndarray, exact: np.ndarray) -> float:
    """Return the relative error, by 2-norms."""
    exact = exact.astype(np.float64)
    return float(np.linalg.norm(decoded - exact) / np.linalg.norm(exact))


def show(networks: Iterable[Row]) -> None:
    """Print a table for each network."""
    for result in networks:
        _show(result)


def _show(result: Row) -> None:
    network = result["network"]
    title = f"{network['model']}, {network['dataset']}, top-1 {network['top1']:.2%}"
    table = Table(title=f"{title}; bits an element, frames of {SAMPLES}")
    names = [key for key in result["rows"][0] if key not in ("cut", "error")]
    table.add_column("cut")
    for column in ("error", *names):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        cells = ("–" if row[name] is None else f"{row[name]:.3f}" for name in names)
        table.add_row(row["cut"], f"{row['error']:g}", *cells)
    Console(width=100).print(table)
