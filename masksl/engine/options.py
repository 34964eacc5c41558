"""Options of the engines: one strict section each, which declares every key once.

This module imports no other part of the package, and neither Flower nor Ray, so that a
configuration can be checked without them. The defaults are those of ``conf/engine/``.
"""

import re
from typing import Literal, NamedTuple, Self

from pydantic import BaseModel, Field, field_validator

_POSITIVE = "a number greater than 0"
_NOT_NEGATIVE = "a number from 0 on"
_WHOLE = "a whole number from 1 on"
MOST_HOSTS = 1024  # processes by mistake would take all memory
MOST_MIB = 1024  # gRPC can send twice as much in a message
MOST_PORT = 65535
_PORT = "HOST:PORT"
_HOST_PORT = r"^(\[[0-9a-fA-F:]+\]|[^\s:\[\]]+):\d{1,5}$"
_PINS = "null or a list of entries RESOURCE FIRST-LAST [KEY=VALUE ...]"
_PIN = re.compile(r"(\S+) (\d+)(?:-(\d+))?((?: [^\s=]+=\S+)*)")


class Pin(NamedTuple):
    """The assignment of a range of partitions to the machines with a Ray resource.

    Parameters
    ----------
    resource : str
        Name of the Ray resource.
    partitions : range
        The partitions.
    node_config : dict[str, str]
        Additional entries of their node configuration.
    """

    resource: str
    partitions: range
    node_config: dict[str, str]

    @classmethod
    def parse(cls, entry: str) -> Self:
        """Parse an entry ``RESOURCE FIRST-LAST [KEY=VALUE ...]``.

        A single partition may be written without ``-LAST``.

        Raises
        ------
        ValueError
            If the entry has another form.

        Examples
        --------
        >>> Pin.parse("alice 0-4 dataset-root=/data")
        Pin(resource='alice', partitions=range(0, 5), \
node_config={'dataset-root': '/data'})
        """
        match = _PIN.fullmatch(entry)
        if match is None:
            raise ValueError(f"{entry!r}: must be RESOURCE FIRST-LAST [KEY=VALUE ...]")
        resource, first, last, pairs = match.groups()
        partitions = range(int(first), int(last or first) + 1)
        if not partitions:
            raise ValueError(f"{entry!r}: LAST must not be less than FIRST")
        config = dict(pair.split("=", 1) for pair in pairs.split())
        return cls(resource, partitions, config)


class Processes(NamedTuple):
    """The processes that an engine starts on this machine, and what each reserves.

    Parameters
    ----------
    kind : str
        The options are called ``cpus_per_KIND`` and ``gpus_per_KIND``.
    number : int
        Number of processes that run at the same time at least.
    cpus, gpus : float
        CPUs and GPUs that Ray reserves for each process.
    """

    kind: str
    number: int
    cpus: float
    gpus: float


class EngineOptions(
    BaseModel, frozen=True, strict=True, extra="forbid", allow_inf_nan=False
):
    """Base of the sections; each has a field ``name``, the name of its engine."""

    def processes(self) -> Processes | None:
        """Return the processes that must fit on this machine, None without a limit."""
        return None


class LocalOptions(EngineOptions, frozen=True):
    """Options of the engine `local`, which has none beside its name."""

    name: Literal["local"] = Field("local", description="local")


class FlowerOptions(EngineOptions, frozen=True):
    """Options of the engine `flower`.

    Parameters
    ----------
    cpus_per_client, gpus_per_client : float
        CPUs and GPUs that Ray reserves for each client while it works. They limit how
        many clients work at the same time.
    """

    name: Literal["flower"] = Field("flower", description="flower")
    cpus_per_client: float = Field(1.0, gt=0, description=_POSITIVE)
    gpus_per_client: float = Field(0.0, ge=0, description=_NOT_NEGATIVE)

    def processes(self) -> Processes:
        """Return one client process, the least that must fit on this machine."""
        return Processes("client", 1, self.cpus_per_client, self.gpus_per_client)


