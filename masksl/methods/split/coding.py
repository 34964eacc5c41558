"""How changes of client halves are sent: as one frame-set, with error feedback."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from masksl.compress import Compressor, decode_set, encode_set
from masksl.training.optimizer import OptimizerConfig, stepped
from masksl.training.tensors import Tensors, digest

REMAINDER = "half.remainder"
"""Group of what the changes sent so far have lost, by parameter."""

SHARED = "half.shared"
"""Group of the parameters that changes are differences to."""

RATE = "rate"
"""Key of the learning rate that a change is applied with, in the place of a message."""


class Coded(NamedTuple):
    """A change of a half, as it is sent.

    Parameters
    ----------
    data : bytes
        The frame-set.
    sent : dict[str, torch.Tensor]
        What it decodes to: the change, then the buffers.
    remainder : dict[str, torch.Tensor]
        What it lacks of the change.
    """

    data: bytes
    sent: Tensors
    remainder: Tensors


@dataclass(frozen=True)
class ChangeCoder:
    """Codes changes of halves.

    All parameters go through the compressor as one tensor, each divided by its standard
    deviation (`encode_set`, ``scaled``). Buffers go exactly.

    Parameters
    ----------
    compressor : Compressor
        The ``model_compressor``.
    """

    compressor: Compressor

    def encode(
        self,
        change: Tensors,
        remainder: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
        *,
        seed: int,
    ) -> Coded:
        """Encode a change, and with it what earlier ones have lost.

        Parameters
        ----------
        change : dict[str, torch.Tensor]
            By name of the parameter.
        remainder : Mapping[str, torch.Tensor]
            `Coded.remainder` of the sender's last change, {} before the first one.
        buffers : Mapping[str, torch.Tensor]
            Sent with it, exactly.
        seed : int
            Seed of the compressor's draws.

        Raises
        ------
        NotFiniteError
            If the change has values that are not finite.
        """
        whole = {n: t + remainder[n] if remainder else t for n, t in change.items()}
        sent = whole | dict(buffers)
        data = encode_set(
            sent,
            self.compressor,
            exact=buffers.keys(),
            joined=True,
            scaled=True,
            seed=seed,
        )
        decoded = decode_set(data, sent)
        left = {name: tensor - decoded[name] for name, tensor in whole.items()}
        return Coded(data, decoded, left)


def apply(
    tensors: Mapping[str, torch.Tensor],
    sent: Mapping[str, torch.Tensor],
    state: Mapping[str, Tensors],
    optimizer: OptimizerConfig | None,
    rate: float,
) -> tuple[Tensors, dict[str, Tensors]]:
    """Return the parameters after a change, and what the optimiser remembers.

    Every processor gets the same ones bit for bit.

    Parameters
    ----------
    tensors, sent : Mapping[str, torch.Tensor]
        The parameters, and for each what came.
    state : Mapping[str, dict[str, torch.Tensor]]
        What the optimiser remembers.
    optimizer : OptimizerConfig | None
        Given if what came are gradients, None if it is differences.
    rate : float
        The learning rate of gradients.
    """
    if optimizer is None:
        return {name: tensors[name] + change for name, change in sent.items()}, {}
    own = {name: tensors[name] for name in sent}
    return stepped(own, dict(sent), state, optimizer, rate)


def digest_of_half(own: Tensors, states: Mapping[str, Tensors]) -> int:
    """Return what copies of a half are compared by.

    Parameters
    ----------
    own : dict[str, torch.Tensor]
        Its parameters, in the network's order.
    states : Mapping[str, dict[str, torch.Tensor]]
        What the optimiser remembers of them.
    """
    remembered = [states[group][name] for group in sorted(states) for name in own]
    return digest([*own.values(), *remembered])
