"""The server side of FLASH."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
from flwr.app import ArrayRecord, RecordDict
from torch import nn

from masksl.codec import topk
from masksl.compress import NotFiniteError
from masksl.methods import method_config
from masksl.methods.base import ServerMethod, State
from masksl.methods.evaluation import score_test_set
from masksl.methods.flash import FlashConfig
from masksl.methods.flash.average import Average, largest, scaled_down
from masksl.methods.flash.coding import MaskCoding, unpack_counts
from masksl.methods.flash.layers import NetworkError
from masksl.methods.flash.masks import Masks
from masksl.methods.flash.messages import COUNTS, HELD, MASK, TRAIN, UPDATE, WARMUP
from masksl.methods.flash.start import FIRST, Start, network_of
from masksl.methods.flash.values import ValueCoding
from masksl.methods.network import initial_units
from masksl.runtime import messages
from masksl.runtime.clients import ClientInfo, ClientManager
from masksl.runtime.ledger import DOWN, UP, Traffic
from masksl.runtime.messages import RunError, ends_run
from masksl.runtime.round import Round
from masksl.settings import RunConfig, Settings
from masksl.training.compute import resolve_device
from masksl.training.score import Score
from masksl.training.tensors import Tensors, all_finite, copies, group, grouped

_MODEL = "model"  # groups of the state
_MASKS = "masks"
_SHARES = ("density", "density_masked", "overlap")


@dataclass
class _Now:
    """What the server knows of the current round.

    Parameters
    ----------
    average : Average
        The average of what clients sent so far.
    versions : dict[int, int]
        Version of the mask of each client.
    weights : dict[int, ArrayRecord]
        The weights that a mask keeps, by its version.
    """

    average: Average
    versions: dict[int, int] = field(default_factory=dict)
    weights: dict[int, ArrayRecord] = field(default_factory=dict)


class FlashServer(ServerMethod):
    """FLASH (Babakniya et al., TMLR 2023, arXiv 2208.13092) and its baselines.

    In a round, which is one step, every participating client trains the weights that a
    mask keeps; the server averages them. In the first round a first stage comes before,
    which finds the densities of the layers.

    Parameters
    ----------
    settings : Settings
        Configuration of the run.
    module : nn.Module
        The network with its initial weights, on the device of the server.
    """

    labels: ClassVar[Mapping[str, tuple[str, str]]] = {
        "bytes_up": ("bytes up a client and round", ",.0f"),
        "bytes_down": ("bytes down a client and round", ",.0f"),
    }

    def __init__(self, settings: Settings, module: nn.Module) -> None:
        config = method_config(settings)
        assert isinstance(config, FlashConfig)
        self.module = module
        self.start = Start.of(module, config, RunConfig.of(settings))
        self.masks = Masks(MaskCoding(self.start))
        self.tensors: Tensors = {}
        self.version = 0  # of the weights; 0 are the initial ones
        self.columns: dict[str, Any] = {}
        self._settings = settings
        self._down, self._up = ValueCoding.both(self.start, settings)
        self._label = f"{config.variant}, compressor {self._up.compressor.name}"
        self._now = self._begun()
        self._scored: tuple[Tensors, Tensors] = {}, {}  # masked, and before that

    @classmethod
    def build(cls, settings: Settings, clients: ClientManager) -> Self:
        """Build the network from the seed."""
        del clients
        device = resolve_device(RunConfig.of(settings).device)
        module = network_of(settings, initial_units(settings)).to(device)
        try:
            return cls(settings, module)
        except NetworkError as error:
            name = settings["model.name"]
            raise RunError(f"model.name={name} with method=flash: {error}") from error

    @property
    def config(self) -> FlashConfig:
        """Configuration of the method."""
        return self.start.config

    # --- training ---------------------------------------------------------------------

    def steps(self, round_: Round) -> int:
        """Begin a round; the local training of all clients is its only step."""
        del round_
        self._now = self._begun()
        return 1

    def _begun(self) -> _Now:
        """Return what the server knows of a round that begins."""
        return _Now(Average(self.start.layers, self.config.aggregate == "fma"))

    def run_step(self, round_: Round, step: int) -> float | None:
        """Have all clients train, and average what they send."""
        if not self.masks.current:
            counts = self.start.counts
            if self.config.has_warmup:
                counts = self._warm_up(round_)
            self.masks.begin(counts)
            mask = self._at(self.masks[FIRST].mask)
            self.tensors = self.start.masked(self.start.weights(counts), mask)
        sent = self._requests(round_, step)
        replies = round_.exchange(TRAIN, sent, step=step, label=self._label)
        for number, content in replies.items():
            place = round_.place(step, number, self._label)
            with ends_run(place), round_.watch("codec"):
                self._add(round_, number, content)
        return round_.add_losses(replies, step)

    def _warm_up(self, round_: Round) -> list[int]:
        """Run the first stage; return the weights of each layer of the first mask."""
        if self.config.warmup == "init":
            with round_.watch("server"):
                return self.start.first_counts([self.start.warmup()])
        fraction = self.config.warmup_fraction
        drawn = round_.manager.sample(round_.number, fraction, WARMUP)
        sent = {c.number: round_.message(0) for c in drawn}
        replies = round_.exchange(WARMUP, sent, step=0, label="first stage")
        sizes, counts = self.start.layers.sizes, []
        for number, content in replies.items():
            with ends_run(round_.place(0, number, "first stage")):
                counts.append(unpack_counts(messages.raw_of(content, COUNTS), sizes))
        if not counts:
            raise RunError(f"{round_.place(0)}: no client is left in the first stage")
        return self.start.first_counts(counts)

    def _requests(self, round_: Round, step: int) -> dict[int, RecordDict]:
        """Return the message of each client: its mask, and the weights it keeps."""
        groups = self._groups(round_)
        sent = {}
        for client in round_.active(round_.clients):
            version = groups[client.number]
            content = round_.message(step)
            where = round_.place(step, client.number, "model_compressor")
            with ends_run(where), round_.watch("codec"):
                if self.config.has_masks:
                    content[MASK] = self.masks.record(client, version)
                if self.version:
                    content[messages.MODEL] = self._weights(round_, version)
            self._now.versions[client.number] = version
            sent[client.number] = content
        return sent

    def _groups(self, round_: Round) -> dict[int, int]:
        """Return the version of each client's mask."""
        layers, config = self.start.layers, self.config
        current, own = self.masks.current, self.masks.own
        numbers = [client.number for client in round_.clients]
        if not config.hetero or not self.version:
            return {number: own.get(number, current) for number in numbers}
        flat = layers.flat(self.tensors)
        nonzero = layers.counts((flat != 0).cpu().numpy())
        versions = []
        for factor in config.hetero[:-1]:
            target = layers.kept(config.density * factor)
            mask = largest(layers, flat, scaled_down(nonzero, target))
            versions.append(self.masks.add(mask))
        versions.append(current)
        generator = torch.Generator().manual_seed(round_.seed("flash.groups"))
        order = torch.randperm(len(numbers), generator=generator).tolist()
        most = len(numbers) - 1  # one at least has the whole mask
        ends = [min(round(e * len(numbers)), most) for e in config.hetero_ends[:-1]]
        return {
            numbers[drawn]: versions[sum(place >= end for end in ends)]
            for place, drawn in enumerate(order)
        }

    def _weights(self, round_: Round, version: int) -> ArrayRecord:
        """Return the weights that a mask keeps, encoded once in a round."""
        if version not in self._now.weights:
            mask, layers = self.masks[version].mask, self.start.layers
            kept = topk.masked(layers.flat(self.tensors), self._at(mask))
            seed = round_.seed("compress.model", step=version)
            data = self._down.encode(kept, layers.counts(mask), self.tensors, seed=seed)
            record = messages.set_record(data, self.start.dense_bytes)
            self._now.weights[version] = record
        return self._now.weights[version]

    def _add(self, round_: Round, number: int, content: RecordDict) -> None:
        """Add what a client sent to the average."""
        layers, client = self.start.layers, round_.manager.clients[number]
        before = mask = self.masks[self._now.versions[number]].mask
        if self.config.evolves(round_.number):
            growth = self.start.growth(number, round_.number)
            data = messages.raw_of(content, MASK)
            mask = self.masks.coding.decode_changes(data, before, growth)
        if self.config.variant == "nst":
            version = self.start.next_version(round_.number, number)
            self.masks.store(version, mask)
            self.masks.own[number] = client.version = version
        kind = messages.MODEL if self._up.absolute else UPDATE
        data, counts = messages.set_of(content, kind), layers.counts(mask)
        kept, rest = self._up.decode(data, counts)
        if not self._up.absolute:
            base = layers.flat(self.tensors) * self._at(before)
            kept += topk.masked(base, self._at(mask))
            rest = {name: self.tensors[name] + change for name, change in rest.items()}
        if not all(map(all_finite, [kept, *rest.values()])):
            raise NotFiniteError("weights not finite")
        self._now.average.add(number, client.train_samples, mask, kept, rest)

    def finish(self, round_: Round) -> None:
        """Move the weights to their average, and renew the mask where that is due."""
        average, layers = self._now.average, self.start.layers
        if not average.masks:
            return
        with round_.watch("server"):
            flat, rest = average.weights(), average.rest()
            union = self.tensors | layers.named(flat) | rest
            mask = self._mask_of(round_, flat)
            masked = self.start.masked(union, self._at(mask))
        self.columns = self._columns(flat, mask)
        self.tensors = union if self.config.variant == "nst" else masked
        self._scored = masked, union
        self.version += 1
        self.masks.expire(round_.manager.clients)
        self._now.weights = {}

    def _mask_of(self, round_: Round, flat: torch.Tensor) -> np.ndarray:
        """Return the mask of the model after a round.

        Under ``jmwst`` it becomes that of all clients, where it changes.
        """
        config, layers, average = self.config, self.start.layers, self._now.average
        if not config.evolves(round_.number):
            return self.masks[self.masks.current].mask
        counts: Sequence[float] = average.mean_counts()
        if config.variant == "jmwst" and config.rebuild == "aggregate":
            counts = layers.counts((flat != 0).cpu().numpy())
        kept = scaled_down(counts, layers.kept(config.density))
        mask = largest(layers, flat, kept)
        if config.variant == "jmwst":
            self.masks.current = self.masks.add(mask)
        return mask

    def _columns(self, flat: torch.Tensor, mask: np.ndarray) -> dict[str, Any]:
        """Return densities of the averaged and the masked weights, and the overlap."""
        elements = self.start.layers.elements
        return {
            "density": int(flat.count_nonzero()) / elements,
            "density_masked": int(np.count_nonzero(mask)) / elements,
            "overlap": self._now.average.overlap(),
        }

    def _at(self, mask: np.ndarray) -> torch.Tensor:
        """Return a mask on the device of the weights."""
        return torch.from_numpy(mask).to(self.start.layers.device)

    # --- evaluation -------------------------------------------------------------------

    def evaluate(self, round_: Round) -> Score:
        """Score the masked weights; those before masking are scored beside them."""
        masked, union = self._scored
        if self.config.evolves(round_.number):
            self.columns["top1_union"] = self._score(round_, union).means()["top1"]
        return self._score(round_, masked)

    def _score(self, round_: Round, tensors: Tensors) -> Score:
        total = score_test_set(round_, self._settings, self.module, tensors)
        if not math.isfinite(total.loss):
            raise RunError(f"round {round_.number}, evaluation: loss not finite")
        return total

    # --- state and results ------------------------------------------------------------

    def state(self) -> State:
        """Return the weights, and the masks that anybody refers to."""
        facts = {"version": self.version, "masks": self.masks.facts()}
        groups = {_MODEL: copies(self.tensors), _MASKS: self.masks.tensors()}
        return State(grouped(groups), facts)

    def load(self, state: State) -> None:
        """Restore what `state` returned."""
        device = self.start.layers.device
        model = group(state.tensors, _MODEL)
        self.tensors = {n: t.to(device, copy=True) for n, t in model.items()}
        self.version = state.facts["version"]
        packed, facts = group(state.tensors, _MASKS), state.facts["masks"]
        self.masks = Masks.restored(self.masks.coding, packed, facts)

    def client_records(self, client: ClientInfo) -> Mapping[str, ArrayRecord]:
        """Return the mask that a client held."""
        held = self.masks.held_by(client)
        if held is None:
            return {}
        record = messages.state_record(self.masks.coding.tensors(held))
        return {messages.STATE + HELD: record}

    def metrics(self, round_: Round) -> dict[str, Any]:
        """Return densities, the overlap of masks, and bytes a client."""
        return self.columns | _bytes(round_.manager.ledger.round)

    def summary(
        self, rows: Sequence[Mapping[str, Any]], traffic: Traffic
    ) -> dict[str, Any]:
        """Return bytes a client and round over the whole run, and the last
        densities."""
        return {key: rows[-1][key] for key in _SHARES} | _bytes(traffic)


def _bytes(traffic: Traffic) -> dict[str, float]:
    """Return bytes up and down, for each participation of a client in a round."""
    number = max(
        1, sum(traffic.messages(kind, UP) for kind in (messages.MODEL, UPDATE))
    )
    return {
        "bytes_up": traffic.bytes(None, UP) / number,
        "bytes_down": traffic.bytes(None, DOWN) / number,
    }
