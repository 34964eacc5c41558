"""Flower ServerApp: builds the strategy, runs the rounds, writes the results."""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from masksl import config, model
from masksl.compress import make
from masksl.config import ConfigError
from masksl.dataset import DATASETS
from masksl.halves import (
    ComputeConfig,
    OptimizerConfig,
    ScheduleConfig,
    ServerHalf,
    describe,
    resolve_device,
)
from masksl.runtime import checkpoint
from masksl.runtime.checkpoint import CheckpointError
from masksl.runtime.console import ProgressBar, print_summary
from masksl.runtime.ledger import Ledger, Link, compression_factor
from masksl.runtime.messages import ACTIVATION, RunError
from masksl.runtime.results import SUMMARY, RunFolder, read_config, read_summary
from masksl.settings import (
    RunConfig,
    Settings,
    checkpoint_due,
    import_plugins,
    parse,
    section,
)
from masksl.strategy import SharedHalf, SplitLearning, State
from masksl.utils import derive_seed

AUTO = "auto"  # resume: go on with what is in the run's own folder
PATIENCE = 60.0  # seconds that clients have to appear

app = ServerApp()

logger = logging.getLogger(__name__)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what Flower's run config says; entry point of ``flwr run``."""
    stamp = datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
    try:
        settings = config.from_run_config(context.run_config)
        config.check(settings)
        run(grid, settings, Path("outputs") / stamp)
    except (CheckpointError, ConfigError, RunError) as error:
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
    ConfigError, CheckpointError
        If the run to resume cannot be; see `saved_state`.
    """
    import_plugins(settings)
    saved = saved_state(settings, folder)
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
            on_event = staticmethod(results.add_event)

            @staticmethod
            def on_round(row: Mapping[str, Any]) -> None:
                """Keep a row, and what the run needs to go on after it."""
                rows.append(row)
                if checkpoint_due(settings, row["round"]):
                    keep()
                results.add_row(row)
                progress.on_round(row)

        def keep() -> None:
            assert strategy.snapshot is not None
            tensors, facts = strategy.snapshot
            more = {"settings": settings, "rows": rows}
            checkpoint.write(folder, tensors, facts | more)

        strategy = make_strategy(settings, Recorder())
        if saved is not None:
            strategy.restore(saved)
            for row in saved.facts["rows"]:
                rows.append(row)
                results.add_row(row)
                progress.on_round(row)
        else:
            strategy.snapshot = strategy.state({})
        if int(settings["checkpoint.every"]):
            keep()  # a run that is killed in its first round can be resumed too
        strategy.start(grid, num_rounds=run_config.rounds)
    seconds = time.monotonic() - began
    summary = summarize(settings, rows, strategy.ledger, seconds)
    results.finish(summary)
    print_summary(summary, str(folder.resolve()))


def saved_state(settings: Settings, folder: Path) -> State | None:
    """Return what the run that ``resume`` names left behind.

    Parameters
    ----------
    settings : Settings
        Checked configuration of this run.
    folder : Path
        Its run folder.

    Returns
    -------
    State | None
        None if there is nothing to go on from: the run begins at its beginning.

    Raises
    ------
    ConfigError
        If there is no such run, or it had another configuration.
    CheckpointError
        If a file of its checkpoint is broken.
    """
    named = parse(settings["resume"])
    if named is None:
        return None
    own = named == AUTO
    old = folder if own else Path(named)
    if not own and old.resolve() == folder.resolve():
        allowed = "a folder other than this run's own, which is written anew"
        raise ConfigError.of("resume", named, allowed)
    if own and not checkpoint.exists(old):
        return None
    if not checkpoint.exists(old):
        if (old / "metrics.jsonl").exists() or not _is_run_folder(old):
            raise ConfigError.of("resume", named, "a run folder with a checkpoint")
        logger.warning("%s: ended before its first checkpoint, so it begins anew", old)
        return None
    tensors, facts = checkpoint.read(old)
    config.check_resume(settings, facts["settings"], facts["round"])
    return State(tensors, facts)


def is_finished(settings: Settings, folder: Path) -> bool:
    """Tell whether an earlier start of the same run came to its end.

    Raises
    ------
    ConfigError
        If the folder holds a run of another configuration.
    """
    if parse(settings["resume"]) != AUTO or not (folder / SUMMARY).exists():
        return False
    done = int(read_summary(folder)["rounds"])
    config.check_resume(settings, read_config(folder), done)
    return done >= int(settings["rounds"])


def _is_run_folder(folder: Path) -> bool:
    return (folder / "config.yaml").exists() or (folder / "hydra").is_dir()


def make_strategy(settings: Settings, observer: Any) -> SplitLearning:
    """Build both halves from the seed and the strategy around them."""
    run_config = RunConfig.of(settings)
    spec = DATASETS[str(settings["dataset.name"])]
    name, seed = str(settings["model.name"]), derive_seed(run_config.seed, "model")
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
            server.to(device),
            optimizer,
            int(settings["threads.server"]),
            ComputeConfig(**section(settings, "compute")),
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
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": describe(resolve_device(str(settings["device"]))),
    } | throughput(rows)


def throughput(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return training samples a second over rounds, and where their time went.

    ``shares`` are those of the whole rounds, evaluation included.
    """
    trained = sum(row["train_seconds"] for row in rows)
    whole = sum(row["wall_seconds"] for row in rows)
    return {
        "samples_per_second": sum(row["samples"] for row in rows) / trained,
        "shares": {
            part: sum(row["shares"][part] * row["wall_seconds"] for row in rows) / whole
            for part in rows[0]["shares"]
        },
    }
