"""Time of an exchange: one frame to every client, and the same frame back."""

import os
import time
from collections.abc import Sequence
from functools import partial
from statistics import mean, median, quantiles
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from masksl.bench.apps import run_app, settings_of
from masksl.runtime.messages import frame_record

LONG = 5.0  # seconds of an exchange above which only FEW exchanges are timed
FEW = 3

echo = ClientApp()


@echo.query("echo")
def on_echo(message: Message, context: Context) -> Message:
    """Return the content of a message."""
    del context
    return Message(message.content, reply_to=message)


def measure(
    engine: str, clients: int, sizes: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    """Time exchanges in which every client receives a frame and returns it.

    Parameters
    ----------
    engine : str
        Name of the engine.
    clients : int
        Number of clients.
    sizes : Sequence[int]
        Sizes of a frame in bytes.
    repeats : int
        Timed exchanges per size, fewer if they take long.

    Returns
    -------
    list[dict[str, Any]]
        A row for each size; times in milliseconds.
    """
    timed = run_app(
        settings_of(f"engine={engine}"),
        partial(_time_sizes, sizes=tuple(sizes), repeats=repeats),
        f"{__name__}:echo",
        clients=clients,
    )
    return [
        {"engine": engine, "clients": clients, "bytes": size} | statistics_of(seconds)
        for size, seconds in zip(sizes, timed, strict=True)
    ]


def statistics_of(seconds: Sequence[float]) -> dict[str, Any]:
    """Return mean and quantiles of the seconds of exchanges, in milliseconds."""
    spread = quantiles(seconds, n=20, method="inclusive")
    return {
        "exchanges": len(seconds),
        "mean_ms": 1e3 * mean(seconds),
        "p50_ms": 1e3 * median(seconds),
        "p95_ms": 1e3 * spread[18],
        "steps_per_second": 1 / (2 * mean(seconds)),  # a step has two exchanges
    }


def _time_sizes(grid: Grid, sizes: Sequence[int], repeats: int) -> list[list[float]]:
    return [time_exchanges(grid, size, repeats) for size in sizes]


def time_exchanges(grid: Grid, size: int, repeats: int) -> list[float]:
    """Return the seconds of exchanges, without the first one."""
    nodes = list(grid.get_node_ids())
    noise = os.urandom(size + len(nodes))
    contents = [
        RecordDict({"activation": frame_record(noise[i:][:size])})
        for i in range(len(nodes))
    ]
    seconds: list[float] = []
    enough = repeats + 1
    while len(seconds) < enough:
        sent = [
            Message(content, node, "query.echo")
            for content, node in zip(contents, nodes, strict=True)
        ]
        start = time.perf_counter()
        replies = list(grid.send_and_receive(sent))
        seconds.append(time.perf_counter() - start)
        assert len(replies) == len(nodes)
        if len(seconds) > 1 and seconds[-1] > LONG:
            enough = min(enough, FEW + 1)
        del sent, replies
    return seconds[1:]
