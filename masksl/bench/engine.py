"""Benchmark of the engines: ``python -m masksl.bench engine``.

Three tables from one run: how long an exchange takes; how long a training step takes,
beside a bare PyTorch loop over the unsplit network; how much memory all processes of a
run take together, against the number of clients.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

from masksl import dataset, engine, main, model, server_app
from masksl.compress import make
from masksl.halves import OptimizerConfig
from masksl.modules import CompressedCut
from masksl.runtime import messages
from masksl.runtime.results import read_rows
from masksl.settings import RunConfig, Settings, section
from masksl.utils import derive_seed, seeded_generator

LONG = 5.0  # seconds from which FEW exchanges are enough
FEW = 3
ROUNDS = 4  # of training; the first one warms up

# What a training step is timed on; the second needs real data.
JOBS: dict[str, tuple[str, ...]] = {
    "default job": (),
    "small CNN, CIFAR-10": (
        *("dataset=cifar10", "dataset.limit=5200", "dataset.test_limit=260"),
    ),
}
SHARE = 60  # MNIST's training images a client, as a thousand clients have
STEPS = 8  # that they make


echo = ClientApp()


@echo.query("echo")
def on_echo(message: Message, context: Context) -> Message:
    """Send back what came."""
    del context
    return Message(message.content, reply_to=message)


def settings_of(*overrides: str) -> Settings:
    """Return the settings of a command line."""
    conf = Path(__file__).resolve().parents[2] / "conf"
    with initialize_config_dir(str(conf), version_base=None):
        composed = compose("base", overrides=list(overrides))
    return main.settings_of(OmegaConf.create(composed))


# --- exchanges ------------------------------------------------------------------------


def exchanges(
    name: str, clients: int, sizes: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    """Time exchanges in which every client gets a frame and sends it back.

    Parameters
    ----------
    name : str
        The engine.
    clients : int
        Number of clients.
    sizes : Sequence[int]
        Bytes of a frame.
    repeats : int
        Exchanges that are timed, fewer where one takes long.

    Returns
    -------
    list[dict[str, Any]]
        A row for each size; times in milliseconds.
    """
    options = section(settings_of(f"engine={name}"), "engine")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.json"
        engine.run(
            name,
            partial(_echo_server, clients, tuple(sizes), repeats, out),
            "masksl.bench.engine:echo",
            clients=clients,
            options=options,
        )
        timed = json.loads(out.read_text(encoding="utf-8"))
    return [
        {"engine": name, "clients": clients, "bytes": size} | _figures(seconds)
        for size, seconds in zip(sizes, timed, strict=True)
    ]


def _figures(seconds: Sequence[float]) -> dict[str, Any]:
    spread = quantiles(seconds, n=20, method="inclusive")
    return {
        "exchanges": len(seconds),
        "mean_ms": 1e3 * mean(seconds),
        "p50_ms": 1e3 * median(seconds),
        "p95_ms": 1e3 * spread[18],
        "steps_per_second": 1 / (2 * mean(seconds)),  # a step makes two exchanges
    }


def _echo_server(
    clients: int, sizes: Sequence[int], repeats: int, out: Path
) -> ServerApp:
    built = ServerApp()

    @built.main()
    def _main(grid: Grid, context: Context) -> None:
        del context
        server_app.wait_for_clients(grid, clients, server_app.PATIENCE)
        timed = [_time_exchanges(grid, size, repeats) for size in sizes]
        out.write_text(json.dumps(timed), encoding="utf-8")

    return built


def _time_exchanges(grid: Grid, size: int, repeats: int) -> list[float]:
    """Return the seconds of exchanges; the first one is not counted."""
    nodes = list(grid.get_node_ids())
    noise = os.urandom(size + len(nodes))
    contents = [
        RecordDict({messages.ACTIVATION: messages.frame_record(noise[i:][:size])})
        for i in range(len(nodes))
    ]
    seconds: list[float] = []
    enough = repeats + 1
    while len(seconds) < enough:
        sent = [
            Message(content, node, "query.echo")
            for content, node in zip(contents, nodes, strict=True)
        ]
        began = time.perf_counter()
        replies = list(grid.send_and_receive(sent))
        seconds.append(time.perf_counter() - began)
        assert len(replies) == len(nodes)
        if len(seconds) > 1 and seconds[-1] > LONG:
            enough = min(enough, FEW + 1)
        del sent, replies
    return seconds[1:]


# --- training steps -------------------------------------------------------------------


def train_steps(name: str, *overrides: str) -> dict[str, Any]:
    """Time the steps of a job on an engine, by the training time of whole rounds.

    Returns
    -------
    dict[str, Any]
        A row; the median over all rounds but the first.
    """
    settings = settings_of(
        *overrides, f"engine={name}", f"rounds={ROUNDS}", "checkpoint.every=0"
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        engine.run(
            name,
            partial(_train_server, settings, out),
            main.CLIENT_APP,
            clients=int(settings["clients"]),
            options=section(settings, "engine"),
            shared=main.shared(settings),
        )
        rows = json.loads(out.read_text(encoding="utf-8"))
    last = sorted(rows[1:], key=lambda row: row["train_seconds"])[len(rows[1:]) // 2]
    return {
        "engine": name,
        "step_ms": 1e3 * last["train_seconds"] / rows[0]["steps"],
        "samples_per_second": last["samples_per_second"],
        "shares": last["shares"],
    }


def _train_server(settings: Settings, out: Path) -> ServerApp:
    built = ServerApp()
    rows: list[dict[str, Any]] = []
    seen = {"steps": 0}

    class Recorder:
        """Keeps what the strategy tells."""

        @staticmethod
        def on_step(round_: int, step: int, steps: int, loss: float) -> None:
            """Keep the number of steps."""
            del round_, step, loss
            seen["steps"] = steps

        @staticmethod
        def on_round(row: Mapping[str, Any]) -> None:
            """Keep a row."""
            rows.append(dict(row) | seen)

        @staticmethod
        def on_event(event: Mapping[str, Any]) -> None:
            """Do nothing."""

    @built.main()
    def _main(grid: Grid, context: Context) -> None:
        del context
        run_config = RunConfig.of(settings)
        server_app.wait_for_clients(grid, run_config.clients, server_app.PATIENCE)
        strategy = server_app.make_strategy(settings, Recorder())
        strategy.start(grid, num_rounds=run_config.rounds)
        out.write_text(json.dumps(rows), encoding="utf-8")

    return built


class Threads(nn.Module):
    """The identity; threads change here, on the way forth and on the way back.

    Parameters
    ----------
    after, before : int
        Threads of what comes after it in the network, and of what comes before.
    """

    def __init__(self, after: int, before: int) -> None:
        super().__init__()
        self._threads = after, before

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor."""
        return _SetThreads.apply(tensor, *self._threads)


