"""Time of a training step, on an engine and in a bare PyTorch loop."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from flwr.serverapp import Grid
from torch import nn
from torch.nn import functional

from masksl import dataset, main, model, server_app
from masksl.bench.apps import run_app, settings_of
from masksl.methods.network import initial_units
from masksl.modules import CompressedCut
from masksl.runtime.compressors import compressor_of
from masksl.settings import RunConfig, Settings, ThreadsConfig, read
from masksl.training.optimizer import OptimizerConfig
from masksl.utils import seeded_generator

ROUNDS = 4  # of training; the first one warms up


# --- on an engine ---------------------------------------------------------------------


def measure(engine: str, *overrides: str) -> dict[str, Any]:
    """Time the steps of a job on an engine, by the training time of whole rounds.

    Returns
    -------
    dict[str, Any]
        A row; the median over all rounds but the first.
    """
    settings = settings_of(
        *overrides, f"engine={engine}", f"rounds={ROUNDS}", "checkpoint.every=0"
    )
    rows = run_app(
        settings,
        partial(_train, settings=settings),
        main.CLIENT_APP,
        clients=RunConfig.of(settings).clients,
        shared=main.shared(settings),
    )
    timed = sorted(rows[1:], key=lambda row: row["train_seconds"])
    row = timed[len(timed) // 2]
    return {
        "engine": engine,
        "step_ms": 1e3 * row["train_seconds"] / row["steps"],
        "samples_per_second": row["samples_per_second"],
        "shares": row["shares"],
    }


class _Recorder:
    """Observer of a run that keeps its rows of metrics."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_step(self, round_: int, step: int, steps: int, loss: float) -> None:
        """Do nothing."""

    def on_round(self, row: Mapping[str, Any]) -> None:
        """Keep a row."""
        self.rows.append(dict(row))

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Do nothing."""


def _train(grid: Grid, settings: Settings) -> list[dict[str, Any]]:
    """Run all rounds and return their rows of metrics."""
    recorder = _Recorder()
    strategy = server_app.make_strategy(settings, recorder)
    strategy.start(grid, num_rounds=RunConfig.of(settings).rounds)
    return recorder.rows


# --- in a bare loop -------------------------------------------------------------------


class Threads(nn.Module):
    """The identity; it changes the number of threads, forward and backward.

    Parameters
    ----------
    after, before : int
        Threads of the layers after it, and of the layers before it.
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
        """Set the threads of the layers after this one."""
        ctx.before = before
        torch.set_num_threads(after)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):  # pylint: disable=arguments-differ
        """Set the threads of the layers before this one."""
        torch.set_num_threads(ctx.before)
        return gradient, None, None


@dataclass(frozen=True)
class _Loop:
    """A bare loop over the unsplit network.

    Parameters
    ----------
    settings : Settings
        Configuration of the job.
    data : Dataset
        The data set.
    parts : Sequence[torch.Tensor]
        Indices of each client's training samples.
    network : nn.Module
        Both halves, with the compressor between them.
    optimizer : torch.optim.Optimizer
        Optimiser of the network.
    """

    settings: Settings
    data: dataset.Dataset
    parts: Sequence[torch.Tensor]
    network: nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def steps(self) -> int:
        """Steps of a round."""
        size = RunConfig.of(self.settings).batch_size
        return max(len(dataset.batches(len(part), size)) for part in self.parts)

    def train(self, round_: int) -> int:
        """Train for one round and return the number of its samples."""
        run = RunConfig.of(self.settings)
        first, rest = read(ThreadsConfig, self.settings, "threads").client, _threads()
        samples = 0
        for step in range(self.steps):
            generator = seeded_generator(run.seed, "bench", round=round_, step=step)
            start = step * run.batch_size
            batches = [part[start:][: run.batch_size] for part in self.parts]
            images, labels = self.data.train_batch(torch.cat(batches), generator)
            torch.set_num_threads(first)
            loss = functional.cross_entropy(self.network(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            torch.set_num_threads(rest)
            samples += len(labels)
        return samples


def measure_bare(*overrides: str) -> dict[str, Any]:
    """Time the same steps in a bare loop over the unsplit network.

    All clients' samples are one batch, and the compressor is at the cut. Each half has
    its own number of threads, as on the engines.

    Returns
    -------
    dict[str, Any]
        A row; the median over all rounds but the first.
    """
    settings = settings_of(*overrides, "engine=local")
    config, clients, seed = main.division(settings)
    data = dataset.load(config)
    network = _network(settings)
    optimizer = read(OptimizerConfig, settings, "optimizer")
    loop = _Loop(
        settings,
        data,
        dataset.partition(config, clients, seed),
        network,
        pytorchs(optimizer, network.parameters()),
    )
    rounds, samples = [], 0
    for number in range(ROUNDS):
        start = time.perf_counter()
        samples = loop.train(number)
        rounds.append(time.perf_counter() - start)
    seconds = median(rounds[1:])
    return {
        "engine": "bare loop",
        "step_ms": 1e3 * seconds / loop.steps,
        "samples_per_second": samples / seconds,
        "shares": {},
    }


def pytorchs(
    config: OptimizerConfig, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return PyTorch's own optimiser of a configuration."""
    if config.name == "adam":
        return torch.optim.Adam(
            parameters,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


def _network(settings: Settings) -> nn.Sequential:
    """Build both halves; between them, compress and change the number of threads."""
    name, cut = str(settings["model.name"]), settings["cut"]
    count = model.resolve_cut(name, cut)  # type: ignore[arg-type]
    client, server = model.split(initial_units(settings), count)
    threads, rest = read(ThreadsConfig, settings, "threads"), _threads()
    return nn.Sequential(
        client,
        Threads(rest, threads.client),
        CompressedCut(compressor_of(settings, "compressor")),
        Threads(threads.server, rest),
        server,
    ).train()


def _threads() -> int:
    return torch.get_num_threads()
