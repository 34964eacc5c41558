"""The Ray of this process: started once, or a cluster that is joined."""

import logging
import math
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.thirdparty_files import psutil

from masksl.engine import EngineError
from masksl.engine.ray_access import closed, joining, reread

ERRORS = (ConnectionError, RuntimeError, ValueError, RayError)  # of `ray.init`
CONNECT_TIMEOUT = 5.0  # seconds for a cluster to accept a connection
KILL_TIMEOUT = 2.0  # seconds for killed processes to be gone
INLINE = 2_000_000  # bytes up to which arguments are sent without shared memory


@dataclass
class _RaySession:
    """The Ray that `start` has started or joined in this process.

    Attributes
    ----------
    starting : bool
        Whether Ray is being started.
    active : bool
        Whether there is a Ray.
    address : str | None
        Address of the cluster; None for a Ray of this process.
    cpus : float
        CPUs of a Ray of this process.
    """

    starting: bool = False
    active: bool = False
    address: str | None = None
    cpus: float = 0.0

    def serves(self, address: str | None, cpus: float) -> bool:
        """Return whether a run with this address and number of CPUs can use it."""
        return self.address == address and (bool(address) or self.cpus >= cpus)


_session = _RaySession()


def start(address: str | None, cpus: float) -> None:
    """Start Ray or join a cluster, unless this process has already done so.

    A Ray that is started here is closed to others; see `masksl.engine.ray_access`.

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
        If Ray does not start, or there is no cluster at the address that lets this
        process in.
    """
    if ray.is_initialized() and _session.active:
        if _session.serves(address, cpus):
            return
        stop()
    elif ray.is_initialized():
        return  # Ray was started outside this module
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        cpus = max(math.ceil(cpus), os.cpu_count() or 1)
        _start_closed(cpus)
    else:
        _join(address)
    _session.active, _session.address, _session.cpus = True, address, cpus


def stop() -> None:
    """Shut Ray down or leave the cluster.

    While another thread starts Ray, only what would outlive this process ends. If the
    program is killed instead, two of Ray's agents exit a minute later.
    """
    if _session.starting:  # `ray.shutdown` would wait for the other thread
        _end_processes(with_children=False)
        return
    ray.shutdown()
    reread()
    _session.active = False


def _start_closed(cpus: float) -> None:
    """Start Ray; if that fails or is interrupted, leave no process of it."""
    _session.starting = True
    try:
        with closed():
            _initialize(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                _system_config={"max_direct_call_object_size": INLINE},
            )
    except BaseException as error:
        try:
            ray.shutdown()
        finally:
            _end_processes()
        if isinstance(error, EngineError) or not isinstance(error, Exception):
            raise
        raise EngineError(f"Ray does not start ({error_line(error)})") from error
    finally:
        _session.starting = False


def _end_processes(with_children: bool = True) -> None:
    """Kill what Ray has started before it was complete, and what that has started.

    `ray.shutdown` knows nothing of these processes.

    Parameters
    ----------
    with_children : bool
        Whether Ray's children of this process are killed, too. The operating system
        kills them when this process ends; Ray's calls in progress end this process with
        exit status 1 as soon as they are gone.
    """
    found: set[Any] = set()
    while new := set(_processes()) - found:
        for process in new:
            with suppress(psutil.Error):
                process.suspend()  # so it starts no other
        found |= new
    for process in found:
        with suppress(psutil.Error):
            if with_children or process.ppid() != os.getpid():
                process.kill()
    if with_children:
        psutil.wait_procs(found, timeout=KILL_TIMEOUT)


def _processes() -> Iterator[Any]:
    """Yield Ray's children of this process and their descendants."""
    package = str(Path(ray.__file__).parent)
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if any(package in word for word in child.cmdline()):
                yield child
                yield from child.children(recursive=True)


def _join(address: str) -> None:
    """Join a cluster."""
    _check_connection(address)
    try:
        with joining(address):
            _initialize(address=address)
    except EngineError:
        raise
    except ERRORS as error:
        raise EngineError(
            f"engine.address={address!r}: no Ray there ({error_line(error)})"
        ) from error


def _initialize(**arguments: Any) -> None:
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
