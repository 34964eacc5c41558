"""Carry files to a machine without network in pieces, and others back.

``pack`` puts them, in one stream, into pieces of at most so many megabytes, and this
program beside them; ``unpack``, on the other machine, checks every piece and puts the
files where they belong. Python alone is needed there.
"""

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MANIFEST = "manifest.json"
MEGABYTE = 1_000_000
ROOT = Path(__file__).resolve().parents[1]
THERE = ("torch", "torchvision", "triton", "nvidia", "cuda")  # on any GPU machine


class ShipError(ValueError):
    """What cannot be packed or unpacked; one line says why."""


class Pieces(io.RawIOBase):
    """A stream that is written into files of at most ``limit`` bytes.

    Parameters
    ----------
    folder : Path
        Where the files go.
    limit : int
        Bytes of a file.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._file: BinaryIO | None = None
        self._room = 0
        self.names: list[str] = []

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Write all of the data, into as many files as it takes."""
        view = memoryview(data)
        while view:
            if not self._room:
                self._next()
            assert self._file is not None
            written = self._file.write(view[: self._room])
            self._room -= written
            view = view[written:]
        return len(data)

    def _next(self) -> None:
        self.close_file()
        self.names.append(f"piece-{len(self.names):03d}")
        # pylint: disable-next=consider-using-with
        self._file = open(self._folder / self.names[-1], "wb")
        self._room = self._limit

    def close_file(self) -> None:
        """Close the last file."""
        if self._file is not None:
            self._file.close()


def pack(
    folder: Path, paths: list[Path], limit: int, code: bool, wheels: str | None
) -> None:
    """Write pieces.

    Parameters
    ----------
    folder : Path
        New, or empty.
    paths : list[Path]
        Files and folders, below the working directory; they keep their places.
    limit : int
        Bytes of a piece.
    code : bool
        Whether the last commit comes along.
    wheels : str | None
        Python version whose wheels of the locked environment come along, as
        ``wheels/``, without those that a GPU machine has.
    """
    if limit < 1:
        raise ShipError("--limit: must be at least 1")
    if folder.exists() and any(folder.iterdir()):
        raise ShipError(f"{folder}: is not empty")
    for path in paths:
        if path.is_absolute() or ".." in path.parts or not path.exists():
            raise ShipError(f"{path}: must be a path below the working directory")
    folder.mkdir(parents=True, exist_ok=True)
    pieces = Pieces(folder, limit)
    try:
        with tarfile.open(fileobj=pieces, mode="w|gz", dereference=True) as archive:
            if code:
                _add_code(archive)
            if wheels is not None:
                _add_wheels(archive, wheels)
            for path in paths:
                archive.add(path)
        pieces.close_file()
        hashes = {name: _hash(folder / name) for name in pieces.names}
        (folder / MANIFEST).write_text(json.dumps(hashes, indent=1) + "\n", "utf-8")
        shutil.copy(__file__, folder / "ship.py")
    except BaseException:
        pieces.close_file()
        for path in folder.iterdir():  # it was empty before
            path.unlink()
        raise
    print(f"pieces in {folder}: {len(hashes)}")


def _add_code(archive: tarfile.TarFile) -> None:
    """Add the files of the last commit."""
    packed = _run(["git", "archive", "--format=tar", "HEAD"], cwd=ROOT)
    with tarfile.open(fileobj=io.BytesIO(packed)) as commit:
        for member in commit:
            archive.addfile(member, commit.extractfile(member))


