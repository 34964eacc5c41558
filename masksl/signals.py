"""Signals that end the program: one line, and 128 plus their number as exit status.

Only the standard library is imported, so that a program can call `end_at_once` before
its imports of PyTorch and Flower, which take seconds.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

WORDS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "hung up",
}
ECHO = 1.0  # seconds; a shell may signal a process and its group: that is one signal
PATIENCE = 10.0  # seconds that cleaning up may take


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by a signal that ends the program."""


@dataclass
class _State:
    """The signal that ends the program.

    Attributes
    ----------
    number : int | None
        The first one; None before.
    since : float
        When it came.
    guard : Callable[[], None] | None
        Called when it comes.
    """

    number: int | None = None
    since: float = 0.0
    guard: Callable[[], None] | None = None


_state = _State()
_ending = threading.Lock()


def end_at_once() -> None:
    """Let signals end the program where it is, while nothing must be cleaned up."""
    _handle(_end_at_once)


def unwind() -> None:
    """Let signals raise `Stopped`; a second one, a while later, ends the program."""
    _handle(_unwind)


def came() -> bool:
    """Return whether a signal has come."""
    return _state.number is not None


def take_over(error: SystemExit) -> None:
    """Take the exit of Ray's handler of SIGTERM as that signal.

    Ray sets its handler while it starts. This program exits with 0 or 1 otherwise.
    """
    if error.code == signal.SIGTERM and not came():
        _note(signal.SIGTERM)


@contextmanager
def guarded(seconds: float, clean_up: Callable[[], Any]) -> Iterator[None]:
    """Be sure that a signal ends the program, even if a library suppresses `Stopped`.

    Parameters
    ----------
    seconds : float
        Time between a signal and the end of the program, clean-up not included.
    clean_up : Callable[[], Any]
        What `end` does first.
    """

    def guard() -> None:
        _timer(seconds, lambda: end(clean_up))

    _state.guard = guard
    try:
        yield
    finally:
        _state.guard = None


def end(clean_up: Callable[[], Any]) -> NoReturn:
    """End the program after a signal, at most `PATIENCE` seconds from now.

    Parameters
    ----------
    clean_up : Callable[[], Any]
        Called first, in whichever thread comes here first.
    """
    with _ending:  # it is never left
        _timer(PATIENCE, lambda: os._exit(_status()))
        try:
            clean_up()
        finally:
            _leave()


def _handle(handler: Callable[[int, FrameType | None], Any]) -> None:
    """Set the handler of the signals that are not ignored, as ``nohup`` asks."""
    for number in WORDS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def _end_at_once(number: int, _frame: FrameType | None) -> NoReturn:
    _note(number)
    _leave()


def _unwind(number: int, _frame: FrameType | None) -> None:
    if came():
        if time.monotonic() > _state.since + ECHO:
            _leave()
        return
    _note(number)
    if _state.guard is not None:
        _state.guard()
    raise Stopped


def _note(number: int) -> None:
    """Remember the first signal and say so."""
    _state.number, _state.since = number, time.monotonic()
    line = f"masksl: {WORDS[signal.Signals(number)]}\n"
    with suppress(OSError):  # standard error may be closed
        os.write(2, line.encode())  # the signal may have come in the middle of a print


def _timer(seconds: float, function: Callable[[], Any]) -> None:
    timer = threading.Timer(seconds, function)
    timer.daemon = True
    timer.start()


def _status() -> int:
    assert _state.number is not None
    return 128 + _state.number


def _leave() -> NoReturn:
    """End at once: Python takes seconds to finalise its modules."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            # They may be closed, or the signal came in the middle of a write.
            with suppress(OSError, RuntimeError, ValueError):
                stream.flush()
    os._exit(_status())
