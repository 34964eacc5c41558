"""Hydra callback that takes the run folder before Hydra writes to it.

Hydra searches for plugins only in packages called ``hydra_plugins``. The implementation
is in `masksl.runtime.folder`.
"""

import atexit
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class RunFolderCallback(Callback):
    """Holds the run folder until the run ends; `conf/base.yaml` names it.

    A folder that another run uses, or that cannot be written, ends the program with one
    line and exit status 1, and nothing is written.
    """

    def __init__(self) -> None:
        self._held = ExitStack()

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hold the folder of a run."""
        # Imported here: Hydra imports this module in every run.
        # pylint: disable-next=import-outside-toplevel
        from masksl.runtime import folder

        del kwargs
        path = Path(config.hydra.run.dir)
        atexit.register(self._held.close)
        try:
            self._held.enter_context(folder.locked(path))
            folder.check_room(path)
        except folder.FolderError as error:
            _refuse(error, path)

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Release it."""
        del config, kwargs
        self._held.close()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make the folder of a sweep; each of its runs holds its own."""
        # pylint: disable-next=import-outside-toplevel
        from masksl.runtime import folder

        del kwargs
        path = Path(config.hydra.sweep.dir)
        try:
            folder.make(path)
            folder.check_room(path)
        except folder.FolderError as error:
            _refuse(error, path)


def _refuse(error: Exception, path: Path) -> None:
    # pylint: disable=import-outside-toplevel
    from masksl.cli import refuse
    from masksl.runtime.folder import discard

    # pylint: enable=import-outside-toplevel
    discard(path)
    refuse(error)
