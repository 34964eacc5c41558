"""A plugin: its clients raise, or their process dies, where a run says so.

``FAULTS`` are raised in every run that names this plugin. A process is killed once at
every place that is a line of the file that the variable MASKSL_TEST_KILL names.
"""

from typing import Any

from flwr.app import RecordDict

from masksl import client_app
from masksl.methods.client import Client, Handler
from masksl.methods.split import client as split
from masksl.runtime import messages
from tests.kill import kill_at

FAULTS = {("forward", 1, 1, 1), ("backward", 2, 0, 2), ("evaluate", 2, 0, 0)}
NAMES = {
    "train.forward": "forward",
    "train.backward": "backward",
    "evaluate.forward": "evaluate",
    "query.save": "save",
}


def _wrap(handlers: Any, kind: str) -> None:
    name = NAMES[kind]
    handler: Handler = handlers[kind]

    def faulty(client: Client, content: RecordDict) -> RecordDict:
        plugins = client.run.plugins
        if __name__ not in plugins:
            return handler(client, content)
        place = (0, 0)
        if messages.PLACE in content.config_records:
            at: Any = content.config_records[messages.PLACE]
            place = at["round"], at["step"]
        here = (name, *place, client.number)
        if "tests.plugin_kill" in plugins:
            kill_at(" ".join(map(str, here)))
        elif here in FAULTS:
            raise KeyError(f"no luck in {name}")
        return handler(client, content)

    handlers[kind] = faulty


for _kind in NAMES:
    _wrap(client_app.HANDLERS if _kind == "query.save" else split.HANDLERS, _kind)
