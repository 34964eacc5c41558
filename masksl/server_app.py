"""Flower ServerApp: builds the strategy, runs the rounds, writes the results."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from masksl import config
from masksl.config import ConfigError
from masksl.engine import EngineError
from masksl.engine.options import SuperlinkOptions
from masksl.methods import method_of
from masksl.methods.base import State
from masksl.runtime import checkpoint
from masksl.runtime.checkpoint import CheckpointError
from masksl.runtime.clients import ClientManager
from masksl.runtime.compressors import warm_up
from masksl.runtime.console import ProgressBar, print_summary
from masksl.runtime.folder import FolderError, discard, locked
from masksl.runtime.ledger import Ledger, Link
from masksl.runtime.messages import RunError
from masksl.runtime.results import (
    CONFIG,
    METRICS,
    SUMMARY,
    RunFolder,
    read_result,
)
from masksl.runtime.tracking import Tracker, tracker_of
from masksl.settings import (
    CheckpointConfig,
    RunConfig,
    Settings,
    import_plugins,
    read,
)
from masksl.strategy import Observer, RoundStrategy

AUTO = "auto"  # value of resume: continue in the run's own folder
PATIENCE = 60.0  # seconds that clients have to connect; streams have their own
PLAIN = (
    "engine=%s: every exchange goes through Flower's messages and takes seconds; "
    "engine=superlink engine.address=HOST:PORT opens a stream for each client"
)

app = ServerApp()

logger = logging.getLogger(__name__)


class RunFailed(Exception):
    """Tells Flower in one line why a run has ended.

    Flower (1.41) prints the traceback of what a ServerApp raises; this has none. The
    SuperLink notices an exit without an exception a minute later only.
    """

    @property  # type: ignore[misc]
    def __traceback__(self) -> None:  # type: ignore[override]
        """None, whatever it is set to: `contextlib` sets it."""

    @__traceback__.setter
    def __traceback__(self, traceback: object) -> None:
        pass


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configuration of ``flwr run``; the run config has one key, `overrides`.

    It holds what would be typed after ``python -m masksl.main``.
    """
    stamp = datetime.now().strftime("%Y-%m-%d/%H-%M-%S-%f")
    folder = Path("outputs") / stamp
    try:
        overrides = config.split_overrides(context.run_config)
        engine = "superlink" if is_deployed(grid) else "flower"
        settings = config.compose([f"engine={engine}", *overrides])
        with locked(folder), carried(grid, settings) as carrier:
            warm_up(settings)
            run(carrier, settings, folder)
    except (CheckpointError, ConfigError, EngineError, FolderError, RunError) as error:
        discard(folder)
        raise RunFailed(str(error)) from None


def is_deployed(grid: Grid) -> bool:
    """Return whether the clients are nodes of a deployed SuperLink, not simulated."""
    # pylint: disable-next=import-outside-toplevel
    from flwr.superlink.grid import HttpGrid  # loads an HTTP client

    return isinstance(grid, HttpGrid)


@contextmanager
def carried(grid: Grid, settings: Settings) -> Iterator[Grid]:
    """Return the grid that carries the messages of a run which Flower has started.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    settings : Settings
        Checked configuration of the run.

    Yields
    ------
    Grid
        With ``engine=superlink`` one of streams, else that of Flower.

    Raises
    ------
    ConfigError
        If the nodes are simulated and can have no streams.
    EngineError
        If the streams have no address, or the server cannot listen.
    """
    deployed, name = is_deployed(grid), settings["engine.name"]
    if name != "superlink":
        if deployed:
            logger.warning(PLAIN, name)
        yield grid
        return
    if not deployed:
        allowed = "another engine, because the nodes are simulated"
        raise ConfigError.of("engine.name", name, allowed)
    # pylint: disable-next=import-outside-toplevel
    from masksl.engine.superlink.grid import SuperlinkGrid  # loads gRPC

    options = read(SuperlinkOptions, settings, "engine")
    with closing(SuperlinkGrid(grid, RunConfig.of(settings).clients, options)) as own:
        own.invite()  # the clients start while the server builds its side
        yield own


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


class _Recorder:
    """Shows the progress of a run and writes its rows, events and checkpoints.

    Parameters
    ----------
    settings : Settings
        Configuration of the run.
    results : RunFolder
        The run folder.
    progress : ProgressBar
        Shows steps and rounds.
    tracker : Tracker
        Is given every row.
    """

    def __init__(
        self,
        settings: Settings,
        results: RunFolder,
        progress: ProgressBar,
        tracker: Tracker,
    ) -> None:
        self._settings = settings
        self._results = results
        self._progress = progress
        self._tracker = tracker
        self._checkpoint = read(CheckpointConfig, settings, "checkpoint")
        self._rounds = RunConfig.of(settings).rounds
        self.on_step = progress.on_step
        self.on_event = results.add_event
        self.rows: list[Mapping[str, Any]] = []
        self.strategy: RoundStrategy | None = None

    def begin(self, strategy: RoundStrategy, saved: State | None) -> None:
        """Write the first checkpoint, then the rows of the resumed run.

        With that checkpoint a run that is killed in its first round can be resumed.
        """
        self.strategy = strategy
        earlier: Sequence[Mapping[str, Any]] = []
        if saved is not None:
            strategy.restore(saved)
            earlier = saved.facts["rows"]
        if self._checkpoint.every:
            self._write_checkpoint(earlier)
        for row in earlier:
            self._add(row)

    def on_round(self, row: Mapping[str, Any]) -> None:
        """Write a row, and a checkpoint before it if one is due."""
        if self._checkpoint.due(row["round"], self._rounds):
            self._write_checkpoint([*self.rows, row])
        self._add(row)

    def _add(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)
        self._results.add_row(row)
        self._progress.on_round(row)
        self._tracker.on_round(row)

    def _write_checkpoint(self, rows: Sequence[Mapping[str, Any]]) -> None:
        assert self.strategy is not None
        tensors, facts = self.strategy.snapshot
        more = {"settings": self._settings, "rows": rows}
        checkpoint.write(self._results.path, tensors, facts | more)


