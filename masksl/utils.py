"""Seeds, the stopwatch, and the trimming of the heap."""

import ctypes
import hashlib
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

MANY_CLIENTS = 64  # number of clients above which calling `trim_heap` pays off


# pylint: disable=redefined-builtin
def derive_seed(
    seed: int, purpose: str, *, client: int = 0, round: int = 0, step: int = 0
) -> int:
    """Derive the seed of one purpose at one place of a run.

    Parameters
    ----------
    seed : int
        Seed of the run.
    purpose : str
        What is drawn, e.g. ``shuffle``.
    client : int
        Partition of the client, where it matters.
    round : int
        Round, where it matters.
    step : int
        Step within the round, where it matters.

    Returns
    -------
    int
        63 bits, statistically independent of the seeds of all other arguments.
    """
    text = f"{seed}/{purpose}/{client}/{round}/{step}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_generator(
    seed: int, purpose: str, *, client: int = 0, round: int = 0, step: int = 0
) -> torch.Generator:
    """Return a CPU generator seeded by `derive_seed`, with the same parameters."""
    derived = derive_seed(seed, purpose, client=client, round=round, step=step)
    return torch.Generator().manual_seed(derived)


class Stopwatch:
    """Seconds by activity.

    CUDA kernels run asynchronously: their time counts for the activity that
    synchronises.

    Attributes
    ----------
    seconds : dict[str, float]
        Seconds by activity.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Add the time spent inside the context to an activity."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[activity] += time.perf_counter() - began


def trim_heap() -> None:
    """Return free memory to the system, if the C library can (glibc)."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)
