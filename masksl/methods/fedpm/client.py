"""The client side of FedPM."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import RecordDict
from torch import nn

from masksl.compress import NotFiniteError, make
from masksl.methods.client import Client, ClientMethod, Place, place_of
from masksl.methods.fedpm import FedPmConfig
from masksl.methods.fedpm.ballot import Rule
from masksl.methods.fedpm.codes import digest, reference_of, start
from masksl.methods.fedpm.dither import numbers
from masksl.methods.fedpm.frozen import Frozen
from masksl.methods.fedpm.messages import (
    DIGEST,
    MASK,
    THETA,
    TRAIN,
    VOTES,
    ballot_of,
    theta_of,
)
from masksl.methods.fedpm.theta import SCALE, Theta
from masksl.runtime import messages
from masksl.settings import Settings, read
from masksl.training.compute import compute
from masksl.training.network import LocalNetwork
from masksl.training.optimizer import OptimizerConfig, apply_gradients
from masksl.training.schedule import Rates
from masksl.training.tensors import Tensors, all_finite

MOMENTS = "moments."  # prefix of groups of what the optimiser remembers, if it is kept
_SCORES = "scores"

_CODER = make("mask")


@dataclass
class _Shared:
    """What the clients of a process share under one configuration.

    It changes no result: whoever lacks a part of it computes it again.
    """

    frozen: Frozen
    rule: Rule
    initial: Theta
    latest: Theta | None = None  # as a client had it last
    step: tuple[object, Theta, Theta] | None = None  # a record, before and after it


def train(client: Client, content: RecordDict) -> RecordDict:
    """Answer `train.local`: train the scores, then send a mask."""
    place, rounds = place_of(content), int(messages.place_of(content)["rounds"])
    shared, config = _shared(client), _config(client)
    with client.watch("codec"):
        theta = _receive(client, content)
    with client.watch("compute"):
        training = _Training(client, shared.frozen, config)
        rates = client.setup.rates(place.round, rounds)
        scores = torch.from_numpy(theta.scores).to(client.setup.device)
        moments = training.moments()
        loss, samples = training.run(scores, moments, rates)
        with training.computing():
            mask = _draw(client, place, torch.sigmoid(scores))
    reply = RecordDict({DIGEST: messages.raw_record(digest(shared.frozen, theta))})
    with client.watch("codec"):
        reference = reference_of(
            shared.rule, shared.frozen, theta, place.round, client.number
        )
        frame = _CODER.encode(mask, reference=reference)
        reply[MASK] = messages.frame_record(frame)
    if config.keep_moments:
        for group, tensors in moments.items():
            client.state[MOMENTS + group] = tensors
    reply[messages.METRICS] = client.metrics(loss=loss, samples=samples)
    return reply


def own_state(settings: Settings) -> Sequence[str]:
    """Return the names of what only the client knows."""
    if not settings["method.keep_moments"]:
        return ()
    optimizer = read(OptimizerConfig, settings, "optimizer")
    return tuple(MOMENTS + group for group in optimizer.states)


CLIENT = ClientMethod(
    lambda settings, units: nn.Sequential(*units), {TRAIN: train}, own_state
)


# --- training -------------------------------------------------------------------------


@dataclass
class _Training:
    """Local training of the scores of all weights.

    Parameters
    ----------
    client : Client
        The client.
    frozen : Frozen
        The frozen weights.
    config : FedPmConfig
        Configuration of the method.
    """

    client: Client
    frozen: Frozen
    config: FedPmConfig

    def run(
        self, scores: torch.Tensor, moments: dict[str, Tensors], rates: Rates
    ) -> tuple[float, int]:
        """Train for the local epochs of a round.

        Parameters
        ----------
        scores : torch.Tensor
            float32, shape (d,); changed in place.
        moments : dict[str, dict[str, torch.Tensor]]
            What the optimiser remembers; changed in place.
        rates : Rates
            Learning rates of the round.

        Returns
        -------
        tuple[float, int]
            The mean loss of all samples of all steps, and their number.

        Raises
        ------
        NotFiniteError
            If a loss or the new scores are not finite.
        """
        client, setup = self.client, self.client.setup
        total, samples = 0.0, 0
        steps = self.config.local_epochs * client.train_steps()
        for step in range(steps):
            here = Place(rates.round, step)
            images, labels = client.train_batch(here)
            loss, gradient = self._gradient(scores, images, labels, here)
            if gradient is None or not math.isfinite(loss):
                raise NotFiniteError(f"loss of local step {step} not finite")
            with self.computing():
                apply_gradients(
                    {_SCORES: scores},
                    {_SCORES: gradient},
                    moments,
                    setup.optimizer,
                    rates.at(step, steps),
                )
            total += loss * len(labels)
            samples += len(labels)
        if not all_finite(scores):
            raise NotFiniteError("scores not finite")
        return total / samples, samples

    def computing(self) -> AbstractContextManager[None]:
        """Return the context of computations on scores."""
        setup = self.client.setup
        return compute(setup.threads, setup.device, 0, setup.compute)

    def moments(self) -> dict[str, Tensors]:
        """Return what the optimiser remembers, {} where it begins anew."""
        client = self.client
        if not self.config.keep_moments:
            return {}
        groups = client.setup.optimizer.states
        kept = {group: MOMENTS + group for group in groups}
        return {
            group: {key: tensor.clone() for key, tensor in client.state[name].items()}
            for group, name in kept.items()
            if name in client.state
        }

    def _gradient(
        self,
        scores: torch.Tensor,
        images: torch.Tensor,
        labels: torch.Tensor,
        place: Place,
    ) -> tuple[float, torch.Tensor | None]:
        """Return the loss of a mini-batch under a fresh mask, and the scores' gradient.

        The mask is drawn by its probabilities. Its derivative by them is taken to be 1,
        or the probability itself.
        """
        client, setup, frozen = self.client, self.client.setup, self.frozen
        seed = client.seed("fedpm.batch", place)
        with self.computing():
            theta = torch.sigmoid(scores)
            weights = frozen.weights * (_uniform(frozen, seed) < theta)
        network = LocalNetwork(
            setup.module, frozen.named(weights), {}, setup.threads, setup.compute
        )
        loss, gradients = network.gradients(
            images,
            labels,
            smoothing=setup.optimizer.label_smoothing,
            seed=client.seed("dropout.client", place),
        )
        if gradients is None:
            return loss, None
        with self.computing():
            gradient = frozen.flat(gradients).mul_(frozen.weights)
            gradient.mul_(theta * (1 - theta))
            if self.config.estimator == "probability":
                gradient.mul_(theta)
        return loss, gradient


def _draw(client: Client, place: Place, theta: torch.Tensor) -> torch.Tensor:
    """Draw the mask that is sent, bool, shape (d,), on the CPU."""
    shared = _shared(client)
    if shared.rule.config.code == "dither":
        most = torch.round(theta.double() * SCALE).cpu().numpy()
        drawn = numbers(shared.rule.seed, place.round, client.number, len(most))
        return torch.from_numpy(drawn < most)
    seed = client.seed("fedpm.mask", place)
    return (_uniform(shared.frozen, seed) < theta).cpu()


def _uniform(frozen: Frozen, seed: int) -> torch.Tensor:
    """Draw a number from 0 to less than 1 for each weight."""
    generator = torch.Generator(frozen.device).manual_seed(seed)
    return torch.rand(frozen.elements, generator=generator, device=frozen.device)


# --- what comes down ------------------------------------------------------------------


def _receive(client: Client, content: RecordDict) -> Theta:
    """Bring the probabilities up to date with what a message has; return them."""
    shared = _shared(client)
    theta = before = _theta(client)
    kind = VOTES if VOTES in content else THETA
    if kind in content:
        record, known = content[kind], shared.step
        if known is None or known[0] is not record or not _same(known[1], before):
            if kind == VOTES:
                ballot = ballot_of(content, client.run.clients)
                theta = ballot.theta(before, shared.rule)
            else:
                theta = theta_of(content, len(before.index))
            shared.step = known = record, before, theta
        theta = known[2]
    if theta.voters:
        client.state[THETA] = theta.tensors()
    shared.latest = theta
    return theta


def _theta(client: Client) -> Theta:
    """Return the probabilities that the client has."""
    shared, state = _shared(client), client.state
    if THETA not in state:
        return shared.initial
    theta = Theta.of_tensors(state[THETA])
    latest = shared.latest
    return latest if latest is not None and _same(latest, theta) else theta


def _same(one: Theta, other: Theta) -> bool:
    if one is other:
        return True
    return one.voters == other.voters and np.array_equal(one.index, other.index)


def _config(client: Client) -> FedPmConfig:
    config = client.setup.config
    assert isinstance(config, FedPmConfig)
    return config


def _shared(client: Client) -> _Shared:
    """Return what the clients of the process share."""
    caches, setup = client.setup.caches, client.setup
    if caches.method is None:
        caches.method = _Shared(*start(setup.module, _config(client), client.run.seed))
    shared: _Shared = caches.method
    return shared
