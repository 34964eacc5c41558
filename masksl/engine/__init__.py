"""Where the Flower apps run: engines behind one function, `run`."""

from collections.abc import Callable, Mapping
from typing import Any

from flwr.serverapp import ServerApp

from masksl.engine.error import EngineError

__all__ = ["ENGINES", "EngineError", "run"]

ENGINES = ("flower", "local")


def run(
    name: str,
    build: Callable[[], ServerApp],
    client_app: str,
    *,
    clients: int,
    options: Mapping[str, Any],
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

    Raises
    ------
    Exception
        What the ServerApp raised.
    """
    # Imported here, so that the local engine never loads Ray.
    if name == "local":
        from masksl.engine import local  # pylint: disable=import-outside-toplevel

        local.run(build, client_app, clients=clients)
    elif name == "flower":
        from masksl.engine import flower  # pylint: disable=import-outside-toplevel

        flower.run(build, client_app, clients=clients, options=options)
    else:
        raise ValueError(f"engine.name={name!r}: must be one of {', '.join(ENGINES)}")
