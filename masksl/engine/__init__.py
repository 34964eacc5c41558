"""Engines: where the Flower apps run.

All are started by one function, `run`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from masksl.engine.options import ENGINES

if TYPE_CHECKING:  # configurations are checked without Flower
    from flwr.serverapp import ServerApp


class EngineError(RuntimeError):
    """Raised when an engine fails; the message is one line."""


@dataclass(frozen=True)
class Shared:
    """An object that all processes of a run need and that is made only once.

    Parameters
    ----------
    make : Callable[[], Any]
        Makes the object. Its NumPy arrays are stored once per machine, in shared
        memory.
    adopt : str
        Function that receives the object in every process, as ``module:function``.
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
    """Run a ServerApp with a number of clients until it returns.

    Parameters
    ----------
    name : str
        One of `ENGINES`.
    build : Callable[[], ServerApp]
        Builds the ServerApp. It must be picklable, because some engines call it in
        another process.
    client_app : str
        The ClientApp of every client, as ``module:attribute``.
    clients : int
        Number of nodes. Node i has ``partition-id`` i in its node configuration.
    options : Mapping[str, Any]
        Options of the engine by name, lists as tuples; see `masksl.engine.options`.
        Missing options have their defaults.
    shared : Shared | None
        An object for the hosts of the `ray` engine; the other engines ignore it.

    Raises
    ------
    ValueError
        If there is no such engine, or an option is wrong.
    EngineError
        If the engine fails.
    Exception
        Any exception of the ServerApp.
    """
    if name not in ENGINES:
        raise ValueError(f"engine.name={name!r}: must be one of {', '.join(ENGINES)}")
    section = ENGINES[name](**{**options, "name": name})
    # Imported by name, so that the local engine never loads Ray.
    engine = import_module(f"masksl.engine.{name}")
    engine.run(build, client_app, clients=clients, options=section, shared=shared)


def stop() -> None:
    """Stop everything that an engine keeps running between the runs of this process."""
    ray_session = sys.modules.get("masksl.engine.ray_session")
    if ray_session is not None:
        ray_session.stop()
