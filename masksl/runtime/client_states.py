"""The state that only clients know, as far as the server has collected it."""

from collections.abc import Collection, Mapping

import torch
from flwr.app import ArrayRecord, RecordDict

from masksl.runtime import messages
from masksl.runtime.clients import ClientManager
from masksl.runtime.round import Round

Tensors = dict[str, torch.Tensor]


class ClientStates:
    """The state that only clients know.

    Parameters
    ----------
    names : Collection[str]
        Names of that state; if there are none, clients are never asked.

    Attributes
    ----------
    groups : dict[str, dict[str, torch.Tensor]]
        Tensors on the CPU by ``client.<number>.<name>``.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._collected: set[int] = set()
        self.groups: dict[str, Tensors] = {}

    def expire(self, round_: Round) -> None:
        """Mark the state of the clients of a round as outdated; call it every round."""
        self._collected -= {client.number for client in round_.clients}

    def collect(self, clients: ClientManager, round_: Round) -> None:
        """Collect the state after a round.

        Only clients are asked that took part in a round since their state was last
        collected, or whose state was never collected: the others have not changed it.

        Raises
        ------
        RunError
            If a client does not reply.
        NodesLost
            If a node lost its state.
        """
        if not self._names:
            return
        numbers = {client.number for client in clients.clients} - self._collected
        asked = {number: RecordDict() for number in sorted(numbers)}
        cpu = torch.device("cpu")
        place = f"round {round_.number}, {messages.SAVE}"
        for number, content in clients.query(messages.SAVE, asked, place).items():
            self._collected.add(number)
            for name, record in content.array_records.items():
                self.groups[f"client.{number}.{name}"] = {
                    key: tensor.detach().to(cpu, copy=True)
                    for key, tensor in messages.state_tensors(record, cpu).items()
                }

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace the state by that of a snapshot, named ``group/name``."""
        self.groups = {}
        self._collected = set()
        for key, tensor in tensors.items():
            group, _, name = key.partition("/")
            if group.startswith("client."):
                self.groups.setdefault(group, {})[name] = tensor
                self._collected.add(int(group.split(".", 2)[1]))

    def records(self, number: int) -> dict[str, ArrayRecord]:
        """Return the records that restore the state of a client."""
        start = f"client.{number}."
        return {
            messages.STATE + group.removeprefix(start): messages.state_record(tensors)
            for group, tensors in self.groups.items()
            if group.startswith(start)
        }
