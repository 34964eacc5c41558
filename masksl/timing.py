"""Where the time goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds by what they were spent on.

    On a GPU, which works on while the program goes on, a wait counts for what waits.

    Attributes
    ----------
    seconds : dict[str, float]
        Seconds by part.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Measure what happens inside for a part."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - began
