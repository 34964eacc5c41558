"""A plugin: the process of a client dies, once, at each line of a file.

A line of the file, which the variable MASKSL_TEST_KILL names, is a message type, a
round and a client.
"""

import os
import signal
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from masksl.methods.client import Client, Handler
from masksl.methods.fedavg.client import CLIENT
from masksl.runtime import messages


def _wrap(handlers: Any, kind: str) -> None:
    handler: Handler = handlers[kind]

    def mortal(client: Client, content: RecordDict) -> RecordDict:
        here = f"{kind} {messages.place_of(content)['round']} {client.number}"
        order = Path(os.environ.get("MASKSL_TEST_KILL", "none"))
        places = (
            order.read_text(encoding="utf-8").splitlines() if order.exists() else []
        )
        if here in places:
            order.write_text("\n".join(p for p in places if p != here), "utf-8")
            os.kill(os.getpid(), signal.SIGKILL)
        return handler(client, content)

    handlers[kind] = mortal


for _kind in list(CLIENT.handlers):
    _wrap(CLIENT.handlers, _kind)
