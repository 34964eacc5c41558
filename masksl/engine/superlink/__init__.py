"""Engine `superlink`: clients on a deployed SuperLink, each with a stream of its own.

Flower starts the processes and watches them. It delivers one message to each client,
which then dials the server and answers all others through a gRPC stream over TLS. A run
that Flower has not started starts its clients itself, as processes of this machine.
"""

from collections.abc import Callable
from contextlib import closing

from flwr.serverapp import ServerApp

from masksl.engine import Shared
from masksl.engine.nodes import run_ids, run_server_app, set_task_identity
from masksl.engine.options import SuperlinkOptions

ANY = "127.0.0.1:0"  # any free port, for this machine alone


def run(
    build: Callable[[], ServerApp],
    client_app: str,
    *,
    clients: int,
    options: SuperlinkOptions,
    shared: Shared | None,
) -> None:
    """Run a ServerApp with a number of clients; see `masksl.engine.run`.

    No SuperLink takes part: the clients are processes of this machine.

    Parameters
    ----------
    options : SuperlinkOptions
        Options of the streams, and the number of processes.
    shared : Shared | None
        Ignored: every process makes it itself.
    """
    del shared
    # Loaded here, because they load gRPC, which the ClientApp imports only if invited.
    # pylint: disable=import-outside-toplevel
    from masksl.engine.superlink.grid import SuperlinkGrid
    from masksl.engine.superlink.local_nodes import LocalNodes

    # pylint: enable=import-outside-toplevel
    run_id = next(run_ids)
    set_task_identity(run_id)
    own = {"address": ANY, "bind": ANY} if options.address is None else {}
    options = options.model_copy(update=own | {"starting": clients})
    nodes = LocalNodes(client_app, run_id, clients, options.hosts)
    with closing(nodes), closing(SuperlinkGrid(nodes, clients, options)) as grid:
        grid.invite()
        run_server_app(build, grid)
