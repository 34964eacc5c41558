"""The server side of FedPM."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from flwr.app import ArrayRecord, RecordDict
from torch import nn

from masksl.methods import method_config
from masksl.methods.base import ServerMethod, State
from masksl.methods.evaluation import score_test_set
from masksl.methods.fedpm import FedPmConfig, artefact
from masksl.methods.fedpm.ballot import Ballot
from masksl.methods.fedpm.codes import digest, formula, reference_of, start
from masksl.methods.fedpm.frozen import NetworkError
from masksl.methods.fedpm.messages import (
    DIGEST,
    MASK,
    THETA,
    TRAIN,
    VOTERS,
    VOTES,
    ballot_records,
    theta_records,
)
from masksl.methods.fedpm.theta import Theta
from masksl.methods.fedpm.votes import decode_mask
from masksl.methods.network import initial_units, spec_of
from masksl.runtime import messages
from masksl.runtime.clients import ClientInfo, ClientManager
from masksl.runtime.ledger import Traffic
from masksl.runtime.messages import RunError, ends_run
from masksl.runtime.round import Round
from masksl.settings import RunConfig, Settings
from masksl.training.compute import resolve_device
from masksl.training.score import Score
from masksl.training.tensors import group, grouped

_BALLOT = "ballot"  # group of the frames of the last votes
_BEFORE = "before"  # group of the probabilities before them


class _Version(NamedTuple):
    """A version of the probabilities, and how it came about.

    Parameters
    ----------
    number : int
        0 at the start.
    theta : Theta
        The probabilities.
    before : Theta
        Those of the version before, the same at the start.
    ballot : Ballot | None
        The votes between the two, None at the start.
    """

    number: int
    theta: Theta
    before: Theta
    ballot: Ballot | None = None


@dataclass
class _Count:
    """The votes of a round so far.

    Parameters
    ----------
    votes : numpy.ndarray
        int64, shape (d,): the sum of the masks.
    voters : list[int]
        Who sent one.
    formulas : list[float]
        What the paper's authors count for each.
    """

    votes: np.ndarray
    voters: list[int] = field(default_factory=list)
    formulas: list[float] = field(default_factory=list)

    def add(self, client: int, mask: np.ndarray) -> None:
        """Add the mask of a client."""
        self.votes += mask
        self.voters.append(client)
        self.formulas.append(formula(mask))


class FedPmServer(ServerMethod):
    """FedPM (Isik et al., ICLR 2023, arXiv 2209.15328).

    In a round, which is one step, every participating client trains the probabilities
    with which frozen random weights are kept, and sends one mask that is drawn by them;
    the server counts the masks as votes.

    Parameters
    ----------
    settings : Settings
        Configuration of the run.
    module : nn.Module
        The network, on the device of the server; its weights do not matter.
    """

    labels: ClassVar[Mapping[str, tuple[str, str]]] = {
        "bits_up": ("bits a weight of a mask", ".4f"),
        "bits_down": ("bits a weight of what comes down", ".4f"),
        "model_bytes": ("bytes of the model, as one mask", ",d"),
    }

    def __init__(self, settings: Settings, module: nn.Module) -> None:
        config = method_config(settings)
        assert isinstance(config, FedPmConfig)
        self.config = config
        self.run = RunConfig.of(settings)
        self.module = module
        self.frozen, self.rule, initial = start(module, config, self.run.seed)
        self.version = _Version(0, initial, initial)
        self.accuracies: dict[str, float] = {}
        self._count = _Count(np.zeros(self.frozen.elements, np.int64))
        self._settings = settings
        self._label = f"code {config.code}"
        self._encoded: dict[str, tuple[int, Mapping[str, ArrayRecord]]] = {}

    @classmethod
    def build(cls, settings: Settings, clients: ClientManager) -> Self:
        """Build the network and draw its weights from the seed."""
        del clients
        device = resolve_device(RunConfig.of(settings).device)
        module = nn.Sequential(*initial_units(settings)).to(device)
        try:
            return cls(settings, module)
        except NetworkError as error:
            name = settings["model.name"]
            raise RunError(f"model.name={name} with method=fedpm: {error}") from error

    @property
    def theta(self) -> Theta:
        """The current probabilities."""
        return self.version.theta

    # --- training ---------------------------------------------------------------------

    def steps(self, round_: Round) -> int:
        """Begin a round; the local training of all clients is its only step."""
        del round_
        self._count = _Count(np.zeros(self.frozen.elements, np.int64))
        return 1

    def run_step(self, round_: Round, step: int) -> float | None:
        """Have all clients train, and count the masks that they send."""
        sent = {}
        for client in round_.active(round_.clients):
            content = round_.message(step)
            with round_.watch("codec"):
                self._attach(content, client)
            sent[client.number] = content
        replies = round_.exchange(TRAIN, sent, step=step, label=self._label)
        own = digest(self.frozen, self.theta)
        for number, content in replies.items():
            where = round_.place(step, number, self._label)
            with ends_run(where), round_.watch("codec"):
                if messages.raw_of(content, DIGEST, len(own)) != own:
                    raise RunError(f"{where}: client has other weights or votes")
                self._count.add(number, self._mask(round_, number, content))
        return round_.add_losses(replies, step)

    def _mask(self, round_: Round, number: int, content: RecordDict) -> np.ndarray:
        """Decode the mask of a client."""
        place = round_.number, number
        reference = reference_of(self.rule, self.frozen, self.theta, *place)
        frame = messages.frame_of(content, MASK)
        return decode_mask(frame, self.frozen.elements, reference)

    def finish(self, round_: Round) -> None:
        """Count the votes of the round; without any nothing changes."""
        count, before = self._count, self.theta
        if not count.voters:
            return
        where = f"round {round_.number}, votes"
        with ends_run(where), round_.watch("server"):
            voters = len(count.voters)
            theta = self.rule.count(before, count.votes, voters, round_.number)
        with round_.watch("codec"):
            ballot = Ballot.of(
                count.votes, round_.number, count.voters, before, self.rule
            )
        self.version = _Version(self.version.number + 1, theta, before, ballot)

    # --- what comes down --------------------------------------------------------------

    def _attach(self, content: RecordDict, client: ClientInfo) -> None:
        """Add to a message what its client needs to have the current probabilities."""
        version = self.version
        if client.version == version.number:
            return
        if version.ballot is None:  # the start follows from the seed
            client.version = version.number
            return
        recent = client.version == version.number - 1
        for name, record in self._records(VOTES if recent else THETA).items():
            content[name] = record
        client.version = version.number

    def _records(self, kind: str) -> Mapping[str, ArrayRecord]:
        """Return the last votes, or all, encoded once a version."""
        number, theta, _, ballot = self.version
        known = self._encoded.get(kind)
        if known is None or known[0] != number:
            dense = 4 * self.frozen.elements
            if kind == VOTES:
                assert ballot is not None
                records = ballot_records(ballot, self.run.clients, dense)
            else:
                records = theta_records(theta, dense)
            known = self._encoded[kind] = number, records
        return known[1]

    # --- evaluation -------------------------------------------------------------------

    def evaluate(self, round_: Round) -> Score:
        """Score the network of the weights that are kept with probability 1/2 or more.

        Two others are scored beside it: one drawn mask, and the mean of all masks.
        """
        theta = torch.from_numpy(self.theta.probabilities).to(self.frozen.device)
        generator = torch.Generator().manual_seed(round_.seed("fedpm.evaluation"))
        drawn = torch.rand(len(theta), generator=generator).to(theta.device)
        others = {"top1_drawn": (drawn < theta).float(), "top1_mean": theta}
        self.accuracies = {
            name: self._score(round_, mask).means()["top1"]
            for name, mask in others.items()
        }
        return self._score(round_, torch.from_numpy(self.mask).to(theta.device).float())

    @property
    def mask(self) -> np.ndarray:
        """The mask of the model that a run is about, bool, shape (d,)."""
        return self.theta.probabilities >= 0.5

    def files(self) -> Mapping[str, bytes]:
        """Return the model that a run is about, see `artefact.load`."""
        spec = spec_of(self._settings)
        network = {
            "model": self._settings["model.name"],
            "classes": spec.classes,
            "channels": spec.channels,
            "stem_stride": self._settings["model.stem_stride"],
        }
        return {artefact.NAME: artefact.dump(self.frozen, self.mask, network)}

    def _score(self, round_: Round, mask: torch.Tensor) -> Score:
        """Score the network with a mask, or with shares of its weights."""
        tensors = self.frozen.named(self.frozen.weights * mask)
        total = score_test_set(round_, self._settings, self.module, tensors)
        if not math.isfinite(total.loss):
            raise RunError(f"round {round_.number}, evaluation: loss not finite")
        return total

    # --- state and results ------------------------------------------------------------

    def state(self) -> State:
        """Return the probabilities, the last votes, and the probabilities before."""
        number, theta, before, ballot = self.version
        facts: dict[str, Any] = {"version": number}
        if ballot is None:
            return State({}, facts)
        frames = {
            str(place): torch.from_numpy(np.frombuffer(data, np.uint8).copy())
            for place, data in enumerate(ballot.frames)
        }
        groups = {THETA: theta.tensors(), _BALLOT: frames}
        if before.voters:
            groups[_BEFORE] = before.tensors()
        facts |= {"round": ballot.round, "voters": list(ballot.voters)}
        return State(grouped(groups), facts)

    def load(self, state: State) -> None:
        """Restore what `state` returned."""
        tensors, facts, number = state.tensors, state.facts, state.facts["version"]
        _, _, initial = start(self.module, self.config, self.run.seed)
        self._encoded = {}
        if not number:
            self.version = _Version(0, initial, initial)
            return
        frames = group(tensors, _BALLOT)
        ordered = [frames[str(place)] for place in range(len(frames))]
        data = tuple(frame.cpu().numpy().tobytes() for frame in ordered)
        ballot = Ballot(facts["round"], tuple(facts["voters"]), data)
        earlier = group(tensors, _BEFORE)
        before = Theta.of_tensors(earlier) if earlier else initial
        theta = Theta.of_tensors(group(tensors, THETA))
        self.version = _Version(number, theta, before, ballot)

    def client_records(self, client: ClientInfo) -> Mapping[str, ArrayRecord]:
        """Return the probabilities that a client had, if votes are still to come."""
        number, theta, before, _ = self.version
        own = {number: theta, number - 1: before}.get(client.version)
        if own is None or not own.voters:
            return {}
        return {messages.STATE + THETA: messages.state_record(own.tensors())}

    def metrics(self, round_: Round) -> dict[str, Any]:
        """Return bits a weight up and down, the paper's figure, and other scores."""
        formulas = self._count.formulas
        mean = sum(formulas) / len(formulas) if formulas else None
        bits = self._bits(round_.manager.ledger.round)
        return bits | {"bits_formula": mean} | self.accuracies

    def summary(
        self, rows: Sequence[Mapping[str, Any]], traffic: Traffic
    ) -> dict[str, Any]:
        """Return bits a weight over the whole run, and the size of the model."""
        del rows
        size = len(artefact.encode_mask(self.frozen, self.mask))
        sizes = {"elements": self.frozen.elements, "model_bytes": size}
        return self._bits(traffic) | sizes

    def _bits(self, traffic: Traffic) -> dict[str, float]:
        """Return bits a weight of each mask, and of what comes down to each client."""
        masks = traffic.messages(MASK)
        up = traffic.bytes(MASK)
        down = sum(traffic.bytes(kind) for kind in (VOTES, VOTERS, THETA))
        scale = 8 / self.frozen.elements / max(1, masks)
        return {"bits_up": up * scale, "bits_down": down * scale}
