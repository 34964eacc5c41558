"""Memory of all processes of a run, by number of clients."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from masksl.runtime.results import read_rows

SAMPLES = 60  # MNIST training images per client: the whole set has 1,000 times as many
STEPS = 8  # training steps of a client with these in a round


def measure(clients: int, *overrides: str) -> dict[str, Any]:
    """Run a job in a process of its own and measure the memory of all its processes.

    Returns
    -------
    dict[str, Any]
        A row: the peak of the summed proportional set sizes in GiB, the time of a step
        of one client in milliseconds, and the time of a round in seconds.

    Raises
    ------
    RuntimeError
        If the run fails; the text is what it wrote to stderr.
    """
    rounds = max(1, 200 // clients)  # rounds of few clients are short
    job = (
        *("traffic=paper", "client_sync=round", f"rounds={rounds}"),
        *("dataset=mnist", "batch_size=8"),
        *(f"clients={clients}", f"dataset.limit={SAMPLES * clients}"),
        *(f"dataset.test_limit={10 * clients}", "checkpoint.every=0"),
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "masksl.main", *job, *overrides]
        with (
            open(Path(folder) / "errors", "w+", encoding="utf-8") as errors,
            subprocess.Popen(
                [*command, f"hydra.run.dir={folder}/run"],
                stdout=subprocess.DEVNULL,
                stderr=errors,
            ) as running,
        ):
            peak, parts = _watch(running)
            errors.seek(0)
            if running.returncode:
                raise RuntimeError(errors.read())
        rows = read_rows(Path(folder) / "run")
    timed = sorted(rows[1:] or rows, key=lambda row: row["train_seconds"])
    row = timed[len(timed) // 2]
    return {
        "clients": clients,
        "peak_gib": peak / 2**30,
        "driver_gib": parts["driver"] / 2**30,
        "hosts_gib": parts["hosts"] / 2**30,
        "client_steps": STEPS * clients,
        "client_step_ms": 1e3 * row["train_seconds"] / (STEPS * clients),
        "round_seconds": row["wall_seconds"],
        "rebuilt_graphs": row["rebuilt_graphs"],
    }


def _watch(running: subprocess.Popen[bytes]) -> tuple[int, dict[str, int]]:
    """Wait for a program to end; return its peak memory in bytes, whole and by part."""
    peak, parts = 0, {"driver": 0, "hosts": 0}
    while running.poll() is None:
        time.sleep(0.25)
        sizes = {pid: _pss(pid) for pid in _descendants(running.pid)}
        if sum(sizes.values()) > peak:
            peak = sum(sizes.values())
            hosts = sum(size for pid, size in sizes.items() if _is_host(pid))
            parts = {"driver": sizes.get(running.pid, 0), "hosts": hosts}
    return peak, parts


def _descendants(root: int) -> Iterator[int]:
    """Yield the ids of a process and of all its descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text("utf-8", "replace").rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        yield pid
        waiting += children.get(pid, [])


def _pss(pid: int) -> int:
    """Return the proportional set size of a process in bytes, 0 if it has ended."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 0


def _is_host(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::Host")
    except OSError:
        return False
