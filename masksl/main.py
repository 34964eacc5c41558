"""Entry point: a Hydra configuration, a run, a run folder.

python -m masksl.main [key=value ...] [--multirun]
"""

import sys
from functools import partial
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from masksl import config, dataset, engine, server_app
from masksl.config import ConfigError
from masksl.dataset import DatasetConfig, DatasetError
from masksl.engine import EngineError
from masksl.messages import RunError
from masksl.settings import Settings, flatten, section

CLIENT_APP = "masksl.client_app:app"


def settings_of(composed: DictConfig) -> Settings:
    """Return a composed Hydra configuration as checked settings.

    Parameters
    ----------
    composed : DictConfig
        Interpolations are resolved; a relative ``dataset.root`` becomes absolute.

    Raises
    ------
    ConfigError, DatasetError
        If it cannot be run; the text is one line.
    """
    settings = flatten(OmegaConf.to_container(composed, resolve=True))  # type: ignore
    config.check(settings)
    settings["dataset.root"] = str(Path(str(settings["dataset.root"])).absolute())
    data = DatasetConfig(**section(settings, "dataset"))
    dataset.partition(data, int(settings["clients"]), int(settings["seed"]))
    return settings


@hydra.main(version_base=None, config_path="../conf", config_name="base")
def main(composed: DictConfig) -> None:
    """Train as configured; on bad input one line and exit status 1."""
    try:
        settings = settings_of(composed)
        folder = Path(HydraConfig.get().runtime.output_dir)
        engine.run(
            str(settings["engine.name"]),
            partial(server_app.build, settings, folder),
            CLIENT_APP,
            clients=int(settings["clients"]),
            options=section(settings, "engine"),
        )
    except (ConfigError, DatasetError, EngineError, RunError) as error:
        print(f"masksl: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("masksl: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()  # pylint: disable=no-value-for-parameter
