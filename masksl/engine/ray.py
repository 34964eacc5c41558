"""Engine `ray`: clients kept by a few Ray actors, the hosts, and called directly.

A host keeps its clients for the whole run: their contexts, their data and their live
graphs never leave its memory. An exchange is one call a host, with the messages of all
its clients, or a few where these are large. Ray is started once in a process and used
by all its runs.
"""

import logging
import math
import os
import signal
import socket
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import ray
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import ServerApp
from ray.exceptions import RayError, RayTaskError

from masksl.engine import EngineError, Shared
from masksl.engine.nodes import (
    CallGrid,
    Nodes,
    identify,
    named,
    node_configs,
    run_ids,
    serve,
)
from masksl.utils import MANY_CLIENTS, trim_heap

PATIENCE = 180.0  # seconds that hosts have to start
KNOCK = 5.0  # seconds that a cluster has to answer
INLINE = 2_000_000  # bytes of a call that travel in it, not through shared memory
PORTION = 16_000_000  # bytes of arrays that a call carries, one message at least
OUT_OF_BAND = 16_384  # bytes from which an array is not pickled with its message

logger = logging.getLogger(__name__)

_started: dict[str, Any] = {}


@dataclass(frozen=True)
class Place:
    """One host: where it is and which nodes it keeps.

    Parameters
    ----------
    nodes : dict[int, dict[str, Any]]
        Node configuration by the id of the node.
    resource : str | None
        Ray node resource that its machine must have.
    """

    nodes: dict[int, dict[str, Any]]
    resource: str | None = None


def places(clients: int, options: Mapping[str, Any]) -> list[Place]:
    """Return the hosts of a run: neighbouring partitions live together.

    Parameters
    ----------
    clients : int
        Number of nodes.
    options : Mapping[str, Any]
        ``hosts``, and ``pin`` or None: entries ``RESOURCE FIRST-LAST [KEY=VALUE ...]``
        give ``hosts`` hosts to these partitions where that Ray resource is, with these
        entries in the configuration of their nodes.
    """
    configs = node_configs(clients)
    if not options["pin"]:
        return _divide(configs, options["hosts"], None)
    found = []
    for entry in options["pin"]:
        resource, span, *pairs = entry.split()
        first, _, last = span.partition("-")
        told = dict(pair.split("=", 1) for pair in pairs)
        nodes = {
            number + 1: configs[number + 1] | told
            for number in range(int(first), int(last or first) + 1)
        }
        found += _divide(nodes, options["hosts"], resource)
    return found


def _divide(
    nodes: Mapping[int, dict[str, Any]], hosts: int, resource: str | None
) -> list[Place]:
    parts = np.array_split(list(nodes), min(hosts, len(nodes)))
    return [Place({int(n): nodes[int(n)] for n in part}, resource) for part in parts]


# --- what crosses ---------------------------------------------------------------------


