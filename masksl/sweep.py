"""Runs of a sweep as separate processes, several at the same time."""

import ctypes
import fcntl
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from masksl import main, server_app
from masksl.config import ConfigError
from masksl.runtime import results
from masksl.runtime.folder import FolderError, discard, writing

POLL = 0.2  # seconds between two checks of the processes
EXIT_TIMEOUT = 15.0  # seconds for an interrupted run to exit
LOCK = "sweep.lock"
OUTPUT = "output.txt"  # output of a run, in its folder

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A run of a sweep.

    Parameters
    ----------
    name : str
        Name in the log.
    composed : DictConfig
        Hydra configuration.
    overrides : Sequence[str]
        Arguments of `masksl.main` that give this configuration.
    folder : Path
        Run folder.
    """

    name: str
    composed: DictConfig
    overrides: Sequence[str]
    folder: Path

    def is_finished(self) -> bool:
        """Return whether the run is finished; raises `main.ERRORS`."""
        settings = main.settings_of(self.composed)
        return server_app.is_finished(settings, self.folder)

    def start(self, lock: int, threads: int) -> subprocess.Popen[bytes]:
        """Start the process of the run; it ends when this process ends.

        Parameters
        ----------
        lock : int
            File descriptor of the lock of the sweep, which the process holds too.
        threads : int
            Threads of the process. Oversubscribing the cores slows all runs down
            several times.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        quoted = str(self.folder).replace("\\", "\\\\").replace("'", "\\'")
        hydra_keys = [f"hydra.run.dir='{quoted}'", "hydra.mode=RUN"]
        with open(self.folder / OUTPUT, "ab") as output:
            return subprocess.Popen(  # pylint: disable=subprocess-popen-preexec-fn
                [sys.executable, "-m", "masksl.main", *self.overrides, *hydra_keys],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": str(threads)} | os.environ,
                pass_fds=[lock],
                start_new_session=True,  # Ctrl-C reaches only this process
                preexec_fn=partial(_end_with_parent, os.getpid()),
            )

    def last_line(self) -> str:
        """Return the last line of the output."""
        try:
            text = (self.folder / OUTPUT).read_text("utf-8", errors="replace")
        except OSError as error:
            return f"{self.folder / OUTPUT}: cannot be read: {error.strerror}"
        return (text.strip().splitlines() or ["no output"])[-1]


@dataclass
class _Sweep:
    """State of a sweep: waiting, running, failed and completed runs."""

    waiting: list[Job]
    lock: int
    running: dict[subprocess.Popen[bytes], tuple[Job, float]] = field(
        default_factory=dict
    )
    failed: list[Job] = field(default_factory=list)
    done: int = 0

    def fill(self, at_a_time: int) -> None:
        """Start waiting runs until ``at_a_time`` are running."""
        threads = max(1, (os.cpu_count() or 1) // at_a_time)
        while self.waiting and len(self.running) < at_a_time:
            job = self.waiting.pop(0)
            try:
                process = job.start(self.lock, threads)
            except OSError as error:
                self._fail(job, f"{job.folder}: cannot be written: {error.strerror}")
                continue
            self.running[process] = job, time.monotonic()

    def reap(self) -> None:
        """Log the runs that have ended and remove them from the running ones."""
        for process in [p for p in self.running if p.poll() is not None]:
            job, began = self.running.pop(process)
            if process.returncode:
                self._fail(job, job.last_line())
                continue
            try:
                top1 = results.read_result(job.folder).summary["top1"]
            except FolderError as error:
                self._fail(job, str(error))
                continue
            self.done += 1
            seconds = time.monotonic() - began
            logger.info("%s: top-1 %.2f %%, %.0f s", job.name, 100 * top1, seconds)

    def _fail(self, job: Job, reason: str) -> None:
        """Log a run that has failed."""
        self.failed.append(job)
        logger.error("%s: failed: %s", job.name, reason)

    def interrupt(self) -> None:
        """Interrupt the running runs, and kill those that do not exit in time."""
        self.reap()
        for process in self.running:
            process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + EXIT_TIMEOUT
        for process in self.running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run(
    jobs: Sequence[Job], folder: Path, at_a_time: int, minutes: float | None
) -> None:
    """Run all jobs that are not finished; a failed run does not stop the others.

    Parameters
    ----------
    jobs : Sequence[Job]
        Runs in the order in which they are started.
    folder : Path
        Folder of the sweep, which contains the run folders.
    at_a_time : int
        Number of processes at the same time.
    minutes : float | None
        Time limit. After it no run is started and the running ones are interrupted.

    Raises
    ------
    SystemExit
        With status 1 if a configuration is wrong, before any run is started, or if a
        run failed.
    """
    began = time.monotonic()
    try:
        _check(jobs, at_a_time, minutes)
        deadline = math.inf if minutes is None else began + 60 * minutes
        with _locked(folder) as lock:
            waiting = [job for job in jobs if not job.is_finished()]
            before = len(jobs) - len(waiting)
            logger.info("%d runs, %d of them finished before", len(jobs), before)
            sweep = _Sweep(waiting, lock)
            _work(sweep, at_a_time, deadline)
    except main.ERRORS as error:
        print(f"masksl: {error}", file=sys.stderr)
        discard(folder)
        sys.exit(1)
    logger.info("%d of %d runs are finished", before + sweep.done, len(jobs))
    if sweep.failed:
        named = ", ".join(job.name for job in sweep.failed)
        print(f"masksl: {len(sweep.failed)} runs failed: {named}", file=sys.stderr)
        sys.exit(1)


def _work(sweep: _Sweep, at_a_time: int, deadline: float) -> None:
    """Run all waiting jobs, or until the deadline; then interrupt the rest."""
    try:
        while sweep.waiting or sweep.running:
            if time.monotonic() > deadline:
                break
            sweep.fill(at_a_time)
            time.sleep(POLL)
            sweep.reap()
    finally:
        sweep.interrupt()


def _check(jobs: Sequence[Job], at_a_time: int, minutes: float | None) -> None:
    """Check the configurations of all runs and of the launcher.

    Raises
    ------
    Exception
        One of `main.ERRORS`, on the first error.
    """
    for job in jobs:
        main.settings_of(job.composed)
    names = Counter(job.name for job in jobs)
    for name, number in names.items():
        if number > 1:
            allowed = f"a folder a run, {number} of them would share this one"
            raise ConfigError.of("hydra.sweep.subdir", name, allowed)
    if not isinstance(at_a_time, int) or at_a_time < 1:
        raise ConfigError.of("hydra.launcher.jobs", at_a_time, "1 or more")
    number = isinstance(minutes, (int, float)) and minutes > 0
    if minutes is not None and not number:
        allowed = "null or greater than 0"
        raise ConfigError.of("hydra.launcher.minutes", minutes, allowed)


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Hold the lock of a folder and yield its file descriptor.

    The runs inherit the descriptor. The lock is released when this process and all its
    runs have ended, so that two processes never use the same run folder.
    """
    with writing(folder / LOCK):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "wb")  # pylint: disable=consider-using-with
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("%s: waiting for the end of other runs in it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _end_with_parent(parent: int) -> None:
    """Restore the default SIGINT handler.

    On Linux the process also receives SIGINT when its parent exits.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's "&" ignores it
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
        if os.getppid() != parent:  # the parent exited before the call
            os._exit(1)