class _SetThreads(torch.autograd.Function):  # pylint: disable=abstract-method
    @staticmethod
    def forward(ctx, tensor, after, before):  # pylint: disable=arguments-differ
        """Set the threads of what comes after."""
        ctx.before = before
        torch.set_num_threads(after)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):  # pylint: disable=arguments-differ
        """Set the threads of what came before."""
        torch.set_num_threads(ctx.before)
        return gradient, None, None


def bare_steps(*overrides: str) -> dict[str, Any]:
    """Time the same steps in a bare loop over the unsplit network.

    All clients' samples are one batch, and the compressor sits at the cut. Each half
    has its threads, as on the engines.
    """
    settings = settings_of(*overrides, "engine=local")
    batch_size = RunConfig.of(settings).batch_size
    config, clients, seed = main.division(settings)
    data = dataset.load(config)
    parts = dataset.partition(config, clients, seed)
    spec = data.spec
    name = str(settings["model.name"])
    units = model.build(
        name, spec.classes, spec.channels, seed=derive_seed(seed, "model")
    )
    halves = model.split(
        units, model.resolve_cut(name, settings["cut"])  # type: ignore[arg-type]
    )
    client, server = int(settings["threads.client"]), int(settings["threads.server"])
    cut = CompressedCut(make(**section(settings, "compressor")))
    here = torch.get_num_threads()
    network = nn.Sequential(
        halves[0], Threads(here, client), cut, Threads(server, here), halves[1]
    ).train()
    optimizer = OptimizerConfig(**section(settings, "optimizer")).make(
        list(network.parameters())
    )
    steps = max(len(dataset.batches(len(part), batch_size)) for part in parts)
    rounds: list[float] = []
    samples = 0
    for number in range(ROUNDS):
        began = time.perf_counter()
        samples = 0
        for step in range(steps):
            generator = seeded_generator(seed, "bench", round=number, step=step)
            indices = torch.cat([p[step * batch_size :][:batch_size] for p in parts])
            images, labels = data.train_batch(indices, generator)
            torch.set_num_threads(client)
            loss = functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch.set_num_threads(here)
            samples += len(labels)
        rounds.append(time.perf_counter() - began)
    seconds = median(rounds[1:])
    return {
        "engine": "bare loop",
        "step_ms": 1e3 * seconds / steps,
        "samples_per_second": samples / seconds,
        "shares": {},
    }


# --- memory ---------------------------------------------------------------------------


