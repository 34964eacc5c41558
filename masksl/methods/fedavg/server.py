"""The server side of federated averaging."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import nn

from masksl.compress import decode_set
from masksl.methods import method_config
from masksl.methods.base import ServerMethod, State
from masksl.methods.evaluation import score_test_set
from masksl.methods.fedavg import FedAvgConfig
from masksl.methods.fedavg.messages import EVALUATE, TRAIN, UPDATE, score_of
from masksl.methods.global_model import GlobalModel
from masksl.methods.network import initial_units
from masksl.runtime import messages
from masksl.runtime.clients import EVALUATION, ClientInfo, ClientManager
from masksl.runtime.compressors import EXACT, compressor_of
from masksl.runtime.ledger import Traffic, compression_factor
from masksl.runtime.messages import RunError, ends_run
from masksl.runtime.round import Round
from masksl.settings import RunConfig, Settings
from masksl.training.compute import resolve_device
from masksl.training.score import Score
from masksl.training.tensors import Tensors, all_finite, average, grouped, tensors_of


class FedAvgServer(ServerMethod):
    """Federated averaging (McMahan et al., 2017, algorithm 1).

    In a round, which is one step, every participating client trains the whole network
    on its data and sends it up; the server averages by samples.

    Parameters
    ----------
    settings : Settings
        Configuration of the run.
    module : nn.Module
        The network with its initial weights, on the device of the server.
    """

    labels: ClassVar[Mapping[str, tuple[str, str]]] = {
        "compression_factor": ("compression factor of uploads", ".2f"),
        "bits_per_element": ("bits an uploaded element", ".3f"),
    }

    def __init__(self, settings: Settings, module: nn.Module) -> None:
        config = method_config(settings)
        assert isinstance(config, FedAvgConfig)
        self.config = config
        self.module = module
        down = compressor_of(settings, "model_compressor")
        self.model = GlobalModel(
            tensors_of(module),
            [name for name, _ in module.named_parameters()],
            compressor=None if down == EXACT else down,
        )
        self._settings = settings
        self._exact = compressor_of(settings, "compressor") == EXACT
        self._up = f"compressor {settings['compressor.name']}"
        self._down = f"model_compressor {down.name}"
        self._received: dict[int, Tensors] = {}

    @classmethod
    def build(cls, settings: Settings, clients: ClientManager) -> Self:
        """Build the network from the seed."""
        del clients
        device = resolve_device(RunConfig.of(settings).device)
        return cls(settings, nn.Sequential(*initial_units(settings)).to(device))

    # --- training ---------------------------------------------------------------------

    def steps(self, round_: Round) -> int:
        """Begin a round; the local training of all clients is its only step."""
        del round_
        self._received = {}
        return 1

    def run_step(self, round_: Round, step: int) -> float | None:
        """Have all clients train, and collect what they send up."""
        clients = round_.active(round_.clients)
        sent = {c.number: self._request(round_, c, step) for c in clients}
        replies = round_.exchange(TRAIN, sent, step=step, label=self._up)
        for number, content in replies.items():
            with ends_run(round_.place(step, number, self._up)):
                with round_.watch("codec"):
                    self._received[number] = self._decode(content)
        return round_.add_losses(replies, step)

    def finish(self, round_: Round) -> None:
        """Average what was sent up, or count votes, and move the model."""
        if not self._received:
            return
        models = list(self._received.values())
        clients = round_.manager.clients
        weights = [clients[number].train_samples for number in self._received]
        with round_.watch("server"):
            if self.config.aggregate == "majority":
                tensors = self._outvoted(models, weights)
            else:
                tensors = self._moved(average(models, weights, torch.float64))
            if not all(map(all_finite, tensors.values())):
                place = f"round {round_.number}, averaged model"
                raise RunError(f"{place}: not finite")
        seed = round_.seed("compress.model")
        with ends_run(f"round {round_.number}, {self._down}"), round_.watch("codec"):
            self.model.replace(tensors, seed=seed)
        self._received = {}

    def _request(self, round_: Round, client: ClientInfo, step: int) -> RecordDict:
        """Return a message with its place, and the model if the client lacks it."""
        content = round_.message(step)
        where = round_.place(step, client.number, self._down)
        with ends_run(where), round_.watch("codec"):
            self.model.attach(content, client)
        return content

    def _decode(self, content: RecordDict) -> Tensors:
        """Return what a client sent up: its model, or its update."""
        kind = messages.MODEL if self._exact else UPDATE
        return decode_set(messages.set_of(content, kind), self.model.tensors)

    def _outvoted(self, models: list[Tensors], weights: list[int]) -> Tensors:
        """Return the new model: parameters go as most clients' did, or stay."""
        parameters = set(self.model.parameters)
        buffers = [
            {name: t for name, t in model.items() if name not in parameters}
            for model in models
        ]
        rate, tensors = self.config.server_lr, dict(self.model.tensors)
        tensors |= average(buffers, weights, torch.float64)
        for name in self.model.parameters:
            own = self.model.tensors[name]
            votes = torch.zeros_like(own)
            for model in models:
                change = model[name] - own if self._exact else model[name]
                votes += change.sign()
            tensors[name] = torch.add(own, votes.sign(), alpha=rate)
        return tensors

    def _moved(self, mean: Tensors) -> Tensors:
        """Return the new model, given the average of what clients sent up.

        Parameters move by ``server_lr``. Buffers are those of the average.
        """
        rate, tensors = self.config.server_lr, dict(mean)
        if self._exact and rate == 1:
            return tensors
        for name in self.model.parameters:
            own = self.model.tensors[name]
            change = mean[name] - own if self._exact else mean[name]
            tensors[name] = torch.add(own, change, alpha=rate)
        return tensors

    # --- evaluation -------------------------------------------------------------------

    def evaluate(self, round_: Round) -> Score:
        """Score the test set, here or at the clients."""
        if self.config.evaluate == "clients":
            total = self._clients_score(round_)
        else:
            tensors = self.model.tensors
            total = score_test_set(round_, self._settings, self.module, tensors)
        if not math.isfinite(total.loss):
            raise RunError(f"round {round_.number}, evaluation: loss not finite")
        return total

    def _clients_score(self, round_: Round) -> Score:
        """Have every client score its shard."""
        clients = [c for c in round_.manager.clients if c.test_samples]
        clients = round_.active(clients, EVALUATION)
        sent = {c.number: self._request(round_, c, 0) for c in clients}
        replies = round_.exchange(EVALUATE, sent, step=0)
        total = Score()
        for number, content in replies.items():
            with ends_run(round_.place(0, number, "score")):
                samples = round_.manager.clients[number].test_samples
                total += score_of(content, samples)
        return total

    # --- state and results ------------------------------------------------------------

    def state(self) -> State:
        """Return copies of the model; clients remember nothing."""
        return State(grouped(self.model.state()), {"version": self.model.version})

    def load(self, state: State) -> None:
        """Restore what `state` returned."""
        self.model.load(state.tensors, state.facts["version"])

    def client_records(self, client: ClientInfo) -> Mapping[str, ArrayRecord]:
        """Return the model for a client that had its current version."""
        if not client.version == self.model.version > 0:
            return {}
        return {messages.MODEL: self.model.record()}

    def metrics(self, round_: Round) -> dict[str, Any]:
        """Return the compression of what was sent up."""
        sent, dense = _uploads(round_.manager.ledger.round)
        return {"compression_factor": compression_factor(dense, sent)}

    def summary(
        self, rows: Sequence[Mapping[str, Any]], traffic: Traffic
    ) -> dict[str, Any]:
        """Return the compression of what was sent up over the whole run."""
        del rows
        sent, dense = _uploads(traffic)
        return {
            "compression_factor": compression_factor(dense, sent),
            "bits_per_element": 32 * sent / dense,
        }


def _uploads(traffic: Traffic) -> tuple[int, int]:
    """Return the bytes of models and updates sent up, and those of dense ones."""
    kinds = (messages.MODEL, UPDATE)
    where = ("up", "training")
    sent = sum(traffic.bytes(kind, *where) for kind in kinds)
    return sent, sum(traffic.dense(kind, *where) for kind in kinds)
