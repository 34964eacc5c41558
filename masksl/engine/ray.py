"""Engine `ray`: clients are kept by a few Ray actors, the hosts.

A host keeps its clients for the whole run: their contexts, data and autograd graphs
stay in its memory. An exchange is one call per host with the messages of all its
clients, or a few calls if these are large. Ray is started once in a process and used by
all its runs.
"""

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import ray
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import ServerApp
from ray.exceptions import RayError, RayTaskError

from masksl.engine import EngineError, Shared
from masksl.engine.nodes import (
    CallGrid,
    Nodes,
    import_attribute,
    node_configs,
    run_ids,
    run_server_app,
    set_task_identity,
)
from masksl.engine.options import RayOptions
from masksl.engine.packing import pack, portions, unpack
from masksl.engine.ray_session import error_line, start
from masksl.utils import MANY_CLIENTS, trim_heap

START_TIMEOUT = 180.0  # seconds for the hosts to start

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HostSpec:
    """Placement of one host.

    Parameters
    ----------
    nodes : dict[int, dict[str, Any]]
        Node configuration by node id.
    resource : str | None
        Ray resource that the machine of the host must have.
    """

    nodes: dict[int, dict[str, Any]]
    resource: str | None = None


def host_specs(clients: int, options: RayOptions) -> list[HostSpec]:
    """Return the hosts of a run; each keeps neighbouring partitions.

    Parameters
    ----------
    clients : int
        Number of nodes.
    options : RayOptions
        Without pins there are ``hosts`` hosts, or one per client if these are fewer.
        With pins each pin gets that many hosts for its partitions.
    """
    configs = node_configs(clients)
    if not options.pin:
        return _divide(configs, options.hosts, None)
    specs = []
    for pin in options.pins:
        nodes = {
            number + 1: configs[number + 1] | pin.node_config
            for number in pin.partitions
        }
        specs += _divide(nodes, options.hosts, pin.resource)
    return specs


def _divide(
    nodes: Mapping[int, dict[str, Any]], hosts: int, resource: str | None
) -> list[HostSpec]:
    parts = np.array_split(list(nodes), min(hosts, len(nodes)))
    return [HostSpec({int(n): nodes[int(n)] for n in part}, resource) for part in parts]


# --- hosts ----------------------------------------------------------------------------


class Host:
    """A Ray actor that keeps some nodes of a run.

    Parameters
    ----------
    client_app : str
        The ClientApp of every node, as ``module:attribute``.
    run_id : int
        Id of the run.
    nodes : dict[int, dict[str, Any]]
        Node configuration by node id.
    gpu_memory : float | None
        Share of a GPU's memory that the process may use; None for no limit.
    adopt : str | None
        Function that receives ``shared``, as ``module:function``.
    shared : Any
        The object that all hosts of the run share.
    """

    # pylint: disable-next=too-many-arguments,too-many-positional-arguments
    def __init__(
        self,
        client_app: str,
        run_id: int,
        nodes: dict[int, dict[str, Any]],
        gpu_memory: float | None,
        adopt: str | None,
        shared: Any,
    ) -> None:
        if gpu_memory is not None:
            _limit_gpu_memory(gpu_memory)
        if adopt is not None:
            import_attribute(adopt)(shared)
        set_task_identity(run_id)
        self._nodes = Nodes(import_attribute(client_app), run_id, nodes)

    def ready(self) -> int:
        """Return the process id; Ray answers only after the actor has started."""
        return os.getpid()

    def answer(
        self, heads: list[tuple[int, str, str]], packed: list[dict[str, Any]]
    ) -> tuple[list[tuple[int, str] | None], list[dict[str, Any]]]:
        """Answer messages, one after another.

        Parameters
        ----------
        heads : list[tuple[int, str, str]]
            Node id, message type and group id of every message.
        packed : list[dict[str, Any]]
            Their contents; see `masksl.engine.packing.pack`.

        Returns
        -------
        tuple
            For every message None or the code and reason of an error. The packed
            contents of the replies; empty for an error.
        """
        errors: list[tuple[int, str] | None] = []
        contents = []
        for (node, kind, group), content in zip(heads, unpack(packed), strict=True):
            message = Message(content, node, kind, group_id=group)
            reply = self._nodes.answer(message)
            if reply.has_error():
                errors.append((reply.error.code, reply.error.reason or ""))
                contents.append(RecordDict())
            else:
                errors.append(None)
                contents.append(reply.content)
        if len(heads) > MANY_CLIENTS:
            trim_heap()
        return errors, pack(contents)


