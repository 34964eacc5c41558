"""The Ray of this process: started once, or a cluster that is joined."""

import logging
import math
import os
import signal
import socket
import threading
import warnings
from dataclasses import dataclass
from typing import Any

import ray

from masksl.engine import EngineError

CONNECT_TIMEOUT = 5.0  # seconds for a cluster to accept a connection
INLINE = 2_000_000  # bytes up to which arguments are sent without shared memory


@dataclass
class _RaySession:
    """The Ray that `start` has started or joined in this process.

    Attributes
    ----------
    active : bool
        Whether there is one.
    address : str | None
        Address of the cluster; None for a Ray of this process.
    cpus : float
        CPUs of a Ray of this process.
    """

    active: bool = False
    address: str | None = None
    cpus: float = 0.0

    def serves(self, address: str | None, cpus: float) -> bool:
        """Return whether a run with this address and number of CPUs can use it."""
        return self.address == address and (bool(address) or self.cpus >= cpus)


_session = _RaySession()


def start(address: str | None, cpus: float) -> None:
    """Start Ray or join a cluster, unless this process has already done so.

    Parameters
    ----------
    address : str | None
        ``auto`` or ``host:port`` of a cluster; None starts Ray on this machine.
    cpus : float
        CPUs that the hosts of the run reserve. A Ray started here has at least this
        number, even if the machine has fewer.

    Raises
    ------
    EngineError
        If there is no cluster at the address.
    """
    if ray.is_initialized() and _session.active:
        if _session.serves(address, cpus):
            return
        ray.shutdown()
    elif ray.is_initialized():
        return  # Ray was started outside this module
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    arguments: dict[str, Any] = {"address": address}
    if address is not None:
        _check_connection(address)
    else:
        cpus = max(math.ceil(cpus), os.cpu_count() or 1)
        limits = {"max_direct_call_object_size": INLINE}
        arguments = {"address": "local", "num_cpus": cpus, "_system_config": limits}
        arguments["include_dashboard"] = False
    try:
        _initialize(arguments)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EngineError(
            f"engine.address={address!r}: no Ray there ({error_line(error)})"
        ) from error
    _session.active, _session.address, _session.cpus = True, address, cpus


def _initialize(arguments: dict[str, Any]) -> None:
    """Call `ray.init` without its output and its signal handler."""
    handler = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(
            **arguments,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler raises inside Ray's calls, which can abort the process.
        signal.signal(signal.SIGTERM, handler)


def stop() -> None:
    """Shut Ray down or leave the cluster.

    If the program is killed instead, two of Ray's agents exit a minute later.
    """
    ray.shutdown()
    _session.active = False


def _check_connection(address: str) -> None:
    """Check that the address accepts TCP connections.

    `ray.init` would retry for minutes. An address in another form, such as ``auto``, is
    left to Ray.
    """
    name, _, port = address.rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((name, int(port)), CONNECT_TIMEOUT).close()
    except OSError as error:
        raise EngineError(
            f"engine.address={address!r}: no Ray there ({error})"
        ) from error


def error_line(error: BaseException) -> str:
    """Return the last line of the message of a Ray error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
