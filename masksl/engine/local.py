"""Engine `local`: the ServerApp and every client in this process, one after another."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from traceback import format_exception_only
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_run_ids = itertools.count(1)


class LocalGrid(Grid):
    """A grid that answers at once, by calling the ClientApp.

    Parameters
    ----------
    client_app : ClientApp
        What every client runs.
    clients : int
        Number of nodes.
    run_id : int
        Id of the run.

    Attributes
    ----------
    contexts : dict[int, Context]
        State of every client by its node.
    """

    def __init__(self, client_app: ClientApp, clients: int, run_id: int) -> None:
        self._client_app = client_app
        self._run = Run.create_empty(run_id)
        self.contexts = {
            number
            + 1: Context(
                run_id=run_id,
                node_id=number + 1,
                node_config={"partition-id": number, "num-partitions": clients},
                state=RecordDict(),
                run_config={},
            )
            for number in range(clients)
        }
        self._replies: dict[str, Message] = {}
        self._sent = 0

    def set_run(self, run: Run) -> None:  # pylint: disable=redefined-outer-name
        """Take the run that messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    # pylint: disable-next=too-many-arguments,too-many-positional-arguments
    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes, by partition."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer messages; `pull_messages` gives the replies out."""
        ids = []
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = str(self._sent)  # as Flower does
            self._replies[str(self._sent)] = self._answer(message)
            ids.append(str(self._sent))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages, once each."""
        return [
            self._replies.pop(message_id)
            for message_id in message_ids
            if message_id in self._replies
        ]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Answer messages; no waiting, so no time-out."""
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        context = self.contexts[message.metadata.dst_node_id]
        try:
            return self._client_app(message, context)
        except Exception as error:  # pylint: disable=broad-exception-caught
            reason = "".join(format_exception_only(error)).strip()
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            return Message(Error(code, reason), reply_to=message)


def open_grid(client_app: ClientApp, clients: int) -> LocalGrid:
    """Return a grid for a new run of this process.

    Outside Flower's runtime nobody else tells messages whose they are: it is done here.
    """
    run_id = next(_run_ids)
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    TaskIdentity.task_id = 1
    return LocalGrid(client_app, clients, run_id)


def run(
    build: Callable[[], ServerApp],
    client_app: str,
    *,
    clients: int,
    options: Mapping[str, Any],
) -> None:
    """Run a ServerApp with so many clients; see `masksl.engine.run`.

    There are no options.
    """
    del options
    module, _, attribute = client_app.partition(":")
    grid = open_grid(getattr(import_module(module), attribute), clients)
    context = Context(
        run_id=grid.run.run_id,
        node_id=0,
        node_config={},
        state=RecordDict(),
        run_config={},
    )
    build()(grid, context)
