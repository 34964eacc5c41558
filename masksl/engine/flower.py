"""Engine `flower`: Flower's own simulation on Ray, in a child process.

The simulation shuts Ray down when it ends and handles the first Ctrl-C itself.
Therefore it runs in a child process, which the parent can kill.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from flwr.serverapp import ServerApp

from masksl.engine import EngineError, Shared
from masksl.engine.nodes import import_attribute
from masksl.engine.options import FlowerOptions

EXIT_TIMEOUT = 10.0  # seconds for the child to exit after its report
SHOW_CURSOR = "\x1b[?25h"


def run(
    build: Callable[[], ServerApp],
    client_app: str,
    *,
    clients: int,
    options: FlowerOptions,
    shared: Shared | None,
) -> None:
    """Run a ServerApp with a number of clients; see `masksl.engine.run`.

    Parameters
    ----------
    options : FlowerOptions
        Resources of each client.
    shared : Shared | None
        Ignored: Flower's worker processes cannot receive it.
    """
    del shared
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    watched, alive = spawn.Pipe(duplex=False)  # closes when this process ends
    arguments = (build, client_app, clients, options, sender, watched)
    child = spawn.Process(target=_simulate, args=arguments)
    child.start()
    sender.close()
    watched.close()
    try:
        error, trace = receiver.recv()
        child.join(EXIT_TIMEOUT)
    except EOFError:
        child.join()
        status = f"exit status {child.exitcode}"
        raise EngineError(f"Flower's simulation ended with {status}") from None
    finally:
        if child.is_alive():  # interrupted, or the child hangs after its report
            _kill(child)
        alive.close()
    if error is not None:
        error.add_note(trace)
        raise error


def _kill(child: multiprocessing.process.BaseProcess) -> None:
    """Kill the child and its process group; Ray's daemons then exit by themselves."""
    try:
        os.killpg(child.pid or 0, signal.SIGKILL)
    except ProcessLookupError:  # the child has not made its group yet
        child.kill()
    child.join()
    if sys.stdout.isatty():
        sys.stdout.write(SHOW_CURSOR)  # the killed progress bar has hidden it


def _simulate(
    build: Callable[[], ServerApp],
    client_app: str,
    clients: int,
    options: FlowerOptions,
    outcome: Connection,
    watched: Connection,
) -> None:
    """Run the simulation in the child process and report its exception, if any."""
    os.setpgrp()  # all processes started from here can be killed together
    threading.Thread(target=_exit_with_parent, args=(watched,), daemon=True).start()
    warnings.simplefilter("ignore")
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    try:
        # Loaded here, because they load Ray, which the parent does without.
        # pylint: disable=import-outside-toplevel
        from flwr.simulation import run_simulation

        from masksl.engine.ray_access import closed

        # pylint: enable=import-outside-toplevel
        resources: dict[str, Any] = {
            "num_cpus": options.cpus_per_client,
            "num_gpus": options.gpus_per_client,
        }
        # Without an address Ray would join a cluster that it finds on this machine.
        ray: dict[str, Any] = {
            "address": "local",
            "log_to_driver": False,
            "logging_level": "ERROR",
        }
        with closed():
            run_simulation(
                server_app=build(),
                client_app=import_attribute(client_app),
                num_supernodes=clients,
                backend_config={"client_resources": resources, "init_args": ray},
            )
        outcome.send((None, ""))
    except Exception as error:  # pylint: disable=broad-exception-caught
        trace = traceback.format_exc()
        try:
            outcome.send((error, trace))
        except Exception:  # pylint: disable=broad-exception-caught
            outcome.send((RuntimeError(str(error)), trace))  # it cannot be pickled


def _exit_with_parent(watched: Connection) -> None:
    """Kill this process and its process group when the parent exits."""
    watched.poll(None)  # nothing is ever sent: it returns when the parent's end closes
    os.killpg(0, signal.SIGKILL)
