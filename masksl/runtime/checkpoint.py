"""Checkpoints: the state of a run, in two files that are written atomically.

``state.json`` holds the facts and names the file of the tensors, safetensors, with its
SHA-256. It is replaced last, so that at any moment it names a complete file.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from masksl.runtime.folder import (
    FolderError,
    removed_on_error,
    settle,
    write_whole,
    writing,
)

FOLDER = "checkpoint"
STATE = "state.json"
FORMAT = 2


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the text is one line."""


def write(
    folder: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
) -> None:
    """Replace the checkpoint of a run folder.

    Parameters
    ----------
    folder : Path
        Run folder.
    tensors : Mapping[str, torch.Tensor]
        Tensors by name.
    facts : Mapping[str, Any]
        JSON facts; ``round``, the number of completed rounds, is required.

    Raises
    ------
    FolderError
        If it cannot be written; the checkpoint before it stays valid.
    """
    inside = folder / FOLDER
    name = f"round-{facts['round']:04d}.safetensors"
    path, part = inside / name, inside / f"{name}.part"
    with writing(path), removed_on_error(part):
        inside.mkdir(parents=True, exist_ok=True)
        _save(tensors, part, path)
        digest = _digest(part)
        settle(part, path)
    body = {"format": FORMAT, "file": name, "sha256": digest, "facts": facts}
    text = json.dumps(body | {"check": _check(body)}, allow_nan=False)
    write_whole(inside / STATE, text + "\n")
    with writing(inside):
        for other in inside.glob("*.safetensors*"):
            if other.name != name:
                other.unlink()


def _save(tensors: Mapping[str, torch.Tensor], part: Path, path: Path) -> None:
    """Write tensors to a file that is to become another."""
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, part)
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise FolderError(f"{path}: cannot be written: {reason}") from error


def exists(folder: Path) -> bool:
    """Return whether a run folder holds a checkpoint."""
    return (folder / FOLDER / STATE).exists()


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors, on the CPU, and the facts of a checkpoint.

    Parameters
    ----------
    folder : Path
        Run folder.

    Raises
    ------
    CheckpointError
        If a file is missing, cut short, altered or of another format.
    """
    body = _read_state(folder / FOLDER / STATE)
    path = folder / FOLDER / str(body["file"])
    try:
        found = _digest(path)
        if found != body["sha256"]:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes with SHA-256 {found[:12]}..., "
                f"expected {body['sha256'][:12]}...: cut short or altered"
            )
        return load_file(path), body["facts"]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the facts of a checkpoint; `CheckpointError` if its state is broken."""
    return _read_state(folder / FOLDER / STATE)["facts"]


def _read_state(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        check = body.pop("check")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: cut short or altered ({reason})") from error
    if check != _check(body):
        raise CheckpointError(f"{path}: altered, its checksum does not match")
    if body["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: format {body['format']}, this version reads format {FORMAT}"
        )
    return body


def _check(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
