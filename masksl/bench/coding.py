"""Entropy coding: bits and times of coded frames of a trained network, and of masks.

The activations are those of test images at the network's named cuts, in training mode,
in frames as a client sends them. With another checkout of the package (``--base``), its
code encodes the same activations: processes of both take turns. Run as a script, this
module is such a process.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

CASES: list[tuple[str, dict[str, Any]]] = [
    *(("ec", {"error": error}) for error in (0.4, 0.25, 0.1, 0.05)),
    ("ms", {"lossless": "context"}),
]
FRAMES, SAMPLES = 6, 26  # of each cut; in a frame
ROOT = Path(__file__).resolve().parents[2]

Row = dict[str, Any]


def frames_of(
    run: Path, root: str, *, augmented: bool = False
) -> tuple[dict[str, list[torch.Tensor]], Row]:
    """Return frames of activations by cut, and facts of the network.

    Parameters
    ----------
    run : Path
        Folder of a run with a checkpoint, see `masksl.bench.activations.trained`.
    root : str
        Folder of the data sets.
    augmented : bool
        Whether they are those of training images, augmented as in training, and not of
        test images.
    """
    # Imported here: a process that times has the package of another checkout.
    # pylint: disable=import-outside-toplevel
    from masksl import model
    from masksl.bench.activations import activation, described, trained
    from masksl.dataset import DatasetConfig, load

    units, facts = trained(run)
    settings = facts["settings"]
    data = load(DatasetConfig(name=settings["dataset.name"], root=root))
    indices = torch.arange(FRAMES * SAMPLES)
    if augmented:
        images, _ = data.train_batch(indices, torch.Generator().manual_seed(0))
    else:
        images, _ = data.test_batch(indices)
    name = settings["model.name"]
    frames = {
        cut: [activation(units, count, part) for part in images.split(SAMPLES)]
        for cut, count in model.ARCHITECTURES[name].cuts.items()
    }
    return frames, described(facts)


def time_cases(frames: dict[str, list[torch.Tensor]]) -> list[Row]:
    """Encode and decode every frame in every case, on one thread.

    Returns
    -------
    list[dict[str, Any]]
        For each cut and case, bits an element with the header, and the medians of the
        nanoseconds an element to encode and to decode.
    """
    # pylint: disable-next=import-outside-toplevel
    from masksl.compress import decode, make

    torch.set_num_threads(1)
    rows = []
    for cut, tensors in frames.items():
        for name, options in CASES:
            compressor = make(name, **options)
            decode(compressor.encode(tensors[0]))
            sizes, encode, undo = [], [], []
            for tensor in (*tensors, *tensors):
                began = time.perf_counter()
                frame = compressor.encode(tensor)
                encoded = time.perf_counter()
                decode(frame)
                ended = time.perf_counter()
                sizes.append(8 * len(frame) / tensor.numel())
                encode.append(1e9 * (encoded - began) / tensor.numel())
                undo.append(1e9 * (ended - encoded) / tensor.numel())
            rows.append(
                {
                    "cut": cut,
                    "compressor": name,
                    "options": options,
                    "bits": mean(sizes),
                    "encode_ns": median(encode),
                    "decode_ns": median(undo),
                }
            )
    return rows


def measure(run: Path, root: str, base: Path | None, repeats: int) -> Row:
    """Time the cases of this checkout, and of another in turn with it.

    Parameters
    ----------
    run : Path
        Folder of a run.
    root : str
        Folder of the data sets.
    base : Path | None
        The other checkout.
    repeats : int
        Processes of each.
    """
    frames, network = frames_of(run, root)
    trees = {"new": ROOT} | ({"base": base.resolve()} if base else {})
    results: dict[str, list[list[Row]]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frames.safetensors"
        named = {
            f"{cut}/{i}": tensor.contiguous()
            for cut, tensors in frames.items()
            for i, tensor in enumerate(tensors)
        }
        save_file(named, path)
        for _ in range(repeats):
            for name, tree in trees.items():
                done = subprocess.run(
                    [sys.executable, __file__, str(path)],
                    cwd=folder,
                    env={"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
                    stdout=subprocess.PIPE,
                    check=True,
                )
                results[name].append(json.loads(done.stdout))
    rows = _merged(results["new"])
    if base:
        for row, other in zip(rows, _merged(results["base"]), strict=True):
            row["base"] = {key: other[key] for key in KEYS}
    return {"network": network, "rows": rows, "masks": masks()}


KEYS = ("bits", "encode_ns", "decode_ns")


def _merged(results: list[list[Row]]) -> list[Row]:
    """Return rows with the medians over processes."""
    return [
        same[0] | {key: median(row[key] for row in same) for key in KEYS}
        for same in zip(*results, strict=True)
    ]


def masks(count: int = 2**20) -> list[Row]:
    """Return bits an element of masks of known probabilities, and their entropy.

    One probability for all; that of each of eleven levels, which both sides know; and a
    mask that differs from one that both sides hold with one probability.
    """
    # pylint: disable-next=import-outside-toplevel
    from masksl.compress import make

    generator = torch.Generator().manual_seed(0)

    def drawn(probability: torch.Tensor | float) -> torch.Tensor:
        return torch.rand(count, generator=generator) < probability

    coder, rows = make("mask"), []
    for share in (0.5, 0.1, 0.01, 0.001):
        mask = drawn(share)
        bits = 8 * len(coder.encode(mask)) / count
        rows.append(_mask_row(f"ones {share:g}", bits, [float(mask.float().mean())]))
    levels = torch.randint(0, 11, (count,), generator=generator)
    mask = drawn(levels / 10)
    bits = 8 * len(coder.encode(mask, reference=levels)) / count
    shares = [float(mask[levels == level].float().mean()) for level in range(11)]
    rows.append(_mask_row("levels 0 to 10, known", bits, shares))
    before, flips = drawn(0.3), drawn(0.01)
    bits = 8 * len(coder.encode(before ^ flips, reference=before)) / count
    rows.append(_mask_row("1 % other than before", bits, [float(flips.float().mean())]))
    return rows


def _mask_row(kind: str, bits: float, shares: Iterable[float]) -> Row:
    """Return a row; the entropy is that of equally frequent levels."""
    entropy = mean(
        -sum(p * math.log2(p) for p in (share, 1 - share) if p) for share in shares
    )
    return {"mask": kind, "bits": bits, "entropy": entropy, "ratio": bits / entropy}


def show(result: Row) -> None:
    """Print the rows as tables."""
    network = result["network"]
    title = f"{network['model']}, {network['dataset']}, top-1 {network['top1']:.2%}"
    table = Table(title=f"{title}; frames of {SAMPLES}, one thread")
    for column in ("cut", "compressor"):
        table.add_column(column)
    for column in ("bits", "encode ns", "decode ns"):
        table.add_column(column, justify="right")
        table.add_column("base", justify="right")
        table.add_column("ratio", justify="right")
    ratios: dict[str, list[float]] = {key: [] for key in KEYS}
    for row in result["rows"]:
        option = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        cells = []
        for key in KEYS:
            digits = 4 if key == "bits" else 1
            other = row.get("base", {}).get(key)
            ratio = row[key] / other if other else None
            cells += [
                f"{row[key]:.{digits}f}",
                f"{other:.{digits}f}" if other else "",
                f"{ratio:.3f}" if ratio else "",
            ]
            if ratio and row["compressor"] == "ec":
                ratios[key].append(ratio)
        table.add_row(row["cut"], f"{row['compressor']}, {option}", *cells)
    if ratios["bits"]:
        cells = [c for key in KEYS for c in ("", "", f"{mean(ratios[key]):.3f}")]
        table.add_row("all", "ec, mean", *cells)
    Console(width=130).print(table)
    table = Table(title=f"masks of {2**20:,} elements")
    table.add_column("mask")
    for column in ("bits", "entropy", "ratio"):
        table.add_column(column, justify="right")
    for row in result["masks"]:
        figures = (f"{row[key]:.5f}" for key in ("bits", "entropy", "ratio"))
        table.add_row(row["mask"], *figures)
    Console(width=100).print(table)


def _read(path: str) -> dict[str, list[torch.Tensor]]:
    """Return the frames of a file that `measure` wrote."""
    frames: dict[str, list[torch.Tensor]] = {}
    for name, tensor in sorted(load_file(path).items()):
        frames.setdefault(name.partition("/")[0], []).append(tensor)
    return frames


if __name__ == "__main__":
    json.dump(time_cases(_read(sys.argv[1])), sys.stdout)
