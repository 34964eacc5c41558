"""What the server knows of its workers: their last uploads, and their skips."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from masksl.compress import Compressor
from masksl.methods.sasg.vectors import Layout, Vector, total_of
from masksl.training.tensors import Tensors


@dataclass
class Worker:
    """What the server knows of a worker.

    Attributes
    ----------
    data : bytes
        Its last upload as it came, empty before the first one.
    vector : Vector | None
        What it decodes to.
    since : int
        Version of w at that upload.
    skips : int
        Iterations skipped, counted as the worker does.
    """

    data: bytes = b""
    vector: Vector | None = None
    since: int = 0
    skips: int = 0


@dataclass
class Workers:
    """All workers, by number.

    Attributes
    ----------
    members : list[Worker]
        The workers.
    fresh : list[int]
        Numbers of those that uploaded in the last iteration.
    """

    members: list[Worker]
    fresh: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, number: int) -> "Workers":
        """Return so many workers that have uploaded nothing yet."""
        return cls([Worker() for _ in range(number)])

    def __len__(self) -> int:
        """Return the number of workers."""
        return len(self.members)

    def __iter__(self) -> Iterator[Worker]:
        """Iterate over the workers, by number."""
        return iter(self.members)

    def __getitem__(self, number: int) -> Worker:
        """Return a worker."""
        return self.members[number]

    @property
    def vectors(self) -> list[Vector]:
        """Last uploads of those that have uploaded, by number."""
        return [each.vector for each in self.members if each.vector is not None]

    def total(self, layout: Layout) -> torch.Tensor:
        """Return the sum of all last uploads, float32, shape (d,)."""
        return total_of(self.vectors, layout)

    def fresh_but(self, number: int) -> dict[int, bytes]:
        """Return the new uploads of all but one worker, as they came."""
        return {n: self.members[n].data for n in self.fresh if n != number}

    def state(self) -> tuple[Tensors, list[Sequence[int]]]:
        """Return the uploads by number, and the other facts of each worker."""
        uploads = {
            str(number): torch.from_numpy(np.frombuffer(each.data, np.uint8).copy())
            for number, each in enumerate(self.members)
            if each.data
        }
        return uploads, [(each.since, each.skips) for each in self.members]

    @classmethod
    def restored(
        cls,
        uploads: Tensors,
        facts: Sequence[Sequence[int]],
        fresh: Sequence[int],
        layout: Layout,
        compressor: Compressor,
    ) -> "Workers":
        """Return the workers of what `state` returned."""
        members = [Worker(since=since, skips=skips) for since, skips in facts]
        for number, data in uploads.items():
            worker = members[int(number)]
            worker.data = data.cpu().numpy().tobytes()
            worker.vector = layout.decode_vector(worker.data, compressor)
        return cls(members, list(fresh))
