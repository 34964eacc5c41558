"""What compression costs in training: samples a second, by compressor and engine."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from masksl.bench import steps

JOB = (
    *("task=resnet8_cifar10", "cut=medium", "clients=10", "batch_size=26"),
    *("traffic=paper", "client_sync=step"),
    *("dataset.limit=5200", "dataset.test_limit=260"),
)
PLACES: dict[str, tuple[str, ...]] = {
    "local": ("threads.client=2", "threads.server=2"),
    "ray": ("engine.hosts=2", "threads.client=1", "threads.server=2"),
}
PRECISIONS: dict[str, tuple[str, ...]] = {
    "float32": ("compute.precision=float32", "compute.channels_last=false"),
    "bfloat16": ("compute.precision=bfloat16", "compute.channels_last=true"),
}
NONE = "none"
COMPRESSORS: dict[str, tuple[str, ...]] = {
    NONE: ("compressor=none",),
    "ms": ("compressor=ms",),
    "ec": ("compressor=ec", "compressor.error=0.25"),
}


def measure(root: str, repeats: int = 3) -> list[dict[str, Any]]:
    """Time training on ResNet8 and CIFAR-10, compressors in turn.

    Parameters
    ----------
    root : str
        Override that names the folder of the data.
    repeats : int
        Runs of each case. All cases run once before any runs again.

    Returns
    -------
    list[dict[str, Any]]
        A row for each case: medians over the repeats of samples a second and of the
        shares of the time, and ``times_none``, the training time divided by that
        without compression.
    """
    cases = [
        (precision, place, compressor)
        for precision in PRECISIONS
        for place in PLACES
        for compressor in COMPRESSORS
    ]
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {c: [] for c in cases}
    for _ in range(repeats):
        for case in cases:
            found[case].append(_once(*case, root))
    speed = {
        case: median(row["samples_per_second"] for row in rows)
        for case, rows in found.items()
    }
    return [
        {
            "precision": case[0],
            "engine": case[1],
            "compressor": case[2],
            "samples_per_second": speed[case],
            "times_none": speed[*case[:2], NONE] / speed[case],
            "shares": _shares(found[case]),
        }
        for case in cases
    ]


def _once(precision: str, place: str, compressor: str, root: str) -> dict[str, Any]:
    """Run a case."""
    chosen = (*PRECISIONS[precision], *PLACES[place], *COMPRESSORS[compressor])
    return steps.measure(place, *JOB, *chosen, root)


def _shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the median share of each activity."""
    return {
        name: median(row["shares"][name] for row in rows) for name in rows[0]["shares"]
    }
