"""Engine `flower`: Flower's own simulation on Ray, in a process of its own.

That simulation is called here and nowhere else. It shuts Ray down when it ends and
takes a first Ctrl-C for itself, so it runs in a child process, which the parent ends.
"""

import logging
import multiprocessing
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

from flwr.serverapp import ServerApp

GRACE = 10.0  # seconds that the child has to end once it has reported


def run(
    build: Callable[[], ServerApp],
    client_app: str,
    *,
    clients: int,
    options: Mapping[str, Any],
) -> None:
    """Run a ServerApp with so many clients; see `masksl.engine.run`.

    Parameters
    ----------
    options : Mapping[str, Any]
        ``cpus_per_client`` and ``gpus_per_client``: what Ray reserves for each client
        at work, so how many work at once.
    """
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    arguments = (build, client_app, clients, dict(options), sender)
    child = spawn.Process(target=_simulate, args=arguments)
    child.start()
    sender.close()
    try:
        error, trace = receiver.recv()
        child.join(GRACE)
    except EOFError:
        child.join()
        raise RuntimeError(
            f"Flower's simulation ended with exit status {child.exitcode}"
        ) from None
    finally:
        if child.is_alive():  # interrupted, or it hangs after its last word
            os.killpg(child.pid or 0, signal.SIGKILL)  # Ray's processes follow
            child.join()
    if error is not None:
        error.add_note(trace)
        raise error


def _simulate(
    build: Callable[[], ServerApp],
    client_app: str,
    clients: int,
    options: Mapping[str, Any],
    outcome: Connection,
) -> None:
    """Run the simulation in the child process and report what it raised."""
    os.setpgrp()  # what is started from here can be ended together
    warnings.simplefilter("ignore")
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    try:
        # pylint: disable-next=import-outside-toplevel
        from flwr.simulation import run_simulation

        resources = {
            "num_cpus": options["cpus_per_client"],
            "num_gpus": options["gpus_per_client"],
        }
        module, _, attribute = client_app.partition(":")
        run_simulation(
            server_app=build(),
            client_app=getattr(import_module(module), attribute),
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
