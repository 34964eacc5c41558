"""What pruning and regrowing costs a client of FLASH beside its training.

The network is ResNet18 for CIFAR-10 at a density of 5 %, 11,159,232 maskable weights; a
client has 500 images, 16 mini-batches of 32. Images are random numbers.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from masksl import model
from masksl.methods.flash import FlashConfig
from masksl.methods.flash.coding import MaskCoding
from masksl.methods.flash.evolution import Evolution, Plan, UnderMask
from masksl.methods.flash.start import Start
from masksl.settings import RunConfig
from masksl.training.network import LocalNetwork
from masksl.training.optimizer import OptimizerConfig
from masksl.training.tensors import copies

NETWORK = "resnet18"
BATCH, BATCHES = 32, 16
DENSITY = 0.05

Row = dict[str, Any]


def measure(repeats: int) -> list[Row]:
    """Time the parts of a local epoch with one adjustment of the mask.

    Returns
    -------
    list[dict[str, Any]]
        What is done, how often in an epoch, the median of its CPU seconds, and the
        share of the epoch's training steps that all of it takes.
    """
    optimizer = OptimizerConfig(lr=0.1, momentum=0.0, weight_decay=0.0)
    module = nn.Sequential(*model.build(NETWORK, 10, 3, seed=0))
    run = RunConfig(
        rounds=1, clients=1, batch_size=BATCH, eval_batch_size=BATCH, seed=0
    )
    start = Start.of(module, FlashConfig(variant="jmwst", density=DENSITY), run)
    before = start.mask(start.counts)
    mask = torch.from_numpy(before.copy())
    tensors = copies(start.masked(start.tensors, mask))
    network = LocalNetwork(module, tensors, {}, torch.get_num_threads())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (BATCH,), generator=generator)
    growth = start.growth(0, 1)
    evolution = Evolution(mask, start.layers.kept(DENSITY), growth)
    plan, coding = Plan(BATCHES, 1, 0.25), MaskCoding(start)
    under = UnderMask(network.tensors, evolution, plan)

    def train() -> None:
        network.train(images, labels, optimizer, lr=0.1, seed=0)

    def adjust() -> None:
        with torch.no_grad():
            evolution.adjust(network.tensors, plan.rate_after(BATCHES // 2))

    rows = [
        _timed("training step", BATCHES, train, repeats),
        _timed("masking the weights", BATCHES, lambda: under.after(0), repeats),
    ]
    adjust()
    changes, after = evolution.changes[:1], mask.numpy().copy()
    data = coding.encode_changes(before, changes, after)
    rows += [
        _timed("adjusting the mask", 1, adjust, repeats),
        _timed(
            *("encoding the adjustment", 1),
            *(lambda: coding.encode_changes(before, changes, after), repeats),
        ),
        _timed(
            *("decoding it, at the server", 1),
            *(lambda: coding.decode_changes(data, before, growth), repeats),
        ),
    ]
    assert np.array_equal(coding.decode_changes(data, before, growth), after)
    whole = BATCHES * rows[0]["seconds"]
    for row in rows:
        row["share"] = row["times"] * row["seconds"] / whole
    return rows


def _timed(part: str, times: int, call: Callable[[], Any], repeats: int) -> Row:
    """Return how long a part takes, which an epoch has so many times."""
    seconds = []
    call()
    for _ in range(repeats):
        began = time.process_time()
        call()
        seconds.append(time.process_time() - began)
    return {"part": part, "times": times, "seconds": median(seconds)}


def show(rows: list[Row]) -> None:
    """Print the rows as a table."""
    images = BATCH * BATCHES
    table = Table(title=f"{NETWORK}, density {DENSITY}, {images} images")
    for column in ("part", "times an epoch", "CPU seconds", "of the steps"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for row in rows:
        shown = f"{row['seconds']:.3f}", f"{row['share']:.1%}"
        table.add_row(row["part"], str(row["times"]), *shown)
    Console().print(table)
