"""The client side of FLASH."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import RecordDict

from masksl.codec import topk
from masksl.methods.client import Client, ClientMethod, place_of
from masksl.methods.flash import FlashConfig
from masksl.methods.flash.coding import MaskCoding, Versioned, pack_counts
from masksl.methods.flash.evolution import Evolution, Plan, UnderMask
from masksl.methods.flash.layers import Layers
from masksl.methods.flash.messages import (
    COUNTS,
    HELD,
    MASK,
    TRAIN,
    UPDATE,
    WARMUP,
)
from masksl.methods.flash.start import FIRST, Start, network_of
from masksl.methods.flash.values import ValueCoding
from masksl.methods.local import run_epochs
from masksl.runtime import messages
from masksl.settings import Settings
from masksl.training.network import LocalNetwork
from masksl.training.tensors import Tensors, copies

LOST = "lost"  # under `feedback`: what compression has lost of its last update
BITS, KEPT = "mask", "kept"  # the mask of that update, and what it lost of its weights


@dataclass
class _Shared:
    """What the clients of a process share under one configuration.

    It changes no result: whoever lacks a part of it computes it again.
    """

    start: Start
    masks: MaskCoding
    down: ValueCoding
    up: ValueCoding
    decoded: tuple[bytes, Versioned] | None = None  # a mask
    received: tuple[bytes, torch.Tensor, Tensors] | None = None  # weights

    def mask(self, data: bytes, held: Versioned | None) -> Versioned:
        """Decode a mask, unless it is the one decoded last and was coded by none."""
        if held is not None:
            return self.masks.decode(data, held)
        known = self.decoded
        if known is None or known[0] != data:
            known = self.decoded = data, self.masks.decode(data, None)
        return known[1]

    def weights(
        self, data: bytes, counts: Sequence[int]
    ) -> tuple[torch.Tensor, Tensors]:
        """Decode weights likewise."""
        known = self.received
        if known is None or known[0] != data:
            known = self.received = data, *self.down.decode(data, counts)
        return known[1:]


def warm_up(client: Client, content: RecordDict) -> RecordDict:
    """Answer `train.warmup`: how many weights of each layer a trained mask keeps."""
    shared, config = _shared(client), _config(client)
    start, layers = shared.start, shared.start.layers
    rounds = int(messages.place_of(content)["rounds"])
    mask = torch.from_numpy(start.warmup_mask()).to(layers.device)
    with client.watch("compute"):
        weights = start.weights(start.counts)
        network = _network(client, copies(start.masked(weights, mask)))
        epochs, target = config.warmup_epochs, layers.kept(config.density)
        evolution = Evolution(mask, target, start.growth(client.number, 0))
        plan = Plan(client.train_steps(), epochs, config.prune_rate)
        under = UnderMask(network.tensors, evolution, plan)
        rates = client.setup.rates(1, rounds)
        run_epochs(client, network, epochs, rates, round_=0, after=under.after)
    counts = pack_counts(layers.counts(mask.cpu().numpy()))
    reply = RecordDict({COUNTS: messages.raw_record(counts)})
    reply[messages.METRICS] = client.metrics()
    return reply


def train(client: Client, content: RecordDict) -> RecordDict:
    """Answer `train.local`: train under a mask, then send what it keeps."""
    shared, config = _shared(client), _config(client)
    place, rounds = place_of(content), int(messages.place_of(content)["rounds"])
    with client.watch("codec"):
        held = _receive_mask(client, content)
        begin = _receive_weights(client, content, held.mask)
    with client.watch("compute"):
        network = _network(client, copies(begin))
        mask = torch.tensor(held.mask, device=client.setup.device)
        growth = shared.start.growth(client.number, place.round)
        evolution = Evolution(mask, shared.start.target(held.mask), growth)
        rate = config.prune_rate_in(place.round, rounds)
        plan = Plan(client.train_steps(), config.local_epochs, rate)
        under = UnderMask(network.tensors, evolution, plan)
        rates = client.setup.rates(place.round, rounds)
        epochs = config.local_epochs
        loss, samples = run_epochs(client, network, epochs, rates, after=under.after)
    reply = RecordDict()
    with client.watch("codec"):
        if config.evolves(place.round):
            after = mask.cpu().numpy()
            data = shared.masks.encode_changes(held.mask, evolution.changes, after)
            reply[MASK] = messages.raw_record(data)
            if config.variant == "nst":
                version = shared.start.next_version(place.round, client.number)
                own = Versioned(version, after)
                client.state[HELD] = shared.masks.tensors(own)
        seed = client.seed("compress", place)
        data = _encoded(client, network.tensors, begin, mask, seed)
        kind = messages.MODEL if shared.up.absolute else UPDATE
        reply[kind] = messages.set_record(data, shared.start.dense_bytes)
    reply[messages.METRICS] = client.metrics(loss=loss, samples=samples)
    return reply


def own_state(settings: Settings) -> Sequence[str]:
    """Return the names of what only the client knows."""
    return (LOST,) if settings["method.feedback"] else ()


CLIENT = ClientMethod(
    network_of,
    {TRAIN: train, WARMUP: warm_up},
    own_state,
)


# --- training -------------------------------------------------------------------------


def _changes(
    layers: Layers, tensors: Tensors, begin: Tensors, mask: torch.Tensor
) -> tuple[torch.Tensor, Tensors]:
    """Return how kept weights and the rest have changed."""
    kept = topk.masked(layers.flat(tensors), mask)
    kept -= topk.masked(layers.flat(begin), mask)
    return kept, {name: tensors[name].detach() - begin[name] for name in layers.rest}


def _encoded(
    client: Client, tensors: Tensors, begin: Tensors, mask: torch.Tensor, seed: int
) -> bytes:
    """Encode what a client sends up: kept weights and the rest, or their changes."""
    shared = _shared(client)
    layers, coding = shared.start.layers, shared.up
    counts = layers.counts(mask.cpu().numpy())
    if coding.absolute:
        kept = topk.masked(layers.flat(tensors), mask)
        return coding.encode(kept, counts, tensors, seed=seed)
    kept, rest = _changes(layers, tensors, begin, mask)
    if not _config(client).feedback:
        return coding.encode(kept, counts, rest, seed=seed)
    before = client.state.get(LOST, {})
    if before:
        flat = torch.zeros(layers.elements, device=layers.device)
        bits = np.unpackbits(before[BITS].cpu().numpy(), count=layers.elements)
        flat[torch.from_numpy(bits.view(bool)).to(flat.device)] = before[KEPT]
        kept += topk.masked(flat, mask)
        rest |= {name: rest[name] + before[name] for name in coding.dense}
    data = coding.encode(kept, counts, rest, seed=seed)
    decoded, others = coding.decode(data, counts)
    lost = {name: rest[name] - others[name] for name in coding.dense}
    bits = np.packbits(mask.cpu().numpy())
    client.state[LOST] = lost | {BITS: torch.from_numpy(bits), KEPT: kept - decoded}
    return data


# --- what comes down ------------------------------------------------------------------


def _receive_mask(client: Client, content: RecordDict) -> Versioned:
    """Return the mask of a message, and keep it."""
    shared, state = _shared(client), client.state
    start = shared.start
    if not start.config.has_masks:
        return Versioned(FIRST, np.ones(start.layers.elements, bool))
    held = shared.masks.of_tensors(state[HELD]) if HELD in state else None
    new = shared.mask(messages.raw_of(content, MASK), held)
    if held is None or new.version != held.version:
        state[HELD] = shared.masks.tensors(new)
    return new


def _receive_weights(client: Client, content: RecordDict, mask: np.ndarray) -> Tensors:
    """Return the tensors of the network that a round begins with, masked."""
    shared = _shared(client)
    start, layers = shared.start, shared.start.layers
    counts = layers.counts(mask)
    kept_at = torch.from_numpy(mask).to(layers.device)
    if messages.arrays_of(content, messages.MODEL) is None:
        return start.masked(start.weights(counts), kept_at)
    kept, rest = shared.weights(messages.set_of(content), counts)
    flat = torch.zeros(layers.elements, device=layers.device)
    flat[kept_at] = kept
    return start.tensors | layers.named(flat) | rest


def _network(client: Client, tensors: Tensors) -> LocalNetwork:
    """Return a network whose optimiser starts anew."""
    setup = client.setup
    return LocalNetwork(setup.module, tensors, {}, setup.threads, setup.compute)


def _config(client: Client) -> FlashConfig:
    config = client.setup.config
    assert isinstance(config, FlashConfig)
    return config


def _shared(client: Client) -> _Shared:
    """Return what the clients of the process share."""
    caches, setup = client.setup.caches, client.setup
    if caches.method is None:
        start = Start.of(setup.module, _config(client), client.run)
        codings = ValueCoding.both(start, setup.settings)
        caches.method = _Shared(start, MaskCoding(start), *codings)
    shared: _Shared = caches.method
    return shared
