"""Frame-sets: what a model's message and a sum of sparse updates take.

A model of ResNet18 is encoded and decoded as one frame-set of exact values, in turn
with what no way of sending it can do without, a checksum of its bytes and one copy of
them, and with a frame for each tensor. Ten sparse updates of its parameters are summed
by positions, in turn with whole tensors. Times are medians.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
import xxhash
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from masksl import model
from masksl.codec import wire
from masksl.compress import decode, decode_set, decode_set_sparse, encode_set, make

UPDATES = 10
SPARSITY = 0.99
POSITIONS = ("paper", "auto")

Named = Mapping[str, Tensor]
Timed = dict[str, list[float]]

_NONE = make("none")


def resnet18() -> nn.Module:
    """Return ResNet18 for 100 classes with initial weights."""
    return nn.Sequential(*model.build("resnet18", 100, 3, seed=0))


def copy_encoded(parts: Sequence[memoryview]) -> bytes:
    """Return bytes that lie apart as one: one checksum, one assembling copy."""
    checksum = xxhash.xxh3_64()
    for part in parts:
        checksum.update(part)
    return b"".join([checksum.digest(), *parts])


def copy_decoded(data: bytes) -> Tensor:
    """Return a copy of all bytes after one checksum."""
    xxhash.xxh3_64_intdigest(data)
    return wire.to_tensor(memoryview(data), torch.uint8, "cpu")


def frames_encoded(tensors: Named) -> list[bytes]:
    """Return a frame of exact values for each tensor, integers as float64."""
    return [
        _NONE.encode(tensor if tensor.is_floating_point() else tensor.double())
        for tensor in tensors.values()
    ]


def frames_decoded(frames: list[bytes], like: Named) -> dict[str, Tensor]:
    """Undo `frames_encoded`."""
    return {
        name: decode(frame, max_elements=own.numel()).to(own.dtype)
        for (name, own), frame in zip(like.items(), frames, strict=True)
    }


def sum_of_positions(sets: list[bytes], like: Named) -> dict[str, Tensor]:
    """Return the sum of sparse updates, by the positions of their kept elements."""
    total = {name: torch.zeros(own.numel()) for name, own in like.items()}
    for data in sets:
        for name, (positions, values) in decode_set_sparse(data, like).items():
            total[name].index_add_(0, positions, values)
    return {name: total[name].view(own.shape) for name, own in like.items()}


def sum_of_tensors(sets: list[bytes], like: Named) -> dict[str, Tensor]:
    """Return the same, by whole tensors."""
    total = {name: torch.zeros_like(own) for name, own in like.items()}
    for data in sets:
        for name, update in decode_set(data, like).items():
            total[name].add_(update)
    return total


def in_turn(ways: Mapping[str, Callable[[], Any]], repeats: int) -> Timed:
    """Time several ways one after the other, ``repeats`` times over."""
    seconds: Timed = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            result = way()
            if repeat:  # the first time is for the caches
                seconds[name].append(time.perf_counter() - began)
            del result
    return seconds


def measure(repeats: int, network: nn.Module | None = None) -> list[dict[str, Any]]:
    """Return the rows of a network, by default ResNet18.

    Parameters
    ----------
    repeats : int
        How often each way is timed.
    network : nn.Module | None
        Another network.

    Returns
    -------
    list[dict[str, Any]]
        What is done, the way, bytes, milliseconds, and ``ratio``: the time over that
        of the first way, the median of those of each turn.
    """
    network = network or resnet18()
    return [*_message(network.state_dict(), repeats), *_sums(network, repeats)]


def _message(tensors: Named, repeats: int) -> list[dict[str, Any]]:
    data, frames = encode_set(tensors), frames_encoded(tensors)
    parts = wire.to_host(list(tensors.values()))
    exact = copy_encoded(parts)
    sizes = [len(exact), len(data), sum(map(len, frames))]
    encode = {
        "checksum and copy": lambda: copy_encoded(parts),
        "frame-set": lambda: encode_set(tensors),
        f"{len(frames)} frames": lambda: frames_encoded(tensors),
    }
    undo = {
        "checksum and copy": lambda: copy_decoded(exact),
        "frame-set": lambda: decode_set(data, tensors),
        f"{len(frames)} frames": lambda: frames_decoded(frames, tensors),
    }
    return [
        *_rows("encode a model", in_turn(encode, repeats), sizes),
        *_rows("decode a model", in_turn(undo, repeats), sizes),
    ]


def _sums(network: nn.Module, repeats: int) -> list[dict[str, Any]]:
    like = {name: tensor.detach() for name, tensor in network.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    updates = [
        {n: torch.randn(t.shape, generator=generator) for n, t in like.items()}
        for _ in range(UPDATES)
    ]
    rows = []
    for positions in POSITIONS:
        compressor = make("sp", sparsity=SPARSITY, positions=positions)
        sets = [encode_set(update, compressor, joined=True) for update in updates]
        ways = {
            "whole tensors": lambda sets=sets: sum_of_tensors(sets, like),
            "positions": lambda sets=sets: sum_of_positions(sets, like),
        }
        sizes = [sum(map(len, sets))] * 2
        what = f"sum {UPDATES} updates, positions={positions}"
        rows += _rows(what, in_turn(ways, repeats), sizes)
    return rows


def _rows(what: str, timed: Timed, sizes: list[int]) -> list[dict[str, Any]]:
    first = next(iter(timed.values()))
    return [
        {
            "what": what,
            "way": way,
            "bytes": size,
            "ms": 1e3 * median(seconds),
            "ratio": median(s / f for s, f in zip(seconds, first, strict=True)),
        }
        for (way, seconds), size in zip(timed.items(), sizes, strict=True)
    ]


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows as a table."""
    table = Table(title=f"frame-sets, {torch.get_num_threads()} threads")
    for column in ("what", "way"):
        table.add_column(column)
    for column in ("bytes", "ms", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["what"],
            row["way"],
            f"{row['bytes']:,}",
            f"{row['ms']:.1f}",
            f"{row['ratio']:.2f}",
        )
    Console(width=100).print(table)