def _limit_gpu_memory(share: float) -> None:
    import torch  # pylint: disable=import-outside-toplevel

    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)


class RayGrid(CallGrid):
    """A grid whose nodes are kept by hosts.

    A host that dies is replaced. Messages to the dead host are answered with the error
    ``NODE_UNAVAILABLE``, and its clients start again with an empty state.

    Parameters
    ----------
    client_app : str
        The ClientApp of every node, as ``module:attribute``.
    run_id : int
        Id of the run.
    clients : int
        Number of nodes.
    options : RayOptions
        Options of the engine.
    shared : Shared | None
        The object that all hosts share.
    """

    # pylint: disable-next=too-many-arguments,too-many-positional-arguments
    def __init__(
        self,
        client_app: str,
        run_id: int,
        clients: int,
        options: RayOptions,
        shared: Shared | None,
    ) -> None:
        super().__init__(run_id, clients)
        self._client_app = client_app
        self._options = options
        self._adopt = shared.adopt if shared else None
        self._shared = ray.put(shared.make()) if shared else None
        self._specs = host_specs(clients, options)
        self._host_of = {n: i for i, spec in enumerate(self._specs) for n in spec.nodes}
        self._hosts = [self._start_host(spec) for spec in self._specs]
        self._wait_for_hosts()

    def pids(self) -> list[int]:
        """Return the process id of every host."""
        return ray.get([host.ready.remote() for host in self._hosts])

    def close(self) -> None:
        """Kill the hosts and release the object that they shared."""
        for host in self._hosts:
            ray.kill(host)
        self._hosts = []
        self._shared = None

    def exchange(
        self, messages: Sequence[Message], timeout: float | None
    ) -> list[Message]:
        """Send messages and return the replies in the order in which hosts finish.

        Raises
        ------
        EngineError
            If a host cannot start or fails; a host that dies is replaced.
        """
        waiting = self._calls(messages)
        pending: dict[Any, tuple[int, list[Message]]] = {}
        for index in [*waiting, *waiting]:  # keep two calls in flight per host
            self._send(index, waiting, pending)
        end = math.inf if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while pending:
            left = None if timeout is None else max(0.0, end - time.monotonic())
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=left)
            if not ready:
                break
            index, sent = pending.pop(ready[0])
            answered = self._collect(index, ready[0], sent)
            if answered is None:
                unsent = list(chain.from_iterable(waiting.pop(index)))
                lost = [answer for answer, (i, _) in pending.items() if i == index]
                unanswered = [pending.pop(answer)[1] for answer in lost]
                replies += self._replace(index, [*sent, *chain(*unanswered), *unsent])
            else:
                replies += answered
                self._send(index, waiting, pending)
        return replies

    def _calls(self, messages: Sequence[Message]) -> dict[int, deque[list[Message]]]:
        """Return the messages of every call by the index of the host."""
        groups: dict[int, list[Message]] = {}
        for message in messages:
            index = self._host_of[message.metadata.dst_node_id]
            groups.setdefault(index, []).append(message)
        # Portions, because Ray never frees the shared memory that its calls have used.
        return {index: deque(portions(group)) for index, group in groups.items()}

    def _send(
        self,
        index: int,
        waiting: Mapping[int, deque[list[Message]]],
        pending: dict[Any, tuple[int, list[Message]]],
    ) -> None:
        """Send the next waiting call of a host, if there is one."""
        if not waiting[index]:
            return
        messages = waiting[index].popleft()
        heads = [
            (m.metadata.dst_node_id, m.metadata.message_type, m.metadata.group_id)
            for m in messages
        ]
        packed = pack([message.content for message in messages])
        answer = self._hosts[index].answer.remote(heads, packed)
        pending[answer] = index, messages

    def _start_host(self, spec: HostSpec) -> Any:
        """Start a host; return its actor handle at once."""
        resources = {spec.resource: 1e-3} if spec.resource else None
        actor = ray.remote(Host).options(  # type: ignore[call-overload]
            num_cpus=self._options.cpus_per_host,
            num_gpus=self._options.gpus_per_host,
            resources=resources,
        )
        return actor.remote(
            self._client_app,
            self._run.run_id,
            spec.nodes,
            self._options.gpu_memory_fraction,
            self._adopt,
            self._shared,
        )

    def _wait_for_hosts(self) -> None:
        """Wait until all hosts have started; otherwise raise `EngineError`."""
        calls = [host.ready.remote() for host in self._hosts]
        try:
            ready, _ = ray.wait(calls, num_returns=len(calls), timeout=START_TIMEOUT)
            ray.get(ready)
        except RayError as error:
            raise EngineError(f"a host could not start: {error_line(error)}") from error
        if len(ready) < len(calls):
            wanted = {
                "CPU": self._options.cpus_per_host,
                "GPU": self._options.gpus_per_host,
            }
            resources = ray.cluster_resources()
            pinned = {spec.resource for spec in self._specs if spec.resource}
            present = {n: resources.get(n, 0) for n in [*wanted, *sorted(pinned)]}
            raise EngineError(
                f"engine.hosts={self._options.hosts}: {len(ready)} of {len(calls)} "
                f"hosts started within {START_TIMEOUT:.0f} s; each asks for {wanted}, "
                f"and Ray has {present}"
            )

    def _collect(
        self, index: int, answer: Any, sent: list[Message]
    ) -> list[Message] | None:
        """Return the replies of a call, or None if the host died."""
        try:
            errors, packed = ray.get(answer)
        except RayTaskError as error:
            raise EngineError(f"host {index} failed: {error_line(error)}") from error
        except RayError as error:
            if getattr(error, "actor_init_failed", False):
                message = f"host {index} could not start: {error_line(error)}"
                raise EngineError(message) from error
            return None
        return [
            (
                Message(content, reply_to=message)
                if failed is None
                else Message(Error(*failed), reply_to=message)
            )
            for message, failed, content in zip(
                sent, errors, unpack(packed), strict=True
            )
        ]

    def _replace(self, index: int, sent: list[Message]) -> list[Message]:
        """Replace a dead host; return error replies to the messages sent to it."""
        spec = self._specs[index]
        logger.warning("host %d with %d clients died", index, len(spec.nodes))
        ray.kill(self._hosts[index])
        self._hosts[index] = self._start_host(spec)
        error = Error(ErrorCode.NODE_UNAVAILABLE, f"host {index} died")
        return [Message(error, reply_to=message) for message in sent]


def run(
    build: Callable[[], ServerApp],
    client_app: str,
    *,
    clients: int,
    options: RayOptions,
    shared: Shared | None,
) -> None:
    """Run a ServerApp with a number of clients; see `masksl.engine.run`.

    Parameters
    ----------
    options : RayOptions
        Number, resources and placement of the hosts.
    shared : Shared | None
        The object that all hosts share. Ignored with pins: the machines with pinned
        clients make it themselves.
    """
    hosts = len(host_specs(clients, options))
    start(options.address, hosts * options.cpus_per_host)
    run_id = next(run_ids)
    set_task_identity(run_id)
    grid = RayGrid(
        client_app, run_id, clients, options, None if options.pin else shared
    )
    try:
        run_server_app(build, grid)
    finally:
        grid.close()
