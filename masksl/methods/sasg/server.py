"""The server side of SASG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import nn

from masksl.compress import FrameError
from masksl.dataset import batches
from masksl.methods import method_config
from masksl.methods.base import ServerMethod, State
from masksl.methods.evaluation import score_test_set
from masksl.methods.network import initial_units
from masksl.methods.sasg import SasgConfig
from masksl.methods.sasg.client import (
    FLAT,
    REFERENCE,
    SKIPS,
    VECTORS,
    WEIGHTS,
)
from masksl.methods.sasg.messages import (
    BUFFER,
    BUFFERS,
    SENDERS,
    THRESHOLD,
    TRAIN,
    UPDATE,
    has_skipped,
    relay_record,
    senders_record,
    threshold_record,
)
from masksl.methods.sasg.selection import NONZERO
from masksl.methods.sasg.vectors import Layout, join
from masksl.methods.sasg.weights import Past, Weights
from masksl.methods.sasg.workers import Workers
from masksl.runtime import messages
from masksl.runtime.clients import UNKNOWN, ClientInfo, ClientManager
from masksl.runtime.compressors import EXACT, compressor_of
from masksl.runtime.ledger import DOWN, UP, Traffic
from masksl.runtime.messages import RunError, ends_run
from masksl.runtime.round import Round
from masksl.settings import RunConfig, Settings
from masksl.training.compute import resolve_device
from masksl.training.score import Score
from masksl.training.tensors import (
    Tensors,
    average,
    copies,
    digest,
    group,
    grouped,
    tensors_of,
)


@dataclass
class _Counts:
    """Uploads of a round, skips, and values of all uploads."""

    uploads: int = 0
    skips: int = 0
    values: int = 0


class SasgServer(ServerMethod):
    """SASG (arXiv 2112.04088), LASG (arXiv 2002.11360), sparse SGD, and SGD.

    A step is an iteration. Every worker computes a gradient on a mini-batch; w moves by
    the sum of the last uploads of all workers, new or not.

    Parameters
    ----------
    settings : Settings
        Configuration of the run.
    module : nn.Module
        The network with its initial weights, on the device of the server.
    """

    labels: ClassVar[Mapping[str, tuple[str, str]]] = {
        "uploads": ("uploads", ",d"),
        "skips": ("skipped uploads", ",d"),
    }

    def __init__(self, settings: Settings, module: nn.Module) -> None:
        config = method_config(settings)
        assert isinstance(config, SasgConfig)
        self.config = config
        self.run = RunConfig.of(settings)
        self.module = module
        self.layout = Layout.of(module)
        tensors = tensors_of(module)
        flat = self.layout.flat(tensors)
        self.weights = Weights(flat, flat)
        self.workers = Workers.of(self.run.clients)
        self.counts = _Counts()
        shapes = self.layout.shapes
        self.buffers = {
            n: copy for n, copy in copies(tensors).items() if n not in shapes
        }
        chosen = compressor_of(settings, "compressor")
        self.compressor = chosen if config.is_sparse else EXACT
        self._label = f"compressor {self.compressor.name}"
        self._settings = settings
        self._encoded: tuple[int, ArrayRecord] | None = None

    @classmethod
    def build(cls, settings: Settings, clients: ClientManager) -> Self:
        """Build the network from the seed."""
        del clients
        device = resolve_device(RunConfig.of(settings).device)
        return cls(settings, nn.Sequential(*initial_units(settings)).to(device))

    # --- training ---------------------------------------------------------------------

    def steps(self, round_: Round) -> int:
        """Return the mini-batches of the client that has most.

        Clients with fewer begin a further pass, so that all take part in every step.
        """
        self.counts = _Counts()
        size = self.run.batch_size
        return max(len(batches(c.train_samples, size)) for c in round_.clients)

    def run_step(self, round_: Round, step: int) -> float | None:
        """Have every worker compute a gradient, and move w by all last uploads."""
        lr, threshold = round_.lr_at(step), self._threshold(round_, step)
        sent = {}
        for client in round_.clients:
            place: dict[str, Any] = {"round": round_.number, "step": step, "lr": lr}
            content = RecordDict({messages.PLACE: ConfigRecord(place)})
            with ends_run(round_.place(step, client.number, "w")):
                with round_.watch("codec"):
                    self._attach(content, client)
            if threshold is not None:
                content[THRESHOLD] = threshold_record(threshold)
            sent[client.number] = content
        replies = round_.exchange(TRAIN, sent, step=step, label=self._label)
        self._need_all(round_, replies, step)
        if not step:
            self._compare(round_, replies)
        self.workers.fresh = []
        for number, content in replies.items():
            with ends_run(round_.place(step, number, self._label)):
                with round_.watch("codec"):
                    self._take(number, content, threshold)
        loss = round_.add_losses(replies, step)
        with round_.watch("server"):
            self._move(round_, step, lr)
        return loss

    def _need_all(
        self, round_: Round, replies: Mapping[int, RecordDict], step: int
    ) -> None:
        """End the run if a worker failed."""
        if len(replies) < len(self.workers):
            raise RunError(
                f"{round_.place(step)}: method=sasg needs every worker; "
                f"{round_.last_failure}"
            )

    def _threshold(self, round_: Round, step: int) -> float | None:
        """Return the threshold of an iteration, None while everybody uploads."""
        config = self.config
        if not config.rule or self.weights.version < config.delay:
            return None
        if config.threshold_lag == "step":
            total = sum(past.square / past.rate for past in self.weights.history)
            return config.constant / self.run.clients**2 * total
        total = sum(past.square for past in self.weights.history)
        rate = _rate_before(round_, step, config.threshold_lag)
        return config.constant / (rate * self.run.clients**2) * total

    def _take(self, number: int, content: RecordDict, threshold: float | None) -> None:
        """Take what a worker replied: an upload, or word that it skips."""
        worker = self.workers[number]
        if has_skipped(content):
            if threshold is None or worker.skips > self.config.delay:
                raise FrameError("skip that is not allowed")
            worker.skips += 1
            self.counts.skips += 1
            return
        data = messages.set_of(content, UPDATE)
        worker.vector = self.layout.decode_vector(data, self.compressor)
        worker.data = data
        worker.since = self.weights.version
        worker.skips = int(threshold is not None)
        self.workers.fresh.append(number)
        self.counts.uploads += 1
        self.counts.values += len(worker.vector.values)

    def _compare(self, round_: Round, replies: Mapping[int, RecordDict]) -> None:
        """Compare the workers' w with the server's; one that differs gets it in full.

        Processors may differ in what both sides compute from the seed.
        """
        own = digest([self.weights.flat])
        for number, content in replies.items():
            with ends_run(round_.place(0, number, "digest")):
                if messages.digest_of(content) != own:
                    round_.manager.clients[number].version = UNKNOWN

    def _move(self, round_: Round, step: int, lr: float) -> None:
        """Subtract the sum of all last uploads from w."""
        if self.config.rule:
            self.weights.refer({worker.since for worker in self.workers})
        total = self.workers.total(self.layout)
        if not self.weights.subtract(total, lr, self.config.history):
            raise RunError(f"{round_.place(step)}: the step of w is not finite")

    # --- what comes down --------------------------------------------------------------

    def _attach(self, content: RecordDict, client: ClientInfo) -> None:
        """Add to a message what its client needs to have the current w."""
        if client.version == self.weights.version:
            return
        way = self.config.way_down
        if client.version == UNKNOWN and way != "dense":
            dense = 4 * self.layout.elements
            data = self.layout.encode(self.weights.flat, EXACT, seed=0)
            content[messages.MODEL] = messages.set_record(data, dense)
        if way == "relay":
            frames = self.workers.fresh_but(client.number)
            content[SENDERS] = senders_record(list(frames), len(self.workers))
            if frames:
                content[UPDATE] = relay_record(frames, 4 * self.layout.elements)
        else:
            content[messages.MODEL if way == "dense" else UPDATE] = self._record()
        client.version = self.weights.version

    def _record(self) -> ArrayRecord:
        """Encode w, or the sum by which it came about, once a version."""
        if self._encoded is None or self._encoded[0] != self.weights.version:
            dense = 4 * self.layout.elements
            if self.config.way_down == "dense":
                data = self.layout.encode(self.weights.flat, EXACT, seed=0)
            else:
                total = self.workers.total(self.layout)
                data = self.layout.encode(total, NONZERO, seed=0)
            self._encoded = self.weights.version, messages.set_record(data, dense)
        return self._encoded[1]

    # --- evaluation -------------------------------------------------------------------

    def evaluate(self, round_: Round) -> Score:
        """Score w on the whole test set, here; the workers send their buffers."""
        if self.buffers:
            self._collect_buffers(round_)
        tensors = self.layout.named(self.weights.flat) | self.buffers
        total = score_test_set(round_, self._settings, self.module, tensors)
        if not math.isfinite(total.loss):
            raise RunError(f"round {round_.number}, evaluation: loss not finite")
        return total

    def _collect_buffers(self, round_: Round) -> None:
        """Average the buffers of all workers."""
        place = ConfigRecord({"round": round_.number, "step": 0})
        every = round_.manager.clients
        sent = {c.number: RecordDict({messages.PLACE: place}) for c in every}
        replies = round_.exchange(BUFFERS, sent, step=0, label=BUFFER)
        self._need_all(round_, replies, 0)
        received = []
        for number, content in replies.items():
            with ends_run(round_.place(0, number, BUFFER)), round_.watch("codec"):
                own = messages.model_of(content, self.buffers, BUFFER)
                if own is None:
                    raise FrameError(f"message without {BUFFER}")
                received.append(own)
        self.buffers = average(received, [1] * len(received), torch.float64)

    # --- state and results ------------------------------------------------------------

    def state(self) -> State:
        """Return w, what workers refer to, and their last uploads."""
        uploads, workers = self.workers.state()
        groups = {
            "model": copies(self.layout.named(self.weights.flat) | self.buffers),
            "previous": {FLAT: self.weights.previous.clone()},
            REFERENCE: {
                str(v): flat.clone() for v, flat in self.weights.references.items()
            },
            UPDATE: uploads,
        }
        facts = {
            "version": self.weights.version,
            "fresh": list(self.workers.fresh),
            "history": [list(past) for past in self.weights.history],
            "workers": [list(own) for own in workers],
        }
        return State(grouped(groups), facts)

    def load(self, state: State) -> None:
        """Restore what `state` returned."""
        tensors, facts, device = state.tensors, state.facts, self.layout.device
        model = {n: t.to(device, copy=True) for n, t in group(tensors, "model").items()}
        references = group(tensors, REFERENCE).items()
        self.weights = Weights(
            self.layout.flat(model),
            group(tensors, "previous")[FLAT].to(device, copy=True),
            facts["version"],
            [Past(*past) for past in facts["history"]],
            {int(v): t.to(device, copy=True) for v, t in references},
        )
        self.buffers = {name: model[name] for name in self.buffers}
        uploads, own = group(tensors, UPDATE), (self.layout, self.compressor)
        self.workers = Workers.restored(uploads, facts["workers"], facts["fresh"], *own)
        self._encoded = None

    def client_records(self, client: ClientInfo) -> Mapping[str, ArrayRecord]:
        """Return what the server knows of the state of a worker.

        Its w is that of the iteration before: what came about since comes with the next
        message, as it does for a worker that was not disturbed.
        """
        if not self.weights.version:
            return {}
        worker, way = self.workers[client.number], self.config.way_down
        groups: dict[str, Tensors] = {}
        if client.version == self.weights.version:
            groups[WEIGHTS] = {FLAT: self.weights.flat}
        elif way != "dense":
            groups[WEIGHTS] = {FLAT: self.weights.previous}
        if self.config.rule:
            groups[REFERENCE] = {FLAT: self.weights.references[worker.since]}
            groups[SKIPS] = {"number": torch.tensor(worker.skips)}
        if way == "relay":
            groups[VECTORS] = join(self.workers.vectors)
        return {
            messages.STATE + name: messages.state_record(tensors)
            for name, tensors in groups.items()
        }

    def progress(self, round_: Round) -> dict[str, Any]:
        """Return uploads, their values, and bytes of the round so far."""
        traffic = round_.manager.ledger.round
        ways = {f"bytes_{way}": traffic.bytes(direction=way) for way in (UP, DOWN)}
        return self._counted() | ways

    def metrics(self, round_: Round) -> dict[str, Any]:
        """Return uploads, their values, and skips of the round."""
        del round_
        return self._counted() | {"skips": self.counts.skips}

    def _counted(self) -> dict[str, Any]:
        return {"uploads": self.counts.uploads, "values": self.counts.values}

    def summary(
        self, rows: Sequence[Mapping[str, Any]], traffic: Traffic
    ) -> dict[str, Any]:
        """Return the same of the whole run, and the elements of the network."""
        del traffic
        keys = ("uploads", "skips", "values")
        sums = {key: sum(row[key] for row in rows) for key in keys}
        return sums | {"elements": self.layout.elements}


def _rate_before(round_: Round, step: int, lag: float) -> float:
    """Return the learning rate so many rounds before a step, not before the first."""
    steps = max(1, round_.steps)
    place = max(0, (round_.number - 1) * steps + step - round(lag * steps))
    done, number = divmod(place, steps)
    return replace(round_.rates, round=done + 1).at(number, steps)
