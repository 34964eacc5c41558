"""A plugin: the process of a client dies, once, at each line of a file.

A line of the file, which the variable MASKSL_TEST_KILL names, is a message type, a
round and a client.
"""

from typing import Any

from flwr.app import RecordDict

from masksl.methods.client import Client, Handler
from masksl.methods.fedavg.client import CLIENT
from masksl.runtime import messages
from tests.kill import kill_at


def _wrap(handlers: Any, kind: str) -> None:
    handler: Handler = handlers[kind]

    def mortal(client: Client, content: RecordDict) -> RecordDict:
        kill_at(f"{kind} {messages.place_of(content)['round']} {client.number}")
        return handler(client, content)

    handlers[kind] = mortal


for _kind in list(CLIENT.handlers):
    _wrap(CLIENT.handlers, _kind)
