"""Engine `local`: the ServerApp and every client in this process, one after another."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from masksl.engine import Shared
from masksl.engine.nodes import (
    CallGrid,
    Nodes,
    identify,
    named,
    node_configs,
    run_ids,
    serve,
)


class LocalGrid(CallGrid):
    """A grid that answers at once, by calling the ClientApp.

    Parameters
    ----------
    client_app : ClientApp
        What every client runs.
    clients : int
        Number of nodes.
    run_id : int
        Id of the run.
    """

    def __init__(self, client_app: ClientApp, clients: int, run_id: int) -> None:
        super().__init__(run_id, clients)
        self._here = Nodes(client_app, run_id, node_configs(clients))

    @property
    def contexts(self) -> dict[int, Context]:
        """State of every client by its node."""
        return self._here.contexts

    def exchange(
        self, messages: Sequence[Message], timeout: float | None
    ) -> list[Message]:
        """Return the replies; no waiting, so no time-out."""
        return [self._here.answer(message) for message in messages]


def open_grid(client_app: ClientApp, clients: int) -> LocalGrid:
    """Return a grid for a new run of this process."""
    run_id = next(run_ids)
    identify(run_id)
    return LocalGrid(client_app, clients, run_id)


def run(
    build: Callable[[], ServerApp],
    client_app: str,
    *,
    clients: int,
    options: Mapping[str, Any],
    shared: Shared | None,
) -> None:
    """Run a ServerApp with so many clients; see `masksl.engine.run`.

    There are no options, and one process has nothing to share.
    """
    del options, shared
    serve(build, open_grid(named(client_app), clients))
