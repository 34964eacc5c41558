"""The compressors' speed and size, on made-up data.

The compressors of activations at the paper's settings, at three sizes, on ReLU-like and
on signed data; beside ``ms`` a straightforward PyTorch version of the published
procedure, timed in turn with it, and a copy within the device's memory. Times are
medians; on a GPU they end when its work is done, and frames are on the host.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from masksl.compress import decode, make

CASES: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("qu", {"bits": 3}),
    ("qq", {"bits": 3}),
    ("fp", {"exponent": 2, "mantissa": 1}),
    ("sp", {"sparsity": 0.95875}),
    ("rt", {"sparsity": 0.95875, "alpha": 0.1}),
    ("ms", {"sparsity": 0.99, "bits": 2}),
    ("ms", {"lossless": "fast"}),
    ("ms", {"values": "bfloat16", "lossless": "context"}),
    ("ec", {"error": 0.25}),
    ("ec", {"error": 0.25, "context": "none"}),
]
SIZES = (64, 256, 1024)  # samples of 64x16x16: 1 M, 4.2 M, 16.8 M elements
COPY = "copy on the device"
STRAIGHT = "ms, straightforward"

Encoded = tuple[torch.Tensor, torch.Tensor]
Encode = Callable[[torch.Tensor], Any]
Decode = Callable[[Any], torch.Tensor]


def straightforward_encode(tensor: torch.Tensor, kept: int, bits: int = 2) -> Encoded:
    """Return values and float mask by the published procedure, without packing.

    A full ``torch.topk``, a mask of floats, a sort of the indices.
    """
    flat, top = tensor.flatten(), 2**bits - 1
    values, indices = torch.topk(flat, kept)
    mask = torch.round(flat * top / values.min()).clamp_(max=top - 1)
    mask[indices] = top
    return flat[indices.sort().values], mask


def straightforward_decode(
    values: torch.Tensor, mask: torch.Tensor, shape: torch.Size, bits: int = 2
) -> torch.Tensor:
    """Undo `straightforward_encode`."""
    top = 2**bits - 1
    decoded = mask * values.min() / top
    decoded[mask == top] = values
    return decoded.view(shape)


def compare(tensor: torch.Tensor, repeats: int) -> list[dict[str, Any]]:
    """Time every compressor on a tensor, in turn.

    Parameters
    ----------
    tensor : torch.Tensor
        float32, on the device that is measured.
    repeats : int
        How often each is timed.

    Returns
    -------
    list[dict[str, Any]]
        A row for each: times in milliseconds, bytes, error.
    """
    kept = tensor.numel() // 100
    timed: dict[str, tuple[Encode, Decode]] = {COPY: (torch.clone, torch.clone)}
    undo_frame = partial(decode, device=tensor.device)
    for name, options in CASES:
        label = ", ".join([name, *(f"{key}={value}" for key, value in options.items())])
        timed[label] = make(name, **options).encode, undo_frame
    if float(tensor.amin()) >= 0:  # the published procedure knows no signs
        timed[STRAIGHT] = (
            lambda whole: straightforward_encode(whole, kept),
            lambda sent: straightforward_decode(sent[0], sent[1], tensor.shape),
        )
    times: dict[str, tuple[list[float], list[float]]] = {k: ([], []) for k in timed}
    results: dict[str, tuple[Any, torch.Tensor]] = {}
    for _ in range(repeats):
        for label, (encode, undo) in timed.items():
            began = _now(tensor.device)
            frame = encode(tensor)
            encoded = _now(tensor.device)
            decoded = undo(frame)
            times[label][0].append(encoded - began)
            times[label][1].append(_now(tensor.device) - encoded)
            results[label] = frame, decoded
    return [
        _row(label, tensor, *results[label], *map(median, times[label]))
        for label in timed
    ]


def _now(device: torch.device) -> float:
    """Return seconds of a clock, read when the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _row(
    label: str,
    tensor: torch.Tensor,
    frame: Any,
    decoded: torch.Tensor,
    encode: float,
    undo: float,
) -> dict[str, Any]:
    parts = (frame,) if isinstance(frame, torch.Tensor) else frame
    packed = isinstance(frame, bytes)
    sent = len(frame) if packed else sum(part.nbytes for part in parts)
    return {
        "compressor": label,
        "elements": tensor.numel(),
        "encode_ms": 1e3 * encode,
        "decode_ms": 1e3 * undo,
        "encode_gb_s": tensor.nbytes / encode / 1e9,
        "bytes": sent,
        "bits": 8 * sent / tensor.numel(),
        "factor": tensor.nbytes / sent,
        "error": float((decoded - tensor).norm() / tensor.norm()),
    }


def measure(
    repeats: int, device: str = "cpu", sizes: Sequence[int] = SIZES
) -> list[dict[str, Any]]:
    """Return the rows of all sizes and kinds of data, on a device."""
    rows = []
    for samples in sizes:
        generator = torch.Generator().manual_seed(0)
        normal = torch.randn(samples, 64, 16, 16, generator=generator).to(device)
        for kind, tensor in (("relu", normal.relu()), ("signed", normal)):
            rows += [{"data": kind} | row for row in compare(tensor, repeats)]
    return rows


def show(rows: list[dict[str, Any]], hardware: str) -> None:
    """Print the rows of the named hardware as a table."""
    threads = torch.get_num_threads()
    table = Table(title=f"compressors, {hardware}, {threads} threads")
    for column in ("data", "elements", "compressor"):
        table.add_column(column, justify="left" if column != "elements" else "right")
    for column in (
        "encode ms",
        "decode ms",
        "GB/s",
        "bytes",
        "bits",
        "factor",
        "error",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["data"],
            f"{row['elements']:,}",
            row["compressor"],
            f"{row['encode_ms']:.2f}",
            f"{row['decode_ms']:.2f}",
            f"{row['encode_gb_s']:.2f}",
            f"{row['bytes']:,}",
            f"{row['bits']:.3f}",
            f"{row['factor']:.2f}",
            f"{row['error']:.4f}",
        )
    Console(width=150).print(table)
