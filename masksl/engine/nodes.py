"""Nodes of a run and the base of our grids, shared by the engines of this package."""

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from traceback import format_exception_only
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

run_ids = itertools.count(1)
"""Ids of the runs of this process."""


class Nodes:
    """The nodes of one process: a context for each, and one ClientApp for all.

    Parameters
    ----------
    client_app : ClientApp
        The ClientApp of every node.
    run_id : int
        Id of the run.
    configs : Mapping[int, Mapping[str, Any]]
        Node configuration by node id; see `node_configs`.

    Attributes
    ----------
    contexts : dict[int, Context]
        Context by node id.
    """

    def __init__(
        self,
        client_app: ClientApp,
        run_id: int,
        configs: Mapping[int, Mapping[str, Any]],
    ) -> None:
        self._client_app = client_app
        self.contexts = {
            node: Context(
                run_id=run_id,
                node_id=node,
                node_config=dict(config),
                state=RecordDict(),
                run_config={},
            )
            for node, config in configs.items()
        }

    def answer(self, message: Message) -> Message:
        """Call the ClientApp for the node of a message; see `answer`."""
        context = self.contexts[message.metadata.dst_node_id]
        return answer(self._client_app, message, context)


def answer(
    client_app: Callable[[Message, Context], Message],
    message: Message,
    context: Context,
) -> Message:
    """Call a ClientApp and return its reply.

    An exception becomes an error reply, as in Flower.
    """
    try:
        return client_app(message, context)
    except Exception as error:  # pylint: disable=broad-exception-caught
        reason = "".join(format_exception_only(error)).strip()
        code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        return Message(Error(code, reason), reply_to=message)


class CallGrid(Grid):
    """A grid whose exchange is one blocking call.

    Parameters
    ----------
    run_id : int
        Id of the run.
    clients : int
        Number of nodes; their ids are 1 to ``clients``.
    """

    def __init__(self, run_id: int, clients: int) -> None:
        self._run = Run.create_empty(run_id)
        self._nodes = range(1, clients + 1)
        self._replies: dict[str, Message] = {}
        self._numbers = itertools.count(1)

    @abstractmethod
    def exchange(
        self, messages: Sequence[Message], timeout: float | None
    ) -> list[Message]:
        """Send messages and return the replies in any order.

        Parameters
        ----------
        messages : Sequence[Message]
            Messages with their ids.
        timeout : float | None
            Seconds after which missing replies are left out; None waits for all.
        """

    def set_run(self, run: Run) -> None:  # pylint: disable=redefined-outer-name
        """Set the run of the messages."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run of the messages."""
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
        """Return the node ids in the order of the partitions."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, keep the replies for `pull_messages`, return the ids."""
        sent = with_ids(messages, self._numbers)
        for reply in self.exchange(sent, None):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages; each reply is returned once."""
        return [
            self._replies.pop(message_id)
            for message_id in message_ids
            if message_id in self._replies
        ]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and return the replies received within ``timeout`` seconds."""
        return self.exchange(with_ids(messages, self._numbers), timeout)


def with_ids(messages: Iterable[Message], numbers: Iterator[int]) -> list[Message]:
    """Give messages the ids that replies refer to.

    Flower 1.41 has no setter for the id: its own grids write this private entry too
    (``flwr/superlink/grid/inmemory_grid.py``).
    """
    sent = list(messages)
    for message in sent:
        message.metadata.__dict__["_message_id"] = str(next(numbers))
    return sent


def node_configs(clients: int) -> dict[int, dict[str, Any]]:
    """Return the node configuration by node id; partition i is node i + 1."""
    return {
        number + 1: {"partition-id": number, "num-partitions": clients}
        for number in range(clients)
    }


def set_task_identity(run_id: int) -> None:
    """Set the run id that Flower stamps on messages.

    In Flower 1.41 ``Message(...)`` raises an error in a process without a
    `TaskIdentity`. Flower's runtime normally sets it; our engines must do it
    themselves.
    """
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    TaskIdentity.task_id = 1


def import_attribute(path: str) -> Any:
    """Import a module and return its attribute; the path is ``module:attribute``."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def run_server_app(build: Callable[[], ServerApp], grid: Grid) -> None:
    """Build a ServerApp and run it on a grid until it returns."""
    context = Context(
        run_id=grid.run.run_id,
        node_id=0,
        node_config={},
        state=RecordDict(),
        run_config={},
    )
    build()(grid, context)
