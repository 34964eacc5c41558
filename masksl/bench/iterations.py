"""The parts of an iteration of SASG and its baselines, on an engine."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn

from masksl.bench import steps
from masksl.bench.apps import settings_of
from masksl.methods.network import initial_units
from masksl.methods.sasg.vectors import Layout, total_of
from masksl.runtime.compressors import EXACT, compressor_of

JOB = (
    *("method=sasg", "dataset=mnist", "model=mlp_512", "batch_size=10"),
    *("dataset.limit=4000", "dataset.test_limit=100", "threads.server=1"),
)
# The settings of each method by its name, beside those of the job.
CASES: dict[str, tuple[str, ...]] = {
    "SGD": ("method.upload=dense", "method.adaptive=false"),
    "LASG": ("method.upload=dense",),
    "Sparse, topk, relay": ("method.adaptive=false", "compressor=topk"),
    "SASG, topk, dense": ("compressor=topk", "method.down=dense"),
    "SASG, topk, sum": ("compressor=topk", "method.down=sum"),
    "SASG, topk, relay": ("compressor=topk",),
    "SASG, spsign, relay": (),
}
# Shares of a round, by what they are in an iteration.
_PARTS = {
    "clients": "gradients_ms",
    "codec": "codec_ms",
    "server": "sum_ms",
    "exchange": "exchange_ms",
    "other": "other_ms",
}


def measure(engine: str, case: str, root: str) -> dict[str, Any]:
    """Time the iterations of a method on an engine, ten workers.

    Returns
    -------
    dict[str, Any]
        A row: milliseconds of an iteration and of its parts; those of the workers are
        of the process that takes longest.
    """
    row = steps.measure(engine, *JOB, *CASES[case], root)
    parts = {name: row["step_ms"] * row["shares"][key] for key, name in _PARTS.items()}
    return {"method": case, "engine": engine, "iteration_ms": row["step_ms"]} | parts


def measure_codec(case: str, repeats: int = 21) -> dict[str, Any]:
    """Time one upload of a method alone, of independent normal values.

    Returns
    -------
    dict[str, Any]
        A row: milliseconds to encode it, to decode it, to add up ten of them.
    """
    settings = settings_of(*JOB, *CASES[case])
    layout = Layout.of(nn.Sequential(*initial_units(settings)))
    sparse = settings["method.upload"] == "sparse"
    compressor = compressor_of(settings, "compressor") if sparse else EXACT
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(layout.elements, generator=generator)
    data = layout.encode(flat, compressor, seed=0)
    vector = layout.decode_vector(data, compressor)
    return {
        "method": case,
        "bytes": len(data),
        "encode_ms": _milliseconds(
            lambda: layout.encode(flat, compressor, seed=0), repeats
        ),
        "decode_ms": _milliseconds(
            lambda: layout.decode_vector(data, compressor), repeats
        ),
        "sum_ms": _milliseconds(lambda: total_of([vector] * 10, layout), repeats),
    }


def _milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1e3 * median(times)