class RayOptions(EngineOptions, frozen=True):
    """Options of the engine `ray`.

    Parameters
    ----------
    hosts : int
        Processes that keep the clients; with pins, processes of each pin.
    cpus_per_host, gpus_per_host : float
        CPUs and GPUs that Ray reserves for each host. 0 GPUs hides them from it.
    gpu_memory_fraction : float | None
        Share of a GPU's memory that a host may use; None for no limit.
    clients_in_flight : int | None
        Clients of a host whose autograd graphs are kept between the messages of a step;
        None for all.
    address : str | None
        ``auto`` or ``host:port`` of a Ray cluster; None starts Ray on this machine.
    pin : tuple[str, ...] | None
        Entries ``RESOURCE FIRST-LAST [KEY=VALUE ...]``, see `Pin`; None leaves the
        placement of the hosts to Ray.
    max_restarts : int
        Hosts that may die and be replaced in a run.
    """

    name: Literal["ray"] = Field("ray", description="ray")
    hosts: int = Field(
        2, ge=1, le=MOST_HOSTS, description=f"a whole number from 1 to {MOST_HOSTS}"
    )
    cpus_per_host: float = Field(1.0, ge=0, description=_NOT_NEGATIVE)
    gpus_per_host: float = Field(0.0, ge=0, description=_NOT_NEGATIVE)
    gpu_memory_fraction: float | None = Field(
        None, gt=0, le=1, description="null or a number greater than 0 and at most 1"
    )
    clients_in_flight: int | None = Field(16, ge=1, description=f"null or {_WHOLE}")
    address: str | None = Field(None, description="null or text")
    pin: tuple[str, ...] | None = Field(None, description=_PINS)
    max_restarts: int = Field(3, ge=0, description="a whole number from 0 on")

    @field_validator("pin")
    @classmethod
    def _check_pin(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for entry in value or ():
            Pin.parse(entry)
        return value

    @property
    def pins(self) -> list[Pin]:
        """The parsed entries of ``pin``, an empty list without pins."""
        return [Pin.parse(entry) for entry in self.pin or ()]

    def check_pins(self, clients: int) -> None:
        """Check that the pins name each partition exactly once, if there are pins.

        Raises
        ------
        ValueError
            If they do not; the text says what ``pin`` must be.
        """
        ranges = sorted((p.partitions.start, p.partitions.stop) for p in self.pins)
        starts, stops = [first for first, _ in ranges], [stop for _, stop in ranges]
        if ranges and [*starts, clients] != [0, *stops]:  # they may be too long to list
            raise ValueError(
                f"entries that name each partition from 0 to {clients - 1} once"
            )

    def processes(self) -> Processes | None:
        """Return the hosts, or None in a cluster: Ray knows what its machines have."""
        if self.address is not None:
            return None
        return Processes("host", self.hosts, self.cpus_per_host, self.gpus_per_host)


class SuperlinkOptions(EngineOptions, frozen=True):
    """Options of the engine `superlink`.

    Parameters
    ----------
    address : str | None
        ``host:port`` that clients dial. It must be set for a run on a SuperLink.
    bind : str | None
        ``host:port`` at which the server listens; None for the port of ``address`` on
        all its addresses.
    patience : float
        Seconds that clients may take to open their streams, at the beginning and after
        they were lost.
    reconnect : float
        Seconds that a stream that broke may take to come back, before its client counts
        as lost.
    starting : int
        Nodes that start their processes at the same time.
    max_message_mib : int
        Length of a message at most, in MiB.
    max_restarts : int
        Clients that may be lost and start again in a run.
    hosts : int
        Processes that keep the clients of a run without a SuperLink.
    """

    name: Literal["superlink"] = Field("superlink", description="superlink")
    address: str | None = Field(
        None, pattern=_HOST_PORT, description=f"null or {_PORT}"
    )
    bind: str | None = Field(None, pattern=_HOST_PORT, description=f"null or {_PORT}")
    patience: float = Field(300.0, gt=0, description=_POSITIVE)
    reconnect: float = Field(20.0, gt=0, description=_POSITIVE)
    starting: int = Field(4, ge=1, description=_WHOLE)
    max_message_mib: int = Field(
        256, ge=1, le=MOST_MIB, description=f"a whole number from 1 to {MOST_MIB}"
    )
    max_restarts: int = Field(10, ge=0, description="a whole number from 0 on")
    hosts: int = Field(
        2, ge=1, le=MOST_HOSTS, description=f"a whole number from 1 to {MOST_HOSTS}"
    )

    @field_validator("address", "bind")
    @classmethod
    def _check_port(cls, value: str | None) -> str | None:
        if value is not None and int(value.rpartition(":")[2]) > MOST_PORT:
            raise ValueError(f"{value!r}: must have a port of at most {MOST_PORT}")
        return value

    @property
    def where(self) -> str:
        """``host:port`` at which the server listens."""
        if self.bind is not None:
            return self.bind
        return f"0.0.0.0:{str(self.address).rpartition(':')[2]}"


ENGINES: dict[str, type[EngineOptions]] = {
    "flower": FlowerOptions,
    "local": LocalOptions,
    "ray": RayOptions,
    "superlink": SuperlinkOptions,
}
"""Section of the options of every engine by its name."""
