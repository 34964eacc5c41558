"""What the tests of deployed runs share: a federation, its runs, and moments in
them."""

import json
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from masksl.federation import processes
from masksl.federation.processes import Federation
from masksl.runtime import results
from tests.conftest import ROOT, untimed

CLIENTS = 2
ACCEPTED = "SuperNode ID: "  # in the log of a SuperNode
PLUGIN = "plugins=[tests.federation.plugin_hold]"
HOLD = "MASKSL_TEST_HOLD"  # see `tests.federation.plugin_hold`
BEGIN = 180.0  # seconds until a run is in its rounds, on a busy machine
END = 300.0  # seconds until it has ended, after a fault that Flower notices in 60 s


class Deployment(Federation):
    """A federation of two nodes.

    Parameters
    ----------
    folder : Path
        Its folder.
    config : str | None
        Configuration of node 1, in place of the usual one.
    entry : Sequence[str]
        What begins its command line; see `network`.
    """

    def __init__(
        self, folder: Path, config: str | None = None, entry: Sequence[str] = ()
    ) -> None:
        super().__init__(folder, CLIENTS)
        self._config, self._entry = config, entry

    def _start(
        self, name: str, program: str, *arguments: str, log: str | None = None
    ) -> "subprocess.Popen[bytes]":
        given = list(arguments)
        if name == "node-1":
            given[given.index("--host") + 1] = "127.0.0.1"
            if self._config is not None:
                given[-1] = self._config
            command = [*self._entry, str(processes.BIN / program), *given]
            program, given = command[0], command[1:]
        return super()._start(name, program, *given, log=log)

    def revive_node(self, number: int) -> None:
        """Start a node that was killed, again and again until it is accepted.

        As long as the SuperLink takes it for alive, it refuses it.
        """
        log = self.folder / f"node-{number}.log"
        deadline = time.monotonic() + BEGIN
        while time.monotonic() < deadline:
            before = log.read_text(encoding="utf-8").count(ACCEPTED)
            node = self.nodes[number] = self.start_node(number)
            while log.read_text(encoding="utf-8").count(ACCEPTED) == before:
                if node.poll() is not None:
                    break
                time.sleep(0.1)
            else:
                return
            processes.end(node)
        raise AssertionError(f"node {number} is not accepted in {BEGIN:g} s")

    def run(self, *overrides: str) -> "subprocess.Popen[bytes]":
        """Start a run on streams; `printed` is what it prints."""
        address = f"{processes.LOOPBACK}:{processes.free_port()}"
        own = f"engine.address='{address}'", PLUGIN
        return self.submit(ROOT, shlex.join([*own, *overrides]), log="run")

    @property
    def printed(self) -> str:
        """What all runs have printed."""
        return (self.folder / "run.log").read_text(encoding="utf-8")

    def run_folder(self, number: int = 0) -> Path:
        """Return the folder of a run by its number."""
        return run_folders(self.folder)[number]

    def run_ids(self) -> dict[str, str]:
        """Return the status of every run by its id."""
        listed = json.loads(self.flwr("list", processes.NAME, "--format", "json"))
        return {run["run-id"]: run["status"] for run in listed["runs"]}


class Hold:
    """Holds a client at a place of a run; see `plugin_hold`."""

    def __init__(self, place: str) -> None:
        self._order = Path(os.environ[HOLD])
        self._held = self._order.with_suffix(".held")
        self._order.write_text(place, encoding="utf-8")

    def wait(self) -> int:
        """Wait until the client is there; return the id of its process."""
        wait_for(self._held.exists, BEGIN, "a client at its place")
        return int(self._held.read_text(encoding="utf-8"))

    def release(self) -> None:
        """Let the client go on."""
        self._held.unlink()


class Clock:
    """Prints how long after a fault something was seen."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def print(self, what: str) -> float:
        """Print it; return the seconds."""
        seconds = time.monotonic() - self._began
        print(f"{seconds:6.1f} s after the fault: {what}")
        return seconds


def run_folders(folder: Path) -> list[Path]:
    """Return the run folders of a federation, the oldest first."""
    return sorted(folder.glob("outputs/*/*"))


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> None:
    """Wait until something is true; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} in {seconds:g} s"
        time.sleep(0.05)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run folder without timed columns."""
    return untimed(results.read_rows(folder))


def rounds_of(folder: Path) -> int:
    """Return the number of rounds that a run folder has rows of."""
    path = folder / results.METRICS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def events_of(folder: Path) -> list[dict[str, Any]]:
    """Return the events of a run folder."""
    path = folder / results.EVENTS
    return [json.loads(line) for line in path.read_text().splitlines()]


def processes_of(folder: Path, word: str = "") -> dict[int, str]:
    """Return the command lines of a federation's processes that have a word, by id.

    They are known by their directory. Zombies have none.
    """
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and (entry / "cwd").readlink() == folder:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if word in line:
                    found[int(entry.name)] = line
        except OSError:  # it has ended
            continue
    return found


def clients_of(folder: Path) -> dict[int, str]:
    """Return the processes of ClientApps."""
    return processes_of(folder, "/flwr-clientapp ")


def servers_of(folder: Path) -> dict[int, str]:
    """Return the processes of ServerApps."""
    return processes_of(folder, "/flwr-serverapp ")


def is_listening(address: str) -> bool:
    """Return whether something accepts connections at ``host:port``."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 1.0).close()
    except OSError:
        return False
    return True


def kill_all(folder: Path) -> list[str]:
    """Kill the processes of a federation that were left; return their commands."""
    left = processes_of(folder)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return list(left.values())
