"""A run folder as a place on the disk: held by one run, and its files written whole."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = "run.lock"
ROOM = 2**16  # bytes that a run needs at least, for its configuration
# What Hydra writes before a run begins: files, and the folders of its configuration.
_HYDRAS_FILES = {"main.log", "multirun.yaml"}
_HYDRAS_FOLDERS = {"hydra", ".hydra"}
_HYDRAS_CONFIG = {"config.yaml", "hydra.yaml", "overrides.yaml"}
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)

_held: set[Path] = set()
_made: set[Path] = set()

logger = logging.getLogger(__name__)


class FolderError(RuntimeError):
    """A run folder that cannot be used, written or read; the text is one line."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` into a `FolderError` that names a path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise FolderError(f"{path}: cannot be written: {reason}") from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file; at any moment it holds the old content or the new one, whole.

    Parameters
    ----------
    path : Path
        The file. ``<name>.part`` beside it is used in between.
    content : str | bytes
        What it is to hold.

    Raises
    ------
    FolderError
        If it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    with writing(path), removed_on_error(part):
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        settle(part, path)


@contextmanager
def removed_on_error(part: Path) -> Iterator[None]:
    """Remove a file that could not be completed: it would only fill the disk."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def settle(part: Path, path: Path) -> None:
    """Rename a file once it is on the disk, and wait until the new name is there."""
    _synchronize(part)
    os.replace(part, path)
    _synchronize(path.parent)


def _synchronize(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems have none for folders
            raise
    finally:
        os.close(descriptor)


def make(folder: Path) -> list[Path]:
    """Make a folder, and remember what of its path this process has made.

    Returns
    -------
    list[Path]
        The folders that were missing, the deepest first.

    Raises
    ------
    FolderError
        If it cannot be made.
    """
    absolute = folder.resolve()
    with writing(folder):
        missing = [path for path in (absolute, *absolute.parents) if not path.exists()]
        absolute.mkdir(parents=True, exist_ok=True)
    _made.update(missing)
    return missing


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder, made if it is missing, so that no other run uses it.

    The operating system releases it when the process ends, however it ends. A process
    that holds the folder may enter again. A folder that is made here is removed if it
    is empty at the end.

    Parameters
    ----------
    folder : Path
        The run folder.

    Raises
    ------
    FolderError
        If another process holds it, or it cannot be written.
    """
    absolute = folder.resolve()
    if absolute in _held:
        yield
        return
    missing = make(folder)
    descriptor = _take(folder)
    _held.add(absolute)
    try:
        yield
    finally:
        _held.discard(absolute)
        with suppress(OSError):
            (absolute / LOCK).unlink()
        os.close(descriptor)
        with suppress(OSError):  # as soon as one is not empty
            for path in missing:
                path.rmdir()


def _take(folder: Path) -> int:
    """Lock the lock file of a folder and return its descriptor."""
    path = folder.resolve() / LOCK
    while True:
        with writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, folder)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has removed it meanwhile: try the new one


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise FolderError(
            f"{folder}: another run is using this run folder; wait until it has ended "
            "or choose another hydra.run.dir"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise FolderError(
                f"{folder}: cannot be locked: {error.strerror}"
            ) from error
        logger.warning("%s: no locks on this file system: use it for one run", folder)


def check_room(folder: Path) -> None:
    """Raise `FolderError` if the disk of a folder has no room for a configuration."""
    part = folder / f"{LOCK}.part"
    with writing(folder):
        try:
            part.write_bytes(bytes(ROOM))
            _synchronize(part)
        finally:
            part.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove a run folder that this process made and that no run has written to.

    It goes if it holds only what Hydra writes beforehand; so do the folders above it
    that this process made and that are empty then. Anything else stays as it is.

    Parameters
    ----------
    folder : Path
        The run folder; it may be missing.
    """
    absolute = folder.resolve()
    for path in (absolute, *absolute.parents):
        own = any(above in _made for above in (path, *path.parents))
        if not own or not _is_bare(path):
            return
        with suppress(OSError):
            _remove(path)
        _made.discard(path)


def _is_bare(folder: Path) -> bool:
    """Return whether a folder holds only what Hydra and its lock put there."""
    if not folder.is_dir():
        return not folder.exists()
    for path in folder.iterdir():
        if path.is_dir() and path.name in _HYDRAS_FOLDERS:
            if any(file.name not in _HYDRAS_CONFIG for file in path.iterdir()):
                return False
        elif path.name not in (*_HYDRAS_FILES, LOCK):
            return False
    return True


def _remove(folder: Path) -> None:
    """Remove a bare folder."""
    for path in [] if not folder.exists() else list(folder.iterdir()):
        if path.is_dir():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        else:
            path.unlink()
    folder.rmdir()
