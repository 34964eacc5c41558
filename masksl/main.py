"""Entry point: a Hydra configuration, a run, a run folder.

python -m masksl.main [key=value ...] [--multirun]
"""

import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from masksl import signals

if __name__ == "__main__":
    signals.end_at_once()  # first: the imports below take seconds

# pylint: disable=wrong-import-position,wrong-import-order,ungrouped-imports
import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from masksl import cli, config, dataset, engine, server_app
from masksl.config import ConfigError
from masksl.dataset import DatasetConfig, DatasetError
from masksl.engine import EngineError, Shared
from masksl.engine.options import ENGINES
from masksl.runtime.checkpoint import CheckpointError
from masksl.runtime.compressors import warm_up
from masksl.runtime.folder import FolderError, discard, locked
from masksl.runtime.messages import RunError
from masksl.settings import RunConfig, Settings, flatten, read

GRACE = 2.0  # seconds between a signal and the end of a run
CLIENT_APP = "masksl.client_app:app"
ERRORS = (
    *(CheckpointError, ConfigError, DatasetError, EngineError, FolderError),
    RunError,
)

logger = logging.getLogger(__name__)


def settings_of(composed: DictConfig) -> Settings:
    """Check a composed Hydra configuration and return it as settings.

    Parameters
    ----------
    composed : DictConfig
        Interpolations are resolved; a relative ``dataset.root`` or ``resume`` becomes
        absolute.

    Raises
    ------
    ConfigError, DatasetError
        If it cannot be run; the text is one line.
    """
    try:
        nested: Any = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(cli.explain(error, (), config.CONF)) from error
    settings = flatten(nested)
    config.check(settings)
    for key in ("dataset.root", "resume"):
        if settings[key] not in ("null", server_app.AUTO):
            settings[key] = str(Path(str(settings[key])).absolute())
    if not _is_pinned(settings):
        with warnings.catch_warnings():  # of Dirichlet partitions that are drawn again
            warnings.simplefilter("ignore")
            dataset.partition(*division(settings))
    return settings


def run(settings: Settings, folder: Path) -> None:
    """Run checked settings on their engine.

    Parameters
    ----------
    settings : Settings
        What `settings_of` returned.
    folder : Path
        Run folder; no other run uses it meanwhile.
    """
    with locked(folder):
        _run(settings, folder)


def _run(settings: Settings, folder: Path) -> None:
    """Run checked settings in a folder that this process holds."""
    if server_app.is_finished(settings, folder):
        logger.info("%s: finished before, and not repeated", folder)
        return
    server_app.saved_state(settings, folder)  # errors come before the engine starts
    warm_up(settings)  # once, before there are several processes
    engine.run(
        str(settings["engine.name"]),
        partial(server_app.build, settings, folder),
        CLIENT_APP,
        clients=int(settings["clients"]),
        options=engine_options(settings),
        shared=shared(settings),
    )


def engine_options(settings: Settings) -> dict[str, Any]:
    """Return the options of the engine."""
    return dict(read(ENGINES[str(settings["engine.name"])], settings, "engine"))


def shared(settings: Settings) -> Shared:
    """Return the data set, to be loaded once for all processes of a run."""
    return Shared(partial(dataset.share, *division(settings)), "masksl.dataset:adopt")


def division(settings: Settings) -> tuple[DatasetConfig, int, int]:
    """Return the arguments of `masksl.dataset.partition`: data set, clients, seed."""
    run_config = RunConfig.of(settings)
    data = read(DatasetConfig, settings, "dataset")
    return data, run_config.clients, run_config.seed


def _is_pinned(settings: Settings) -> bool:
    """Return whether the clients' data are on machines of their own."""
    return settings.get("engine.pin", "null") not in ("null", "[]")


@hydra.main(version_base=None, config_path=str(config.CONF), config_name="base")
def main(composed: DictConfig) -> None:
    """Train as configured; on bad input one line and exit status 1."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    with cli.in_one_line(*ERRORS), signals.guarded(GRACE, engine.stop):
        try:
            settings = settings_of(composed)
            for line in config.warnings(settings):
                logger.warning(line)
            run(settings, folder)
        except ERRORS:
            discard(folder)
            raise


def program() -> None:
    """Run what the command line asks for; a signal ends it in one line."""
    signals.unwind()
    try:
        cli.start(main, config.CONF)
    except SystemExit as error:
        signals.take_over(error)
        raise
    finally:
        if signals.came():
            signals.end(engine.stop)
        signals.end_at_once()  # nothing is left to be cleaned up


if __name__ == "__main__":
    program()
