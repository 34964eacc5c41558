"""Server programs of the engine benchmark: run on an engine, return a value."""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from masksl import config, engine, main, server_app
from masksl.engine import Shared
from masksl.settings import Settings


def settings_of(*overrides: str) -> Settings:
    """Return the settings of a command line, with an absolute ``dataset.root``."""
    settings = config.compose(overrides)
    root = Path(str(settings["dataset.root"]))
    return settings | {"dataset.root": str(root.absolute())}


def run_app(
    settings: Settings,
    program: Callable[[Grid], Any],
    client_app: str,
    *,
    clients: int,
    shared: Shared | None = None,
) -> Any:
    """Run a server program on the engine of the settings.

    Parameters
    ----------
    settings : Settings
        Name the engine and its options.
    program : Callable[[Grid], Any]
        Runs once all clients are connected. It must be picklable.
    client_app : str
        The ClientApp of every client, as ``module:attribute``.
    clients : int
        Number of clients.
    shared : Shared | None
        Object that all processes need.

    Returns
    -------
    Any
        What the program returns, through JSON: it may run in another process.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "returned.json"
        engine.run(
            str(settings["engine.name"]),
            partial(_build, program, clients, path),
            client_app,
            clients=clients,
            options=main.engine_options(settings),
            shared=shared,
        )
        return json.loads(path.read_text(encoding="utf-8"))


def _build(program: Callable[[Grid], Any], clients: int, path: Path) -> ServerApp:
    """Build the ServerApp that runs a program and writes what it returns."""
    built = ServerApp()

    @built.main()
    def _main(grid: Grid, context: Context) -> None:
        del context
        server_app.wait_for_clients(grid, clients, server_app.PATIENCE)
        path.write_text(json.dumps(program(grid)), encoding="utf-8")

    return built
