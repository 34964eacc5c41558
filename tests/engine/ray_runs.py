"""Programs that run Ray in a folder of their own, and the processes of that Ray."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

from ray.thirdparty_files import psutil

from tests.conftest import ROOT

AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@dataclass
class Program:
    """A running program, its output, and the folder of its Ray."""

    process: subprocess.Popen[str]
    folder: Path

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text(encoding="utf-8")

    def wait_for(self, text: str, seconds: float = 90) -> None:
        """Wait until the output holds the text."""
        deadline = time.monotonic() + seconds
        while text not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)

    def tree(self) -> list[Any]:
        """Return the process of the program and all its descendants."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def names(self) -> list[str]:
        """Return the names of the processes of the tree."""
        found = []
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):  # it has just ended
                found.append(process.name())
        return found


@contextmanager
def program(*overrides: str) -> Iterator[Program]:
    """Run ``masksl.main`` in the background; kill it in the end."""
    with ray_folder() as folder:
        environment = {k: v for k, v in os.environ.items() if k not in AUTHENTICATION}
        command = [sys.executable, "-m", "masksl.main", *overrides]
        with open(folder / "output", "w", encoding="utf-8") as output:
            process = subprocess.Popen(
                [*command, f"hydra.run.dir={folder}/run"],
                stdout=output,
                stderr=output,
                text=True,
                cwd=ROOT,
                env=environment | {"RAY_TMPDIR": str(folder)},
                # A shell's "&" may ignore SIGINT.
                preexec_fn=lambda: signal.signal(
                    signal.SIGINT, signal.default_int_handler
                ),
            )
        try:
            yield Program(process, folder)
        finally:
            process.kill()
            process.wait()


@contextmanager
def ray_folder() -> Iterator[Path]:
    """Yield a folder for Ray with a short path, because its sockets lie in it."""
    with tempfile.TemporaryDirectory(
        prefix="r", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def ray_processes(folder: Path) -> list[str]:
    """Return the processes, without zombies, of a Ray in a folder.

    All of them write logs there. Their command lines do not name it: some have none.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            files = [file.path for file in process.open_files()]
            if any(re.match(rf"{folder}/.*/logs/", path) for path in files):
                found.append(f"{process.pid} {process.name()}")
    return found


def left_behind(folder: Path, seconds: float = 15) -> list[str]:
    """Return the processes of a Ray in a folder that still run after some seconds."""
    deadline = time.monotonic() + seconds
    while (left := ray_processes(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def listening(processes: list[Any]) -> dict[int, set[IPv4Address | IPv6Address]]:
    """Return the addresses on which each of the processes listens."""
    found: dict[int, set[IPv4Address | IPv6Address]] = {}
    for process in processes:
        with suppress(psutil.Error):
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    address = ip_address(connection.laddr.ip)
                    # gRPC listens on ::ffff:127.0.0.1, which is 127.0.0.1
                    address = getattr(address, "ipv4_mapped", None) or address
                    found.setdefault(process.pid, set()).add(address)
    return found


def argument(processes: list[Any], name: str) -> str:
    """Return the value of an argument ``--name=value`` of one of the processes."""
    words = [word for process in processes for word in process.cmdline()]
    return next(word.split("=", 1)[1] for word in words if word.startswith(f"{name}="))
