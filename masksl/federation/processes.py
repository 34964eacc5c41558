"""The processes of a federation on this machine, and their orderly end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

from masksl.federation import keys
from masksl.signals import WORDS

LOOPBACK = "127.0.0.1"
NAME = "fed"  # of the federation in the configuration of `flwr`
BIN = Path(sys.executable).parent  # where Flower's programs are, and find each other
START_TIMEOUT = 60.0  # seconds for a program to be ready
END_TIMEOUT = 10.0  # seconds for a program to exit when asked to
POLL = 0.05


class FederationError(RuntimeError):
    """Raised when a program of the federation fails; the text is one line."""


class Federation:
    """A SuperLink, its SuperExec and SuperNodes, with TLS, keys and a secret.

    Everything is in one folder: keys, logs, the database of the SuperLink, what Flower
    installs, and the run folders, below ``outputs/``. As a context manager it ends what
    it has started.

    Parameters
    ----------
    folder : Path
        Folder that does not exist, or is empty.
    nodes : int
        Number of SuperNodes. Node i has ``partition-id`` i.

    Attributes
    ----------
    folder : Path
        Absolute.
    address : str
        ``host:port`` of the SuperLink.
    nodes : list[subprocess.Popen]
        The SuperNodes that run, by partition.
    """

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder.absolute()
        self._number = nodes
        self._processes: list[subprocess.Popen[bytes]] = []
        self.address = f"{LOOPBACK}:{free_port()}"
        self.nodes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        """Start everything; if that fails, end it again."""
        try:
            self._make_folder()
            self.start_superlink()
            self._register()
            for number in range(self._number):
                self.nodes.append(self.start_node(number))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End everything that was started."""
        self.close()

    def close(self) -> None:
        """End runs and nodes, then the SuperExec, then the SuperLink; remove the keys.

        The SuperLink waits for those that are connected. Meanwhile signals are ignored,
        so that nothing is left behind.
        """
        with _without_signals():
            for part in (slice(2, None), slice(1, 2), slice(1)):
                end(*self._processes[part])
            self._processes = []
            _remove_keys(self.folder / "keys")

    # --- what is started --------------------------------------------------------------

    def start_superlink(self) -> None:
        """Start the SuperLink and the SuperExec that runs its ServerApps."""
        keep = self.folder / "keys"
        secret = ("--superexec-auth-secret-file", str(keep / "secret"))
        host, _, port = self.address.rpartition(":")
        superlink = self._start(
            "superlink",
            "flower-superlink",
            *("--host", host, "--port", port, "--isolation", "process", *secret),
            *("--ssl-ca-certfile", str(keep / "ca.crt")),
            *("--ssl-certfile", str(keep / "server.pem")),
            *("--ssl-keyfile", str(keep / "server.key")),
            *("--enable-supernode-auth", "--database", str(self.folder / "state.db")),
            "--disable-runtime-dependency-installation",
            log="superlink",
        )
        self._wait_for_port(superlink, int(port))
        self._start(
            "superexec",
            "flower-superexec",
            *("--runtime-api-address", self.address, *self._root_certificates, *secret),
            log="superexec",
        )

    def start_node(self, number: int) -> "subprocess.Popen[bytes]":
        """Start a SuperNode."""
        return self._start(
            f"node-{number}",
            "flower-supernode",
            *("--superlink", self.address, *self._root_certificates),
            *("--auth-supernode-private-key", str(self.folder / f"keys/node-{number}")),
            *("--host", LOOPBACK, "--port", str(free_port())),
            *("--node-config", f"partition-id={number} num-partitions={self._number}"),
            log=f"node-{number}",
        )

    @property
    def _root_certificates(self) -> tuple[str, str]:
        return "--root-certificates", str(self.folder / "keys/ca.crt")

    def _make_folder(self) -> None:
        """Make the folder with all keys, and the configuration of `flwr`."""
        keep = self.folder / "keys"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.iterdir()):
                raise FederationError(f"{self.folder}: must be empty")
            self.folder.chmod(0o700)  # the SuperLink stores tokens
            keep.mkdir()
        except OSError as error:
            raise FederationError(f"{self.folder}: {error.strerror}") from error
        keys.write_server_keys(keep, ("localhost", LOOPBACK))
        keys.write_secret(keep / "secret")
        for number in range(self._number):
            keys.write_node_keys(keep, f"node-{number}")
        home = self.folder / "flwr-user"
        home.mkdir()
        lines = (
            f'[superlink]\ndefault = "{NAME}"\n\n[superlink.{NAME}]',
            f'address = "{self.address}"',
            f"root-certificates = {json.dumps(str(keep / 'ca.crt'))}",
        )
        (home / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _register(self) -> None:
        """Register the public key of every node."""
        for number in range(self._number):
            public = self.folder / f"keys/node-{number}.pub"
            self.flwr("supernode", "register", str(public), NAME)

    # --- flwr -------------------------------------------------------------------------

    def environment(self, name: str) -> dict[str, str]:
        """Return the environment of a program, with a home of Flower's of its own."""
        return os.environ | {
            "FLWR_HOME": str(self.folder / f"flwr-{name}"),
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONUNBUFFERED": "1",
        }

    def flwr(self, *arguments: str) -> str:
        """Run a command of `flwr` and return what it printed."""
        try:
            done = subprocess.run(
                [str(BIN / "flwr"), *arguments],
                env=self.environment("user"),
                cwd=self.folder,
                capture_output=True,
                text=True,
                check=False,
                stdin=subprocess.DEVNULL,
                timeout=START_TIMEOUT,
            )
        except subprocess.TimeoutExpired as error:
            raise FederationError(f"flwr {arguments[0]}: no answer") from error
        if done.returncode:
            printed = " ".join((done.stdout + done.stderr).split())
            raise FederationError(f"flwr {arguments[0]}: {printed}")
        return done.stdout

    def submit(
        self, project: Path, overrides: str, log: str | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start ``flwr run --stream``, which ends with the run and prints its output.

        Parameters
        ----------
        project : Path
            Folder with the ``pyproject.toml`` of the apps.
        overrides : str
            What would be typed after ``python -m masksl.main``, quoted as in a shell.
        log : str | None
            Name of a log in the folder that gets the output instead.
        """
        config = self.folder / "run.toml"
        config.write_text(f"overrides = {json.dumps(overrides)}\n", encoding="utf-8")
        arguments = (str(project), NAME, "--stream", "--run-config", str(config))
        return self._start("user", "flwr", "run", *arguments, log=log)

    def wait(self, run: "subprocess.Popen[bytes]") -> None:
        """Wait for the end of a run.

        Raises
        ------
        FederationError
            If the SuperLink or its SuperExec ends before.
        """
        while run.poll() is None:
            for name, process in zip(
                ("superlink", "superexec"), self._processes, strict=False
            ):
                if process.poll() is not None:
                    raise FederationError(f"{name} ended; see {self.folder}/{name}.log")
            time.sleep(POLL)

    # --- processes --------------------------------------------------------------------

    def _start(
        self, name: str, program: str, *arguments: str, log: str | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start a program in a process group of its own; it is ended at the end.

        Parameters
        ----------
        name : str
            Of its home of Flower's.
        program : str
            Of the environment of this process.
        log : str | None
            Name of a log in the folder; None for the output of this process.
        """
        with ExitStack() as files:
            output = None
            if log is not None:
                path = self.folder / f"{log}.log"
                output = files.enter_context(path.open("ab"))
            process = subprocess.Popen(  # pylint: disable=consider-using-with
                [str(BIN / program), *arguments],
                env=self.environment(name),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def _wait_for_port(self, process: "subprocess.Popen[bytes]", port: int) -> None:
        """Wait until a program accepts connections."""
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            with suppress(OSError):
                socket.create_connection((LOOPBACK, port), POLL).close()
                if process.poll() is None:  # else somebody else listens there
                    return
            if process.poll() is not None or time.monotonic() > deadline:
                raise FederationError(
                    f"the SuperLink does not start; see {self.folder}/superlink.log"
                )
            time.sleep(POLL)


def end(*processes: "subprocess.Popen[bytes]") -> None:
    """End programs, and what they have started."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + END_TIMEOUT
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in processes:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _without_signals() -> Iterator[None]:
    """Ignore the signals that end a program, if this is its main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in WORDS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port() -> int:
    """Return a port of the loopback interface at which nothing listens."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return int(listener.getsockname()[1])


def _remove_keys(folder: Path) -> None:
    if not folder.exists():
        return
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