def _add_wheels(archive: tarfile.TarFile, version: str) -> None:
    """Download what is locked as wheels for Linux on x86-64, and add them.

    What its authors offer as source alone is built here; it is Python alone.
    """
    own = ROOT / ".poetry/bin/poetry"
    poetry = own if own.exists() else shutil.which("poetry")
    if poetry is None:
        raise ShipError(f"--wheels {version}: needs Poetry, which make setup installs")
    export = [str(poetry), "export", "--format", "requirements.txt"]
    wanted = locked(_run(export, cwd=ROOT).decode(), version)
    with tempfile.TemporaryDirectory() as place:
        listed = Path(place, "requirements.txt")
        listed.write_text(wanted, encoding="utf-8")
        platforms = [f"manylinux_2_{n}_x86_64" for n in range(39, 4, -1)]
        platforms += [f"manylinux{year}_x86_64" for year in ("2014", "2010", "1")]
        options = [f"--platform={each}" for each in platforms]
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        download = [*pip, "download", "--no-deps", f"--python-version={version}"]
        download += [*options, "--require-hashes", f"--requirement={listed}"]
        _run([*download, f"--dest={place}"], cwd=Path(place))
        sources = [str(path) for path in Path(place).glob("*.tar.gz")]
        if sources:
            wheel = [*pip, "wheel", "--no-deps", f"--wheel-dir={place}", *sources]
            _run(wheel, cwd=Path(place))
        for path in sorted(Path(place).glob("*.whl")):
            archive.add(path, f"wheels/{path.name}")


def locked(requirements: str, version: str) -> str:
    r"""Return exported requirements that a Python of that version on Linux needs.

    Parameters
    ----------
    requirements : str
        Lines ``name==version ; marker \`` and, indented, their hashes.
    version : str
        As ``3.12``.

    Returns
    -------
    str
        Without markers, which pip would read for the Python that it runs in, and
        without what is on any machine with a GPU.
    """
    # Imported here: the other machine may lack it, and does not pack.
    from packaging.markers import Marker  # pylint: disable=import-outside-toplevel

    there = {"python_version": version, "python_full_version": f"{version}.0"}
    there |= {"sys_platform": "linux", "platform_system": "Linux"}
    there |= {"platform_machine": "x86_64", "os_name": "posix"}
    kept, keep = [], False
    for line in requirements.splitlines():
        if not line.startswith(" "):
            pinned, _, marker = line.removesuffix("\\").partition(" ; ")
            keep = not line.startswith(THERE)
            keep &= not marker or Marker(marker.strip()).evaluate(there)
            line = pinned.strip() + (" \\" if line.endswith("\\") else "")
        if keep:
            kept.append(line)
    return "\n".join(kept) + "\n"


def _run(command: list[str], cwd: Path) -> bytes:
    """Return what a command prints; `ShipError` with its last line where it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [""]
        raise ShipError(f"{' '.join(command[:4])} ...: {said[-1]}")
    return done.stdout


def unpack(folder: Path, into: Path) -> None:
    """Check the pieces of a folder and put the files where they belong.

    Parameters
    ----------
    folder : Path
        What `pack` wrote.
    into : Path
        Folder that the files' places are below.
    """
    try:
        hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ShipError(f"{folder / MANIFEST}: cut short or altered") from error
    for name, expected in hashes.items():
        path = folder / name
        if not path.exists():
            raise ShipError(f"{path}: is missing")
        if _hash(path) != expected:
            raise ShipError(f"{path}: cut short or altered")
    into.mkdir(parents=True, exist_ok=True)
    stream = _Joined(_chunks([folder / name for name in hashes]))
    with tarfile.open(fileobj=stream, mode="r|gz") as archive:
        archive.extractall(into, filter="data")
    print(f"pieces unpacked into {into}: {len(hashes)}")


class _Joined(io.RawIOBase):
    """A stream of the chunks of an iterator."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        del size  # tarfile takes what it gets
        return next(self._chunks, b"")


def _chunks(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(10240):
                yield chunk


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write pieces")
    packing.add_argument("pieces", type=Path, help="folder of the pieces, new")
    packing.add_argument("paths", type=Path, nargs="*", help="what comes along")
    packing.add_argument("--code", action="store_true", help="the last commit")
    packing.add_argument("--wheels", metavar="PYTHON", help="wheels, e.g. 3.12")
    packing.add_argument("--limit", type=int, default=60, help="megabytes of a piece")
    unpacking = commands.add_parser("unpack", help="put the files in their places")
    unpacking.add_argument("pieces", type=Path, help="folder of the pieces")
    unpacking.add_argument("into", type=Path, help="where to")
    told = parser.parse_args()
    try:
        if told.command == "pack":
            limit = told.limit * MEGABYTE
            pack(told.pieces, told.paths, limit, told.code, told.wheels)
        else:
            unpack(told.pieces, told.into)
    except (ShipError, OSError) as error:
        print(f"ship: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
