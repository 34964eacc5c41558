"""The server side of split learning, protocol ``parallel``."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import nn

from masksl import model
from masksl.dataset import batches
from masksl.methods import method_config
from masksl.methods.base import ServerMethod, State
from masksl.methods.network import initial_units, spec_of
from masksl.methods.split import SplitConfig
from masksl.methods.split.messages import (
    ACTIVATION,
    BACKWARD,
    ERROR,
    EVALUATE,
    EXACT_GRADIENT,
    FORWARD,
    GRADIENT,
    MEASURE,
    WEIGHT_ERROR,
)
from masksl.methods.split.payloads import Payloads
from masksl.methods.split.server_half import ServerHalf
from masksl.methods.split.sync import HalfSync
from masksl.runtime import messages
from masksl.runtime.clients import EVALUATION, ClientInfo, ClientManager
from masksl.runtime.compressors import EXACT
from masksl.runtime.ledger import Traffic, compression_factor
from masksl.runtime.messages import RunError, ends_run, metrics_of
from masksl.runtime.round import Round
from masksl.settings import RunConfig, Settings, ThreadsConfig, read
from masksl.training.compute import ComputeConfig, resolve_device
from masksl.training.optimizer import OptimizerConfig
from masksl.training.score import Score
from masksl.training.tensors import Tensors, group, grouped

logger = logging.getLogger(__name__)


@dataclass
class _Sums:
    """What a round collects beside the loss."""

    rebuilt: int = 0
    errors: list[float] = field(default_factory=list)
    gradients: dict[str, float] = field(default_factory=dict)


class SplitServer(ServerMethod):
    """Split learning, protocol ``parallel``.

    In a step every participating client sends the activation of its next mini-batch,
    the server half takes one optimiser step on all of them together, and each client
    gets the gradient of its own mean loss. A round is one pass of every participating
    client over its data.

    Parameters
    ----------
    settings : Settings
        Configuration of the run.
    half : ServerHalf
        The half that the server trains.
    sync : HalfSync
        Keeps the client halves together.
    activation_shape : tuple[int, ...]
        Shape of a sample's activation.
    """

    labels: ClassVar[Mapping[str, tuple[str, str]]] = {
        "compression_factor": ("compression factor of activations", ".2f"),
        "bits_per_element": ("bits an activation element", ".3f"),
        "relative_error": ("relative error, last round", ".4f"),
    }

    def __init__(
        self,
        settings: Settings,
        half: ServerHalf,
        sync: HalfSync,
        activation_shape: tuple[int, ...],
    ) -> None:
        config = method_config(settings)
        assert isinstance(config, SplitConfig)
        self.config = config
        self.half = half
        self.sync = sync
        self.run = RunConfig.of(settings)
        self.optimizer = read(OptimizerConfig, settings, "optimizer")
        self.payloads = Payloads(settings, activation_shape, half.device)
        self._sums = _Sums()

    @classmethod
    def build(cls, settings: Settings, clients: ClientManager) -> Self:
        """Build both halves from the seed."""
        del clients
        run = RunConfig.of(settings)
        client, server = model.split(initial_units(settings), _cut(settings))
        device = resolve_device(run.device)
        client.to(device)
        half = ServerHalf(
            server.to(device),
            read(OptimizerConfig, settings, "optimizer"),
            read(ThreadsConfig, settings, "threads").server,
            read(ComputeConfig, settings, "compute"),
        )
        spec = spec_of(settings)
        shape = model.activation_shape(client, spec.channels, spec.size, device)
        return cls(settings, half, HalfSync(settings, client), shape)

    # --- training ---------------------------------------------------------------------

    def train_steps(self, client: ClientInfo) -> int:
        """Return the mini-batches of a client's pass over its data."""
        return len(batches(client.train_samples, self.run.batch_size))

    def test_steps(self, client: ClientInfo) -> int:
        """Return the batches of a client's shard of the test set."""
        return -(-client.test_samples // self.run.eval_batch_size)

    def steps(self, round_: Round) -> int:
        """Begin a round; it has as many steps as its longest client."""
        self._sums = _Sums()
        self.sync.begin()
        return max(map(self.train_steps, round_.clients))

    def run_step(self, round_: Round, step: int) -> float | None:
        """Run one step with the clients that have a mini-batch left."""
        remaining = [c for c in round_.clients if step < self.train_steps(c)]
        clients = round_.active(remaining)
        sent = {c.number: self._request(round_, c, step) for c in clients}
        for client in clients:
            self.sync.attach(round_, client, sent[client.number], step)
        label = self.payloads.compressor
        replies = round_.exchange(FORWARD, sent, step=step, label=label)
        if not step:
            self.sync.compare(round_, replies)
        clients = [c for c in clients if c.number in replies]
        if not clients:
            return None
        gradients, loss = self._train_half(round_, clients, replies, step)
        sizes = {number: len(gradient) for number, gradient in gradients.items()}
        full = {number: {GRADIENT: g.numel()} for number, g in gradients.items()}
        exact = {} if step else dict(gradients)
        if self.config.gradient_positions == "kept":
            for number, gradient in gradients.items():
                reply = replies[number]
                gradients[number] = self.payloads.at_kept(
                    round_, number, gradient, reply, step
                )
        sent = {}
        frames = self.payloads.encode_gradients(round_, gradients, step)
        for client, frame in zip(clients, frames, strict=True):
            sent[client.number] = self._request(round_, client, step)
            sent[client.number][GRADIENT] = frame
        if self.payloads.changes_gradients and exact:
            self._measure(round_, sent, exact)
        del gradients, exact  # as large as all frames of `none` together
        if not math.isfinite(loss):
            raise RunError(f"{round_.place(step)}: loss not finite")
        label = self.payloads.gradient_compressor
        replies = round_.exchange(BACKWARD, sent, step=step, label=label, full=full)
        for number, content in replies.items():
            with ends_run(round_.place(step, number)):
                self._sums.rebuilt += int(messages.metric_of(content, "rebuilt"))
        self.sync.collect(round_, replies, sizes, step)
        return loss

    def finish(self, round_: Round) -> None:
        """Average the halves sent up in a round."""
        self.sync.finish(round_)

    def _request(self, round_: Round, client: ClientInfo, step: int) -> RecordDict:
        """Return a message with its place in the run."""
        place: dict[str, Any] = {
            "round": round_.number,
            "step": step,
            "lr": round_.lr_at(step),
            "last": step == self.train_steps(client) - 1,
        }
        return RecordDict({messages.PLACE: ConfigRecord(place)})

    def _measure(
        self,
        round_: Round,
        sent: Mapping[int, RecordDict],
        exact: Mapping[int, torch.Tensor],
    ) -> None:
        """Have clients measure what the coding of their gradients changes.

        Parameters
        ----------
        round_ : Round
            The current round, in its first step.
        sent : Mapping[int, RecordDict]
            By client, the message with its gradient.
        exact : Mapping[int, torch.Tensor]
            By client, its gradient.
        """
        asked = {}
        for number, content in sent.items():
            with ends_run(round_.place(0, number, GRADIENT)):
                frame = messages.frame_record(EXACT.encode(exact[number]))
            asked[number] = RecordDict({**content, EXACT_GRADIENT: frame})
        try:
            found = round_.manager.query(MEASURE, asked, round_.place(0)).values()
            with ends_run(round_.place(0)):
                for name in (ERROR, WEIGHT_ERROR):
                    errors = [messages.metric_of(content, name) for content in found]
                    self._sums.gradients[name] = sum(errors) / len(errors)
        except RunError as error:  # no reason to end the run
            logger.warning("errors of gradients are not measured: %s", error)

    def _train_half(
        self,
        round_: Round,
        clients: Sequence[ClientInfo],
        replies: Mapping[int, RecordDict],
        step: int,
    ) -> tuple[dict[int, torch.Tensor], float]:
        """Take the server half's step on all replies.

        Return the gradients by client, and the loss.
        """
        activations, labels = [], []
        most = self.run.batch_size + 1  # a tail of one sample joins the batch before it
        contents = {c.number: replies[c.number] for c in clients}
        for activation, own in self.payloads.decode(round_, contents, step, most):
            activations.append(activation)
            labels.append(own)
        for content in contents.values():
            metrics = metrics_of(content)
            if "relative_error" in metrics:
                self._sums.errors.append(metrics["relative_error"])
        seed = round_.seed("dropout.server", step=step)
        with round_.watch("server"):
            loss, gradients = self.half.step(
                activations, labels, lr=round_.lr_at(step), seed=seed
            )
        round_.add_loss(loss, sum(map(len, labels)))
        return dict(zip(contents, gradients, strict=True)), loss

    # --- evaluation -------------------------------------------------------------------

    def evaluate(self, round_: Round) -> Score:
        """Score the test set; each client sends its shard through its half."""
        score = Score()
        every = round_.manager.clients
        self.sync.average_buffers(round_)
        for step in range(max(map(self.test_steps, every))):
            remaining = [c for c in every if step < self.test_steps(c)]
            score += self._evaluate_step(round_, remaining, step)
            if not math.isfinite(score.loss):
                place = f"round {round_.number}, evaluation {step}"
                raise RunError(f"{place}: loss not finite")
        return score

    def _evaluate_step(
        self, round_: Round, clients: Sequence[ClientInfo], step: int
    ) -> Score:
        """Score one batch of test images of each active client."""
        clients = round_.active(clients, EVALUATION)
        sent = {c.number: self._request(round_, c, step) for c in clients}
        for client in clients:
            self.sync.attach(round_, client, sent[client.number], step)
            if not step:
                self.sync.attach_buffers(sent[client.number])
        label = self.payloads.compressor
        replies = round_.exchange(EVALUATE, sent, step=step, label=label)
        score = Score()
        most = self.run.eval_batch_size
        for activation, labels in self.payloads.decode(round_, replies, step, most):
            with round_.watch("server"):
                score += self.half.evaluate(activation, labels)
        return score

    # --- state and results ------------------------------------------------------------

    def state(self) -> State:
        """Return copies of the halves and of what their optimisers remember."""
        tensors, optimizer_state = self.half.state()
        groups = {"server": tensors}
        groups |= {f"server.{name}": own for name, own in optimizer_state.items()}
        groups |= self.sync.state()
        return State(grouped(groups), dict(self.sync.facts()))

    def load(self, state: State) -> None:
        """Restore what `state` returned."""
        names = self.optimizer.states
        optimizer_state = {n: group(state.tensors, f"server.{n}") for n in names}
        self.half.load(group(state.tensors, "server"), optimizer_state)
        self.sync.load(state.tensors, state.facts)

    def client_records(self, client: ClientInfo) -> Mapping[str, ArrayRecord]:
        """Return the shared half for a client that had its current version."""
        return self.sync.client_records(client)

    def metrics(self, round_: Round) -> dict[str, Any]:
        """Return error and compression of activations and gradients, rebuilt graphs."""
        traffic, errors = round_.manager.ledger.round, self._sums.errors
        gradients: dict[str, Any] = dict(self._sums.gradients)
        if gradients:
            sent, dense = traffic.bytes(GRADIENT), traffic.dense(GRADIENT)
            gradients["gradient_bits"] = 32 * sent / dense
        return gradients | {
            "relative_error": sum(errors) / len(errors) if errors else None,
            "compression_factor": compression_factor(
                traffic.dense(ACTIVATION), traffic.bytes(ACTIVATION)
            ),
            "rebuilt_graphs": self._sums.rebuilt,
        }

    def summary(
        self, rows: Sequence[Mapping[str, Any]], traffic: Traffic
    ) -> dict[str, Any]:
        """Return the traffic of activations over the whole run."""
        sent, dense = traffic.bytes(ACTIVATION), traffic.dense(ACTIVATION)
        return {
            "paper_bytes": traffic.bytes(ACTIVATION, "up"),
            "compression_factor": compression_factor(dense, sent),
            "bits_per_element": 32 * sent / dense,
            "relative_error": rows[-1]["relative_error"],
        }


def network_of(tensors: Tensors, settings: Settings) -> nn.Sequential:
    """Return the whole network of a checkpoint.

    Parameters
    ----------
    tensors : dict[str, torch.Tensor]
        Tensors of the checkpoint.
    settings : Settings
        Configuration of its run, with ``client_sync`` step or round.
    """
    units = initial_units(settings)
    halves = model.split(units, _cut(settings))
    for name, half in zip(("model", "server"), halves, strict=True):
        half.load_state_dict(group(tensors, name))
    return nn.Sequential(*units)


def _cut(settings: Settings) -> int:
    """Return the number of units that the client keeps."""
    name, cut = str(settings["model.name"]), settings["cut"]
    return model.resolve_cut(name, cut)  # type: ignore[arg-type]
