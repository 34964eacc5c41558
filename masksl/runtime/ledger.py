"""The account of every byte and message sent, and their time on a simulated link."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from pydantic import Field

from masksl.settings import Section

UP = "up"
DOWN = "down"

_RATE = "a number from 1e-9 to 1e12"  # beyond, sums of seconds would be infinite

Nested = dict[str, dict[str, dict[str, int]]]


class Entry(NamedTuple):
    """One array of a message.

    Parameters
    ----------
    kind : str
        Name of its record, e.g. ``activation``.
    bytes : int
        Length as sent.
    dense : int
        Bytes of the same tensors in float32. Integers and labels count as they are.
    """

    kind: str
    bytes: int
    dense: int


class Link(Section):
    """The link between the server and a client; each client has one of its own.

    Parameters
    ----------
    up_mbps, down_mbps : float
        Rates in 10**6 bit/s, from and to the client.
    latency_ms : float
        One way, in milliseconds.
    """

    up_mbps: float = Field(100.0, ge=1e-9, le=1e12, description=_RATE)
    down_mbps: float = Field(100.0, ge=1e-9, le=1e12, description=_RATE)
    latency_ms: float = Field(0.0, ge=0, le=1e12, description="a number from 0 to 1e12")

    def seconds(self, down: Iterable[int], up: Iterable[int]) -> float:
        """Return the duration of an exchange: both ways, the slowest client each way.

        Parameters
        ----------
        down, up : Iterable[int]
            Bytes to and from every client.
        """
        bits_down, bits_up = 8 * max(down, default=0), 8 * max(up, default=0)
        transfer = bits_down / self.down_mbps + bits_up / self.up_mbps
        return 2 * self.latency_ms / 1e3 + transfer / 1e6


Key = tuple[str, str, str]
"""Phase, direction, kind."""


class Traffic:
    """Sums of bytes and messages by phase, direction and kind, and of link time."""

    def __init__(self) -> None:
        self._bytes: dict[Key, int] = defaultdict(int)
        self._dense: dict[Key, int] = defaultdict(int)
        self._messages: dict[Key, int] = defaultdict(int)
        self.link_seconds = 0.0

    def add(self, phase: str, direction: str, entries: Iterable[Entry]) -> None:
        """Count what one message carries.

        Each kind that it carries counts as one message of that kind.
        """
        kinds = set()
        for entry in entries:
            self._bytes[phase, direction, entry.kind] += entry.bytes
            self._dense[phase, direction, entry.kind] += entry.dense
            kinds.add(entry.kind)
        for kind in kinds:
            self._messages[phase, direction, kind] += 1

    def bytes(
        self,
        kind: str | None = None,
        direction: str | None = None,
        phase: str | None = None,
    ) -> int:
        """Return the bytes sent, of one kind, direction or phase if they are given.

        Figures derived from these are never stored: the traffic by the account of the
        MS paper is ``bytes("activation", "up")``.
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

    def messages(
        self,
        kind: str | None = None,
        direction: str | None = None,
        phase: str | None = None,
    ) -> int:
        """Return the number of messages that carry a kind, likewise."""
        return _select(self._messages, phase, direction, kind)

    def state(self) -> dict[str, Any]:
        """Return the sums as JSON facts."""
        return {
            "bytes": [[*key, n] for key, n in self._bytes.items()],
            "dense": [[*key, n] for key, n in self._dense.items()],
            "messages": [[*key, n] for key, n in self._messages.items()],
            "link_seconds": self.link_seconds,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """Return the sums from what `state` returned."""
        traffic = cls()
        for name, sums in (
            ("bytes", traffic._bytes),
            ("dense", traffic._dense),
            ("messages", traffic._messages),
        ):
            sums.update({(p, d, k): n for p, d, k, n in state[name]})
        traffic.link_seconds = state["link_seconds"]
        return traffic

    def nested_bytes(self) -> Nested:
        """Return bytes as ``{phase: {direction: {kind: bytes}}}``, sorted."""
        return _nested(self._bytes)

    def nested_messages(self) -> Nested:
        """Return numbers of messages, likewise."""
        return _nested(self._messages)


@dataclass
class Ledger:
    """Counts exchanges, over the whole run and since the last round began.

    Parameters
    ----------
    link : Link
        The simulated link.
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
        down: Mapping[int, Sequence[Entry]],
        up: Mapping[int, Sequence[Entry]],
    ) -> None:
        """Count one exchange.

        Parameters
        ----------
        phase : str
            ``training`` or ``evaluation``.
        down, up : Mapping[int, Sequence[Entry]]
            Entries of the message to each client, of the reply from each client.
        """
        sums: dict[str, list[int]] = {DOWN: [], UP: []}
        for direction, sent in ((DOWN, down), (UP, up)):
            for entries in sent.values():
                sums[direction].append(sum(entry.bytes for entry in entries))
                self.total.add(phase, direction, entries)
                self.round.add(phase, direction, entries)
        seconds = self.link.seconds(sums[DOWN], sums[UP])
        self.total.link_seconds += seconds
        self.round.link_seconds += seconds


def compression_factor(dense: int, sent: int) -> float | None:
    """Return float32 bytes over bytes sent, None if nothing was sent."""
    return dense / sent if sent else None


def _nested(sums: Mapping[Key, int]) -> Nested:
    nested: Nested = {}
    for (phase, direction, kind), number in sorted(sums.items()):
        nested.setdefault(phase, {}).setdefault(direction, {})[kind] = number
    return nested


def _select(
    sums: Mapping[Key, int],
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
