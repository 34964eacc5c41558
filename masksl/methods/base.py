"""The server side of a method."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

from flwr.app import ArrayRecord

from masksl.runtime.clients import ClientInfo, ClientManager
from masksl.runtime.ledger import Traffic
from masksl.runtime.round import Round
from masksl.settings import Settings
from masksl.training.score import Score
from masksl.training.tensors import Tensors


class State(NamedTuple):
    """Everything that repeating a round needs.

    Seeds make every random choice, so no generator has a state of its own.

    Parameters
    ----------
    tensors : dict[str, torch.Tensor]
        Tensors by ``group/name``.
    facts : dict[str, Any]
        JSON facts.
    """

    tensors: Tensors
    facts: dict[str, Any]


class ServerMethod(ABC):
    """The server side of a method.

    It decides what is sent, what is done with the replies, and how the model is scored.
    Rounds, failures, checkpoints, byte counts and timing belong to the strategy. It
    draws no randomness except by `Round.seed`.
    """

    labels: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Text and format of the keys of `summary` in the table at the end of a run."""

    @classmethod
    @abstractmethod
    def build(cls, settings: Settings, clients: ClientManager) -> Self:
        """Build the initial model and state from the settings and the seed."""

    @abstractmethod
    def steps(self, round_: Round) -> int:
        """Prepare a round and return its number of steps.

        Called once in a round, before its first step.
        """

    @abstractmethod
    def run_step(self, round_: Round, step: int) -> float | None:
        """Run one step: one or more exchanges.

        Returns
        -------
        float | None
            Its mean loss, None if no client took part.
        """

    def finish(self, round_: Round) -> None:
        """Complete the training of a round, for example average models."""

    @abstractmethod
    def evaluate(self, round_: Round) -> Score:
        """Score the current model on the whole test set.

        Called between steps, too, if ``evaluations`` is greater than 1.
        """

    @abstractmethod
    def state(self) -> State:
        """Return copies of everything the server must restore to repeat a round."""

    @abstractmethod
    def load(self, state: State) -> None:
        """Restore what `state` returned; tensors may be on another device."""

    def files(self) -> Mapping[str, bytes]:
        """Return files that a finished run leaves in its folder, content by name."""
        return {}

    def client_records(self, client: ClientInfo) -> Mapping[str, ArrayRecord]:
        """Return the records that a restarted client needs from the server."""
        del client
        return {}

    def progress(self, round_: Round) -> dict[str, Any]:
        """Return the method's own columns of an evaluation within a round."""
        del round_
        return {}

    def metrics(self, round_: Round) -> dict[str, Any]:
        """Return the method's own columns of the row of a round."""
        del round_
        return {}

    def summary(
        self, rows: Sequence[Mapping[str, Any]], traffic: Traffic
    ) -> dict[str, Any]:
        """Return the method's own keys of ``summary.json``.

        Parameters
        ----------
        rows : Sequence[Mapping[str, Any]]
            Rows of all rounds.
        traffic : Traffic
            Traffic of the whole run.
        """
        del rows, traffic
        return {}
