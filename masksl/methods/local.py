"""Local training: passes of a client over its data with a whole network."""

import math
from collections.abc import Callable

from masksl.compress import NotFiniteError
from masksl.methods.client import Client, Place
from masksl.training.network import LocalNetwork
from masksl.training.schedule import Rates
from masksl.training.tensors import Tensors


# pylint: disable-next=too-many-arguments
def run_epochs(
    client: Client,
    network: LocalNetwork,
    epochs: int,
    rates: Rates,
    *,
    round_: int | None = None,
    correct: Callable[[Tensors], None] | None = None,
    after: Callable[[int], None] | None = None,
) -> tuple[float, int]:
    """Train for some passes of a round.

    Parameters
    ----------
    client : Client
        The client.
    network : LocalNetwork
        Its network, whose tensors are trained.
    epochs : int
        Number of passes.
    rates : Rates
        Learning rates of the round.
    round_ : int | None
        Round by which batches and dropout are drawn; that of the rates by default.
    correct : Callable[[dict[str, torch.Tensor]], None] | None
        Changes the gradients of every step, see `LocalNetwork.train`.
    after : Callable[[int], None] | None
        Called after every step with its number, from 0 on.

    Returns
    -------
    tuple[float, int]
        The mean loss of all samples of all steps, and their number.

    Raises
    ------
    NotFiniteError
        If a loss is not finite; the text names the local step.
    """
    total, samples = 0.0, 0
    steps = epochs * client.train_steps()
    for step in range(steps):
        here = Place(rates.round if round_ is None else round_, step)
        images, labels = client.train_batch(here)
        loss = network.train(
            images,
            labels,
            client.setup.optimizer,
            lr=rates.at(step, steps),
            seed=client.seed("dropout.client", here),
            correct=correct,
        )
        if not math.isfinite(loss):
            raise NotFiniteError(f"loss of local step {step} not finite")
        if after is not None:
            with network.computing():
                after(step)
        total += loss * len(labels)
        samples += len(labels)
    return total / samples, samples
