"""What engines of our own share: the nodes of a run, and a grid that sends by calls."""

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """Nodes of one process: a context for each, and the ClientApp that answers.

    Parameters
    ----------
    client_app : ClientApp
        What every node runs.
    run_id : int
        Id of the run.
    configs : Mapping[int, Mapping[str, Any]]
        Node configuration by the id of the node; see `node_configs`.

    Attributes
    ----------
    contexts : dict[int, Context]
        State of every node by its id.
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
        """Return the reply of the node that a message goes to."""
        context = self.contexts[message.metadata.dst_node_id]
        try:
            return self._client_app(message, context)
        except Exception as error:  # pylint: disable=broad-exception-caught
            reason = "".join(format_exception_only(error)).strip()
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            return Message(Error(code, reason), reply_to=message)


class CallGrid(Grid):
    """A grid whose exchanges are calls that return with the replies.

    Parameters
    ----------
    run_id : int
        Id of the run.
    clients : int
        Number of nodes, 1 to ``clients``.
    """

    def __init__(self, run_id: int, clients: int) -> None:
        self._run = Run.create_empty(run_id)
        self._nodes = range(1, clients + 1)
        self._replies: dict[str, Message] = {}
        self._sent = 0

    @abstractmethod
    def exchange(
        self, messages: Sequence[Message], timeout: float | None
    ) -> list[Message]:
        """Return the replies to messages that have their ids.

        Those that do not come within ``timeout`` seconds are left out.
        """

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
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer messages; `pull_messages` gives the replies out."""
        sent = self._identify(messages)
        for reply in self.exchange(sent, None):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in sent]

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
        """Return the replies that come within ``timeout`` seconds."""
        return self.exchange(self._identify(messages), timeout)

    def _identify(self, messages: Iterable[Message]) -> list[Message]:
        """Give messages their ids, as Flower does."""
        sent = list(messages)
        for message in sent:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = str(self._sent)
        return sent


def node_configs(clients: int) -> dict[int, dict[str, Any]]:
    """Return the configuration of every node by its id: partition i is node i + 1."""
    return {
        number + 1: {"partition-id": number, "num-partitions": clients}
        for number in range(clients)
    }


def identify(run_id: int) -> None:
    """Tell this process the run that its messages belong to.

    Outside Flower's runtime nobody else does: it is done here, for every engine.
    """
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    TaskIdentity.task_id = 1


def named(path: str) -> Any:
    """Return what ``module:attribute`` names."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def serve(build: Callable[[], ServerApp], grid: Grid) -> None:
    """Run a ServerApp on a grid to its end."""
    context = Context(
        run_id=grid.run.run_id,
        node_id=0,
        node_config={},
        state=RecordDict(),
        run_config={},
    )
    build()(grid, context)
