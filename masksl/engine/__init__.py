"""Where the Flower apps run: engines behind one function, `run`."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from flwr.serverapp import ServerApp

ENGINES = ("flower", "local", "ray")


class EngineError(RuntimeError):
    """An engine that failed; one line says how."""


@dataclass(frozen=True)
class Shared:
    """What all processes of a run need and one can make for all.

    Parameters
    ----------
    make : Callable[[], Any]
        Makes it; NumPy arrays in it lie in memory once for all processes of a machine.
    adopt : str
        What every process hands it to, as ``module:function``.
    """

    make: Callable[[], Any]
    adopt: str


def run(
    name: str,
    build: Callable[[], ServerApp],
    client_app: str,
    *,
    clients: int,
    options: Mapping[str, Any],
    shared: Shared | None = None,
) -> None:
    """Run a ServerApp with so many clients to its end.

    Parameters
    ----------
    name : str
        One of `ENGINES`.
    build : Callable[[], ServerApp]
        Makes the ServerApp; picklable, since some engines call it in a process of
        their own.
    client_app : str
        The ClientApp that every client runs, as ``module:attribute``.
    clients : int
        Number of nodes. Node i has ``partition-id`` i in its node configuration.
    options : Mapping[str, Any]
        Settings of the engine.
    shared : Shared | None
        What hosts of the `ray` engine need not each make; the other engines take no
        notice of it.

    Raises
    ------
    Exception
        What the ServerApp raised.
    """
    if name not in ENGINES:
        raise ValueError(f"engine.name={name!r}: must be one of {', '.join(ENGINES)}")
    # Imported by name, so that the local engine never loads Ray.
    chosen = import_module(f"masksl.engine.{name}")
    chosen.run(build, client_app, clients=clients, options=options, shared=shared)


def stop() -> None:
    """End what an engine keeps running for the next run of this process."""
    ray = sys.modules.get("masksl.engine.ray")
    if ray is not None:
        ray.stop()
