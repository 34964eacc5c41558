"""Engine `local`: the ServerApp and all clients in this process, one after another."""

from collections.abc import Callable, Sequence

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from masksl.engine import Shared
from masksl.engine.nodes import (
    CallGrid,
    Nodes,
    import_attribute,
    node_configs,
    run_ids,
    run_server_app,
    set_task_identity,
)
from masksl.engine.options import LocalOptions


class LocalGrid(CallGrid):
    """A grid that calls the ClientApp for every message.

    Parameters
    ----------
    client_app : ClientApp
        The ClientApp of every client.
    clients : int
        Number of nodes.
    run_id : int
        Id of the run.
    """

    def __init__(self, client_app: ClientApp, clients: int, run_id: int) -> None:
        super().__init__(run_id, clients)
        self._local_nodes = Nodes(client_app, run_id, node_configs(clients))

    @property
    def contexts(self) -> dict[int, Context]:
        """Context of every client by its node id."""
        return self._local_nodes.contexts

    def exchange(
        self, messages: Sequence[Message], timeout: float | None
    ) -> list[Message]:
        """Return the replies; ``timeout`` is ignored, because calls cannot wait."""
        return [self._local_nodes.answer(message) for message in messages]


def open_grid(client_app: ClientApp, clients: int) -> LocalGrid:
    """Return a grid for a new run of this process."""
    run_id = next(run_ids)
    set_task_identity(run_id)
    return LocalGrid(client_app, clients, run_id)


def run(
    build: Callable[[], ServerApp],
    client_app: str,
    *,
    clients: int,
    options: LocalOptions,
    shared: Shared | None,
) -> None:
    """Run a ServerApp with a number of clients; see `masksl.engine.run`.

    ``options`` and ``shared`` are ignored: there is one process and nothing to set.
    """
    del options, shared
    run_server_app(build, open_grid(import_attribute(client_app), clients))
