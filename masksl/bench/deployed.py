"""Time of an exchange on a deployed SuperLink: by streams, and by plain messages."""

import json
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from masksl.bench.exchanges import echo, statistics_of, time_exchanges
from masksl.engine.options import SuperlinkOptions
from masksl.engine.superlink.client import serve
from masksl.engine.superlink.grid import SuperlinkGrid
from masksl.engine.superlink.wire import SERVE
from masksl.federation.processes import LOOPBACK, Federation, FederationError, free_port
from masksl.server_app import wait_for_clients

NODES = 2
STREAMS, PLAIN = "superlink (deployed)", "plain messages"
RETURNED = "returned.json"
_PROJECT = f"""
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "exchanges"
version = "1.0.0"
description = "Times exchanges"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "masksl"

[tool.flwr.app.components]
serverapp = "{__name__}:server"
clientapp = "{__name__}:client"

[tool.flwr.app.config]
overrides = ""
"""

server = ServerApp()


class EchoApp(ClientApp):
    """A ClientApp that echoes messages, those of a stream as well."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Return a message, or answer the messages of a stream."""
        if message.metadata.message_type == SERVE:
            return serve(echo, message, context)
        return echo(message, context)


client = EchoApp()


def measure(sizes: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Time exchanges with two SuperNodes of a SuperLink on this machine.

    Parameters
    ----------
    sizes : Sequence[int]
        Sizes of a frame in bytes.
    repeats : int
        Timed exchanges per size, fewer if they take long.

    Returns
    -------
    list[dict[str, Any]]
        A row for each size by streams, then one for the first by plain messages.

    Raises
    ------
    FederationError
        If the run fails.
    """
    plan = {"sizes": list(sizes), "repeats": repeats, "port": free_port()}
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        project.mkdir()
        (project / "pyproject.toml").write_text(_PROJECT, encoding="utf-8")
        with Federation(Path(folder) / "federation", NODES) as federation:
            federation.wait(federation.submit(project, json.dumps(plan), log="run"))
            returned = federation.folder / RETURNED
            if not returned.exists():
                lines = (federation.folder / "run.log").read_text(encoding="utf-8")
                raise FederationError(f"the run failed:\n{lines}")
            timed = json.loads(returned.read_text(encoding="utf-8"))
    rows = [{"engine": STREAMS, "bytes": n} for n in sizes]
    rows.append({"engine": PLAIN, "bytes": sizes[0]})
    return [
        row | {"clients": NODES} | statistics_of(seconds)
        for row, seconds in zip(rows, timed, strict=True)
    ]


@server.main()
def _main(grid: Grid, context: Context) -> None:
    """Time exchanges by streams, then by Flower's messages; write the seconds."""
    plan = json.loads(str(context.run_config["overrides"]))
    wait_for_clients(grid, NODES, patience=60.0)
    address = f"{LOOPBACK}:{plan['port']}"
    options = SuperlinkOptions(address=address, bind=address)
    with closing(SuperlinkGrid(grid, NODES, options)) as streams:
        timed = [time_exchanges(streams, n, plan["repeats"]) for n in plan["sizes"]]
    timed.append(time_exchanges(grid, plan["sizes"][0], plan["repeats"]))
    Path(RETURNED).write_text(json.dumps(timed), encoding="utf-8")
