"""The runs of a sweep, each a process of its own, several at a time."""

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

POLL = 0.2  # seconds between two looks at the processes
PATIENCE = 15.0  # seconds that an interrupted run has to end by itself
LOCK = "sweep.lock"
OUTPUT = "output.txt"  # what a run prints, in its folder

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A run of a sweep.

    Parameters
    ----------
    name : str
        What it is called in the log.
    composed : DictConfig
        Its Hydra configuration.
    overrides : Sequence[str]
        What leads to it on the command line of `masksl.main`.
    folder : Path
        Its run folder.
    """

    name: str
    composed: DictConfig
    overrides: Sequence[str]
    folder: Path

    def is_finished(self) -> bool:
        """Tell whether it need not be run again; raises `main.ERRORS`."""
        settings = main.settings_of(self.composed)
        return server_app.is_finished(settings, self.folder)

    def start(self, lock: int, threads: int) -> subprocess.Popen[bytes]:
        """Start its process, which holds the lock too, and ends with this process.

        Processes with more threads together than there are cores wait for each other,
        many times as long as they compute.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        quoted = str(self.folder).replace("\\", "\\\\").replace("'", "\\'")
        place = [f"hydra.run.dir='{quoted}'", "hydra.mode=RUN"]
        with open(self.folder / OUTPUT, "ab") as output:
            return subprocess.Popen(  # pylint: disable=subprocess-popen-preexec-fn
                [sys.executable, "-m", "masksl.main", *self.overrides, *place],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": str(threads)} | os.environ,
                pass_fds=[lock],
                start_new_session=True,  # a Ctrl-C comes through this process alone
                preexec_fn=partial(_obey, os.getpid()),
            )

    def last_words(self) -> str:
        """Return the last line that it printed."""
        text = (self.folder / OUTPUT).read_text("utf-8", errors="replace")
        return (text.strip().splitlines() or ["no output"])[-1]


@dataclass
class _Sweep:
    """What waits, what runs, what became of the rest."""

    waiting: list[Job]
    lock: int
    running: dict[subprocess.Popen[bytes], tuple[Job, float]] = field(
        default_factory=dict
    )
    failed: list[Job] = field(default_factory=list)
    done: int = 0

    def fill(self, at_a_time: int) -> None:
        """Start what waits, as far as there is room."""
        threads = max(1, (os.cpu_count() or 1) // at_a_time)
        while self.waiting and len(self.running) < at_a_time:
            job = self.waiting.pop(0)
            self.running[job.start(self.lock, threads)] = job, time.monotonic()

    def reap(self) -> None:
        """Take in what has ended."""
        for process in [each for each in self.running if each.poll() is not None]:
            job, began = self.running.pop(process)
            if process.returncode:
                self.failed.append(job)
                logger.error("%s: failed: %s", job.name, job.last_words())
                continue
            self.done += 1
            top1 = results.read_summary(job.folder)["top1"]
            seconds = time.monotonic() - began
            logger.info("%s: top-1 %.2f %%, %.0f s", job.name, 100 * top1, seconds)

    def interrupt(self) -> None:
        """End what runs; its checkpoints stay."""
        self.reap()
        for process in self.running:
            process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + PATIENCE
        for process in self.running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run(
    jobs: Sequence[Job], folder: Path, at_a_time: int, minutes: float | None
) -> None:
    """Run all jobs that are not finished; what fails does not hold up the others.

    Exits with status 1 where a configuration is wrong, before anything is run, or where
    a run failed, and with 130 on Ctrl-C.

    Parameters
    ----------
    jobs : Sequence[Job]
        In the order in which they are begun.
    folder : Path
        That of the sweep, which holds those of the runs.
    at_a_time : int
        Processes at a time.
    minutes : float | None
        After so many no run is begun, and those at work are interrupted.
    """
    began = time.monotonic()
    try:
        _check(jobs, at_a_time, minutes)
        deadline = math.inf if minutes is None else began + 60 * minutes
        with _locked(folder) as lock:
            left = [job for job in jobs if not job.is_finished()]
            before = len(jobs) - len(left)
            logger.info("%d runs, %d of them finished before", len(jobs), before)
            sweep = _Sweep(left, lock)
            _work(sweep, at_a_time, deadline)
    except main.ERRORS as error:
        print(f"masksl: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("masksl: interrupted", file=sys.stderr)
        sys.exit(130)
    logger.info("%d of %d runs are finished", before + sweep.done, len(jobs))
    if sweep.failed:
        named = ", ".join(job.name for job in sweep.failed)
        print(f"masksl: {len(sweep.failed)} runs failed: {named}", file=sys.stderr)
        sys.exit(1)


def _work(sweep: _Sweep, at_a_time: int, deadline: float) -> None:
    """Run what waits until nothing is left, or the deadline has passed."""
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
    """Raise `main.ERRORS` if anything is wrong, in whichever run."""
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
    """Hold the lock of a folder, as a file descriptor.

    It is free when this process and all runs that it started have ended, so that no two
    processes work in one run folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("%s: waiting for the end of other runs in it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _obey(parent: int) -> None:
    """Let an interrupt end this process, and on Linux the end of its parent be one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's "&" has it ignored
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
        if os.getppid() != parent:
            os._exit(1)
