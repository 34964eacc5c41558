"""Transfer files to and from a machine without network, in pieces of limited size.

``pack`` writes files as one compressed stream into pieces and copies this program
beside them. ``unpack`` checks every piece on the other machine and extracts the files;
it needs only Python.
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
PREINSTALLED = ("torch", "torchvision", "triton", "nvidia", "cuda")


class ShipError(ValueError):
    """Raised when files cannot be packed or unpacked; the message is one line."""


class Pieces(io.RawIOBase):
    """A writable stream that is stored in files of at most ``limit`` bytes.

    Parameters
    ----------
    folder : Path
        Folder of the files.
    limit : int
        Bytes of a file at most.
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
        """Write the data and open new files as needed; return its length."""
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
    """Write files into pieces.

    Parameters
    ----------
    folder : Path
        Folder of the pieces, new or empty.
    paths : list[Path]
        Files and folders below the working directory; their relative paths are kept.
    limit : int
        Bytes of a piece at most.
    code : bool
        Whether the files of the last commit are added.
    wheels : str | None
        Python version, such as ``3.12``. The wheels of the locked environment for it
        are added as ``wheels/``, except the packages of `PREINSTALLED`.

    Raises
    ------
    ShipError
        If an argument is wrong or the wheels cannot be downloaded.
    """
    _check(folder, paths, limit)
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
        for path in folder.iterdir():  # the folder was empty before
            path.unlink()
        raise
    print(f"pieces in {folder}: {len(hashes)}")


def _check(folder: Path, paths: list[Path], limit: int) -> None:
    """Check the arguments of `pack`."""
    if limit < 1:
        raise ShipError("--limit: must be at least 1")
    if folder.exists() and any(folder.iterdir()):
        raise ShipError(f"{folder}: is not empty")
    for path in paths:
        if path.is_absolute() or ".." in path.parts or not path.exists():
            raise ShipError(f"{path}: must be a path below the working directory")


def _add_code(archive: tarfile.TarFile) -> None:
    """Add the files of the last commit."""
    packed = _run(["git", "archive", "--format=tar", "HEAD"], cwd=ROOT)
    with tarfile.open(fileobj=io.BytesIO(packed)) as commit:
        for member in commit:
            archive.addfile(member, commit.extractfile(member))


def _add_wheels(archive: tarfile.TarFile, version: str) -> None:
    """Download the locked packages as wheels for Linux on x86-64 and add them.

    A package without wheels is built here; this works for packages in pure Python.
    """
    own = ROOT / ".poetry/bin/poetry"
    poetry = own if own.exists() else shutil.which("poetry")
    if poetry is None:
        raise ShipError(f"--wheels {version}: needs Poetry, which make setup installs")
    export = [str(poetry), "export", "--format", "requirements.txt"]
    requirements = locked(_run(export, cwd=ROOT).decode(), version)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _download(requirements, version, folder)
        for path in sorted(folder.glob("*.whl")):
            archive.add(path, f"wheels/{path.name}")


def _download(requirements: str, version: str, folder: Path) -> None:
    """Download requirements for a Python version into a folder, as wheels."""
    listed = folder / "requirements.txt"
    listed.write_text(requirements, encoding="utf-8")
    platforms = [f"manylinux_2_{n}_x86_64" for n in range(39, 4, -1)]
    platforms += [f"manylinux{year}_x86_64" for year in ("2014", "2010", "1")]
    options = [f"--platform={platform}" for platform in platforms]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    download = [*pip, "download", "--no-deps", f"--python-version={version}"]
    download += [*options, "--require-hashes", f"--requirement={listed}"]
    _run([*download, f"--dest={folder}"], cwd=folder)
    sources = [str(path) for path in folder.glob("*.tar.gz")]
    if sources:
        wheel = [*pip, "wheel", "--no-deps", f"--wheel-dir={folder}", *sources]
        _run(wheel, cwd=folder)


def locked(requirements: str, version: str) -> str:
    r"""Return the exported requirements of a Python version on Linux.

    Parameters
    ----------
    requirements : str
        Lines ``name==version ; marker \`` and, indented, their hashes.
    version : str
        Python version, such as ``3.12``.

    Returns
    -------
    str
        The requirements whose markers hold, except the packages of `PREINSTALLED`. The
        markers are removed, because pip would evaluate them for its own Python.
    """
    # Imported here: unpacking does not need it, and the other machine may lack it.
    from packaging.markers import Marker  # pylint: disable=import-outside-toplevel

    target = {"python_version": version, "python_full_version": f"{version}.0"}
    target |= {"sys_platform": "linux", "platform_system": "Linux"}
    target |= {"platform_machine": "x86_64", "os_name": "posix"}
    kept, keep = [], False
    for line in requirements.splitlines():
        if not line.startswith(" "):
            pinned, _, marker = line.removesuffix("\\").partition(" ; ")
            keep = not line.startswith(PREINSTALLED)
            keep &= not marker or Marker(marker.strip()).evaluate(target)
            line = pinned.strip() + (" \\" if line.endswith("\\") else "")
        if keep:
            kept.append(line)
    return "\n".join(kept) + "\n"


def _run(command: list[str], cwd: Path) -> bytes:
    """Run a command and return its output.

    Raises
    ------
    ShipError
        If the command fails; the message ends with its last error line.
    """
    done = subprocess.run(command, cwd=cwd, capture_output=True, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [""]
        raise ShipError(f"{' '.join(command[:4])} ...: {lines[-1]}")
    return done.stdout


def unpack(folder: Path, into: Path) -> None:
    """Check the pieces of a folder and extract their files.

    Parameters
    ----------
    folder : Path
        Folder that `pack` wrote.
    into : Path
        Folder into which the files are extracted.

    Raises
    ------
    ShipError
        If a piece is missing or altered; then nothing is extracted.
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
    """A readable stream of the chunks of an iterator."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        del size  # tarfile accepts chunks of any size
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
    """Parse the command line and run its command."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write pieces")
    packing.add_argument("pieces", type=Path, help="folder of the pieces, new")
    packing.add_argument("paths", type=Path, nargs="*", help="files and folders")
    packing.add_argument("--code", action="store_true", help="add the last commit")
    packing.add_argument("--wheels", metavar="PYTHON", help="add wheels, e.g. 3.12")
    packing.add_argument(
        "--limit", type=int, default=60, help="megabytes of a piece at most"
    )
    unpacking = commands.add_parser("unpack", help="extract the files")
    unpacking.add_argument("pieces", type=Path, help="folder of the pieces")
    unpacking.add_argument("into", type=Path, help="folder of the files")
    arguments = parser.parse_args()
    try:
        if arguments.command == "pack":
            pack(
                arguments.pieces,
                arguments.paths,
                arguments.limit * MEGABYTE,
                arguments.code,
                arguments.wheels,
            )
        else:
            unpack(arguments.pieces, arguments.into)
    except (ShipError, OSError) as error:
        print(f"ship: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
