"""The account of every byte sent, and the time it would take on a given link."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

UP = "up"
DOWN = "down"


class Entry(NamedTuple):
    """One thing sent.

    Parameters
    ----------
    kind : str
        What it is, e.g. ``activation``.
    bytes : int
        Length as sent.
    dense : int
        Bytes of the same tensor in float32.
    """

    kind: str
    bytes: int
    dense: int


@dataclass(frozen=True)
class Link:
    """The link between the server and a client, each client having its own.

    Parameters
    ----------
    up_mbps, down_mbps : float
        Rates in 10**6 bit/s, from and to the client.
    latency_ms : float
        One way, in milliseconds.
    """

    up_mbps: float = 100.0
    down_mbps: float = 100.0
    latency_ms: float = 0.0

    def seconds(self, down: Iterable[int], up: Iterable[int]) -> float:
        """Return how long an exchange lasts: both ways, the slowest client each way.

        Parameters
        ----------
        down, up : Iterable[int]
            Bytes to and from every client.
        """
        bits_down, bits_up = 8 * max(down, default=0), 8 * max(up, default=0)
        transfer = bits_down / self.down_mbps + bits_up / self.up_mbps
        return 2 * self.latency_ms / 1e3 + transfer / 1e6


class Traffic:
    """Sums of bytes by phase, direction and kind, and of link time in seconds."""

    def __init__(self) -> None:
        self._bytes: dict[tuple[str, str, str], int] = defaultdict(int)
        self._dense: dict[tuple[str, str, str], int] = defaultdict(int)
        self.link_seconds = 0.0

    def add(self, phase: str, direction: str, entry: Entry) -> None:
        """Count one thing."""
        self._bytes[phase, direction, entry.kind] += entry.bytes
        self._dense[phase, direction, entry.kind] += entry.dense

    def bytes(
        self,
        kind: str | None = None,
        direction: str | None = None,
        phase: str | None = None,
    ) -> int:
        """Return the bytes sent, of one kind, direction or phase where they are given.

        What is derived from these is never stored: the paper's own traffic is
        ``bytes("activation", "up")``.
        """
        return _select(self._bytes, phase, direction, kind)

    def dense(
        self,
        kind: str | None = None,
        direction: str | None = None,
        phase: str | None = None,
    ) -> int:
        """Return the float32 bytes of the same tensors, likewise."""
        return _select(self._dense, phase, direction, kind)

    def state(self) -> dict[str, Any]:
        """Return the sums as what JSON can hold."""
        return {
            "bytes": [[*key, n] for key, n in self._bytes.items()],
            "dense": [[*key, n] for key, n in self._dense.items()],
            "link_seconds": self.link_seconds,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """Return the sums that `state` returned."""
        traffic = cls()
        traffic._bytes.update({(p, d, k): n for p, d, k, n in state["bytes"]})
        traffic._dense.update({(p, d, k): n for p, d, k, n in state["dense"]})
        traffic.link_seconds = state["link_seconds"]
        return traffic

    def nested(self) -> dict[str, dict[str, dict[str, int]]]:
        """Return bytes as ``{phase: {direction: {kind: bytes}}}``, sorted."""
        nested: dict[str, dict[str, dict[str, int]]] = {}
        for (phase, direction, kind), sent in sorted(self._bytes.items()):
            nested.setdefault(phase, {}).setdefault(direction, {})[kind] = sent
        return nested


@dataclass
class Ledger:
    """Counts exchanges, over the whole run and since the last round began.

    Parameters
    ----------
    link : Link
        The link whose time is simulated.
    """

    link: Link
    total: Traffic = field(default_factory=Traffic)
    round: Traffic = field(default_factory=Traffic)

    def begin_round(self) -> None:
        """Begin to count a round."""
        self.round = Traffic()

    def exchange(
        self,
        phase: str,
        down: Mapping[int, Iterable[Entry]],
        up: Mapping[int, Iterable[Entry]],
    ) -> None:
        """Count one exchange.

        Parameters
        ----------
        phase : str
            ``training`` or ``evaluation``.
        down, up : Mapping[int, Iterable[Entry]]
            What was sent to and came from each client.
        """
        sums: dict[str, list[int]] = {DOWN: [], UP: []}
        for direction, sent in ((DOWN, down), (UP, up)):
            for entries in sent.values():
                counted = list(entries)
                sums[direction].append(sum(entry.bytes for entry in counted))
                for entry in counted:
                    self.total.add(phase, direction, entry)
                    self.round.add(phase, direction, entry)
        seconds = self.link.seconds(sums[DOWN], sums[UP])
        self.total.link_seconds += seconds
        self.round.link_seconds += seconds


def compression_factor(dense: int, sent: int) -> float | None:
    """Return float32 bytes over bytes sent, None where nothing was sent."""
    return dense / sent if sent else None


def _select(
    sums: Mapping[tuple[str, str, str], int],
    phase: str | None,
    direction: str | None,
    kind: str | None,
) -> int:
    wanted = (phase, direction, kind)
    return sum(
        value
        for key, value in sums.items()
        if all(want in (None, have) for want, have in zip(wanted, key, strict=True))
    )
