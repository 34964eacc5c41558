"""Engine `flower`: Flower's own simulation on Ray, in a process of its own.

That simulation is called here and nowhere else. It shuts Ray down when it ends and
takes a first Ctrl-C for itself, so it runs in a child process, which the parent ends.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from flwr.serverapp import ServerApp

from masksl.engine import EngineError, Shared
from masksl.engine.nodes import named

GRACE = 10.0  # seconds that the child has to end once it has reported
SHOW_CURSOR = "\x1b[?25h"


def run(
    build: Callable[[], ServerApp],
    client_app: str,
    *,
    clients: int,
    options: Mapping[str, Any],
    shared: Shared | None,
) -> None:
    """Run a ServerApp with so many clients; see `masksl.engine.run`.

    Parameters
    ----------
    options : Mapping[str, Any]
        ``cpus_per_client`` and ``gpus_per_client``: what Ray reserves for each client
        at work, so how many work at once.
    shared : Shared | None
        Flower's processes have no place for it.
    """
    del shared
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    watched, alive = spawn.Pipe(duplex=False)  # closes when this process ends
    arguments = (build, client_app, clients, dict(options), sender, watched)
    child = spawn.Process(target=_simulate, args=arguments)
    child.start()
    sender.close()
    watched.close()
    try:
        error, trace = receiver.recv()
        child.join(GRACE)
    except EOFError:
        child.join()
        status = f"exit status {child.exitcode}"
        raise EngineError(f"Flower's simulation ended with {status}") from None
    finally:
        if child.is_alive():  # interrupted, or it hangs after its last word
            _kill(child)
        alive.close()
    if error is not None:
        error.add_note(trace)
        raise error


def _kill(child: multiprocessing.process.BaseProcess) -> None:
    """End the child and what it started; Ray's own processes follow."""
    try:
        os.killpg(child.pid or 0, signal.SIGKILL)
    except ProcessLookupError:  # it has no group of its own yet
        child.kill()
    child.join()
    if sys.stdout.isatty():
        sys.stdout.write(SHOW_CURSOR)  # the progress bar had no time to


def _simulate(
    build: Callable[[], ServerApp],
    client_app: str,
    clients: int,
    options: Mapping[str, Any],
    outcome: Connection,
    watched: Connection,
) -> None:
    """Run the simulation in the child process and report what it raised."""
    os.setpgrp()  # what is started from here can be ended together
    threading.Thread(target=_follow, args=(watched,), daemon=True).start()
    warnings.simplefilter("ignore")
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    try:
        # pylint: disable-next=import-outside-toplevel
        from flwr.simulation import run_simulation

        resources = {
            "num_cpus": options["cpus_per_client"],
            "num_gpus": options["gpus_per_client"],
        }
        run_simulation(
            server_app=build(),
            client_app=named(client_app),
            num_supernodes=clients,
            backend_config={
                "client_resources": resources,
                "init_args": {"log_to_driver": False, "logging_level": "ERROR"},
            },
        )
        outcome.send((None, ""))
    except Exception as error:  # pylint: disable=broad-exception-caught
        trace = traceback.format_exc()
        try:
            outcome.send((error, trace))
        except Exception:  # pylint: disable=broad-exception-caught
            outcome.send((RuntimeError(str(error)), trace))  # it could not be pickled


def _follow(watched: Connection) -> None:
    """End this process and what it started as soon as the parent is gone."""
    watched.poll(None)  # nothing is ever sent: it returns when the other end closes
    os.killpg(0, signal.SIGKILL)
