"""Entry point: a Hydra configuration, a run, a run folder.

python -m masksl.main [key=value ...] [--multirun]
"""

import logging
import os
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from masksl import config, dataset, engine, server_app
from masksl.config import ConfigError
from masksl.dataset import DatasetConfig, DatasetError
from masksl.engine import EngineError, Shared
from masksl.runtime.checkpoint import CheckpointError
from masksl.runtime.messages import RunError
from masksl.settings import RunConfig, Settings, flatten, parse, section

GRACE = 2.0  # seconds that an interrupt has to end the run by itself
CLIENT_APP = "masksl.client_app:app"
ERRORS = (CheckpointError, ConfigError, DatasetError, EngineError, RunError)

logger = logging.getLogger(__name__)


def settings_of(composed: DictConfig) -> Settings:
    """Return a composed Hydra configuration as checked settings.

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
    settings = flatten(OmegaConf.to_container(composed, resolve=True))  # type: ignore
    config.check(settings)
    for key in ("dataset.root", "resume"):
        if (path := parse(settings[key])) not in (None, server_app.AUTO):
            settings[key] = str(Path(path).absolute())
    if not _is_pinned(settings):
        dataset.partition(*division(settings))
    return settings


def run(settings: Settings, folder: Path) -> None:
    """Run checked settings on their engine.

    Parameters
    ----------
    settings : Settings
        What `settings_of` returned.
    folder : Path
        Run folder.
    """
    if server_app.is_finished(settings, folder):
        logger.info("%s: finished before, and not repeated", folder)
        return
    server_app.saved_state(settings, folder)  # what is wrong with it, at once
    engine.run(
        str(settings["engine.name"]),
        partial(server_app.build, settings, folder),
        CLIENT_APP,
        clients=int(settings["clients"]),
        options=section(settings, "engine"),
        shared=shared(settings),
    )


def shared(settings: Settings) -> Shared:
    """Return the data set as what the processes of a run have in common."""
    return Shared(partial(dataset.share, *division(settings)), "masksl.dataset:adopt")


def division(settings: Settings) -> tuple[DatasetConfig, int, int]:
    """Return what `masksl.dataset.partition` takes: data set, clients, seed."""
    run_config = RunConfig.of(settings)
    data = DatasetConfig(**section(settings, "dataset"))
    return data, run_config.clients, run_config.seed


def _is_pinned(settings: Settings) -> bool:
    """Tell whether the clients' data are on machines of their own."""
    return bool(parse(settings.get("engine.pin", "null")))


@hydra.main(version_base=None, config_path="../conf", config_name="base")
def main(composed: DictConfig) -> None:
    """Train as configured; on bad input one line and exit status 1."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        settings = settings_of(composed)
        for line in config.warnings(settings):
            logger.warning(line)
        run(settings, Path(HydraConfig.get().runtime.output_dir))
    except ERRORS as error:
        print(f"masksl: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        _end()


def _interrupt(*_: object) -> NoReturn:
    """Raise KeyboardInterrupt; end soon all the same where something swallows it."""
    guard = threading.Timer(GRACE, _end)
    guard.daemon = True
    guard.start()
    raise KeyboardInterrupt


def _end() -> NoReturn:
    print("masksl: interrupted", file=sys.stderr)
    engine.stop()
    _leave(130)


def _leave(status: int) -> NoReturn:
    """End at once: Python alone takes seconds to take its modules down."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()  # pylint: disable=no-value-for-parameter