def memory(clients: int, *overrides: str) -> dict[str, Any]:
    """Run a round in a process of its own and watch what all its processes take.

    Returns
    -------
    dict[str, Any]
        A row: the peak of the summed proportional set sizes, and the time of a step of
        one client.
    """
    rounds = max(1, 200 // clients)  # few clients take short rounds
    job = (
        *("dataset=mnist", "batch_size=8", "client_sync=round", f"rounds={rounds}"),
        *(f"clients={clients}", f"dataset.limit={SHARE * clients}"),
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
    last = sorted(rows[1:] or rows, key=lambda row: row["train_seconds"])
    row = last[len(last) // 2]
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
    """Return the peak memory of a program, and what it was made of, until it ends."""
    peak, parts = 0, {"driver": 0, "hosts": 0}
    while running.poll() is None:
        time.sleep(0.25)
        sizes = {pid: _pss(pid) for pid in _family(running.pid)}
        if sum(sizes.values()) > peak:
            peak = sum(sizes.values())
            hosts = sum(size for pid, size in sizes.items() if _is_host(pid))
            parts = {"driver": sizes.get(running.pid, 0), "hosts": hosts}
    return peak, parts


def _family(root: int) -> Iterator[int]:
    """Yield a process and all that come from it."""
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
    """Return the proportional set size of a process in bytes, 0 if it is gone."""
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


# --- tables ---------------------------------------------------------------------------


def _show(title: str, columns: Mapping[str, str], rows: list[dict[str, Any]]) -> None:
    """Print rows: each column is a key with the format of its values."""
    if not rows:
        return
    table = Table(title=title)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{row[key]:{form}}" for key, form in columns.items()))
    Console(width=150).print(table)


def show(report: Mapping[str, Any]) -> None:
    """Print the tables of a report, those that have rows."""
    cores = f"{report['cores']} cores"
    columns = {"engine": "", "clients": ",", "bytes": ",", "exchanges": ""}
    times = dict.fromkeys(("mean_ms", "p50_ms", "p95_ms"), ",.1f")
    _show(
        f"exchanges, {cores}",
        columns | times | {"steps_per_second": ",.1f", "times_ray": ".2f"},
        report["exchanges"],
    )
    steps = [
        row | {part: f"{share:.0%}" for part, share in row["shares"].items()}
        for row in report["steps"]
    ]
    parts = {part: "" for row in report["steps"] for part in row["shares"]}
    _show(
        f"training steps, {cores}",
        {"job": "", "engine": "", "step_ms": ",.1f", "samples_per_second": ",.0f"}
        | {"times_ray": ".2f", "times_bare": ".2f"}
        | parts,
        [dict.fromkeys(parts, "") | row for row in steps],
    )
    columns = {"channels_last": "", "clients": ",", "peak_gib": ".2f"}
    columns |= {
        "driver_gib": ".2f",
        "hosts_gib": ".2f",
        "client_steps": ",",
        "client_step_ms": ".2f",
    }
    columns |= {"round_seconds": ".1f", "rebuilt_graphs": ","}
    _show(f"memory of all processes, MNIST, {cores}", columns, report["memory"])


def _relate(rows: list[dict[str, Any]], key: str, to: str, same: Sequence[str]) -> None:
    """Add to each row how many times as long it is as that of another engine."""
    base = {tuple(r[s] for s in same): r[key] for r in rows if r["engine"] == to}
    for row in rows:
        found = base.get(tuple(row[s] for s in same), float("nan"))
        row[f"times_{to.split()[0]}"] = row[key] / found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the parts of the benchmark that the arguments name."""
    report: dict[str, Any] = {"cores": os.cpu_count()}
    report |= {"exchanges": [], "steps": [], "memory": []}
    if "exchanges" in arguments.parts:
        for clients in arguments.clients:
            sizes = [n for n in arguments.sizes if n * clients <= arguments.most]
            for name in engine.ENGINES:
                _tell(f"exchanges of {clients} clients on {name}")
                report["exchanges"] += exchanges(
                    name, clients, sizes, arguments.repeats
                )
        _relate(report["exchanges"], "mean_ms", "ray", ("clients", "bytes"))
    where = f"dataset.root={arguments.root}"
    if "steps" in arguments.parts:
        for job, overrides in JOBS.items():
            _tell(f"steps of the {job} in a bare loop")
            rows = [bare_steps(*overrides, where)]
            for name in ("local", "ray", "flower"):
                _tell(f"steps of the {job} on {name}")
                rows.append(train_steps(name, *overrides, where))
            report["steps"] += [{"job": job} | row for row in rows]
        _relate(report["steps"], "step_ms", "ray", ("job",))
        _relate(report["steps"], "step_ms", "bare loop", ("job",))
    if "memory" in arguments.parts:
        for clients in arguments.clients:
            for channels_last in (False, True):
                _tell(f"memory of {clients} clients, channels_last={channels_last}")
                layout = f"compute.channels_last={channels_last}"
                row = {"channels_last": channels_last}
                report["memory"].append(row | memory(clients, where, layout))
    return report


def _tell(what: str) -> None:
    """Say what is being measured."""
    print(what, file=sys.stderr, flush=True)
