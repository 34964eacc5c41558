"""Flower ServerApp: builds the strategy, runs the rounds, writes the results."""

import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from masksl import config, model, seeds
from masksl.compress import make
from masksl.config import ConfigError
from masksl.console import ProgressBar, print_summary
from masksl.dataset import DATASETS
from masksl.halves import OptimizerConfig, ScheduleConfig, ServerHalf, resolve_device
from masksl.ledger import Ledger, Link, compression_factor
from masksl.messages import ACTIVATION, RunError
from masksl.results import RunFolder
from masksl.settings import RunConfig, Settings, import_plugins, section
from masksl.strategy import SharedHalf, SplitLearning

PATIENCE = 60.0  # seconds that clients have to appear

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what Flower's run config says; entry point of ``flwr run``."""
    stamp = datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
    try:
        settings = config.from_run_config(context.run_config)
        config.check(settings)
        run(grid, settings, Path("outputs") / stamp)
    except (ConfigError, RunError) as error:
        print(f"masksl: {error}", file=sys.stderr)
        sys.exit(1)


def build(settings: Settings, folder: Path) -> ServerApp:
    """Return a ServerApp for engines that give it no run config.

    Parameters
    ----------
    settings : Settings
        Checked configuration of the run.
    folder : Path
        Run folder.
    """
    built = ServerApp()

    @built.main()
    def _main(grid: Grid, context: Context) -> None:
        del context
        run(grid, settings, folder)

    return built


def run(grid: Grid, settings: Settings, folder: Path) -> None:
    """Run all rounds and write the run folder.

    Parameters
    ----------
    grid : Grid
        Where the clients are.
    settings : Settings
        Checked configuration of the run.
    folder : Path
        Run folder.

    Raises
    ------
    RunError
        If clients are missing or fail; the text is one line.
    """
    import_plugins(settings)
    began = time.monotonic()
    run_config = RunConfig.of(settings)
    wait_for_clients(grid, run_config.clients, PATIENCE)
    results = RunFolder(folder)
    results.write_config(yaml.safe_dump(dict(settings), sort_keys=False))
    rows: list[Mapping[str, Any]] = []
    with ProgressBar(run_config.rounds) as progress:

        class Recorder:
            """Shows and keeps what the strategy tells."""

            on_step = staticmethod(progress.on_step)

            @staticmethod
            def on_round(row: Mapping[str, Any]) -> None:
                """Keep a row."""
                rows.append(row)
                results.add_row(row)
                progress.on_round(row)

        strategy = make_strategy(settings, Recorder())
        strategy.start(grid, num_rounds=run_config.rounds)
    seconds = time.monotonic() - began
    summary = summarize(settings, rows, strategy.ledger, seconds)
    results.finish(summary)
    print_summary(summary, str(folder.resolve()))


def make_strategy(settings: Settings, observer: Any) -> SplitLearning:
    """Build both halves from the seed and the strategy around them."""
    run_config = RunConfig.of(settings)
    spec = DATASETS[str(settings["dataset.name"])]
    name, seed = str(settings["model.name"]), seeds.derive(run_config.seed, "model")
    units = model.build(name, spec.classes, spec.channels, seed=seed)
    client, server = model.split(units, model.resolve_cut(name, run_config.cut))
    optimizer = OptimizerConfig(**section(settings, "optimizer"))
    device = resolve_device(run_config.device)
    client.to(device)
    shared = None
    if run_config.client_sync != "never":
        parameters = {name: p.detach() for name, p in client.named_parameters()}
        tensors = parameters | dict(client.named_buffers())
        shared = SharedHalf(tensors, list(parameters))
    return SplitLearning(
        server=ServerHalf(
            server.to(device), optimizer, int(settings["threads.server"])
        ),
        shared=shared,
        settings=settings,
        activation_shape=model.activation_shape(
            client, spec.channels, spec.size, device
        ),
        classes=spec.classes,
        optimizer=optimizer,
        schedule=ScheduleConfig(**section(settings, "schedule")),
        gradient_compressor=make(**section(settings, "gradient_compressor")),
        ledger=Ledger(Link(**section(settings, "link"))),
        observer=observer,
    )


def wait_for_clients(grid: Grid, clients: int, patience: float) -> None:
    """Wait until enough nodes are there; `RunError` after ``patience`` seconds."""
    deadline = time.monotonic() + patience
    while (found := len(list(grid.get_node_ids()))) < clients:
        if time.monotonic() > deadline:
            raise RunError(
                f"clients={clients}: {found} nodes connected within {patience:.0f} s"
            )
        time.sleep(0.1)


def summarize(
    settings: Settings,
    rows: Sequence[Mapping[str, Any]],
    ledger: Ledger,
    seconds: float,
) -> dict[str, Any]:
    """Return the content of ``summary.json``.

    Parameters
    ----------
    settings : Settings
        Configuration of the run.
    rows : Sequence[Mapping[str, Any]]
        Metrics of every round.
    ledger : Ledger
        What was sent.
    seconds : float
        Wall time of the run.

    Returns
    -------
    dict[str, Any]
        Accuracies are fractions; bytes are those of the whole run.
    """
    last, traffic = rows[-1], ledger.total
    sent, dense = traffic.bytes(ACTIVATION), traffic.dense(ACTIVATION)
    return {
        "top1": last["top1"],
        "top5": last["top5"],
        "best_top1": max(row["top1"] for row in rows),
        "loss": last["loss"],
        "test_loss": last["test_loss"],
        "rounds": len(rows),
        "compressor": settings["compressor.name"],
        "bytes": traffic.nested(),
        "bytes_total": traffic.bytes(),
        "paper_bytes": traffic.bytes(ACTIVATION, "up"),
        "compression_factor": compression_factor(dense, sent),
        "bits_per_element": 32 * sent / dense,
        "factor_total": compression_factor(traffic.dense(), traffic.bytes()),
        "relative_error": last["relative_error"],
        "link_seconds": traffic.link_seconds,
        "wall_seconds": seconds,
    }
