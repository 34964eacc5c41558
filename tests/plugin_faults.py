"""A plugin: its clients raise, or their process dies, where a run says so.

``FAULTS`` are raised in every run that names this plugin; a process is killed where the
file that the variable MASKSL_TEST_KILL names says so, once.
"""

import os
import signal
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from masksl import client_app
from masksl.runtime import messages

FAULTS = {("forward", 1, 1, 1), ("backward", 2, 0, 2), ("evaluate", 2, 0, 0)}


def _wrap(name: str) -> None:
    handler = getattr(client_app, name)

    def faulty(client: client_app.Client, content: RecordDict) -> RecordDict:
        told: Any = client.context.state.config_records[messages.SETTINGS]
        if __name__ not in told["plugins"]:
            return handler(client, content)
        place = (0, 0)
        if messages.PLACE in content.config_records:
            at: Any = content.config_records[messages.PLACE]
            place = at["round"], at["step"]
        here = (name, *place, client.number)
        if "plugin_kill" in told["plugins"]:
            _kill(here)
        elif here in FAULTS:
            raise KeyError(f"no luck in {name}")
        return handler(client, content)

    setattr(client_app, name, faulty)


def _kill(here: tuple[Any, ...]) -> None:
    order = Path(os.environ["MASKSL_TEST_KILL"])
    if order.exists() and order.read_text() == " ".join(map(str, here)):
        order.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


for _name in ("forward", "backward", "evaluate", "save"):
    _wrap(_name)
