"""Kill this process where a file says so; see the fixture `order`."""

import os
import signal
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from masksl.methods.client import Client, ClientMethod, Handler
from masksl.runtime import messages


def kill_at(place: str) -> None:
    """Kill this process, once, if the place is a line of the file of the order."""
    order = Path(os.environ["MASKSL_TEST_KILL"])
    places = order.read_text(encoding="utf-8").splitlines() if order.exists() else []
    if place in places:
        left = [other for other in places if other != place]
        order.write_text("\n".join(left), encoding="utf-8")
        os.kill(os.getpid(), signal.SIGKILL)


def make_mortal(method: ClientMethod) -> None:
    """Let the process of a client die at the lines of the file.

    A line is a message type, a round and a client.
    """

    def wrap(kind: str, handler: Handler) -> Handler:
        def mortal(client: Client, content: RecordDict) -> RecordDict:
            kill_at(f"{kind} {messages.place_of(content)['round']} {client.number}")
            return handler(client, content)

        return mortal

    handlers: Any = method.handlers
    for kind, handler in list(handlers.items()):
        handlers[kind] = wrap(kind, handler)