def portions(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Divide what a host is sent, as a rule into one call.

    Ray keeps what is large in shared memory until the call is answered, and never gives
    that memory back. A record that several messages share weighs once.
    """
    portion: list[Message] = []
    inside: set[int] = set()  # records of the portion
    weight = 0
    for message in messages:
        records = message.content.array_records.values()
        weights = {id(r): sum(len(a.data) for a in r.values()) for r in records}
        more = sum(w for record, w in weights.items() if record not in inside)
        if portion and more and weight + more > PORTION:
            yield portion
            portion, inside, weight, more = [], set(), 0, sum(weights.values())
        portion.append(message)
        inside |= weights.keys()
        weight += more
    if portion:
        yield portion


def pack(contents: Sequence[RecordDict]) -> list[dict[str, Any]]:
    """Return contents of messages as what Ray carries with the fewest copies.

    A record that several contents share is there once. Data from `OUT_OF_BAND` bytes on
    become NumPy arrays, which Ray does not copy into the pickled message.
    """
    seen: dict[int, list[Any]] = {}
    packed = []
    for content in contents:
        records: dict[str, Any] = {}
        for name, record in content.items():
            if isinstance(record, ArrayRecord):
                if id(record) not in seen:
                    seen[id(record)] = _pack_arrays(record)
                records[name] = seen[id(record)]
            else:
                records[name] = record
        packed.append(records)
    return packed


def unpack(packed: Sequence[Mapping[str, Any]]) -> Iterator[RecordDict]:
    """Undo `pack`, one content after another; what was one record is one again."""
    shared = Counter(id(record) for records in packed for record in records.values())
    seen: dict[int, ArrayRecord] = {}
    for records in packed:
        content = RecordDict()
        for name, record in records.items():
            if not isinstance(record, list):
                content[name] = record
            elif shared[id(record)] == 1:
                content[name] = _unpack_arrays(record)
            else:
                if id(record) not in seen:
                    seen[id(record)] = _unpack_arrays(record)
                content[name] = seen[id(record)]
        yield content


def _pack_arrays(record: ArrayRecord) -> list[Any]:
    arrays = []
    for key, array in record.items():
        data: Any = array.data
        if len(data) >= OUT_OF_BAND:
            data = np.frombuffer(data, np.uint8)
        arrays.append((key, array.dtype, array.shape, array.stype, data))
    return arrays


def _unpack_arrays(arrays: list[Any]) -> ArrayRecord:
    record = ArrayRecord()
    for key, dtype, shape, stype, data in arrays:
        whole = data if isinstance(data, bytes) else data.tobytes()
        record[key] = Array(dtype=dtype, shape=shape, stype=stype, data=whole)
    return record


# --- hosts ----------------------------------------------------------------------------


class Host:
    """Some nodes of a run, in a process of their own.

    Parameters
    ----------
    client_app : str
        What every node runs, as ``module:attribute``.
    run_id : int
        Id of the run.
    nodes : dict[int, dict[str, Any]]
        Node configuration by the id of the node.
    gpu_memory : float | None
        Share of a GPU's memory that it may take.
    adopt : str | None
        What takes ``shared``, as ``module:function``.
    shared : Any
        What the processes of the run have in common.
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
            named(adopt)(shared)
        identify(run_id)
        self._nodes = Nodes(named(client_app), run_id, nodes)

    def ready(self) -> int:
        """Return the id of its process, once it is there."""
        return os.getpid()

    def answer(
        self, heads: list[tuple[int, str, str]], packed: list[dict[str, Any]]
    ) -> tuple[list[tuple[int, str] | None], list[dict[str, Any]]]:
        """Answer messages, one after another.

        Parameters
        ----------
        heads : list[tuple[int, str, str]]
            Node, message type and group of every message.
        packed : list[dict[str, Any]]
            Their contents.

        Returns
        -------
        tuple
            For every message None or the code and reason of an error, and the content
            of the reply, empty where there was an error.
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
    """A grid over hosts.

    A host that dies is replaced. What its clients were asked is answered with the error
    ``NODE_UNAVAILABLE``, and they come back with nothing in their state.

    Parameters
    ----------
    client_app : str
        What every node runs, as ``module:attribute``.
    run_id : int
        Id of the run.
    clients : int
        Number of nodes.
    options : Mapping[str, Any]
        See `run`.
    shared : Shared | None
        What the hosts have in common.
    """

    # pylint: disable-next=too-many-arguments,too-many-positional-arguments
    def __init__(
        self,
        client_app: str,
        run_id: int,
        clients: int,
        options: Mapping[str, Any],
        shared: Shared | None,
    ) -> None:
        super().__init__(run_id, clients)
        self._client_app = client_app
        self._options = options
        self._adopt = shared.adopt if shared else None
        self._shared = ray.put(shared.make()) if shared else None
        self._places = places(clients, options)
        self._where = {
            n: i for i, place in enumerate(self._places) for n in place.nodes
        }
        self._hosts = [self._start_host(place) for place in self._places]
        self._wait_for_hosts()

    def pids(self) -> list[int]:
        """Return the process of every host."""
        return ray.get([host.ready.remote() for host in self._hosts])

    def close(self) -> None:
        """End the hosts and let go of what they shared."""
        for host in self._hosts:
            ray.kill(host)
        self._hosts = []
        self._shared = None

    def exchange(
        self, messages: Sequence[Message], timeout: float | None
    ) -> list[Message]:
        """Return the replies, those of the host that is ready first before the others.

        Raises
        ------
        EngineError
            If a host cannot work at all; one that died is replaced.
        """
        groups: dict[int, list[Message]] = {}
        for message in messages:
            index = self._where[message.metadata.dst_node_id]
            groups.setdefault(index, []).append(message)
        waiting = {index: deque(portions(group)) for index, group in groups.items()}
        pending: dict[Any, tuple[int, list[Message]]] = {}
        for index in [*waiting, *waiting]:  # the next one lies there when one is done
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

    def _send(
        self,
        index: int,
        waiting: Mapping[int, deque[list[Message]]],
        pending: dict[Any, tuple[int, list[Message]]],
    ) -> None:
        """Send a host the next of what waits for it."""
        if waiting[index]:
            portion = waiting[index].popleft()
            pending[self._call(index, portion)] = index, portion

    def _start_host(self, place: Place) -> Any:
        pinned = {place.resource: 1e-3} if place.resource else None
        actor = ray.remote(Host).options(  # type: ignore[call-overload]
            num_cpus=self._options["cpus_per_host"],
            num_gpus=self._options["gpus_per_host"],
            resources=pinned,
        )
        return actor.remote(
            self._client_app,
            self._run.run_id,
            place.nodes,
            self._options["gpu_memory_fraction"],
            self._adopt,
            self._shared,
        )

    def _wait_for_hosts(self) -> None:
        calls = [host.ready.remote() for host in self._hosts]
        try:
            ready, _ = ray.wait(calls, num_returns=len(calls), timeout=PATIENCE)
            ray.get(ready)
        except RayError as error:
            raise EngineError(f"a host could not start: {_reason(error)}") from error
        if len(ready) < len(calls):
            wanted = {
                "CPU": self._options["cpus_per_host"],
                "GPU": self._options["gpus_per_host"],
            }
            found = ray.cluster_resources()
            pins = {place.resource for place in self._places if place.resource}
            here = {name: found.get(name, 0) for name in [*wanted, *sorted(pins)]}
            raise EngineError(
                f"engine.hosts={self._options['hosts']}: {len(ready)} of {len(calls)} "
                f"hosts started within {PATIENCE:.0f} s; each asks for {wanted}, and "
                f"Ray has {here}"
            )

    def _call(self, index: int, messages: Sequence[Message]) -> Any:
        """Send messages to their host; return the reference of its answer."""
        heads = [
            (m.metadata.dst_node_id, m.metadata.message_type, m.metadata.group_id)
            for m in messages
        ]
        packed = pack([message.content for message in messages])
        return self._hosts[index].answer.remote(heads, packed)

    def _collect(
        self, index: int, answer: Any, sent: list[Message]
    ) -> list[Message] | None:
        """Return the replies of a host, None if it died instead."""
        try:
            errors, packed = ray.get(answer)
        except RayTaskError as error:
            raise EngineError(f"host {index} failed: {_reason(error)}") from error
        except RayError as error:
            if getattr(error, "actor_init_failed", False):
                message = f"host {index} could not start: {_reason(error)}"
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
        """Start a host anew; return what becomes of the messages to the dead one."""
        place = self._places[index]
        logger.warning("host %d with %d clients died", index, len(place.nodes))
        ray.kill(self._hosts[index])
        self._hosts[index] = self._start_host(place)
        error = Error(ErrorCode.NODE_UNAVAILABLE, f"host {index} died")
        return [Message(error, reply_to=message) for message in sent]


def _reason(error: BaseException) -> str:
    """Return the last line of what Ray says of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


# --- Ray ------------------------------------------------------------------------------


def start(address: str | None, cpus: float) -> None:
    """Start Ray, or join a cluster, unless this process has done so.

    Parameters
    ----------
    address : str | None
        ``auto`` or ``host:port`` of a cluster; None starts Ray on this machine.
    cpus : float
        CPUs that the hosts of the run reserve. A Ray of our own has as many, even
        where the machine has fewer.

    Raises
    ------
    EngineError
        If there is no cluster at the address.
    """
    if ray.is_initialized() and _started:
        if _started["address"] == address and (address or _started["cpus"] >= cpus):
            return
        ray.shutdown()
    elif ray.is_initialized():
        return  # the program around has its own Ray
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ours: dict[str, Any] = {"address": address}
    if address is not None:
        _probe(address)
    else:
        cpus = max(math.ceil(cpus), os.cpu_count() or 1)
        limits = {"max_direct_call_object_size": INLINE}
        ours = {"address": "local", "num_cpus": cpus, "_system_config": limits}
        ours["include_dashboard"] = False
    ended = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(
                **ours,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EngineError(
            f"engine.address={address!r}: no Ray there ({_reason(error)})"
        ) from error
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler raises inside its calls, which can abort the process.
        signal.signal(signal.SIGTERM, ended)
    _started.update(address=address, cpus=cpus)


def stop() -> None:
    """End Ray, or leave the cluster.

    Where the program is killed instead, two agents of Ray's live on for a minute.
    """
    ray.shutdown()
    _started.clear()


def _probe(address: str) -> None:
    """Knock at an address: Ray itself would wait there for minutes."""
    name, _, port = address.rpartition(":")
    if not port.isdecimal():
        return  # auto, or a form that Ray knows
    try:
        socket.create_connection((name, int(port)), KNOCK).close()
    except OSError as error:
        raise EngineError(
            f"engine.address={address!r}: no Ray there ({error})"
        ) from error


def run(
    build: Callable[[], ServerApp],
    client_app: str,
    *,
    clients: int,
    options: Mapping[str, Any],
    shared: Shared | None,
) -> None:
    """Run a ServerApp with so many clients; see `masksl.engine.run`.

    Parameters
    ----------
    options : Mapping[str, Any]
        ``hosts``, ``cpus_per_host``, ``gpus_per_host``: how many processes keep the
        clients, and what Ray reserves for each. ``gpu_memory_fraction``: share of a
        GPU's memory that each may take, or None. ``address``: cluster to join, or None.
        ``pin``: see `places`.
    shared : Shared | None
        What the hosts have in common. Machines of a cluster that have clients pinned to
        them make it themselves.
    """
    hosts = len(places(clients, options))
    start(options["address"], hosts * options["cpus_per_host"])
    run_id = next(run_ids)
    identify(run_id)
    grid = RayGrid(
        client_app, run_id, clients, options, None if options["pin"] else shared
    )
    try:
        serve(build, grid)
    finally:
        grid.close()
