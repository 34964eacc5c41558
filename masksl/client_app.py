"""Flower ClientApp: finds the handler of every message in the method's table."""

from collections.abc import Mapping

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from masksl.engine.superlink.wire import SERVE
from masksl.methods.client import FATAL, Client, Handler
from masksl.runtime import messages


def greet(client: Client, content: RecordDict) -> RecordDict:
    """Answer `query.hello`; see `Client.greet`."""
    return client.greet(content)


def save(client: Client, content: RecordDict) -> RecordDict:
    """Answer `query.save`; see `Client.save`."""
    del content
    return client.save()


HANDLERS: dict[str, Handler] = {messages.HELLO: greet, messages.SAVE: save}
"""Handlers of the messages that every method has."""


class MethodClientApp(ClientApp):
    """A ClientApp whose handlers are those of the method of the run.

    Flower's own ClientApp (1.41) finds handlers by exact message type, registered when
    the module is imported. A message can reach a process that never received the
    settings, so they are read from the state of the client every time.
    """

    def __call__(self, message: Message, context: Context) -> Message:
        """Return the reply; an error that must end the run becomes its content."""
        kind = message.metadata.message_type
        content = message.content
        if kind == SERVE:
            # pylint: disable-next=import-outside-toplevel
            from masksl.engine.superlink.client import serve  # loads gRPC

            return serve(self, message, context)
        if kind == messages.HELLO:  # the client starts anew
            context.state.clear()
            context.state[messages.SETTINGS] = content[messages.SETTINGS]
        client = Client.of(context)
        try:
            reply = _handler(client, kind)(client, content)
        except FATAL as error:
            if client.survives(error):
                raise
            reply = messages.failure(error)
        if messages.METRICS not in reply:
            reply[messages.METRICS] = client.metrics()
        return Message(reply, reply_to=message)


def _handler(client: Client, kind: str) -> Handler:
    own: Mapping[str, Handler] = client.setup.method.handlers
    if kind not in HANDLERS and kind not in own:
        name = client.setup.settings["method.name"]
        raise KeyError(f"method {name} has no handler of {kind}")
    return HANDLERS.get(kind) or own[kind]


app = MethodClientApp()
