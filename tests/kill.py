"""Kill this process where a file says so; see the fixture `order`."""

import os
import signal
from collections.abc import Callable
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


def make_mortal(method: ClientMethod, happens: Callable[[str], None] = kill_at) -> None:
    """Let something happen before a client answers: by default its process dies.

    It is called with the place: a message type, a round and a client.
    """

    def wrap(kind: str, handler: Handler) -> Handler:
        def mortal(client: Client, content: RecordDict) -> RecordDict:
            happens(f"{kind} {messages.place_of(content)['round']} {client.number}")
            return handler(client, content)

        return mortal

    handlers: Any = method.handlers
    for kind, handler in list(handlers.items()):
        handlers[kind] = wrap(kind, handler)