def run(grid: Grid, settings: Settings, folder: Path) -> None:
    """Run all rounds and write the run folder.

    Parameters
    ----------
    grid : Grid
        The nodes.
    settings : Settings
        Checked configuration of the run.
    folder : Path
        Run folder; the caller holds it, see `masksl.runtime.folder.locked`.

    Raises
    ------
    FolderError
        If a file of the run folder cannot be written.
    RunError
        If clients are missing or fail; the text is one line.
    ConfigError, CheckpointError
        If the run to resume cannot be resumed; see `saved_state`.
    """
    import_plugins(settings)
    saved = saved_state(settings, folder)
    began = time.monotonic()
    run_config = RunConfig.of(settings)
    wait_for_clients(grid, run_config.clients, PATIENCE)
    results = RunFolder(folder)
    results.write_config(yaml.safe_dump(dict(settings), sort_keys=False))
    with closing(tracker_of(settings)(settings, folder)) as tracker:
        with ProgressBar(run_config.rounds) as progress:
            recorder = _Recorder(settings, results, progress, tracker)
            strategy = make_strategy(settings, recorder)
            recorder.begin(strategy, saved)
            strategy.start(grid, num_rounds=run_config.rounds)
        summary = strategy.summarize(recorder.rows, time.monotonic() - began)
        results.add_files(strategy.method.files())
        results.finish(summary)
        tracker.on_summary(summary)
    print_summary(summary, strategy.method.labels, str(folder.resolve()))


def saved_state(settings: Settings, folder: Path) -> State | None:
    """Return the state of the run named by ``resume``.

    Parameters
    ----------
    settings : Settings
        Checked configuration of this run.
    folder : Path
        Its run folder.

    Returns
    -------
    State | None
        None if there is nothing to resume: the run starts from the beginning.

    Raises
    ------
    ConfigError
        If there is no such run, or its configuration differs.
    CheckpointError
        If a file of its checkpoint is broken.
    """
    named = RunConfig.of(settings).resume
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
        if (old / METRICS).exists() or not _is_run_folder(old):
            raise ConfigError.of("resume", named, "a run folder with a checkpoint")
        logger.warning("%s: ended before its first checkpoint, so it starts anew", old)
        return None
    tensors, facts = checkpoint.read(old)
    config.check_resume(settings, facts["settings"], facts["round"])
    return State(tensors, facts)


def is_finished(settings: Settings, folder: Path) -> bool:
    """Return whether the run in a folder is finished and must not be repeated.

    A run one of whose files is damaged is not: it goes on from its checkpoint.

    Raises
    ------
    ConfigError
        If the folder holds a run of another configuration.
    """
    if settings["resume"] != AUTO or not (folder / SUMMARY).exists():
        return False
    try:
        result = read_result(folder)
    except FolderError as error:
        logger.warning("%s; the run is not taken as finished", error)
        return False
    done = int(result.summary["rounds"])
    try:
        config.check_resume(settings, result.settings, done)
    except ConfigError:
        if not _is_of(settings, folder):
            raise
        file = folder / CONFIG
        logger.warning("%s: not that of its checkpoint, from which it goes on", file)
        return False
    return done >= int(settings["rounds"])


def _is_of(settings: Settings, folder: Path) -> bool:
    """Return whether the checkpoint in a folder is one of this configuration.

    It says so reliably, because it has a checksum.
    """
    try:
        facts = checkpoint.read_facts(folder)
        config.check_resume(settings, facts["settings"], facts["round"])
    except (CheckpointError, ConfigError):
        return False
    return True


def _is_run_folder(folder: Path) -> bool:
    return (folder / CONFIG).exists() or (folder / "hydra").is_dir()


def make_strategy(settings: Settings, observer: Observer) -> RoundStrategy:
    """Build the server side of the method and the strategy around it."""
    ledger = Ledger(read(Link, settings, "link"))
    clients = ClientManager(settings, ledger)
    method = method_of(settings)
    return RoundStrategy(
        method=method.server_side.build(settings, clients),
        clients=clients,
        settings=settings,
        own_state=method.client_side.own_state(settings),
        observer=observer,
    )


def wait_for_clients(grid: Grid, clients: int, patience: float) -> None:
    """Wait until enough nodes are connected; `RunError` after ``patience`` seconds."""
    deadline = time.monotonic() + patience
    while (connected := len(list(grid.get_node_ids()))) < clients:
        if time.monotonic() > deadline:
            raise RunError(
                f"clients={clients}: {connected} nodes connected "
                f"within {patience:.0f} s"
            )
        time.sleep(0.1)
