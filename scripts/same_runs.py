"""Compare the runs of a base commit with those of the working tree, bit for bit.

python scripts/same_runs.py BASE [--table1-small ROOT] [--seeds N]

Losses and tensors depend on the processor, so both trees run on this machine. Rows of
metrics are compared without what is timed, checkpoints tensor by tensor. Runs of the
base are kept under build/same_runs and reused.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "same_runs"

TIMED = ("wall_seconds", "train_seconds", "samples_per_second", "shares")
SMALL = (
    *("engine=local", "rounds=2", "clients=4", "fraction=0.75", "evaluations=2"),
    *("dataset.limit=250", "dataset.test_limit=60", "threads.server=1"),
    *("gradient_compressor=none", "model_compressor=none"),
)
# Overrides of the six small runs by name.
RUNS = {
    f"{sync}/{compressor}": (*SMALL, f"client_sync={sync}", f"compressor={compressor}")
    for sync in ("step", "round", "never")
    for compressor in ("ms", "none")
}
# Patterns of tensor names in checkpoints of the base, and their replacements.
RENAMED = (
    (r"^(model|momentum)\.(\d+)/", r"client.\2.\1/"),
    (r"^shared/", "model/"),
    (r"^shared\.momentum/", "model.momentum/"),
)


@dataclass(frozen=True)
class Tree:
    """A checkout that runs are started in.

    Parameters
    ----------
    path : Path
        Its root.
    results : Path
        Folder of its run folders.
    """

    path: Path
    results: Path

    def run(self, *arguments: str) -> None:
        """Run ``python -m masksl.main`` with this tree's modules."""
        command = [sys.executable, "-m", "masksl.main", *arguments]
        environment = os.environ | {
            "PYTHONPATH": str(self.path),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            command,
            cwd=self.path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{self.path}: {' '.join(arguments)}: {done.stderr.strip()}")


def run_small(tree: Tree) -> None:
    """Run the six small runs that the tree has not run yet."""
    for name, overrides in RUNS.items():
        folder = tree.results / "small" / name
        tree.run(*overrides, f"hydra.run.dir={folder}", "resume=auto")


def run_table1_small(tree: Tree, root: Path, seeds: int) -> None:
    """Run ``experiment=table1_small`` cut to one round, a run after the other."""
    every = ",".join(map(str, range(1, seeds + 1)))
    tree.run(
        *("--multirun", "experiment=table1_small", "rounds=1"),
        *(f"seed={every}", f"dataset.root={root}"),
        f"hydra.sweep.dir={tree.results / 'table1_small'}",
    )


# --- comparison -----------------------------------------------------------------------


def differences(base: Path, ours: Path) -> Iterator[str]:
    """Yield what differs between two run folders, a line each."""
    pairs = zip(read_rows(base), read_rows(ours), strict=True)
    for old, new in pairs:
        for key in old.keys() - set(TIMED):
            if key not in new or old[key] != new[key]:
                yield f"round {old['round']}, {key}: {old[key]}, {new.get(key)}"
    old_tensors = {rename(key): t for key, t in read_tensors(base).items()}
    new_tensors = read_tensors(ours)
    for key in sorted(old_tensors.keys() ^ new_tensors.keys()):
        yield f"tensor {key} is in one checkpoint only"
    for key in sorted(old_tensors.keys() & new_tensors.keys()):
        old, new = old_tensors[key], new_tensors[key]
        if not new.is_floating_point():  # format 1 held clients' integers as float64
            old = old.to(new.dtype)
        if old.dtype != new.dtype or not torch.equal(old, new):
            yield f"tensor {key} differs"


def rename(name: str) -> str:
    """Return what a tensor of the base is called now."""
    for pattern, now in RENAMED:
        name = re.sub(pattern, now, name)
    return name


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics of a run folder."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read_tensors(folder: Path) -> Mapping[str, torch.Tensor]:
    """Return the tensors of a run folder's checkpoint."""
    (file,) = (folder / "checkpoint").glob("*.safetensors")
    return load_file(file)


def compare(base: Tree, ours: Tree) -> bool:
    """Print what differs between the runs of two trees; return whether nothing does."""
    names = [
        {path.parent.relative_to(tree.results) for path in summaries(tree)}
        for tree in (base, ours)
    ]
    kinds = {name.parts[0] for name in names[1]}  # the base may have run more before
    names[0] = {name for name in names[0] if name.parts[0] in kinds}
    same = names[0] == names[1]
    if not same:
        print(f"only one tree has the runs {sorted(map(str, names[0] ^ names[1]))}")
    columns: set[str] = set()
    tensors = 0
    for name in sorted(names[0] & names[1]):
        for line in differences(base.results / name, ours.results / name):
            print(f"{name}: {line}")
            same = False
        old, new = (read_rows(tree.results / name) for tree in (base, ours))
        columns |= new[0].keys() - old[0].keys()
        tensors += len(read_tensors(ours.results / name))
    print(f"runs: {len(names[0])}, tensors: {tensors}, new columns: {sorted(columns)}")
    print("identical" if same else "NOT identical")
    return same


def summaries(tree: Tree) -> Iterator[Path]:
    """Return the summary of every finished run of a tree."""
    return tree.results.glob("**/summary.json")


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """Check a commit out beside the working tree for a while."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base"
        git("worktree", "add", "--detach", str(path), commit)
        try:
            yield path
        finally:
            git("worktree", "remove", "--force", str(path))


def git(*arguments: str) -> str:
    """Return what a git command prints."""
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def main() -> None:
    """Run both trees and compare; exit with status 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="commit to compare with")
    parser.add_argument(
        "--table1-small",
        type=Path,
        metavar="ROOT",
        help="run experiment=table1_small for one round too, on the CIFAR-10 in ROOT",
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of table1_small")
    arguments = parser.parse_args()
    commit = git("rev-parse", arguments.base)
    with tempfile.TemporaryDirectory() as folder, worktree(commit) as path:
        trees = Tree(path, KEPT / commit), Tree(ROOT, Path(folder))
        for tree in trees:
            run_small(tree)
            if arguments.table1_small:
                root = arguments.table1_small.absolute()
                run_table1_small(tree, root, arguments.seeds)
        same = compare(*trees)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
